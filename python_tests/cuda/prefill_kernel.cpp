// One instance of a prefill kernel on the emulated GPU.

#include "mlx/backend/cuda/quantized_sdpa_prefill_wgmma.cuh"

#include INSTANCE

extern "C" void run_grid(const void* p, int blocks, int threads, int shared) {
  auto params = static_cast<const CudaParams*>(p);
  begin_blocks();
  emulator::launch(blocks, threads, shared, [=] { quantized_sdpa(*params); });
}
