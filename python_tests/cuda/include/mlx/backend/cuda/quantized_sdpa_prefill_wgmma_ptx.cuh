// In place of the overlay's file of this name: the same instructions in C++.
// Products come when they are waited for: until then accumulators hold NaN.

#pragma once

#include <map>

#include "mlx/backend/cuda/quantized_sdpa_ptx.cuh"

#define QUANTIZED_SDPA_HAS_WGMMA 1

namespace mlx::core::quantized_sdpa::prefill {

struct Mbarrier {
  int expected;
  int pending;
  uint32_t phase;
  emulator::Passed passed;
};

inline std::map<uint32_t, Mbarrier> mbarriers;
inline bool has_mbarriers =
    emulator::at_limits([] { mbarriers.clear(); }, [] {});

inline Mbarrier& mbarrier_at(uint32_t address) {
  auto found = mbarriers.find(address);
  if (found == mbarriers.end()) {
    emulator::fail("a barrier that was not initialized");
  }
  return found->second;
}

// Its bytes count as written, so that threads need a barrier before its use.
inline void init_barrier(uint32_t barrier, int arrivals) {
  uint64_t unused = 0;
  emulator::store(barrier, 8, &unused);
  mbarriers[barrier] = {arrivals, arrivals, 0, {}};
}

inline void check_initialized(uint32_t barrier) {
  uint64_t unused;
  emulator::load(barrier, 8, &unused);
}

inline void arrive(uint32_t barrier) {
  check_initialized(barrier);
  auto& b = mbarrier_at(barrier);
  emulator::checker.arrive(threadIdx.x, b.passed);
  if (--b.pending == 0) {
    emulator::checker.complete(b.passed);
    b.pending = b.expected;
    b.phase ^= 1;
    ++emulator::progress;
  }
}

inline void wait(uint32_t barrier, uint32_t parity) {
  check_initialized(barrier);
  auto& b = mbarrier_at(barrier);
  while (b.phase == parity) {
    emulator::wait_for_others();
  }
  emulator::checker.learn(threadIdx.x, b.passed);
}

inline void fence_shared_writes() {
  emulator::checker.fence(threadIdx.x);
}

inline void sync_threads(int barrier, int threads) {
  emulator::barriers[barrier].sync(threads);
}

inline void arrive_threads(int barrier, int threads) {
  emulator::barriers[barrier].arrive(emulator::Instruction::barrier, threads);
}

inline bool any_thread(int barrier, int threads, bool x) {
  using emulator::Instruction;
  return emulator::barriers[barrier].any(Instruction::barrier_vote, threads, x);
}

template <int n>
void lower_registers() {}
template <int n>
void raise_registers() {}

// The products that a thread has started. Registers that they read or write
// must not change until they are waited for, nor between the fence and them.
class Products {
 public:
  void fence() {
    has_fence_ = true;
    for (auto& [registers, content] : fenced_) {
      content.assign(registers, registers + content.size());
    }
  }

  // What is accumulated so far.
  std::vector<float>& start(float* c, int n) {
    for (auto& x : accumulators_) {
      if (x.registers == c) {
        x.group = groups_;
        return x.values;
      }
    }
    check_fenced(c, n);
    accumulators_.push_back({c, std::vector<float>(c, c + n), groups_});
    std::fill_n(c, n, NAN);
    return accumulators_.back().values;
  }

  void start(const uint32_t* a) {
    auto registers = reinterpret_cast<const float*>(a);
    check_fenced(registers, 4);
    operands_.push_back({a, {a[0], a[1], a[2], a[3]}, groups_});
  }

  void start_read(uint32_t at) {
    reads_.push_back({at, groups_});
  }

  void commit() {
    ++groups_;
  }

  void wait(int pending) {
    int done = groups_ - pending;
    std::erase_if(accumulators_, [&](auto& x) {
      if (x.group >= done) {
        return false;
      }
      for (int i = 0; i < x.values.size(); ++i) {
        if (x.registers[i] == x.registers[i]) {
          emulator::fail("an accumulator changed before its product came");
        }
        x.registers[i] = x.values[i];
      }
      return true;
    });
    std::erase_if(operands_, [&](auto& x) {
      if (x.group < done && memcmp(x.registers, x.content, 16) != 0) {
        emulator::fail("an operand changed before its product came");
      }
      return x.group < done;
    });
    std::erase_if(reads_, [&](auto& x) {
      if (x.group < done) {
        emulator::checker.end_tensor_read(threadIdx.x, x.at);
      }
      return x.group < done;
    });
  }

  void check_done() const {
    if (!accumulators_.empty() || !reads_.empty()) {
      emulator::fail("a thread ends before its products came");
    }
  }

 private:
  struct Accumulator {
    float* registers;
    std::vector<float> values;
    int group;
  };
  struct Operand {
    const uint32_t* registers;
    uint32_t content[4];
    int group;
  };
  struct Read {
    uint32_t at;
    int group;
  };

  void check_fenced(const float* registers, int n) {
    auto found = fenced_.find(registers);
    if (!has_fence_ ||
        (found != fenced_.end() &&
         memcmp(found->second.data(), registers, 4 * n) != 0)) {
      emulator::fail("registers of a product changed after its fence");
    }
    if (found == fenced_.end()) {
      fenced_[registers].assign(registers, registers + n);
    }
  }

  std::vector<Accumulator> accumulators_;
  std::vector<Operand> operands_;
  std::vector<Read> reads_;
  std::map<const float*, std::vector<float>> fenced_;
  bool has_fence_ = false;
  int groups_ = 0;
};

inline Products products[emulator::most_threads];

inline bool has_products = emulator::at_limits(
    [] { std::fill(std::begin(products), std::end(products), Products{}); },
    [] { products[threadIdx.x].check_done(); });

inline void wgmma_fence() {
  products[threadIdx.x].fence();
}
inline void wgmma_commit() {
  products[threadIdx.x].commit();
}
template <int pending>
void wgmma_wait() {
  products[threadIdx.x].wait(pending);
}
template <int n>
void hold_registers(float (&)[n][4]) {}

inline uint64_t matrix_descriptor(uint32_t address, int step) {
  return uint64_t(address >> 4) | uint64_t(step >> 4) << 16 |
      uint64_t(1024 >> 4) << 32 | uint64_t(1) << 62;
}

// Address of element (mn, k) of an operand whose rows run along k, or along mn.
inline uint32_t operand_at(uint64_t descriptor, int mn, int k, bool along_mn) {
  uint32_t field[3];
  for (int i = 0; i < 3; ++i) {
    field[i] = uint32_t(descriptor >> 16 * i & 0x3fff) << 4;
  }
  uint32_t at = along_mn
      ? mn / 64 * field[1] + k / 8 * field[2] + k % 8 * 128 + mn % 64 * 2
      : mn / 8 * field[2] + mn % 8 * 128 + k * 2;
  at += field[0];
  return at ^ (at >> 7 & 7) << 4;
}

// Reads an operand of mn x 16 for all threads of a warpgroup, of which lane 0
// of each warp says when the reading is over.
inline void read_operand(
    uint64_t descriptor,
    int n,
    bool along_mn,
    const emulator::Knowledge& known,
    float (*to)[16]) {
  int first = threadIdx.x / 128 * 128;
  int n_pieces = n * 16 / 8;
  for (int i = 0; i < n_pieces; ++i) {
    int mn = along_mn ? i / 16 * 8 : i / 2;
    int k = along_mn ? i % 16 : i % 2 * 8;
    uint32_t address = operand_at(descriptor, mn, k, along_mn);
    uint32_t at = emulator::offset_of(address);
    emulator::checker.start_tensor_read(known, at, 4);
    for (int warp = 0; warp < 4; ++warp) {
      products[first + warp * 32].start_read(at);
    }
    for (int j = 0; j < 8; ++j) {
      uint16_t bits;
      memcpy(&bits, emulator::shared_memory + at + 2 * j, 2);
      to[along_mn ? mn + j : mn][along_mn ? k : k + j] = f16_to_float(bits);
    }
  }
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
    std::vector<float>* c;
    const uint32_t* a;
  } mine{&products[threadIdx.x].start(&c[0][0], 4 * n), a};
  if (a) {
    products[threadIdx.x].start(a);
  }
  auto& group = emulator::warpgroups[threadIdx.x / 128];
  using emulator::Instruction;
  group.meet(Instruction::product, 128, threadIdx.x % 128, mine, [&](auto at) {
    auto known = emulator::checker.common(threadIdx.x / 128 * 128, 128);
    float left[64][16], right[8 * n][16];
    if (!a) {
      read_operand(a_descriptor, 64, false, known, left);
    }
    read_operand(b_descriptor, 8 * n, a != nullptr, known, right);
    for (int i = 0; a && i < 64 * 16; ++i) {
      int row = i / 16, k = i % 16;
      int t = row / 16 * 32 + row % 8 * 4 + k % 8 / 2;
      uint32_t x = at(t).a[row % 16 / 8 + k / 8 * 2];
      left[row][k] = f16_to_float(x >> 16 * (k % 2));
    }
    for (int i = 0; i < 128 * 4 * n; ++i) {
      int t = i / (4 * n), j = i / 4 % n;
      int row = t / 32 * 16 + t % 32 / 4 + i % 4 / 2 * 8;
      float& c = (*at(t).c)[4 * j + i % 4];
      double sum = add ? c : 0;
      for (int k = 0; k < 16; ++k) {
        sum += double(left[row][k]) * right[8 * j + 2 * (t % 4) + i % 2][k];
      }
      c = cut_off(sum);
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
