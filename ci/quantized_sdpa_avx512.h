// The AVX-512 instructions of the CPU kernels in C++, for machines without
// them: included before a file that is compiled for AVX2.

#pragma once

#include <immintrin.h>
#include <math.h>

#include <cstdint>
#include <cstring>

namespace avx512 {

typedef float Floats __attribute__((vector_size(64)));
typedef int Ints __attribute__((vector_size(64)));

// The first bytes of both, the rest zeros.
template <typename To, typename From>
To cast(const From& from, int at = 0) {
  To to{};
  auto bytes = reinterpret_cast<const char*>(&from) + at;
  size_t left = sizeof(From) - at;
  memcpy(&to, bytes, sizeof(To) < left ? sizeof(To) : left);
  return to;
}

template <typename To, typename Value>
To from_each(Value value) {
  To to;
  for (int i = 0; i < 16; ++i) {
    to[i] = value(i);
  }
  return to;
}

template <typename Code, typename From>
__m512i widen(From from) {
  Code codes[16];
  memcpy(codes, &from, sizeof(codes));
  return cast<__m512i>(from_each<Ints>([&](int i) { return codes[i]; }));
}

inline __m512 max(__m512 a, __m512 b) {
  return from_each<Floats>([&](int i) { return a[i] > b[i] ? a[i] : b[i]; });
}

inline __m512 permute(__m512 a, __m512i index, __m512 b) {
  Ints from = cast<Ints>(index);
  return from_each<Floats>(
      [&](int i) { return from[i] & 16 ? b[from[i] & 15] : a[from[i] & 15]; });
}

// Two bits of `control` for each of four places in a row.
inline int chosen(int control, int place) {
  return control >> 2 * place & 3;
}

// Whole quarters: two of a, two of b.
inline __m512 shuffle_quarters(__m512 a, __m512 b, int control) {
  return from_each<Floats>([&](int i) {
    int from = 4 * chosen(control, i / 4) + i % 4;
    return i < 8 ? a[from] : b[from];
  });
}

// Within each quarter: two of a, two of b.
inline __m512 shuffle(__m512 a, __m512 b, int control) {
  return from_each<Floats>([&](int i) {
    int from = i / 4 * 4 + chosen(control, i % 4);
    return i % 4 < 2 ? a[from] : b[from];
  });
}

inline __m512 from_halves(__m256i x) {
  __m256 parts[] = {
      _mm256_cvtph_ps(cast<__m128i>(x)), _mm256_cvtph_ps(cast<__m128i>(x, 16))};
  return cast<__m512>(parts);
}

template <int rounding>
__m256i to_halves(__m512 x) {
  __m128i parts[] = {
      _mm256_cvtps_ph(cast<__m256>(x), rounding),
      _mm256_cvtps_ph(cast<__m256>(x, 32), rounding)};
  return cast<__m256i>(parts);
}

inline __m512i insert(__m512i x, __m256i part, int at) {
  memcpy(reinterpret_cast<char*>(&x) + 32 * at, &part, 32);
  return x;
}

template <typename... Values>
__m512i list(Values... values) {
  return cast<__m512i>(Ints{values...});
}

} // namespace avx512

#undef _mm512_cvtps_ph
#undef _mm512_extractf32x8_ps
#undef _mm512_inserti64x4
#undef _mm512_setr_epi32
#undef _mm512_shuffle_f32x4
#undef _mm512_shuffle_ps

#define _mm512_add_epi32(a, b) \
  avx512::cast<__m512i>(       \
      avx512::cast<avx512::Ints>(a) + avx512::cast<avx512::Ints>(b))
#define _mm512_add_ps(a, b) ((a) + (b))
#define _mm512_castps512_ps256(x) avx512::cast<__m256>(x)
#define _mm512_castsi256_si512(x) avx512::cast<__m512i>(x)
#define _mm512_cvtepu16_epi32(x) avx512::widen<uint16_t>(x)
#define _mm512_cvtepu8_epi32(x) avx512::widen<uint8_t>(x)
#define _mm512_cvtph_ps(x) avx512::from_halves(x)
#define _mm512_cvtps_ph(x, rounding) avx512::to_halves<rounding>(x)
#define _mm512_extractf32x8_ps(x, i) avx512::cast<__m256>(x, 32 * (i))
#define _mm512_inserti64x4(x, part, i) avx512::insert(x, part, i)
#define _mm512_max_ps(a, b) avx512::max(a, b)
#define _mm512_permutex2var_ps(a, i, b) avx512::permute(a, i, b)
#define _mm512_permutexvar_ps(i, a) avx512::permute(a, i, a)
#define _mm512_set1_epi32(x) avx512::cast<__m512i>((x) + avx512::Ints{})
#define _mm512_setr_epi32(...) avx512::list(__VA_ARGS__)
#define _mm512_shuffle_f32x4(a, b, i) avx512::shuffle_quarters(a, b, i)
#define _mm512_shuffle_ps(a, b, i) avx512::shuffle(a, b, i)

// The kernels' own use of registers, none of which is that wide.
#define asm(...) static_cast<void>(0)
#define __AVX512F__ 1
