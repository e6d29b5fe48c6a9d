// Kernels with and without faults of synchronization, for the emulated GPU to
// notice: run with the name of one.

#include <map>
#include <string>

#include "mlx/backend/cuda/quantized_sdpa_prefill_wgmma_ptx.cuh"

using namespace mlx::core::quantized_sdpa;
using namespace mlx::core::quantized_sdpa::prefill;

namespace {

constexpr int threads = 128;

alignas(1024) unsigned char shared[emulator::memory_size];
// In global memory.
alignas(16) uint32_t source[256];
uint32_t counter;
float partial;

int t() {
  return threadIdx.x;
}
uint32_t at(int offset) {
  return shared_address(shared) + offset;
}
// Of the next thread.
uint32_t neighbour(int distance = 1) {
  return at(4 * ((t() + distance) % threads));
}

void barrier_orders() {
  store_shared(at(4 * t()), t());
  __syncthreads();
  load_shared(neighbour());
  __syncthreads();
  store_shared(at(4 * t()), t());
}

void read_without_barrier() {
  store_shared(at(4 * t()), t());
  load_shared(neighbour());
}

void write_without_barrier() {
  store_shared(at(4 * t()), t());
  __syncthreads();
  load_shared(neighbour());
  store_shared(at(4 * t()), t());
}

void warp_barrier_orders_a_warp() {
  store_shared(at(4 * t()), t());
  __syncwarp();
  load_shared(at(4 * (t() ^ 1)));
}

void warp_barrier_for_a_block() {
  store_shared(at(4 * t()), t());
  __syncwarp();
  load_shared(neighbour(32));
}

void shuffle_for_a_barrier() {
  store_shared(at(4 * t()), t());
  __shfl_xor_sync(0xffffffff, 0.0f, 1);
  load_shared(at(4 * (t() ^ 1)));
}

void divergent_lanes() {
  if (t() % 32 < 16) {
    __syncwarp();
  } else {
    __shfl_xor_sync(0xffffffff, 0.0f, 1);
  }
}

void barrier_without_all() {
  if (t() != 5) {
    __syncthreads();
  }
}

void unseen_write() {
  shared[t()] = 1;
  __syncthreads();
  load_shared(at(0));
}

void read_of_an_atomic() {
  store_shared(at(4 * t()), 0);
  __syncthreads();
  atomicMax(reinterpret_cast<int*>(shared), t());
  load_shared(at(0));
}

void outside() {
  load_shared(at(1 << 16));
}

void copy_to_outside() {
  copy_async<16>(at(1 << 16), source);
}

void misaligned() {
  uint32_t x[2];
  load_shared(at(4), x);
}

void misaligned_copy() {
  copy_async<16>(at(0), source + 1);
}

void misaligned_global() {
  uint32_t x[4];
  load_global4(source + 2, x);
}

void outside_of_global() {
  load_global(source + 256);
}

void copy_from_outside() {
  copy_async<16>(at(0), source + 256);
}

void copy_beyond_its_size() {
  copy_async<4>(at(0), source, 8);
}

void shuffle_of_some_lanes() {
  __shfl_xor_sync(0xffff, 0.0f, 1);
}

void no_such_power_of_two() {
  power_of_two(128);
}

void copy(bool waits, bool meets) {
  copy_async<4>(at(4 * t()), source + t());
  copy_commit();
  if (waits) {
    copy_wait<0>();
  }
  if (meets) {
    __syncwarp();
  }
  load_shared(at(4 * (t() ^ 1)));
  copy_wait<0>();
}

void copy_is_awaited() {
  copy(true, true);
}
void copy_without_wait() {
  copy(false, true);
}
void copy_without_barrier() {
  copy(true, false);
}
void copy_is_never_awaited() {
  copy_async<4>(at(4 * t()), source + t());
}

void count(bool fences, bool meets, bool acquires) {
  if (fences) {
    __threadfence();
  }
  if (meets) {
    __syncthreads();
  }
  if (t() == 0) {
    atomicInc(&counter, 1);
  }
  __syncthreads();
  if (acquires) {
    __threadfence();
  }
  __ldcg(&partial);
}

void block_is_counted() {
  count(true, true, true);
}
void count_without_fence() {
  count(false, true, true);
}
void count_without_barrier() {
  count(true, false, true);
}
void parts_without_fence() {
  count(true, true, false);
}

// The blocks run one after another.
bool is_first_block() {
  static unsigned first = blockIdx.x;
  return blockIdx.x == first;
}

void count_of_another_block() {
  if (is_first_block()) {
    block_is_counted();
  } else {
    __threadfence();
    __ldcg(&partial);
  }
}

// One half hands its writes to the other.
void pass_on(bool all_arrive) {
  uint32_t barrier = at(4096);
  if (t() == 0) {
    init_barrier(barrier, all_arrive ? 64 : 2);
  }
  __syncthreads();
  if (t() < 64) {
    store_shared(at(4 * t()), t());
    if (all_arrive || t() % 32 == 0) {
      arrive(barrier);
    }
  } else {
    wait(barrier, 0);
    load_shared(at(4 * (t() - 64)));
  }
}

void barrier_of_another_block() {
  if (is_first_block()) {
    pass_on(true);
  } else {
    __syncthreads();
    wait(at(4096), 0);
  }
}

void all_arrive() {
  pass_on(true);
}

void one_arrives_for_all() {
  pass_on(false);
}

struct Steps {
  bool proxy_fence = true;
  bool register_fence = true;
  bool wait = true;
  bool late_change = false;
  bool last_wait = true;
};

void multiply(Steps steps) {
  for (int i = t(); i < 2048; i += threads) {
    store_shared4(at(1008 + 16 * i), (const uint32_t[4]){});
  }
  if (steps.proxy_fence) {
    fence_shared_writes();
  }
  __syncthreads();
  float c[8][4] = {};
  if (steps.register_fence) {
    wgmma_fence();
  }
  uint64_t a = matrix_descriptor(at(1008), 16);
  wgmma_shared<true>(c, a, matrix_descriptor(at(1008 + 8192), 16));
  wgmma_commit();
  if (steps.late_change) {
    c[0][0] += 1;
    c[0][0] = 0;
  }
  if (steps.wait) {
    wgmma_wait<0>();
  }
  __syncthreads();
  if (steps.last_wait) {
    store_shared(at(1008 + 4 * t()), 0);
    wgmma_wait<0>();
  }
}

void product() {
  multiply({});
}
void product_without_proxy_fence() {
  multiply({.proxy_fence = false});
}
void product_without_register_fence() {
  multiply({.register_fence = false});
}
void product_without_wait() {
  multiply({.wait = false});
}
void product_is_never_awaited() {
  multiply({.wait = false, .last_wait = false});
}
void accumulator_before_wait() {
  multiply({.late_change = true});
}

#define KERNEL(name) {#name, name}

const std::map<std::string, void (*)()> kernels = {
    KERNEL(barrier_orders),
    KERNEL(read_without_barrier),
    KERNEL(write_without_barrier),
    KERNEL(warp_barrier_orders_a_warp),
    KERNEL(warp_barrier_for_a_block),
    KERNEL(shuffle_for_a_barrier),
    KERNEL(divergent_lanes),
    KERNEL(barrier_without_all),
    KERNEL(unseen_write),
    KERNEL(read_of_an_atomic),
    KERNEL(outside),
    KERNEL(copy_to_outside),
    KERNEL(misaligned),
    KERNEL(misaligned_copy),
    KERNEL(misaligned_global),
    KERNEL(outside_of_global),
    KERNEL(copy_from_outside),
    KERNEL(copy_beyond_its_size),
    KERNEL(shuffle_of_some_lanes),
    KERNEL(no_such_power_of_two),
    KERNEL(copy_is_awaited),
    KERNEL(copy_without_wait),
    KERNEL(copy_without_barrier),
    KERNEL(copy_is_never_awaited),
    KERNEL(block_is_counted),
    KERNEL(count_without_fence),
    KERNEL(count_without_barrier),
    KERNEL(parts_without_fence),
    KERNEL(count_of_another_block),
    KERNEL(barrier_of_another_block),
    KERNEL(all_arrive),
    KERNEL(one_arrives_for_all),
    KERNEL(product),
    KERNEL(product_without_proxy_fence),
    KERNEL(product_without_register_fence),
    KERNEL(product_without_wait),
    KERNEL(product_is_never_awaited),
    KERNEL(accumulator_before_wait)};

} // namespace

int main(int, char** arguments) {
  emulator::Buffer buffers[] = {
      {reinterpret_cast<const char*>(source), sizeof(source)},
      {reinterpret_cast<const char*>(&partial), sizeof(partial)}};
  emulator::Grid grid{2, threads, shared, 16, 48 << 10, buffers, 2};
  emulator::launch(grid, kernels.at(arguments[1]));
}
