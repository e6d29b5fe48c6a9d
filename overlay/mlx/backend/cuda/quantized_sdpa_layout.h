// Sizes that the plan, the launch and the CUDA kernels must agree on.
// Compiled by host C++, nvcc and NVRTC.

#pragma once

namespace mlx::core::quantized_sdpa {

constexpr int warp_size = 32;
// Rows of q that one matrix instruction takes, and keys.
constexpr int row_tile = 8;
constexpr int key_tile = 16;
// Shared memory is filled and aligned by this many bytes.
constexpr int copy_bytes = 16;
constexpr int bank_bytes = 128;

constexpr int align_up(int x, int to) {
  return (x + to - 1) / to * to;
}

// K or V in a tile of keys.
struct OperandShape {
  int dim;
  int bits;
  int groups;
  // Bytes of a scale and of a bias, 0 where there is none.
  int scale_bytes;
  int bias_bytes;
  // Values are looked up in a table.
  bool has_table;

  constexpr int row_bytes() const {
    return dim * bits / 8;
  }

  // Rows that do not fill half the banks are padded to an odd number of
  // copies; other rows are swizzled.
  constexpr bool is_swizzled() const {
    return row_bytes() % (bank_bytes / 2) == 0;
  }

  constexpr int row_pitch() const {
    return is_swizzled()
        ? row_bytes()
        : (align_up(row_bytes(), copy_bytes) / copy_bytes | 1) * copy_bytes;
  }

  // One copy of every pair of codes for each lane, free of bank conflicts.
  constexpr int table_bytes() const {
    return has_table ? (1 << 2 * bits) * bank_bytes : 0;
  }
};

// Offsets of a stage of the ring.
struct StageLayout {
  int k;
  int v;
  int k_scales;
  int k_biases;
  int v_scales;
  int v_biases;
  int bytes;
};

constexpr StageLayout
stage_layout(const OperandShape& k, const OperandShape& v, int keys) {
  StageLayout x{};
  int end = 0;
  auto take = [&end](int bytes) {
    int begin = end;
    end += align_up(bytes, copy_bytes);
    return begin;
  };
  x.k = take(keys * k.row_pitch());
  x.v = take(keys * v.row_pitch());
  x.k_scales = take(keys * k.groups * k.scale_bytes);
  x.k_biases = take(keys * k.groups * k.bias_bytes);
  x.v_scales = take(keys * v.groups * v.scale_bytes);
  x.v_biases = take(keys * v.groups * v.bias_bytes);
  x.bytes = end;
  return x;
}

// How a block works; the plan chooses it.
struct DecodeShape {
  int warps;
  int stages;
  // Keys a stage.
  int keys;
  // Rows in units of row_tile.
  int row_tiles;
  // Halves that hold a value of q and of the weights: 2 for float32.
  int parts;

  constexpr int rows() const {
    return row_tiles * row_tile;
  }
};

// Offsets of a block's shared memory. The ring is reused to merge.
struct SharedLayout {
  int queries;
  int query_sums;
  int query_scales;
  int row_ranges;
  int states;
  // Whether the block is the last of its group.
  int is_last;
  int k_table;
  int v_table;
  int ring;
  int bytes;
};

constexpr SharedLayout shared_layout(
    const OperandShape& k,
    const OperandShape& v,
    const DecodeShape& shape) {
  SharedLayout x{};
  int end = 0;
  auto take = [&end](int bytes) {
    int begin = end;
    end += align_up(bytes, bank_bytes);
    return begin;
  };
  int rows = shape.rows();
  x.queries = take(shape.parts * rows * k.dim * 2);
  x.query_sums = take(k.bias_bytes > 0 ? rows * k.groups * 4 : 0);
  x.query_scales = take(rows * 4);
  x.row_ranges = take(rows * 16);
  x.states = take(shape.warps * rows * 8);
  x.is_last = take(4);
  x.k_table = take(k.table_bytes() * shape.parts);
  x.v_table = take(v.table_bytes() * shape.parts);
  int ring = shape.warps * shape.stages * stage_layout(k, v, shape.keys).bytes;
  int merge = shape.warps * row_tile * (v.dim + 4) * 4;
  x.ring = take(ring > merge ? ring : merge);
  x.bytes = end;
  return x;
}

} // namespace mlx::core::quantized_sdpa
