// A row of scores to weights: soft cap, masks, online softmax.

#pragma once

#include "mlx/backend/cpu/quantized_sdpa_keys.h"

namespace {

KV_INLINE Floats tanh_floats(Floats x) {
  Floats magnitude = x < splat(0.0f) ? -x : x;
  Floats e = exp_negative(magnitude * splat(-2.0f));
  Floats large = (splat(1.0f) - e) / (splat(1.0f) + e);
  Floats square = x * x;
  // Near zero the quotient cancels; the series is exact to float there.
  Floats small = magnitude *
      (splat(1.0f) + square * (splat(-1.0f / 3) + square * splat(2.0f / 15)));
  Floats value = magnitude < splat(0.1f) ? small : large;
  return x < splat(0.0f) ? -value : value;
}

inline void apply_softcap(float cap, int n, float* scores) {
  for (int i = 0; i < n; i += lanes) {
    Floats x = load<Floats>(scores + i) / splat(cap);
    store(scores + i, tanh_floats(x) * splat(cap));
  }
}

inline void
apply_mask(const Tensor& mask, int64_t offset, KeyRange tile, float* scores) {
  int n = tile.end - tile.begin;
  float values[tile_keys];
  convert_fn(mask.type)(
      mask.data,
      offset + tile.begin * mask.strides[3],
      mask.strides[3],
      n,
      values);
  if (mask.type == Scalar::boolean) {
    for (int i = 0; i < n; ++i) {
      scores[i] = values[i] != 0 ? scores[i] : -KV_INFINITY;
    }
  } else {
    for (int i = 0; i < n; ++i) {
      scores[i] += values[i];
    }
  }
}

inline void hide(float* scores, int begin, int end) {
  for (int i = begin; i < end; ++i) {
    scores[i] = -KV_INFINITY;
  }
}

// Scores of one row over a tile become weights relative to the state's
// maximum; the result is what the row's weighted sum is scaled by. Weights of
// keys that the row does not see are 0, up to padded_keys.
inline float softmax_tile(
    const CpuArgs& args,
    const CpuItem& item,
    KeyRange existing,
    int row,
    KeyRange tile,
    float* scores,
    kv::SoftmaxState& state) {
  int heads = args.n_q_heads / args.n_kv_heads;
  int q_pos = row / heads;
  int n = tile.end - tile.begin;
  int padded = padded_keys(n);
  if (args.softcap > 0) {
    apply_softcap(args.softcap, padded, scores);
  }
  if (args.mask.data) {
    auto& m = args.mask;
    int head = item.kv_head * heads + row % heads;
    int64_t offset =
        item.batch * m.strides[0] + head * m.strides[1] + q_pos * m.strides[2];
    apply_mask(m, offset, tile, scores);
  }
  KeyRange seen = kv::visible_keys(existing, key_rule(args), q_pos);
  hide(scores, 0, kv::clamp_index(seen.begin - tile.begin, 0, n));
  hide(scores, kv::clamp_index(seen.end - tile.begin, 0, n), padded);

  Floats top = splat(-KV_INFINITY);
  for (int i = 0; i < padded; i += lanes) {
    top = maximum(load<Floats>(scores + i), top);
  }
  float factor = kv::softmax_raise(state, reduce_max(top));
  // With nothing visible yet every score is -inf or NaN; NaN must stay.
  float max = state.max == -KV_INFINITY ? 0.0f : state.max;
  Floats sum = {};
  for (int i = 0; i < padded; i += lanes) {
    Floats weights = exp_negative(load<Floats>(scores + i) - splat(max));
    store(scores + i, weights);
    sum += weights;
  }
  state.sum += reduce_sum(sum);
  return factor;
}

inline void scale_row(float factor, int n, float* row) {
  if (factor != 1.0f) {
    for (int i = 0; i < n; i += lanes) {
      store(row + i, load<Floats>(row + i) * splat(factor));
    }
  }
}

// Rows come in fours where a tile is shared.
inline int tile_rows(int n_rows) {
  return (n_rows + 3) / 4 * 4;
}

// The rows of q in float32, times the scale of the scores.
inline void load_queries(
    const CpuArgs& args,
    const CpuItem& item,
    int padded_rows,
    float* q) {
  int heads = args.n_q_heads / args.n_kv_heads;
  int dim = args.k.dim;
  for (int r = 0; r < padded_rows; ++r) {
    float* row = q + r * dim;
    if (r >= item.n_rows) {
      memset(row, 0, dim * sizeof(float));
      continue;
    }
    int head = item.kv_head * heads + (item.row_begin + r) % heads;
    int pos = (item.row_begin + r) / heads;
    int64_t offset = item.batch * args.q.strides[0] + head * args.q.strides[1] +
        pos * args.q.strides[2];
    convert_fn(args.q.type)(args.q.data, offset, args.q.strides[3], dim, row);
    for (int i = 0; i < dim; i += lanes) {
      store(row + i, load<Floats>(row + i) * splat(args.scale));
    }
  }
}

} // namespace
