// Many rows: a tile of keys is decoded once, then two matrix products.

#pragma once

#include "mlx/backend/cpu/quantized_sdpa_softmax.h"

namespace {

// Rows of the micro kernels: four against `lanes / 4` keys, six against
// sixteen values.
constexpr int score_rows = 4;
constexpr int value_rows = 6;

// Keys as rows of floats [tile_keys, dim].
template <typename Codec>
void decode_keys(const TileView& x, float* out) {
  for (int i = 0; i < x.n; ++i) {
    for (int d = 0; d < x.dim; d += block_codes) {
      int at = d / x.group_size * tile_keys + i;
      Block w = decode_block<Codec>(x.rows[i] + d * Codec::bits / 8, x.table);
      scale_block(w, x.scales[at], Codec::has_bias ? x.biases[at] : 0.0f);
      for (int j = 0; j < block_vectors; ++j) {
        store(out + i * x.dim + d + j * lanes, w.v[j]);
      }
    }
  }
}

// Values as panels of sixteen columns, [dim / 16, tile_keys, 16].
template <typename Codec>
void decode_values(const TileView& x, float* out) {
  for (int i = 0; i < x.n; ++i) {
    for (int d = 0; d < x.dim; d += block_codes) {
      int at = d / x.group_size * tile_keys + i;
      Block w = decode_block<Codec>(x.rows[i] + d * Codec::bits / 8, x.table);
      scale_block(w, x.scales[at], Codec::has_bias ? x.biases[at] : 0.0f);
      float* panel = out + d * tile_keys + i * block_codes;
      for (int j = 0; j < block_vectors; ++j) {
        store(panel + j * lanes, w.v[j]);
      }
    }
  }
}

using DecodeFn = void (*)(const TileView&, float*);

// Scores of four rows against all keys of the tile.
inline void
multiply_keys(const float* q, const float* k, int dim, int n, float* scores) {
  constexpr int keys = lanes / score_rows;
  for (int i = 0; i < n; i += keys) {
    Floats sums[lanes] = {};
    for (int d = 0; d < dim; d += lanes) {
      Floats key[keys];
#pragma GCC unroll 4
      for (int t = 0; t < keys; ++t) {
        key[t] = load<Floats>(k + (i + t) * dim + d);
      }
#pragma GCC unroll 4
      for (int r = 0; r < score_rows; ++r) {
        Floats query = load<Floats>(q + r * dim + d);
#pragma GCC unroll 4
        for (int t = 0; t < keys; ++t) {
          sums[r * keys + t] += query * key[t];
        }
      }
    }
    float flat[lanes];
    store(flat, reduce_each(sums));
    for (int r = 0; r < score_rows; ++r) {
      memcpy(scores + r * tile_keys + i, flat + r * keys, keys * 4);
    }
  }
}

// Scores of a multiple of four rows.
inline void multiply_rows(
    int rows,
    const float* q,
    int dim,
    const float* k,
    int n,
    float* scores) {
  for (int r = 0; r < rows; r += score_rows) {
    multiply_keys(q + r * dim, k, dim, n, scores + r * tile_keys);
  }
}

// acc += weights [rows, tile_keys] * panel [n, 16], in columns of `acc`.
template <int rows>
void multiply_panel(
    const float* weights,
    const float* panel,
    int n,
    float* acc,
    int stride) {
  Floats sums[rows][block_vectors];
#pragma GCC unroll 8
  for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 4
    for (int j = 0; j < block_vectors; ++j) {
      sums[r][j] = load<Floats>(acc + r * stride + j * lanes);
    }
  }
  for (int t = 0; t < n; ++t) {
    Floats value[block_vectors];
#pragma GCC unroll 4
    for (int j = 0; j < block_vectors; ++j) {
      value[j] = load<Floats>(panel + t * block_codes + j * lanes);
    }
#pragma GCC unroll 8
    for (int r = 0; r < rows; ++r) {
      Floats weight = splat(weights[r * tile_keys + t]);
#pragma GCC unroll 4
      for (int j = 0; j < block_vectors; ++j) {
        sums[r][j] += weight * value[j];
      }
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 4
    for (int j = 0; j < block_vectors; ++j) {
      store(acc + r * stride + j * lanes, sums[r][j]);
    }
  }
}

// Rows come as a multiple of four: sixes, then fours.
inline void multiply_values(
    const float* weights,
    const float* panels,
    int rows,
    int n,
    float* acc,
    int dim) {
  int fours = rows % value_rows == 0 ? 0 : rows % value_rows == 4 ? 1 : 2;
  for (int d = 0; d < dim; d += block_codes) {
    const float* panel = panels + d * tile_keys;
    int r = 0;
    for (; r < rows - 4 * fours; r += value_rows) {
      multiply_panel<value_rows>(
          weights + r * tile_keys, panel, n, acc + r * dim + d, dim);
    }
    for (; r < rows; r += 4) {
      multiply_panel<4>(
          weights + r * tile_keys, panel, n, acc + r * dim + d, dim);
    }
  }
}

struct TileScratch {
  float *q, *scores, *keys, *values, *acc;
  float *k_scales, *k_biases, *v_scales, *v_biases, *k_table, *v_table;

  TileScratch(const CpuArgs& args, int n_rows, Arena& arena) {
    size_t rows = tile_rows(n_rows);
    size_t k_groups = args.k.dim / args.k.group_size;
    size_t v_groups = args.v.dim / args.v.group_size;
    q = arena.take(rows * args.k.dim);
    scores = arena.take(rows * tile_keys);
    keys = arena.take(tile_keys * args.k.dim);
    values = arena.take(tile_keys * args.v.dim);
    acc = arena.take(rows * args.v.dim);
    k_scales = arena.take(k_groups * tile_keys);
    k_biases = arena.take(k_groups * tile_keys);
    v_scales = arena.take(v_groups * tile_keys);
    v_biases = arena.take(v_groups * tile_keys);
    k_table = arena.take(table_size);
    v_table = arena.take(table_size);
  }
};

} // namespace
