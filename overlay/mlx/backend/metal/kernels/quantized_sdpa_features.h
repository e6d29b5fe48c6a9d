// The yes/no features of a pipeline, and what a row of queries may see.

#pragma once

#include "mlx/backend/common/softmax_state.h"
#include "mlx/backend/metal/kernels/quantized_sdpa_params.h"

// In the order of MetalFeature.
constant bool has_mask [[function_constant(0)]];
constant bool mask_is_bool [[function_constant(1)]];
constant bool mask_is_half [[function_constant(2)]];
constant bool mask_is_bfloat [[function_constant(3)]];
constant bool is_causal [[function_constant(4)]];
constant bool has_window [[function_constant(5)]];
constant bool has_softcap [[function_constant(6)]];
constant bool has_sinks [[function_constant(7)]];
constant bool has_left_padding [[function_constant(8)]];
constant bool has_lengths [[function_constant(9)]];
constant bool has_block_table [[function_constant(10)]];
constant bool has_code_gaps [[function_constant(11)]];
constant bool return_lse [[function_constant(12)]];
constant bool is_split [[function_constant(13)]];

#define KV_UNROLL _Pragma("clang loop unroll(full)")

namespace mlx {
namespace core {
namespace quantized_sdpa {

struct KeySpan {
  int begin;
  int end;
};

// Row r of a KV head is query position r / heads of query head r % heads of
// the group.
struct QueryRow {
  int head;
  int position;
};

METAL_FUNC int query_heads(const constant MetalParams& params) {
  return params.n_q_heads / params.n_kv_heads;
}

METAL_FUNC QueryRow
query_row(int row, int kv_head, const constant MetalParams& params) {
  int heads = query_heads(params);
  QueryRow place;
  place.position = row / heads;
  place.head = kv_head * heads + row - place.position * heads;
  return place;
}

// The keys that exist for a sequence; values from the caller are clamped.
METAL_FUNC KeySpan sequence_span(
    int batch,
    const device int* left_padding,
    const device int* lengths,
    const constant MetalParams& params) {
  KeySpan span;
  span.begin = 0;
  span.end = params.kv_len;
  if (has_left_padding) {
    span.begin = metal::max(left_padding[batch * params.left_padding], 0);
  }
  if (has_lengths) {
    span.end = metal::clamp(lengths[batch * params.lengths], 0, params.kv_len);
  }
  return span;
}

// The keys that positions first to last can see together.
METAL_FUNC KeySpan visible_span(
    KeySpan sequence,
    int first,
    int last,
    const constant MetalParams& params) {
  KeySpan span = sequence;
  if (is_causal) {
    int start = sequence.end - params.q_len;
    span.end = metal::min(sequence.end, start + last + 1);
    if (has_window) {
      span.begin =
          metal::max(span.begin, start + first - params.window_size + 1);
    }
  }
  span.end = metal::max(span.end, span.begin);
  return span;
}

// The keys that a block of rows can see together.
METAL_FUNC KeySpan rows_span(
    KeySpan sequence,
    int first_row,
    int last_row,
    const constant MetalParams& params) {
  int heads = query_heads(params);
  return visible_span(sequence, first_row / heads, last_row / heads, params);
}

// The part of a span that one of n_splits threadgroups attends to.
METAL_FUNC KeySpan split_span(KeySpan span, int split, int n_splits, int tile) {
  int keys = span.end - span.begin;
  int tiles = keys / tile + (keys % tile != 0);
  int share = tiles / n_splits + (tiles % n_splits != 0);
  KeySpan part;
  part.begin = span.begin + metal::min(split * share, tiles) * tile;
  part.end = span.begin + metal::min((split + 1) * share, tiles) * tile;
  part.begin = metal::min(part.begin, span.end);
  part.end = metal::min(part.end, span.end);
  return part;
}

// The score of a visible key: scaled, capped, masked.
METAL_FUNC float finish_score(
    float dot,
    int64_t mask_row,
    int key,
    const device uint8_t* mask,
    const constant MetalParams& params) {
  float score = dot * params.scale;
  if (has_softcap) {
    score = params.softcap * metal::precise::tanh(score / params.softcap);
  }
  if (has_mask) {
    int64_t at = mask_row + key * params.mask[3];
    if (mask_is_bool) {
      score = mask[at] != 0 ? score : -INFINITY;
    } else if (mask_is_half) {
      score += float(reinterpret_cast<const device half*>(mask)[at]);
    } else if (mask_is_bfloat) {
      score += float(reinterpret_cast<const device bfloat*>(mask)[at]);
    } else {
      score += reinterpret_cast<const device float*>(mask)[at];
    }
  }
  return score;
}

METAL_FUNC int64_t
mask_row_start(int batch, QueryRow row, const constant MetalParams& params) {
  return batch * params.mask[0] + row.head * params.mask[1] +
      row.position * params.mask[2];
}

// [B, N_q, T_q], row-contiguous.
METAL_FUNC int64_t
result_row(int batch, QueryRow row, const constant MetalParams& params) {
  return (int64_t(batch) * params.n_q_heads + row.head) * params.q_len +
      row.position;
}

// [B, N_kv, rows, splits]
METAL_FUNC int64_t partial_row(
    uint3 group,
    int row,
    int split,
    const constant MetalParams& params) {
  int64_t n_rows = query_heads(params) * params.q_len;
  int64_t head = int64_t(group.z) * params.n_kv_heads + group.y;
  return (head * n_rows + row) * params.n_splits + split;
}

// The sink takes probability and gives no value: the state after it, and what
// the weighted sum of values is multiplied by.
METAL_FUNC float finish_row(
    thread kv::SoftmaxState& state,
    int head,
    const device float* sinks,
    const constant MetalParams& params) {
  float factor = 1;
  if (has_sinks) {
    kv::SoftmaxState sink;
    sink.max = sinks[head * params.sinks];
    sink.sum = 1;
    factor = kv::softmax_merge(state, sink).first;
  }
  return factor * kv::softmax_finish(state);
}

} // namespace quantized_sdpa
} // namespace core
} // namespace mlx
