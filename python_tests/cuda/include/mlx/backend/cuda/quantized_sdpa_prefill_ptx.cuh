// In place of the overlay's file of this name: the same instructions in C++.

#pragma once

#include "mlx/backend/common/kv_codec.h"
#include "quantized_sdpa_emulator.h"

namespace mlx::core::quantized_sdpa::prefill {

inline uint32_t shared_address(const void* p) {
  return emulator::first_address +
      uint32_t(static_cast<const unsigned char*>(p) - shared);
}

inline uint32_t pack_f16(float low, float high) {
  return emulator::float_to_half(low) | emulator::float_to_half(high) << 16;
}

inline uint32_t round_bf16(float x) {
  uint32_t bits = uint32_t(__float_as_int(x));
  return x != x ? 0x7fff : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

inline uint32_t pack_bf16(float low, float high) {
  return round_bf16(low) | round_bf16(high) << 16;
}

inline float f16_to_float(uint32_t bits) {
  return emulator::half_to_float(bits);
}

inline float bf16_to_float(uint32_t bits) {
  return __uint_as_float(bits << 16);
}

inline uint32_t multiply_f16x2(uint32_t a, uint32_t b) {
  return pack_f16(
      f16_to_float(a) * f16_to_float(b),
      f16_to_float(a >> 16) * f16_to_float(b >> 16));
}

// Products of halves and their sums with one are exact in double.
inline uint32_t fma_f16x2(uint32_t a, uint32_t b, uint32_t c) {
  auto fma_f16 = [](uint32_t a, uint32_t b, uint32_t c) {
    double x = double(f16_to_float(a)) * f16_to_float(b) + f16_to_float(c);
    uint16_t bits;
    _Float16 y = _Float16(x);
    memcpy(&bits, &y, 2);
    return uint32_t(bits);
  };
  return fma_f16(a, b, c) | fma_f16(a >> 16, b >> 16, c >> 16) << 16;
}

inline uint32_t e4m3_pair(uint32_t codes) {
  return pack_f16(
      kv::e4m3_to_float(codes & 0xff), kv::e4m3_to_float(codes >> 8 & 0xff));
}

inline uint32_t mask_or(uint32_t x, uint32_t mask, uint32_t y) {
  return (x & mask) | y;
}

inline float exp2_approx(float x) {
  return exp2f(x);
}

inline float reciprocal_approx(float x) {
  return 1.0f / x;
}

inline float power_of_two(int exponent) {
  if (exponent < -126 || exponent > 127) {
    emulator::fail("an exponent that no normal float has");
  }
  return __int_as_float((exponent + 127) << 23);
}

inline int exponent_of(float x) {
  return (__float_as_int(x) >> 23 & 255) - 127;
}

inline void load_bytes(uint32_t address, int bytes, void* to) {
  uint32_t at = address - emulator::first_address;
  emulator::checker.load(threadIdx.x, at, bytes, to);
}

inline void store_bytes(uint32_t address, int bytes, const void* from) {
  uint32_t at = address - emulator::first_address;
  emulator::checker.store(threadIdx.x, at, bytes, from);
}

inline uint32_t load_shared(uint32_t address) {
  uint32_t x;
  load_bytes(address, 4, &x);
  return x;
}

inline void load_shared2(uint32_t address, uint32_t& x, uint32_t& y) {
  uint32_t words[2];
  load_bytes(address, 8, words);
  x = words[0];
  y = words[1];
}

inline void store_shared(uint32_t address, uint32_t x) {
  store_bytes(address, 4, &x);
}

inline void store_shared2(uint32_t address, uint32_t x, uint32_t y) {
  uint32_t words[] = {x, y};
  store_bytes(address, 8, words);
}

inline void store_shared4(uint32_t address, const uint32_t* x) {
  store_bytes(address, 16, x);
}

inline void store_shared_half(uint32_t address, uint32_t x) {
  store_bytes(address, 2, &x);
}

inline void load_words(const uint32_t* p, uint32_t* x, int n) {
  if (reinterpret_cast<uintptr_t>(p) % (4 * n) != 0) {
    emulator::fail("a bad address in global memory");
  }
  memcpy(x, p, 4 * n);
}

inline void load_global4(const uint32_t* p, uint32_t* x) {
  load_words(p, x, 4);
}

inline void load_global2(const uint32_t* p, uint32_t* x) {
  load_words(p, x, 2);
}

inline uint32_t load_global(const uint32_t* p) {
  uint32_t x;
  load_words(p, &x, 1);
  return x;
}

// Each lane reads the row that it has the address of.
template <bool transposed>
void load_matrices_as(uint32_t address, uint32_t (&x)[4]) {
  struct Lane {
    uint16_t row[8];
    uint32_t* x;
  } lane;
  lane.x = x;
  load_bytes(address, 16, lane.row);
  auto& warp = emulator::warps[threadIdx.x / 32];
  auto lane_at = [&](int i) { return static_cast<Lane*>(warp.of_thread[i]); };
  using emulator::Instruction;
  warp.meet(Instruction::matrices, 32, threadIdx.x % 32, &lane, [&] {
    for (int i = 0; i < 128; ++i) {
      int l = i % 32, matrix = i / 32;
      uint32_t pair[2];
      for (int h = 0; h < 2; ++h) {
        int row = transposed ? 2 * (l % 4) + h : l / 4;
        int column = transposed ? l / 4 : 2 * (l % 4) + h;
        pair[h] = lane_at(8 * matrix + row)->row[column];
      }
      lane_at(l)->x[matrix] = pair[0] | pair[1] << 16;
    }
  });
}

inline void load_matrices(uint32_t address, uint32_t (&x)[4]) {
  load_matrices_as<false>(address, x);
}

inline void load_matrices_transposed(uint32_t address, uint32_t (&x)[4]) {
  load_matrices_as<true>(address, x);
}

inline void
mma_f16(float* c, const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  struct Lane {
    float* c;
    const uint32_t* a;
    uint32_t b[2];
  } lane{c, a, {b0, b1}};
  auto& warp = emulator::warps[threadIdx.x / 32];
  auto lane_at = [&](int i) { return static_cast<Lane*>(warp.of_thread[i]); };
  using emulator::Instruction;
  warp.meet(Instruction::product, 32, threadIdx.x % 32, &lane, [&] {
    float left[16][16], right[16][8];
    for (int i = 0; i < 64; ++i) {
      int l = i / 2, row = l / 4, k = 2 * (l % 4) + i % 2;
      auto half_of = [&](uint32_t x) {
        return f16_to_float(x >> 16 * (i % 2));
      };
      for (int r = 0; r < 4; ++r) {
        left[row + r % 2 * 8][k + r / 2 * 8] = half_of(lane_at(l)->a[r]);
      }
      for (int r = 0; r < 2; ++r) {
        right[k + r * 8][row] = half_of(lane_at(l)->b[r]);
      }
    }
    for (int i = 0; i < 128; ++i) {
      int l = i / 4;
      float& sum = lane_at(l)->c[i % 4];
      for (int k = 0; k < 16; ++k) {
        sum += left[l / 4 + i % 4 / 2 * 8][k] * right[k][2 * (l % 4) + i % 2];
      }
    }
  });
}

} // namespace mlx::core::quantized_sdpa::prefill
