#include <stdexcept>

#include "mlx/quantized_sdpa_primitive.h"

namespace mlx::core::fast {

void QuantizedScaledDotProductAttention::eval_cpu(
    const std::vector<array>&,
    std::vector<array>&) {
  throw std::runtime_error(
      "QuantizedScaledDotProductAttention has no CPU implementation.");
}

} // namespace mlx::core::fast
