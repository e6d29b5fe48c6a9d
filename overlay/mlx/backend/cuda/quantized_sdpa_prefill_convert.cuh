// Packed codes to pairs of float16 for tensor cores, 32 codes of a row at once.
// What has no fast way here goes through the codec's own decode.

#pragma once

#include "mlx/backend/common/kv_codec.h"
#include "mlx/backend/cuda/quantized_sdpa_prefill_layout.h"
#include "mlx/backend/cuda/quantized_sdpa_small_floats.cuh"

namespace mlx::core::quantized_sdpa::prefill {

// Two codes that start at the same bit of a byte fill the halves of a register
// by one byte permutation. A code may start up to bit 10 - bits of its half:
// the half is then a subnormal float16 whose value is the code times a power
// of two, and one multiply-add applies scale and bias.
template <int bits>
struct CodePairs {
  static constexpr int distance =
      16 % bits == 0 ? 16 / bits : kv::pack_codes(bits);

  static KV_FN constexpr int first(int pair) {
    return pair / distance * 2 * distance + pair % distance;
  }
  static KV_FN constexpr int source(int position) {
    return first(position / 2) + (position % 2) * distance;
  }
  static KV_FN constexpr int start_bit(int pair) {
    return first(pair) * bits % 8;
  }
  static KV_FN constexpr bool must_shift(int pair) {
    return start_bit(pair) + bits > 10;
  }
  // Bits that a code lies above the lowest of its half, once extracted.
  static KV_FN constexpr int offset(int pair) {
    return must_shift(pair) ? 0 : start_bit(pair);
  }
};

// The two bytes from `byte` on in the low half of the result.
template <int bits>
KV_DEVICE uint32_t two_bytes(const uint32_t (&words)[bits], int byte) {
  int word = byte / 4;
  int at = byte % 4;
  uint32_t next = word + 1 < bits ? words[word + 1] : 0;
  return at == 0 ? words[word]
                 : __byte_perm(words[word], next, at | (at + 1) << 4);
}

template <int bits>
KV_DEVICE uint32_t code_pair(const uint32_t (&words)[bits], int pair) {
  using Pairs = CodePairs<bits>;
  int start = Pairs::start_bit(pair);
  int byte = Pairs::first(pair) * bits / 8;
  int other = byte + Pairs::distance * bits / 8;
  uint32_t mask = (1u << bits) - 1;
  bool whole_bytes = start + bits <= 8;
  uint32_t x;
  if (whole_bytes && byte / 4 == other / 4) {
    // 4 selects a byte of zero.
    uint32_t bytes = uint32_t(byte % 4 | 4 << 4 | (other % 4) << 8 | 4 << 12);
    x = byte % 4 == 0 && other % 4 == 2
        ? words[byte / 4]
        : __byte_perm(words[byte / 4], 0, bytes);
  } else if (whole_bytes) {
    uint32_t bytes = uint32_t(byte % 4 | (4 + other % 4) << 8);
    x = __byte_perm(words[byte / 4], words[other / 4], bytes);
  } else {
    x = __byte_perm(
        two_bytes<bits>(words, byte), two_bytes<bits>(words, other), 0x5410);
  }
  if (Pairs::must_shift(pair)) {
    x >>= start;
  }
  return x & (mask | mask << 16) << Pairs::offset(pair);
}

// A pair of float16 2 ** -n.
KV_DEVICE constexpr uint32_t f16x2_power(int n) {
  return uint32_t(15 - n) << 10 | uint32_t(15 - n) << 26;
}

// For each codec:
//   unit_log2       convert takes scales times 2 ** unit_log2
//   largest         the greatest magnitude of a decoded code
//   source(i)       which of the 32 codes stands at position i of the result
//   convert(words, scale, bias, table, out)
// with one scale for the 32 codes, or one for each 16. `table` is the shared
// address of what fill_table made.
template <typename Codec>
struct F16Convert;

template <typename Codec>
constexpr int scales_per_unit =
    Codec::group_size > 0 && Codec::group_size < unit_codes
    ? unit_codes / Codec::group_size
    : 1;

template <int bits>
struct F16Convert<kv::Affine<bits>> {
  using Pairs = CodePairs<bits>;
  static constexpr int unit_log2 = 24;
  static constexpr float largest = float((1 << bits) - 1);

  static KV_FN constexpr int source(int position) {
    return Pairs::source(position);
  }

  static KV_DEVICE void convert(
      const uint32_t (&words)[bits],
      const uint32_t (&scale)[1],
      uint32_t bias,
      uint32_t,
      uint32_t (&out)[unit_codes / 2]) {
#pragma unroll
    for (int p = 0; p < unit_codes / 2; ++p) {
      int offset = Pairs::offset(p);
      uint32_t step =
          offset ? multiply_f16x2(scale[0], f16x2_power(offset)) : scale[0];
      out[p] = fma_f16x2(code_pair<bits>(words, p), step, bias);
    }
  }
};

template <typename Codec>
struct ConvertE2m1 {
  static constexpr int unit_log2 = 14;
  static constexpr float largest = 6;
  static constexpr int n_scales = scales_per_unit<Codec>;

  static KV_FN constexpr int source(int position) {
    return CodePairs<Codec::bits>::source(position);
  }

  static KV_DEVICE void convert(
      const uint32_t (&words)[Codec::bits],
      const uint32_t (&scale)[n_scales],
      uint32_t,
      uint32_t,
      uint32_t (&out)[unit_codes / 2]) {
#pragma unroll
    for (int p = 0; p < unit_codes / 2; ++p) {
      out[p] = multiply_f16x2(
          e2m1_to_f16x2(words[p / 4], p % 4), scale[p * n_scales / 16]);
    }
  }
};

template <>
struct F16Convert<kv::Mxfp4> : ConvertE2m1<kv::Mxfp4> {};
template <>
struct F16Convert<kv::Nvfp4> : ConvertE2m1<kv::Nvfp4> {};

template <>
struct F16Convert<kv::Mxfp8> {
  static constexpr int unit_log2 = 0;
  static constexpr float largest = 448;

  static KV_FN constexpr int source(int position) {
    return position;
  }

  static KV_DEVICE void convert(
      const uint32_t (&words)[kv::Mxfp8::bits],
      const uint32_t (&scale)[1],
      uint32_t,
      uint32_t,
      uint32_t (&out)[unit_codes / 2]) {
#pragma unroll
    for (int p = 0; p < unit_codes / 2; ++p) {
      uint32_t codes = words[p / 2] >> (16 * (p % 2));
      out[p] = multiply_f16x2(e4m3_to_f16x2(codes), scale[0]);
    }
  }
};

// Codebooks: shared memory holds the values of every pair of codes, divided by
// a power of two so that none exceeds 1; scales are multiplied by it instead.
template <int bits>
struct F16Convert<kv::Turbo<bits>> {
  static constexpr int unit_log2 = 0;
  static constexpr float largest = 1;

  static KV_FN constexpr int source(int position) {
    return position;
  }

  static KV_DEVICE uint32_t
  code_field(const uint32_t (&words)[bits], int pair) {
    int bit = 2 * bits * pair;
    int word = bit / 32;
    uint32_t next = word + 1 < bits ? words[word + 1] : 0;
    uint32_t x = bit % 32 + 2 * bits <= 32
        ? words[word] >> (bit % 32)
        : __funnelshift_r(words[word], next, bit % 32);
    return x & ((1u << 2 * bits) - 1);
  }

  static KV_DEVICE void convert(
      const uint32_t (&words)[bits],
      const uint32_t (&scale)[1],
      uint32_t,
      uint32_t table,
      uint32_t (&out)[unit_codes / 2]) {
#pragma unroll
    for (int p = 0; p < unit_codes / 2; ++p) {
      uint32_t values = load_shared(table + 4 * code_field(words, p));
      out[p] = multiply_f16x2(values, scale[0]);
    }
  }
};

// Fills the table by all threads of the block; the result is the power of two
// that the scales take. The caller synchronizes.
template <typename Codec>
KV_DEVICE float fill_table(
    uint32_t table,
    const CudaVector<float>& codebook,
    int thread,
    int n_threads) {
  if constexpr (Codec::has_codebook) {
    float top = 0;
    for (int i = 0; i < 1 << Codec::bits; ++i) {
      top = fmaxf(top, fabsf(codebook.data[i * codebook.stride]));
    }
    int exponent = exponent_of(top) + 1;
    exponent = exponent < -100 ? -100 : exponent > 126 ? 126 : exponent;
    float unit = power_of_two(-exponent);
    for (int i = thread; i < 1 << 2 * Codec::bits; i += n_threads) {
      float low =
          codebook.data[(i & ((1 << Codec::bits) - 1)) * codebook.stride];
      float high = codebook.data[(i >> Codec::bits) * codebook.stride];
      store_shared(table + 4 * i, pack_f16(low * unit, high * unit));
    }
    return power_of_two(exponent);
  }
  return 1.0f;
}

// Code i of 32 as a float, by the codec itself.
template <typename Codec>
KV_DEVICE float decode_one(const uint32_t (&words)[Codec::bits], int i) {
  constexpr int codes = kv::pack_codes(Codec::bits);
  int bit = i / codes * kv::pack_bytes(Codec::bits) * 8;
  int word = bit / 32;
  uint64_t low = words[word];
  uint64_t high = word + 1 < Codec::bits ? words[word + 1] : 0;
  return Codec::decode((low | high << 32) >> (bit % 32), i % codes);
}

} // namespace mlx::core::quantized_sdpa::prefill
