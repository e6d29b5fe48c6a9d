// What the host hands to the CUDA kernels: plain data, passed by value.
// Compiled by host C++, nvcc and NVRTC.

#pragma once

#if defined(__CUDACC_RTC__)
using uint8_t = unsigned char;
using uint16_t = unsigned short;
using uint32_t = unsigned int;
using uint64_t = unsigned long long;
using int32_t = int;
using int64_t = long long;
#else
#include <cstdint>
#endif

namespace mlx::core::quantized_sdpa {

enum class Scalar : int32_t { f32, f16, bf16, boolean, e8m0, e4m3 };

// Blocks of a paged cache hold whole tiles, or any number of keys.
enum class Paging : int32_t { none, tiles, keys };

// Strides count bytes; the axes are batch (or block), head, sequence, last.
struct CudaTensor {
  const uint8_t* data;
  int64_t strides[4];
};

// A small array; the strides count elements.
template <typename T>
struct CudaVector {
  const T* data;
  int64_t stride;
};

// K or V. Of formats without them, biases and codebook have no data.
struct CudaOperand {
  CudaTensor codes;
  CudaTensor scales;
  CudaTensor biases;
  CudaVector<float> codebook;
};

// How the work is cut, by the plan. A tile is a range of keys, a group the rows
// of one KV head that a block holds at a time.
struct CudaWork {
  // Blocks of every group; 0 where all blocks share all tiles evenly.
  int32_t splits;
  // Groups of one KV head.
  int32_t row_blocks;
  // [grid, 2, rows, v_dim] and [grid, 2, rows]: level in powers of two, sum.
  float* partial_acc;
  float* partial_state;
  // [grid], zero before a launch and after it.
  uint32_t* counters;
};

struct CudaParams {
  CudaTensor q;
  CudaOperand k;
  CudaOperand v;
  // Without data where there is none; strides of 0 where it is broadcast.
  CudaTensor mask;
  // Row-contiguous [B, N_q, T_q, D_v] in the type of q.
  void* out;
  // [B, N_q, T_q], null where not wanted.
  float* lse;
  // [N_q], [B], [B], [B, max_blocks]; without data where there is none.
  CudaVector<float> sinks;
  CudaVector<int32_t> left_padding;
  CudaVector<int32_t> lengths;
  CudaVector<int32_t> block_table;
  int64_t block_table_column;
  // Keys a block of the pool, blocks in it; 0 without a block table.
  int32_t block_size;
  int32_t n_blocks;
  int32_t batch;
  int32_t n_q_heads;
  int32_t n_kv_heads;
  int32_t q_len;
  // The length of K, or of what the block table can hold.
  int32_t kv_len;
  // 0: none.
  int32_t window_size;
  float softcap;
  float scale;
  bool causal;
  Scalar mask_type;
  CudaWork work;
};

} // namespace mlx::core::quantized_sdpa
