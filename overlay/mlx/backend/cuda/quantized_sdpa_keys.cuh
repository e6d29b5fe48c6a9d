// Rows of queries and keys: who sees whom, and where a key lies.

#pragma once

#include "mlx/backend/cuda/quantized_sdpa_scalars.cuh"

#include "mlx/backend/common/visible_keys.h"

namespace mlx::core::quantized_sdpa {

using kv::KeyRange;

constexpr float log2_of_e = 1.4426950408889634f;
constexpr float log_of_2 = 0.6931471805599453f;

KV_DEVICE kv::KeyRule key_rule(const CudaParams& p) {
  return {p.causal, p.q_len, p.window_size};
}

KV_DEVICE KeyRange existing_keys(const CudaParams& p, int batch) {
  auto of_batch = [&](const CudaVector<int32_t>& x, int otherwise) {
    return x.data ? x.data[batch * x.stride] : otherwise;
  };
  return kv::existing_keys(
      p.kv_len, of_batch(p.left_padding, 0), of_batch(p.lengths, p.kv_len));
}

// Position of a key in memory.
struct KeyPlace {
  int outer;
  int row;
};

KV_DEVICE KeyPlace paged_place(const CudaParams& p, int batch, int key) {
  bool by_shift = (p.block_size & (p.block_size - 1)) == 0;
  int block = by_shift ? key >> (__ffs(p.block_size) - 1) : key / p.block_size;
  int id =
      p.block_table
          .data[batch * p.block_table.stride + block * p.block_table_column];
  return {kv::existing_block(id, p.n_blocks), key - block * p.block_size};
}

KV_DEVICE const uint8_t*
address_of(const CudaTensor& x, KeyPlace place, int head) {
  return x.data + place.outer * x.strides[0] + head * x.strides[1] +
      place.row * x.strides[2];
}

// ---------------------------------------------------------------------------
// Masks

KV_DEVICE float mask_value(Scalar type, const uint8_t* from) {
  return type == Scalar::f32 ? load_scalar<Scalar::f32>(from)
      : type == Scalar::f16  ? load_scalar<Scalar::f16>(from)
      : type == Scalar::bf16 ? load_scalar<Scalar::bf16>(from)
      : *from                ? 0.0f
                             : -KV_INFINITY;
}

// A score in units of log2 and its mask. Finite masks give finite sums, of at
// least `lowest`: a row masked by the lowest number throughout weighs its keys
// alike.
KV_DEVICE float
masked_score(const CudaParams& p, const uint8_t* mask, float x, float lowest) {
  float value = mask_value(p.mask_type, mask);
  bool hidden = x == -KV_INFINITY || value == -KV_INFINITY;
  // Not by fmaxf, which loses what is not a number.
  float sum = x + value * log2_of_e;
  sum = sum < lowest ? lowest : sum;
  return hidden ? -KV_INFINITY : sum;
}

// Small scores too keep their relative precision.
KV_DEVICE float capped_score(float softcap, float x) {
  float cap = softcap * log2_of_e;
  return cap * tanhf(x / cap);
}

} // namespace mlx::core::quantized_sdpa
