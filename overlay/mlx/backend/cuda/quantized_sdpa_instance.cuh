// What follows at compile time from one instance's formats and sizes.
//
// An instance I has KCodec, VCodec; the types q_type, k_scale_type,
// k_bias_type, v_scale_type, v_bias_type; k_dim, v_dim, k_group, v_group; the
// plan's warps, stages, tile_keys, row_tiles; how codes are copied: k_chunk,
// v_chunk (bytes a copy), k_dense, v_dense (rows without gaps); how scales are:
// dense_scales (a tile is one piece), or else k_scale_chunk and the like (bytes
// a copy, 0 for values one by one); paging; has_mask, has_softcap.

#pragma once

#include "mlx/backend/cuda/quantized_sdpa_tiles.cuh"

namespace mlx::core::quantized_sdpa {

template <typename Codec>
constexpr OperandShape
operand_shape(int dim, int group, Scalar scale_type, Scalar bias_type) {
  return {
      dim,
      Codec::bits,
      dim / group,
      scalar_bytes(scale_type),
      Codec::has_bias ? scalar_bytes(bias_type) : 0,
      Codec::has_codebook};
}

// Values of a lane's run, so that the lanes that share a group of values fill
// whole runs.
constexpr int run_length(int dim, int lanes, int longest) {
  int run = longest;
  while (dim % (lanes * run) != 0) {
    run /= 2;
  }
  return run;
}

template <typename I>
struct Traits {
  using K = typename I::KCodec;
  using V = typename I::VCodec;

  static constexpr int warps = I::warps;
  static constexpr int threads = warps * warp_size;
  static constexpr int stages = I::stages;
  static constexpr int tile_keys = I::tile_keys;
  static constexpr int row_tiles = I::row_tiles;
  static constexpr int rows = row_tiles * row_tile;
  // A value of q and a weight are a sum of this many halves.
  static constexpr int parts = I::q_type == Scalar::f32 ? 2 : 1;
  static constexpr int k_parts = K::has_codebook ? parts : 1;
  static constexpr int v_parts = V::has_codebook ? parts : 1;

  static constexpr auto k_shape =
      operand_shape<K>(I::k_dim, I::k_group, I::k_scale_type, I::k_bias_type);
  static constexpr auto v_shape =
      operand_shape<V>(I::v_dim, I::v_group, I::v_scale_type, I::v_bias_type);
  static constexpr auto stage = stage_layout(k_shape, v_shape, tile_keys);
  static constexpr auto shared = shared_layout(
      k_shape,
      v_shape,
      DecodeShape{warps, stages, tile_keys, row_tiles, parts});

  // Groups whose scale is applied outside of the product.
  static constexpr bool k_scaled = Convert<K>::scales_values;
  static constexpr bool v_scaled = Convert<V>::scales_values;
  static constexpr int k_groups = k_scaled ? 1 : k_shape.groups;
  static constexpr int v_groups = v_scaled ? 1 : v_shape.groups;
  static constexpr int k_run = run_length(I::k_dim / k_groups, 4, 16);
  static constexpr int v_run = run_length(I::v_dim / v_groups, 8, 8);
  using KRun = Run<K, k_run>;
  using VRun = Run<V, v_run>;
  // A block is what the lanes of a row read at a time.
  static constexpr int k_blocks = I::k_dim / (4 * k_run);
  static constexpr int v_blocks = I::v_dim / (8 * v_run);
  static constexpr int k_steps = k_run / 4;
  static constexpr int v_tiles = v_run / 2;
  static constexpr int query_pieces = I::k_dim / 16;

  static constexpr int at_most(int x, int limit) {
    return x < limit ? x : limit;
  }
  // Bytes of a row that its lanes read at a time.
  static constexpr int k_width = at_most(4 * k_run * K::bits / 8, 64);
  static constexpr int v_width = at_most(8 * v_run * V::bits / 8, 32);

  static constexpr bool keeps_queries =
      parts * row_tiles * query_pieces * 2 <= 32;

  // The tile's first key of a lane that has row r of each block of 8 rows, in
  // the pair of blocks `sub`; its second key follows.
  static KV_DEVICE int first_key(int r, int sub) {
    return r * (tile_keys / row_tile) + 2 * sub;
  }

  // Row `slot` of block `block` of a tile's codes.
  static KV_DEVICE Row k_row(uint32_t codes, int block, int r) {
    int row = row_in_block<false>(r);
    uint32_t at = (block * row_tile + row) * k_shape.row_pitch();
    return {codes + at, swizzle_of<k_shape.row_bytes(), k_width>(row)};
  }
  static KV_DEVICE Row v_row(uint32_t codes, int block, int r) {
    int row = row_in_block<true>(r);
    uint32_t at = (block * row_tile + row) * v_shape.row_pitch();
    return {codes + at, swizzle_of<v_shape.row_bytes(), v_width>(row)};
  }
};

// Neighbouring scales or biases in registers.
template <Scalar type, int n>
struct Scalars {
  static constexpr int bytes = n * scalar_bytes(type);
  uint32_t words[(bytes + 3) / 4];

  KV_DEVICE void load(uint32_t address) {
    if constexpr (bytes % 4 == 0) {
      load_shared(address, words);
    } else if constexpr (bytes == 1) {
      words[0] = load_shared_u8(address);
    } else if constexpr (bytes % 2 == 0) {
#pragma unroll
      for (int i = 0; i < bytes; i += 2) {
        uint32_t x = load_shared_u16(address + i);
        words[i / 4] = i % 4 == 0 ? x : words[i / 4] | x << 16;
      }
    }
  }

  KV_DEVICE uint32_t code(int i) const {
    return (words[i / 4] >> (i % 4 * 8)) & 0xff;
  }

  KV_DEVICE float at(int i) const {
    if constexpr (type == Scalar::f32) {
      return bits_float(words[i]);
    } else if constexpr (type == Scalar::f16) {
      return f16_to_float((words[i / 2] >> (i % 2 * 16)) & 0xffff);
    } else if constexpr (type == Scalar::bf16) {
      uint32_t x = words[i / 2];
      return bits_float(i % 2 == 0 ? x << 16 : x & 0xffff0000u);
    } else if constexpr (type == Scalar::e8m0) {
      // As kv::e8m0_to_float, whose code here need not be a number first.
      int up = 23 - i % 4 * 8;
      uint32_t x = up > 0 ? words[i / 4] << up : words[i / 4] >> -up;
      return bits_float(max(x & 0x7f800000u, 0x400000u));
    } else {
      return kv::e4m3_to_float(code(i));
    }
  }
};

} // namespace mlx::core::quantized_sdpa
