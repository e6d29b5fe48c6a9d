// Many rows: a tile of keys is decoded once, then two matrix products.

#pragma once

#include "mlx/backend/cpu/quantized_sdpa_softmax.h"

namespace {

// Rows of the micro kernel, against sixteen columns.
constexpr int product_rows = 6;

// Keys as panels of sixteen columns, [tile_keys / 16, dim, 16]. Places past a
// short tile repeat its last key.
template <typename Codec>
void decode_keys(const TileView& x, float* out) {
  for (int i = 0; i < padded_keys(x.n); i += lanes) {
    float* panel =
        out + i / block_codes * block_codes * x.dim + i % block_codes;
    for (int d = 0; d < x.dim; d += block_codes) {
      Floats keys[block_vectors][lanes];
      for (int t = 0; t < lanes; ++t) {
        int key = i + t < x.n ? i + t : x.n - 1;
        int at = d / x.group_size * tile_keys + key;
        Block w =
            decode_block<Codec>(x.rows[key] + d * Codec::bits / 8, x.table);
        scale_block(w, x.scales[at], Codec::has_bias ? x.biases[at] : 0.0f);
        for (int j = 0; j < block_vectors; ++j) {
          keys[j][t] = w.v[j];
        }
      }
      for (int j = 0; j < block_vectors; ++j) {
        transpose(keys[j]);
        for (int c = 0; c < lanes; ++c) {
          store(panel + (d + j * lanes + c) * block_codes, keys[j][c]);
        }
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

// out [rows, columns] += a [rows, n] * panels [columns / 16, panel_size],
// rows a multiple of four.
struct Product {
  const float* a;
  int a_stride;
  const float* panels;
  int panel_size;
  int n;
  float* out;
  int out_stride;
};

// Sixteen columns of `rows` rows.
template <int rows>
void multiply_panel(const Product& p, int row, int column) {
  const float* a = p.a + row * p.a_stride;
  const float* panel = p.panels + column / block_codes * p.panel_size;
  float* out = p.out + row * p.out_stride + column;
  Floats sums[rows][block_vectors];
#pragma GCC unroll 8
  for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 4
    for (int j = 0; j < block_vectors; ++j) {
      sums[r][j] = load<Floats>(out + r * p.out_stride + j * lanes);
    }
  }
  for (int t = 0; t < p.n; ++t) {
    Floats value[block_vectors];
#pragma GCC unroll 4
    for (int j = 0; j < block_vectors; ++j) {
      value[j] = load<Floats>(panel + t * block_codes + j * lanes);
    }
#pragma GCC unroll 8
    for (int r = 0; r < rows; ++r) {
      Floats factor = splat(a[r * p.a_stride + t]);
#pragma GCC unroll 4
      for (int j = 0; j < block_vectors; ++j) {
        sums[r][j] += factor * value[j];
      }
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 4
    for (int j = 0; j < block_vectors; ++j) {
      store(out + r * p.out_stride + j * lanes, sums[r][j]);
    }
  }
}

// Sixes, then fours.
inline void multiply_panels(const Product& p, int rows, int columns) {
  int left = rows % product_rows;
  int fours = left == 0 ? 0 : left == 4 ? 1 : 2;
  for (int column = 0; column < columns; column += block_codes) {
    int row = 0;
    for (; row < rows - 4 * fours; row += product_rows) {
      multiply_panel<product_rows>(p, row, column);
    }
    for (; row < rows; row += 4) {
      multiply_panel<4>(p, row, column);
    }
  }
}

// Scores [rows, tile_keys] of n keys.
inline void multiply_keys(
    int rows,
    const float* q,
    int dim,
    const float* keys,
    int n,
    float* scores) {
  memset(scores, 0, size_t(rows) * tile_keys * sizeof(float));
  int panel_size = dim * block_codes;
  multiply_panels(
      {q, dim, keys, panel_size, dim, scores, tile_keys}, rows, padded_keys(n));
}

// acc [rows, dim] += weights [rows, tile_keys] of n keys * values.
inline void multiply_values(
    const float* weights,
    const float* values,
    int rows,
    int n,
    float* acc,
    int dim) {
  int panel_size = tile_keys * block_codes;
  multiply_panels(
      {weights, tile_keys, values, panel_size, n, acc, dim}, rows, dim);
}

struct TileScratch {
  float *q, *scores, *keys, *values, *acc;
  OperandScratch k, v;

  TileScratch(const CpuArgs& args, int n_rows, Arena& arena)
      : k(args.k, arena), v(args.v, arena) {
    size_t rows = tile_rows(n_rows);
    q = arena.take(rows * args.k.dim);
    scores = arena.take(rows * tile_keys);
    keys = arena.take(tile_keys * args.k.dim);
    values = arena.take(tile_keys * args.v.dim);
    acc = arena.take(rows * args.v.dim);
  }
};

} // namespace
