// PTX that the attention kernels use, without CUDA's headers so that the text
// compiles at run time too.

#pragma once

#include "mlx/backend/common/kv_codec.h"

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define QUANTIZED_SDPA_HAS_WGMMA 1
#else
#define QUANTIZED_SDPA_HAS_WGMMA 0
#endif

namespace mlx::core::quantized_sdpa::prefill {

#define PTX_FN __device__ __forceinline__

PTX_FN uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// Pairs of float16 in a register, the first one low.

PTX_FN uint32_t pack_f16(float low, float high) {
  uint32_t y;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
  return y;
}

PTX_FN uint32_t pack_bf16(float low, float high) {
  uint32_t y;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
  return y;
}

PTX_FN float f16_to_float(uint32_t bits) {
  float y;
  asm("{.reg .b16 h, unused;\n"
      "mov.b32 {h, unused}, %1;\n"
      "cvt.f32.f16 %0, h;}\n"
      : "=f"(y)
      : "r"(bits));
  return y;
}

PTX_FN float bf16_to_float(uint32_t bits) {
  return __uint_as_float(bits << 16);
}

PTX_FN uint32_t multiply_f16x2(uint32_t a, uint32_t b) {
  uint32_t y;
  asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(y) : "r"(a), "r"(b));
  return y;
}

PTX_FN uint32_t fma_f16x2(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t y;
  asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(y) : "r"(a), "r"(b), "r"(c));
  return y;
}

// Two e4m3 codes.
PTX_FN uint32_t e4m3_pair(uint32_t codes) {
#if __CUDA_ARCH__ >= 890
  uint32_t y;
  asm("{.reg .b16 pair, unused;\n"
      "mov.b32 {pair, unused}, %1;\n"
      "cvt.rn.f16x2.e4m3x2 %0, pair;}\n"
      : "=r"(y)
      : "r"(codes));
  return y;
#else
  return pack_f16(
      kv::Mxfp8::decode(codes & 0xff, 0), kv::Mxfp8::decode(codes & 0xffff, 1));
#endif
}

// (x & mask) | y
PTX_FN uint32_t mask_or(uint32_t x, uint32_t mask, uint32_t y) {
  uint32_t z;
  asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(z) : "r"(x), "r"(mask), "r"(y));
  return z;
}

PTX_FN float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

PTX_FN float reciprocal_approx(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// 2 ** exponent, for exponents of normal floats.
PTX_FN float power_of_two(int exponent) {
  return __int_as_float((exponent + 127) << 23);
}

PTX_FN int exponent_of(float x) {
  return ((__float_as_int(x) >> 23) & 255) - 127;
}

// Shared memory.

PTX_FN uint32_t load_shared(uint32_t address) {
  uint32_t y;
  asm volatile("ld.shared.u32 %0, [%1];" : "=r"(y) : "r"(address));
  return y;
}

PTX_FN void load_shared2(uint32_t address, uint32_t& x, uint32_t& y) {
  asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];"
               : "=r"(x), "=r"(y)
               : "r"(address)
               : "memory");
}

PTX_FN void store_shared(uint32_t address, uint32_t x) {
  asm volatile("st.shared.u32 [%0], %1;" ::"r"(address), "r"(x) : "memory");
}

PTX_FN void store_shared2(uint32_t address, uint32_t x, uint32_t y) {
  asm volatile("st.shared.v2.u32 [%0], {%1, %2};" ::"r"(address), "r"(x), "r"(y)
               : "memory");
}

PTX_FN void store_shared4(uint32_t address, const uint32_t* x) {
  asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(address),
               "r"(x[0]),
               "r"(x[1]),
               "r"(x[2]),
               "r"(x[3])
               : "memory");
}

PTX_FN void store_shared_half(uint32_t address, uint32_t x) {
  asm volatile(
      "{.reg .b16 h, unused;\n"
      "mov.b32 {h, unused}, %1;\n"
      "st.shared.b16 [%0], h;}\n" ::"r"(address),
      "r"(x)
      : "memory");
}

// Codes that no other kernel of the stream writes meanwhile.
PTX_FN void load_global4(const uint32_t* p, uint32_t* x) {
  asm volatile("ld.global.nc.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
               : "l"(p));
}

PTX_FN void load_global2(const uint32_t* p, uint32_t* x) {
  asm volatile("ld.global.nc.v2.u32 {%0, %1}, [%2];"
               : "=r"(x[0]), "=r"(x[1])
               : "l"(p));
}

PTX_FN uint32_t load_global(const uint32_t* p) {
  uint32_t x;
  asm volatile("ld.global.nc.u32 %0, [%1];" : "=r"(x) : "l"(p));
  return x;
}

// mma.sync, float16 in and float32 out.

PTX_FN void load_matrices(uint32_t address, uint32_t (&x)[4]) {
  asm volatile(
      "ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
      : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
      : "r"(address)
      : "memory");
}

PTX_FN void load_matrices_transposed(uint32_t address, uint32_t (&x)[4]) {
  asm volatile(
      "ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
      : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
      : "r"(address)
      : "memory");
}

// c += a b with a [16, 16] and b [16, 8].
PTX_FN void
mma_f16(float* c, const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

} // namespace mlx::core::quantized_sdpa::prefill
