// What the kernels use of CUDA itself, on the emulated GPU.

#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "quantized_sdpa_emulator.h"

#define __global__
#define __device__
#define __constant__ inline
#define __shared__
#define __align__(n)
#define __launch_bounds__(...)
#define __grid_constant__
#define __forceinline__ inline
#define __CUDA_ARCH__ 900

using std::max;
using std::min;

struct alignas(16) float4 {
  float x, y, z, w;
};

inline float __uint_as_float(uint32_t x) {
  return std::bit_cast<float>(x);
}

inline uint32_t __float_as_uint(float x) {
  return std::bit_cast<uint32_t>(x);
}

inline float __log2f(float x) {
  return std::log2(x);
}

inline int __ffs(int x) {
  return __builtin_ffs(x);
}

inline uint32_t __byte_perm(uint32_t a, uint32_t b, uint32_t select) {
  uint64_t bytes = uint64_t(b) << 32 | a;
  uint32_t y = 0;
  for (int i = 0; i < 4; ++i) {
    y |= uint32_t(bytes >> (8 * (select >> (4 * i) & 7)) & 0xff) << (8 * i);
  }
  return y;
}

inline uint32_t __funnelshift_r(uint32_t low, uint32_t high, int shift) {
  return uint32_t((uint64_t(high) << 32 | low) >> (shift & 31));
}

// ---------------------------------------------------------------------------
// Threads that meet

inline void __syncthreads() {
  emulator::block.sync(blockDim.x);
}

inline bool __syncthreads_or(bool x) {
  using emulator::Instruction;
  return emulator::block.any(Instruction::barrier_vote, blockDim.x, x);
}

inline void __syncwarp() {
  emulator::warp().sync(32);
}

inline void check_all_lanes(uint32_t lanes) {
  if (lanes != 0xffffffff) {
    emulator::fail("an instruction for some lanes only");
  }
}

inline bool __any_sync(uint32_t lanes, bool x) {
  check_all_lanes(lanes);
  return emulator::warp().any(emulator::Instruction::vote, 32, x);
}

template <typename T>
T __shfl_sync(uint32_t lanes, T x, int from) {
  check_all_lanes(lanes);
  struct Lane {
    T mine;
    int from;
    T result;
  } lane{x, from % 32, x};
  emulator::meet_warp(emulator::Instruction::shuffle, lane, [](auto at) {
    for (int i = 0; i < 32; ++i) {
      at(i).result = at(at(i).from).mine;
    }
  });
  return lane.result;
}

template <typename T>
T __shfl_xor_sync(uint32_t lanes, T x, int distance) {
  return __shfl_sync(lanes, x, threadIdx.x % 32 ^ distance);
}

// ---------------------------------------------------------------------------
// Global memory, and what other blocks write there

namespace emulator {

// All threads of a block fence, then a barrier, then one counts. Whoever reads
// what others wrote needs a barrier after that and a fence.
class BlockOrder {
 public:
  void start() {
    released_ = checker.time_of(0) - 1;
    fences_.fill(0);
    is_counted_ = false;
    has_acquired_.fill(false);
  }

  void fence() {
    int self = threadIdx.x;
    fences_[self] = checker.time_of(self);
    has_acquired_[self] = is_counted_ && checker.knows(self, counts_);
  }

  void count() {
    int self = threadIdx.x;
    for (int i = 0; i < blockDim.x; ++i) {
      if (fences_[i] <= released_) {
        fail("a block is counted before its writes are fenced");
      }
    }
    if (!checker.knows(self, fences_)) {
      fail("a block is counted without a barrier after the fences");
    }
    is_counted_ = true;
    counts_.fill(0);
    counts_[self] = checker.time_of(self);
    released_ = *std::max_element(fences_.begin(), fences_.end());
    has_acquired_.fill(false);
  }

  void check_acquired() const {
    if (!has_acquired_[threadIdx.x]) {
      fail("another block's writes are read without a fence");
    }
  }

 private:
  Clock fences_;
  Clock counts_;
  uint32_t released_;
  bool is_counted_;
  std::array<bool, most_threads> has_acquired_;
};

inline BlockOrder block_order;
inline bool has_block_order = at_limits([] { block_order.start(); }, [] {});

} // namespace emulator

inline void __threadfence() {
  emulator::block_order.fence();
}

inline uint32_t atomicInc(uint32_t* x, uint32_t last) {
  emulator::block_order.count();
  emulator::check_aligned(x, 4);
  uint32_t before = *x;
  *x = before >= last ? 0 : before + 1;
  return before;
}

template <typename T>
T __ldcg(const T* x) {
  emulator::block_order.check_acquired();
  return *emulator::global(x);
}

template <typename T>
T __ldg(const T* x) {
  return *emulator::global(x);
}

// In shared memory.
inline int atomicMax(int* p, int x) {
  auto bytes = reinterpret_cast<unsigned char*>(p);
  return emulator::checker.update<int>(
      threadIdx.x, uint32_t(bytes - emulator::shared_memory), [x](int old) {
        return std::max(old, x);
      });
}
