// Online softmax over pieces of a row, one formula for every backend.
// The caller holds the weighted sum of values and scales it as told here.

#pragma once

#include "mlx/backend/common/kv_codec.h"

#if defined(__METAL__) || defined(MLX_METAL_JIT)
#define KV_EXP(x) metal::fast::exp(x)
#define KV_LOG(x) metal::log(x)
#define KV_INFINITY INFINITY
#define KV_THREAD thread
#else
#include <math.h>
// CUDA's decode kernel brings its own: its states are in powers of two.
#if !defined(KV_EXP)
#define KV_EXP(x) ::expf(x)
#define KV_LOG(x) ::logf(x)
#endif
#if !defined(KV_INFINITY)
#define KV_INFINITY HUGE_VALF
#endif
#define KV_THREAD
#endif

namespace mlx {
namespace core {
namespace kv {

// max is -inf and sum 0 until a visible key was seen.
struct SoftmaxState {
  float max;
  float sum;
};

// What two weighted sums are multiplied by before they are added.
struct MergeFactors {
  float first;
  float second;
};

KV_FN SoftmaxState softmax_init() {
  SoftmaxState state;
  state.max = -KV_INFINITY;
  state.sum = 0;
  return state;
}

// exp(x - max) with exp(-inf - -inf) = 0: a piece with no visible key.
KV_FN float softmax_weight(float x, float max) {
  return x == -KV_INFINITY ? 0.0f : KV_EXP(x - max);
}

// Raises the maximum to that of a new piece; the result scales what is held.
KV_FN float softmax_raise(KV_THREAD SoftmaxState& state, float piece_max) {
  if (!(piece_max > state.max)) {
    return 1.0f;
  }
  float factor = softmax_weight(state.max, piece_max);
  state.max = piece_max;
  state.sum *= factor;
  return factor;
}

KV_FN MergeFactors
softmax_merge(KV_THREAD SoftmaxState& state, SoftmaxState other) {
  MergeFactors factors;
  float max = other.max > state.max ? other.max : state.max;
  factors.first = softmax_weight(state.max, max);
  factors.second = softmax_weight(other.max, max);
  state.sum = state.sum * factors.first + other.sum * factors.second;
  state.max = max;
  return factors;
}

// The factor of the weighted sum; a row with no visible key gives zeros.
KV_FN float softmax_finish(SoftmaxState state) {
  return state.sum == 0 ? 0.0f : 1.0f / state.sum;
}

KV_FN float softmax_lse(SoftmaxState state) {
  return state.sum == 0 ? -KV_INFINITY : state.max + KV_LOG(state.sum);
}

} // namespace kv
} // namespace core
} // namespace mlx
