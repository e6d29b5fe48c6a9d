// Attention of many rows over a quantized cache. A threadgroup decodes a tile
// of keys and values once, each of its simdgroups multiplies 8 rows with it.
// For q in half precision the tile holds codes, which are exact there, and
// scales and biases meet the float32 products, group by group. For q in float32
// it holds values: products of codes cancel against those of biases, which
// costs digits that only float32 has.

#pragma once

#include <metal_simdgroup_matrix>

#include "mlx/backend/metal/kernels/quantized_sdpa_operand.h"

namespace mlx {
namespace core {
namespace quantized_sdpa {

template <bool is_float>
struct TileCode {
  using type = half;
};

template <>
struct TileCode<true> {
  using type = float;
};

// A tile of keys: codes or values [keys, stride], scales and biases [groups,
// keys]. The padding spreads a column over the banks.
template <typename T, typename Operand>
struct TileLayout {
  KV_CONST bool has_values = sizeof(T) == sizeof(float);
  // The levels of a codebook are any float32.
  using Code =
      typename TileCode<has_values || Operand::Codec::has_codebook>::type;
  KV_CONST int stride = Operand::dim + 16 / int(sizeof(Code));
  // Codes that a thread decodes at a time.
  KV_CONST int unit = kv::word_codes(Operand::Codec::bits);
  KV_CONST int piece = unit < 16 ? 16 : unit;
  KV_CONST int pieces = Operand::dim / piece;
  KV_CONST int groups = Operand::dim / Operand::group_size;
  KV_CONST bool has_biases = Operand::Codec::has_bias && !has_values;
  // Of the arrays, which cannot be empty.
  KV_CONST int scale_groups = has_values ? 1 : groups;
  KV_CONST int bias_groups = has_biases ? groups : 1;
  // 8 x 8 matrices that share a scale.
  KV_CONST int matrices = Operand::group_size / 8;
  static_assert(Operand::group_size % piece == 0, "a piece lies in one group");
};

template <typename T, typename Operand>
struct Tile {
  threadgroup typename TileLayout<T, Operand>::Code* codes;
  threadgroup float* scales;
  threadgroup float* biases;
};

// Codes, or values where the tile has those; zeros where a key does not exist.
template <typename T, typename Operand, int n_keys, int n_threads>
METAL_FUNC void load_tile_codes(
    const thread Tile<T, Operand>& tile,
    const thread KVHead<Operand>& x,
    int first_key,
    int end,
    uint thread_index,
    const constant MetalParams& params,
    const constant MetalOperandParams& operand_params) {
  using Layout = TileLayout<T, Operand>;
  using Code = typename Layout::Code;
  for (int i = thread_index; i < n_keys * Layout::pieces; i += n_threads) {
    int key = i / Layout::pieces;
    int first = (i - key * Layout::pieces) * Layout::piece;
    CodeSegment<Operand, Layout::piece> segment = {{0}};
    float scale = 0;
    float bias = 0;
    if (first_key + key < end) {
      KeyPlace place = find_key(x, first_key + key, params);
      load_codes(segment, x, place, first, operand_params);
      if (Layout::has_values) {
        int group = first / Operand::group_size;
        scale = load_scale(x, place, group, operand_params);
        bias = load_bias(x, place, group, operand_params);
      }
    }
    threadgroup Code* to = tile.codes + key * Layout::stride + first;
    KV_UNROLL
    for (int c = 0; c < Layout::piece; ++c) {
      float code = code_value(segment, c, x);
      to[c] = Code(Layout::has_values ? scale * code + bias : code);
    }
  }
}

template <typename T, typename Operand, int n_keys, int n_threads>
METAL_FUNC void load_tile_scales(
    const thread Tile<T, Operand>& tile,
    const thread KVHead<Operand>& x,
    int first_key,
    int end,
    uint thread_index,
    const constant MetalParams& params,
    const constant MetalOperandParams& operand_params) {
  using Layout = TileLayout<T, Operand>;
  for (int i = thread_index; i < n_keys * Layout::groups; i += n_threads) {
    int key = i / Layout::groups;
    int group = i - key * Layout::groups;
    float scale = 0;
    float bias = 0;
    if (first_key + key < end) {
      KeyPlace place = find_key(x, first_key + key, params);
      scale = load_scale(x, place, group, operand_params);
      bias = load_bias(x, place, group, operand_params);
    }
    tile.scales[group * n_keys + key] = scale;
    if (Layout::has_biases) {
      tile.biases[group * n_keys + key] = bias;
    }
  }
}

template <typename T, typename Operand, int n_keys, int n_threads>
METAL_FUNC void load_tile(
    const thread Tile<T, Operand>& tile,
    const thread KVHead<Operand>& x,
    int first_key,
    int end,
    uint thread_index,
    const constant MetalParams& params,
    const constant MetalOperandParams& operand_params) {
  load_tile_codes<T, Operand, n_keys, n_threads>(
      tile, x, first_key, end, thread_index, params, operand_params);
  if (!TileLayout<T, Operand>::has_values) {
    load_tile_scales<T, Operand, n_keys, n_threads>(
        tile, x, first_key, end, thread_index, params, operand_params);
  }
}

// Of an 8 x 8 matrix a lane holds two neighbours of one row.
struct MatrixPlace {
  int row;
  int column;
};

METAL_FUNC MatrixPlace matrix_place(int lane) {
  MatrixPlace place;
  place.row = lane / 16 * 4 + lane / 2 % 4;
  place.column = lane / 8 % 2 * 4 + lane % 2 * 2;
  return place;
}

// The maximum, or the sum, over the lanes that share a row.
METAL_FUNC float matrix_row_max(float x) {
  x = metal::max(x, metal::simd_shuffle_xor(x, ushort(1)));
  return metal::max(x, metal::simd_shuffle_xor(x, ushort(8)));
}

METAL_FUNC float matrix_row_sum(float x) {
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

// What a lane holds of its simdgroup's 8 rows: its part of q and its sums over
// groups, the weighted sums of codes and of biases, and the state of its row.
// What is summed over keys counts the lane's own two columns only, but for acc.
template <typename T, typename K, typename V>
struct MatrixRows {
  T q[K::dim / 8][2];
  float q_sums[TileLayout<T, K>::groups];
  float2 acc[V::dim / 8];
  float biases[TileLayout<T, V>::groups];
  kv::SoftmaxState state;
  KeyRange span;
  int64_t mask;
  QueryRow row;
};

template <typename T, typename K, typename V>
METAL_FUNC void load_matrix_rows(
    thread MatrixRows<T, K, V>& held,
    const device T* q,
    KeyRange existing,
    int row,
    int n_rows,
    uint3 group,
    int column,
    const constant MetalParams& params) {
  bool exists = row < n_rows;
  held.row = query_row(exists ? row : 0, group.y, params);
  const device T* from = q + group.z * params.q[0] +
      held.row.head * params.q[1] + held.row.position * params.q[2];
  KV_UNROLL
  for (int g = 0; g < TileLayout<T, K>::groups; ++g) {
    float sum = 0;
    KV_UNROLL
    for (int m = 0; m < TileLayout<T, K>::matrices; ++m) {
      int i = g * TileLayout<T, K>::matrices + m;
      int64_t at = (i * 8 + column) * params.q[3];
      held.q[i][0] = exists ? from[at] : T(0);
      held.q[i][1] = exists ? from[at + params.q[3]] : T(0);
      sum += float(held.q[i][0]) + float(held.q[i][1]);
    }
    held.q_sums[g] = matrix_row_sum(sum);
  }
  KV_UNROLL
  for (int i = 0; i < V::dim / 8; ++i) {
    held.acc[i] = float2{0, 0};
  }
  KV_UNROLL
  for (int g = 0; g < TileLayout<T, V>::groups; ++g) {
    held.biases[g] = 0;
  }
  held.state = kv::softmax_init();
  held.mask = mask_row_start(group.z, held.row, params);
  held.span = kv::visible_keys(existing, key_rule(params), held.row.position);
  if (!exists) {
    held.span.end = held.span.begin;
  }
}

template <typename T, typename K, typename V, int n_keys>
METAL_FUNC void score_matrices(
    thread float2* scores,
    const thread MatrixRows<T, K, V>& held,
    const thread Tile<T, K>& tile,
    MatrixPlace place) {
  using Layout = TileLayout<T, K>;
  KV_UNROLL
  for (int j = 0; j < n_keys / 8; ++j) {
    scores[j] = float2{0, 0};
  }
  KV_UNROLL
  for (int g = 0; g < Layout::groups; ++g) {
    float2 parts[n_keys / 8];
    KV_UNROLL
    for (int j = 0; j < n_keys / 8; ++j) {
      parts[j] = float2{0, 0};
    }
    KV_UNROLL
    for (int m = 0; m < Layout::matrices; ++m) {
      int i = g * Layout::matrices + m;
      float2 q = float2{float(held.q[i][0]), float(held.q[i][1])};
      KV_UNROLL
      for (int j = 0; j < n_keys / 8; ++j) {
        const threadgroup typename Layout::Code* k = tile.codes +
            (j * 8 + place.column) * Layout::stride + i * 8 + place.row;
        multiply_add(
            parts[j], q, float2{float(k[0]), float(k[Layout::stride])});
      }
    }
    KV_UNROLL
    for (int j = 0; j < n_keys / 8; ++j) {
      KV_UNROLL
      for (int c = 0; c < 2; ++c) {
        int at = g * n_keys + j * 8 + place.column + c;
        float bias = Layout::has_biases ? tile.biases[at] : 0.0f;
        scores[j][c] += Layout::has_values
            ? parts[j][c]
            : kv::finish_dot<typename K::Codec>(
                  parts[j][c], held.q_sums[g], tile.scales[at], bias);
      }
    }
  }
}

// Turns products into weights and scales what was gathered before.
template <typename T, typename K, typename V, int n_keys>
METAL_FUNC void take_matrix_softmax(
    thread float2* scores,
    thread MatrixRows<T, K, V>& held,
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
  float factor = kv::softmax_raise(held.state, matrix_row_max(top));
  KV_UNROLL
  for (int j = 0; j < n_keys / 8; ++j) {
    KV_UNROLL
    for (int c = 0; c < 2; ++c) {
      scores[j][c] = kv::softmax_weight(scores[j][c], held.state.max);
      held.state.sum += scores[j][c];
    }
  }
  KV_UNROLL
  for (int i = 0; i < V::dim / 8; ++i) {
    held.acc[i] *= factor;
  }
  KV_UNROLL
  for (int g = 0; g < TileLayout<T, V>::groups; ++g) {
    held.biases[g] *= factor;
  }
}

template <typename T, typename K, typename V, int n_keys>
METAL_FUNC void add_matrices(
    thread MatrixRows<T, K, V>& held,
    const thread float2* weights,
    const thread Tile<T, V>& tile,
    MatrixPlace place) {
  using Layout = TileLayout<T, V>;
  KV_UNROLL
  for (int g = 0; g < Layout::groups; ++g) {
    KV_UNROLL
    for (int j = 0; j < n_keys / 8; ++j) {
      float2 scaled;
      KV_UNROLL
      for (int c = 0; c < 2; ++c) {
        int at = g * n_keys + j * 8 + place.column + c;
        float scale = Layout::has_values ? 1.0f : tile.scales[at];
        scaled[c] = weights[j][c] * scale;
        if (Layout::has_biases) {
          held.biases[g] += weights[j][c] * tile.biases[at];
        }
      }
      const threadgroup typename Layout::Code* v =
          tile.codes + (j * 8 + place.row) * Layout::stride + place.column;
      KV_UNROLL
      for (int m = 0; m < Layout::matrices; ++m) {
        int i = g * Layout::matrices + m;
        multiply_add(
            held.acc[i], scaled, float2{float(v[i * 8]), float(v[i * 8 + 1])});
      }
    }
  }
}

// Brings together what the lanes of a row hold of it.
template <typename T, typename K, typename V>
METAL_FUNC void finish_matrix_rows(thread MatrixRows<T, K, V>& held) {
  using Layout = TileLayout<T, V>;
  held.state.sum = matrix_row_sum(held.state.sum);
  KV_UNROLL
  for (int g = 0; g < Layout::groups && Layout::has_biases; ++g) {
    float bias = matrix_row_sum(held.biases[g]);
    KV_UNROLL
    for (int m = 0; m < Layout::matrices; ++m) {
      held.acc[g * Layout::matrices + m] += bias;
    }
  }
}

// Where results go.
template <typename T>
struct MatrixTarget {
  device T* out;
  device float* lse;
  device float* partials;
  device float* states;
};

template <typename T, typename K, typename V>
METAL_FUNC void write_matrix_rows(
    const thread MatrixTarget<T>& target,
    thread MatrixRows<T, K, V>& held,
    int batch,
    int64_t partial,
    int column,
    const device float* sinks,
    const constant MetalParams& params) {
  if (is_split) {
    KV_UNROLL
    for (int i = 0; i < V::dim / 8; ++i) {
      int64_t to = partial * V::dim + i * 8 + column;
      target.partials[to] = held.acc[i][0];
      target.partials[to + 1] = held.acc[i][1];
    }
    if (column == 0) {
      target.states[partial * 2] = held.state.max;
      target.states[partial * 2 + 1] = held.state.sum;
    }
    return;
  }
  float factor = finish_row(held.state, held.row.head, sinks, params);
  int64_t at = result_row(batch, held.row, params);
  KV_UNROLL
  for (int i = 0; i < V::dim / 8; ++i) {
    int64_t to = at * V::dim + i * 8 + column;
    target.out[to] = T(held.acc[i][0] * factor);
    target.out[to + 1] = T(held.acc[i][1] * factor);
  }
  if (return_lse && column == 0) {
    target.lse[at] = kv::softmax_lse(held.state);
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
  using KLayout = TileLayout<T, K>;
  using VLayout = TileLayout<T, V>;
  using KCode = typename KLayout::Code;
  using VCode = typename VLayout::Code;
  constexpr int n_threads = n_simdgroups * 32;
  threadgroup float k_table[K::table_size];
  threadgroup float v_table[V::table_size];
  threadgroup KCode k_tile_codes[n_keys * KLayout::stride];
  threadgroup VCode v_tile_codes[n_keys * VLayout::stride];
  threadgroup float k_tile_scales[n_keys * KLayout::scale_groups];
  threadgroup float v_tile_scales[n_keys * VLayout::scale_groups];
  threadgroup float k_tile_biases[n_keys * KLayout::bias_groups];
  threadgroup float v_tile_biases[n_keys * VLayout::bias_groups];
  Tile<T, K> k_tile{k_tile_codes, k_tile_scales, k_tile_biases};
  Tile<T, V> v_tile{v_tile_codes, v_tile_scales, v_tile_biases};

  uint thread_index = simdgroup * 32 + lane;
  if (K::Codec::has_codebook || V::Codec::has_codebook) {
    load_table<K>(k_table, k_codebook, thread_index, params.k);
    load_table<V>(v_table, v_codebook, thread_index, params.v);
    metal::threadgroup_barrier(metal::mem_flags::mem_threadgroup);
  }
  KVHead<K> k = make_kv_head<K>(
      k_codes, k_scales, k_biases, k_table, block_table, group, params.k);
  KVHead<V> v = make_kv_head<V>(
      v_codes, v_scales, v_biases, v_table, block_table, group, params.v);

  int split = group.x % params.n_splits;
  int first_row = group.x / params.n_splits * n_simdgroups * 8;
  int n_rows = query_heads(params) * params.q_len;
  int last_row = metal::min(first_row + n_simdgroups * 8, n_rows) - 1;
  KeyRange existing = existing_keys(group.z, left_padding, lengths, params);
  KeyRange span = split_keys(
      keys_of_rows(existing, first_row, last_row, params),
      split,
      params.n_splits,
      n_keys);
  MatrixPlace place = matrix_place(lane);
  int row = first_row + int(simdgroup) * 8 + place.row;
  MatrixRows<T, K, V> held;
  load_matrix_rows(held, q, existing, row, n_rows, group, place.column, params);
  // What any row of the simdgroup can see; rows that do not exist see nothing.
  bool sees = held.span.end > held.span.begin;
  int first_seen = metal::simd_min(sees ? held.span.begin : span.end);
  int end_seen = metal::simd_max(sees ? held.span.end : span.begin);

  for (int tile = span.begin; tile < span.end; tile += n_keys) {
    load_tile<T, K, n_keys, n_threads>(
        k_tile, k, tile, span.end, thread_index, params, params.k);
    load_tile<T, V, n_keys, n_threads>(
        v_tile, v, tile, span.end, thread_index, params, params.v);
    metal::threadgroup_barrier(metal::mem_flags::mem_threadgroup);
    if (tile < end_seen && tile + n_keys > first_seen) {
      float2 weights[n_keys / 8];
      score_matrices<T, K, V, n_keys>(weights, held, k_tile, place);
      take_matrix_softmax<T, K, V, n_keys>(
          weights, held, tile + place.column, mask, params);
      add_matrices<T, K, V, n_keys>(held, weights, v_tile, place);
    }
    metal::threadgroup_barrier(metal::mem_flags::mem_threadgroup);
  }
  finish_matrix_rows(held);
  if (row < n_rows) {
    MatrixTarget<T> target{out, lse, partials, states};
    int64_t partial = partial_row(group, row, split, params);
    write_matrix_rows(
        target, held, group.z, partial, place.column, sinks, params);
  }
}
