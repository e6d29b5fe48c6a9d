// Instructions of the GPU that C++ has no word for.

#pragma once

#include "mlx/backend/cuda/quantized_sdpa_params.h"

#define KV_DEVICE static __device__ __forceinline__

namespace mlx::core::quantized_sdpa {

constexpr uint32_t all_lanes = 0xffffffffu;

KV_DEVICE uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// Copies `bytes` of 4, 8 or 16 to shared memory; what lies behind the first
// `valid` of them is zeros and is not read.
template <int bytes>
KV_DEVICE void copy_async(uint32_t to, const void* from, int valid) {
  if constexpr (bytes == 16) {
    asm volatile(
        "cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to),
        "l"(from),
        "r"(valid));
  } else {
    asm volatile(
        "cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(to),
        "l"(from),
        "n"(bytes),
        "r"(valid));
  }
}

template <int bytes>
KV_DEVICE void copy_async(uint32_t to, const void* from) {
  if constexpr (bytes == 16) {
    asm volatile(
        "cp.async.cg.shared.global.L2::128B [%0], [%1], 16;" ::"r"(to),
        "l"(from));
  } else {
    asm volatile(
        "cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(to),
        "l"(from),
        "n"(bytes));
  }
}

KV_DEVICE void copy_commit() {
  asm volatile("cp.async.commit_group;");
}

template <int n>
KV_DEVICE void copy_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(n) : "memory");
}

KV_DEVICE uint32_t load_shared(uint32_t address) {
  uint32_t x;
  asm volatile("ld.shared.u32 %0, [%1];" : "=r"(x) : "r"(address));
  return x;
}

KV_DEVICE uint32_t load_shared_u16(uint32_t address) {
  uint16_t x;
  asm volatile("ld.shared.u16 %0, [%1];" : "=h"(x) : "r"(address));
  return x;
}

KV_DEVICE uint32_t load_shared_u8(uint32_t address) {
  uint32_t x;
  asm volatile("ld.shared.u8 %0, [%1];" : "=r"(x) : "r"(address));
  return x;
}

// Words at an address that is a multiple of their size, up to 16 bytes.
template <int n>
KV_DEVICE void load_shared(uint32_t address, uint32_t (&x)[n]) {
  if constexpr (n % 4 == 0) {
#pragma unroll
    for (int i = 0; i < n; i += 4) {
      asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                   : "=r"(x[i]), "=r"(x[i + 1]), "=r"(x[i + 2]), "=r"(x[i + 3])
                   : "r"(address + i * 4));
    }
  } else if constexpr (n % 2 == 0) {
#pragma unroll
    for (int i = 0; i < n; i += 2) {
      asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];"
                   : "=r"(x[i]), "=r"(x[i + 1])
                   : "r"(address + i * 4));
    }
  } else {
#pragma unroll
    for (int i = 0; i < n; ++i) {
      x[i] = load_shared(address + i * 4);
    }
  }
}

KV_DEVICE void store_shared(uint32_t address, uint32_t x) {
  asm volatile("st.shared.u32 [%0], %1;" ::"r"(address), "r"(x) : "memory");
}

KV_DEVICE void store_shared_u16(uint32_t address, uint32_t x) {
  asm volatile("st.shared.u16 [%0], %1;" ::"r"(address), "h"(uint16_t(x))
               : "memory");
}

KV_DEVICE void store_shared_u8(uint32_t address, uint32_t x) {
  asm volatile("st.shared.u8 [%0], %1;" ::"r"(address), "r"(x) : "memory");
}

// c += a b with a [16, 16] and b [16, 8] in float16, c in float32.
KV_DEVICE void
multiply_add(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Of a matrix of 8 x 8 halves, two a lane.
KV_DEVICE uint32_t transpose(uint32_t x) {
  uint32_t y;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;"
               : "=r"(y)
               : "r"(x));
  return y;
}

KV_DEVICE float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

KV_DEVICE uint32_t float_bits(float x) {
  return __float_as_uint(x);
}

KV_DEVICE float bits_float(uint32_t x) {
  return __uint_as_float(x);
}

// 2 ** exponent, for normal results.
KV_DEVICE float power_of_two(int exponent) {
  return bits_float(uint32_t(127 + exponent) << 23);
}

KV_DEVICE uint32_t pack_halves(float low, float high) {
  uint32_t x;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(x) : "f"(high), "f"(low));
  return x;
}

KV_DEVICE float half_to_float(uint32_t half) {
  float x;
  asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(uint16_t(half)));
  return x;
}

KV_DEVICE float low_half(uint32_t x) {
  return half_to_float(x & 0xffff);
}

KV_DEVICE float high_half(uint32_t x) {
  return half_to_float(x >> 16);
}

KV_DEVICE uint32_t float_to_bfloat(float x) {
  uint16_t y;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y) : "f"(x));
  return y;
}

KV_DEVICE uint32_t multiply_halves(uint32_t a, uint32_t b) {
  uint32_t x;
  asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(x) : "r"(a), "r"(b));
  return x;
}

// The two e4m3 values in the low half of x as halves.
KV_DEVICE uint32_t e4m3_to_halves(uint32_t x) {
#if __CUDA_ARCH__ >= 890
  uint32_t y;
  asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(y) : "h"(uint16_t(x)));
  return y;
#else
  uint32_t spread = __byte_perm(x, 0, 0x1404);
  uint32_t halves = (spread & 0x80008000u) | ((spread & 0x7f007f00u) >> 1);
  uint32_t nan = ((spread & 0x7f007f00u) + 0x01000100u) & 0x80008000u;
  // 256: the exponents' biases are 15 and 7. Only NaN carries into its sign.
  return multiply_halves(halves, 0x5c005c00u) | (nan >> 2);
#endif
}

} // namespace mlx::core::quantized_sdpa
