// Kernels with and without faults of synchronization, for the emulated GPU to
// notice: run with the name of one.

#include <map>
#include <string>

#include "mlx/backend/cuda/quantized_sdpa_prefill_wgmma_ptx.cuh"

using namespace mlx::core::quantized_sdpa::prefill;

namespace {

constexpr int threads = 128;

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

void misaligned() {
  uint32_t x, y;
  load_shared2(at(4), x, y);
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
  store_shared(at(1008 + 4 * t()), 0);
  wgmma_wait<0>();
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
    KERNEL(misaligned),
    KERNEL(all_arrive),
    KERNEL(one_arrives_for_all),
    KERNEL(product),
    KERNEL(product_without_proxy_fence),
    KERNEL(product_without_register_fence),
    KERNEL(product_without_wait),
    KERNEL(accumulator_before_wait)};

} // namespace

int main(int, char** arguments) {
  begin_blocks();
  emulator::launch(2, threads, 48 << 10, kernels.at(arguments[1]));
}
