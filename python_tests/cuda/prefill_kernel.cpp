// One instance of a prefill kernel on the emulated GPU.

#include "mlx/backend/cuda/quantized_sdpa_prefill_wgmma.cuh"

#include INSTANCE

extern "C" {

alignas(1024) uint8_t shared[emulator::memory_size];

void run_grid(
    const void* p,
    int blocks,
    int threads,
    int shared_bytes,
    const emulator::Buffer* buffers,
    int n_buffers) {
  emulator::Grid grid{
      blocks, threads, shared, 16, shared_bytes, buffers, n_buffers};
  auto params = static_cast<const CudaParams*>(p);
  emulator::launch(grid, [=] { quantized_sdpa(*params); });
}
}
