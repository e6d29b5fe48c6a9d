// Half-precision q against formats of small whole numbers: q and the weights
// are rounded to 15 bits and a sign (quantized_sdpa_integer_round.h), codes
// stay integers, and products of pairs add up exactly in 32 bits. The rounding
// is 1e-4 of a result, below that of a half. Rows come in fours.

#pragma once

#include "mlx/backend/cpu/quantized_sdpa_fetch.h"
#include "mlx/backend/cpu/quantized_sdpa_integer_formats.h"

namespace {

#if defined(__AVX2__) && !defined(__AVX512F__)

constexpr int integer_rows = 4;
constexpr int tile_pairs = tile_keys / 2;

// Sums of four rows are up to date here: in an unrolled loop GCC would put them
// off until their products fill the registers.
KV_INLINE void settle(Ints sums[integer_rows]) {
  asm("" : "+x"(sums[0]), "+x"(sums[1]), "+x"(sums[2]), "+x"(sums[3]));
}

KV_INLINE Ints multiply_pairs(Shorts a, Shorts b) {
  return cast<Ints>(_mm256_madd_epi16(cast<__m256i>(a), cast<__m256i>(b)));
}

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

#endif

} // namespace
