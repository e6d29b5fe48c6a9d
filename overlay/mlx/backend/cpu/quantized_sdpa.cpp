// Quantized attention on the CPU: layout of the inputs, the plan's pieces of
// work over all cores. The arithmetic is in quantized_sdpa_kernels.cpp.

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <thread>
#include <vector>

#if defined(__linux__)
#include <sched.h>
#endif

#include "mlx/backend/common/utils.h"
#include "mlx/backend/cpu/encoder.h"
#include "mlx/backend/cpu/quantized_sdpa_kernels.h"
#include "mlx/backend/cpu/quantized_sdpa_threads.h"
#include "mlx/quantized_sdpa_primitive.h"
#include "mlx/stream.h"

namespace mlx::core {

namespace {

using namespace quantized_sdpa;

bool runs_here(const std::string& target) {
#if defined(__x86_64__)
  if (target == "avx2") {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
        __builtin_cpu_supports("f16c");
  }
  if (target == "avx512") {
    return runs_here("avx2") && __builtin_cpu_supports("avx512f") &&
        __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512vl") &&
        __builtin_cpu_supports("avx512dq");
  }
#endif
  return true;
}

// The widest vectors of this machine, or what the environment names.
const CpuKernels& select_kernels() {
  std::vector<const CpuKernels*> targets = {
#if defined(__x86_64__)
      &cpu_kernels_avx512(), &cpu_kernels_avx2(), &cpu_kernels_portable()};
#elif defined(__aarch64__)
      &cpu_kernels_neon()};
#else
      &cpu_kernels_portable()};
#endif
  const char* wanted = std::getenv("MLX_QUANTIZED_SDPA_TARGET");
  for (auto* kernels : targets) {
    if (wanted ? std::string(wanted) == kernels->target
               : runs_here(kernels->target)) {
      if (!runs_here(kernels->target)) {
        break;
      }
      return *kernels;
    }
  }
  throw std::runtime_error(
      "[quantized_scaled_dot_product_attention] MLX_QUANTIZED_SDPA_TARGET must "
      "name an instruction set of this machine; got " +
      std::string(wanted ? wanted : "none") + ".");
}

// Those that this process may use, of all that there are.
int n_cores() {
#if defined(__linux__)
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof(set), &set) == 0) {
    return CPU_COUNT(&set);
  }
#endif
  return int(std::thread::hardware_concurrency());
}

int max_threads() {
  static const int n = [] {
    const char* value = std::getenv("MLX_QUANTIZED_SDPA_THREADS");
    int n = value ? std::atoi(value) : 0;
    return std::max(1, n > 0 ? n : n_cores());
  }();
  return n;
}

// Never destroyed: work may be in flight when the process exits.
WorkerPool& pool() {
  static auto* pool = new WorkerPool(max_threads() - 1);
  return *pool;
}

// Memory of the calling thread that stays for the next call; null where there
// is none.
float* thread_scratch(size_t n) {
  struct Free {
    void operator()(float* p) const {
      std::free(p);
    }
  };
  static thread_local std::unique_ptr<float, Free> memory;
  static thread_local size_t size = 0;
  if (n > size) {
    memory.reset();
    size = 0;
    size_t bytes = (n * sizeof(float) + 63) / 64 * 64;
    memory.reset(static_cast<float*>(std::aligned_alloc(64, bytes)));
    size = memory ? n : 0;
  }
  return memory.get();
}

// MLX's allocator for the CPU gives a null pointer where memory is out.
void allocate(array& x) {
  x.set_data(allocator::malloc(x.nbytes()));
  if (x.nbytes() > 0 && !x.data<void>()) {
    throw std::runtime_error(
        "[quantized_scaled_dot_product_attention] " +
        std::to_string(x.nbytes()) +
        " bytes of memory are required; got none.");
  }
}

Scalar scalar_of(const array& x, KVMode mode) {
  switch (x.dtype().val()) {
    case Dtype::Val::float32:
      return Scalar::f32;
    case Dtype::Val::float16:
      return Scalar::f16;
    case Dtype::Val::bfloat16:
      return Scalar::bf16;
    case Dtype::Val::bool_:
      return Scalar::boolean;
    case Dtype::Val::uint8:
      return mode == KVMode::Nvfp4 ? Scalar::e4m3 : Scalar::e8m0;
    default:
      throw std::runtime_error(
          "[quantized_scaled_dot_product_attention] Unexpected dtype.");
  }
}

Tensor tensor_of(const array& x, KVMode mode = KVMode::Affine) {
  Tensor t;
  t.data = const_cast<void*>(x.data<void>());
  t.type = scalar_of(x, mode);
  std::copy(x.strides().begin(), x.strides().end(), t.strides);
  return t;
}

int format_index(const KVFormat& format) {
  int index = 0;
#define FIND_FORMAT(name, mode_, bits_, codec)                \
  if (format.mode == KVMode::mode_ && format.bits == bits_) { \
    return index;                                             \
  }                                                           \
  ++index;
  FOR_EACH_KV_CODEC(FIND_FORMAT)
#undef FIND_FORMAT
  throw std::runtime_error(
      "[quantized_scaled_dot_product_attention] No CPU kernel for " +
      format_name(format) + ".");
}

CpuOperand operand_of(
    const fast::AttentionArrays::Operand& x,
    const KVFormat& format,
    int dim) {
  CpuOperand operand;
  operand.format = format_index(format);
  operand.dim = dim;
  operand.group_size = format.group_size;
  operand.codes.data = const_cast<void*>(x.codes.data<void>());
  for (int i = 0; i < 3; ++i) {
    operand.codes.strides[i] = x.codes.strides(i) * x.codes.itemsize();
  }
  operand.scales = tensor_of(x.scales, format.mode);
  if (x.biases) {
    operand.biases = tensor_of(*x.biases);
  }
  operand.codebook = x.codebook ? x.codebook->data<float>() : nullptr;
  return operand;
}

CpuArgs make_args(
    const fast::AttentionArrays& arrays,
    const fast::QuantizedAttentionConfig& config,
    const Problem& p,
    std::vector<array>& outputs) {
  CpuArgs args;
  args.q = tensor_of(arrays.q);
  args.k = operand_of(arrays.k, config.k, p.k_dim);
  args.v = operand_of(arrays.v, config.v, p.v_dim);
  args.out = tensor_of(outputs[0]);
  args.lse = config.return_lse ? outputs[1].data<float>() : nullptr;
  if (arrays.mask) {
    args.mask = tensor_of(*arrays.mask);
  }
  args.sinks = arrays.sinks ? arrays.sinks->data<float>() : nullptr;
  auto ints = [](const std::optional<array>& x) {
    return x ? x->data<int32_t>() : nullptr;
  };
  args.left_padding = ints(arrays.left_padding);
  args.lengths = ints(arrays.lengths);
  args.block_table = ints(arrays.block_table);
  if (arrays.block_table) {
    args.block_size = arrays.k.codes.shape(2);
    args.n_blocks = arrays.k.codes.shape(0);
  }
  args.n_q_heads = p.n_q_heads;
  args.n_kv_heads = p.n_kv_heads;
  args.q_len = p.q_len;
  args.kv_len = p.kv_len;
  args.scale = config.scale;
  args.softcap = config.softcap;
  args.window_size = config.window_size;
  args.causal = config.causal;
  return args;
}

// Everything that a call's pieces of work share.
struct Job {
  const CpuKernels& kernels;
  CpuArgs args;
  CpuPlan plan;
  int rows;
  int groups_at_once;
  // [groups_at_once, n_key_chunks, row_block] of both, where keys are split.
  float* acc;
  kv::SoftmaxState* states;
  // Of each group; `merged` once its result is out.
  std::unique_ptr<std::atomic<int>[]> chunks_left;
  // For threads without memory of their own, one at a time.
  float* reserve;
  std::mutex reserve_mutex{};

  CpuItem item(int group, int chunk) const {
    int block = group % plan.n_row_blocks;
    int head = group / plan.n_row_blocks;
    int row = block * plan.row_block;
    int64_t key_end = int64_t(chunk + 1) * plan.key_chunk;
    return {
        head / args.n_kv_heads,
        head % args.n_kv_heads,
        row,
        std::min(plan.row_block, rows - row),
        chunk * plan.key_chunk,
        int(std::min<int64_t>(args.kv_len, key_end))};
  }

  size_t scratch() const {
    switch (plan.kernel) {
      case CpuKernel::vector:
        return kernels.vector_scratch(args);
      case CpuKernel::tile:
        return kernels.tile_scratch(args, plan.row_block);
      case CpuKernel::integer:
        return kernels.integer_scratch(args, plan.row_block);
    }
    throw std::runtime_error(
        "[quantized_scaled_dot_product_attention] Unknown CPU kernel.");
  }

  void attend(const CpuItem& item, float* memory, const CpuPartials& part)
      const {
    switch (plan.kernel) {
      case CpuKernel::vector:
        return kernels.attend_vector(args, item, memory, part);
      case CpuKernel::tile:
        return kernels.attend_tile(args, item, memory, part);
      case CpuKernel::integer:
        return kernels.attend_integer(args, item, memory, part);
    }
  }

  size_t kernel_memory() const {
    return (scratch() + 15) / 16 * 16;
  }

  // Floats that a piece of work takes: the kernel's, then values and states
  // where they are not shared.
  size_t memory() const {
    size_t values = size_t(plan.row_block) * args.v.dim;
    return kernel_memory() +
        (plan.n_key_chunks > 1 ? 0 : values + 2 * plan.row_block);
  }

  // Pieces are handed out in order: those of an older group are at work or
  // done.
  void wait_for_place(int group) const {
    if (group >= groups_at_once) {
      auto& last = chunks_left[group - groups_at_once];
      while (last.load(std::memory_order_acquire) != merged) {
        std::this_thread::yield();
      }
    }
  }

  void run(int index) {
    float* own = thread_scratch(memory());
    // Before the lock: who holds it must not wait for others.
    if (plan.n_key_chunks > 1) {
      wait_for_place(index / plan.n_key_chunks);
    }
    if (own) {
      return run(index, own);
    }
    std::lock_guard lock(reserve_mutex);
    run(index, reserve);
  }

  void run(int index, float* memory) const {
    int group = index / plan.n_key_chunks;
    int chunk = index % plan.n_key_chunks;
    auto work = item(group, chunk);
    size_t used = kernel_memory();
    size_t values = size_t(plan.row_block) * args.v.dim;
    bool split = plan.n_key_chunks > 1;
    CpuPartials parts{
        memory + used,
        reinterpret_cast<kv::SoftmaxState*>(memory + used + values),
        1};
    if (split) {
      size_t first = size_t(group % groups_at_once) * plan.n_key_chunks;
      parts.acc = acc + first * values;
      parts.states = states + first * plan.row_block;
    }
    CpuPartials part = parts;
    part.acc += size_t(chunk) * work.n_rows * args.v.dim * split;
    part.states += size_t(chunk) * work.n_rows * split;
    attend(work, memory, part);
    if (!split) {
      kernels.finish(args, work, parts);
    } else if (chunks_left[group].fetch_sub(1) == 1) {
      parts.n_parts = plan.n_key_chunks;
      kernels.finish(args, work, parts);
      chunks_left[group].store(merged, std::memory_order_release);
    }
  }

  static constexpr int merged = -1;
};

// A row-contiguous copy; every input that needs one has four bytes a value.
array dense_copy(const array& x, cpu::CommandEncoder& encoder) {
  array copy(x.shape(), x.dtype(), nullptr, {});
  allocate(copy);
  encoder.set_input_array(x);
  encoder.set_output_array(copy);
  encoder.dispatch([from = array::unsafe_weak_copy(x),
                    to = array::unsafe_weak_copy(copy)]() mutable {
    Shape outer(from.shape().begin(), from.shape().end() - 1);
    Strides strides(from.strides().begin(), from.strides().end() - 1);
    int width = from.shape(-1);
    int64_t step = from.strides(-1);
    auto out = to.data<uint32_t>();
    for (size_t row = 0; row < to.size() / width; ++row) {
      auto in = from.data<uint32_t>() + elem_to_loc(row, outer, strides);
      for (int i = 0; i < width; ++i) {
        *out++ = in[i * step];
      }
    }
  });
  encoder.add_temporary(copy);
  return copy;
}

// Views stay where they lie, except codes with gaps inside a row and small
// arrays that the kernels index directly.
fast::AttentionArrays lay_out(
    fast::AttentionArrays arrays,
    cpu::CommandEncoder& encoder) {
  auto dense_rows = [&](array& x) {
    if (x.size() > 0 && x.shape(-1) > 1 && x.strides(-1) != 1) {
      x = dense_copy(x, encoder);
    }
  };
  auto dense = [&](std::optional<array>& x) {
    if (x && x->size() > 0 && !x->flags().row_contiguous) {
      x = dense_copy(*x, encoder);
    }
  };
  for (auto* x : {&arrays.k, &arrays.v}) {
    dense_rows(x->codes);
    dense(x->codebook);
  }
  dense(arrays.sinks);
  dense(arrays.left_padding);
  dense(arrays.lengths);
  dense(arrays.block_table);
  return arrays;
}

array temporary(size_t n_floats, cpu::CommandEncoder& encoder) {
  array x({int(n_floats)}, float32, nullptr, {});
  allocate(x);
  encoder.add_temporary(x);
  return x;
}

void dispatch(
    const CpuArgs& args,
    const Problem& problem,
    cpu::CommandEncoder& encoder) {
  static const CpuKernels& kernels = select_kernels();
  bool has_integer = kernels.has_integer(args.k.format, args.v.format);
  auto plan = plan_cpu(problem, has_integer, max_threads());
  int rows = problem.n_q_heads / problem.n_kv_heads * problem.q_len;
  int n_groups = problem.batch * problem.n_kv_heads * plan.n_row_blocks;
  int n_items = n_groups * plan.n_key_chunks;
  int at_once = cpu_groups_at_once(problem, plan, max_threads());
  std::shared_ptr<Job> job(new Job{
      kernels, args, plan, rows, at_once, nullptr, nullptr, {}, nullptr});
  job->reserve = temporary(job->memory(), encoder).data<float>();
  if (plan.n_key_chunks > 1) {
    size_t n_rows = size_t(at_once) * plan.n_key_chunks * plan.row_block;
    job->acc = temporary(n_rows * problem.v_dim, encoder).data<float>();
    job->states = reinterpret_cast<kv::SoftmaxState*>(
        temporary(2 * n_rows, encoder).data<float>());
    job->chunks_left = std::make_unique<std::atomic<int>[]>(n_groups);
    for (int i = 0; i < n_groups; ++i) {
      job->chunks_left[i] = plan.n_key_chunks;
    }
  }
  int n_threads = cpu_threads(problem, max_threads());
  encoder.dispatch([job, n_items, n_threads]() {
    pool().run(n_items, n_threads, [&](int i) { job->run(i); });
  });
}

} // namespace

namespace fast {

void QuantizedScaledDotProductAttention::eval_cpu(
    const std::vector<array>& inputs,
    std::vector<array>& outputs) {
  for (auto& out : outputs) {
    allocate(out);
  }
  if (outputs[0].size() == 0) {
    return;
  }
  auto& encoder = cpu::get_command_encoder(stream());
  for (auto& x : inputs) {
    encoder.set_input_array(x);
  }
  for (auto& out : outputs) {
    encoder.set_output_array(out);
  }
  try {
    auto arrays = lay_out(unpack_inputs(config_, inputs), encoder);
    auto problem = make_problem(arrays, config_);
    dispatch(make_args(arrays, config_, problem, outputs), problem, encoder);
  } catch (...) {
    // Copies that have begun read what the caller may now drop.
    synchronize(stream());
    throw;
  }
}

} // namespace fast
} // namespace mlx::core
