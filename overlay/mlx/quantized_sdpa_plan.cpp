#include "mlx/quantized_sdpa_plan.h"

#include <algorithm>
#include <cstdint>

namespace mlx::core::quantized_sdpa {

namespace {

// The fused CPU kernels read codes sixteen at a time.
constexpr int cpu_dim_step = 16;
constexpr int cpu_max_dim = 1024;

// Up to this many rows the float32 kernel decodes in registers. It takes one
// or two rows for less than the integer kernel takes four (Zen 4: 20, 26 and
// 34 ns a key at D 128).
constexpr int cpu_vector_rows = 4;
constexpr int cpu_integer_min_rows = 3;
constexpr int cpu_tile_rows = 96;
// Integer kernels read blocks of this many values.
constexpr int cpu_integer_dim_step = 32;

// Up to this many rows the keys are split over threads.
constexpr int cpu_split_rows = 128;
constexpr int cpu_min_chunk = 512;
constexpr int cpu_max_chunks = 32;

// About 20 microseconds of one core, what it takes to wake another.
constexpr int64_t cpu_products_per_thread = 1 << 19;

// A chunk of the fallback makes about this many scores.
constexpr int64_t fallback_scores = 1 << 18;
constexpr int fallback_min_keys = 128;
constexpr int fallback_max_keys = 1024;

int ceil_div(int a, int b) {
  return a / b + (a % b != 0);
}

int round_up(int a, int b) {
  return ceil_div(a, b) * b;
}

const char* mode_name(KVMode mode) {
  switch (mode) {
    case KVMode::Affine:
      return "affine";
    case KVMode::Mxfp4:
      return "mxfp4";
    case KVMode::Mxfp8:
      return "mxfp8";
    case KVMode::Nvfp4:
      return "nvfp4";
    case KVMode::Turbo:
      return "turbo";
  }
  return "unknown";
}

std::string cpu_unsupported_reason(const Problem& problem) {
  for (int dim : {problem.k_dim, problem.v_dim}) {
    if (dim % cpu_dim_step != 0 || dim > cpu_max_dim) {
      return "a head dim of " + std::to_string(dim) +
          "; the CPU kernels take multiples of " +
          std::to_string(cpu_dim_step) + " up to " +
          std::to_string(cpu_max_dim);
    }
  }
  return "";
}

CpuKernel cpu_kernel(const Problem& problem, int rows, bool has_integer) {
  bool dims_fit = problem.k_dim % cpu_integer_dim_step == 0 &&
      problem.v_dim % cpu_integer_dim_step == 0;
  if (problem.half_precision && has_integer && dims_fit &&
      rows >= cpu_integer_min_rows) {
    return CpuKernel::integer;
  }
  return rows <= cpu_vector_rows ? CpuKernel::vector : CpuKernel::tile;
}

} // namespace

std::string format_name(const KVFormat& format) {
  return std::string(mode_name(format.mode)) + std::to_string(format.bits) +
      "_" + std::to_string(format.group_size);
}

std::string unsupported_reason(const Problem& problem, Backend backend) {
  switch (backend) {
    case Backend::cpu:
      return cpu_unsupported_reason(problem);
    case Backend::cuda:
      return "a CUDA stream, for which no kernel exists yet";
    case Backend::metal:
      return "a Metal stream, for which no kernel exists yet";
    case Backend::none:
      break;
  }
  return "a GPU stream in a build without a GPU";
}

CpuPlan plan_cpu(const Problem& problem, bool has_integer) {
  int rows = problem.n_q_heads / problem.n_kv_heads * problem.q_len;
  CpuPlan plan;
  plan.kernel = cpu_kernel(problem, rows, has_integer);
  plan.row_block = std::min(rows, cpu_tile_rows);
  plan.n_row_blocks = ceil_div(rows, std::max(1, plan.row_block));
  plan.key_chunk = problem.kv_len;
  if (rows <= cpu_split_rows) {
    int even = round_up(ceil_div(problem.kv_len, cpu_max_chunks), 64);
    plan.key_chunk = std::max(cpu_min_chunk, even);
  }
  plan.key_chunk = std::max(1, plan.key_chunk);
  plan.n_key_chunks = std::max(1, ceil_div(problem.kv_len, plan.key_chunk));
  return plan;
}

int cpu_threads(const Problem& problem, int available) {
  int64_t products = int64_t(problem.batch) * problem.n_q_heads *
      problem.q_len * problem.kv_len * (problem.k_dim + problem.v_dim);
  int64_t worth = 1 + products / cpu_products_per_thread;
  return int(std::min<int64_t>(worth, available));
}

int fallback_chunk(const Problem& problem, int block_size) {
  int64_t rows = int64_t(problem.batch) * problem.n_q_heads * problem.q_len;
  int64_t keys = fallback_scores / std::max<int64_t>(rows, 1);
  keys = std::clamp<int64_t>(keys, fallback_min_keys, fallback_max_keys);
  keys = std::min<int64_t>(keys, std::max(problem.kv_len, 1));
  return block_size > 0 ? round_up(int(keys), block_size) : int(keys);
}

} // namespace mlx::core::quantized_sdpa
