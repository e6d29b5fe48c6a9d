// Formats whose values are small whole numbers times a scale: codes as shorts,
// and what one of them is worth.

#pragma once

#include "mlx/backend/cpu/quantized_sdpa_decode.h"

namespace {

// value = gain * scale * (integer - zero) + bias, integers up to `levels`.
template <typename Codec>
struct IntegerFormat {
  static constexpr bool supported = false;
};

#if defined(__AVX2__) && !defined(__AVX512F__)

typedef int16_t Shorts __attribute__((vector_size(32)));

// V is read in blocks of this many codes.
constexpr int wide_codes = 32;

// A format also brings
//   word_pairs    pairs of codes in a 32-bit word
//   pair(w, i)    of eight words: codes i and i + word_pairs as two shorts
//   bytes         of a block of thirty-two codes
//   values(p, h)  half h of such a block of one row
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

#endif

} // namespace
