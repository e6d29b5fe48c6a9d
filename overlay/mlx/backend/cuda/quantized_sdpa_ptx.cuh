// Instructions of the GPU that C++ has no word for, and bits of floats. Those
// of sm_90a alone are in quantized_sdpa_prefill_wgmma_ptx.cuh. CUDA's headers
// are not needed: the text compiles at run time.

#pragma once

#include "mlx/backend/cuda/quantized_sdpa_params.h"

#define KV_DEVICE __device__ __forceinline__

namespace mlx::core::quantized_sdpa {

constexpr uint32_t all_lanes = 0xffffffffu;

// ---------------------------------------------------------------------------
// Floats. Pairs of float16 or bfloat16 lie in a register, the first one low.

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

KV_DEVICE int exponent_of(float x) {
  return int(float_bits(x) >> 23 & 255) - 127;
}

KV_DEVICE float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

KV_DEVICE uint32_t pack_f16(float low, float high) {
  uint32_t x;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(x) : "f"(high), "f"(low));
  return x;
}

KV_DEVICE uint32_t pack_bf16(float low, float high) {
  uint32_t x;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(x) : "f"(high), "f"(low));
  return x;
}

// Of the low half.
KV_DEVICE float f16_to_float(uint32_t bits) {
  float x;
  asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(uint16_t(bits)));
  return x;
}

KV_DEVICE float bf16_to_float(uint32_t bits) {
  return bits_float(bits << 16);
}

// Subnormal numbers too.
KV_DEVICE uint32_t subtract_f16x2(uint32_t a, uint32_t b) {
  uint32_t x;
  asm("sub.rn.f16x2 %0, %1, %2;" : "=r"(x) : "r"(a), "r"(b));
  return x;
}

KV_DEVICE uint32_t multiply_f16x2(uint32_t a, uint32_t b) {
  uint32_t x;
  asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(x) : "r"(a), "r"(b));
  return x;
}

KV_DEVICE uint32_t fma_f16x2(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t x;
  asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(x) : "r"(a), "r"(b), "r"(c));
  return x;
}

#if __CUDA_ARCH__ >= 890
// The two e4m3 values in the low half of x.
KV_DEVICE uint32_t convert_e4m3x2(uint32_t x) {
  uint32_t y;
  asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(y) : "h"(uint16_t(x)));
  return y;
}
#endif

// x & mask, before anything that the compiler would do first.
KV_DEVICE uint32_t keep_bits(uint32_t x, uint32_t mask) {
  uint32_t y;
  asm("and.b32 %0, %1, %2;" : "=r"(y) : "r"(x), "r"(mask));
  return y;
}

// a b + c, in one instruction.
KV_DEVICE uint32_t multiply_add(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t x;
  asm("mad.lo.u32 %0, %1, %2, %3;" : "=r"(x) : "r"(a), "r"(b), "r"(c));
  return x;
}

// ---------------------------------------------------------------------------
// Shared memory, at addresses that are multiples of what is read or written

KV_DEVICE uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
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

// As many words at a time as divide n, up to four.
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

KV_DEVICE void store_shared2(uint32_t address, uint32_t x, uint32_t y) {
  asm volatile("st.shared.v2.u32 [%0], {%1, %2};" ::"r"(address), "r"(x), "r"(y)
               : "memory");
}

KV_DEVICE void store_shared4(uint32_t address, const uint32_t* x) {
  asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(address),
               "r"(x[0]),
               "r"(x[1]),
               "r"(x[2]),
               "r"(x[3])
               : "memory");
}

KV_DEVICE void store_shared_u16(uint32_t address, uint32_t x) {
  asm volatile("st.shared.u16 [%0], %1;" ::"r"(address), "h"(uint16_t(x))
               : "memory");
}

KV_DEVICE void store_shared_u8(uint32_t address, uint32_t x) {
  asm volatile("st.shared.u8 [%0], %1;" ::"r"(address), "r"(x) : "memory");
}

// ---------------------------------------------------------------------------
// Global memory that no other kernel of the stream writes meanwhile

KV_DEVICE uint32_t load_global(const uint32_t* p) {
  uint32_t x;
  asm volatile("ld.global.nc.u32 %0, [%1];" : "=r"(x) : "l"(p));
  return x;
}

KV_DEVICE void load_global2(const uint32_t* p, uint32_t* x) {
  asm volatile("ld.global.nc.v2.u32 {%0, %1}, [%2];"
               : "=r"(x[0]), "=r"(x[1])
               : "l"(p));
}

KV_DEVICE void load_global4(const uint32_t* p, uint32_t* x) {
  asm volatile("ld.global.nc.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
               : "l"(p));
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

// ---------------------------------------------------------------------------
// Matrices, by all lanes of a warp

// c += a b with a [16, 16] and b [16, 8] in float16, c in float32.
KV_DEVICE void
mma_f16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
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

// Four matrices of 8 x 8 halves; each lane has the address of a row.
KV_DEVICE void load_matrices(uint32_t address, uint32_t (&x)[4]) {
  asm volatile(
      "ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
      : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
      : "r"(address)
      : "memory");
}

KV_DEVICE void load_matrices_transposed(uint32_t address, uint32_t (&x)[4]) {
  asm volatile(
      "ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
      : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
      : "r"(address)
      : "memory");
}

} // namespace mlx::core::quantized_sdpa
