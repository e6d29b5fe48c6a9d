// Codes to pairs of float16, the operands of the matrix instructions.
//
// A word of packed codes is taken as two halves of 16 bits, each with the same
// number of whole codes at the same places. pair(x, i) gives code i of both.
// The result is the decoded value divided by unit and times step(i), exactly.

#pragma once

#include "mlx/backend/common/kv_codec.h"
#include "mlx/backend/cuda/quantized_sdpa_small_floats.cuh"

namespace mlx::core::quantized_sdpa {

// Whole codes in 16 bits, a power of two of them.
constexpr int codes_in_half(int bits) {
  int n = 1;
  while (2 * n * bits <= 16) {
    n *= 2;
  }
  return n;
}

// Bits below this place of a half are the significand: a code there reads as
// a subnormal number.
constexpr int half_significand = 10;

// A code as an integer.
template <typename Codec>
struct Convert {
  static constexpr int bits = Codec::bits;
  static constexpr int codes = codes_in_half(bits);
  // Pairs are of neighbours instead of halves of a word.
  static constexpr bool of_neighbours = false;
  // Scales are as exact in float16 and multiply the values.
  static constexpr bool scales_values = false;
  static constexpr float unit = 16777216.0f;

  static constexpr int shift(int i) {
    int place = i * bits;
    return place + bits <= half_significand ? 0 : place < 8 ? place : 8;
  }
  static constexpr float step(int i) {
    return float(1 << (i * bits - shift(i)));
  }

  static KV_DEVICE uint32_t pair(uint32_t x, int i, uint32_t /* table */) {
    uint32_t mask = ((1u << bits) - 1) << (i * bits - shift(i));
    return (x >> shift(i)) & (mask * 0x10001u);
  }
};

struct ConvertE2m1 {
  static constexpr int codes = 4;
  static constexpr bool of_neighbours = false;
  static constexpr float unit = 16384.0f;

  static constexpr float step(int) {
    return 1.0f;
  }

  static KV_DEVICE uint32_t pair(uint32_t x, int i, uint32_t /* table */) {
    return e2m1_to_f16x2(x, i);
  }
};

template <>
struct Convert<kv::Mxfp4> : ConvertE2m1 {
  static constexpr bool scales_values = false;
};

template <>
struct Convert<kv::Nvfp4> : ConvertE2m1 {
  static constexpr bool scales_values = true;
};

template <>
struct Convert<kv::Mxfp8> {
  static constexpr int codes = 2;
  static constexpr bool of_neighbours = true;
  static constexpr bool scales_values = false;
  static constexpr float unit = 1.0f;

  static constexpr float step(int) {
    return 1.0f;
  }

  static KV_DEVICE uint32_t pair(uint32_t x, int i, uint32_t /* table */) {
    return e4m3_to_f16x2(x >> (16 * i));
  }
};

// Two codes are the index into a table of pairs, of which each lane has its
// own copy; `table` is the address of the lane's.
template <int bits_>
struct Convert<kv::Turbo<bits_>> {
  static constexpr int bits = bits_;
  static constexpr int codes = codes_in_half(bits);
  static constexpr bool of_neighbours = false;
  static constexpr bool scales_values = false;
  static constexpr float unit = 1.0f;

  static constexpr float step(int) {
    return 1.0f;
  }

  // log2 of the distance of a lane's entries.
  static constexpr int spread = 7;
  static constexpr uint32_t low_mask = ((1u << bits) - 1) << spread;

  static KV_DEVICE uint32_t move(uint32_t x, int from, int to) {
    return from > to ? x >> (from - to) : x << (to - from);
  }

  static KV_DEVICE uint32_t pair(uint32_t x, int i, uint32_t table) {
    uint32_t low = move(x, i * bits, spread) & low_mask;
    uint32_t high = move(x, 16 + i * bits, spread + bits) & (low_mask << bits);
    return load_shared(table + (low | high));
  }
};

// One register with whole codes of `low` in its low half and of `high` in the
// other.
KV_DEVICE uint32_t join_halves(uint32_t low, uint32_t high) {
  return __byte_perm(low, high, 0x5410);
}

// A row of codes in shared memory, whose copies of 16 bytes are swizzled.
struct Row {
  uint32_t address;
  uint32_t swizzle;

  KV_DEVICE uint32_t at(int byte) const {
    return address + (byte ^ swizzle);
  }
};

// 32 bits from any bit on.
KV_DEVICE uint32_t load_bits(Row row, int bit) {
  int byte = bit >> 5 << 2;
  return __funnelshift_r(
      load_shared(row.at(byte)), load_shared(row.at(byte + 4)), bit & 31);
}

// Where the values of a lane's run of `run` codes go. Runs that fill words of
// whole codes are read as words, others by bits.
template <typename Codec, int run>
struct Run {
  using To = Convert<Codec>;
  static constexpr int bits = Codec::bits;
  static constexpr int word_codes = 2 * To::codes;
  static constexpr bool fills_words = 32 % bits == 0 && run * bits % 32 == 0;
  // Two lanes' runs fill a word.
  static constexpr bool fills_half = 32 % bits == 0 && 32 / 2 == run * bits;
  static_assert(fills_words || !To::of_neighbours, "runs fill words");
  static constexpr int words = fills_words ? run * bits / 32 : 1;
  // Pairs within the run of one key, of which a matrix product takes two.
  static constexpr int pairs = run / 2;

  struct Place {
    // The register that holds pair p, and which of its codes.
    int piece;
    int code;
    // Values of the pair within the run.
    int first;
    int second;
  };

  static constexpr Place place(int p) {
    if (!fills_words) {
      return {p / To::codes, p % To::codes, p, p + pairs};
    }
    int word = p / To::codes;
    int i = p % To::codes;
    int base = word * word_codes;
    return To::of_neighbours ? Place{word, i, base + 2 * i, base + 2 * i + 1}
                             : Place{word, i, base + i, base + i + To::codes};
  }

  static constexpr int pieces = place(pairs - 1).piece + 1;

  // The inverse: pair and position in it of value d.
  static constexpr int pair_of(int d) {
    if (!fills_words) {
      return d % pairs;
    }
    int in_word = d % word_codes;
    int i = To::of_neighbours ? in_word / 2 : in_word % To::codes;
    return d / word_codes * To::codes + i;
  }
  static constexpr int position_of(int d) {
    if (!fills_words) {
      return d / pairs;
    }
    int in_word = d % word_codes;
    return To::of_neighbours ? in_word % 2 : in_word / To::codes;
  }

  // Pieces of one key.
  static KV_DEVICE void
  load_row(Row row, int begin_bit, uint32_t (&x)[pieces]) {
    if constexpr (fills_words) {
      load_shared(row.at(begin_bit / 8), x);
    } else {
#pragma unroll
      for (int i = 0; i < pieces; ++i) {
        int bit = begin_bit + i * To::codes * bits;
        x[i] = join_halves(
            load_bits(row, bit), load_bits(row, bit + pairs * bits));
      }
    }
  }

  // Pieces of two keys, whose pairs are of one value of both keys.
  static constexpr int column_codes = fills_words && To::of_neighbours
      ? 2
      : (To::codes < run ? To::codes : run);
  static constexpr int column_pieces = run / column_codes;

  static KV_DEVICE void load_columns(
      Row row0,
      Row row1,
      int begin_bit,
      uint32_t (&x)[column_pieces]) {
    if constexpr (fills_words) {
      uint32_t a[words], b[words];
      load_shared(row0.at(begin_bit / 8), a);
      load_shared(row1.at(begin_bit / 8), b);
      constexpr uint32_t low = To::of_neighbours ? 0x5140 : 0x5410;
      constexpr uint32_t high = To::of_neighbours ? 0x7362 : 0x7632;
#pragma unroll
      for (int i = 0; i < words; ++i) {
        x[2 * i] = __byte_perm(a[i], b[i], low);
        x[2 * i + 1] = __byte_perm(a[i], b[i], high);
      }
    } else if constexpr (fills_half) {
      int byte = begin_bit / 32 * 4;
      uint32_t select = begin_bit & 16 ? 0x7632 : 0x5410;
      x[0] = __byte_perm(
          load_shared(row0.at(byte)), load_shared(row1.at(byte)), select);
    } else {
#pragma unroll
      for (int i = 0; i < column_pieces; ++i) {
        int bit = begin_bit + i * column_codes * bits;
        x[i] = join_halves(load_bits(row0, bit), load_bits(row1, bit));
      }
    }
  }

  static constexpr int column_piece(int d) {
    return d / column_codes;
  }
  static constexpr int column_code(int d) {
    return d % column_codes;
  }
};

} // namespace mlx::core::quantized_sdpa
