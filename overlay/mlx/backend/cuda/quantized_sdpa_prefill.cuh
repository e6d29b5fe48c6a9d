// What the prefill kernels share: rows and the keys they see, tiles of K and V
// on their way from codes to float16, online softmax on MMA accumulators.

#pragma once

#include "mlx/backend/cuda/quantized_sdpa_keys.cuh"
#include "mlx/backend/cuda/quantized_sdpa_prefill_convert.cuh"

#include "mlx/backend/common/softmax_state.h"

namespace mlx::core::quantized_sdpa::prefill {

// Weights are kept times 2 ** weight_log2 so that small ones stay normal in
// float16. A row's level follows its maximum in steps above level_slack, so
// that weights stay below 2 ** (weight_log2 + level_slack).
constexpr float weight_log2 = 8;
constexpr float level_slack = 6;
// Of a score and its mask.
constexpr float lowest_sum = -3e38f;

// How K or V is stored: the codec, values a scale, types of the stored scales.
template <typename Codec_, int group_size_, Scalar scale_, Scalar bias_>
struct StoredAs {
  using Codec = Codec_;
  static constexpr int bits = Codec::bits;
  static constexpr int group_size = group_size_;
  static constexpr Scalar scale_type = scale_;
  static constexpr Scalar bias_type = bias_;

  static constexpr PrefillOperand operand(int dim) {
    return {
        dim,
        dim / group_size,
        pair_table_bytes(Codec::bits, Codec::has_codebook)};
  }
};

// float32 values as halves that together keep 22 bits.
KV_DEVICE void
split_f16(float low, float high, uint32_t& rounded, uint32_t& rest) {
  rounded = pack_f16(low, high);
  rest =
      pack_f16(low - f16_to_float(rounded), high - f16_to_float(rounded >> 16));
}

// ---------------------------------------------------------------------------
// Rows and keys

// Partial results of keys that are split over blocks, in CudaWork:
// partial_acc [splits, batch, n_kv_heads, rows, v_dim], partial_state the same
// without v_dim. Blocks are ordered by split, KV head, block of rows.

// Where a block works: rows of a KV head are query positions times the heads
// of its group, position-major.
struct BlockPlace {
  int batch;
  int kv_head;
  int split;
  int first_row;
  int n_rows;
  int group;
  KeyRange existing;
};

KV_DEVICE BlockPlace locate_block(const CudaParams& p, int rows) {
  BlockPlace b;
  // The last rows see the most keys: they go first.
  int head = blockIdx.x / p.work.row_blocks;
  int row_block = p.work.row_blocks - 1 - blockIdx.x % p.work.row_blocks;
  int n_heads = p.batch * p.n_kv_heads;
  b.split = head / n_heads;
  b.batch = head % n_heads / p.n_kv_heads;
  b.kv_head = head % p.n_kv_heads;
  b.group = p.n_q_heads / p.n_kv_heads;
  b.first_row = row_block * rows;
  b.n_rows = b.group * p.q_len;
  b.existing = existing_keys(p, b.batch);
  return b;
}

// Empty for rows past the last one.
KV_DEVICE KeyRange
keys_of_row(const CudaParams& p, const BlockPlace& b, int row) {
  return row < b.n_rows
      ? kv::visible_keys(b.existing, key_rule(p), row / b.group)
      : KeyRange{0, 0};
}

// Keys that any of the rows sees; keys that all of them see.
struct BlockKeys {
  KeyRange any;
  KeyRange all;
};

KV_DEVICE BlockKeys
block_keys(const CudaParams& p, const BlockPlace& b, int rows) {
  int first = b.first_row / b.group;
  int last = (min(b.first_row + rows, b.n_rows) - 1) / b.group;
  auto rule = key_rule(p);
  return {
      kv::visible_to_any(b.existing, rule, first, last),
      kv::visible_to_all(b.existing, rule, first, last)};
}

// This block's share of the keys, in whole tiles from `any.begin` on.
template <int keys>
KV_DEVICE KeyRange split_keys(KeyRange any, int split, int n_splits) {
  int n_tiles =
      any.end > any.begin ? (any.end - any.begin + keys - 1) / keys : 0;
  int share = (n_tiles + n_splits - 1) / n_splits;
  int begin = any.begin + min(split * share, n_tiles) * keys;
  return {begin, min(any.end, begin + share * keys)};
}

KV_DEVICE KeyPlace place_of_key(const CudaParams& p, int batch, int key) {
  return p.block_size > 0 ? paged_place(p, batch, key) : KeyPlace{batch, key};
}

// ---------------------------------------------------------------------------
// Range: float16 holds values divided by 2 ** exponent, which only rises

constexpr int least_exponent = -120;
constexpr int largest_exponent = 126;

// What 2 ** exponent must not be below for a group of values, whose scale too
// becomes a float16 unless they are made in float32, as two parts. What is not
// finite reaches its own row only.
template <typename Codec, int parts = 1>
KV_DEVICE float range_bound(float scale, float bias) {
  using Convert = F16Convert<Codec>;
  constexpr float by_step =
      parts == 1 ? float(1 << Convert::unit_log2) / 32768.0f : 0;
  constexpr float by_value = Convert::largest / 16384.0f;
  constexpr float a = by_step > by_value ? by_step : by_value;
  float bound = fmaxf(fabsf(scale) * a, fabsf(bias) / 16384.0f);
  return bound < KV_INFINITY ? fminf(bound, 3.0e38f) : 0.0f;
}

// `peak` in shared memory holds the greatest bound seen, as an integer.
KV_DEVICE int exponent_above(int peak) {
  return kv::clamp_index((peak >> 23) - 126, least_exponent, largest_exponent);
}

template <typename Codec>
KV_DEVICE void scale_pair(
    float scale,
    float bias,
    int exponent,
    uint32_t& scale2,
    uint32_t& bias2) {
  float unit = power_of_two(-exponent);
  scale *= unit * power_of_two(F16Convert<Codec>::unit_log2);
  scale2 = pack_f16(scale, scale);
  bias2 = pack_f16(bias * unit, bias * unit);
}

// Codes of one unit; zeros where the key does not exist. Rows are whole words,
// `wide` says that they start at 16 bytes.
template <int bits>
KV_DEVICE void
load_words(const uint8_t* row, bool wide, uint32_t (&words)[bits]) {
  auto p = reinterpret_cast<const uint32_t*>(row);
  if (bits % 4 == 0 && wide) {
#pragma unroll
    for (int i = 0; i + 4 <= bits; i += 4) {
      load_global4(p + i, words + i);
    }
  } else if (bits % 2 == 0 && wide) {
#pragma unroll
    for (int i = 0; i + 2 <= bits; i += 2) {
      load_global2(p + i, words + i);
    }
  } else {
#pragma unroll
    for (int i = 0; i < bits; ++i) {
      words[i] = load_global(p + i);
    }
  }
}

KV_DEVICE bool is_wide(const CudaTensor& x) {
  auto bits = reinterpret_cast<uint64_t>(x.data) | x.strides[0] | x.strides[1] |
      x.strides[2];
  return bits % 16 == 0;
}

// ---------------------------------------------------------------------------
// Scores to weights. A thread holds two rows of the accumulator of an MMA:
// scores[j][0..1] are columns 8 j + 2 (lane % 4) of row lane / 4, [2..3] the
// same columns of the row 8 below.

struct RowView {
  KeyRange seen;
  const uint8_t* mask;
  // Scores in units of log2 are accumulators times this and 2 ** k_exponent.
  float factor;
};

// A row of q over 2 ** exponent, by one warp: lane l has values l, l + 32 and
// so on, value i of them from dim_at(i). Zeros past the last row.
template <Scalar type, int n>
struct QueryRow {
  float values[n];
  int exponent;

  template <typename DimAt>
  KV_DEVICE void
  load(const CudaParams& p, const BlockPlace& b, int row, DimAt dim_at) {
    int lane = threadIdx.x % 32;
    const uint8_t* q = p.q.data + b.batch * p.q.strides[0] +
        (b.kv_head * b.group + row % b.group) * p.q.strides[1] +
        row / b.group * p.q.strides[2];
    float top = 0;
#pragma unroll
    for (int i = 0; i < n; ++i) {
      const uint8_t* from = q + dim_at(32 * i + lane) * p.q.strides[3];
      values[i] = row < b.n_rows ? load_scalar<type>(from) : 0;
      top = fmaxf(top, fabsf(values[i]));
    }
    for (int step = 16; step > 0; step /= 2) {
      top = fmaxf(top, __shfl_xor_sync(all_lanes, top, step));
    }
    exponent = kv::clamp_index(exponent_of(top) - 7, least_exponent, 100);
    float unit = copysignf(power_of_two(-exponent), p.scale);
#pragma unroll
    for (int i = 0; i < n; ++i) {
      values[i] *= unit;
    }
  }

  // What scores are multiplied by to be in units of log2.
  KV_DEVICE float factor(const CudaParams& p) const {
    return fabsf(p.scale) * log2_of_e * power_of_two(exponent);
  }
};

struct RowState {
  // In units of log2.
  float level = -KV_INFINITY;
  float sum = 0;
};

KV_DEVICE RowView
view_row(const CudaParams& p, const BlockPlace& b, int row, float q_factor) {
  RowView view{keys_of_row(p, b, row), nullptr, q_factor};
  if (p.mask.data && row < b.n_rows) {
    int head = b.kv_head * b.group + row % b.group;
    view.mask = p.mask.data + b.batch * p.mask.strides[0] +
        head * p.mask.strides[1] + row / b.group * p.mask.strides[2];
  }
  return view;
}

// Soft cap and mask; scores then are in units of log2.
template <int n>
KV_DEVICE void bend_scores(
    const CudaParams& p,
    const RowView (&rows)[2],
    const float (&factor)[2],
    int first_key,
    float (&scores)[n][4]) {
#pragma unroll
  for (int j = 0; j < n; ++j) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      float x = scores[j][i] * factor[i / 2];
      if (p.softcap > 0) {
        x = capped_score(p.softcap, x);
      }
      int key = first_key + 8 * j + i % 2;
      auto& row = rows[i / 2];
      if (row.mask && key >= row.seen.begin && key < row.seen.end) {
        x = masked_score(p, row.mask + key * p.mask.strides[3], x, lowest_sum);
      }
      scores[j][i] = x;
    }
  }
}

template <int n>
KV_DEVICE void
hide_keys(const RowView (&rows)[2], int first_key, float (&scores)[n][4]) {
#pragma unroll
  for (int j = 0; j < n; ++j) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      int key = first_key + 8 * j + i % 2;
      auto& seen = rows[i / 2].seen;
      bool hidden = key < seen.begin || key >= seen.end;
      scores[j][i] = hidden ? -KV_INFINITY : scores[j][i];
    }
  }
}

KV_DEVICE float quad_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(all_lanes, x, 1));
  return fmaxf(x, __shfl_xor_sync(all_lanes, x, 2));
}

KV_DEVICE float quad_sum(float x) {
  x += __shfl_xor_sync(all_lanes, x, 1);
  return x + __shfl_xor_sync(all_lanes, x, 2);
}

// Scores become weights; `rescale` gets what sums so far are multiplied by.
// The result says whether that is anything but 1.
template <int n>
KV_DEVICE bool weigh_scores(
    const float (&factor)[2],
    RowState (&states)[2],
    float (&scores)[n][4],
    float (&rescale)[2]) {
  bool raised = false;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    float top = fmaxf(scores[0][2 * r], scores[0][2 * r + 1]);
#pragma unroll
    for (int j = 1; j < n; ++j) {
      top = fmaxf(top, fmaxf(scores[j][2 * r], scores[j][2 * r + 1]));
    }
    top = quad_max(top) * factor[r];
    auto& state = states[r];
    rescale[r] = 1.0f;
    if (top > state.level + level_slack || state.level == -KV_INFINITY) {
      rescale[r] = state.level == top ? 1.0f : exp2_approx(state.level - top);
      state.level = top;
      raised = true;
    }
    float base = state.level == -KV_INFINITY ? 0 : weight_log2 - state.level;
    float sum = 0;
#pragma unroll
    for (int j = 0; j < n; ++j) {
#pragma unroll
      for (int i = 2 * r; i < 2 * r + 2; ++i) {
        scores[j][i] = exp2_approx(fmaf(scores[j][i], factor[r], base));
        sum += scores[j][i];
      }
    }
    state.sum = state.sum * rescale[r] + sum;
  }
  return raised;
}

template <int n>
KV_DEVICE void
rescale_rows(float unit, const float (&rescale)[2], float (&acc)[n][4]) {
#pragma unroll
  for (int j = 0; j < n; ++j) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      acc[j][i] *= rescale[i / 2] * unit;
    }
  }
}

// Scores of a tile to weights, as weigh_scores.
template <int n>
KV_DEVICE bool to_weights(
    const CudaParams& p,
    bool bent,
    const BlockKeys& range,
    const RowView (&rows)[2],
    int k_exponent,
    int first_key,
    RowState (&states)[2],
    float (&scores)[n][4],
    float (&rescale)[2]) {
  float factor[2];
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    // Above 0, so that a hidden key stays hidden where the scale is 0.
    factor[r] = fmaxf(rows[r].factor * power_of_two(k_exponent), 1e-37f);
  }
  int key = first_key + 2 * (threadIdx.x % 4);
  if (bent) {
    bend_scores(p, rows, factor, key, scores);
    factor[0] = factor[1] = 1.0f;
  }
  if (first_key < range.all.begin || first_key + 8 * n > range.all.end) {
    hide_keys(rows, key, scores);
  }
  return weigh_scores(factor, states, scores, rescale);
}

// A row's state in natural units, from the four lanes that share it.
KV_DEVICE kv::SoftmaxState finish_state(const RowState& row) {
  float sum = quad_sum(row.sum) * power_of_two(-int(weight_log2));
  return {row.level * log_of_2, sum};
}

} // namespace mlx::core::quantized_sdpa::prefill
