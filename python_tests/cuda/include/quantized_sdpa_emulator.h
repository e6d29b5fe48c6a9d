// Runs CUDA kernels on the CPU to test their results: every thread of a block
// is a fiber, one runs at a time until it waits for others. Races are found by
// what barriers order, not by what happens to run first.

#pragma once

#include <ucontext.h>

#include <algorithm>
#include <functional>
#include <numeric>
#include <vector>

#include "quantized_sdpa_grid.h"
#include "quantized_sdpa_race_checker.h"

struct Index {
  unsigned x = 0;
};

inline Index threadIdx, blockIdx, gridDim, blockDim;

namespace emulator {

constexpr int stack_bytes = 256 << 10;

struct Grid {
  int blocks;
  int threads;
  // What the kernel declares as its dynamic shared memory, and how it is
  // aligned there; memory_size bytes.
  unsigned char* shared;
  int alignment;
  int shared_bytes;
  // What the kernel may read.
  const Buffer* buffers;
  int n_buffers;
};

struct Fiber {
  ucontext_t context;
  std::vector<char> stack;
  bool done;
};

inline std::vector<Fiber> fibers;
inline ucontext_t scheduler;
inline std::function<void()> kernel;
// Counts what lets waiting threads go on.
inline int64_t progress;

inline void wait_for_others() {
  swapcontext(&fibers[threadIdx.x].context, &scheduler);
}

// At which threads meet.
enum class Instruction {
  barrier,
  barrier_vote,
  vote,
  shuffle,
  matrices,
  transpose,
  product
};

// Only barriers order what was done before and after.
inline bool is_barrier(Instruction x) {
  return x <= Instruction::barrier_vote;
}

// Threads that meet: the last one to come acts for all.
class Meeting {
 public:
  // Of a thread that goes on without waiting, too.
  void arrive(Instruction x, int n) {
    begin(x, n);
    end(n);
  }

  // `mine` is what the thread brings, as place `at` of those who meet.
  template <typename T, typename Act>
  void meet(Instruction x, int n, int at, T& mine, Act act) {
    begin(x, n);
    int now = generation_;
    brought_[at] = &mine;
    if (arrived_ + 1 == n) {
      act([this](int i) -> T& { return *static_cast<T*>(brought_[i]); });
    }
    end(n);
    while (generation_ == now) {
      wait_for_others();
    }
    if (is_barrier(x)) {
      checker.pass(threadIdx.x, passed_);
    }
  }

  void sync(int n) {
    int nothing;
    meet(Instruction::barrier, n, 0, nothing, [](auto) {});
  }

  bool any(Instruction x, int n, bool mine) {
    struct Vote {
      bool mine;
      bool any;
    } vote{mine, false};
    // Any order of the threads will do.
    meet(x, n, arrived_, vote, [n](auto at) {
      bool any = false;
      for (int i = 0; i < n; ++i) {
        any = any || at(i).mine;
      }
      for (int i = 0; i < n; ++i) {
        at(i).any = any;
      }
    });
    return vote.any;
  }

 private:
  void begin(Instruction x, int n) {
    if (arrived_ > 0 && (n != expected_ || x != instruction_)) {
      fail("threads meet at different instructions");
    }
    expected_ = n;
    instruction_ = x;
    if (is_barrier(x)) {
      checker.arrive(threadIdx.x, passed_);
    }
  }

  void end(int n) {
    if (++arrived_ == n) {
      if (is_barrier(instruction_)) {
        checker.complete(passed_);
      }
      arrived_ = 0;
      ++generation_;
      ++progress;
    }
  }

  int arrived_ = 0;
  int generation_ = 0;
  int expected_ = 0;
  Instruction instruction_ = Instruction::barrier;
  Passed passed_;
  void* brought_[most_threads];
};

inline Meeting block;
inline Meeting warps[most_warps];
inline Meeting warpgroups[most_warps / 4];
inline Meeting barriers[16];

inline Meeting& warp() {
  return warps[threadIdx.x / 32];
}

template <typename T, typename Act>
void meet_warp(Instruction x, T& mine, Act act) {
  warp().meet(x, 32, threadIdx.x % 32, mine, act);
}

// What instructions keep of a block is forgotten before the next one, and
// checked when a thread ends.
inline std::vector<void (*)()> before_block;
inline std::vector<void (*)()> after_thread;

inline bool at_limits(void (*begin)(), void (*end)()) {
  before_block.push_back(begin);
  after_thread.push_back(end);
  return true;
}

// Addresses in shared memory are not 0, and no more aligned than was asked for.
inline unsigned char* shared_memory;
inline uint32_t first_address;

inline uint32_t offset_of(uint32_t address) {
  return address - first_address;
}

inline void load(uint32_t address, int bytes, void* to) {
  checker.load(threadIdx.x, offset_of(address), bytes, to);
}

inline void store(uint32_t address, int bytes, const void* from) {
  checker.store(threadIdx.x, offset_of(address), bytes, from);
}

inline std::vector<Buffer> buffers;

inline void check_aligned(const void* p, int bytes) {
  if (reinterpret_cast<uintptr_t>(p) % bytes != 0) {
    fail("a misaligned access to global memory");
  }
}

inline void check_inside(const void* p, int bytes) {
  auto begin = reinterpret_cast<uintptr_t>(p);
  for (auto& x : buffers) {
    auto at = begin - reinterpret_cast<uintptr_t>(x.begin);
    if (at < x.bytes && bytes <= x.bytes - at) {
      return;
    }
  }
  fail("an access outside of global memory");
}

// Of `bytes` that one instruction reads.
template <typename T>
const T* global(const T* p, int bytes = sizeof(T)) {
  check_aligned(p, bytes);
  check_inside(p, bytes);
  return p;
}

inline void enter() {
  kernel();
  for (auto check : after_thread) {
    check();
  }
  fibers[threadIdx.x].done = true;
  ++progress;
  wait_for_others();
}

inline void prepare_block(const Grid& grid) {
  checker.start(grid.shared, grid.threads, grid.shared_bytes);
  block = {};
  std::fill(std::begin(warps), std::end(warps), Meeting{});
  std::fill(std::begin(warpgroups), std::end(warpgroups), Meeting{});
  std::fill(std::begin(barriers), std::end(barriers), Meeting{});
  for (auto forget : before_block) {
    forget();
  }
  for (auto& fiber : fibers) {
    fiber.done = false;
    fiber.stack.resize(stack_bytes);
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.data();
    fiber.context.uc_stack.ss_size = stack_bytes;
    makecontext(&fiber.context, enter, 0);
  }
}

inline void run_block(const Grid& grid) {
  prepare_block(grid);
  int left = grid.threads;
  while (left > 0) {
    int64_t before = progress;
    for (int t = 0; t < grid.threads; ++t) {
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

// Blocks come in no order that a kernel may count on.
inline void launch(const Grid& grid, std::function<void()> f) {
  if (grid.threads > most_threads || grid.shared_bytes > memory_size) {
    fail("a block larger than the emulator's");
  }
  kernel = std::move(f);
  gridDim.x = grid.blocks;
  blockDim.x = grid.threads;
  fibers.resize(grid.threads);
  shared_memory = grid.shared;
  buffers.assign(grid.buffers, grid.buffers + grid.n_buffers);
  first_address = 1024 + grid.alignment;
  int step = grid.blocks * 5 / 8 + 1;
  while (std::gcd(step, grid.blocks) != 1) {
    ++step;
  }
  for (int i = 0; i < grid.blocks; ++i) {
    blockIdx.x = int64_t(i + 1) * step % grid.blocks;
    run_block(grid);
  }
}

} // namespace emulator
