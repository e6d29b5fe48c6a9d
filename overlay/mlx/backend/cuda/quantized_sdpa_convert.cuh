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
  // Taken from each code of V and added to its bias: tensor cores cut sums off
  // towards zero, which many addends of one sign would drift by.
  static constexpr int middle = 1 << (bits - 1);

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

  static KV_DEVICE uint32_t centred(uint32_t halves, int i) {
    uint32_t x = uint32_t(middle) << (i * bits - shift(i));
    return subtract_f16x2(halves, x * 0x10001u);
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
  static constexpr int codes = 32 / (2 * bits);
  static constexpr bool of_neighbours = true;
  static constexpr bool scales_values = false;
  static constexpr float unit = 1.0f;

  static constexpr float step(int) {
    return 1.0f;
  }

  // log2 of the distance of a lane's entries.
  static constexpr int spread = 7;

  // Shift and sum are one instruction, once the other bits are gone.
  static KV_DEVICE uint32_t pair(uint32_t x, int i, uint32_t table) {
    int place = 2 * bits * i;
    uint32_t index = keep_bits(x, ((1u << 2 * bits) - 1) << place);
    return load_shared(
        place < spread ? multiply_add(index, 1u << (spread - place), table)
                       : (index >> (place - spread)) + table);
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

// `bits` bits that lie in a row behind any number of others like them.
template <int bits>
struct RunBits {
  static constexpr int words = (bits + 31) / 32;
  // The first is a multiple of this in its word.
  static constexpr int step = bits % 32 == 0 ? 32 : bits & -bits;
  static constexpr int touched = (32 - step + bits + 31) / 32;

  uint32_t x[words];

  KV_DEVICE void load(Row row, int begin) {
    if constexpr (step == 32 && (words & (words - 1)) == 0) {
      load_shared(row.at(begin / 8), x);
    } else {
      int byte = begin / 32 * 4;
      uint32_t loaded[touched + 1];
#pragma unroll
      for (int i = 0; i < touched; ++i) {
        loaded[i] = load_shared(row.at(byte + 4 * i));
      }
      loaded[touched] = 0;
#pragma unroll
      for (int i = 0; i < words; ++i) {
        x[i] = step == 32
            ? loaded[i]
            : __funnelshift_r(loaded[i], loaded[i + 1], begin & 31);
      }
    }
  }

  // Those from bit `at` on.
  KV_DEVICE uint32_t from(int at) const {
    int word = at / 32;
    uint32_t next = word + 1 < words ? x[word + 1] : 0;
    return at % 32 == 0 ? x[word] : __funnelshift_r(x[word], next, at % 32);
  }
};

// Ones where codes with even places are.
constexpr uint32_t even_codes(int bits) {
  uint32_t mask = 0;
  for (int i = 0; i + bits <= 32; i += 2 * bits) {
    mask |= ((1u << bits) - 1) << i;
  }
  return mask;
}

// Where the values of a lane's run of `run` codes go.
template <typename Codec, int run>
struct Run {
  using To = Convert<Codec>;
  static constexpr int bits = Codec::bits;
  using Bits = RunBits<run * bits>;
  // Codes that a register has for pairs of one key.
  static constexpr int piece_codes = 2 * To::codes;
  static constexpr bool fills_words = 32 % bits == 0 && run * bits % 32 == 0;
  // Two lanes' runs fill a word.
  static constexpr bool fills_half = 32 % bits == 0 && 32 / 2 == run * bits;
  // A code is a number of bytes.
  static constexpr bool fills_bytes = bits % 8 == 0;
  static_assert(fills_words || !fills_bytes, "bytes fill words");
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
    int piece = p / To::codes;
    int i = p % To::codes;
    int base = piece * piece_codes;
    return To::of_neighbours ? Place{piece, i, 2 * p, 2 * p + 1}
        : fills_words        ? Place{piece, i, base + i, base + i + To::codes}
                             : Place{piece, i, p, p + pairs};
  }

  static constexpr int pieces = place(pairs - 1).piece + 1;

  // The inverse: pair and position in it of value d.
  static constexpr int pair_of(int d) {
    return To::of_neighbours ? d / 2
        : fills_words        ? d / piece_codes * To::codes + d % To::codes
                             : d % pairs;
  }
  static constexpr int position_of(int d) {
    return To::of_neighbours ? d % 2
        : fills_words        ? d % piece_codes / To::codes
                             : d / pairs;
  }

  // Pieces of one key.
  static KV_DEVICE void load_row(Row row, int begin, uint32_t (&x)[pieces]) {
    Bits run_bits;
    run_bits.load(row, begin);
#pragma unroll
    for (int i = 0; i < pieces; ++i) {
      if constexpr (To::of_neighbours || fills_words) {
        x[i] = run_bits.from(i * piece_codes * bits);
      } else {
        int at = i * To::codes * bits;
        x[i] = join_halves(run_bits.from(at), run_bits.from(at + pairs * bits));
      }
    }
  }

  // Pieces of two keys, whose pairs are of one value of both keys: of as many
  // values in their order, or of those with even and with odd places.
  static constexpr bool alternates = To::of_neighbours && !fills_bytes;
  static constexpr int column_codes = alternates ? (run + 1) / 2
      : To::of_neighbours                        ? 2
      : To::codes < run                          ? To::codes
                                                 : run;
  static constexpr int column_pieces = run / column_codes;

  static KV_DEVICE void
  load_columns(Row row0, Row row1, int begin, uint32_t (&x)[column_pieces]) {
    if constexpr (fills_half && !alternates) {
      int byte = begin / 32 * 4;
      uint32_t select = begin & 16 ? 0x7632 : 0x5410;
      x[0] = __byte_perm(
          load_shared(row0.at(byte)), load_shared(row1.at(byte)), select);
      return;
    }
    Bits a, b;
    a.load(row0, begin);
    b.load(row1, begin);
    if constexpr (alternates) {
      constexpr uint32_t even = even_codes(bits);
      static_assert(Bits::words == 1, "runs of V are short");
      x[0] = (a.x[0] & even) | (b.x[0] << bits & ~even);
      x[1] = (a.x[0] >> bits & even) | (b.x[0] & ~even);
    } else if constexpr (fills_words) {
      constexpr uint32_t low = To::of_neighbours ? 0x5140 : 0x5410;
      constexpr uint32_t high = To::of_neighbours ? 0x7362 : 0x7632;
#pragma unroll
      for (int i = 0; i < Bits::words; ++i) {
        x[2 * i] = __byte_perm(a.x[i], b.x[i], low);
        x[2 * i + 1] = __byte_perm(a.x[i], b.x[i], high);
      }
    } else {
#pragma unroll
      for (int i = 0; i < column_pieces; ++i) {
        int at = i * column_codes * bits;
        x[i] = join_halves(a.from(at), b.from(at));
      }
    }
  }

  static constexpr int column_piece(int d) {
    return alternates ? d % 2 : d / column_codes;
  }
  static constexpr int column_code(int d) {
    return alternates ? d / 2 : d % column_codes;
  }
};

} // namespace mlx::core::quantized_sdpa
