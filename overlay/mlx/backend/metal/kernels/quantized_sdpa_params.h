// What the host tells the Metal kernels, and sizes that both derive from an
// instance. Strides count elements; axes are batch (or block), head, sequence,
// last.

#pragma once

#include "mlx/backend/common/kv_codec.h"

namespace mlx {
namespace core {
namespace quantized_sdpa {

struct MetalOperandParams {
  int64_t codes[4];
  int64_t scales[4];
  int64_t biases[4];
  int64_t codebook;
};

struct MetalParams {
  MetalOperandParams k;
  MetalOperandParams v;
  int64_t q[4];
  int64_t mask[4];
  int64_t sinks;
  int64_t left_padding;
  int64_t lengths;
  int64_t block_table[2];
  int n_q_heads;
  int n_kv_heads;
  int q_len;
  int kv_len;
  // Of a paged cache: keys a block, blocks in the pool.
  int block_size;
  int n_blocks;
  int n_splits;
  int window_size;
  float scale;
  float softcap;
};

// The order of the kernels' function constants, all of them bool.
enum MetalFeature {
  metal_has_mask,
  metal_mask_is_bool,
  metal_mask_is_half,
  metal_mask_is_bfloat,
  metal_is_causal,
  metal_has_window,
  metal_has_softcap,
  metal_has_sinks,
  metal_has_left_padding,
  metal_has_lengths,
  metal_has_block_table,
  metal_has_code_gaps,
  metal_return_lse,
  metal_is_split,
  metal_n_features,
};

// The order of the kernels' buffers.
enum MetalBuffer {
  metal_q,
  metal_k_codes,
  metal_k_scales,
  metal_k_biases,
  metal_k_codebook,
  metal_v_codes,
  metal_v_scales,
  metal_v_biases,
  metal_v_codebook,
  metal_params,
  metal_out,
  metal_lse,
  metal_partials,
  metal_states,
  metal_mask,
  metal_sinks,
  metal_left_padding,
  metal_lengths,
  metal_block_table,
  metal_n_buffers,
};

// Keys that a simdgroup of the vector kernel attends to at a time, one a lane.
KV_FN constexpr int vector_tile_keys() {
  return 32;
}

KV_FN constexpr int vector_simdgroups() {
  return 4;
}

KV_FN constexpr int merge_simdgroups() {
  return 4;
}

// Codes of one key that a lane of the vector kernel decodes: fewer where it
// holds more rows, whole words where those do not take too many registers, and
// at most 32 lanes a key.
KV_FN constexpr int lane_codes(int bits, int dim, int rows) {
  int unit = kv::word_codes(bits);
  int n = rows == 1 ? 32 : rows == 2 ? 16 : 8;
  n = n < unit && rows * unit <= 64 ? unit : n;
  while (dim % n != 0 && n > 8) {
    n /= 2;
  }
  while (dim > 32 * n) {
    n *= 2;
  }
  return n;
}

// A power of two; the last lanes of an odd number of pieces rest.
KV_FN constexpr int key_lanes(int dim, int codes) {
  int n = 1;
  while (n * codes < dim) {
    n *= 2;
  }
  return n;
}

} // namespace quantized_sdpa
} // namespace core
} // namespace mlx
