// Vectors of one instruction set, chosen by the flags of the file that
// includes this. Arithmetic is the compiler's own; only what its vector
// extension cannot say is written with intrinsics.

#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX2__)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

#define KV_INLINE inline __attribute__((always_inline))

namespace {

#if defined(__AVX512F__)
constexpr int lanes = 16;
#elif defined(__AVX2__)
constexpr int lanes = 8;
#else
constexpr int lanes = 4;
#endif

typedef float Floats __attribute__((vector_size(lanes * 4)));
typedef int32_t Ints __attribute__((vector_size(lanes * 4)));
typedef uint32_t Words __attribute__((vector_size(lanes * 4)));
typedef uint16_t Halves __attribute__((vector_size(lanes * 2)));
typedef uint8_t Bytes __attribute__((vector_size(lanes)));

template <typename V>
KV_INLINE V load(const void* p) {
  V v;
  memcpy(&v, p, sizeof(V));
  return v;
}

template <typename V>
KV_INLINE void store(void* p, V v) {
  memcpy(p, &v, sizeof(V));
}

template <typename To, typename From>
KV_INLINE To cast(From v) {
  static_assert(sizeof(To) == sizeof(From), "cast keeps the size");
  To to;
  memcpy(&to, &v, sizeof(To));
  return to;
}

KV_INLINE Floats splat(float x) {
  return x - Floats{};
}

KV_INLINE Words splat(uint32_t x) {
  return x - Words{};
}

KV_INLINE Floats to_floats(Words v) {
  // Codes are below 2**31, and only the signed conversion is one instruction.
  return __builtin_convertvector(cast<Ints>(v), Floats);
}

// GCC 12 widens vectors of bytes one lane at a time.
KV_INLINE Words widen_bytes(const uint8_t* p) {
#if defined(__AVX512F__)
  return cast<Words>(_mm512_cvtepu8_epi32(load<__m128i>(p)));
#elif defined(__AVX2__)
  return cast<Words>(_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)p)));
#else
  return __builtin_convertvector(load<Bytes>(p), Words);
#endif
}

KV_INLINE Words widen_halves(Halves h) {
#if defined(__AVX512F__)
  return cast<Words>(_mm512_cvtepu16_epi32(cast<__m256i>(h)));
#elif defined(__AVX2__)
  return cast<Words>(_mm256_cvtepu16_epi32(cast<__m128i>(h)));
#else
  return __builtin_convertvector(h, Words);
#endif
}

// b where either is NaN.
KV_INLINE Floats maximum(Floats a, Floats b) {
#if defined(__AVX512F__)
  return _mm512_max_ps(a, b);
#elif defined(__AVX2__)
  return _mm256_max_ps(a, b);
#else
  return a > b ? a : b;
#endif
}

// Folds a vector to its lower half until one value is left.
template <typename F>
KV_INLINE float reduce(Floats v, F fold) {
#if defined(__AVX2__)
#if defined(__AVX512F__)
  __m256 low = _mm512_castps512_ps256(v);
  __m256 x = fold(low, _mm512_extractf32x8_ps(v, 1));
#else
  __m256 x = v;
#endif
  __m128 y = fold(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  y = fold(y, _mm_movehl_ps(y, y));
  y = fold(y, _mm_movehdup_ps(y));
  return y[0];
#else
  float x = v[0];
  for (int i = 1; i < lanes; ++i) {
    x = fold(x, v[i]);
  }
  return x;
#endif
}

// Without NaN: `maximum` has dropped it.
KV_INLINE float reduce_max(Floats v) {
  return reduce(v, [](auto a, auto b) { return a > b ? a : b; });
}

KV_INLINE float reduce_sum(Floats v) {
  return reduce(v, [](auto a, auto b) { return a + b; });
}

// Keeps a value in a register that the compiler would load again at each use.
KV_INLINE void keep(Floats& v) {
#if defined(__AVX2__)
  asm("" : "+x"(v));
#else
  (void)v;
#endif
}

// a0 b0 a1 b1 ... from `in` to a0 a1 ... and b0 b1 ...
KV_INLINE void deinterleave(const float* in, float* a, float* b) {
#if defined(__AVX2__) && !defined(__AVX512F__)
  Floats x = load<Floats>(in);
  Floats y = load<Floats>(in + lanes);
  auto order = [](Floats v) {
    return cast<Floats>(_mm256_permute4x64_pd(cast<__m256d>(v), 0xd8));
  };
  store(a, order(_mm256_shuffle_ps(x, y, 0x88)));
  store(b, order(_mm256_shuffle_ps(x, y, 0xdd)));
#else
  for (int i = 0; i < lanes; ++i) {
    a[i] = in[2 * i];
    b[i] = in[2 * i + 1];
  }
#endif
}

// Sums of neighbours inside each quarter of four lanes, of a then b.
KV_INLINE Floats add_pairs(Floats a, Floats b) {
#if defined(__AVX512F__)
  return _mm512_add_ps(
      _mm512_shuffle_ps(a, b, 0x88), _mm512_shuffle_ps(a, b, 0xdd));
#elif defined(__AVX2__)
  return _mm256_hadd_ps(a, b);
#elif defined(__clang__) || __GNUC__ >= 12
  return __builtin_shufflevector(a, b, 0, 2, 4, 6) +
      __builtin_shufflevector(a, b, 1, 3, 5, 7);
#else
  return Floats{a[0] + a[1], a[2] + a[3], b[0] + b[1], b[2] + b[3]};
#endif
}

// Lane i of the result is the sum of the lanes of v[i].
KV_INLINE Floats reduce_each(const Floats v[lanes]) {
  Floats quads[lanes / 4];
  for (int i = 0; i < lanes / 4; ++i) {
    quads[i] = add_pairs(
        add_pairs(v[4 * i], v[4 * i + 1]),
        add_pairs(v[4 * i + 2], v[4 * i + 3]));
  }
#if defined(__AVX512F__)
  auto low = _mm512_shuffle_f32x4(quads[0], quads[1], 0x88) +
      _mm512_shuffle_f32x4(quads[0], quads[1], 0xdd);
  auto high = _mm512_shuffle_f32x4(quads[2], quads[3], 0x88) +
      _mm512_shuffle_f32x4(quads[2], quads[3], 0xdd);
  return _mm512_shuffle_f32x4(low, high, 0x88) +
      _mm512_shuffle_f32x4(low, high, 0xdd);
#elif defined(__AVX2__)
  return _mm256_permute2f128_ps(quads[0], quads[1], 0x20) +
      _mm256_permute2f128_ps(quads[0], quads[1], 0x31);
#else
  return quads[0];
#endif
}

#if !defined(__AVX2__) || defined(__AVX512F__)
// a0 b0 a1 b1 ...
KV_INLINE void interleave(Floats a, Floats b, Floats out[2]) {
#if defined(__AVX512F__)
  const __m512i low =
      _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
  const __m512i high = _mm512_add_epi32(low, _mm512_set1_epi32(8));
  out[0] = _mm512_permutex2var_ps(a, low, b);
  out[1] = _mm512_permutex2var_ps(a, high, b);
#else
  out[0] = Floats{a[0], b[0], a[1], b[1]};
  out[1] = Floats{a[2], b[2], a[3], b[3]};
#endif
}
#endif

// Lane i of v[j] goes to lane j of v[i].
KV_INLINE void transpose(Floats v[lanes]) {
  Floats w[lanes];
#if defined(__AVX2__) && !defined(__AVX512F__)
  for (int i = 0; i < lanes; i += 4) {
    for (int j = 0; j < 2; ++j) {
      w[i + j] = _mm256_unpacklo_ps(v[i + j], v[i + j + 2]);
      w[i + j + 2] = _mm256_unpackhi_ps(v[i + j], v[i + j + 2]);
    }
    for (int j = 0; j < 2; ++j) {
      v[i + 2 * j] = _mm256_unpacklo_ps(w[i + 2 * j], w[i + 2 * j + 1]);
      v[i + 2 * j + 1] = _mm256_unpackhi_ps(w[i + 2 * j], w[i + 2 * j + 1]);
    }
  }
  for (int i = 0; i < 4; ++i) {
    w[i] = _mm256_permute2f128_ps(v[i], v[i + 4], 0x20);
    w[i + 4] = _mm256_permute2f128_ps(v[i], v[i + 4], 0x31);
  }
  memcpy(v, w, sizeof(w));
#else
  // Four lanes take two rounds of interleaving the halves, sixteen take four.
  for (int n = 1; n < lanes; n *= 4) {
    for (int i = 0; i < lanes / 2; ++i) {
      interleave(v[i], v[i + lanes / 2], w + 2 * i);
    }
    for (int i = 0; i < lanes / 2; ++i) {
      interleave(w[i], w[i + lanes / 2], v + 2 * i);
    }
  }
#endif
}

// e^x for x <= 0, to 2 ulp; zero below the normal floats, NaN stays.
KV_INLINE Floats exp_negative(Floats x) {
  const Floats floor = splat(-87.3f);
  const Floats magic = splat(12582912.0f);
  Floats clamped = x < floor ? floor : x;
  // Adding 1.5 * 2**23 rounds to an integer in the low bits.
  Floats shifted = clamped * splat(1.44269504f) + magic;
  Floats n = shifted - magic;
  Floats r = clamped - n * splat(0.693359375f);
  r = r - n * splat(-2.12194440e-4f);
  Floats p = splat(1.0f / 5040);
  p = p * r + splat(1.0f / 720);
  p = p * r + splat(1.0f / 120);
  p = p * r + splat(1.0f / 24);
  p = p * r + splat(1.0f / 6);
  p = p * r + splat(0.5f);
  p = p * r + splat(1.0f);
  p = p * r + splat(1.0f);
  Floats power = cast<Floats>((cast<Words>(shifted) + splat(127u)) << 23);
  return x < floor ? splat(0.0f) : p * power;
}

// The low (first) and high part of a vector hold one word each, or a quarter
// each where `parts` is 4.
template <int parts>
KV_INLINE Words spread(const uint32_t* words) {
#if defined(__AVX512F__)
  auto pair = [](uint32_t a, uint32_t b) {
    return _mm256_inserti128_si256(_mm256_set1_epi32(a), _mm_set1_epi32(b), 1);
  };
  auto low =
      parts == 4 ? pair(words[0], words[1]) : _mm256_set1_epi32(words[0]);
  auto high =
      parts == 4 ? pair(words[2], words[3]) : _mm256_set1_epi32(words[1]);
  return cast<Words>(_mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1));
#elif defined(__AVX2__)
  static_assert(parts == 2, "eight lanes hold two quarters");
  return cast<Words>(_mm256_inserti128_si256(
      _mm256_set1_epi32(words[0]), _mm_set1_epi32(words[1]), 1));
#else
  return splat(words[0]);
#endif
}

// table[i] for each lane of i, below 2**bits; the table has 16 entries.
template <int bits>
KV_INLINE Floats lookup(const float* table, Words i) {
  static_assert(bits <= 4, "tables have 16 entries");
#if defined(__AVX512F__)
  return _mm512_permutexvar_ps(cast<__m512i>(i), load<Floats>(table));
#elif defined(__AVX2__)
  Floats low = _mm256_permutevar8x32_ps(load<Floats>(table), cast<__m256i>(i));
  if constexpr (bits <= 3) {
    return low;
  }
  Floats high =
      _mm256_permutevar8x32_ps(load<Floats>(table + 8), cast<__m256i>(i));
  return _mm256_blendv_ps(low, high, cast<__m256>(i << 28));
#else
  Floats values;
  for (int lane = 0; lane < lanes; ++lane) {
    values[lane] = table[i[lane]];
  }
  return values;
#endif
}

KV_INLINE float half_to_float(uint16_t h) {
  uint32_t magnitude = h & 0x7fff;
  uint32_t sign = uint32_t(h & 0x8000) << 16;
  if (magnitude < 0x400) {
    float x = float(magnitude) * 5.9604644775390625e-8f;
    return cast<float>(cast<uint32_t>(x) | sign);
  }
  uint32_t bias = magnitude >= 0x7c00 ? 224u << 23 : 112u << 23;
  return cast<float>(((magnitude << 13) + bias) | sign);
}

KV_INLINE Floats half_to_floats(Halves h) {
#if defined(__AVX512F__)
  return _mm512_cvtph_ps(cast<__m256i>(h));
#elif defined(__AVX2__)
  return _mm256_cvtph_ps(cast<__m128i>(h));
#elif defined(__ARM_NEON)
  return cast<Floats>(vcvt_f32_f16(cast<float16x4_t>(h)));
#else
  Floats f;
  for (int i = 0; i < lanes; ++i) {
    f[i] = half_to_float(h[i]);
  }
  return f;
#endif
}

// Round to nearest even.
KV_INLINE uint16_t float_to_half(float x) {
  uint32_t bits = cast<uint32_t>(x);
  uint32_t sign = (bits >> 16) & 0x8000;
  uint32_t magnitude = bits & 0x7fffffff;
  if (magnitude > 0x7f800000) {
    return uint16_t(sign | 0x7e00);
  }
  if (magnitude >= 0x477ff000) {
    return uint16_t(sign | 0x7c00);
  }
  if (magnitude < 0x38800000) {
    // The sum rounds at the weight of the smallest half.
    float shifted = cast<float>(magnitude) + 0.5f;
    return uint16_t(sign | (cast<uint32_t>(shifted) - 0x3f000000));
  }
  uint32_t odd = (magnitude >> 13) & 1;
  return uint16_t(sign | ((magnitude - 0x38000000 + 0xfff + odd) >> 13));
}

KV_INLINE Halves floats_to_half(Floats f) {
#if defined(__AVX512F__)
  return cast<Halves>(_mm512_cvtps_ph(f, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__AVX2__)
  return cast<Halves>(_mm256_cvtps_ph(f, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__ARM_NEON)
  return cast<Halves>(vcvt_f16_f32(cast<float32x4_t>(f)));
#else
  Halves h;
  for (int i = 0; i < lanes; ++i) {
    h[i] = float_to_half(f[i]);
  }
  return h;
#endif
}

KV_INLINE float bfloat_to_float(uint16_t b) {
  return cast<float>(uint32_t(b) << 16);
}

KV_INLINE uint16_t float_to_bfloat(float x) {
  uint32_t bits = cast<uint32_t>(x);
  if ((bits & 0x7fffffff) > 0x7f800000) {
    return uint16_t((bits >> 16) | 0x40);
  }
  return uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

KV_INLINE void prefetch(const void* p, int bytes) {
  for (int i = 0; i < bytes; i += 64) {
    __builtin_prefetch(static_cast<const char*>(p) + i);
  }
}

} // namespace
