// What the host files of the CUDA backend share: errors, the names of types in
// the text of kernels, memory of one call, launches.

#pragma once

#include <stdexcept>
#include <string>

#include "mlx/allocator.h"
#include "mlx/backend/cuda/quantized_sdpa_jit.h"
#include "mlx/backend/cuda/quantized_sdpa_params.h"

namespace mlx::core::quantized_sdpa {

[[noreturn]] inline void fail(const std::string& what) {
  throw std::runtime_error("[quantized_scaled_dot_product_attention] " + what);
}

inline const char* scalar_name(Scalar type) {
  constexpr const char* names[] = {
      "Scalar::f32",
      "Scalar::f16",
      "Scalar::bf16",
      "Scalar::boolean",
      "Scalar::e8m0",
      "Scalar::e4m3"};
  return names[int(type)];
}

// n floats that live until the stream has done what was encoded so far.
inline float* temporary(cu::CommandEncoder& encoder, int64_t n) {
  array x({int(n)}, float32, nullptr, {});
  x.set_data(allocator::malloc(x.nbytes()));
  encoder.add_temporary(x);
  return gpu_ptr<float>(x);
}

inline void launch(
    cu::CommandEncoder& encoder,
    const CudaKernel& kernel,
    CudaParams& params,
    int n_blocks,
    int threads,
    int shared_bytes) {
  void* args[] = {&params};
  encoder.add_kernel_node_raw(
      kernel.function,
      dim3(n_blocks),
      dim3(threads),
      dim3(),
      shared_bytes,
      args);
}

} // namespace mlx::core::quantized_sdpa
