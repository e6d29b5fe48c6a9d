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

// Factors that the compiler does not know: it would shift instead, by the same
// units that logic and permutations wait for.
__constant__ uint32_t even_e2m1_factors[] = {512, 2};

// Codes i and i + 4 of a word of e2m1, over 2 ** 14: sign, exponent and
// significand of a code become bits 15 and 11 to 9 of a half. Ten instructions
// a word, as the two odd i and the two even i share what they can.
KV_DEVICE uint32_t e2m1_to_f16x2(uint32_t x, int i) {
  if (i % 2 == 0) {
    // The sign comes to bit 12; the sum with 7 there carries it to bit 15.
    uint32_t factor = even_e2m1_factors[i / 2];
    return multiply_add(x & 0x0f0f0f0fu, factor, 0x70007000u) & 0x8e008e00u;
  }
  // Each byte is the upper one of a half.
  uint32_t bytes = (x & 0x80808080u) | (x >> 3 & 0x0e0e0e0eu);
  return __byte_perm(bytes, 0, i == 1 ? 0x2404 : 0x3414);
}

} // namespace mlx::core::quantized_sdpa
