#include <stdexcept>

#include "mlx/quantized_sdpa_primitive.h"

namespace mlx::core::fast {

quantized_sdpa::CudaDevice cuda_device_of(const Stream&) {
  return {};
}

void QuantizedScaledDotProductAttention::eval_gpu(
    const std::vector<array>&,
    std::vector<array>&) {
  throw std::runtime_error(
      "QuantizedScaledDotProductAttention has no GPU implementation.");
}

} // namespace mlx::core::fast
