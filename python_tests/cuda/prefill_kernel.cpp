// One instance of a prefill kernel on the emulated GPU.

#include "mlx/backend/cuda/quantized_sdpa_prefill_wgmma.cuh"

#include INSTANCE

extern "C" {

alignas(1024) uint8_t shared[emulator::memory_size];

void run_grid(const void* p, int blocks, int threads, int shared_bytes) {
  auto params = static_cast<const CudaParams*>(p);
  emulator::launch({blocks, threads, shared, 16, shared_bytes}, [=] {
    quantized_sdpa(*params);
  });
}
}
