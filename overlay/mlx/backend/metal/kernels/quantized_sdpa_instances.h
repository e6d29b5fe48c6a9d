// The instances that MLX's own build compiles ahead of time; all others are
// compiled when first asked for. Macros only, so that the host has the names.

#pragma once

// clang-format off
#define KV_NAME_affine4(dim, type) "affine4_64_" #dim "_" #type "_" #type
#define KV_NAME_affine8(dim, type) "affine8_64_" #dim "_" #type "_" #type
#define KV_NAME_mxfp8(dim, type) "mxfp88_32_" #dim "_uint8"
#define KV_TYPE_affine4(dim, type) \
  mlx::core::quantized_sdpa::KVOperand<mlx::core::kv::Affine<4, 64>, type, type, dim>
#define KV_TYPE_affine8(dim, type) \
  mlx::core::quantized_sdpa::KVOperand<mlx::core::kv::Affine<8, 64>, type, type, dim>
#define KV_TYPE_mxfp8(dim, type) \
  mlx::core::quantized_sdpa::KVOperand<mlx::core::kv::Mxfp8, uint8_t, uint8_t, dim>

#define KV_VECTOR(X, name, type, k, v, dim, rows)                              \
  X("quantized_sdpa_vector_" #name "_k_" KV_NAME_##k(dim, name)                \
    "_v_" KV_NAME_##v(dim, name) "_rows" #rows,                                \
    quantized_sdpa_vector, type, KV_TYPE_##k(dim, type), KV_TYPE_##v(dim, type), rows)
#define KV_STEEL(X, name, type, k, v, dim, rows, simdgroups, keys)             \
  X("quantized_sdpa_steel_" #name "_k_" KV_NAME_##k(dim, name)                 \
    "_v_" KV_NAME_##v(dim, name) "_rows" #rows "_keys" #keys,                  \
    quantized_sdpa_steel, type, KV_TYPE_##k(dim, type), KV_TYPE_##v(dim, type), \
    simdgroups, keys)

#define KV_DIM(X, name, type, k, v, dim, keys)        \
  KV_VECTOR(X, name, type, k, v, dim, 1)              \
  KV_VECTOR(X, name, type, k, v, dim, 2)              \
  KV_VECTOR(X, name, type, k, v, dim, 4)              \
  KV_VECTOR(X, name, type, k, v, dim, 8)              \
  KV_STEEL(X, name, type, k, v, dim, 16, 2, keys)     \
  KV_STEEL(X, name, type, k, v, dim, 32, 4, keys)     \
  KV_STEEL(X, name, type, k, v, dim, 64, 8, keys)
#define KV_PAIR(X, name, type, k, v)       \
  KV_DIM(X, name, type, k, v, 64, 32)      \
  KV_DIM(X, name, type, k, v, 128, 32)     \
  KV_DIM(X, name, type, k, v, 256, 16)
#define KV_MERGE(X, name, type, dim) \
  X("quantized_sdpa_merge_" #name "_" #dim, quantized_sdpa_merge, type, dim)
#define KV_TYPE(X, name, type)               \
  KV_PAIR(X, name, type, affine8, affine8)   \
  KV_PAIR(X, name, type, affine4, affine4)   \
  KV_PAIR(X, name, type, affine8, affine4)   \
  KV_PAIR(X, name, type, mxfp8, mxfp8)       \
  KV_MERGE(X, name, type, 64)                \
  KV_MERGE(X, name, type, 128)               \
  KV_MERGE(X, name, type, 256)

// X(host name, kernel, template arguments...)
#define FOR_EACH_PREBUILT_QUANTIZED_SDPA(X) \
  KV_TYPE(X, float16, half)                 \
  KV_TYPE(X, bfloat16, bfloat)
// clang-format on
