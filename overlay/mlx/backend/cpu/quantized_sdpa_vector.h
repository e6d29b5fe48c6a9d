// Few rows: codes go from memory to registers to products.

#pragma once

#include "mlx/backend/cpu/quantized_sdpa_softmax.h"

namespace {

constexpr int max_vector_rows = 4;

// Rows are padded to 1, 2 or 4 so that rows * keys fill a vector of sums.
inline int vector_rows(int n_rows) {
  return n_rows <= 2 ? n_rows : max_vector_rows;
}

// Groups up to this size are scaled before the product, which is then
// cheaper than scaling one sum a row.
constexpr int max_early_group = 32;

struct ScoreJob {
  const TileView* k;
  // What the other half will read next.
  const TileView* v;
  int v_row_bytes;
  // Blocks of sixteen values, [dim / 16, rows, 16].
  const float* q;
  // Sums of q over each group, [rows, n_groups].
  const float* q_sums;
  // [rows, tile_keys].
  float* scores;
};

// Sums over the codes of one group of `lanes / rows` keys, from block `block`
// of the row on.
template <typename Codec, int rows, bool early>
KV_INLINE void dot_group(
    const ScoreJob& job,
    const uint8_t* const* codes,
    const float* scales,
    const float* biases,
    int block,
    int n_blocks,
    Floats sums[lanes]) {
  constexpr int keys = lanes / rows;
  const float* queries = job.q + block * rows * block_codes;
  int64_t offset = int64_t(block) * block_bytes<Codec>;
  for (int i = 0; i < n_blocks; ++i) {
    Block w[keys];
#pragma GCC unroll 16
    for (int t = 0; t < keys; ++t) {
      w[t] = decode_block<Codec>(codes[t] + offset, job.k->table);
      if constexpr (early) {
        scale_block(w[t], scales[t], Codec::has_bias ? biases[t] : 0.0f);
      }
    }
#pragma GCC unroll 4
    for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 4
      for (int b = 0; b < block_vectors; ++b) {
        Floats q = load<Floats>(queries + r * block_codes + b * lanes);
        keep(q);
#pragma GCC unroll 16
        for (int t = 0; t < keys; ++t) {
          sums[r * keys + t] += w[t].v[b] * q;
        }
      }
    }
    queries += rows * block_codes;
    offset += block_bytes<Codec>;
  }
}

// q . codes of `lanes / rows` keys from key i on.
template <typename Codec, int rows, bool early>
KV_INLINE Floats dot_keys(const ScoreJob& job, int i) {
  constexpr int keys = lanes / rows;
  const TileView& k = *job.k;
  const uint8_t* codes[keys];
#pragma GCC unroll 16
  for (int t = 0; t < keys; ++t) {
    codes[t] = k.rows[i + t < k.n ? i + t : k.n - 1];
  }
  int n_blocks = k.group_size / block_codes;
  Floats total[lanes] = {};
  for (int g = 0; g < k.n_groups; ++g) {
    const float* scales = k.scales + g * tile_keys + i;
    const float* biases = k.biases + g * tile_keys + i;
    if constexpr (early) {
      dot_group<Codec, rows, early>(
          job, codes, scales, biases, g * n_blocks, n_blocks, total);
    } else {
      Floats sums[lanes] = {};
      dot_group<Codec, rows, early>(
          job, codes, scales, biases, g * n_blocks, n_blocks, sums);
#pragma GCC unroll 16
      for (int j = 0; j < lanes; ++j) {
        total[j] += sums[j] * splat(scales[j % keys]);
      }
    }
  }
  return reduce_each(total);
}

// The part of the scores that the biases of K make.
inline void add_bias_scores(
    const TileView& k,
    int rows,
    const float* q_sums,
    float* scores) {
  for (int r = 0; r < rows; ++r) {
    float* row = scores + r * tile_keys;
    for (int g = 0; g < k.n_groups; ++g) {
      Floats q_sum = splat(q_sums[r * k.n_groups + g]);
      const float* biases = k.biases + g * tile_keys;
      for (int i = 0; i < k.n; i += lanes) {
        store(
            row + i, load<Floats>(row + i) + q_sum * load<Floats>(biases + i));
      }
    }
  }
}

template <typename Codec, int rows, bool early>
void score_tile(const ScoreJob& job) {
  constexpr int keys = lanes / rows;
  const TileView& k = *job.k;
  for (int i = 0; i < k.n; i += keys) {
    for (int t = i; t < i + keys && t < job.v->n; ++t) {
      prefetch(job.v->rows[t], job.v_row_bytes);
    }
    Floats dots = dot_keys<Codec, rows, early>(job, i);
    float flat[lanes];
    store(flat, dots);
    for (int r = 0; r < rows; ++r) {
      memcpy(job.scores + r * tile_keys + i, flat + r * keys, keys * 4);
    }
  }
  if (!early && Codec::has_bias) {
    add_bias_scores(k, rows, job.q_sums, job.scores);
  }
}

struct ValueJob {
  const TileView* v;
  const TileView* next_k;
  int k_row_bytes;
  // Weights times scales, [n_groups, rows, tile_keys].
  const float* weights;
  // Sums of weights times biases, [rows, n_groups].
  const float* bias_sums;
  // [rows, dim].
  float* acc;
};

// acc += weights * codes for `blocks` blocks of sixteen values from d on.
template <typename Codec, int rows, int blocks>
KV_INLINE void add_values(const ValueJob& job, int d) {
  const TileView& v = *job.v;
  Floats sums[rows][blocks][block_vectors];
  const float* weights[blocks];
#pragma GCC unroll 4
  for (int b = 0; b < blocks; ++b) {
    int group = (d + b * block_codes) / v.group_size;
    weights[b] = job.weights + group * rows * tile_keys;
#pragma GCC unroll 4
    for (int r = 0; r < rows; ++r) {
      float bias =
          Codec::has_bias ? job.bias_sums[r * v.n_groups + group] : 0.0f;
#pragma GCC unroll 4
      for (int j = 0; j < block_vectors; ++j) {
        const float* acc = job.acc + r * v.dim + d + b * block_codes;
        sums[r][b][j] = load<Floats>(acc + j * lanes) + splat(bias);
      }
    }
  }
  for (int t = 0; t < v.n; ++t) {
    const uint8_t* codes = v.rows[t] + d * Codec::bits / 8;
#pragma GCC unroll 4
    for (int b = 0; b < blocks; ++b) {
      Block w = decode_block<Codec>(codes + b * block_bytes<Codec>, v.table);
#pragma GCC unroll 4
      for (int r = 0; r < rows; ++r) {
        Floats weight = splat(weights[b][r * tile_keys + t]);
#pragma GCC unroll 4
        for (int j = 0; j < block_vectors; ++j) {
          sums[r][b][j] += weight * w.v[j];
        }
      }
    }
  }
#pragma GCC unroll 4
  for (int b = 0; b < blocks; ++b) {
#pragma GCC unroll 4
    for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 4
      for (int j = 0; j < block_vectors; ++j) {
        float* acc = job.acc + r * v.dim + d + b * block_codes;
        store(acc + j * lanes, sums[r][b][j]);
      }
    }
  }
}

template <typename Codec, int rows>
void value_tile(const ValueJob& job) {
  constexpr int blocks = max_vector_rows / rows;
  int dim = job.v->dim;
  int d = 0;
  int ahead = 0;
  for (; d + blocks * block_codes <= dim; d += blocks * block_codes) {
    int end = job.next_k->n * (d + blocks * block_codes) / dim;
    for (; ahead < end; ++ahead) {
      prefetch(job.next_k->rows[ahead], job.k_row_bytes);
    }
    add_values<Codec, rows, blocks>(job, d);
  }
  for (; d < dim; d += block_codes) {
    add_values<Codec, rows, 1>(job, d);
  }
}

using ScoreFn = void (*)(const ScoreJob&);
using ValueFn = void (*)(const ValueJob&);

template <typename Codec, int rows>
ScoreFn score_fn(int group_size) {
  constexpr bool only_early =
      Codec::group_size > 0 && Codec::group_size <= max_early_group;
  constexpr bool only_late = Codec::has_codebook;
  if constexpr (only_early) {
    return score_tile<Codec, rows, true>;
  } else if constexpr (only_late) {
    return score_tile<Codec, rows, false>;
  } else {
    return group_size <= max_early_group ? score_tile<Codec, rows, true>
                                         : score_tile<Codec, rows, false>;
  }
}

struct VectorScratch {
  float *rows, *q, *q_sums, *scores, *weights, *bias_sums;
  OperandScratch k, v;

  VectorScratch(const CpuArgs& args, Arena& arena)
      : k(args.k, arena), v(args.v, arena) {
    size_t k_groups = args.k.dim / args.k.group_size;
    size_t v_groups = args.v.dim / args.v.group_size;
    rows = arena.take(max_vector_rows * args.k.dim);
    q = arena.take(max_vector_rows * args.k.dim);
    q_sums = arena.take(max_vector_rows * k_groups);
    scores = arena.take(max_vector_rows * tile_keys);
    weights = arena.take(v_groups * max_vector_rows * tile_keys);
    bias_sums = arena.take(max_vector_rows * v_groups);
  }
};

// Sums of `n` values over each group.
inline void sum_groups(int n, int size, const float* values, float* sums) {
  for (int i = 0; i < n / size; ++i) {
    Floats sum = {};
    for (int d = 0; d < size; d += lanes) {
      sum += load<Floats>(values + i * size + d);
    }
    sums[i] = reduce_sum(sum);
  }
}

// The order in which score_tile reads q.
inline void interleave_queries(int rows, int dim, const float* in, float* out) {
  for (int r = 0; r < rows; ++r) {
    for (int d = 0; d < dim; d += block_codes) {
      memcpy(
          out + d * rows + r * block_codes,
          in + r * dim + d,
          block_codes * sizeof(float));
    }
  }
}

// Weights of each row times the scales and biases of V.
inline void
scale_weights(const TileView& v, int rows, bool has_bias, VectorScratch& s) {
  int padded = padded_keys(v.n);
  for (int g = 0; g < v.n_groups; ++g) {
    const float* scales = v.scales + g * tile_keys;
    const float* biases = v.biases + g * tile_keys;
    for (int r = 0; r < rows; ++r) {
      const float* p = s.scores + r * tile_keys;
      float* out = s.weights + (g * rows + r) * tile_keys;
      Floats sum = {};
      for (int i = 0; i < padded; i += lanes) {
        Floats weight = load<Floats>(p + i);
        store(out + i, weight * load<Floats>(scales + i));
        if (has_bias) {
          sum += weight * load<Floats>(biases + i);
        }
      }
      s.bias_sums[r * v.n_groups + g] = reduce_sum(sum);
    }
  }
}

inline void clear_tail(TileView& view, bool has_bias) {
  for (int i = view.n; i < padded_keys(view.n); ++i) {
    for (int g = 0; g < view.n_groups; ++g) {
      view.scales[g * tile_keys + i] = 0;
      if (has_bias) {
        view.biases[g * tile_keys + i] = 0;
      }
    }
  }
}

} // namespace
