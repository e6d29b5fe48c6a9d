// Every storage format of a quantized KV cache, written once.
// Compiled by host C++, CUDA and Metal: no pointers, no std::, no state.

#pragma once

#if defined(__METAL__) || defined(MLX_METAL_JIT)
#include <metal_stdlib>
using namespace metal;
#define KV_FN METAL_FUNC
#define KV_CONST static constant constexpr const
#define KV_BITCAST(T, x) as_type<T>(x)
#elif defined(__CUDACC__)
#include <cstdint>
#include <cstring>
#define KV_FN __host__ __device__ __forceinline__
#define KV_CONST static constexpr
#define KV_BITCAST(T, x) ::mlx::core::kv::bitcast<T>(x)
#else
#include <cstdint>
#include <cstring>
// Never emitted as a symbol, so that code built for one instruction set cannot
// be linked into another's.
#if defined(_MSC_VER)
#define KV_FN __forceinline
#else
#define KV_FN inline __attribute__((always_inline))
#endif
#define KV_CONST static constexpr
#define KV_BITCAST(T, x) ::mlx::core::kv::bitcast<T>(x)
#endif

namespace mlx {
namespace core {
namespace kv {

#if !defined(__METAL__) && !defined(MLX_METAL_JIT)
template <typename T, typename U>
KV_FN T bitcast(U x) {
  static_assert(sizeof(T) == sizeof(U), "bitcast keeps the size");
  T y;
  memcpy(&y, &x, sizeof(T));
  return y;
}
#endif

// Floats are built from exponent and mantissa: scaling a float denormal fails
// under fast-math and on Metal.
KV_FN float e4m3_to_float(uint32_t code) {
  uint32_t magnitude = code & 0x7f;
  uint32_t sign = (code & 0x80) << 24;
  float value = magnitude >= 8
      ? KV_BITCAST(float, (magnitude << 20) + (120u << 23))
      : float(magnitude) * 0.001953125f;
  uint32_t bits = KV_BITCAST(uint32_t, value) | sign;
  return KV_BITCAST(float, magnitude == 0x7f ? 0x7fc00000u | sign : bits);
}

KV_FN float e2m1_to_float(uint32_t code) {
  uint32_t magnitude = code & 7;
  uint32_t sign = (code & 8) << 28;
  float value = magnitude >= 2
      ? KV_BITCAST(float, (magnitude << 22) + (126u << 23))
      : float(magnitude) * 0.5f;
  return KV_BITCAST(float, KV_BITCAST(uint32_t, value) | sign);
}

// As MLX: 255 gives infinity.
KV_FN float e8m0_to_float(uint32_t code) {
  return KV_BITCAST(float, code == 0 ? 0x400000u : code << 23);
}

// A pack is the smallest whole number of bytes that holds whole codes.
KV_FN constexpr int pack_bytes(int bits) {
  return bits == 3 || bits == 6 ? 3 : bits == 5 ? 5 : 4;
}

KV_FN constexpr int pack_codes(int bits) {
  return pack_bytes(bits) * 8 / bits;
}

// The fewest codes that fill whole 32-bit words.
KV_FN constexpr int word_codes(int bits) {
  return bits % 8 == 0 ? 4 : bits % 4 == 0 ? 8 : bits % 2 == 0 ? 16 : 32;
}

// The dequantize of MLX 0.32.2 takes no single bits.
KV_FN constexpr bool mlx_dequantizes(int bits) {
  return bits > 1;
}

template <int bits>
KV_FN uint32_t extract(uint64_t pack, int i) {
  return uint32_t(pack >> (bits * i)) & ((1u << bits) - 1u);
}

// A codec has
//   bits          the width of a code
//   group_size    values that share a scale; 0 where the caller gives it
//   has_bias      value = scale * decode + bias, otherwise scale * decode
//   has_codebook  decode gives an index into a table that the caller holds
//   byte_scale    scales are stored as one byte
//   decode(pack, i), decode_scale(stored)
template <int bits_, int group_size_ = 0>
struct Affine {
  KV_CONST int bits = bits_;
  KV_CONST int group_size = group_size_;
  KV_CONST bool has_bias = true;
  KV_CONST bool has_codebook = false;
  KV_CONST bool byte_scale = false;
  static KV_FN float decode(uint64_t pack, int i) {
    return float(extract<bits_>(pack, i));
  }
  static KV_FN float decode_scale(float stored) {
    return stored;
  }
};

struct Mxfp4 {
  KV_CONST int bits = 4;
  KV_CONST int group_size = 32;
  KV_CONST bool has_bias = false;
  KV_CONST bool has_codebook = false;
  KV_CONST bool byte_scale = true;
  static KV_FN float decode(uint64_t pack, int i) {
    return e2m1_to_float(extract<4>(pack, i));
  }
  static KV_FN float decode_scale(uint32_t stored) {
    return e8m0_to_float(stored);
  }
};

struct Mxfp8 {
  KV_CONST int bits = 8;
  KV_CONST int group_size = 32;
  KV_CONST bool has_bias = false;
  KV_CONST bool has_codebook = false;
  KV_CONST bool byte_scale = true;
  static KV_FN float decode(uint64_t pack, int i) {
    return e4m3_to_float(extract<8>(pack, i));
  }
  static KV_FN float decode_scale(uint32_t stored) {
    return e8m0_to_float(stored);
  }
};

struct Nvfp4 {
  KV_CONST int bits = 4;
  KV_CONST int group_size = 16;
  KV_CONST bool has_bias = false;
  KV_CONST bool has_codebook = false;
  KV_CONST bool byte_scale = true;
  static KV_FN float decode(uint64_t pack, int i) {
    return e2m1_to_float(extract<4>(pack, i));
  }
  static KV_FN float decode_scale(uint32_t stored) {
    return e4m3_to_float(stored);
  }
};

// One scale a token, so the group is the whole row.
template <int bits_>
struct Turbo {
  KV_CONST int bits = bits_;
  KV_CONST int group_size = 0;
  KV_CONST bool has_bias = false;
  KV_CONST bool has_codebook = true;
  KV_CONST bool byte_scale = false;
  static KV_FN float decode(uint64_t pack, int i) {
    return float(extract<bits_>(pack, i));
  }
  static KV_FN float decode_scale(float stored) {
    return stored;
  }
};

// sum_i q_i (s c_i + b) = s sum_i q_i c_i + b sum_i q_i
template <typename Codec>
KV_FN float finish_dot(float code_dot, float q_sum, float scale, float bias) {
  return Codec::has_bias ? scale * code_dot + bias * q_sum : scale * code_dot;
}

} // namespace kv
} // namespace core
} // namespace mlx

// X(name, mode, bits, codec): the name is how plans and errors call a format.
// clang-format off
#define FOR_EACH_KV_CODEC(X)                       \
  X(affine1, Affine, 1, mlx::core::kv::Affine<1>)  \
  X(affine2, Affine, 2, mlx::core::kv::Affine<2>)  \
  X(affine3, Affine, 3, mlx::core::kv::Affine<3>)  \
  X(affine4, Affine, 4, mlx::core::kv::Affine<4>)  \
  X(affine5, Affine, 5, mlx::core::kv::Affine<5>)  \
  X(affine6, Affine, 6, mlx::core::kv::Affine<6>)  \
  X(affine8, Affine, 8, mlx::core::kv::Affine<8>)  \
  X(mxfp4, Mxfp4, 4, mlx::core::kv::Mxfp4)         \
  X(mxfp8, Mxfp8, 8, mlx::core::kv::Mxfp8)         \
  X(nvfp4, Nvfp4, 4, mlx::core::kv::Nvfp4)         \
  X(turbo2, Turbo, 2, mlx::core::kv::Turbo<2>)     \
  X(turbo3, Turbo, 3, mlx::core::kv::Turbo<3>)     \
  X(turbo4, Turbo, 4, mlx::core::kv::Turbo<4>)
// clang-format on
