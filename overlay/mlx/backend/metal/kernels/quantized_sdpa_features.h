// The yes/no features of a pipeline, and what a row of queries may see.

#pragma once

#include "mlx/backend/common/softmax_state.h"
#include "mlx/backend/common/visible_keys.h"
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

using kv::KeyRange;

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

METAL_FUNC KeyRange existing_keys(
    int batch,
    const device int* left_padding,
    const device int* lengths,
    const constant MetalParams& params) {
  int padding = 0;
  int length = params.kv_len;
  if (has_left_padding) {
    padding = left_padding[batch * params.left_padding];
  }
  if (has_lengths) {
    length = lengths[batch * params.lengths];
  }
  return kv::existing_keys(params.kv_len, padding, length);
}

METAL_FUNC kv::KeyRule key_rule(const constant MetalParams& params) {
  kv::KeyRule rule;
  rule.causal = is_causal;
  rule.q_len = params.q_len;
  rule.window_size = has_window ? params.window_size : 0;
  return rule;
}

// What at least one of a block of rows sees.
METAL_FUNC KeyRange keys_of_rows(
    KeyRange existing,
    int first_row,
    int last_row,
    const constant MetalParams& params) {
  int heads = query_heads(params);
  return kv::visible_to_any(
      existing, key_rule(params), first_row / heads, last_row / heads);
}

// The part of a span that one of n_splits threadgroups attends to.
METAL_FUNC KeyRange
split_keys(KeyRange span, int split, int n_splits, int tile) {
  int keys = span.end - span.begin;
  int tiles = keys / tile + (keys % tile != 0);
  int share = tiles / n_splits + (tiles % n_splits != 0);
  KeyRange part;
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
