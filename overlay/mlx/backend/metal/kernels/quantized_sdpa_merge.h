// The second pass: brings the partial results of a row's splits together.

#pragma once

#include "mlx/backend/metal/kernels/quantized_sdpa_features.h"

// Grid: rows of a KV head, KV heads, batch. Each simdgroup takes a part of the
// splits, each lane values 32 apart.
template <typename T, int dim>
[[kernel, max_total_threads_per_threadgroup(128)]] void quantized_sdpa_merge(
    const constant mlx::core::quantized_sdpa::MetalParams& params [[buffer(9)]],
    device T* out [[buffer(10)]],
    device float* lse [[buffer(11), function_constant(return_lse)]],
    const device float* partials [[buffer(12)]],
    const device float* states [[buffer(13)]],
    const device float* sinks [[buffer(15), function_constant(has_sinks)]],
    uint3 group [[threadgroup_position_in_grid]],
    uint3 grid [[threadgroups_per_grid]],
    uint simdgroup [[simdgroup_index_in_threadgroup]],
    uint lane [[thread_index_in_simdgroup]]) {
  using namespace mlx::core::quantized_sdpa;
  namespace kv = mlx::core::kv;
  constexpr int n_simdgroups = merge_simdgroups();
  constexpr int n_values = (dim + 31) / 32;
  threadgroup float maxima[n_simdgroups];
  threadgroup float sums[n_simdgroups];
  threadgroup float gathered[n_simdgroups * dim];

  int64_t row = (int64_t(group.z) * grid.y + group.y) * grid.x + group.x;
  const device float* row_states = states + row * params.n_splits * 2;
  const device float* row_partials = partials + row * params.n_splits * dim;
  kv::SoftmaxState state = kv::softmax_init();
  float acc[n_values] = {0};
  for (int split = simdgroup; split < params.n_splits; split += n_simdgroups) {
    kv::SoftmaxState other;
    other.max = row_states[split * 2];
    other.sum = row_states[split * 2 + 1];
    kv::MergeFactors factors = kv::softmax_merge(state, other);
    KV_UNROLL
    for (int i = 0; i < n_values; ++i) {
      int d = i * 32 + lane;
      if (d < dim) {
        acc[i] = acc[i] * factors.first +
            row_partials[int64_t(split) * dim + d] * factors.second;
      }
    }
  }
  KV_UNROLL
  for (int i = 0; i < n_values; ++i) {
    int d = i * 32 + lane;
    if (d < dim) {
      gathered[simdgroup * dim + d] = acc[i];
    }
  }
  if (lane == 0) {
    maxima[simdgroup] = state.max;
    sums[simdgroup] = state.sum;
  }
  metal::threadgroup_barrier(metal::mem_flags::mem_threadgroup);

  kv::SoftmaxState whole = kv::softmax_init();
  for (int s = 0; s < n_simdgroups; ++s) {
    kv::SoftmaxState other;
    other.max = maxima[s];
    other.sum = sums[s];
    kv::softmax_merge(whole, other);
  }
  float top = whole.max;
  QueryRow place = query_row(group.x, group.y, params);
  float factor = finish_row(whole, place.head, sinks, params);
  int64_t at = result_row(group.z, place, params);
  for (int d = simdgroup * 32 + lane; d < dim; d += n_simdgroups * 32) {
    float value = 0;
    for (int s = 0; s < n_simdgroups; ++s) {
      value += gathered[s * dim + d] * kv::softmax_weight(maxima[s], top);
    }
    out[at * dim + d] = T(value * factor);
  }
  if (return_lse && simdgroup == 0 && lane == 0) {
    lse[at] = kv::softmax_lse(whole);
  }
}
