// One instance of the decode kernel on the emulated GPU.

#include "mlx/backend/cuda/quantized_sdpa_decode.cuh"

#include INSTANCE

namespace mlx::core::quantized_sdpa {

alignas(1024) uint8_t memory[emulator::memory_size];

} // namespace mlx::core::quantized_sdpa

extern "C" void run_grid(
    const void* p,
    int blocks,
    int threads,
    int shared_bytes,
    const emulator::Buffer* buffers,
    int n_buffers) {
  emulator::Grid grid{
      blocks, threads, memory, 128, shared_bytes, buffers, n_buffers};
  auto params = static_cast<const CudaParams*>(p);
  emulator::launch(grid, [=] { quantized_sdpa(*params); });
}
