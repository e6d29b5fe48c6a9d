// Sizes that the plan, the launch and the prefill kernels must agree on.
// Compiled by host C++, nvcc and NVRTC.

#pragma once

namespace mlx::core::quantized_sdpa {

// Codes of a row that a thread decodes at a time.
constexpr int unit_codes = 32;
// Of a block that merges splits, a warp a row.
constexpr int prefill_merge_threads = 128;

// K or V as a prefill kernel holds it.
struct PrefillOperand {
  int dim;
  // Scales a row.
  int groups;
  // Bytes of the table of a codebook's pairs, 0 where there is none.
  int table_bytes;
};

constexpr int pair_table_bytes(int bits, bool has_codebook) {
  return has_codebook ? 4 << (2 * bits) : 0;
}

// By mma.sync: all warps decode, then all multiply.
struct PrefillMmaShape {
  PrefillOperand k;
  PrefillOperand v;
  // Halves that hold a value: 2 for float32.
  int parts;

  constexpr int widest() const {
    return k.dim > v.dim ? k.dim : v.dim;
  }
  constexpr int rows() const {
    return widest() > 256 ? 32 : 64;
  }
  constexpr int keys() const {
    return widest() > 128 ? 32 : 64;
  }
  // Warps that share 16 rows, each with some columns of the result.
  constexpr int column_warps() const {
    return v.dim > 256 ? 2 : 1;
  }
  constexpr int threads() const {
    return rows() / 16 * column_warps() * 32;
  }

  // Bytes a row, an odd number of 16 so that ldmatrix meets no bank twice.
  static constexpr int pitch(int dim) {
    return 2 * dim + 16;
  }
  constexpr int tile() const {
    return parts * rows() * pitch(k.dim);
  }
  constexpr int k_table() const {
    return tile() + parts * keys() * pitch(widest());
  }
  constexpr int v_table() const {
    return k_table() + k.table_bytes;
  }
  constexpr int factors() const {
    return v_table() + v.table_bytes;
  }
  constexpr int peaks() const {
    return factors() + 4 * rows();
  }
  constexpr int bytes() const {
    return peaks() + 16;
  }
};

// By wgmma: one warpgroup decodes for two that multiply.
struct PrefillWgmmaShape {
  PrefillOperand k;
  PrefillOperand v;
  int keys;
  int stages;

  static constexpr int group_threads = 128;
  static constexpr int consumers = 2;
  static constexpr int rows = 64 * consumers;
  static constexpr int threads = group_threads * (consumers + 1);

  // Rows of 128 bytes, 64 columns of a tile; the columns' parts follow.
  constexpr int q_part() const {
    return rows * 128;
  }
  constexpr int kv_part() const {
    return keys * 128;
  }
  constexpr int tile_bytes() const {
    return kv_part() * (k.dim / 64);
  }
  constexpr int k_tiles() const {
    return q_part() * (k.dim / 64);
  }
  constexpr int v_tiles() const {
    return k_tiles() + stages * tile_bytes();
  }
  constexpr int k_scales() const {
    return v_tiles() + stages * tile_bytes();
  }
  constexpr int v_scales() const {
    return k_scales() + 8 * keys * k.groups;
  }
  constexpr int k_table() const {
    return v_scales() + 8 * keys * v.groups;
  }
  constexpr int v_table() const {
    return k_table() + k.table_bytes;
  }
  constexpr int factors() const {
    return v_table() + v.table_bytes;
  }
  constexpr int peaks() const {
    return factors() + 4 * rows;
  }
  constexpr int exponents() const {
    return peaks() + 8;
  }
  // Full and empty, of K and of V.
  constexpr int barriers() const {
    return exponents() + 8 * stages;
  }
  // Tiles start at 1024 bytes, of which the launch promises only 16.
  constexpr int bytes() const {
    return barriers() + 32 * stages + 1024;
  }
};

} // namespace mlx::core::quantized_sdpa
