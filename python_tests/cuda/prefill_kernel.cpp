// One instance of a prefill kernel on the emulated GPU.

#include "mlx/backend/cuda/quantized_sdpa_prefill_wgmma.cuh"

#include INSTANCE

extern "C" void run_grid(const void* p, int blocks, int threads, int) {
  auto params = static_cast<const CudaParams*>(p);
  emulator::launch(blocks, threads, [=] { quantized_sdpa(*params); });
}
