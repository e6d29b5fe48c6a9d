// The Metal standard library as far as attention kernels use it, for Clang.
// One text for three readers: C++ (to execute), and C++ for OpenCL with and
// without a generic address space (to accept or refuse).

#pragma once

#define METAL_FUNC inline __attribute__((always_inline))
#define MSL_CONVERGENT __attribute__((convergent))

#define M_LOG2E_F 1.44269504088896340735992468100189214f
#define M_LN2_F 0.693147180559945309417232121458176568f
#define M_PI_F 3.14159265358979323846264338327950288f
#define INFINITY __builtin_inff()
#define NAN __builtin_nanf("")
#define HUGE_VALF __builtin_inff()
#define FLT_MAX 3.402823466e+38f
#define FLT_MIN 1.175494351e-38f
#define FLT_EPSILON 1.1920928955078125e-7f
#define HALF_MAX ((half)65504.0f)
#define INT_MAX 0x7fffffff
#define INT_MIN (-0x7fffffff - 1)
#define UINT_MAX 0xffffffffu

// ---------------------------------------------------------------------------
// Types
// ---------------------------------------------------------------------------

typedef unsigned char uchar;
typedef unsigned short ushort;
typedef unsigned int uint;
typedef unsigned long ulong;
typedef signed char int8_t;
typedef uchar uint8_t;
typedef short int16_t;
typedef ushort uint16_t;
typedef int int32_t;
typedef uint uint32_t;
typedef long int64_t;
typedef ulong uint64_t;
typedef __SIZE_TYPE__ size_t;
typedef __PTRDIFF_TYPE__ ptrdiff_t;
typedef __bf16 bfloat;
#ifndef __OPENCL_CPP_VERSION__
typedef _Float16 half;
#endif

template <typename T, int N>
using msl_vec = T __attribute__((ext_vector_type(N)));

// Clang's vectors have no constructors of several arguments: a function-like
// macro sends float2(a, b) to msl_make_float2.
#define MSL_VECTORS(T)                                  \
  typedef T T##2 __attribute__((ext_vector_type(2)));   \
  typedef T T##3 __attribute__((ext_vector_type(3)));   \
  typedef T T##4 __attribute__((ext_vector_type(4)));   \
  METAL_FUNC T##2 msl_make_##T##2(T a) {                \
    return (T##2)(a);                                   \
  }                                                     \
  METAL_FUNC T##2 msl_make_##T##2(T a, T b) {           \
    return (T##2){a, b};                                \
  }                                                     \
  template <typename U>                                 \
  METAL_FUNC T##2 msl_make_##T##2(msl_vec<U, 2> v) {    \
    return __builtin_convertvector(v, T##2);            \
  }                                                     \
  METAL_FUNC T##3 msl_make_##T##3(T a) {                \
    return (T##3)(a);                                   \
  }                                                     \
  METAL_FUNC T##3 msl_make_##T##3(T a, T b, T c) {      \
    return (T##3){a, b, c};                             \
  }                                                     \
  template <typename U>                                 \
  METAL_FUNC T##3 msl_make_##T##3(msl_vec<U, 3> v) {    \
    return __builtin_convertvector(v, T##3);            \
  }                                                     \
  METAL_FUNC T##4 msl_make_##T##4(T a) {                \
    return (T##4)(a);                                   \
  }                                                     \
  METAL_FUNC T##4 msl_make_##T##4(T a, T b, T c, T d) { \
    return (T##4){a, b, c, d};                          \
  }                                                     \
  METAL_FUNC T##4 msl_make_##T##4(T##2 a, T##2 b) {     \
    return (T##4){a.x, a.y, b.x, b.y};                  \
  }                                                     \
  template <typename U>                                 \
  METAL_FUNC T##4 msl_make_##T##4(msl_vec<U, 4> v) {    \
    return __builtin_convertvector(v, T##4);            \
  }
MSL_VECTORS(char)
MSL_VECTORS(uchar)
MSL_VECTORS(short)
MSL_VECTORS(ushort)
MSL_VECTORS(int)
MSL_VECTORS(uint)
MSL_VECTORS(long)
MSL_VECTORS(ulong)
MSL_VECTORS(half)
MSL_VECTORS(bfloat)
MSL_VECTORS(float)

#define char2(...) msl_make_char2(__VA_ARGS__)
#define char3(...) msl_make_char3(__VA_ARGS__)
#define char4(...) msl_make_char4(__VA_ARGS__)
#define uchar2(...) msl_make_uchar2(__VA_ARGS__)
#define uchar3(...) msl_make_uchar3(__VA_ARGS__)
#define uchar4(...) msl_make_uchar4(__VA_ARGS__)
#define short2(...) msl_make_short2(__VA_ARGS__)
#define short3(...) msl_make_short3(__VA_ARGS__)
#define short4(...) msl_make_short4(__VA_ARGS__)
#define ushort2(...) msl_make_ushort2(__VA_ARGS__)
#define ushort3(...) msl_make_ushort3(__VA_ARGS__)
#define ushort4(...) msl_make_ushort4(__VA_ARGS__)
#define int2(...) msl_make_int2(__VA_ARGS__)
#define int3(...) msl_make_int3(__VA_ARGS__)
#define int4(...) msl_make_int4(__VA_ARGS__)
#define uint2(...) msl_make_uint2(__VA_ARGS__)
#define uint3(...) msl_make_uint3(__VA_ARGS__)
#define uint4(...) msl_make_uint4(__VA_ARGS__)
#define long2(...) msl_make_long2(__VA_ARGS__)
#define ulong2(...) msl_make_ulong2(__VA_ARGS__)
#define ulong3(...) msl_make_ulong3(__VA_ARGS__)
#define half2(...) msl_make_half2(__VA_ARGS__)
#define half3(...) msl_make_half3(__VA_ARGS__)
#define half4(...) msl_make_half4(__VA_ARGS__)
#define bfloat2(...) msl_make_bfloat2(__VA_ARGS__)
#define bfloat4(...) msl_make_bfloat4(__VA_ARGS__)
#define float2(...) msl_make_float2(__VA_ARGS__)
#define float3(...) msl_make_float3(__VA_ARGS__)
#define float4(...) msl_make_float4(__VA_ARGS__)

template <typename To, typename From>
METAL_FUNC To as_type(From x) {
  static_assert(sizeof(To) == sizeof(From), "as_type keeps the size");
  return __builtin_bit_cast(To, x);
}

// ---------------------------------------------------------------------------
// What the executor does
// ---------------------------------------------------------------------------

// Kept in step with runtime/executor.h.
enum msl_op {
  msl_sum,
  msl_product,
  msl_min,
  msl_max,
  msl_and,
  msl_or,
  msl_xor,
  msl_prefix_inclusive_sum,
  msl_prefix_exclusive_sum,
  msl_prefix_inclusive_product,
  msl_prefix_exclusive_product,
  msl_shuffle,
  msl_shuffle_xor,
  msl_shuffle_down,
  msl_shuffle_up,
  msl_rotate_down,
  msl_rotate_up,
  msl_fill_down,
  msl_fill_up,
  msl_ballot,
  msl_converge,
};
enum msl_type {
  msl_i8,
  msl_u8,
  msl_i16,
  msl_u16,
  msl_i32,
  msl_u32,
  msl_i64,
  msl_u64,
  msl_f16,
  msl_bf16,
  msl_f32,
};

extern "C" {
// width: lanes that work together, 32 or 4.
ulong msl_simd(int op, int type, int width, ulong x, ulong fill, int argument)
    MSL_CONVERGENT;
float2 msl_mma(float2 a, float2 b, float2 c) MSL_CONVERGENT;
void msl_threadgroup_barrier(int flags) MSL_CONVERGENT;
void msl_simdgroup_barrier(int flags) MSL_CONVERGENT;
threadgroup void* msl_threadgroup_memory(int key, size_t bytes);
int msl_lane();
ulong msl_atomic_device(
    int op,
    int type,
    volatile device void* object,
    ulong x,
    ulong expected);
ulong msl_atomic_threadgroup(
    int op,
    int type,
    volatile threadgroup void* object,
    ulong x,
    ulong expected);

float expf(float);
float exp2f(float);
float logf(float);
float log2f(float);
float log10f(float);
float powf(float, float);
float sinf(float);
float cosf(float);
float tanf(float);
float asinf(float);
float acosf(float);
float atanf(float);
float sinhf(float);
float coshf(float);
float tanhf(float);
float asinhf(float);
float acoshf(float);
float atanhf(float);
float atan2f(float, float);
float fmodf(float, float);
float ldexpf(float, int);
}

namespace metal {

template <typename T, int N>
using vec = ::msl_vec<T, N>;

// ---------------------------------------------------------------------------
// Type traits and limits
// ---------------------------------------------------------------------------

template <typename T, T v>
struct integral_constant {
  static constexpr constant T value = v;
  typedef T value_type;
  constexpr operator T() const thread {
    return v;
  }
};
template <bool B>
using bool_constant = integral_constant<bool, B>;
using true_type = bool_constant<true>;
using false_type = bool_constant<false>;

template <typename A, typename B>
struct is_same : false_type {};
template <typename A>
struct is_same<A, A> : true_type {};
template <typename A, typename B>
constexpr constant bool is_same_v = __is_same(A, B);
template <typename A, typename B>
constexpr constant bool is_convertible_v = __is_convertible_to(A, B);
template <typename T>
constexpr constant bool is_integral_v = __is_integral(T);
template <typename T>
constexpr constant bool is_floating_point_v = __is_floating_point(T);
template <typename T>
struct is_integral : bool_constant<__is_integral(T)> {};
template <typename T>
struct is_floating_point : bool_constant<__is_floating_point(T)> {};
template <typename T>
struct is_unsigned : bool_constant<__is_unsigned(T)> {};
template <typename T>
using remove_cv_t = __remove_cv(T);

template <typename T>
struct remove_addrspace {
  typedef T type;
};
template <typename T>
struct remove_addrspace<device T> {
  typedef T type;
};
template <typename T>
struct remove_addrspace<threadgroup T> {
  typedef T type;
};
template <typename T>
struct remove_addrspace<constant T> {
  typedef T type;
};
template <typename T>
using remove_addrspace_t = typename remove_addrspace<T>::type;

template <bool C, typename A, typename B>
struct conditional {
  typedef A type;
};
template <typename A, typename B>
struct conditional<false, A, B> {
  typedef B type;
};
template <bool C, typename A, typename B>
using conditional_t = typename conditional<C, A, B>::type;
template <bool C, typename T = void>
struct enable_if {};
template <typename T>
struct enable_if<true, T> {
  typedef T type;
};
template <bool C, typename T = void>
using enable_if_t = typename enable_if<C, T>::type;

template <typename T>
struct numeric_limits;
#define MSL_INTEGER_LIMITS(T, low, high) \
  template <>                            \
  struct numeric_limits<T> {             \
    static constexpr T max() {           \
      return high;                       \
    }                                    \
    static constexpr T min() {           \
      return low;                        \
    }                                    \
    static constexpr T lowest() {        \
      return low;                        \
    }                                    \
  };
MSL_INTEGER_LIMITS(uint8_t, 0, 255)
MSL_INTEGER_LIMITS(uint16_t, 0, 65535)
MSL_INTEGER_LIMITS(uint32_t, 0, 0xffffffffu)
MSL_INTEGER_LIMITS(uint64_t, 0, 0xfffffffffffffffful)
MSL_INTEGER_LIMITS(int8_t, -128, 127)
MSL_INTEGER_LIMITS(int16_t, -32768, 32767)
MSL_INTEGER_LIMITS(int32_t, -2147483647 - 1, 2147483647)
MSL_INTEGER_LIMITS(int64_t, -9223372036854775807l - 1, 9223372036854775807l)
#define MSL_FLOAT_LIMITS(T, high, small) \
  template <>                            \
  struct numeric_limits<T> {             \
    static constexpr T max() {           \
      return (T)high;                    \
    }                                    \
    static constexpr T min() {           \
      return (T)small;                   \
    }                                    \
    static constexpr T lowest() {        \
      return (T)(-high);                 \
    }                                    \
    static constexpr T infinity() {      \
      return (T)__builtin_inff();        \
    }                                    \
    static constexpr T quiet_NaN() {     \
      return (T)__builtin_nanf("");      \
    }                                    \
  };
MSL_FLOAT_LIMITS(float, 3.402823466e+38f, 1.175494351e-38f)
MSL_FLOAT_LIMITS(half, 65504.f, 6.103515625e-05f)
MSL_FLOAT_LIMITS(bfloat, 3.38953139e38f, 1.175494351e-38f)

// ---------------------------------------------------------------------------
// Math
// ---------------------------------------------------------------------------

#define MSL_MATH_1(name, value)                    \
  METAL_FUNC float name(float x) {                 \
    return value;                                  \
  }                                                \
  METAL_FUNC half name(half x) {                   \
    return (half)name((float)x);                   \
  }                                                \
  template <int N>                                 \
  METAL_FUNC vec<float, N> name(vec<float, N> x) { \
    vec<float, N> y;                               \
    for (int i = 0; i < N; i++) {                  \
      y[i] = name((float)x[i]);                    \
    }                                              \
    return y;                                      \
  }
#define MSL_MATH_FUNCTIONS                     \
  MSL_MATH_1(acos, acosf(x))                   \
  MSL_MATH_1(acosh, acoshf(x))                 \
  MSL_MATH_1(asin, asinf(x))                   \
  MSL_MATH_1(asinh, asinhf(x))                 \
  MSL_MATH_1(atan, atanf(x))                   \
  MSL_MATH_1(atanh, atanhf(x))                 \
  MSL_MATH_1(ceil, __builtin_ceilf(x))         \
  MSL_MATH_1(cos, cosf(x))                     \
  MSL_MATH_1(cosh, coshf(x))                   \
  MSL_MATH_1(exp, expf(x))                     \
  MSL_MATH_1(exp2, exp2f(x))                   \
  MSL_MATH_1(exp10, powf(10.0f, x))            \
  MSL_MATH_1(fabs, __builtin_fabsf(x))         \
  MSL_MATH_1(floor, __builtin_floorf(x))       \
  MSL_MATH_1(log, logf(x))                     \
  MSL_MATH_1(log10, log10f(x))                 \
  MSL_MATH_1(log2, log2f(x))                   \
  MSL_MATH_1(rint, __builtin_rintf(x))         \
  MSL_MATH_1(round, __builtin_roundf(x))       \
  MSL_MATH_1(rsqrt, 1.0f / __builtin_sqrtf(x)) \
  MSL_MATH_1(sin, sinf(x))                     \
  MSL_MATH_1(sinh, sinhf(x))                   \
  MSL_MATH_1(sqrt, __builtin_sqrtf(x))         \
  MSL_MATH_1(tan, tanf(x))                     \
  MSL_MATH_1(tanh, tanhf(x))                   \
  MSL_MATH_1(trunc, __builtin_truncf(x))
MSL_MATH_FUNCTIONS
namespace fast {
MSL_MATH_FUNCTIONS
}
namespace precise {
MSL_MATH_FUNCTIONS
}

METAL_FUNC float fma(float a, float b, float c) {
  return __builtin_fmaf(a, b, c);
}
METAL_FUNC half fma(half a, half b, half c) {
  return (half)__builtin_fmaf((float)a, (float)b, (float)c);
}
template <int N>
METAL_FUNC vec<float, N>
fma(vec<float, N> a, vec<float, N> b, vec<float, N> c) {
  vec<float, N> y;
  for (int i = 0; i < N; i++) {
    y[i] = __builtin_fmaf(a[i], b[i], c[i]);
  }
  return y;
}
METAL_FUNC float pow(float a, float b) {
  return powf(a, b);
}
METAL_FUNC float atan2(float y, float x) {
  return atan2f(y, x);
}
METAL_FUNC float fmod(float x, float y) {
  return fmodf(x, y);
}
METAL_FUNC float ldexp(float x, int e) {
  return ldexpf(x, e);
}
METAL_FUNC float copysign(float x, float y) {
  return __builtin_copysignf(x, y);
}
METAL_FUNC bool isnan(float x) {
  return __builtin_isnan(x);
}
METAL_FUNC bool isinf(float x) {
  return __builtin_isinf(x);
}
METAL_FUNC bool isfinite(float x) {
  return __builtin_isfinite(x);
}
METAL_FUNC bool signbit(float x) {
  return as_type<uint>(x) >> 31;
}
METAL_FUNC float fmax(float a, float b) {
  return __builtin_fmaxf(a, b);
}
METAL_FUNC float fmin(float a, float b) {
  return __builtin_fminf(a, b);
}
METAL_FUNC float max(float a, float b) {
  return __builtin_fmaxf(a, b);
}
METAL_FUNC float min(float a, float b) {
  return __builtin_fminf(a, b);
}
METAL_FUNC float max3(float a, float b, float c) {
  return max(a, max(b, c));
}
METAL_FUNC float abs(float x) {
  return __builtin_fabsf(x);
}
METAL_FUNC half abs(half x) {
  return (half)__builtin_fabsf((float)x);
}
METAL_FUNC int abs(int x) {
  return x < 0 ? -x : x;
}
METAL_FUNC float clamp(float x, float low, float high) {
  return min(max(x, low), high);
}
#define MSL_ORDERED(T)                     \
  METAL_FUNC T max(T a, T b) {             \
    return a > b ? a : b;                  \
  }                                        \
  METAL_FUNC T min(T a, T b) {             \
    return a < b ? a : b;                  \
  }                                        \
  METAL_FUNC T clamp(T x, T low, T high) { \
    return min(max(x, low), high);         \
  }
MSL_ORDERED(char)
MSL_ORDERED(int8_t)
MSL_ORDERED(uchar)
MSL_ORDERED(short)
MSL_ORDERED(ushort)
MSL_ORDERED(int)
MSL_ORDERED(uint)
MSL_ORDERED(long)
MSL_ORDERED(ulong)
MSL_ORDERED(half)

template <typename T>
METAL_FUNC T select(T a, T b, bool c) {
  return c ? b : a;
}
template <typename T, int N>
METAL_FUNC T dot(vec<T, N> a, vec<T, N> b) {
  T sum = a[0] * b[0];
  for (int i = 1; i < N; i++) {
    sum += a[i] * b[i];
  }
  return sum;
}

METAL_FUNC uint popcount(uint x) {
  return __builtin_popcount(x);
}
METAL_FUNC uint clz(uint x) {
  return x ? __builtin_clz(x) : 32;
}
METAL_FUNC uint ctz(uint x) {
  return x ? __builtin_ctz(x) : 32;
}
METAL_FUNC uint extract_bits(uint x, uint offset, uint bits) {
  return bits ? (x >> offset) & (~0u >> (32 - bits)) : 0;
}
METAL_FUNC uint rotate(uint x, uint n) {
  return (x << (n & 31)) | (x >> (-n & 31));
}
METAL_FUNC uint mulhi(uint a, uint b) {
  return (uint)(((ulong)a * b) >> 32);
}

// ---------------------------------------------------------------------------
// Barriers and the lanes of a simdgroup
// ---------------------------------------------------------------------------

enum class mem_flags : uint {
  mem_none = 0,
  mem_device = 1,
  mem_threadgroup = 2,
  mem_texture = 4
};
constexpr mem_flags operator|(mem_flags a, mem_flags b) {
  return (mem_flags)((uint)a | (uint)b);
}
METAL_FUNC MSL_CONVERGENT void threadgroup_barrier(mem_flags flags) {
  msl_threadgroup_barrier((int)flags);
}
METAL_FUNC MSL_CONVERGENT void simdgroup_barrier(mem_flags flags) {
  msl_simdgroup_barrier((int)flags);
}

template <typename T>
struct msl_type_of {
  static constexpr constant int value = __is_same(T, float) ? msl_f32
      : __is_same(T, half)                                  ? msl_f16
      : __is_same(T, bfloat)                                ? msl_bf16
                             : (sizeof(T) == 8       ? msl_i64
                                    : sizeof(T) == 4 ? msl_i32
                                    : sizeof(T) == 2 ? msl_i16
                                                     : msl_i8) +
          (__is_unsigned(T) ? 1 : 0);
};
template <int size>
struct msl_bits;
template <>
struct msl_bits<1> {
  typedef uchar type;
};
template <>
struct msl_bits<2> {
  typedef ushort type;
};
template <>
struct msl_bits<4> {
  typedef uint type;
};
template <>
struct msl_bits<8> {
  typedef ulong type;
};
template <typename T>
METAL_FUNC ulong msl_to_bits(T x) {
  return (ulong)as_type<typename msl_bits<sizeof(T)>::type>(x);
}
template <typename T>
METAL_FUNC T msl_from_bits(ulong x) {
  return as_type<T>((typename msl_bits<sizeof(T)>::type)x);
}

// One scalar a lane, or a vector component by component.
template <typename T>
struct msl_collective {
  static METAL_FUNC MSL_CONVERGENT T
  run(int op, int width, T x, T fill, int argument) {
    return msl_from_bits<T>(msl_simd(
        op,
        msl_type_of<T>::value,
        width,
        msl_to_bits(x),
        msl_to_bits(fill),
        argument));
  }
};
template <typename T, int N>
struct msl_collective<T __attribute__((ext_vector_type(N)))> {
  typedef msl_vec<T, N> V;
  static METAL_FUNC MSL_CONVERGENT V
  run(int op, int width, V x, V fill, int argument) {
    V y;
    for (int i = 0; i < N; i++) {
      y[i] = msl_collective<T>::run(op, width, x[i], fill[i], argument);
    }
    return y;
  }
};

#define MSL_REDUCTION(name, op)                     \
  template <typename T>                             \
  METAL_FUNC MSL_CONVERGENT T simd_##name(T x) {    \
    return msl_collective<T>::run(op, 32, x, x, 0); \
  }                                                 \
  template <typename T>                             \
  METAL_FUNC MSL_CONVERGENT T quad_##name(T x) {    \
    return msl_collective<T>::run(op, 4, x, x, 0);  \
  }
MSL_REDUCTION(sum, msl_sum)
MSL_REDUCTION(product, msl_product)
MSL_REDUCTION(min, msl_min)
MSL_REDUCTION(max, msl_max)
MSL_REDUCTION(and, msl_and)
MSL_REDUCTION(or, msl_or)
MSL_REDUCTION(xor, msl_xor)
MSL_REDUCTION(prefix_inclusive_sum, msl_prefix_inclusive_sum)
MSL_REDUCTION(prefix_exclusive_sum, msl_prefix_exclusive_sum)
MSL_REDUCTION(prefix_inclusive_product, msl_prefix_inclusive_product)
MSL_REDUCTION(prefix_exclusive_product, msl_prefix_exclusive_product)

#define MSL_SHUFFLE(name, op)                                     \
  template <typename T>                                           \
  METAL_FUNC MSL_CONVERGENT T simd_##name(T x, ushort argument) { \
    return msl_collective<T>::run(op, 32, x, x, argument);        \
  }                                                               \
  template <typename T>                                           \
  METAL_FUNC MSL_CONVERGENT T quad_##name(T x, ushort argument) { \
    return msl_collective<T>::run(op, 4, x, x, argument);         \
  }
MSL_SHUFFLE(broadcast, msl_shuffle)
MSL_SHUFFLE(shuffle, msl_shuffle)
MSL_SHUFFLE(shuffle_xor, msl_shuffle_xor)
MSL_SHUFFLE(shuffle_down, msl_shuffle_down)
MSL_SHUFFLE(shuffle_up, msl_shuffle_up)
MSL_SHUFFLE(shuffle_rotate_down, msl_rotate_down)
MSL_SHUFFLE(shuffle_rotate_up, msl_rotate_up)

template <typename T>
METAL_FUNC MSL_CONVERGENT T simd_shuffle_and_fill_down(T x, T fill, ushort n) {
  return msl_collective<T>::run(msl_fill_down, 32, x, fill, n);
}
template <typename T>
METAL_FUNC MSL_CONVERGENT T simd_shuffle_and_fill_up(T x, T fill, ushort n) {
  return msl_collective<T>::run(msl_fill_up, 32, x, fill, n);
}
template <typename T>
METAL_FUNC MSL_CONVERGENT T simd_broadcast_first(T x) {
  return msl_collective<T>::run(msl_shuffle, 32, x, x, 0);
}

struct simd_vote {
  typedef ulong vote_t;
  ulong votes;
  bool all() const thread {
    return votes == 0xffffffffu;
  }
  bool any() const thread {
    return votes != 0;
  }
};
METAL_FUNC MSL_CONVERGENT ulong msl_votes(bool x) {
  return msl_simd(msl_ballot, msl_u32, 32, x, 0, 0);
}
METAL_FUNC MSL_CONVERGENT bool simd_all(bool x) {
  return msl_votes(x) == 0xffffffffu;
}
METAL_FUNC MSL_CONVERGENT bool simd_any(bool x) {
  return msl_votes(x) != 0;
}
METAL_FUNC MSL_CONVERGENT simd_vote simd_ballot(bool x) {
  return simd_vote{msl_votes(x)};
}
METAL_FUNC bool simd_is_first() {
  return msl_lane() == 0;
}

// ---------------------------------------------------------------------------
// 8 x 8 matrices held by a simdgroup
// ---------------------------------------------------------------------------

METAL_FUNC int msl_matrix_row() {
  int lane = msl_lane();
  return ((lane / 4) & 4) + (lane / 2) % 4;
}
METAL_FUNC int msl_matrix_column() {
  int lane = msl_lane();
  return ((lane / 4) & 2) * 2 + (lane % 2) * 2;
}

template <typename T, int rows, int columns>
struct simdgroup_matrix {
  static_assert(rows == 8 && columns == 8, "simdgroup matrices are 8 x 8");
  vec<T, 2> elements;
  simdgroup_matrix() thread {}
  explicit simdgroup_matrix(T diagonal) thread {
    int ahead = msl_matrix_row() - msl_matrix_column();
    elements.x = ahead == 0 ? diagonal : (T)0;
    elements.y = ahead == 1 ? diagonal : (T)0;
  }
  thread vec<T, 2>& thread_elements() thread {
    return elements;
  }
  const thread vec<T, 2>& thread_elements() const thread {
    return elements;
  }
};
using simdgroup_float8x8 = simdgroup_matrix<float, 8, 8>;
using simdgroup_half8x8 = simdgroup_matrix<half, 8, 8>;
using simdgroup_bfloat8x8 = simdgroup_matrix<bfloat, 8, 8>;

template <typename T, int rows, int columns>
METAL_FUNC simdgroup_matrix<T, rows, columns> make_filled_simdgroup_matrix(
    T value) {
  simdgroup_matrix<T, rows, columns> matrix;
  matrix.elements = (vec<T, 2>)(value);
  return matrix;
}
template <typename T>
METAL_FUNC float2 msl_widen(vec<T, 2> x) {
  return (::float2){(float)x.x, (float)x.y};
}
template <typename D, typename A, typename B, typename C>
METAL_FUNC MSL_CONVERGENT void simdgroup_multiply_accumulate(
    thread simdgroup_matrix<D, 8, 8>& d,
    const thread simdgroup_matrix<A, 8, 8>& a,
    const thread simdgroup_matrix<B, 8, 8>& b,
    const thread simdgroup_matrix<C, 8, 8>& c) {
  ::float2 y = msl_mma(
      msl_widen<A>(a.elements),
      msl_widen<B>(b.elements),
      msl_widen<C>(c.elements));
  d.elements = (vec<D, 2>){(D)y.x, (D)y.y};
}
template <typename D, typename A, typename B>
METAL_FUNC MSL_CONVERGENT void simdgroup_multiply(
    thread simdgroup_matrix<D, 8, 8>& d,
    const thread simdgroup_matrix<A, 8, 8>& a,
    const thread simdgroup_matrix<B, 8, 8>& b) {
  ::float2 y = msl_mma(
      msl_widen<A>(a.elements), msl_widen<B>(b.elements), (::float2)(0.0f));
  d.elements = (vec<D, 2>){(D)y.x, (D)y.y};
}

METAL_FUNC ulong
msl_matrix_offset(int j, ulong per_row, ::ulong2 origin, bool transpose) {
  ulong row = msl_matrix_row();
  ulong column = msl_matrix_column() + j;
  return transpose ? (origin.x + column) * per_row + origin.y + row
                   : (origin.y + row) * per_row + origin.x + column;
}
#define MSL_MATRIX_MEMORY(space)                                             \
  template <typename T>                                                      \
  METAL_FUNC MSL_CONVERGENT void simdgroup_load(                             \
      thread simdgroup_matrix<T, 8, 8>& d,                                   \
      const space T* source,                                                 \
      ulong per_row = 8,                                                     \
      ::ulong2 origin = (::ulong2)(0ul),                                     \
      bool transpose = false) {                                              \
    msl_simd(msl_converge, msl_u32, 32, 0, 0, 0);                            \
    d.elements.x = source[msl_matrix_offset(0, per_row, origin, transpose)]; \
    d.elements.y = source[msl_matrix_offset(1, per_row, origin, transpose)]; \
  }                                                                          \
  template <typename T>                                                      \
  METAL_FUNC MSL_CONVERGENT void simdgroup_store(                            \
      const thread simdgroup_matrix<T, 8, 8>& a,                             \
      space T* target,                                                       \
      ulong per_row = 8,                                                     \
      ::ulong2 origin = (::ulong2)(0ul),                                     \
      bool transpose = false) {                                              \
    msl_simd(msl_converge, msl_u32, 32, 0, 0, 0);                            \
    target[msl_matrix_offset(0, per_row, origin, transpose)] = a.elements.x; \
    target[msl_matrix_offset(1, per_row, origin, transpose)] = a.elements.y; \
  }
MSL_MATRIX_MEMORY(device)
MSL_MATRIX_MEMORY(threadgroup)

// ---------------------------------------------------------------------------
// Atomics
// ---------------------------------------------------------------------------

enum memory_order { memory_order_relaxed };

template <typename T>
struct atomic {
  T value;
};
using atomic_int = atomic<int>;
using atomic_uint = atomic<uint>;
using atomic_bool = atomic<bool>;
using atomic_float = atomic<float>;

enum msl_atomic_op {
  msl_atomic_load,
  msl_atomic_store,
  msl_atomic_exchange,
  msl_atomic_compare_exchange,
  msl_atomic_add,
  msl_atomic_sub,
  msl_atomic_min,
  msl_atomic_max,
  msl_atomic_and,
  msl_atomic_or,
  msl_atomic_xor,
};

#define MSL_ATOMIC_FETCH(space, name, op)                          \
  template <typename T, typename U>                                \
  METAL_FUNC T atomic_##name##_explicit(                           \
      volatile space atomic<T>* object, U x, memory_order) {       \
    return msl_from_bits<T>(msl_atomic_##space(                    \
        op, msl_type_of<T>::value, object, msl_to_bits((T)x), 0)); \
  }
#define MSL_ATOMICS(space)                                     \
  template <typename T>                                        \
  METAL_FUNC T atomic_load_explicit(                           \
      const volatile space atomic<T>* object, memory_order) {  \
    return msl_from_bits<T>(msl_atomic_##space(                \
        msl_atomic_load,                                       \
        msl_type_of<T>::value,                                 \
        const_cast<volatile space atomic<T>*>(object),         \
        0,                                                     \
        0));                                                   \
  }                                                            \
  template <typename T>                                        \
  METAL_FUNC bool atomic_compare_exchange_weak_explicit(       \
      volatile space atomic<T>* object,                        \
      thread T* expected,                                      \
      T desired,                                               \
      memory_order,                                            \
      memory_order) {                                          \
    T before = msl_from_bits<T>(msl_atomic_##space(            \
        msl_atomic_compare_exchange,                           \
        msl_type_of<T>::value,                                 \
        object,                                                \
        msl_to_bits(desired),                                  \
        msl_to_bits(*expected)));                              \
    bool same = msl_to_bits(before) == msl_to_bits(*expected); \
    *expected = before;                                        \
    return same;                                               \
  }                                                            \
  template <typename T, typename U>                            \
  METAL_FUNC void atomic_store_explicit(                       \
      volatile space atomic<T>* object, U x, memory_order) {   \
    msl_atomic_##space(                                        \
        msl_atomic_store,                                      \
        msl_type_of<T>::value,                                 \
        object,                                                \
        msl_to_bits((T)x),                                     \
        0);                                                    \
  }                                                            \
  MSL_ATOMIC_FETCH(space, exchange, msl_atomic_exchange)       \
  MSL_ATOMIC_FETCH(space, fetch_add, msl_atomic_add)           \
  MSL_ATOMIC_FETCH(space, fetch_sub, msl_atomic_sub)           \
  MSL_ATOMIC_FETCH(space, fetch_min, msl_atomic_min)           \
  MSL_ATOMIC_FETCH(space, fetch_max, msl_atomic_max)           \
  MSL_ATOMIC_FETCH(space, fetch_and, msl_atomic_and)           \
  MSL_ATOMIC_FETCH(space, fetch_or, msl_atomic_or)             \
  MSL_ATOMIC_FETCH(space, fetch_xor, msl_atomic_xor)
MSL_ATOMICS(device)
MSL_ATOMICS(threadgroup)

} // namespace metal
