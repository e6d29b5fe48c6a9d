// The intrinsics of Apple's compiler that MLX's attention kernels use, by the
// operations of the executor.

#include <math.h>

#include "executor.h"

extern "C" {

uint64_t
msl_simd(int op, int type, int width, uint64_t x, uint64_t fill, int argument);
void msl_threadgroup_barrier(int flags);
void msl_simdgroup_barrier(int flags);

#define AIR(type, number, name, ...)                   \
  type air_##number(__VA_ARGS__) __asm__("air." name); \
  type air_##number(__VA_ARGS__)

static float simd_float(int op, int width, float x, int argument) {
  uint64_t bits = __builtin_bit_cast(uint32_t, x);
  uint64_t y = msl_simd(op, msl::type_f32, width, bits, bits, argument);
  return __builtin_bit_cast(float, uint32_t(y));
}

AIR(float, 0, "simd_sum.f32", float x) {
  return simd_float(msl::op_sum, 32, x, 0);
}
AIR(float, 1, "simd_max.f32", float x) {
  return simd_float(msl::op_max, 32, x, 0);
}
AIR(float, 2, "simd_min.f32", float x) {
  return simd_float(msl::op_min, 32, x, 0);
}
AIR(float, 3, "simd_shuffle_xor.f32", float x, int16_t n) {
  return simd_float(msl::op_shuffle_xor, 32, x, n);
}
AIR(void, 4, "wg.barrier", int flags, int) {
  msl_threadgroup_barrier(flags);
}
AIR(void, 5, "simdgroup.barrier", int flags, int) {
  msl_simdgroup_barrier(flags);
}
AIR(float, 6, "fast_exp.f32", float x) {
  return expf(x);
}
AIR(float, 7, "fast_exp2.f32", float x) {
  return exp2f(x);
}
AIR(float, 8, "log2.f32", float x) {
  return log2f(x);
}
AIR(float, 9, "fmax.f32", float x, float y) {
  return __builtin_fmaxf(x, y);
}
AIR(int, 10, "max.s.i32", int x, int y) {
  return x > y ? x : y;
}
AIR(int, 11, "min.s.i32", int x, int y) {
  return x < y ? x : y;
}
AIR(int8_t, 12, "normalize_function_constant_predicate.i8", int8_t x) {
  return x != 0;
}
AIR(float, 13, "convert.f.f32.s.i32", int x) {
  return float(x);
}
AIR(float, 14, "convert.f.f32.u.i32", unsigned x) {
  return float(x);
}
AIR(float, 15, "convert.f.f32.u.i8", uint8_t x) {
  return float(x);
}
AIR(float, 16, "convert.f.f32.u.i16", uint16_t x) {
  return float(x);
}
AIR(_Float16, 17, "convert.f.f16.s.i32", int x) {
  return _Float16(x);
}
AIR(_Float16, 18, "convert.f.f16.u.i32", unsigned x) {
  return _Float16(x);
}
AIR(_Float16, 19, "convert.f.f16.u.i8", uint8_t x) {
  return _Float16(x);
}
AIR(_Float16, 20, "convert.f.f16.u.i16", uint16_t x) {
  return _Float16(x);
}
}
