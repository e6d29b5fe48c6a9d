// Rows of q and of weights to integers, and where that may be done.

#pragma once

#include "mlx/backend/cpu/quantized_sdpa_integer.h"
#include "mlx/backend/cpu/quantized_sdpa_vector.h"

namespace {

#if defined(__AVX2__) && !defined(__AVX512F__)

KV_INLINE Ints magnitude_bits(Floats x) {
  return cast<Ints>(x) & 0x7fffffff;
}

KV_INLINE Ints larger(Ints a, Ints b) {
  return cast<Ints>(_mm256_max_epi32(cast<__m256i>(a), cast<__m256i>(b)));
}

// As integers NaN and infinity are the largest, so that they are not lost.
KV_INLINE float max_magnitude(Ints bits) {
  auto fold = [](__m128i a, __m128i b) { return _mm_max_epi32(a, b); };
  __m256i x = cast<__m256i>(bits);
  __m128i y = fold(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1));
  y = fold(y, _mm_shuffle_epi32(y, 0x4e));
  y = fold(y, _mm_shuffle_epi32(y, 0xb1));
  return cast<float>(_mm_cvtsi128_si32(y));
}

struct Step {
  float size;
  float inverse;
};

constexpr float largest_short = 32767;

KV_INLINE Step step_for(float top) {
  if (!(top < KV_INFINITY)) {
    return {__builtin_nanf(""), 0};
  }
  // Below this the inverse overflows and the values do not matter.
  return top < 1e-30f ? Step{0, 0}
                      : Step{top / largest_short, largest_short / top};
}

// A power of two times `scale`, by which q was multiplied: what halves hold in
// few bits, such as all but the smallest of bfloat16, then stays exact.
KV_INLINE Step query_step(float top, float scale) {
  Step step = step_for(top);
  float unit = __builtin_fabsf(scale);
  auto ratio = cast<uint32_t>(step.size / unit);
  float size = unit * cast<float>((ratio + 0x007fffffu) & 0x7f800000u);
  // Not so where a scale far from 1 leaves the range of floats.
  bool fits = size >= step.size && size <= 2.5f * step.size && step.size > 0;
  return fits ? Step{size, 1 / size} : step;
}

KV_INLINE Ints round_to_ints(Floats x) {
  return cast<Ints>(_mm256_cvtps_epi32(x));
}

// Scales become those of the integers, biases take up the zero.
inline void adjust_scales(const IntegerKernels& format, TileView& view) {
  if (format.gain == 1 && format.zero == 0) {
    return;
  }
  for (int i = 0; i < view.n_groups * tile_keys; i += lanes) {
    Floats scale = load<Floats>(view.scales + i) * splat(format.gain);
    store(view.scales + i, scale);
    store(view.biases + i, scale * splat(-format.zero));
  }
}

struct IntegerScratch {
  float *rows, *float_keys, *q_steps, *q_errors, *q_sums, *scores, *steps,
      *bias_sums, *acc;
  int32_t *q, *wide_q, *keys, *weights;
  int16_t* values;
  OperandScratch k, v;

  IntegerScratch(const CpuArgs& args, int n_rows, Arena& arena)
      : k(args.k, arena), v(args.v, arena) {
    size_t n = tile_rows(n_rows);
    size_t k_groups = args.k.dim / args.k.group_size;
    size_t v_groups = args.v.dim / args.v.group_size;
    auto pairs = [&](size_t count) {
      return reinterpret_cast<int32_t*>(arena.take(count));
    };
    rows = arena.take(n * args.k.dim);
    float_keys = arena.take(tile_keys * args.k.dim);
    q_steps = arena.take(n);
    q_errors = arena.take(n);
    q_sums = arena.take(n * k_groups);
    scores = arena.take(n * tile_keys);
    steps = arena.take(n * v_groups);
    bias_sums = arena.take(n * v_groups);
    acc = arena.take(n * args.v.dim);
    q = pairs(n * args.k.dim / 2);
    wide_q = pairs(n > integer_rows ? 0 : n * args.k.dim / 2 * lanes);
    keys = pairs(tile_keys * args.k.dim / 2);
    values = reinterpret_cast<int16_t*>(pairs(tile_pairs * args.v.dim));
    weights = pairs(n * v_groups * tile_pairs);
  }
};

// A row of q to integers, paired as the codes of K are; pairs of four rows
// stand side by side. `rounded` gets the values that the integers stand for.
// Returns the norm of what rounding took away.
inline float round_query(
    const IntegerKernels& format,
    int dim,
    float scale,
    const float* row,
    float* step,
    int32_t* out,
    float* rounded) {
  Ints top = {};
  for (int d = 0; d < dim; d += lanes) {
    top = larger(top, magnitude_bits(load<Floats>(row + d)));
  }
  Step s = query_step(max_magnitude(top), scale);
  *step = s.size;
  int n = format.word_pairs;
  Floats squares = {};
  for (int d = 0; d < dim; d += lanes) {
    Ints values = round_to_ints(load<Floats>(row + d) * splat(s.inverse));
    Floats value = __builtin_convertvector(values, Floats) * splat(s.size);
    Floats error = load<Floats>(row + d) - value;
    squares += error * error;
    store(rounded + d, value);
    for (int i = 0; i < lanes / 2; ++i) {
      int first = i / n * 2 * n + i % n;
      *out =
          (values[first] & 0xffff) | int32_t(uint32_t(values[first + n]) << 16);
      out += integer_rows;
    }
  }
  return __builtin_sqrtf(reduce_sum(squares));
}

// The largest error of a score that rounding q may make, by norms; the estimate
// of a key's is at least half of it, and the bounds on a result are 1e-3 of it
// in float16 and 3e-3 in bfloat16.
KV_INLINE float largest_score_error(Scalar q_type) {
  return q_type == Scalar::f16 ? 5e-4f : 1.5e-3f;
}

// About the largest norm of a key of the tile, as if its codes were spread
// evenly; outliers widen a group's scale and so count in full.
inline float estimate_key_norm(
    const IntegerKernels& format,
    const TileView& k) {
  Floats spread = splat(format.levels * format.levels / 12);
  Floats middle = splat(format.levels / 2 - format.zero);
  Floats top = {};
  for (int i = 0; i < k.n; i += lanes) {
    Floats squares = {};
    for (int g = 0; g < k.n_groups; ++g) {
      int at = g * tile_keys + i;
      Floats scale = load<Floats>(k.scales + at) * splat(format.gain);
      Floats bias = format.has_bias ? load<Floats>(k.biases + at) : Floats{};
      Floats mean = bias + scale * middle;
      squares += scale * scale * spread + mean * mean;
    }
    top = maximum(squares, top);
  }
  return __builtin_sqrtf(reduce_max(top) * float(k.group_size));
}

// Whether rounding these rows of q does not show. NaN is not close.
inline bool is_close(
    const CpuArgs& args,
    const IntegerKernels& format,
    const TileView& k,
    int rows,
    const float* q_errors) {
  float limit = largest_score_error(args.q.type);
  float norm = estimate_key_norm(format, k);
  bool close = true;
  for (int r = 0; r < rows; ++r) {
    close &= q_errors[r] * norm <= limit;
  }
  return close;
}

inline void round_queries(const CpuArgs& args, int rows, IntegerScratch& s) {
  int dim = args.k.dim;
  int n_groups = dim / args.k.group_size;
  auto& format = integer_formats[args.k.format];
  float* rounded = s.float_keys;
  for (int r = 0; r < rows; ++r) {
    int32_t* q =
        s.q + r / integer_rows * integer_rows * dim / 2 + r % integer_rows;
    s.q_errors[r] = round_query(
        format, dim, args.scale, s.rows + r * dim, s.q_steps + r, q, rounded);
    // Of the rounded values, or their error would meet the mean of the codes.
    sum_groups(dim, args.k.group_size, rounded, s.q_sums + r * n_groups);
  }
  if (rows == integer_rows) {
    for (int i = 0; i < rows * dim / 2; ++i) {
      store(s.wide_q + i * lanes, _mm256_set1_epi32(s.q[i]));
    }
  }
}

// Sixteen weights as eight pairs.
KV_INLINE void store_pairs(const float* x, float inverse, int32_t* out) {
  Ints a = round_to_ints(load<Floats>(x) * splat(inverse));
  Ints b = round_to_ints(load<Floats>(x + lanes) * splat(inverse));
  __m256i packed = _mm256_packs_epi32(cast<__m256i>(a), cast<__m256i>(b));
  store(out, _mm256_permute4x64_epi64(packed, 0xd8));
}

// A row of weights times the scales of group g, to integers.
KV_INLINE void
round_weights(const TileView& v, int row, int g, IntegerScratch& s) {
  int padded = padded_keys(v.n);
  const float* weights = s.scores + row * tile_keys;
  const float* scales = v.scales + g * tile_keys;
  const float* biases = v.biases + g * tile_keys;
  float scaled[tile_keys];
  Ints top = {};
  Floats sum = {};
  for (int i = 0; i < padded; i += lanes) {
    Floats weight = load<Floats>(weights + i);
    Floats x = weight * load<Floats>(scales + i);
    sum += weight * load<Floats>(biases + i);
    top = larger(top, magnitude_bits(x));
    store(scaled + i, x);
  }
  Step step = step_for(max_magnitude(top));
  s.steps[row * v.n_groups + g] = step.size;
  s.bias_sums[row * v.n_groups + g] = reduce_sum(sum);
  int first = row / integer_rows * integer_rows;
  int place = first * v.n_groups + g * integer_rows + row % integer_rows;
  for (int i = 0; i < padded; i += 16) {
    store_pairs(
        scaled + i, step.inverse, s.weights + place * tile_pairs + i / 2);
  }
}

inline void reorder_values(const IntegerKernels& format, int n, float* values) {
  for (int d = 0; d < n; d += wide_codes) {
    float block[wide_codes];
    memcpy(block, values + d, sizeof(block));
    for (int i = 0; i < wide_codes; ++i) {
      values[d + format.acc_order[i]] = block[i];
    }
  }
}

#endif

} // namespace
