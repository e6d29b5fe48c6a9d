// Runs CUDA kernels on the CPU to test their results: every thread is a fiber,
// one runs at a time until it waits for others. Races are found by what
// barriers order, not by what happens to run first.

#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <vector>

#include "quantized_sdpa_race_checker.h"

#define __global__
#define __device__
#define __shared__
#define __align__(n)
#define __launch_bounds__(...)
#define __grid_constant__
#define __forceinline__ inline
#define __CUDA_ARCH__ 900
#define QUANTIZED_SDPA_HAS_WGMMA 1
#define PTX_FN inline

struct Index {
  unsigned x = 0;
};

inline Index threadIdx, blockIdx, gridDim, blockDim;

alignas(1024) inline unsigned char shared[emulator::memory_size];

namespace emulator {

// Where dynamic shared memory begins, no more aligned than kernels ask for.
constexpr uint32_t first_address = 1024 + 16;

constexpr int stack_bytes = 256 << 10;

struct Fiber {
  ucontext_t context;
  std::vector<char> stack;
  bool done;
};

inline std::vector<Fiber> fibers;
inline ucontext_t scheduler;
inline std::function<void()> kernel;

inline void wait_for_others() {
  swapcontext(&fibers[threadIdx.x].context, &scheduler);
}

// At which threads meet. Only barriers order what was done before and after.
enum class Instruction { barrier, vote, shuffle, matrices, product };

inline int64_t progress;

// Threads that meet: the last one to come acts for all.
struct Meeting {
  int arrived = 0;
  int generation = 0;
  int expected = 0;
  Instruction instruction = Instruction::barrier;
  Passed passed;
  void* of_thread[1024];

  static bool orders(Instruction x) {
    return x <= Instruction::vote;
  }

  void begin(int n, Instruction x) {
    if (arrived > 0 && (n != expected || x != instruction)) {
      fail("threads meet at different instructions");
    }
    expected = n;
    instruction = x;
    if (orders(x)) {
      checker.arrive(threadIdx.x, passed);
    }
  }

  void arrive(int n) {
    if (++arrived == n) {
      if (orders(instruction)) {
        checker.complete(passed);
      }
      arrived = 0;
      ++generation;
      ++progress;
    }
  }

  template <typename Act>
  void meet(Instruction x, int n, int thread, void* mine, Act act) {
    begin(n, x);
    int now = generation;
    of_thread[thread] = mine;
    if (arrived + 1 == n) {
      act();
    }
    arrive(n);
    while (generation == now) {
      wait_for_others();
    }
    if (orders(x)) {
      checker.pass(threadIdx.x, passed);
    }
  }
};

inline Meeting warps[32];
inline Meeting warpgroups[8];
inline Meeting barriers[16];
inline Meeting block;

// What threads must have done before they end.
inline std::function<void()> at_end = [] {};

inline void enter() {
  kernel();
  at_end();
  fibers[threadIdx.x].done = true;
  ++progress;
  wait_for_others();
}

inline void run_block(int n_threads, int shared_bytes) {
  checker.start(shared, n_threads, shared_bytes);
  block = {};
  std::fill_n(warps, 32, Meeting{});
  std::fill_n(warpgroups, 8, Meeting{});
  std::fill_n(barriers, 16, Meeting{});
  for (auto& fiber : fibers) {
    fiber.done = false;
    fiber.stack.resize(stack_bytes);
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.data();
    fiber.context.uc_stack.ss_size = stack_bytes;
    makecontext(&fiber.context, enter, 0);
  }
  int left = n_threads;
  while (left > 0) {
    int64_t before = progress;
    for (int t = 0; t < n_threads; ++t) {
      if (!fibers[t].done) {
        threadIdx.x = t;
        swapcontext(&scheduler, &fibers[t].context);
        left -= fibers[t].done;
      }
    }
    if (progress == before) {
      fail("threads wait for others that do not come");
    }
  }
}

inline void
launch(int n_blocks, int n_threads, int shared_bytes, std::function<void()> f) {
  kernel = std::move(f);
  gridDim.x = n_blocks;
  blockDim.x = n_threads;
  fibers.resize(n_threads);
  for (blockIdx.x = 0; blockIdx.x < n_blocks; ++blockIdx.x) {
    run_block(n_threads, shared_bytes);
  }
}

inline float half_to_float(uint32_t bits) {
  uint16_t low = uint16_t(bits);
  _Float16 x;
  std::memcpy(&x, &low, 2);
  return float(x);
}

inline uint32_t float_to_half(float value) {
  _Float16 x = _Float16(value);
  uint16_t bits;
  std::memcpy(&bits, &x, 2);
  return bits;
}

} // namespace emulator

// What the kernels use of CUDA itself.

using std::max;
using std::min;

inline float __uint_as_float(uint32_t x) {
  float y;
  std::memcpy(&y, &x, 4);
  return y;
}

inline float __int_as_float(int x) {
  return __uint_as_float(uint32_t(x));
}

inline int __float_as_int(float x) {
  int y;
  std::memcpy(&y, &x, 4);
  return y;
}

template <typename T>
T __ldg(const T* p) {
  return *p;
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

inline int atomicMax(int* p, int x) {
  auto at = uint32_t(reinterpret_cast<unsigned char*>(p) - shared);
  return emulator::checker.update<int>(
      threadIdx.x, at, [x](int old) { return std::max(old, x); });
}

inline float __shfl_xor_sync(unsigned lanes, float x, int mask) {
  using namespace emulator;
  if (lanes != 0xffffffff) {
    fail("an instruction for some lanes only");
  }
  auto& warp = warps[threadIdx.x / 32];
  struct Lane {
    float mine;
    float others;
  } lane{x, 0};
  warp.meet(Instruction::shuffle, 32, threadIdx.x % 32, &lane, [&] {
    for (int i = 0; i < 32; ++i) {
      static_cast<Lane*>(warp.of_thread[i])->others =
          static_cast<Lane*>(warp.of_thread[i ^ mask])->mine;
    }
  });
  return lane.others;
}

inline void __syncthreads() {
  using namespace emulator;
  block.meet(Instruction::barrier, blockDim.x, threadIdx.x, nullptr, [] {});
}

inline void __syncwarp() {
  using namespace emulator;
  int lane = threadIdx.x % 32;
  warps[threadIdx.x / 32].meet(Instruction::barrier, 32, lane, nullptr, [] {});
}

inline bool any_of_threads(emulator::Meeting& meeting, int n, bool x) {
  struct Vote {
    bool mine;
    bool any;
  } vote{x, false};
  // Any order of the threads will do.
  meeting.meet(emulator::Instruction::vote, n, meeting.arrived, &vote, [&] {
    bool any = false;
    for (int i = 0; i < n; ++i) {
      any = any || static_cast<Vote*>(meeting.of_thread[i])->mine;
    }
    for (int i = 0; i < n; ++i) {
      static_cast<Vote*>(meeting.of_thread[i])->any = any;
    }
  });
  return vote.any;
}

inline bool __syncthreads_or(bool x) {
  return any_of_threads(emulator::block, blockDim.x, x);
}
