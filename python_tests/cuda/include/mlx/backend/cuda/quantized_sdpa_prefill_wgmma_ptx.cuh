// In place of the overlay's file of this name: the same instructions in C++.
// Products are done at once, so a missing wait is not noticed here.

#pragma once

#include "mlx/backend/cuda/quantized_sdpa_prefill_ptx.cuh"

namespace mlx::core::quantized_sdpa::prefill {

struct Mbarrier {
  int16_t expected;
  int16_t pending;
  uint32_t phase;
};

inline Mbarrier& mbarrier_at(uint32_t address) {
  return *reinterpret_cast<Mbarrier*>(shared_at(address, 8));
}

inline void init_barrier(uint32_t barrier, int arrivals) {
  mbarrier_at(barrier) = {int16_t(arrivals), int16_t(arrivals), 0};
}

inline void arrive(uint32_t barrier) {
  auto& b = mbarrier_at(barrier);
  if (--b.pending == 0) {
    b.pending = b.expected;
    b.phase ^= 1;
  }
}

inline void wait(uint32_t barrier, uint32_t parity) {
  while (mbarrier_at(barrier).phase == parity) {
    emulator::wait_for_others();
  }
}

inline void fence_shared_writes() {}

inline void sync_threads(int barrier, int threads) {
  emulator::barriers[barrier].meet(threads, 0, nullptr, [] {});
}

inline void arrive_threads(int barrier, int threads) {
  emulator::barriers[barrier].arrive(threads);
}

inline bool any_thread(int barrier, int threads, bool x) {
  return any_of_threads(emulator::barriers[barrier], threads, x);
}

template <int n>
void lower_registers() {}
template <int n>
void raise_registers() {}
inline void wgmma_fence() {}
inline void wgmma_commit() {}
template <int pending>
void wgmma_wait() {}
template <int n>
void hold_registers(float (&)[n][4]) {}

inline uint64_t matrix_descriptor(uint32_t address, int step) {
  return uint64_t(address >> 4) | uint64_t(step >> 4) << 16 |
      uint64_t(1024 >> 4) << 32 | uint64_t(1) << 62;
}

// Element (mn, k) of an operand whose rows run along k, or along mn.
inline float operand_at(uint64_t descriptor, int mn, int k, bool along_mn) {
  uint32_t field[3];
  for (int i = 0; i < 3; ++i) {
    field[i] = uint32_t(descriptor >> 16 * i & 0x3fff) << 4;
  }
  uint32_t at = along_mn
      ? mn / 64 * field[1] + k / 8 * field[2] + k % 8 * 128 + mn % 64 * 2
      : mn / 8 * field[2] + mn % 8 * 128 + k * 2;
  at += field[0];
  return emulator::half_at(at ^ (at >> 7 & 7) << 4);
}

// a from shared memory, or from registers where it is given.
template <int n>
void multiply_warpgroup(
    float (&c)[n][4],
    bool add,
    uint64_t a_descriptor,
    const uint32_t* a,
    uint64_t b_descriptor) {
  struct Thread {
    float (*c)[4];
    const uint32_t* a;
  } mine{c, a};
  auto& group = emulator::warpgroups[threadIdx.x / 128];
  auto thread_at = [&](int i) {
    return static_cast<Thread*>(group.of_thread[i]);
  };
  auto a_at = [&](int row, int k) {
    if (!a) {
      return operand_at(a_descriptor, row, k, false);
    }
    int t = row / 16 * 32 + row % 8 * 4 + k % 8 / 2;
    uint32_t x = thread_at(t)->a[row % 16 / 8 + k / 8 * 2];
    return f16_to_float(x >> 16 * (k % 2));
  };
  group.meet(128, threadIdx.x % 128, &mine, [&] {
    float left[64][16], right[16][8 * n];
    for (int k = 0; k < 16; ++k) {
      for (int row = 0; row < 64; ++row) {
        left[row][k] = a_at(row, k);
      }
      for (int column = 0; column < 8 * n; ++column) {
        right[k][column] = operand_at(b_descriptor, column, k, a != nullptr);
      }
    }
    for (int i = 0; i < 128 * 4 * n; ++i) {
      int t = i / (4 * n), j = i / 4 % n;
      int row = t / 32 * 16 + t % 32 / 4 + i % 4 / 2 * 8;
      float& sum = thread_at(t)->c[j][i % 4];
      sum = add ? sum : 0;
      for (int k = 0; k < 16; ++k) {
        sum += left[row][k] * right[k][8 * j + 2 * (t % 4) + i % 2];
      }
    }
  });
}

template <bool add, int n>
void wgmma_shared(float (&c)[n][4], uint64_t a, uint64_t b) {
  multiply_warpgroup(c, add, a, nullptr, b);
}

template <int n>
void wgmma_registers(float (&c)[n][4], const uint32_t (&a)[4], uint64_t b) {
  multiply_warpgroup(c, true, 0, a, b);
}

} // namespace mlx::core::quantized_sdpa::prefill
