// In place of the overlay's file of this name: the same instructions in C++.
// Asynchronous copies happen only when they are waited for.

#pragma once

#include "mlx/backend/common/kv_codec.h"
#include "mlx/backend/cuda/quantized_sdpa_params.h"
#include "quantized_sdpa_cuda.h"

#define KV_DEVICE inline

namespace mlx::core::quantized_sdpa {

constexpr uint32_t all_lanes = 0xffffffffu;

// ---------------------------------------------------------------------------
// Floats

KV_DEVICE uint32_t float_bits(float x) {
  return __float_as_uint(x);
}

KV_DEVICE float bits_float(uint32_t x) {
  return __uint_as_float(x);
}

KV_DEVICE float power_of_two(int exponent) {
  if (exponent < -126 || exponent > 127) {
    emulator::fail("an exponent that no normal float has");
  }
  return bits_float(uint32_t(127 + exponent) << 23);
}

KV_DEVICE int exponent_of(float x) {
  return int(float_bits(x) >> 23 & 255) - 127;
}

KV_DEVICE float exp2_approx(float x) {
  return std::exp2(x);
}

template <typename T>
uint32_t round_f16(T x) {
  return std::bit_cast<uint16_t>(_Float16(x));
}

KV_DEVICE uint32_t round_bf16(float x) {
  uint32_t bits = float_bits(x);
  return x != x ? 0x7fff : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

KV_DEVICE uint32_t pack_f16(float low, float high) {
  return round_f16(low) | round_f16(high) << 16;
}

KV_DEVICE uint32_t pack_bf16(float low, float high) {
  return round_bf16(low) | round_bf16(high) << 16;
}

KV_DEVICE float f16_to_float(uint32_t bits) {
  return float(std::bit_cast<_Float16>(uint16_t(bits)));
}

KV_DEVICE float bf16_to_float(uint32_t bits) {
  return bits_float(bits << 16);
}

KV_DEVICE uint32_t subtract_f16x2(uint32_t a, uint32_t b) {
  return pack_f16(
      f16_to_float(a) - f16_to_float(b),
      f16_to_float(a >> 16) - f16_to_float(b >> 16));
}

KV_DEVICE uint32_t multiply_f16x2(uint32_t a, uint32_t b) {
  return pack_f16(
      f16_to_float(a) * f16_to_float(b),
      f16_to_float(a >> 16) * f16_to_float(b >> 16));
}

// Products of halves and their sums with one are exact in double.
KV_DEVICE uint32_t fma_f16x2(uint32_t a, uint32_t b, uint32_t c) {
  auto fma_f16 = [](uint32_t a, uint32_t b, uint32_t c) {
    return round_f16(
        double(f16_to_float(a)) * f16_to_float(b) + f16_to_float(c));
  };
  return fma_f16(a, b, c) | fma_f16(a >> 16, b >> 16, c >> 16) << 16;
}

KV_DEVICE uint32_t convert_e4m3x2(uint32_t x) {
  return pack_f16(
      kv::e4m3_to_float(x & 0xff), kv::e4m3_to_float(x >> 8 & 0xff));
}

KV_DEVICE uint32_t keep_bits(uint32_t x, uint32_t mask) {
  return x & mask;
}

KV_DEVICE uint32_t multiply_add(uint32_t a, uint32_t b, uint32_t c) {
  return a * b + c;
}

// ---------------------------------------------------------------------------
// Shared memory

KV_DEVICE uint32_t shared_address(const void* p) {
  auto offset = static_cast<const unsigned char*>(p) - emulator::shared_memory;
  return emulator::first_address + uint32_t(offset);
}

template <typename T>
uint32_t load_shared_as(uint32_t address) {
  T x;
  emulator::load(address, sizeof(T), &x);
  return x;
}

KV_DEVICE uint32_t load_shared(uint32_t address) {
  return load_shared_as<uint32_t>(address);
}

KV_DEVICE uint32_t load_shared_u16(uint32_t address) {
  return load_shared_as<uint16_t>(address);
}

KV_DEVICE uint32_t load_shared_u8(uint32_t address) {
  return load_shared_as<uint8_t>(address);
}

template <int n>
KV_DEVICE void load_shared(uint32_t address, uint32_t (&x)[n]) {
  constexpr int step = n % 4 == 0 ? 4 : n % 2 == 0 ? 2 : 1;
  for (int i = 0; i < n; i += step) {
    emulator::load(address + i * 4, step * 4, x + i);
  }
}

KV_DEVICE void store_shared(uint32_t address, uint32_t x) {
  emulator::store(address, 4, &x);
}

KV_DEVICE void store_shared2(uint32_t address, uint32_t x, uint32_t y) {
  uint32_t words[] = {x, y};
  emulator::store(address, 8, words);
}

KV_DEVICE void store_shared4(uint32_t address, const uint32_t* x) {
  emulator::store(address, 16, x);
}

KV_DEVICE void store_shared_u16(uint32_t address, uint32_t x) {
  emulator::store(address, 2, &x);
}

KV_DEVICE void store_shared_u8(uint32_t address, uint32_t x) {
  emulator::store(address, 1, &x);
}

// ---------------------------------------------------------------------------
// Global memory

KV_DEVICE uint32_t load_global(const uint32_t* p) {
  return *emulator::global(p);
}

KV_DEVICE void load_global2(const uint32_t* p, uint32_t* x) {
  std::memcpy(x, emulator::global(p, 8), 8);
}

KV_DEVICE void load_global4(const uint32_t* p, uint32_t* x) {
  std::memcpy(x, emulator::global(p, 16), 16);
}

// The copies of a thread in groups, the last of which is not yet complete.
class Copies {
 public:
  void start(uint32_t to, const void* from, int bytes, int valid) {
    if (valid < 0 || valid > bytes) {
      emulator::fail("a copy of more than its size");
    }
    auto source = static_cast<const uint8_t*>(from);
    if (valid > 0) {
      emulator::check_aligned(source, bytes);
      emulator::check_inside(source, valid);
    }
    uint32_t at = emulator::offset_of(to);
    emulator::checker.start_copy(threadIdx.x, at, bytes);
    groups_.back().push_back({at, source, bytes, valid});
  }

  void commit() {
    groups_.emplace_back();
  }

  void wait(int left) {
    while (int(groups_.size()) - 1 > left) {
      for (auto& x : groups_.front()) {
        uint8_t bytes[16] = {};
        std::copy_n(x.from, x.valid, bytes);
        emulator::checker.end_copy(threadIdx.x, x.at, x.bytes, bytes);
      }
      groups_.erase(groups_.begin());
    }
  }

  void check_done() const {
    for (auto& group : groups_) {
      if (!group.empty()) {
        emulator::fail("a thread ends before its copies came");
      }
    }
  }

 private:
  struct Copy {
    uint32_t at;
    const uint8_t* from;
    int bytes;
    int valid;
  };

  std::vector<std::vector<Copy>> groups_{1};
};

inline Copies copies[emulator::most_threads];
inline bool has_copies = emulator::at_limits(
    [] { std::fill(std::begin(copies), std::end(copies), Copies{}); },
    [] { copies[threadIdx.x].check_done(); });

template <int bytes>
KV_DEVICE void copy_async(uint32_t to, const void* from, int valid) {
  copies[threadIdx.x].start(to, from, bytes, valid);
}

template <int bytes>
KV_DEVICE void copy_async(uint32_t to, const void* from) {
  copy_async<bytes>(to, from, bytes);
}

KV_DEVICE void copy_commit() {
  copies[threadIdx.x].commit();
}

template <int n>
KV_DEVICE void copy_wait() {
  copies[threadIdx.x].wait(n);
}

// ---------------------------------------------------------------------------
// Matrices

// Tensor cores round the sums that they add up towards zero.
KV_DEVICE float cut_off(double x) {
  float y = float(x);
  return std::fabs(double(y)) > std::fabs(x) ? std::nextafter(y, 0.0f) : y;
}

KV_DEVICE float half_at(const uint32_t* x, int i) {
  return f16_to_float(x[i / 2] >> i % 2 * 16);
}

KV_DEVICE void
mma_f16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  struct Lane {
    float* c;
    const uint32_t* a;
    uint32_t b[2];
  } lane{c, a, {b0, b1}};
  emulator::meet_warp(emulator::Instruction::product, lane, [](auto at) {
    double left[16][16], right[16][8];
    for (int i = 0; i < 64; ++i) {
      int l = i / 2, row = l / 4, k = 2 * (l % 4) + i % 2;
      for (int r = 0; r < 4; ++r) {
        left[row + r % 2 * 8][k + r / 2 * 8] = half_at(at(l).a + r, i % 2);
      }
      for (int r = 0; r < 2; ++r) {
        right[k + r * 8][row] = half_at(at(l).b + r, i % 2);
      }
    }
    for (int i = 0; i < 128; ++i) {
      int l = i / 4, row = l / 4 + i % 4 / 2 * 8, column = 2 * (l % 4) + i % 2;
      float& c = at(l).c[i % 4];
      double sum = c;
      for (int k = 0; k < 16; ++k) {
        sum += left[row][k] * right[k][column];
      }
      c = cut_off(sum);
    }
  });
}

KV_DEVICE uint32_t transpose(uint32_t x) {
  struct Lane {
    uint32_t x;
    uint32_t y;
  } lane{x, 0};
  emulator::meet_warp(emulator::Instruction::transpose, lane, [](auto at) {
    for (int i = 0; i < 64; ++i) {
      int l = i / 2, row = 2 * (l % 4) + i % 2, column = l / 4;
      uint32_t pair = at(4 * row + column / 2).x;
      at(l).y |= (pair >> column % 2 * 16 & 0xffff) << i % 2 * 16;
    }
  });
  return lane.y;
}

// Each lane reads the row that it has the address of.
template <bool transposed>
void load_matrices_as(uint32_t address, uint32_t (&x)[4]) {
  struct Lane {
    uint16_t row[8];
    uint32_t* x;
  } lane;
  lane.x = x;
  emulator::load(address, 16, lane.row);
  emulator::meet_warp(emulator::Instruction::matrices, lane, [](auto at) {
    for (int i = 0; i < 128; ++i) {
      int l = i % 32, matrix = i / 32;
      uint32_t pair[2];
      for (int h = 0; h < 2; ++h) {
        int row = transposed ? 2 * (l % 4) + h : l / 4;
        int column = transposed ? l / 4 : 2 * (l % 4) + h;
        pair[h] = at(8 * matrix + row).row[column];
      }
      at(l).x[matrix] = pair[0] | pair[1] << 16;
    }
  });
}

KV_DEVICE void load_matrices(uint32_t address, uint32_t (&x)[4]) {
  load_matrices_as<false>(address, x);
}

KV_DEVICE void load_matrices_transposed(uint32_t address, uint32_t (&x)[4]) {
  load_matrices_as<true>(address, x);
}

} // namespace mlx::core::quantized_sdpa
