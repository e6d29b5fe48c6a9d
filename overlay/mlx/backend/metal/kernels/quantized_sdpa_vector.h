// Attention of a few rows over a quantized cache. A simdgroup takes 32 keys at
// a time: a few lanes share a key while its codes are read, each lane owns one
// key while the softmax is taken. All rows of a threadgroup meet each decoded
// code.

#pragma once

#include "mlx/backend/metal/kernels/quantized_sdpa_operand.h"

namespace mlx {
namespace core {
namespace quantized_sdpa {

// How the lanes of a simdgroup share the keys of one operand.
template <typename Operand, int rows>
struct LaneLayout {
  KV_CONST int codes = lane_codes(Operand::Codec::bits, Operand::dim, rows);
  KV_CONST int lanes = key_lanes(Operand::dim, codes);
  // Keys that the simdgroup reads at once.
  KV_CONST int keys = 32 / lanes;
  // Codes that share a scale.
  KV_CONST int run = codes < Operand::group_size ? codes : Operand::group_size;
  KV_CONST int n_runs = codes / run;
  // Where words hold codes of several lanes: words of a key, those that a lane
  // loads, those that its codes may lie across.
  KV_CONST int bits = codes * Operand::Codec::bits;
  KV_CONST bool shares_words = bits % 32 != 0;
  KV_CONST int key_words = Operand::dim * Operand::Codec::bits / 32;
  KV_CONST int loads = (key_words + lanes - 1) / lanes;
  KV_CONST int crossed_words = (bits - (bits & -bits) + 63) / 32;
  static_assert(lanes <= 32, "a simdgroup holds a whole key");
  static_assert(Operand::group_size % run == 0, "a run lies in one group");
};

// A lane's codes of one key; zeros where the key does not exist.
template <typename Operand, int rows>
struct LaneKey {
  using Layout = LaneLayout<Operand, rows>;
  CodeSegment<Operand, Layout::codes> segment;
  float scales[Layout::n_runs];
  float biases[Layout::n_runs];
};

// Each lane of a key loads some of its words and takes its codes from those of
// all.
template <typename Operand, int rows>
METAL_FUNC void share_codes(
    thread LaneKey<Operand, rows>& held,
    const thread KVHead<Operand>& x,
    KeyPlace place,
    bool exists,
    int lane,
    const constant MetalOperandParams& params) {
  using Layout = LaneLayout<Operand, rows>;
  using Segment = CodeSegment<Operand, Layout::codes>;
  int piece = lane % Layout::lanes;
  uint32_t loaded[Layout::loads];
  KV_UNROLL
  for (int i = 0; i < Layout::loads; ++i) {
    int word = i * Layout::lanes + piece;
    loaded[i] = 0;
    if (exists && word < Layout::key_words) {
      loaded[i] = load_word(key_codes(x, place, params), word, params);
    }
  }
  int start = piece * Layout::bits;
  uint32_t crossed[Layout::crossed_words + 1] = {0};
  KV_UNROLL
  for (int j = 0; j < Layout::crossed_words; ++j) {
    int word = start / 32 + j;
    ushort owner = lane - piece + word % Layout::lanes;
    KV_UNROLL
    for (int i = 0; i < Layout::loads; ++i) {
      uint32_t other = metal::simd_shuffle(loaded[i], owner);
      crossed[j] = word / Layout::lanes == i ? other : crossed[j];
    }
  }
  KV_UNROLL
  for (int j = 0; j < Segment::n_words; ++j) {
    uint64_t pair = uint64_t(crossed[j + 1]) << 32 | crossed[j];
    held.segment.words[j] = uint32_t(pair >> (start % 32));
  }
}

template <typename Operand, int rows>
METAL_FUNC void load_key(
    thread LaneKey<Operand, rows>& held,
    const thread KVHead<Operand>& x,
    int key,
    int end,
    int lane,
    const constant MetalParams& params,
    const constant MetalOperandParams& operand_params) {
  using Layout = LaneLayout<Operand, rows>;
  int first = lane % Layout::lanes * Layout::codes;
  bool exists = key < end;
  KeyPlace place = {0, 0};
  if (exists) {
    place = find_key(x, key, params);
  }
  if (exists && first < Operand::dim) {
    if (!Layout::shares_words) {
      load_codes(held.segment, x, place, first, operand_params);
    }
    KV_UNROLL
    for (int i = 0; i < Layout::n_runs; ++i) {
      int group = first / Operand::group_size + i;
      held.scales[i] = load_scale(x, place, group, operand_params);
      held.biases[i] = load_bias(x, place, group, operand_params);
    }
  } else {
    held = LaneKey<Operand, rows>{};
  }
  if (Layout::shares_words) {
    share_codes(held, x, place, exists, lane, operand_params);
  }
}

template <typename T, typename Operand, int rows>
struct LaneQueries {
  using Layout = LaneLayout<Operand, rows>;
  T values[rows][Layout::codes];
  float sums[rows][Layout::n_runs];
};

template <typename T, typename Operand, int rows>
METAL_FUNC void load_queries(
    thread LaneQueries<T, Operand, rows>& queries,
    const device T* q,
    int first_row,
    int n_rows,
    uint3 group,
    uint lane,
    const constant MetalParams& params) {
  using Layout = LaneLayout<Operand, rows>;
  int first = lane % Layout::lanes * Layout::codes;
  KV_UNROLL
  for (int r = 0; r < rows; ++r) {
    bool exists = first_row + r < n_rows && first < Operand::dim;
    QueryRow row = query_row(exists ? first_row + r : 0, group.y, params);
    const device T* from = q + group.z * params.q[0] + row.head * params.q[1] +
        row.position * params.q[2];
    KV_UNROLL
    for (int i = 0; i < Layout::n_runs; ++i) {
      float sum = 0;
      KV_UNROLL
      for (int j = i * Layout::run; j < (i + 1) * Layout::run; ++j) {
        queries.values[r][j] = exists ? from[(first + j) * params.q[3]] : T(0);
        sum += float(queries.values[r][j]);
      }
      queries.sums[r][i] = sum;
    }
  }
}

// The sum over lanes that differ in the bits from `first` up to `end`.
METAL_FUNC float lane_sum(float x, int first, int end) {
  for (int delta = first; delta < end; delta *= 2) {
    x += metal::simd_shuffle_xor(x, ushort(delta));
  }
  return x;
}

// The products of the rows with 32 keys from `tile` on: those of key
// i * Layout::keys + g end in lane g * Layout::lanes + i.
template <typename T, typename Operand, int rows>
METAL_FUNC void score_tile(
    thread float* scores,
    const thread LaneQueries<T, Operand, rows>& queries,
    const thread KVHead<Operand>& x,
    int tile,
    int end,
    uint lane,
    const constant MetalParams& params) {
  using Layout = LaneLayout<Operand, rows>;
  using Codec = typename Operand::Codec;
  int place = lane / Layout::lanes;
  int piece = lane % Layout::lanes;
  for (int i = 0; i < Layout::lanes; ++i) {
    int key = tile + i * Layout::keys + place;
    LaneKey<Operand, rows> held;
    load_key(held, x, key, end, lane, params, params.k);
    float dots[rows] = {0};
    KV_UNROLL
    for (int j = 0; j < Layout::n_runs; ++j) {
      float parts[rows] = {0};
      KV_UNROLL
      for (int c = j * Layout::run; c < (j + 1) * Layout::run; ++c) {
        float code = code_value(held.segment, c, x);
        KV_UNROLL
        for (int r = 0; r < rows; ++r) {
          parts[r] += float(queries.values[r][c]) * code;
        }
      }
      KV_UNROLL
      for (int r = 0; r < rows; ++r) {
        dots[r] += kv::finish_dot<Codec>(
            parts[r], queries.sums[r][j], held.scales[j], held.biases[j]);
      }
    }
    KV_UNROLL
    for (int r = 0; r < rows; ++r) {
      float dot = lane_sum(dots[r], 1, Layout::lanes);
      scores[r] = piece == i ? dot : scores[r];
    }
  }
}

// Which key of the tile a lane has after score_tile, and the other way round.
template <typename Layout>
METAL_FUNC int key_of_lane(int lane) {
  return lane % Layout::lanes * Layout::keys + lane / Layout::lanes;
}

template <typename Layout>
METAL_FUNC int lane_of_key(int key) {
  return key % Layout::keys * Layout::lanes + key / Layout::keys;
}

// The weighted sums of values that a lane gathers.
template <typename Operand, int rows>
struct LaneValues {
  using Layout = LaneLayout<Operand, rows>;
  float values[rows][Layout::codes];
};

// Adds the values of a tile to `acc`, weighted by what the lanes hold for its
// keys.
template <typename KLayout, typename Operand, int rows>
METAL_FUNC void add_tile(
    thread LaneValues<Operand, rows>& acc,
    const thread float* weights,
    const thread KVHead<Operand>& x,
    int tile,
    int end,
    uint lane,
    const constant MetalParams& params) {
  using Layout = LaneLayout<Operand, rows>;
  int place = lane / Layout::lanes;
  for (int i = 0; i < Layout::lanes; ++i) {
    int key = i * Layout::keys + place;
    LaneKey<Operand, rows> held;
    load_key(held, x, tile + key, end, lane, params, params.v);
    ushort owner = lane_of_key<KLayout>(key);
    float weight[rows];
    KV_UNROLL
    for (int r = 0; r < rows; ++r) {
      weight[r] = metal::simd_shuffle(weights[r], owner);
    }
    KV_UNROLL
    for (int c = 0; c < Layout::codes; ++c) {
      float value =
          held.scales[c / Layout::run] * code_value(held.segment, c, x) +
          held.biases[c / Layout::run];
      KV_UNROLL
      for (int r = 0; r < rows; ++r) {
        acc.values[r][c] += weight[r] * value;
      }
    }
  }
}

// What a lane holds for its threadgroup's rows. A lane's sums hold its own
// keys only.
template <int rows>
struct LaneRows {
  kv::SoftmaxState states[rows];
  KeyRange spans[rows];
  int64_t masks[rows];
};

template <int rows>
METAL_FUNC void load_rows(
    thread LaneRows<rows>& held,
    KeyRange existing,
    int first_row,
    int n_rows,
    uint3 group,
    const constant MetalParams& params) {
  KV_UNROLL
  for (int r = 0; r < rows; ++r) {
    QueryRow row = query_row(first_row + r, group.y, params);
    held.states[r] = kv::softmax_init();
    held.spans[r] = kv::visible_keys(existing, key_rule(params), row.position);
    held.masks[r] = mask_row_start(group.z, row, params);
    if (first_row + r >= n_rows) {
      held.spans[r].end = held.spans[r].begin;
    }
  }
}

// Turns a lane's products with its key into weights, and scales what was
// gathered before.
template <typename Operand, int rows>
METAL_FUNC void take_softmax(
    thread float* scores,
    thread LaneRows<rows>& held,
    thread LaneValues<Operand, rows>& acc,
    int key,
    const device uint8_t* mask,
    const constant MetalParams& params) {
  KV_UNROLL
  for (int r = 0; r < rows; ++r) {
    bool visible = key >= held.spans[r].begin && key < held.spans[r].end;
    float score = -INFINITY;
    if (visible) {
      score = finish_score(scores[r], held.masks[r], key, mask, params);
    }
    float factor = kv::softmax_raise(held.states[r], metal::simd_max(score));
    scores[r] = kv::softmax_weight(score, held.states[r].max);
    held.states[r].sum += scores[r];
    KV_UNROLL
    for (int c = 0; c < LaneValues<Operand, rows>::Layout::codes; ++c) {
      acc.values[r][c] *= factor;
    }
  }
}

// The state of a row over all simdgroups.
template <int rows>
METAL_FUNC kv::SoftmaxState combined_state(
    const threadgroup float* maxima,
    const threadgroup float* sums,
    int row) {
  kv::SoftmaxState state = kv::softmax_init();
  for (int i = 0; i < vector_simdgroups(); ++i) {
    kv::SoftmaxState other;
    other.max = maxima[i * rows + row];
    other.sum = sums[i * rows + row];
    kv::softmax_merge(state, other);
  }
  return state;
}

// Brings the simdgroups of a threadgroup together: the states of all rows in
// `maxima` and `sums` [simdgroups, rows], their weighted sums in `total`
// [rows, dim], those relative to the largest maximum.
template <typename Operand, int rows>
METAL_FUNC void combine_simdgroups(
    threadgroup float* total,
    threadgroup float* maxima,
    threadgroup float* sums,
    thread LaneRows<rows>& held,
    thread LaneValues<Operand, rows>& acc,
    uint simdgroup,
    uint lane) {
  using Layout = LaneLayout<Operand, rows>;
  KV_UNROLL
  for (int r = 0; r < rows; ++r) {
    float sum = metal::simd_sum(held.states[r].sum);
    if (lane == 0) {
      maxima[simdgroup * rows + r] = held.states[r].max;
      sums[simdgroup * rows + r] = sum;
    }
    KV_UNROLL
    for (int c = 0; c < Layout::codes; ++c) {
      acc.values[r][c] = lane_sum(acc.values[r][c], Layout::lanes, 32);
    }
  }
  metal::threadgroup_barrier(metal::mem_flags::mem_threadgroup);
  int first = lane * Layout::codes;
  bool writes = lane < uint(Layout::lanes) && first < Operand::dim;
  for (int s = 0; s < vector_simdgroups(); ++s) {
    if (writes && simdgroup == uint(s)) {
      KV_UNROLL
      for (int r = 0; r < rows; ++r) {
        float top = combined_state<rows>(maxima, sums, r).max;
        float factor = kv::softmax_weight(held.states[r].max, top);
        KV_UNROLL
        for (int c = 0; c < Layout::codes; ++c) {
          int at = r * Operand::dim + first + c;
          float before = s == 0 ? 0.0f : total[at];
          total[at] = before + factor * acc.values[r][c];
        }
      }
    }
    metal::threadgroup_barrier(metal::mem_flags::mem_threadgroup);
  }
}

} // namespace quantized_sdpa
} // namespace core
} // namespace mlx

// Grid: row blocks * splits, KV heads, batch. With splits it writes partial
// results [B, N_kv, rows, splits, D_v] and states [.., 2], else the result.
template <typename T, typename K, typename V, int rows>
[[kernel, max_total_threads_per_threadgroup(128)]] void quantized_sdpa_vector(
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
  using KLayout = LaneLayout<K, rows>;
  constexpr int n_simdgroups = vector_simdgroups();
  threadgroup float k_table[K::table_size];
  threadgroup float v_table[V::table_size];
  threadgroup float maxima[n_simdgroups * rows];
  threadgroup float sums[n_simdgroups * rows];
  threadgroup float total[rows * V::dim];

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
  int first_row = group.x / params.n_splits * rows;
  int n_rows = query_heads(params) * params.q_len;
  int last_row = metal::min(first_row + rows, n_rows) - 1;
  KeyRange existing = existing_keys(group.z, left_padding, lengths, params);
  KeyRange span = split_keys(
      keys_of_rows(existing, first_row, last_row, params),
      split,
      params.n_splits,
      vector_tile_keys() * n_simdgroups);
  LaneQueries<T, K, rows> queries;
  load_queries(queries, q, first_row, n_rows, group, lane, params);
  LaneRows<rows> held;
  load_rows(held, existing, first_row, n_rows, group, params);
  LaneValues<V, rows> acc = {{{0}}};
  for (int tile = span.begin + int(simdgroup) * vector_tile_keys();
       tile < span.end;
       tile += n_simdgroups * vector_tile_keys()) {
    float scores[rows] = {0};
    score_tile(scores, queries, k, tile, span.end, lane, params);
    int key = tile + key_of_lane<KLayout>(lane);
    take_softmax(scores, held, acc, key < span.end ? key : -1, mask, params);
    add_tile<KLayout>(acc, scores, v, tile, span.end, lane, params);
  }
  combine_simdgroups(total, maxima, sums, held, acc, simdgroup, lane);

  int n_values = metal::min(rows, n_rows - first_row) * V::dim;
  for (int i = thread_index; i < n_values; i += n_simdgroups * 32) {
    int r = i / V::dim;
    int d = i - r * V::dim;
    kv::SoftmaxState state = combined_state<rows>(maxima, sums, r);
    if (is_split) {
      int64_t at = partial_row(group, first_row + r, split, params);
      partials[at * V::dim + d] = total[i];
      if (d == 0) {
        states[at * 2] = state.max;
        states[at * 2 + 1] = state.sum;
      }
    } else {
      QueryRow row = query_row(first_row + r, group.y, params);
      float factor = finish_row(state, row.head, sinks, params);
      int64_t at = result_row(group.z, row, params);
      out[at * V::dim + d] = T(total[i] * factor);
      if (return_lse && d == 0) {
        lse[at] = kv::softmax_lse(state);
      }
    }
  }
}
