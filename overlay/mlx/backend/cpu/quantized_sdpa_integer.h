// Half-precision q against formats of small whole numbers: q and the weights
// are rounded to 15 bits and a sign, codes stay integers, and products of pairs
// add up exactly in 32 bits. The rounding is 1e-4 of a result, below that of a
// half. Rows come in fours.

#pragma once

#include "mlx/backend/cpu/quantized_sdpa_fetch.h"
#include "mlx/backend/cpu/quantized_sdpa_tile.h"
#include "mlx/backend/cpu/quantized_sdpa_vector.h"

namespace {

// value = gain * scale * (integer - zero) + bias, integers up to `levels`.
template <typename Codec>
struct IntegerFormat {
  static constexpr bool supported = false;
};

#if defined(__AVX2__) && !defined(__AVX512F__)

typedef int16_t Shorts __attribute__((vector_size(32)));

constexpr int integer_rows = 4;
constexpr int tile_pairs = tile_keys / 2;

// V is read in blocks of this many codes.
constexpr int wide_codes = 32;

// Sums of four rows are up to date here: in an unrolled loop GCC would put them
// off until their products fill the registers.
KV_INLINE void settle(Ints sums[integer_rows]) {
  asm("" : "+x"(sums[0]), "+x"(sums[1]), "+x"(sums[2]), "+x"(sums[3]));
}

KV_INLINE Ints multiply_pairs(Shorts a, Shorts b) {
  return cast<Ints>(_mm256_madd_epi16(cast<__m256i>(a), cast<__m256i>(b)));
}

// A format brings
//   word_pairs    pairs of codes in a 32-bit word
//   pair(w, i)    of eight words: codes i and i + word_pairs as two shorts
//   values(p, h)  half h of a block of thirty-two codes of one row
//   position(...) the code in lane `lane` of that half
template <>
struct IntegerFormat<kv::Affine<8>> {
  static constexpr bool supported = true;
  static constexpr float gain = 1;
  static constexpr float zero = 0;
  static constexpr float levels = 255;
  static constexpr int word_pairs = 2;
  static constexpr int bytes = 32;
  static KV_INLINE Shorts pair(Words w, int i) {
    return i == 0 ? cast<Shorts>(w & splat(0x00ff00ffu))
                  : cast<Shorts>(_mm256_srli_epi16(cast<__m256i>(w), 8));
  }
  static KV_INLINE Shorts values(const uint8_t* p, int half) {
    return cast<Shorts>(_mm256_cvtepu8_epi16(load<__m128i>(p + 16 * half)));
  }
  static constexpr int position(int half, int lane) {
    return 16 * half + lane;
  }
};

struct Nibbles {
  static constexpr bool supported = true;
  static constexpr int word_pairs = 4;
  static constexpr int bytes = 16;
  static KV_INLINE Shorts pair(Words w, int i) {
    __m256i x = _mm256_srli_epi16(cast<__m256i>(w), 4 * i);
    return cast<Shorts>(
        i == 3 ? x : _mm256_and_si256(x, _mm256_set1_epi16(15)));
  }
  // Even codes, then odd ones.
  static KV_INLINE Shorts values(const uint8_t* p, int half) {
    __m256i x = _mm256_cvtepu8_epi16(load<__m128i>(p));
    return cast<Shorts>(
        half ? _mm256_srli_epi16(x, 4)
             : _mm256_and_si256(x, _mm256_set1_epi16(15)));
  }
  static constexpr int position(int half, int lane) {
    return 2 * lane + half;
  }
};

template <>
struct IntegerFormat<kv::Affine<4>> : Nibbles {
  static constexpr float gain = 1;
  static constexpr float zero = 0;
  static constexpr float levels = 15;
};

// Twice the value plus twelve: 0 to 24.
template <>
struct IntegerFormat<kv::Mxfp4> : Nibbles {
  static constexpr float gain = 0.5f;
  static constexpr float zero = 12;
  static constexpr float levels = 24;
  static KV_INLINE Shorts decode(Shorts codes) {
    const __m128i table = _mm_setr_epi8(
        12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0);
    __m256i bytes = _mm256_shuffle_epi8(
        _mm256_broadcastsi128_si256(table), cast<__m256i>(codes));
    // The empty high byte of each lane looked up code 0.
    return cast<Shorts>(_mm256_and_si256(bytes, _mm256_set1_epi16(255)));
  }
  static KV_INLINE Shorts pair(Words w, int i) {
    return decode(Nibbles::pair(w, i));
  }
  static KV_INLINE Shorts values(const uint8_t* p, int half) {
    return decode(Nibbles::values(p, half));
  }
};

// Four words of eight keys, word by word.
KV_INLINE void
transpose_words(const uint8_t* const* rows, int64_t offset, Words out[4]) {
  __m256i x[4];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    x[i] = _mm256_inserti128_si256(
        _mm256_castsi128_si256(load<__m128i>(rows[i] + offset)),
        load<__m128i>(rows[i + 4] + offset),
        1);
  }
  __m256i a = _mm256_unpacklo_epi32(x[0], x[1]);
  __m256i b = _mm256_unpackhi_epi32(x[0], x[1]);
  __m256i c = _mm256_unpacklo_epi32(x[2], x[3]);
  __m256i d = _mm256_unpackhi_epi32(x[2], x[3]);
  out[0] = cast<Words>(_mm256_unpacklo_epi64(a, c));
  out[1] = cast<Words>(_mm256_unpackhi_epi64(a, c));
  out[2] = cast<Words>(_mm256_unpacklo_epi64(b, d));
  out[3] = cast<Words>(_mm256_unpackhi_epi64(b, d));
}

// The keys of a tile as pairs of integers [dim / 2, tile_keys]. Places past a
// short tile repeat its last key: what was there before might overflow.
template <typename Format>
void decode_integer_keys(const TileView& k, int32_t* out) {
  int n_words = k.dim / (2 * Format::word_pairs);
  for (int i = 0; i < padded_keys(k.n); i += lanes) {
    const uint8_t* rows[lanes];
    for (int t = 0; t < lanes; ++t) {
      rows[t] = k.rows[i + t < k.n ? i + t : k.n - 1];
    }
    int32_t* place = out + i;
    for (int word = 0; word < n_words; word += 4) {
      Words words[4];
      transpose_words(rows, 4 * word, words);
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) {
#pragma GCC unroll 4
        for (int pair = 0; pair < Format::word_pairs; ++pair) {
          store(place, Format::pair(words[j], pair));
          place += tile_keys;
        }
      }
    }
  }
}

// Pairs between two steps of a fetch; divides every group.
constexpr int step_pairs = 4;

struct IntegerScoreJob {
  const TileView* k;
  Ahead next_v;
  // A multiple of four.
  int rows;
  // Pairs of codes [dim / 2, tile_keys], pairs of q [rows / 4, dim / 2, 4].
  // score_codes has no keys here, and pairs of q in all lanes [dim / 2, 4, 8].
  const int32_t* keys;
  const int32_t* q;
  // What one step of q is worth [rows], sums of q over groups [rows, n_groups].
  const float* q_steps;
  const float* q_sums;
  // [rows, tile_keys].
  float* scores;
};

// Four rows against two vectors of keys, over one group.
KV_INLINE void multiply_group(
    const int32_t* keys,
    const int32_t* q,
    int n_pairs,
    Fetch& fetch,
    Ints sums[2][integer_rows]) {
  for (int first = 0; first < n_pairs; first += step_pairs) {
    fetch.step();
#pragma GCC unroll 4
    for (int pair = 0; pair < step_pairs; ++pair) {
      Shorts a = load<Shorts>(keys);
      Shorts b = load<Shorts>(keys + lanes);
#pragma GCC unroll 4
      for (int r = 0; r < integer_rows; ++r) {
        Shorts x = cast<Shorts>(_mm256_set1_epi32(q[r]));
        sums[0][r] += multiply_pairs(a, x);
        sums[1][r] += multiply_pairs(b, x);
      }
      settle(sums[0]);
      settle(sums[1]);
      keys += tile_keys;
      q += integer_rows;
    }
  }
}

// Sums of group g over n vectors of keys from key i on, to scores.
template <int n>
KV_INLINE void add_scores(
    const IntegerScoreJob& job,
    int row,
    int g,
    int i,
    const Ints sums[n][integer_rows]) {
  const TileView& k = *job.k;
  const float* scales = k.scales + g * tile_keys + i;
  const float* biases = k.biases + g * tile_keys + i;
#pragma GCC unroll 4
  for (int r = 0; r < integer_rows; ++r) {
    Floats step = splat(job.q_steps[row + r]);
    Floats q_sum = splat(job.q_sums[(row + r) * k.n_groups + g]);
    float* scores = job.scores + (row + r) * tile_keys + i;
#pragma GCC unroll 2
    for (int j = 0; j < n; ++j) {
      Floats x = q_sum * load<Floats>(biases + j * lanes);
      Floats scale = step * load<Floats>(scales + j * lanes);
      x += __builtin_convertvector(sums[j][r], Floats) * scale;
      if (g > 0) {
        x += load<Floats>(scores + j * lanes);
      }
      store(scores + j * lanes, x);
    }
  }
}

// Sixteen keys from key i on against four rows from row `row` on.
KV_INLINE void
score_block(const IntegerScoreJob& job, int i, int row, Fetch& fetch) {
  const TileView& k = *job.k;
  int n_pairs = k.group_size / 2;
  const int32_t* q = job.q + row * k.dim / 2;
  for (int g = 0; g < k.n_groups; ++g) {
    Ints sums[2][integer_rows] = {};
    multiply_group(
        job.keys + g * n_pairs * tile_keys + i,
        q + g * n_pairs * integer_rows,
        n_pairs,
        fetch,
        sums);
    add_scores<2>(job, row, g, i, sums);
  }
}

inline void score_integers(const IntegerScoreJob& job) {
  constexpr int keys = 2 * lanes;
  constexpr int n_blocks = tile_keys / keys;
  Fetch fetch(job.next_v, n_blocks * job.k->dim / 2 / step_pairs);
  Fetch none;
  for (int i = 0; i < job.k->n; i += keys) {
    fetch.part(i / keys, n_blocks);
    for (int row = 0; row < job.rows; row += integer_rows) {
      score_block(job, i, row, row == 0 ? fetch : none);
    }
  }
}

// Four rows read K's codes directly: shuffles run beside products, and no
// decoded key goes through memory.
template <typename Format>
void score_codes(const IntegerScoreJob& job) {
  const TileView& k = *job.k;
  int n_words = k.group_size / (2 * Format::word_pairs);
  Fetch fetch(job.next_v, tile_keys / lanes * k.n_groups * n_words / 4);
  for (int i = 0; i < k.n; i += lanes) {
    fetch.part(i / lanes, tile_keys / lanes);
    const int32_t* q = job.q;
    for (int g = 0; g < k.n_groups; ++g) {
      Ints sums[1][integer_rows] = {};
      for (int word = 0; word < n_words; word += 4) {
        fetch.step();
        Words words[4];
        transpose_words(k.rows + i, 4 * (g * n_words + word), words);
#pragma GCC unroll 4
        for (int j = 0; j < 4; ++j) {
#pragma GCC unroll 4
          for (int pair = 0; pair < Format::word_pairs; ++pair) {
            Shorts x = Format::pair(words[j], pair);
#pragma GCC unroll 4
            for (int r = 0; r < integer_rows; ++r) {
              sums[0][r] += multiply_pairs(x, load<Shorts>(q));
              q += lanes;
            }
            settle(sums[0]);
          }
        }
      }
      add_scores<1>(job, 0, g, i, sums);
    }
  }
}

struct IntegerValueJob {
  const TileView* v;
  // Pairs of keys [dim / 16, tile_pairs, 2, 16]; unused where codes are read.
  const int16_t* values;
  Ahead next_k;
  // A multiple of four.
  int rows;
  // Pairs of weights times scales [rows / 4, n_groups, 4, tile_pairs], what one
  // step of them is worth and sums of weights times biases [rows, n_groups].
  const int32_t* weights;
  const float* steps;
  const float* bias_sums;
  // [rows, dim] in the order of `integer_order`.
  float* acc;
};

// Two keys' integers side by side, for the low and the high lanes.
template <typename Format>
struct CodePairs {
  static KV_INLINE void load_pair(
      const IntegerValueJob& job,
      int block,
      int half,
      int pair,
      Shorts out[2]) {
    int64_t offset = int64_t(block) * Format::bytes;
    auto a = Format::values(job.v->rows[2 * pair] + offset, half);
    auto b = Format::values(job.v->rows[2 * pair + 1] + offset, half);
    __m256i x = cast<__m256i>(a);
    __m256i y = cast<__m256i>(b);
    out[0] = cast<Shorts>(_mm256_unpacklo_epi16(x, y));
    out[1] = cast<Shorts>(_mm256_unpackhi_epi16(x, y));
  }
};

struct DecodedPairs {
  static KV_INLINE void load_pair(
      const IntegerValueJob& job,
      int block,
      int half,
      int pair,
      Shorts out[2]) {
    auto panel =
        job.values + ((2 * block + half) * tile_pairs + pair) * wide_codes;
    out[0] = load<Shorts>(panel);
    out[1] = load<Shorts>(panel + 16);
  }
};

// Sixteen values of four rows from row `row` on.
template <typename Pairs>
KV_INLINE void add_integers(
    const IntegerValueJob& job,
    int block,
    int half,
    int row,
    Fetch& fetch) {
  const TileView& v = *job.v;
  int group = block * wide_codes / v.group_size;
  int n_pairs = (v.n + 1) / 2;
  const int32_t* weights =
      job.weights + (row * v.n_groups + group * integer_rows) * tile_pairs;
  Ints sums[2][integer_rows] = {};
  // Pairs behind the last one have weights of zero.
  for (int first = 0; first < n_pairs; first += step_pairs) {
    fetch.step();
#pragma GCC unroll 4
    for (int i = 0; i < step_pairs; ++i) {
      int pair = first + i;
      Shorts w[2];
      Pairs::load_pair(job, block, half, pair, w);
#pragma GCC unroll 4
      for (int r = 0; r < integer_rows; ++r) {
        Shorts p =
            cast<Shorts>(_mm256_set1_epi32(weights[r * tile_pairs + pair]));
        sums[0][r] += multiply_pairs(w[0], p);
        sums[1][r] += multiply_pairs(w[1], p);
      }
      settle(sums[0]);
      settle(sums[1]);
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < integer_rows; ++r) {
    int at = (row + r) * v.n_groups + group;
    Floats step = splat(job.steps[at]);
    Floats bias = splat(job.bias_sums[at]);
    float* acc = job.acc + (row + r) * v.dim + block * wide_codes + half * 16;
#pragma GCC unroll 2
    for (int high = 0; high < 2; ++high) {
      Floats x = load<Floats>(acc + high * lanes) + bias;
      x += __builtin_convertvector(sums[high][r], Floats) * step;
      store(acc + high * lanes, x);
    }
  }
}

template <typename Pairs>
void value_integers(const IntegerValueJob& job) {
  int n_halves = job.v->dim / 16;
  Fetch fetch(job.next_k, n_halves * tile_pairs / step_pairs);
  Fetch none;
  for (int i = 0; i < n_halves; ++i) {
    fetch.part(i, n_halves);
    for (int row = 0; row < job.rows; row += integer_rows) {
      add_integers<Pairs>(job, i / 2, i % 2, row, row == 0 ? fetch : none);
    }
  }
}

template <typename Format>
void decode_integer_values(const TileView& v, int16_t* out) {
  IntegerValueJob job{};
  job.v = &v;
  for (int block = 0; block < v.dim / wide_codes; ++block) {
    for (int half = 0; half < 2; ++half) {
      for (int pair = 0; pair < (v.n + 1) / 2; ++pair) {
        Shorts w[2];
        CodePairs<Format>::load_pair(job, block, half, pair, w);
        auto panel =
            out + ((2 * block + half) * tile_pairs + pair) * wide_codes;
        store(panel, w[0]);
        store(panel + 16, w[1]);
      }
    }
  }
}

// The value that stands at place `i` of a block of the accumulators.
template <typename Format>
constexpr int integer_order(int i) {
  int half = i / 16;
  int high = i / lanes % 2;
  int lane = i % lanes;
  return Format::position(half, lane % 4 + 8 * (lane / 4) + 4 * high);
}

using IntegerValueFn = void (*)(const IntegerValueJob&);

// Everything of a format that the integer kernels use.
struct IntegerKernels {
  bool supported;
  bool has_bias;
  float gain;
  float zero;
  float levels;
  int word_pairs;
  void (*score)(const IntegerScoreJob&);
  void (*decode_keys)(const TileView&, int32_t*);
  void (*decode_values)(const TileView&, int16_t*);
  IntegerValueFn value;
  int acc_order[wide_codes];
};

template <typename Codec>
constexpr IntegerKernels integer_kernels() {
  using Format = IntegerFormat<Codec>;
  IntegerKernels kernels{};
  if constexpr (Format::supported) {
    kernels.supported = true;
    kernels.has_bias = Codec::has_bias;
    kernels.gain = Format::gain;
    kernels.zero = Format::zero;
    kernels.levels = Format::levels;
    kernels.word_pairs = Format::word_pairs;
    kernels.score = score_codes<Format>;
    kernels.decode_keys = decode_integer_keys<Format>;
    kernels.decode_values = decode_integer_values<Format>;
    kernels.value = value_integers<CodePairs<Format>>;
    for (int i = 0; i < wide_codes; ++i) {
      kernels.acc_order[i] = integer_order<Format>(i);
    }
  }
  return kernels;
}

#define KV_INTEGER_KERNELS(name, mode, bits, codec) integer_kernels<codec>(),
constexpr IntegerKernels integer_formats[] = {
    FOR_EACH_KV_CODEC(KV_INTEGER_KERNELS)};
#undef KV_INTEGER_KERNELS

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
  float *rows, *float_keys, *q_steps, *q_sums, *scores, *steps, *bias_sums,
      *acc;
  int32_t *q, *wide_q, *keys, *weights;
  int16_t* values;
  float *k_scales, *k_biases, *v_scales, *v_biases, *k_table, *v_table;

  IntegerScratch(const CpuArgs& args, int n_rows, Arena& arena) {
    size_t n = tile_rows(n_rows);
    size_t k_groups = args.k.dim / args.k.group_size;
    size_t v_groups = args.v.dim / args.v.group_size;
    auto pairs = [&](size_t count) {
      return reinterpret_cast<int32_t*>(arena.take(count));
    };
    rows = arena.take(n * args.k.dim);
    float_keys = arena.take(tile_keys * args.k.dim);
    q_steps = arena.take(n);
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
    k_scales = arena.take(k_groups * tile_keys);
    k_biases = arena.take(k_groups * tile_keys);
    v_scales = arena.take(v_groups * tile_keys);
    v_biases = arena.take(v_groups * tile_keys);
    k_table = arena.take(table_size);
    v_table = arena.take(table_size);
  }
};

// A row of q to integers, paired as the codes of K are; pairs of four rows
// stand side by side. `rounded` gets the values that the integers stand for.
inline void round_query(
    const IntegerKernels& format,
    int dim,
    const float* row,
    float* step,
    int32_t* out,
    float* rounded) {
  Ints top = {};
  for (int d = 0; d < dim; d += lanes) {
    top = larger(top, magnitude_bits(load<Floats>(row + d)));
  }
  Step s = step_for(max_magnitude(top));
  *step = s.size;
  int n = format.word_pairs;
  for (int d = 0; d < dim; d += lanes) {
    Ints values = round_to_ints(load<Floats>(row + d) * splat(s.inverse));
    store(rounded + d, __builtin_convertvector(values, Floats) * splat(s.size));
    for (int i = 0; i < lanes / 2; ++i) {
      int first = i / n * 2 * n + i % n;
      *out =
          (values[first] & 0xffff) | int32_t(uint32_t(values[first + n]) << 16);
      out += integer_rows;
    }
  }
}

// The largest error of a score that rounding q may make: far below the bounds
// on a result, 1e-3 of it in float16 and 3e-3 in bfloat16.
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

// Rounding moves a value of q by a step / sqrt(12) on average. NaN is not
// close.
inline bool is_close(
    const CpuArgs& args,
    const IntegerKernels& format,
    const TileView& k,
    float largest_step) {
  float error = largest_step * estimate_key_norm(format, k) * 0.29f;
  return error <= largest_score_error(args.q.type);
}

inline float largest_of(int n, const float* steps) {
  float top = 0;
  for (int i = 0; i < n; ++i) {
    top = steps[i] <= top ? top : steps[i];
  }
  return top;
}

inline void round_queries(const CpuArgs& args, int rows, IntegerScratch& s) {
  int dim = args.k.dim;
  int n_groups = dim / args.k.group_size;
  auto& format = integer_formats[args.k.format];
  float* rounded = s.float_keys;
  for (int r = 0; r < rows; ++r) {
    int32_t* q =
        s.q + r / integer_rows * integer_rows * dim / 2 + r % integer_rows;
    round_query(format, dim, s.rows + r * dim, s.q_steps + r, q, rounded);
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
