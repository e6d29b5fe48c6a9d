// The GPU's instructions on the CPU: a lane is a fiber, and instructions of a
// whole warp wait for all of its lanes. Accesses to shared memory are checked
// for races, and asynchronous copies happen only when they are waited for.

#pragma once

#include <ucontext.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <vector>

#include "mlx/backend/common/kv_codec.h"
#include "mlx/backend/cuda/quantized_sdpa_params.h"
#include "quantized_sdpa_race_checker.h"

#define KV_DEVICE static inline
#define __device__
#define __shared__
#define __forceinline__ inline
#define __align__(n)
#define __global__
#define __launch_bounds__(...)
#define __grid_constant__

namespace mlx::core::quantized_sdpa {

using emulator::checker;
using std::max;
using std::min;

constexpr uint32_t all_lanes = 0xffffffffu;

struct Index {
  unsigned x;
};
struct float4 {
  float x, y, z, w;
};

alignas(1024) inline uint8_t memory[emulator::memory_size];
// Where dynamic shared memory begins.
constexpr uint32_t first_address = 1024;
inline Index threadIdx, blockIdx, gridDim;

// At which lanes of a warp, or all threads of a block, meet.
enum class Instruction { none, barrier, shuffle, vote, product, transpose };

// All threads of a block, in turns.
class Block {
 public:
  struct Copy {
    uint32_t to;
    const void* from;
    int bytes;
    int valid;
  };
  struct Lane {
    ucontext_t context;
    std::unique_ptr<char[]> stack{new char[stack_size]};
    bool done;
    std::vector<std::vector<Copy>> groups;
    // Whether it has done what it takes to see what other blocks wrote.
    bool has_acquired;
  };
  struct Meeting {
    int size;
    int arrived = 0;
    int phase = 0;
    Instruction instruction = Instruction::none;
    emulator::Passed passed;
  };

  template <typename F>
  void run(int threads, int shared, F body) {
    body_ = body;
    lanes_.resize(threads);
    warps_.assign(threads / 32, Meeting{32});
    values_.assign(threads * 2, {});
    block_ = {threads};
    checker.start(memory, threads, shared);
    released_ = checker.time_of(0) - 1;
    fences_.fill(0);
    for (auto& lane : lanes_) {
      lane.done = false;
      lane.has_acquired = false;
      lane.groups.assign(1, {});
      getcontext(&lane.context);
      lane.context.uc_stack.ss_sp = lane.stack.get();
      lane.context.uc_stack.ss_size = stack_size;
      lane.context.uc_link = &main_;
      makecontext(&lane.context, start, 0);
    }
    for (bool alive = true; alive;) {
      alive = false;
      int64_t before = progress_;
      for (int i = 0; i < threads; ++i) {
        if (!lanes_[i].done) {
          threadIdx.x = i;
          swapcontext(&main_, &lanes_[i].context);
          alive = true;
        }
      }
      if (alive && progress_ == before) {
        emulator::fail("threads wait for others that do not come");
      }
    }
  }

  // Only barriers order what was done before and after.
  void meet(Meeting& at, Instruction instruction) {
    int self = threadIdx.x;
    if (at.arrived > 0 && at.instruction != instruction) {
      emulator::fail("threads meet at different instructions");
    }
    at.instruction = instruction;
    bool orders = instruction == Instruction::barrier;
    if (orders) {
      checker.arrive(self, at.passed);
    }
    int phase = at.phase;
    if (++at.arrived == at.size) {
      if (orders) {
        checker.complete(at.passed);
      }
      at.arrived = 0;
      ++at.phase;
      ++progress_;
    }
    while (at.phase == phase) {
      swapcontext(&lanes_[self].context, &main_);
    }
    if (orders) {
      checker.pass(self, at.passed);
    }
  }

  void meet_block() {
    meet(block_, Instruction::barrier);
  }

  // What every lane of the warp brings; valid until the next but one.
  struct Value {
    uint32_t words[8];
  };
  const Value*
  gather(Instruction instruction, const Value& mine, uint32_t mask) {
    if (mask != all_lanes) {
      emulator::fail("an instruction for some lanes only");
    }
    int warp = threadIdx.x / 32;
    int first = (warps_[warp].phase % 2 * lanes_.size()) + warp * 32;
    values_[first + threadIdx.x % 32] = mine;
    meet(warps_[warp], instruction);
    return &values_[first];
  }

  void copy(const Copy& x) {
    checker.start_copy(threadIdx.x, x.to - first_address, x.bytes);
    if (reinterpret_cast<uint64_t>(x.from) % x.bytes != 0 && x.valid > 0) {
      emulator::fail("a misaligned copy");
    }
    lanes_[threadIdx.x].groups.back().push_back(x);
  }
  void commit() {
    lanes_[threadIdx.x].groups.emplace_back();
  }
  void wait(int left) {
    auto& groups = lanes_[threadIdx.x].groups;
    while (int(groups.size()) - 1 > left) {
      for (auto& x : groups.front()) {
        uint8_t bytes[16] = {};
        if (x.valid > 0) {
          std::memcpy(bytes, x.from, x.valid);
        }
        checker.end_copy(threadIdx.x, x.to - first_address, x.bytes, bytes);
      }
      groups.erase(groups.begin());
    }
  }

  // Between blocks: all threads fence, then a barrier, then one counts; whoever
  // reads what others wrote needs a barrier after that and a fence.
  void fence_blocks() {
    int self = threadIdx.x;
    fences_[self] = checker.time_of(self);
    lanes_[self].has_acquired =
        counted_by_ >= 0 && checker.knows(self, counts_);
  }
  void count() {
    int self = threadIdx.x;
    for (int i = 0; i < lanes_.size(); ++i) {
      if (fences_[i] <= released_) {
        emulator::fail("a block is counted before its writes are fenced");
      }
    }
    if (!checker.knows(self, fences_)) {
      emulator::fail("a block is counted without a barrier after the fences");
    }
    counted_by_ = self;
    counts_.fill(0);
    counts_[self] = checker.time_of(self);
    released_ = *std::max_element(fences_.begin(), fences_.end());
    for (auto& lane : lanes_) {
      lane.has_acquired = false;
    }
  }
  void check_acquired() {
    if (!lanes_[threadIdx.x].has_acquired) {
      emulator::fail("another block's writes are read without a fence");
    }
  }

  static Block& current();

 private:
  static constexpr int stack_size = 1 << 17;
  static void start() {
    auto& block = current();
    block.body_();
    auto& lane = block.lanes_[threadIdx.x];
    for (auto& group : lane.groups) {
      if (!group.empty()) {
        emulator::fail("a block ends before its copies");
      }
    }
    lane.done = true;
    ++block.progress_;
  }

  std::vector<Lane> lanes_;
  std::vector<Meeting> warps_;
  std::vector<Value> values_;
  Meeting block_;
  ucontext_t main_;
  void (*body_)();
  int64_t progress_ = 0;
  emulator::Clock fences_;
  emulator::Clock counts_;
  uint32_t released_;
  int counted_by_ = -1;
};

inline Block& Block::current() {
  static Block block;
  return block;
}

inline void __syncthreads() {
  Block::current().meet_block();
}
inline void __syncwarp() {
  Block::current().gather(Instruction::barrier, {}, all_lanes);
}
inline void __threadfence() {
  Block::current().fence_blocks();
}

template <typename T>
T __shfl_sync(uint32_t mask, T x, int lane) {
  auto words = Block::current().gather(
      Instruction::shuffle, {{std::bit_cast<uint32_t>(x)}}, mask);
  return std::bit_cast<T>(words[lane].words[0]);
}
template <typename T>
T __shfl_xor_sync(uint32_t mask, T x, int distance) {
  return __shfl_sync(mask, x, threadIdx.x % 32 ^ distance);
}
inline bool __any_sync(uint32_t mask, bool x) {
  auto words = Block::current().gather(Instruction::vote, {{x}}, mask);
  return std::any_of(words, words + 32, [](auto& y) { return y.words[0]; });
}

inline uint32_t __byte_perm(uint32_t a, uint32_t b, uint32_t select) {
  uint64_t bytes = uint64_t(b) << 32 | a;
  uint32_t x = 0;
  for (int i = 0; i < 4; ++i) {
    x |= uint32_t(bytes >> ((select >> 4 * i & 7) * 8) & 0xff) << 8 * i;
  }
  return x;
}
inline uint32_t __funnelshift_r(uint32_t low, uint32_t high, int n) {
  return uint32_t((uint64_t(high) << 32 | low) >> n);
}
inline float __log2f(float x) {
  return std::log2(x);
}
inline float __int_as_float(int x) {
  return std::bit_cast<float>(x);
}
template <typename T>
T __ldcg(const T* x) {
  Block::current().check_acquired();
  return *x;
}
inline uint32_t atomicInc(uint32_t* x, uint32_t last) {
  Block::current().count();
  uint32_t before = *x;
  *x = before >= last ? 0 : before + 1;
  return before;
}

KV_DEVICE uint32_t shared_address(const void* p) {
  return first_address + uint32_t(static_cast<const uint8_t*>(p) - memory);
}

template <int bytes>
KV_DEVICE void copy_async(uint32_t to, const void* from, int valid) {
  Block::current().copy({to, from, bytes, valid});
}
template <int bytes>
KV_DEVICE void copy_async(uint32_t to, const void* from) {
  copy_async<bytes>(to, from, bytes);
}
KV_DEVICE void copy_commit() {
  Block::current().commit();
}
template <int n>
KV_DEVICE void copy_wait() {
  Block::current().wait(n);
}

KV_DEVICE void load_bytes(uint32_t address, int bytes, void* to) {
  checker.load(threadIdx.x, address - first_address, bytes, to);
}
KV_DEVICE void store_bytes(uint32_t address, int bytes, const void* from) {
  checker.store(threadIdx.x, address - first_address, bytes, from);
}
template <int bytes>
KV_DEVICE uint32_t load_as(uint32_t address) {
  uint32_t x = 0;
  load_bytes(address, bytes, &x);
  return x;
}
KV_DEVICE uint32_t load_shared(uint32_t address) {
  return load_as<4>(address);
}
KV_DEVICE uint32_t load_shared_u16(uint32_t address) {
  return load_as<2>(address);
}
KV_DEVICE uint32_t load_shared_u8(uint32_t address) {
  return load_as<1>(address);
}
template <int n>
KV_DEVICE void load_shared(uint32_t address, uint32_t (&x)[n]) {
  constexpr int step = n % 4 == 0 ? 4 : n % 2 == 0 ? 2 : 1;
  for (int i = 0; i < n; i += step) {
    load_bytes(address + i * 4, step * 4, x + i);
  }
}
KV_DEVICE void store_shared(uint32_t address, uint32_t x) {
  store_bytes(address, 4, &x);
}
KV_DEVICE void store_shared_u16(uint32_t address, uint32_t x) {
  store_bytes(address, 2, &x);
}
KV_DEVICE void store_shared_u8(uint32_t address, uint32_t x) {
  store_bytes(address, 1, &x);
}

KV_DEVICE uint32_t float_bits(float x) {
  return std::bit_cast<uint32_t>(x);
}
KV_DEVICE float bits_float(uint32_t x) {
  return std::bit_cast<float>(x);
}
KV_DEVICE float power_of_two(int exponent) {
  return bits_float(uint32_t(127 + exponent) << 23);
}
KV_DEVICE uint32_t float_to_half(float x) {
  return std::bit_cast<uint16_t>(_Float16(x));
}
KV_DEVICE uint32_t pack_halves(float low, float high) {
  return float_to_half(low) | float_to_half(high) << 16;
}
KV_DEVICE float half_to_float(uint32_t half) {
  return float(std::bit_cast<_Float16>(uint16_t(half)));
}
KV_DEVICE float low_half(uint32_t x) {
  return half_to_float(x & 0xffff);
}
KV_DEVICE float high_half(uint32_t x) {
  return half_to_float(x >> 16);
}
KV_DEVICE uint32_t float_to_bfloat(float x) {
  uint32_t bits = float_bits(x);
  return std::isnan(x) ? 0x7fc0 : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}
KV_DEVICE uint32_t multiply_halves(uint32_t a, uint32_t b) {
  return pack_halves(low_half(a) * low_half(b), high_half(a) * high_half(b));
}
KV_DEVICE uint32_t e4m3_to_halves(uint32_t x) {
  return pack_halves(
      kv::e4m3_to_float(x & 0xff), kv::e4m3_to_float(x >> 8 & 0xff));
}
KV_DEVICE float exp2_approx(float x) {
  return std::exp2(x);
}

KV_DEVICE void
multiply_add(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  auto lanes = Block::current().gather(
      Instruction::product,
      {{a[0], a[1], a[2], a[3], b0, b1, 0, 0}},
      all_lanes);
  int lane = threadIdx.x % 32;
  auto half = [](uint32_t x, int i) {
    return i % 2 == 0 ? low_half(x) : high_half(x);
  };
  for (int i = 0; i < 4; ++i) {
    int row = lane / 4 + i / 2 * 8;
    int column = lane % 4 * 2 + i % 2;
    double sum = c[i];
    for (int k = 0; k < 16; ++k) {
      auto& from_a = lanes[row % 8 * 4 + k % 8 / 2].words;
      auto& from_b = lanes[column * 4 + k % 8 / 2].words;
      sum += double(half(from_a[row / 8 + k / 8 * 2], k)) *
          half(from_b[4 + k / 8], k);
    }
    c[i] = float(sum);
  }
}

KV_DEVICE uint32_t transpose(uint32_t x) {
  auto lanes =
      Block::current().gather(Instruction::transpose, {{x}}, all_lanes);
  int lane = threadIdx.x % 32;
  uint32_t y = 0;
  for (int i = 0; i < 2; ++i) {
    int row = lane % 4 * 2 + i;
    int column = lane / 4;
    uint32_t pair = lanes[row * 4 + column / 2].words[0];
    y |= (column % 2 == 0 ? pair & 0xffff : pair >> 16) << 16 * i;
  }
  return y;
}

} // namespace mlx::core::quantized_sdpa
