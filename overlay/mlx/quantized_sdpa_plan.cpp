#include "mlx/quantized_sdpa_plan.h"

#include <algorithm>
#include <cstdint>
#include <stdexcept>

#include "mlx/backend/metal/kernels/quantized_sdpa_params.h"

namespace mlx::core::quantized_sdpa {

namespace {

// The fused CPU kernels read codes sixteen at a time.
constexpr int cpu_dim_step = 16;
constexpr int cpu_max_dim = 1024;

// Up to this many rows the float32 kernel decodes in registers. It takes one
// or two rows for less than the integer kernel takes four (Zen 4: 20, 26 and
// 32 ns a key at D 128).
constexpr int cpu_vector_rows = 4;
constexpr int cpu_integer_min_rows = 3;
constexpr int cpu_tile_rows = 96;
// Integer kernels read blocks of this many values.
constexpr int cpu_integer_dim_step = 32;

// Up to this many rows the keys are split over threads. A piece costs what
// 200 keys do: its first tiles, which nobody fetched ahead, and the merge.
constexpr int cpu_split_rows = 128;
constexpr int cpu_pieces_per_thread = 8;
constexpr int cpu_min_chunk = 512;
constexpr int cpu_max_chunks = 32;
// Of partial results, 16 MiB, where the threads get by with that.
constexpr int64_t cpu_partial_floats = 1 << 22;

// About 20 microseconds of one core, what it takes to wake another.
constexpr int64_t cpu_products_per_thread = 1 << 19;

// cp.async and the matrix instructions.
constexpr int cuda_min_capability = 80;
constexpr int cuda_dim_step = 16;
constexpr int cuda_max_k_dim = 1024;
// The output of 8 rows stays in 128 registers.
constexpr int cuda_max_v_dim = 512;
constexpr int cuda_max_row_tiles = 2;
// Registers of a thread for the output and the sums beside it.
constexpr int cuda_output_registers = 160;
// Blocks of all groups that must work for an even number a group, rather than
// for a share of all tiles, which costs the blocks a start and a merge more.
constexpr double cuda_even_share = 0.9;

// How a block works, best first by a prototype on an H200; not measured since.
constexpr struct {
  int warps;
  int stages;
  int keys;
} cuda_shapes[] = {
    {8, 3, 32},
    {8, 3, 16},
    {8, 2, 16},
    {4, 3, 16},
    {4, 2, 16},
    {2, 2, 16},
    {1, 2, 16},
};

// Up to this many queries the decode kernel serves.
constexpr int cuda_decode_queries = 32;
constexpr int cuda_prefill_max_dim = 512;
constexpr int cuda_wgmma_capability = 90;
constexpr int cuda_prefill_max_splits = 16;
// In units of the time of one tile: what a block takes beside its tiles, and
// what a merge takes. Counted, not measured.
constexpr double cuda_prefill_start_tiles = 3;
constexpr double cuda_prefill_merge_tiles = 4;
// Of the time without splits, what they must come down to.
constexpr double cuda_prefill_split_gain = 0.9;

// A chunk of the fallback makes about this many scores.
constexpr int64_t fallback_scores = 1 << 18;
constexpr int fallback_min_keys = 128;
constexpr int fallback_max_keys = 1024;

// The Metal kernels' limits and choices; none of them is measured.
constexpr int metal_dim_step = 16;
constexpr int metal_max_dim = 512;
constexpr int metal_max_tile_dim = 256;
constexpr int metal_max_vector_rows = 8;
// Of a lane's 128 registers, what q and the weighted sums may take.
constexpr int metal_lane_floats = 96;
// Of the 32 KiB that a threadgroup may have.
constexpr int metal_tile_bytes = 24 << 10;
// What a core of the M1 holds (metal-benchmarks by P. Turner).
constexpr int metal_simdgroups_per_core = 24;
constexpr int metal_min_split_keys = 256;
constexpr int metal_max_splits = 128;

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

// Empty where kernels with these limits take both head dims.
std::string head_dim_reason(
    const Problem& problem,
    const std::string& kernels,
    int step,
    int max_dim) {
  for (int dim : {problem.k_dim, problem.v_dim}) {
    if (dim % step != 0 || dim > max_dim) {
      return "a head dim of " + std::to_string(dim) + "; the " + kernels +
          " kernels take multiples of " + std::to_string(step) + " up to " +
          std::to_string(max_dim);
    }
  }
  return "";
}

// The largest power of two of row tiles that the rows fill and the registers
// hold.
int cuda_row_tiles(int rows, const OperandShape& v) {
  int registers = v.dim / 4 + (v.bias_bytes > 0 ? 2 * v.groups : 0);
  int tiles = 1;
  while (2 * tiles <= cuda_max_row_tiles && tiles * row_tile < rows &&
         2 * tiles * registers <= cuda_output_registers) {
    tiles *= 2;
  }
  return tiles;
}

DecodeShape cuda_shape(
    int row_tiles,
    const Problem& problem,
    const CudaDevice& device,
    const OperandShape& k,
    const OperandShape& v) {
  int parts = problem.half_precision ? 1 : 2;
  for (auto& x : cuda_shapes) {
    DecodeShape shape{x.warps, x.stages, x.keys, row_tiles, parts};
    if (shared_layout(k, v, shape).bytes <= device.shared_bytes) {
      return shape;
    }
  }
  return {0, 0, 0, row_tiles, parts};
}

PrefillOperand prefill_operand(const KVFormat& format, int dim) {
  return {
      dim,
      dim / format.group_size,
      pair_table_bytes(format.bits, format.mode == KVMode::Turbo)};
}

// Splits of the keys for the least time: the most tiles that one
// multiprocessor works through, and what each split adds to that.
int prefill_splits(int64_t blocks, int64_t tiles, int64_t slots) {
  int best = 1;
  double least = 0;
  for (int splits = 1; splits <= cuda_prefill_max_splits; ++splits) {
    int64_t rounds = (blocks * splits + slots - 1) / slots;
    double share = double((tiles + splits - 1) / splits);
    double cost = double(rounds) * (share + cuda_prefill_start_tiles) +
        (splits > 1 ? cuda_prefill_merge_tiles : 0.0);
    // Partial results are traffic that small gains do not pay for.
    double factor = best == 1 ? cuda_prefill_split_gain : 1.0;
    if (splits == 1 || cost < factor * least) {
      best = splits;
      least = cost;
    }
  }
  return best;
}

bool fits_wgmma(
    const Problem& problem,
    const CudaDevice& device,
    bool wide_rows) {
  return device.compute_capability == cuda_wgmma_capability && wide_rows &&
      problem.half_precision && problem.k_dim == problem.v_dim &&
      (problem.k_dim == 64 || problem.k_dim == 128);
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

// The rows that a lane of the vector kernel holds in registers: as many as
// wanted, or the most.
int metal_vector_rows(const Problem& p, int wanted) {
  int held = 1;
  for (int rows = 2; held < wanted && rows <= metal_max_vector_rows;
       rows *= 2) {
    int q = rows * lane_codes(p.k.bits, p.k_dim, rows);
    int acc = rows * lane_codes(p.v.bits, p.v_dim, rows);
    if (q / (p.half_precision ? 2 : 1) + acc <= metal_lane_floats) {
      held = rows;
    }
  }
  return held;
}

// Bytes that a key of K or V takes in a tile, with padding: codes, scales and
// biases, or values.
int metal_key_bytes(const KVFormat& format, int dim, bool half_precision) {
  if (!half_precision) {
    return dim * 4 + 16 + 8;
  }
  int code_bytes = format.mode == KVMode::Turbo ? 4 : 2;
  int groups = dim / format.group_size;
  return dim * code_bytes + 16 + groups * 8;
}

int metal_tile_keys(const Problem& p) {
  int bytes = metal_key_bytes(p.k, p.k_dim, p.half_precision) +
      metal_key_bytes(p.v, p.v_dim, p.half_precision);
  int keys = 32;
  while (keys > 8 && keys * bytes > metal_tile_bytes) {
    keys /= 2;
  }
  return keys;
}

// Of the A17 Pro, M4 Pro, M4 Max and M3 Ultra.
int metal_cores(MetalSize size) {
  switch (size) {
    case MetalSize::phone:
      return 6;
    case MetalSize::base:
      return 20;
    case MetalSize::max:
      return 40;
    case MetalSize::ultra:
      return 80;
  }
  throw std::invalid_argument("[plan_metal] Unknown size of a GPU.");
}

std::string cuda_unsupported_reason(
    const Problem& problem,
    const CudaDevice& device) {
  if (device.compute_capability < cuda_min_capability) {
    return "a GPU of compute capability " +
        std::to_string(device.compute_capability / 10) + "." +
        std::to_string(device.compute_capability % 10) +
        "; the CUDA kernels need 8.0";
  }
  int dims[] = {problem.k_dim, problem.v_dim};
  int limits[] = {cuda_max_k_dim, cuda_max_v_dim};
  for (int i = 0; i < 2; ++i) {
    if (dims[i] % cuda_dim_step != 0 || dims[i] > limits[i]) {
      return "a head dim of " + std::to_string(dims[i]) +
          "; the CUDA kernels take multiples of " +
          std::to_string(cuda_dim_step) + " up to " +
          std::to_string(limits[i]) + (i == 0 ? " for K" : " for V");
    }
  }
  // Scales and biases of the widest type.
  auto operand = [](const KVFormat& format, int dim) {
    bool affine = format.mode == KVMode::Affine;
    bool table = format.mode == KVMode::Turbo;
    return OperandShape{
        dim,
        format.bits,
        dim / format.group_size,
        affine || table ? 4 : 1,
        affine ? 4 : 0,
        table};
  };
  auto shape = cuda_shape(
      1,
      problem,
      device,
      operand(problem.k, problem.k_dim),
      operand(problem.v, problem.v_dim));
  if (shape.warps == 0) {
    return "a GPU with " + std::to_string(device.shared_bytes) +
        " bytes of shared memory a block, too little for " +
        format_name(problem.k) + " and " + format_name(problem.v) +
        " with these head dims";
  }
  return "";
}

} // namespace

std::string format_name(const KVFormat& format) {
  return std::string(mode_name(format.mode)) + std::to_string(format.bits) +
      "_" + std::to_string(format.group_size);
}

std::string unsupported_reason(
    const Problem& problem,
    Backend backend,
    const CudaDevice& device) {
  switch (backend) {
    case Backend::cpu:
      return head_dim_reason(problem, "CPU", cpu_dim_step, cpu_max_dim);
    case Backend::cuda:
      return cuda_unsupported_reason(problem, device);
    case Backend::metal:
      return head_dim_reason(problem, "Metal", metal_dim_step, metal_max_dim);
    case Backend::none:
      break;
  }
  return "a GPU stream in a build without a GPU";
}

CudaPlan plan_cuda(
    const Problem& problem,
    const CudaDevice& device,
    const OperandShape& k,
    const OperandShape& v,
    bool ragged,
    int window_size) {
  int rows = problem.n_q_heads / problem.n_kv_heads * problem.q_len;
  CudaPlan plan{};
  int row_tiles = cuda_row_tiles(rows, v);
  // Tables and rings leave no room for the queries of many rows.
  do {
    plan.shape = cuda_shape(row_tiles, problem, device, k, v);
    row_tiles /= 2;
  } while (plan.shape.warps == 0 && row_tiles > 0);
  plan.shared_bytes = shared_layout(k, v, plan.shape).bytes;
  plan.row_blocks = std::max(1, ceil_div(rows, plan.shape.rows()));
  int64_t groups =
      int64_t(problem.batch) * problem.n_kv_heads * plan.row_blocks;
  int64_t keys = problem.kv_len;
  if (window_size > 0) {
    keys = std::min<int64_t>(keys, int64_t(window_size) + problem.q_len);
  }
  int64_t tiles = std::max<int64_t>(1, ceil_div(int(keys), plan.shape.keys));
  // One tile a warp, while there are enough multiprocessors for that.
  int64_t rounds = (tiles + plan.shape.warps - 1) / plan.shape.warps;
  int64_t slots = device.multiprocessors;
  int64_t splits = std::min(rounds, slots / std::max<int64_t>(1, groups));
  bool all_at_once = splits == rounds;
  bool is_even = groups * splits >= cuda_even_share * slots;
  if (groups <= slots && (all_at_once || (is_even && !ragged))) {
    plan.splits = int(splits);
    plan.n_blocks = int(groups * splits);
  } else {
    plan.splits = 0;
    plan.n_blocks = int(slots);
  }
  return plan;
}

CudaPrefillPlan plan_cuda_prefill(
    const Problem& problem,
    const CudaDevice& device,
    bool bent,
    bool wide_rows) {
  CudaPrefillPlan plan{};
  plan.kernel = CudaPrefillKernel::none;
  plan.bent = bent;
  int widest = std::max(problem.k_dim, problem.v_dim);
  bool whole_units =
      problem.k_dim % unit_codes == 0 && problem.v_dim % unit_codes == 0;
  if (problem.q_len <= cuda_decode_queries || !whole_units ||
      widest > cuda_prefill_max_dim) {
    return plan;
  }
  auto k = prefill_operand(problem.k, problem.k_dim);
  auto v = prefill_operand(problem.v, problem.v_dim);
  PrefillMmaShape mma{k, v, problem.half_precision ? 1 : 2};
  PrefillWgmmaShape wgmma{k, v, bent ? 64 : 128, 2};
  int rows;
  if (fits_wgmma(problem, device, wide_rows) &&
      wgmma.bytes() <= device.shared_bytes) {
    plan.kernel = CudaPrefillKernel::wgmma;
    plan.keys = wgmma.keys;
    plan.stages = wgmma.stages;
    plan.threads = wgmma.threads;
    plan.shared_bytes = wgmma.bytes();
    rows = wgmma.rows;
  } else if (mma.bytes() <= device.shared_bytes) {
    plan.kernel = CudaPrefillKernel::mma;
    plan.keys = mma.keys();
    plan.stages = 1;
    plan.threads = mma.threads();
    plan.shared_bytes = mma.bytes();
    rows = mma.rows();
  } else {
    return plan;
  }
  int n_rows = problem.n_q_heads / problem.n_kv_heads * problem.q_len;
  plan.row_blocks = ceil_div(n_rows, rows);
  int64_t blocks =
      int64_t(problem.batch) * problem.n_kv_heads * plan.row_blocks;
  int64_t tiles = std::max(1, ceil_div(problem.kv_len, plan.keys));
  // Two blocks of the mma kernel share a multiprocessor.
  int64_t slots = int64_t(device.multiprocessors) *
      (plan.kernel == CudaPrefillKernel::mma ? 2 : 1);
  plan.splits = prefill_splits(blocks, tiles, slots);
  return plan;
}

CpuPlan plan_cpu(const Problem& problem, bool has_integer, int threads) {
  int rows = problem.n_q_heads / problem.n_kv_heads * problem.q_len;
  CpuPlan plan;
  plan.kernel = cpu_kernel(problem, rows, has_integer);
  plan.row_block = std::min(rows, cpu_tile_rows);
  plan.n_row_blocks = ceil_div(rows, std::max(1, plan.row_block));
  plan.key_chunk = problem.kv_len;
  if (rows <= cpu_split_rows) {
    int groups = std::max(1, problem.n_kv_heads * plan.n_row_blocks);
    int chunks = ceil_div(cpu_pieces_per_thread * threads, groups);
    chunks = std::min(chunks, cpu_max_chunks);
    if (chunks > 1) {
      plan.key_chunk = round_up(ceil_div(problem.kv_len, chunks), 64);
    }
    plan.key_chunk = std::max(cpu_min_chunk, plan.key_chunk);
  }
  plan.key_chunk = std::max(1, plan.key_chunk);
  plan.n_key_chunks = std::max(1, ceil_div(problem.kv_len, plan.key_chunk));
  return plan;
}

int cpu_groups_at_once(
    const Problem& problem,
    const CpuPlan& plan,
    int threads) {
  if (plan.n_key_chunks == 1) {
    return 1;
  }
  int64_t groups =
      int64_t(problem.batch) * problem.n_kv_heads * plan.n_row_blocks;
  int64_t row = problem.v_dim + 2;
  int64_t fit = cpu_partial_floats / (row * plan.row_block * plan.n_key_chunks);
  // A group begins when the one whose place it takes is merged, so pieces for
  // twice the threads lie between the two.
  int64_t busy = 1 + ceil_div(2 * threads, plan.n_key_chunks);
  return int(std::min(groups, std::max(fit, busy)));
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
  if (block_size > keys) {
    return ceil_div(block_size, ceil_div(block_size, int(keys)));
  }
  return block_size > 0 ? round_up(int(keys), block_size) : int(keys);
}

MetalSize metal_size(const std::string& architecture) {
  switch (architecture.empty() ? 'g' : architecture.back()) {
    case 'p':
      return MetalSize::phone;
    case 's':
      return MetalSize::max;
    case 'd':
      return MetalSize::ultra;
    default:
      return MetalSize::base;
  }
}

MetalPlan plan_metal(const Problem& problem, int visible_keys, MetalSize size) {
  int rows = problem.n_q_heads / problem.n_kv_heads * problem.q_len;
  bool has_tile = std::max(problem.k_dim, problem.v_dim) <= metal_max_tile_dim;
  MetalPlan plan;
  plan.rows = metal_vector_rows(problem, rows);
  plan.keys = vector_tile_keys() * vector_simdgroups();
  plan.simdgroups = vector_simdgroups();
  plan.kernel = MetalKernel::vector;
  if (rows > plan.rows && has_tile) {
    plan.kernel = MetalKernel::steel;
    plan.simdgroups = rows <= 16 ? 2 : rows <= 32 ? 4 : 8;
    plan.rows = 8 * plan.simdgroups;
    plan.keys = metal_tile_keys(problem);
  }
  plan.n_row_blocks = ceil_div(rows, plan.rows);
  int64_t groups =
      int64_t(problem.batch) * problem.n_kv_heads * plan.n_row_blocks;
  int64_t wanted = int64_t(metal_cores(size)) * metal_simdgroups_per_core /
      (groups * plan.simdgroups);
  int most = std::min(visible_keys / metal_min_split_keys, metal_max_splits);
  plan.n_splits = int(std::clamp<int64_t>(wanted, 1, std::max(1, most)));
  return plan;
}

} // namespace mlx::core::quantized_sdpa
