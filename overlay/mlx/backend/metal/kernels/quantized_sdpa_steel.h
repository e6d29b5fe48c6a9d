// Attention of many rows over a quantized cache. A threadgroup decodes a tile
// of keys and values once, each of its simdgroups multiplies 8 rows with it.

#pragma once

#include <metal_simdgroup_matrix>

#include "mlx/backend/metal/kernels/quantized_sdpa_operand.h"

namespace mlx {
namespace core {
namespace quantized_sdpa {

// A tile [keys, stride] of T; the padding spreads a column over the banks.
template <typename T, typename Operand>
struct TileLayout {
  KV_CONST int stride = Operand::dim + 16 / int(sizeof(T));
  // Codes that a thread decodes at a time.
  KV_CONST int unit = kv::word_codes(Operand::Codec::bits);
  KV_CONST int piece = unit < 16 ? 16 : unit;
  KV_CONST int pieces = Operand::dim / piece;
};

template <typename T, typename Operand, int n_keys, int n_threads>
METAL_FUNC void decode_tile(
    threadgroup T* tile,
    const thread KVHead<Operand>& x,
    KeySpan span,
    int first_key,
    int batch,
    uint thread_index,
    const threadgroup float* table,
    const device int* block_table,
    const constant MetalParams& params,
    const constant MetalOperandParams& operand_params) {
  using Layout = TileLayout<T, Operand>;
  using Segment = CodeSegment<Operand, Layout::piece>;
  for (int i = thread_index; i < n_keys * Layout::pieces; i += n_threads) {
    int index = i / Layout::pieces;
    int first = (i - index * Layout::pieces) * Layout::piece;
    int key = first_key + index;
    bool exists = key < span.end;
    KeyPlace place =
        find_key(exists ? key : span.begin, batch, block_table, params);
    Segment segment;
    load_segment(segment, x, place, first, exists, operand_params);
    threadgroup T* to = tile + index * Layout::stride + first;
    KV_UNROLL
    for (int c = 0; c < Layout::piece; ++c) {
      int run = c / Segment::run;
      to[c] = T(
          segment.scales[run] * code_value(segment, c, table) +
          segment.biases[run]);
    }
  }
}

// Of an 8 x 8 matrix a lane holds two neighbours of one row.
struct FragmentPlace {
  int row;
  int column;
};

METAL_FUNC FragmentPlace fragment_place(int lane) {
  FragmentPlace place;
  place.row = lane / 16 * 4 + lane / 2 % 4;
  place.column = lane / 8 % 2 * 4 + lane % 2 * 2;
  return place;
}

// The maximum, or the sum, over the lanes that share a row.
METAL_FUNC float fragment_row_max(float x) {
  x = metal::max(x, metal::simd_shuffle_xor(x, ushort(1)));
  return metal::max(x, metal::simd_shuffle_xor(x, ushort(8)));
}

METAL_FUNC float fragment_row_sum(float x) {
  x += metal::simd_shuffle_xor(x, ushort(1));
  return x + metal::simd_shuffle_xor(x, ushort(8));
}

// sum += a b
METAL_FUNC void multiply_add(thread float2& sum, float2 a, float2 b) {
  metal::simdgroup_matrix<float, 8, 8> left;
  metal::simdgroup_matrix<float, 8, 8> right;
  metal::simdgroup_matrix<float, 8, 8> total;
  reinterpret_cast<thread float2&>(left.thread_elements()) = a;
  reinterpret_cast<thread float2&>(right.thread_elements()) = b;
  reinterpret_cast<thread float2&>(total.thread_elements()) = sum;
  metal::simdgroup_multiply_accumulate(total, left, right, total);
  sum = reinterpret_cast<thread float2&>(total.thread_elements());
}

// What a lane holds: its part of 8 rows of q, their weighted sums, and the
// state of its row. The state's sum counts the lane's own columns only.
template <typename T, int k_dim, int v_dim>
struct FragmentRows {
  T q[k_dim / 8][2];
  float2 acc[v_dim / 8];
  kv::SoftmaxState state;
  KeySpan span;
  int64_t mask;
  QueryRow row;
};

template <typename T, int k_dim, int v_dim>
METAL_FUNC void load_fragment_rows(
    thread FragmentRows<T, k_dim, v_dim>& held,
    const device T* q,
    KeySpan sequence,
    int row,
    int n_rows,
    int batch,
    int kv_head,
    int column,
    const constant MetalParams& params) {
  bool exists = row < n_rows;
  held.row = query_row(exists ? row : 0, kv_head, params);
  const device T* from = q + batch * params.q[0] +
      held.row.head * params.q[1] + held.row.position * params.q[2];
  KV_UNROLL
  for (int i = 0; i < k_dim / 8; ++i) {
    int64_t at = (i * 8 + column) * params.q[3];
    held.q[i][0] = exists ? from[at] : T(0);
    held.q[i][1] = exists ? from[at + params.q[3]] : T(0);
  }
  KV_UNROLL
  for (int i = 0; i < v_dim / 8; ++i) {
    held.acc[i] = float2{0, 0};
  }
  held.state = kv::softmax_init();
  held.span = visible_span(
      sequence, held.row.position, held.row.position, params);
  held.mask = mask_row_start(batch, held.row, params);
  if (!exists) {
    held.span.end = held.span.begin;
  }
}

template <typename T, int k_dim, int v_dim, int n_keys>
METAL_FUNC void score_fragments(
    thread float2* scores,
    const thread FragmentRows<T, k_dim, v_dim>& held,
    const threadgroup T* k_tile,
    int stride,
    FragmentPlace place) {
  KV_UNROLL
  for (int j = 0; j < n_keys / 8; ++j) {
    scores[j] = float2{0, 0};
  }
  KV_UNROLL
  for (int i = 0; i < k_dim / 8; ++i) {
    float2 q = float2{float(held.q[i][0]), float(held.q[i][1])};
    KV_UNROLL
    for (int j = 0; j < n_keys / 8; ++j) {
      const threadgroup T* k =
          k_tile + (j * 8 + place.column) * stride + i * 8 + place.row;
      multiply_add(scores[j], q, float2{float(k[0]), float(k[stride])});
    }
  }
}

// Turns products into weights and scales what was gathered before.
template <typename T, int k_dim, int v_dim, int n_keys>
METAL_FUNC void take_fragment_softmax(
    thread float2* scores,
    thread FragmentRows<T, k_dim, v_dim>& held,
    int first_key,
    const device uint8_t* mask,
    const constant MetalParams& params) {
  float top = -INFINITY;
  KV_UNROLL
  for (int j = 0; j < n_keys / 8; ++j) {
    KV_UNROLL
    for (int c = 0; c < 2; ++c) {
      int key = first_key + j * 8 + c;
      bool visible = key >= held.span.begin && key < held.span.end;
      float score = -INFINITY;
      if (visible) {
        score = finish_score(scores[j][c], held.mask, key, mask, params);
      }
      scores[j][c] = score;
      top = metal::max(top, score);
    }
  }
  float factor = kv::softmax_raise(held.state, fragment_row_max(top));
  KV_UNROLL
  for (int j = 0; j < n_keys / 8; ++j) {
    KV_UNROLL
    for (int c = 0; c < 2; ++c) {
      scores[j][c] = kv::softmax_weight(scores[j][c], held.state.max);
      held.state.sum += scores[j][c];
    }
  }
  KV_UNROLL
  for (int i = 0; i < v_dim / 8; ++i) {
    held.acc[i] *= factor;
  }
}

template <typename T, int k_dim, int v_dim, int n_keys>
METAL_FUNC void add_fragments(
    thread FragmentRows<T, k_dim, v_dim>& held,
    const thread float2* weights,
    const threadgroup T* v_tile,
    int stride,
    FragmentPlace place) {
  KV_UNROLL
  for (int j = 0; j < n_keys / 8; ++j) {
    const threadgroup T* v =
        v_tile + (j * 8 + place.row) * stride + place.column;
    KV_UNROLL
    for (int i = 0; i < v_dim / 8; ++i) {
      multiply_add(
          held.acc[i],
          weights[j],
          float2{float(v[i * 8]), float(v[i * 8 + 1])});
    }
  }
}

} // namespace quantized_sdpa
} // namespace core
} // namespace mlx

// Grid and results as of quantized_sdpa_vector; a threadgroup holds 8 rows a
// simdgroup and takes n_keys keys at a time.
template <typename T, typename K, typename V, int n_simdgroups, int n_keys>
[[kernel, max_total_threads_per_threadgroup(n_simdgroups * 32)]] void
quantized_sdpa_steel(
    const device T* q [[buffer(0)]],
    const device uint32_t* k_codes [[buffer(1)]],
    const device typename K::Scale* k_scales [[buffer(2)]],
    const device typename K::Bias* k_biases [[buffer(3)]],
    const device float* k_codebook [[buffer(4)]],
    const device uint32_t* v_codes [[buffer(5)]],
    const device typename V::Scale* v_scales [[buffer(6)]],
    const device typename V::Bias* v_biases [[buffer(7)]],
    const device float* v_codebook [[buffer(8)]],
    const constant mlx::core::quantized_sdpa::MetalParams& params [[buffer(9)]],
    device T* out [[buffer(10)]],
    device float* lse [[buffer(11), function_constant(return_lse)]],
    device float* partials [[buffer(12), function_constant(is_split)]],
    device float* states [[buffer(13), function_constant(is_split)]],
    const device uint8_t* mask [[buffer(14), function_constant(has_mask)]],
    const device float* sinks [[buffer(15), function_constant(has_sinks)]],
    const device int* left_padding
    [[buffer(16), function_constant(has_left_padding)]],
    const device int* lengths [[buffer(17), function_constant(has_lengths)]],
    const device int* block_table
    [[buffer(18), function_constant(has_block_table)]],
    uint3 group [[threadgroup_position_in_grid]],
    uint simdgroup [[simdgroup_index_in_threadgroup]],
    uint lane [[thread_index_in_simdgroup]]) {
  using namespace mlx::core::quantized_sdpa;
  namespace kv = mlx::core::kv;
  constexpr int n_threads = n_simdgroups * 32;
  constexpr int n_rows_held = n_simdgroups * 8;
  constexpr int k_stride = TileLayout<T, K>::stride;
  constexpr int v_stride = TileLayout<T, V>::stride;
  threadgroup float k_table[K::table_size];
  threadgroup float v_table[V::table_size];
  threadgroup T k_tile[n_keys * k_stride];
  threadgroup T v_tile[n_keys * v_stride];

  int batch = group.z;
  int kv_head_index = group.y;
  int split = group.x % params.n_splits;
  int first_row = group.x / params.n_splits * n_rows_held;
  int n_rows = query_heads(params) * params.q_len;
  uint thread_index = simdgroup * 32 + lane;
  if (K::Codec::has_codebook || V::Codec::has_codebook) {
    load_table<K>(k_table, k_codebook, thread_index, params.k);
    load_table<V>(v_table, v_codebook, thread_index, params.v);
    metal::threadgroup_barrier(metal::mem_flags::mem_threadgroup);
  }

  KVHead<K> k =
      kv_head<K>(k_codes, k_scales, k_biases, kv_head_index, params.k);
  KVHead<V> v =
      kv_head<V>(v_codes, v_scales, v_biases, kv_head_index, params.v);
  KeySpan sequence = sequence_span(batch, left_padding, lengths, params);
  int last_row = metal::min(first_row + n_rows_held, n_rows) - 1;
  KeySpan span = split_span(
      visible_span(
          sequence,
          query_row(first_row, kv_head_index, params).position,
          query_row(last_row, kv_head_index, params).position,
          params),
      split,
      params.n_splits,
      n_keys);
  FragmentPlace place = fragment_place(lane);
  int row = first_row + int(simdgroup) * 8 + place.row;
  FragmentRows<T, K::dim, V::dim> held;
  load_fragment_rows(
      held, q, sequence, row, n_rows, batch, kv_head_index, place.column,
      params);
  // What any row of the simdgroup can see; rows that do not exist see nothing.
  bool sees = held.span.end > held.span.begin;
  int first_seen = metal::simd_min(sees ? held.span.begin : span.end);
  int end_seen = metal::simd_max(sees ? held.span.end : span.begin);
  held.span.end = metal::min(held.span.end, span.end);

  for (int tile = span.begin; tile < span.end; tile += n_keys) {
    decode_tile<T, K, n_keys, n_threads>(
        k_tile, k, span, tile, batch, thread_index, k_table, block_table,
        params, params.k);
    decode_tile<T, V, n_keys, n_threads>(
        v_tile, v, span, tile, batch, thread_index, v_table, block_table,
        params, params.v);
    metal::threadgroup_barrier(metal::mem_flags::mem_threadgroup);
    if (tile < end_seen && tile + n_keys > first_seen) {
      float2 weights[n_keys / 8];
      score_fragments<T, K::dim, V::dim, n_keys>(
          weights, held, k_tile, k_stride, place);
      take_fragment_softmax<T, K::dim, V::dim, n_keys>(
          weights, held, tile + place.column, mask, params);
      add_fragments<T, K::dim, V::dim, n_keys>(
          held, weights, v_tile, v_stride, place);
    }
    metal::threadgroup_barrier(metal::mem_flags::mem_threadgroup);
  }
  held.state.sum = fragment_row_sum(held.state.sum);

  if (row < n_rows) {
    float factor = 1;
    int64_t at = result_row(batch, held.row, params);
    if (is_split) {
      at = (int64_t(batch) * params.n_kv_heads + kv_head_index) * n_rows + row;
      at = at * params.n_splits + split;
    } else {
      factor = finish_row(held.state, held.row.head, sinks, params);
    }
    KV_UNROLL
    for (int i = 0; i < V::dim / 8; ++i) {
      KV_UNROLL
      for (int c = 0; c < 2; ++c) {
        int64_t to = at * V::dim + i * 8 + place.column + c;
        if (is_split) {
          partials[to] = held.acc[i][c];
        } else {
          out[to] = T(held.acc[i][c] * factor);
        }
      }
    }
    if (place.column == 0 && is_split) {
      states[at * 2] = held.state.max;
      states[at * 2 + 1] = held.state.sum;
    } else if (place.column == 0 && return_lse) {
      lse[at] = kv::softmax_lse(held.state);
    }
  }
}
