// Quantized attention on CUDA: layout of the inputs, the instance of the
// kernel that fits them, the launch. Views are read where they lie.

#include <sstream>
#include <string_view>
#include <type_traits>
#include <unordered_map>

#include "mlx/backend/common/kv_codec.h"
#include "mlx/backend/cuda/device.h"
#include "mlx/backend/cuda/quantized_sdpa_counters.h"
#include "mlx/backend/cuda/quantized_sdpa_host.h"
#include "mlx/backend/cuda/quantized_sdpa_prefill.h"
#include "mlx/quantized_sdpa_primitive.h"

namespace mlx::core {

namespace {

using namespace quantized_sdpa;

Scalar scalar_of(const array& x, KVMode mode = KVMode::Affine) {
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
      fail("Unexpected dtype.");
  }
}

const char* codec_of(const KVFormat& format) {
#define FIND_CODEC(name, mode_, bits_, codec)                 \
  if (format.mode == KVMode::mode_ && format.bits == bits_) { \
    return #codec;                                            \
  }
  FOR_EACH_KV_CODEC(FIND_CODEC)
#undef FIND_CODEC
  fail("No CUDA kernel for " + format_name(format) + ".");
}

CudaTensor tensor_of(const array& x) {
  CudaTensor t{};
  if (x.size() > 0) {
    t.data = static_cast<const uint8_t*>(gpu_ptr<void>(x));
  }
  for (int i = 0; i < x.ndim(); ++i) {
    t.strides[i] = x.strides(i) * int64_t(x.itemsize());
  }
  return t;
}

template <typename T>
CudaVector<T> vector_of(const std::optional<array>& x) {
  if (!x) {
    return {};
  }
  return {gpu_ptr<T>(*x), x->strides(0)};
}

CudaOperand operand_of(const fast::AttentionArrays::Operand& x) {
  CudaOperand operand{};
  operand.codes = tensor_of(x.codes);
  operand.scales = tensor_of(x.scales);
  if (x.biases) {
    operand.biases = tensor_of(*x.biases);
  }
  operand.codebook = vector_of<float>(x.codebook);
  return operand;
}

OperandShape shape_of(
    const fast::AttentionArrays::Operand& x,
    const KVFormat& format,
    int dim) {
  return {
      dim,
      format.bits,
      dim / format.group_size,
      int(x.scales.itemsize()),
      x.biases ? int(x.biases->itemsize()) : 0,
      format.mode == KVMode::Turbo};
}

// The largest power of two up to `most` that divides the address of each row.
int row_alignment(
    const array& x,
    const CudaTensor& t,
    int row_bytes,
    int most) {
  uint64_t bits = uint64_t(row_bytes) | uint64_t(most);
  bits |= reinterpret_cast<uint64_t>(t.data);
  for (int i = 0; i < 3; ++i) {
    bits |= x.shape(i) > 1 ? uint64_t(t.strides[i]) : 0;
  }
  return int(bits & -bits);
}

bool has_dense_columns(const array& x, const CudaTensor& t) {
  return x.shape(3) == 1 || t.strides[3] == int64_t(x.itemsize());
}

bool has_dense_rows(const array& x, const CudaTensor& t, int row_bytes) {
  return has_dense_columns(x, t) &&
      (x.shape(2) == 1 || t.strides[2] == row_bytes);
}

// How codes are copied, in the terms of quantized_sdpa_instance.cuh.
struct CodeLayout {
  int chunk;
  bool dense;

  CodeLayout(const array& x, const CudaTensor& t, int row_bytes) {
    dense = has_dense_rows(x, t, row_bytes);
    chunk = has_dense_columns(x, t) ? row_alignment(x, t, row_bytes, copy_bytes)
                                    : int(x.itemsize());
  }
};

struct ScaleLayout {
  // A tile of keys is one piece that 16-byte copies take.
  bool dense;
  // Bytes that each row is copied by; 0 where only values can be.
  int chunk;

  ScaleLayout(const array& x, const CudaTensor& t) {
    int row_bytes = int(x.shape(3) * x.itemsize());
    int chunk_bytes = row_alignment(x, t, row_bytes, copy_bytes);
    chunk = has_dense_columns(x, t) && chunk_bytes >= 4 ? chunk_bytes : 0;
    auto start = t;
    // Rows themselves need no alignment within a piece.
    start.strides[2] = 0;
    dense = has_dense_rows(x, t, row_bytes) &&
        row_alignment(x, start, copy_bytes, copy_bytes) == copy_bytes;
  }
};

// Everything that a kernel's text depends on. Plain integers, so that a launch
// finds its kernel without making the text.
struct Instance {
  int device;
  Scalar q_type;
  Scalar k_scale_type;
  Scalar k_bias_type;
  Scalar v_scale_type;
  Scalar v_bias_type;
  KVFormat k;
  KVFormat v;
  int k_dim;
  int v_dim;
  DecodeShape shape;
  int k_chunk;
  int v_chunk;
  int k_dense;
  int v_dense;
  int dense_scales;
  int scale_chunks[4];
  Paging paging;
  int has_mask;
  int has_softcap;
};
static_assert(std::has_unique_object_representations_v<Instance>);

constexpr const char* paging_names[] = {
    "Paging::none",
    "Paging::tiles",
    "Paging::keys"};

Paging paging_of(const CudaParams& p, const CudaPlan& plan) {
  return p.block_size == 0                  ? Paging::none
      : p.block_size % plan.shape.keys == 0 ? Paging::tiles
                                            : Paging::keys;
}

void set_copies(
    Instance& x,
    const fast::AttentionArrays& arrays,
    const CudaParams& p,
    const OperandShape& k,
    const OperandShape& v) {
  CodeLayout k_codes(arrays.k.codes, p.k.codes, k.row_bytes());
  CodeLayout v_codes(arrays.v.codes, p.v.codes, v.row_bytes());
  x.k_chunk = k_codes.chunk;
  x.v_chunk = v_codes.chunk;
  x.k_dense = k_codes.dense;
  x.v_dense = v_codes.dense;
  ScaleLayout scales[] = {
      {arrays.k.scales, p.k.scales},
      {arrays.k.biases.value_or(arrays.k.scales),
       arrays.k.biases ? p.k.biases : p.k.scales},
      {arrays.v.scales, p.v.scales},
      {arrays.v.biases.value_or(arrays.v.scales),
       arrays.v.biases ? p.v.biases : p.v.scales}};
  // Keys of a tile that lie in several blocks of a pool are no one piece.
  x.dense_scales = x.paging != Paging::keys;
  for (auto& layout : scales) {
    x.dense_scales = x.dense_scales && layout.dense;
  }
  for (int i = 0; i < 4; ++i) {
    x.scale_chunks[i] = x.dense_scales ? 0 : scales[i].chunk;
  }
}

Instance make_instance(
    const fast::AttentionArrays& arrays,
    const fast::QuantizedAttentionConfig& config,
    const CudaParams& p,
    const CudaPlan& plan,
    const OperandShape& k,
    const OperandShape& v) {
  auto bias_type = [](const fast::AttentionArrays::Operand& x, KVMode mode) {
    return scalar_of(x.biases.value_or(x.scales), mode);
  };
  Instance x{};
  x.q_type = scalar_of(arrays.q);
  x.k_scale_type = scalar_of(arrays.k.scales, config.k.mode);
  x.k_bias_type = bias_type(arrays.k, config.k.mode);
  x.v_scale_type = scalar_of(arrays.v.scales, config.v.mode);
  x.v_bias_type = bias_type(arrays.v, config.v.mode);
  x.k = config.k;
  x.v = config.v;
  x.k_dim = k.dim;
  x.v_dim = v.dim;
  x.shape = plan.shape;
  x.paging = paging_of(p, plan);
  set_copies(x, arrays, p, k, v);
  x.has_mask = config.has_mask;
  x.has_softcap = config.softcap > 0;
  return x;
}

PrefillTypes prefill_types(
    const fast::AttentionArrays& arrays,
    const fast::QuantizedAttentionConfig& config) {
  auto stored = [](const fast::AttentionArrays::Operand& x,
                   const KVFormat& format) {
    auto bias = scalar_of(x.biases.value_or(x.scales), format.mode);
    return PrefillFormat{
        codec_of(format),
        format.bits,
        format.group_size,
        scalar_of(x.scales, format.mode),
        bias};
  };
  return {
      scalar_of(arrays.q),
      stored(arrays.k, config.k),
      stored(arrays.v, config.v)};
}

std::string instance_text(const Instance& x) {
  std::ostringstream text;
  auto constant = [&](const char* type, const char* name, const auto& value) {
    text << "  static constexpr " << type << " " << name << " = " << value
         << ";\n";
  };
  text << "\nusing namespace mlx::core::quantized_sdpa;\n"
          "struct Instance {\n  using KCodec = "
       << codec_of(x.k) << ";\n  using VCodec = " << codec_of(x.v) << ";\n";
  constant("Scalar", "q_type", scalar_name(x.q_type));
  constant("Scalar", "k_scale_type", scalar_name(x.k_scale_type));
  constant("Scalar", "k_bias_type", scalar_name(x.k_bias_type));
  constant("Scalar", "v_scale_type", scalar_name(x.v_scale_type));
  constant("Scalar", "v_bias_type", scalar_name(x.v_bias_type));
  constant("int", "k_dim", x.k_dim);
  constant("int", "v_dim", x.v_dim);
  constant("int", "k_group", x.k.group_size);
  constant("int", "v_group", x.v.group_size);
  constant("int", "warps", x.shape.warps);
  constant("int", "stages", x.shape.stages);
  constant("int", "tile_keys", x.shape.keys);
  constant("int", "row_tiles", x.shape.row_tiles);
  constant("int", "k_chunk", x.k_chunk);
  constant("int", "v_chunk", x.v_chunk);
  constant("bool", "k_dense", x.k_dense);
  constant("bool", "v_dense", x.v_dense);
  constant("bool", "dense_scales", x.dense_scales);
  constant("int", "k_scale_chunk", x.scale_chunks[0]);
  constant("int", "k_bias_chunk", x.scale_chunks[1]);
  constant("int", "v_scale_chunk", x.scale_chunks[2]);
  constant("int", "v_bias_chunk", x.scale_chunks[3]);
  constant("Paging", "paging", paging_names[int(x.paging)]);
  constant("bool", "has_mask", x.has_mask);
  constant("bool", "has_softcap", x.has_softcap);
  text << "};\n"
          "extern \"C\" __global__ void\n"
          "__launch_bounds__(Traits<Instance>::threads, 1)\n"
          "    quantized_sdpa(const __grid_constant__ CudaParams p) {\n"
          "  decode<Instance>(p);\n"
          "}\n";
  return text.str();
}

CudaParams make_params(
    const fast::AttentionArrays& arrays,
    const fast::QuantizedAttentionConfig& config,
    const Problem& problem,
    std::vector<array>& outputs) {
  CudaParams p{};
  p.q = tensor_of(arrays.q);
  p.k = operand_of(arrays.k);
  p.v = operand_of(arrays.v);
  p.mask_type = Scalar::boolean;
  if (arrays.mask) {
    p.mask = tensor_of(*arrays.mask);
    p.mask_type = scalar_of(*arrays.mask);
  }
  p.out = gpu_ptr<void>(outputs[0]);
  p.lse = config.return_lse ? gpu_ptr<float>(outputs[1]) : nullptr;
  p.sinks = vector_of<float>(arrays.sinks);
  p.left_padding = vector_of<int32_t>(arrays.left_padding);
  p.lengths = vector_of<int32_t>(arrays.lengths);
  p.block_table = vector_of<int32_t>(arrays.block_table);
  if (arrays.block_table) {
    p.block_table_column = arrays.block_table->strides(1);
    p.block_size = arrays.k.codes.shape(2);
    p.n_blocks = arrays.k.codes.shape(0);
  }
  p.batch = problem.batch;
  p.n_q_heads = problem.n_q_heads;
  p.n_kv_heads = problem.n_kv_heads;
  p.q_len = problem.q_len;
  p.kv_len = problem.kv_len;
  p.window_size = config.window_size;
  p.softcap = config.softcap;
  p.scale = config.scale;
  p.causal = config.causal;
  return p;
}

const CudaDevice& describe(cu::Device& device) {
  static thread_local std::unordered_map<int, CudaDevice> devices;
  auto found = devices.find(device.cuda_device());
  if (found == devices.end()) {
    CudaDevice x{
        device.compute_capability_major() * 10 +
            device.compute_capability_minor(),
        cuda_multiprocessors(device),
        cuda_shared_limit(device)};
    found = devices.emplace(device.cuda_device(), x).first;
  }
  return found->second;
}

const CudaKernel&
find_kernel(cu::Device& device, const Instance& instance, int shared_bytes) {
  static thread_local std::unordered_map<std::string_view, CudaKernel> kernels;
  std::string_view key(
      reinterpret_cast<const char*>(&instance), sizeof(instance));
  auto found = kernels.find(key);
  if (found == kernels.end()) {
    auto& kernel = cuda_kernel_of(
        device, decode_source(), instance_text(instance), shared_bytes);
    // Keys stay as long as the map does.
    auto kept = new Instance(instance);
    key = {reinterpret_cast<const char*>(kept), sizeof(instance)};
    found = kernels.emplace(key, kernel).first;
  }
  return found->second;
}

CudaWork make_work(
    cu::CommandEncoder& encoder,
    const Stream& stream,
    const CudaPlan& plan,
    int v_dim) {
  CudaWork work{};
  work.splits = plan.splits;
  work.row_blocks = plan.row_blocks;
  if (plan.splits != 1) {
    int64_t rows = int64_t(plan.n_blocks) * 2 * plan.shape.rows();
    work.partial_acc = temporary(encoder, rows * v_dim);
    work.partial_state = temporary(encoder, rows * 2);
    work.counters = take_counters(encoder, stream, plan.n_blocks);
  }
  return work;
}

void launch_decode(
    cu::CommandEncoder& encoder,
    const Stream& stream,
    const fast::AttentionArrays& arrays,
    const fast::QuantizedAttentionConfig& config,
    const Problem& problem,
    CudaParams p) {
  auto k = shape_of(arrays.k, config.k, problem.k_dim);
  auto v = shape_of(arrays.v, config.v, problem.v_dim);
  bool ragged = config.has_lengths || config.has_left_padding;
  auto& device = encoder.device();
  auto plan =
      plan_cuda(problem, describe(device), k, v, ragged, config.window_size);
  p.work = make_work(encoder, stream, plan, problem.v_dim);
  auto instance = make_instance(arrays, config, p, plan, k, v);
  instance.device = device.cuda_device();
  auto& kernel = find_kernel(device, instance, plan.shared_bytes);
  launch(
      encoder,
      kernel,
      p,
      plan.n_blocks,
      plan.shape.warps * warp_size,
      plan.shared_bytes);
}

} // namespace

namespace fast {

CudaDevice cuda_device_of(const Stream& stream) {
  return describe(cu::device(stream.device));
}

void QuantizedScaledDotProductAttention::eval_gpu(
    const std::vector<array>& inputs,
    std::vector<array>& outputs) {
  for (auto& out : outputs) {
    out.set_data(allocator::malloc(out.nbytes()));
  }
  if (outputs[0].size() == 0) {
    return;
  }
  auto& encoder = cu::get_command_encoder(stream());
  for (auto& x : inputs) {
    encoder.set_input_array(x);
  }
  for (auto& out : outputs) {
    encoder.set_output_array(out);
  }
  auto arrays = unpack_inputs(config_, inputs);
  auto problem = make_problem(arrays, config_);
  auto& device = describe(encoder.device());
  // An imported function may come from another device.
  auto reason =
      quantized_sdpa::unsupported_reason(problem, Backend::cuda, device);
  if (!reason.empty()) {
    fail("a kernel for the device is required; got none: " + reason + ".");
  }
  auto p = make_params(arrays, config_, problem, outputs);
  auto types = prefill_types(arrays, config_);
  if (!launch_prefill(encoder, problem, device, types, p, outputs)) {
    launch_decode(encoder, stream(), arrays, config_, problem, p);
  }
}

} // namespace fast
} // namespace mlx::core
