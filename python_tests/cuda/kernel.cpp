// One instance of the decode kernel on the emulated GPU.

#include "mlx/backend/cuda/quantized_sdpa_decode.cuh"

#include INSTANCE

namespace {

const CudaParams* params;

void body() {
  quantized_sdpa(*params);
}

} // namespace

extern "C" void run_grid(const void* p, int blocks, int threads, int shared) {
  params = static_cast<const CudaParams*>(p);
  gridDim.x = blocks;
  for (int i = 0; i < blocks; ++i) {
    blockIdx.x = i;
    Block::current().run(threads, shared, body);
  }
}
