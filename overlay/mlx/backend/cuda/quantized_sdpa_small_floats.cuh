// Floats of 4 and 8 bits to pairs of float16.

#pragma once

#include "mlx/backend/cuda/quantized_sdpa_ptx.cuh"

namespace mlx::core::quantized_sdpa {

// The two e4m3 values in the low half of x, where no instruction converts them.
KV_DEVICE uint32_t e4m3_to_f16x2_by_bits(uint32_t x) {
  uint32_t spread = __byte_perm(x, 0, 0x1404);
  uint32_t halves = (spread & 0x80008000u) | ((spread & 0x7f007f00u) >> 1);
  uint32_t nan = ((spread & 0x7f007f00u) + 0x01000100u) & 0x80008000u;
  // 256: the exponents' biases are 15 and 7. Only NaN carries into its sign.
  return multiply_f16x2(halves, 0x5c005c00u) | (nan >> 2);
}

KV_DEVICE uint32_t e4m3_to_f16x2(uint32_t x) {
#if __CUDA_ARCH__ >= 890
  return convert_e4m3x2(x);
#else
  return e4m3_to_f16x2_by_bits(x);
#endif
}

} // namespace mlx::core::quantized_sdpa
