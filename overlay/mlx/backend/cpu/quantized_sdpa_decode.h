// Sixteen codes at a time to floats, in order. Each fast path is tested
// against the codec's own decode over every code.

#pragma once

#include "mlx/backend/common/kv_codec.h"
#include "mlx/backend/cpu/quantized_sdpa_simd.h"

namespace {

namespace kv = mlx::core::kv;

constexpr int block_codes = 16;
constexpr int block_vectors = block_codes / lanes;

struct Block {
  Floats v[block_vectors];
};

template <typename Codec>
constexpr int block_bytes = Codec::bits * block_codes / 8;

// Four codes always lie in one 32-bit word of the block, eight where they are
// narrow: the byte where the word of quarter i starts and its first code's bit.
template <int bits>
struct Layout {
  static constexpr int quarters_a_word = 8 * bits <= 32 && lanes > 4 ? 2 : 1;
  static constexpr int last_word = bits > 2 ? 2 * bits - 4 : 0;

  static constexpr int byte(int quarter) {
    int first = quarter / quarters_a_word * quarters_a_word;
    int start = 4 * bits * first / 8;
    return start < last_word ? start : last_word;
  }
  static constexpr int shift(int code) {
    return bits * code - 8 * byte(code / 4);
  }
};

template <int bits>
struct Shifts {
  uint32_t values[block_codes];
  constexpr Shifts() : values() {
    for (int i = 0; i < block_codes; ++i) {
      values[i] = uint32_t(Layout<bits>::shift(i));
    }
  }
};

template <int bits>
constexpr Shifts<bits> shifts{};

template <int bits>
KV_INLINE uint32_t load_word(const uint8_t* p) {
  if constexpr (bits * block_codes < 32) {
    uint16_t word;
    memcpy(&word, p, 2);
    return word;
  } else {
    uint32_t word;
    memcpy(&word, p, 4);
    return word;
  }
}

// Codes of lanes [vector * lanes, ...) of a block.
template <int bits>
KV_INLINE Words unpack(const uint8_t* p, int vector) {
  if constexpr (bits % 8 == 0) {
    return widen_bytes(p + vector * lanes);
  } else {
    using L = Layout<bits>;
    constexpr int quarters = lanes / 4;
    constexpr int n_words = quarters / L::quarters_a_word;
    Words words;
    if constexpr (n_words <= 1) {
      words = splat(load_word<bits>(p + L::byte(vector * quarters)));
    } else {
      uint32_t parts[n_words];
      for (int i = 0; i < n_words; ++i) {
        int quarter = vector * quarters + i * L::quarters_a_word;
        parts[i] = load_word<bits>(p + L::byte(quarter));
      }
      words = spread<n_words>(parts);
    }
    auto shift = load<Words>(shifts<bits>.values + vector * lanes);
    return (words >> shift) & splat((1u << bits) - 1u);
  }
}

KV_INLINE Floats e8m0_to_floats(Words codes) {
  return cast<Floats>(codes == splat(0u) ? splat(0x400000u) : codes << 23);
}

KV_INLINE Block decode_e4m3(const uint8_t* p) {
  Block block;
#if defined(__AVX2__)
  // As halves: the same mantissa, an exponent that is 8 less.
  __m256i x = _mm256_cvtepu8_epi16(load<__m128i>(p));
  __m256i magnitude = _mm256_and_si256(x, _mm256_set1_epi16(0x7f));
  __m256i nan = _mm256_cmpeq_epi16(magnitude, _mm256_set1_epi16(0x7f));
  __m256i sign = _mm256_slli_epi16(_mm256_xor_si256(x, magnitude), 8);
  __m256i half = _mm256_or_si256(_mm256_slli_epi16(magnitude, 7), sign);
  half =
      _mm256_or_si256(half, _mm256_and_si256(nan, _mm256_set1_epi16(0x7e00)));
  uint16_t halves[block_codes];
  store(halves, half);
  for (int i = 0; i < block_vectors; ++i) {
    block.v[i] =
        half_to_floats(load<Halves>(halves + i * lanes)) * splat(256.0f);
  }
#else
  for (int i = 0; i < block_vectors; ++i) {
    for (int lane = 0; lane < lanes; ++lane) {
      block.v[i][lane] = kv::e4m3_to_float(p[i * lanes + lane]);
    }
  }
#endif
  return block;
}

template <typename Codec>
constexpr bool is_e2m1 = false;
template <>
constexpr bool is_e2m1<kv::Mxfp4> = true;
template <>
constexpr bool is_e2m1<kv::Nvfp4> = true;

template <typename Codec>
constexpr bool is_e4m3 = false;
template <>
constexpr bool is_e4m3<kv::Mxfp8> = true;

constexpr int table_size = 16;

// Values by code, for the codecs that are read through a table.
template <typename Codec>
void fill_table(const float* codebook, float table[table_size]) {
  for (int i = 0; i < table_size; ++i) {
    if constexpr (Codec::has_codebook) {
      table[i] = codebook[i & ((1 << Codec::bits) - 1)];
    } else if constexpr (is_e2m1<Codec>) {
      table[i] = Codec::decode(uint64_t(i), 0);
    }
  }
}

template <typename Codec>
KV_INLINE Block decode_block(const uint8_t* p, const float* table) {
  if constexpr (is_e4m3<Codec>) {
    return decode_e4m3(p);
  } else {
    Block block;
    for (int i = 0; i < block_vectors; ++i) {
      Words codes = unpack<Codec::bits>(p, i);
      if constexpr (Codec::has_codebook || is_e2m1<Codec>) {
        block.v[i] = lookup<Codec::bits>(table, codes);
      } else {
        block.v[i] = to_floats(codes);
      }
    }
    return block;
  }
}

KV_INLINE void scale_block(Block& w, float scale, float bias) {
  for (int j = 0; j < block_vectors; ++j) {
    w.v[j] = w.v[j] * splat(scale) + splat(bias);
  }
}

} // namespace
