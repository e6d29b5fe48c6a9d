// One instance of the decode kernel on the emulated GPU.

#include "mlx/backend/cuda/quantized_sdpa_decode.cuh"

#include INSTANCE

#include <numeric>

namespace {

const CudaParams* params;

void body() {
  quantized_sdpa(*params);
}

} // namespace

// Blocks come in no order that a kernel may count on.
extern "C" void run_grid(const void* p, int blocks, int threads, int shared) {
  params = static_cast<const CudaParams*>(p);
  gridDim.x = blocks;
  int step = blocks * 5 / 8 + 1;
  while (std::gcd(step, blocks) != 1) {
    ++step;
  }
  for (int i = 0; i < blocks; ++i) {
    blockIdx.x = int64_t(i + 1) * step % blocks;
    Block::current().run(threads, shared, body);
  }
}
