// Quantized attention on Metal: layout of the inputs, plan, launch. Every array
// is read where it lies, whatever its strides.

#include <algorithm>
#include <array>
#include <stdexcept>
#include <string>
#include <vector>

#include "mlx/backend/metal/device.h"
#include "mlx/backend/metal/kernels/quantized_sdpa_params.h"
#include "mlx/backend/metal/quantized_sdpa_instance.h"
#include "mlx/backend/metal/utils.h"
#include "mlx/quantized_sdpa_primitive.h"

namespace mlx::core {

namespace metal {

// The text of kernels/quantized_sdpa.h with all that it includes.
const char* quantized_sdpa();

} // namespace metal

namespace {

using namespace quantized_sdpa;

using Features = std::array<bool, metal_n_features>;

MetalType metal_type(const array& x) {
  switch (x.dtype().val()) {
    case Dtype::Val::float32:
      return MetalType::f32;
    case Dtype::Val::float16:
      return MetalType::f16;
    case Dtype::Val::bfloat16:
      return MetalType::bf16;
    case Dtype::Val::uint8:
      return MetalType::u8;
    default:
      throw std::runtime_error(
          "[quantized_scaled_dot_product_attention] Unexpected dtype.");
  }
}

MetalOperand make_operand(
    const fast::AttentionArrays::Operand& x,
    const KVFormat& format,
    int dim) {
  auto scales = metal_type(x.scales);
  return {format, dim, scales, x.biases ? metal_type(*x.biases) : scales};
}

void copy_strides(const array& x, int64_t* strides) {
  std::copy(x.strides().begin(), x.strides().end(), strides);
}

MetalOperandParams operand_params(const fast::AttentionArrays::Operand& x) {
  MetalOperandParams params{};
  copy_strides(x.codes, params.codes);
  copy_strides(x.scales, params.scales);
  if (x.biases) {
    copy_strides(*x.biases, params.biases);
  }
  if (x.codebook) {
    copy_strides(*x.codebook, &params.codebook);
  }
  return params;
}

MetalParams make_params(
    const fast::AttentionArrays& arrays,
    const fast::QuantizedAttentionConfig& config,
    const Problem& problem,
    const MetalPlan& plan) {
  MetalParams params{};
  params.k = operand_params(arrays.k);
  params.v = operand_params(arrays.v);
  auto copy = [](const std::optional<array>& x, int64_t* strides) {
    if (x) {
      copy_strides(*x, strides);
    }
  };
  copy_strides(arrays.q, params.q);
  copy(arrays.mask, params.mask);
  copy(arrays.sinks, &params.sinks);
  copy(arrays.left_padding, &params.left_padding);
  copy(arrays.lengths, &params.lengths);
  copy(arrays.block_table, params.block_table);
  params.n_q_heads = problem.n_q_heads;
  params.n_kv_heads = problem.n_kv_heads;
  params.q_len = problem.q_len;
  params.kv_len = problem.kv_len;
  if (arrays.block_table) {
    params.block_size = arrays.k.codes.shape(2);
    params.n_blocks = arrays.k.codes.shape(0);
  }
  params.n_splits = plan.n_splits;
  params.window_size = config.window_size;
  params.scale = config.scale;
  params.softcap = config.softcap;
  return params;
}

Features make_features(
    const fast::AttentionArrays& arrays,
    const fast::QuantizedAttentionConfig& config,
    const MetalPlan& plan) {
  auto has_gaps = [](const array& codes) {
    return codes.shape(-1) > 1 && codes.strides(-1) != 1;
  };
  auto mask_is = [&](Dtype type) {
    return arrays.mask && arrays.mask->dtype() == type;
  };
  Features features{};
  features[metal_has_mask] = config.has_mask;
  features[metal_mask_is_bool] = mask_is(bool_);
  features[metal_mask_is_half] = mask_is(float16);
  features[metal_mask_is_bfloat] = mask_is(bfloat16);
  features[metal_is_causal] = config.causal;
  features[metal_has_window] = config.window_size > 0;
  features[metal_has_softcap] = config.softcap > 0;
  features[metal_has_sinks] = config.has_sinks;
  features[metal_has_left_padding] = config.has_left_padding;
  features[metal_has_lengths] = config.has_lengths;
  features[metal_has_block_table] = config.has_block_table;
  features[metal_has_code_gaps] =
      has_gaps(arrays.k.codes) || has_gaps(arrays.v.codes);
  features[metal_return_lse] = config.return_lse;
  features[metal_is_split] = plan.n_splits > 1;
  return features;
}

// What is not built ahead has a library of its own, so that a first call
// compiles no more than it needs.
MTL::ComputePipelineState* get_kernel(
    metal::Device& device,
    const MetalName& name,
    const Features& features) {
  metal::MTLFCList constants;
  std::string hash_name = name.name + "_";
  for (int i = 0; i < metal_n_features; ++i) {
    constants.emplace_back(&features[i], MTL::DataType::DataTypeBool, i);
    hash_name += features[i] ? '1' : '0';
  }
#if defined(MLX_QUANTIZED_SDPA_PREBUILT)
  if (metal_prebuilt_names().count(name.name)) {
    return device.get_kernel(name.name, hash_name, constants);
  }
#endif
  auto library = device.get_library(name.name, [&] {
    return metal::quantized_sdpa() + metal_instantiation(name);
  });
  return device.get_kernel(name.name, library, hash_name, constants);
}

// A call's arrays and how they are bound: what is not there, or holds nothing,
// is never read and q stands in for it.
struct Launch {
  metal::CommandEncoder& encoder;
  const fast::AttentionArrays& arrays;
  std::vector<array>& outputs;
  const MetalParams& params;
  const Features& features;

  void bind(const array& x, int index) {
    encoder.set_input_array(x.size() > 0 ? x : arrays.q, index);
  }

  void bind(const std::optional<array>& x, int index) {
    bind(x ? *x : arrays.q, index);
  }

  void bind_if(int feature, const std::optional<array>& x, int index) {
    if (features[feature]) {
      bind(*x, index);
    }
  }

  void bind_results() {
    encoder.set_bytes(params, metal_params);
    encoder.set_output_array(outputs[0], metal_out);
    if (features[metal_return_lse]) {
      encoder.set_output_array(outputs[1], metal_lse);
    }
    bind_if(metal_has_sinks, arrays.sinks, metal_sinks);
  }

  void bind_inputs() {
    bind(arrays.q, metal_q);
    bind(arrays.k.codes, metal_k_codes);
    bind(arrays.k.scales, metal_k_scales);
    bind(arrays.k.biases, metal_k_biases);
    bind(arrays.k.codebook, metal_k_codebook);
    bind(arrays.v.codes, metal_v_codes);
    bind(arrays.v.scales, metal_v_scales);
    bind(arrays.v.biases, metal_v_biases);
    bind(arrays.v.codebook, metal_v_codebook);
    bind_if(metal_has_mask, arrays.mask, metal_mask);
    bind_if(metal_has_left_padding, arrays.left_padding, metal_left_padding);
    bind_if(metal_has_lengths, arrays.lengths, metal_lengths);
    bind_if(metal_has_block_table, arrays.block_table, metal_block_table);
  }

  void set_pipeline(
      MTL::ComputePipelineState* kernel,
      MTL::Size group,
      const std::string& name) {
    check_kernel_threadgroup_size(kernel, group, name);
    encoder.set_compute_pipeline_state(kernel);
  }
};

array temporary(Shape shape, metal::CommandEncoder& encoder) {
  array x(std::move(shape), float32, nullptr, {});
  x.set_data(allocator::malloc(x.nbytes()));
  encoder.add_temporary(x);
  return x;
}

// The most keys that a query can see.
int visible_keys(
    const Problem& problem,
    const fast::QuantizedAttentionConfig& config) {
  return config.window_size > 0 ? std::min(problem.kv_len, config.window_size)
                                : problem.kv_len;
}

void dispatch(
    const fast::AttentionArrays& arrays,
    const fast::QuantizedAttentionConfig& config,
    std::vector<array>& outputs,
    Stream stream) {
  auto& device = metal::device(stream.device);
  auto& encoder = metal::get_command_encoder(stream);
  auto problem = make_problem(arrays, config);
  auto plan = plan_metal(
      problem,
      visible_keys(problem, config),
      metal_size(device.get_architecture()));
  auto type = metal_type(arrays.q);
  auto name = metal_name(make_metal_instance(
      plan,
      type,
      make_operand(arrays.k, config.k, problem.k_dim),
      make_operand(arrays.v, config.v, problem.v_dim)));
  auto params = make_params(arrays, config, problem, plan);
  auto features = make_features(arrays, config, plan);
  Launch launch{encoder, arrays, outputs, params, features};

  int rows = problem.n_q_heads / problem.n_kv_heads * problem.q_len;
  MTL::Size group(32 * plan.simdgroups, 1, 1);
  launch.set_pipeline(get_kernel(device, name, features), group, name.name);
  launch.bind_inputs();
  launch.bind_results();
  MTL::Size grid(
      size_t(plan.n_row_blocks) * plan.n_splits,
      problem.n_kv_heads,
      problem.batch);
  if (plan.n_splits == 1) {
    encoder.dispatch_threadgroups(grid, group);
    return;
  }
  Shape shape{
      problem.batch, problem.n_kv_heads, rows, plan.n_splits, problem.v_dim};
  auto partials = temporary(shape, encoder);
  shape.back() = 2;
  auto states = temporary(shape, encoder);
  encoder.set_output_array(partials, metal_partials);
  encoder.set_output_array(states, metal_states);
  encoder.dispatch_threadgroups(grid, group);

  auto merge = metal_merge_name(type, problem.v_dim);
  group = MTL::Size(32 * merge_simdgroups(), 1, 1);
  launch.set_pipeline(get_kernel(device, merge, features), group, merge.name);
  launch.bind_results();
  encoder.set_input_array(partials, metal_partials);
  encoder.set_input_array(states, metal_states);
  encoder.dispatch_threadgroups(
      MTL::Size(rows, problem.n_kv_heads, problem.batch), group);
}

} // namespace

namespace fast {

void QuantizedScaledDotProductAttention::eval_gpu(
    const std::vector<array>& inputs,
    std::vector<array>& outputs) {
  for (auto& out : outputs) {
    out.set_data(allocator::malloc(out.nbytes()));
  }
  if (outputs[0].size() == 0) {
    return;
  }
  dispatch(unpack_inputs(config_, inputs), config_, outputs, stream());
}

} // namespace fast
} // namespace mlx::core
