// Single numbers of an array, by their type.

#pragma once

#include "mlx/backend/common/kv_codec.h"
#include "mlx/backend/cuda/quantized_sdpa_ptx.cuh"

#define KV_INFINITY ::mlx::core::quantized_sdpa::bits_float(0x7f800000u)

namespace mlx::core::quantized_sdpa {

KV_DEVICE constexpr int scalar_bytes(Scalar type) {
  return type == Scalar::f32                        ? 4
      : type == Scalar::f16 || type == Scalar::bf16 ? 2
                                                    : 1;
}

// The stored bits, to be decoded when they have come.
template <Scalar type>
KV_DEVICE uint32_t load_scalar_bits(const uint8_t* from) {
  if constexpr (scalar_bytes(type) == 4) {
    return __ldg(reinterpret_cast<const uint32_t*>(from));
  } else if constexpr (scalar_bytes(type) == 2) {
    return __ldg(reinterpret_cast<const uint16_t*>(from));
  } else {
    return __ldg(from);
  }
}

template <Scalar type>
KV_DEVICE float decode_scalar(uint32_t bits) {
  if constexpr (type == Scalar::f32) {
    return bits_float(bits);
  } else if constexpr (type == Scalar::f16) {
    return f16_to_float(bits);
  } else if constexpr (type == Scalar::bf16) {
    return bf16_to_float(bits);
  } else if constexpr (type == Scalar::e8m0) {
    return kv::e8m0_to_float(bits);
  } else {
    static_assert(type == Scalar::e4m3);
    return kv::e4m3_to_float(bits);
  }
}

template <Scalar type>
KV_DEVICE float load_scalar(const uint8_t* from) {
  return decode_scalar<type>(load_scalar_bits<type>(from));
}

} // namespace mlx::core::quantized_sdpa
