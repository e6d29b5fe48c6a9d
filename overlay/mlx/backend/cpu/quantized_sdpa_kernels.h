// What the host code and the CPU kernels share. The kernels are compiled once
// for each instruction set, so this header holds plain data only.

#pragma once

#include <cstddef>
#include <cstdint>

#include "mlx/backend/common/softmax_state.h"

namespace mlx::core::quantized_sdpa {

enum class Scalar { f32, f16, bf16, boolean, e8m0, e4m3 };

// Strides count elements; the axes are batch (or block), head, sequence, last.
struct Tensor {
  void* data = nullptr;
  int64_t strides[4] = {0, 0, 0, 0};
  Scalar type = Scalar::f32;
};

// K or V; the strides of `codes` count bytes.
struct CpuOperand {
  // Position in FOR_EACH_KV_CODEC.
  int format;
  int dim;
  int group_size;
  Tensor codes;
  Tensor scales;
  Tensor biases;
  const float* codebook = nullptr;
};

struct CpuArgs {
  Tensor q;
  CpuOperand k;
  CpuOperand v;
  Tensor mask;
  Tensor out;
  float* lse = nullptr;
  const float* sinks = nullptr;
  const int32_t* left_padding = nullptr;
  const int32_t* lengths = nullptr;
  const int32_t* block_table = nullptr;
  int n_q_heads;
  int n_kv_heads;
  int q_len;
  int kv_len;
  // 0 where there is no block table.
  int block_size = 0;
  int n_blocks = 0;
  float scale;
  // 0: none.
  float softcap;
  int window_size;
  bool causal;
};

// Rows of one KV head over a range of keys. Row r is query position
// r / heads of query head r % heads of the group.
struct CpuItem {
  int batch;
  int kv_head;
  int row_begin;
  int n_rows;
  int key_begin;
  int key_end;
};

// Partial results of consecutive key ranges: weighted sums [n_parts, n_rows,
// v_dim] and states [n_parts, n_rows].
struct CpuPartials {
  float* acc;
  kv::SoftmaxState* states;
  int n_parts;
};

struct CpuKernels {
  const char* target;
  size_t (*vector_scratch)(const CpuArgs& args);
  size_t (*tile_scratch)(const CpuArgs& args, int n_rows);
  size_t (*integer_scratch)(const CpuArgs& args, int n_rows);
  // Whether attend_integer exists for formats of K and V.
  bool (*has_integer)(int k_format, int v_format);
  // All write one part; scratch is sized as above, in floats.
  void (*attend_vector)(
      const CpuArgs& args,
      const CpuItem& item,
      float* scratch,
      const CpuPartials& part);
  void (*attend_tile)(
      const CpuArgs& args,
      const CpuItem& item,
      float* scratch,
      const CpuPartials& part);
  void (*attend_integer)(
      const CpuArgs& args,
      const CpuItem& item,
      float* scratch,
      const CpuPartials& part);
  // Merges the parts in order into the first and writes the result.
  void (*finish)(
      const CpuArgs& args,
      const CpuItem& item,
      const CpuPartials& parts);
};

const CpuKernels& cpu_kernels_portable();
const CpuKernels& cpu_kernels_avx2();
const CpuKernels& cpu_kernels_avx512();
const CpuKernels& cpu_kernels_neon();

} // namespace mlx::core::quantized_sdpa
