// The same for what only the decode kernel does: asynchronous copies, and
// blocks that count themselves.

#include <map>
#include <string>

#include "mlx/backend/cuda/quantized_sdpa_ptx.cuh"

using namespace mlx::core::quantized_sdpa;

namespace {

alignas(16) uint32_t source[256];
uint32_t counter;
float partial;

uint32_t at(int offset) {
  return shared_address(memory) + offset;
}

void copy(bool waits, bool meets) {
  copy_async<4>(at(4 * threadIdx.x), source + threadIdx.x);
  copy_commit();
  if (waits) {
    copy_wait<0>();
  }
  if (meets) {
    __syncwarp();
  }
  load_shared(at(4 * (threadIdx.x ^ 1)));
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

void count(bool fences, bool meets, bool acquires) {
  if (fences) {
    __threadfence();
  }
  if (meets) {
    __syncthreads();
  }
  if (threadIdx.x == 0) {
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

#define KERNEL(name) {#name, name}

const std::map<std::string, void (*)()> kernels = {
    KERNEL(copy_is_awaited),
    KERNEL(copy_without_wait),
    KERNEL(copy_without_barrier),
    KERNEL(block_is_counted),
    KERNEL(count_without_fence),
    KERNEL(count_without_barrier),
    KERNEL(parts_without_fence)};

} // namespace

int main(int, char** arguments) {
  Block::current().run(64, 4096, kernels.at(arguments[1]));
}
