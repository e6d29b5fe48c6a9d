// The wheel's extension module: MLX's own build calls the same init function
// from its module instead. Names with an underscore are for the tests.

#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include "mlx/backend/common/kv_codec.h"
#include "mlx/backend/metal/quantized_sdpa_instance.h"
#include "mlx/dtype.h"
#include "mlx/quantized_sdpa.h"
#include "mlx/quantized_sdpa_plan.h"

namespace nb = nanobind;
using namespace nb::literals;
using namespace mlx::core::quantized_sdpa;

void init_fast_quantized(nb::module_& m);

namespace {

// Mode, bits, group size.
using FormatTuple = std::tuple<std::string, int, int>;

KVFormat kv_format(const FormatTuple& x) {
  auto& [mode, bits, group_size] = x;
  auto kv_mode = mode == "affine" ? KVMode::Affine
      : mode == "mxfp4"           ? KVMode::Mxfp4
      : mode == "mxfp8"           ? KVMode::Mxfp8
      : mode == "nvfp4"           ? KVMode::Nvfp4
                                  : KVMode::Turbo;
  return {kv_mode, bits, group_size};
}

Problem make_problem(
    int batch,
    int n_q_heads,
    int n_kv_heads,
    int q_len,
    int kv_len,
    int k_dim,
    int v_dim,
    bool half_precision,
    const FormatTuple& k_format,
    const FormatTuple& v_format) {
  return {
      batch,
      n_q_heads,
      n_kv_heads,
      q_len,
      kv_len,
      k_dim,
      v_dim,
      kv_format(k_format),
      kv_format(v_format),
      half_precision};
}

auto plan_cpu_of(const Problem& problem, bool has_integer, int threads) {
  auto plan = plan_cpu(problem, has_integer, threads);
  const char* names[] = {"vector", "tile", "integer"};
  return std::make_tuple(
      std::string(names[int(plan.kernel)]),
      plan.row_block,
      plan.n_row_blocks,
      plan.key_chunk,
      plan.n_key_chunks);
}

int cpu_groups_at_once_of(const Problem& problem, int threads) {
  return cpu_groups_at_once(problem, plan_cpu(problem, true, threads), threads);
}

auto plan_metal_of(
    const Problem& problem,
    int visible_keys,
    const std::string& architecture) {
  auto plan = plan_metal(problem, visible_keys, metal_size(architecture));
  return std::make_tuple(
      std::string(plan.kernel == MetalKernel::vector ? "vector" : "steel"),
      plan.rows,
      plan.keys,
      plan.simdgroups,
      plan.n_row_blocks,
      plan.n_splits);
}

MetalType metal_type(const std::string& name) {
  return name == "float32" ? MetalType::f32
      : name == "float16"  ? MetalType::f16
      : name == "bfloat16" ? MetalType::bf16
                           : MetalType::u8;
}

// Mode, bits, group size, head dim, dtypes of scales and biases.
using MetalOperandTuple =
    std::tuple<std::string, int, int, int, std::string, std::string>;

MetalOperand metal_operand(const MetalOperandTuple& x) {
  auto& [mode, bits, group_size, dim, scales, biases] = x;
  return {
      kv_format({mode, bits, group_size}),
      dim,
      metal_type(scales),
      metal_type(biases)};
}

// The kernel's name in its library and the line that puts it there.
auto metal_kernel(
    const std::string& kernel,
    const std::string& type,
    const MetalOperandTuple& k,
    const MetalOperandTuple& v,
    int rows,
    int keys) {
  auto name = metal_name(
      {kernel == "vector" ? MetalKernel::vector : MetalKernel::steel,
       metal_type(type),
       metal_operand(k),
       metal_operand(v),
       rows,
       keys,
       rows / 8});
  return std::make_tuple(name.name, metal_instantiation(name));
}

auto metal_merge_kernel(const std::string& type, int dim) {
  auto name = metal_merge_name(metal_type(type), dim);
  return std::make_tuple(name.name, metal_instantiation(name));
}

// Kernel, keys a tile, threads, blocks of rows, splits; nothing but the kernel
// where the decode kernel serves.
auto plan_cuda_prefill_of(
    const Problem& problem,
    int multiprocessors,
    int shared_bytes,
    int compute_capability,
    bool bent,
    bool wide_rows) {
  constexpr const char* names[] = {"none", "mma", "wgmma"};
  auto plan = plan_cuda_prefill(
      problem,
      {compute_capability, multiprocessors, shared_bytes},
      bent,
      wide_rows);
  return std::make_tuple(
      std::string(names[int(plan.kernel)]),
      plan.keys,
      plan.threads,
      plan.row_blocks,
      plan.splits);
}

// Warps, stages, keys a stage, row tiles, row blocks, splits, blocks, bytes.
auto plan_cuda_of(
    const Problem& problem,
    int multiprocessors,
    int shared_bytes,
    int scale_bytes,
    bool ragged,
    int window_size) {
  auto operand = [&](const KVFormat& format, int dim) {
    int bias_bytes = format.mode == KVMode::Affine ? scale_bytes : 0;
    bool has_table = format.mode == KVMode::Turbo;
    int groups = dim / format.group_size;
    return OperandShape{
        dim, format.bits, groups, scale_bytes, bias_bytes, has_table};
  };
  auto plan = plan_cuda(
      problem,
      {90, multiprocessors, shared_bytes},
      operand(problem.k, problem.k_dim),
      operand(problem.v, problem.v_dim),
      ragged,
      window_size);
  auto& shape = plan.shape;
  return std::make_tuple(
      std::make_tuple(shape.warps, shape.stages, shape.keys, shape.row_tiles),
      plan.row_blocks,
      plan.splits,
      plan.n_blocks,
      plan.shared_bytes);
}

std::string unsupported_on(
    const Problem& problem,
    const std::string& name,
    int compute_capability,
    int multiprocessors,
    int shared_bytes) {
  auto backend = name == "cpu" ? Backend::cpu
      : name == "cuda"         ? Backend::cuda
      : name == "metal"        ? Backend::metal
                               : Backend::none;
  return unsupported_reason(
      problem, backend, {compute_capability, multiprocessors, shared_bytes});
}

struct Codec {
  const char* name;
  int bits;
  float (*decode)(uint64_t pack, int i);
};

#define LIST_CODEC(name, mode, bits, codec) \
  {#name, bits, [](uint64_t pack, int i) { return codec::decode(pack, i); }},
const Codec codecs[] = {FOR_EACH_KV_CODEC(LIST_CODEC)};
#undef LIST_CODEC

// For each format its name, the width of a code, the bytes and codes of a pack.
auto list_codecs() {
  std::vector<std::tuple<std::string, int, int, int>> list;
  for (auto& codec : codecs) {
    list.emplace_back(
        codec.name,
        codec.bits,
        mlx::core::kv::pack_bytes(codec.bits),
        mlx::core::kv::pack_codes(codec.bits));
  }
  return list;
}

float decode_code(const std::string& name, uint64_t pack, int i) {
  for (auto& codec : codecs) {
    if (name == codec.name) {
      return codec.decode(pack, i);
    }
  }
  throw std::invalid_argument("No codec is called " + name + ".");
}

void init_plans(nb::module_& m) {
  nb::class_<Problem>(m, "_Problem").def_ro("kv_len", &Problem::kv_len);
  m.def(
      "_problem",
      make_problem,
      "batch"_a = 1,
      "n_q_heads"_a = 32,
      "n_kv_heads"_a = 8,
      "q_len"_a = 1,
      "kv_len"_a = 4096,
      "k_dim"_a = 128,
      "v_dim"_a = 128,
      "half_precision"_a = true,
      "k_format"_a = FormatTuple("affine", 4, 64),
      "v_format"_a = FormatTuple("affine", 4, 64));
  m.def(
      "_plan_cpu",
      plan_cpu_of,
      "problem"_a,
      "has_integer"_a = true,
      "threads"_a = 2);
  m.def("_cpu_groups_at_once", cpu_groups_at_once_of);
  m.def("_cpu_threads", cpu_threads);
  m.def("_plan_metal", plan_metal_of);
  m.def("_metal_kernel", metal_kernel);
  m.def("_metal_merge_kernel", metal_merge_kernel);
  m.def("_metal_prebuilt_names", [] {
    auto& names = metal_prebuilt_names();
    return std::vector<std::string>(names.begin(), names.end());
  });
  m.def("_fallback_chunk", fallback_chunk);
  m.def(
      "_plan_cuda_prefill",
      plan_cuda_prefill_of,
      "problem"_a,
      "multiprocessors"_a = 132,
      "shared_bytes"_a = 232448,
      "compute_capability"_a = 90,
      "bent"_a = false,
      "wide_rows"_a = true);
  m.def(
      "_plan_cuda",
      plan_cuda_of,
      "problem"_a,
      "multiprocessors"_a = 132,
      "shared_bytes"_a = 232448,
      "scale_bytes"_a = 2,
      "ragged"_a = false,
      "window_size"_a = 0);
  m.def(
      "_unsupported_reason",
      unsupported_on,
      "problem"_a,
      "backend"_a,
      "compute_capability"_a = 0,
      "multiprocessors"_a = 132,
      "shared_bytes"_a = 232448);
}

} // namespace

NB_MODULE(_ext, m) {
  init_fast_quantized(m);
  // Callable only if this module and MLX share nanobind's type registry.
  m.def("_shares_types_with_mlx", [](const mlx::core::Dtype&) { return true; });

  init_plans(m);
  m.def("_list_codecs", list_codecs);
  m.def("_decode_code", decode_code);
  m.def("_lloyd_max_levels", mlx::core::fast::lloyd_max_levels);
}
