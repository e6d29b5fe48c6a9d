// Decisions of quantized attention as pure functions: numbers in, plan out.

#pragma once

#include <string>

#include "mlx/api.h"
#include "mlx/backend/cuda/quantized_sdpa_layout.h"
#include "mlx/backend/cuda/quantized_sdpa_prefill_layout.h"

namespace mlx::core::quantized_sdpa {

enum class KVMode { Affine, Mxfp4, Mxfp8, Nvfp4, Turbo };

struct KVFormat {
  KVMode mode;
  int bits;
  // Values that share a scale, at most the head dim.
  int group_size;

  bool operator==(const KVFormat& other) const = default;
};

// Such as "affine4_64".
MLX_API std::string format_name(const KVFormat& format);

enum class Backend { cpu, cuda, metal, none };

struct Problem {
  int batch;
  int n_q_heads;
  int n_kv_heads;
  int q_len;
  int kv_len;
  int k_dim;
  int v_dim;
  KVFormat k;
  KVFormat v;
  // q in float16 or bfloat16.
  bool half_precision;
};

struct CudaDevice {
  // Such as 90 for 9.0.
  int compute_capability;
  int multiprocessors;
  // That a block may have.
  int shared_bytes;
};

// Empty where a fused kernel exists, else why there is none. For CUDA that
// depends on the device.
MLX_API std::string unsupported_reason(
    const Problem& problem,
    Backend backend,
    const CudaDevice& device = {});

enum class CpuKernel {
  // Float32, codes are decoded in registers, for few rows.
  vector,
  // Float32, a tile of keys is decoded to scratch once for a block of rows.
  tile,
  // Integer products, for q in half precision where the formats allow it.
  integer,
};

// The rows of a KV head are its query heads times the query positions,
// position-major. The batch does not enter, so that a sequence gives the same
// bits alone and in a batch.
struct CpuPlan {
  CpuKernel kernel;
  int row_block;
  int n_row_blocks;
  int key_chunk;
  int n_key_chunks;
};

// has_integer: whether integer kernels exist for both formats; threads: those
// of the process, whether or not this problem is worth waking them.
MLX_API CpuPlan plan_cpu(const Problem& problem, bool has_integer, int threads);

// How many groups may have partial results in memory at a time, so that these
// do not grow with the batch; 1 where keys are not split.
MLX_API int
cpu_groups_at_once(const Problem& problem, const CpuPlan& plan, int threads);

// How many of the threads at hand are worth waking.
MLX_API int cpu_threads(const Problem& problem, int available);

// A group is as many rows of a KV head as a block holds at a time.
struct CudaPlan {
  DecodeShape shape;
  int row_blocks;
  // Blocks of each group, 0 where all blocks share all tiles evenly.
  int splits;
  int n_blocks;
  int shared_bytes;
};

// `ragged`: sequences may differ in length, which only the GPU knows.
CudaPlan plan_cuda(
    const Problem& problem,
    const CudaDevice& device,
    const OperandShape& k,
    const OperandShape& v,
    bool ragged,
    int window_size);

enum class CudaPrefillKernel {
  // The decode kernel serves: few rows, or a head dim that only it has.
  none,
  // mma.sync, everything else.
  mma,
  // sm_90's asynchronous products, where they fit.
  wgmma,
};

struct CudaPrefillPlan {
  CudaPrefillKernel kernel;
  // Scores take a mask array or a soft cap, which needs registers.
  bool bent;
  // What a block holds: keys at a time, tiles of them in flight.
  int keys;
  int stages;
  int threads;
  int shared_bytes;
  int row_blocks;
  // Above 1, a second launch merges.
  int splits;
};

// wide_rows: codes can be read in whole pieces of 16 bytes, as the wgmma kernel
// does.
CudaPrefillPlan plan_cuda_prefill(
    const Problem& problem,
    const CudaDevice& device,
    bool bent,
    bool wide_rows);

// Keys that the fallback attends to at a time. Of a paged cache, where
// block_size is above 0: whole blocks or, of large ones, a part of one.
MLX_API int fallback_chunk(const Problem& problem, int block_size);

enum class MetalKernel {
  // Few rows in the registers of every simdgroup, keys split over simdgroups.
  vector,
  // Simdgroup matrices, 8 rows a simdgroup, on tiles in threadgroup memory.
  steel,
};

// How MLX's last letter of a GPU's architecture names its size.
enum class MetalSize { phone, base, max, ultra };

MetalSize metal_size(const std::string& architecture);

struct MetalPlan {
  MetalKernel kernel;
  // What a threadgroup holds: rows, keys at a time, simdgroups.
  int rows;
  int keys;
  int simdgroups;
  int n_row_blocks;
  // Above 1, a second pass merges.
  int n_splits;
};

// visible_keys: the most keys that one query sees.
MetalPlan plan_metal(const Problem& problem, int visible_keys, MetalSize size);

} // namespace mlx::core::quantized_sdpa
