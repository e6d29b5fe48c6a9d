// The op's primitive on a CPU stream: its Metal half runs there, and its
// commands when the stream gets to them.

#include "fake_metal.h"
#include "mlx/backend/cpu/encoder.h"
#include "mlx/quantized_sdpa_primitive.h"

namespace mlx::core::fast {

// Takes the place of the op's own, which asks the stream.
std::string unsupported_reason(
    const quantized_sdpa::Problem& problem,
    const Stream&) {
  return quantized_sdpa::unsupported_reason(
      problem, quantized_sdpa::Backend::metal);
}

quantized_sdpa::CudaDevice cuda_device_of(const Stream&) {
  return {};
}

void QuantizedScaledDotProductAttention::eval_cpu(
    const std::vector<array>& inputs,
    std::vector<array>& outputs) {
  eval_gpu(inputs, outputs);
  cpu::get_command_encoder(stream()).dispatch(fake_metal::take_commands());
}

} // namespace mlx::core::fast
