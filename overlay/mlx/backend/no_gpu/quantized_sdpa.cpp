#include <stdexcept>

#include "mlx/quantized_sdpa_primitive.h"

namespace mlx::core::fast {

std::string gpu_unsupported_reason(
    const quantized_sdpa::Problem& problem,
    const Stream&) {
  return quantized_sdpa::unsupported_reason(
      problem, quantized_sdpa::Backend::none);
}

void QuantizedScaledDotProductAttention::eval_gpu(
    const std::vector<array>&,
    std::vector<array>&) {
  throw std::runtime_error(
      "QuantizedScaledDotProductAttention has no GPU implementation.");
}

} // namespace mlx::core::fast
