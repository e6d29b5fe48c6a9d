// The primitive: its inputs, transformations and shapes.

#include "mlx/quantized_sdpa_primitive.h"

#include <algorithm>

#include "mlx/fast.h"
#include "mlx/ops.h"
#include "mlx/transforms.h"

namespace mlx::core::fast {

using quantized_sdpa::Backend;
using quantized_sdpa::KVFormat;
using quantized_sdpa::KVMode;

AttentionSlots input_slots(const QuantizedAttentionConfig& config) {
  int next = 0;
  auto take = [&](bool present) {
    return present ? std::optional<int>(next++) : std::nullopt;
  };
  auto operand = [&](const KVFormat& format) {
    AttentionSlots::Operand slots;
    slots.codes = next++;
    slots.scales = next++;
    slots.biases = take(format.mode == KVMode::Affine);
    slots.codebook = take(format.mode == KVMode::Turbo);
    return slots;
  };
  AttentionSlots slots;
  slots.q = next++;
  slots.k = operand(config.k);
  slots.v = operand(config.v);
  slots.mask = take(config.has_mask);
  slots.sinks = take(config.has_sinks);
  slots.left_padding = take(config.has_left_padding);
  slots.lengths = take(config.has_lengths);
  slots.block_table = take(config.has_block_table);
  return slots;
}

std::vector<array> pack_inputs(const AttentionArrays& arrays) {
  std::vector<array> inputs;
  auto add = [&](const std::optional<array>& x) {
    if (x) {
      inputs.push_back(*x);
    }
  };
  add(arrays.q);
  for (auto* x : {&arrays.k, &arrays.v}) {
    add(x->codes);
    add(x->scales);
    add(x->biases);
    add(x->codebook);
  }
  add(arrays.mask);
  add(arrays.sinks);
  add(arrays.left_padding);
  add(arrays.lengths);
  add(arrays.block_table);
  return inputs;
}

AttentionArrays unpack_inputs(
    const QuantizedAttentionConfig& config,
    const std::vector<array>& inputs) {
  auto slots = input_slots(config);
  auto get = [&](const std::optional<int>& slot) {
    return slot ? std::optional<array>(inputs[*slot]) : std::nullopt;
  };
  auto operand = [&](const AttentionSlots::Operand& x) {
    return AttentionArrays::Operand{
        inputs[x.codes], inputs[x.scales], get(x.biases), get(x.codebook)};
  };
  return {
      inputs[slots.q],
      operand(slots.k),
      operand(slots.v),
      get(slots.mask),
      get(slots.sinks),
      get(slots.left_padding),
      get(slots.lengths),
      get(slots.block_table)};
}

std::vector<array> hold_shapes(std::vector<array> xs, Stream s) {
  for (auto& x : xs) {
    if (x.is_tracer()) {
      Shape shape = x.shape();
      shape.insert(shape.begin(), 1);
      x = squeeze(reshape(x, shape, s), 0, s);
    }
  }
  return xs;
}

int head_dim(const array& codes, const KVFormat& format) {
  return int(int64_t(codes.shape(3)) * 32 / format.bits);
}

int kv_length(const AttentionArrays& arrays) {
  int stored = arrays.k.codes.shape(2);
  return arrays.block_table ? arrays.block_table->shape(1) * stored : stored;
}

quantized_sdpa::Problem make_problem(
    const AttentionArrays& arrays,
    const QuantizedAttentionConfig& config) {
  return {
      .batch = arrays.q.shape(0),
      .n_q_heads = arrays.q.shape(1),
      .n_kv_heads = arrays.k.codes.shape(1),
      .q_len = arrays.q.shape(2),
      .kv_len = kv_length(arrays),
      .k_dim = arrays.q.shape(3),
      .v_dim = head_dim(arrays.v.codes, config.v),
      .k = config.k,
      .v = config.v,
      .half_precision = arrays.q.dtype() != float32};
}

std::string unsupported_reason(
    const quantized_sdpa::Problem& problem,
    const Stream& stream) {
  if (stream.device == Device::cpu) {
    return quantized_sdpa::unsupported_reason(problem, Backend::cpu);
  }
#if defined(__APPLE__)
  return quantized_sdpa::unsupported_reason(problem, Backend::metal);
#else
  return quantized_sdpa::unsupported_reason(
      problem, Backend::cuda, cuda_device_of(stream));
#endif
}

namespace {

// The wheel's primitive is unknown to MLX's exporter, which then gets the
// fallback graph. MLX exports no question for "am I exporting", but a Metal
// kernel in a build without Metal can be recorded only then.
bool must_export_ops(const std::vector<array>& inputs) {
#if defined(MLX_QUANTIZED_SDPA_EXTENSION) && !defined(__APPLE__)
  bool tracing = std::any_of(
      inputs.begin(), inputs.end(), [](auto& x) { return x.is_tracer(); });
  if (!tracing) {
    return false;
  }
  try {
    auto probe = metal_kernel("quantized_sdpa_probe", {"x"}, {"y"}, "");
    probe(
        {array(0.0f)},
        {Shape{1}},
        {float32},
        {1, 1, 1},
        {1, 1, 1},
        {},
        std::nullopt,
        false,
        {});
    return true;
  } catch (const std::exception&) {
    return false;
  }
#else
  return false;
#endif
}

std::vector<Shape> result_shapes(
    const std::vector<array>& inputs,
    const QuantizedAttentionConfig& config) {
  auto arrays = unpack_inputs(config, inputs);
  Shape out = arrays.q.shape();
  out[3] = make_problem(arrays, config).v_dim;
  std::vector<Shape> shapes{out};
  if (config.return_lse) {
    shapes.push_back({out[0], out[1], out[2]});
  }
  return shapes;
}

} // namespace

std::vector<array> quantized_attention(
    const std::vector<array>& inputs,
    const QuantizedAttentionConfig& config,
    Stream stream) {
  if (must_export_ops(inputs)) {
    return quantized_attention_fallback(inputs, config, stream);
  }
  auto shapes = result_shapes(inputs, config);
  std::vector<Dtype> types{inputs[0].dtype()};
  if (config.return_lse) {
    types.push_back(float32);
  }
  return array::make_arrays(
      std::move(shapes),
      types,
      std::make_shared<QuantizedScaledDotProductAttention>(stream, config),
      inputs);
}

std::vector<Shape> QuantizedScaledDotProductAttention::output_shapes(
    const std::vector<array>& inputs) {
  check_shapes(unpack_inputs(config_, inputs), config_, stream());
  return result_shapes(inputs, config_);
}

bool QuantizedScaledDotProductAttention::is_equivalent(
    const Primitive& other) const {
  auto& p = static_cast<const QuantizedScaledDotProductAttention&>(other);
  return config_ == p.config_;
}

namespace {

// The fallback as a function of the inputs named by `argnums` alone, since
// codes have no gradient.
auto fallback_of(
    const std::vector<array>& primals,
    const std::vector<int>& argnums,
    const QuantizedAttentionConfig& config,
    Stream stream) {
  return [=](const std::vector<array>& xs) {
    auto inputs = primals;
    for (size_t i = 0; i < argnums.size(); ++i) {
      inputs[argnums[i]] = xs[i];
    }
    return quantized_attention_fallback(inputs, config, stream);
  };
}

std::vector<array> select(
    const std::vector<array>& xs,
    const std::vector<int>& argnums) {
  std::vector<array> chosen;
  for (int i : argnums) {
    chosen.push_back(xs[i]);
  }
  return chosen;
}

// Integer inputs (codes, byte scales, lengths) get zeros of their own.
bool has_gradient(const array& x) {
  return issubdtype(x.dtype(), floating);
}

} // namespace

std::vector<array> QuantizedScaledDotProductAttention::vjp(
    const std::vector<array>& primals,
    const std::vector<array>& cotangents,
    const std::vector<int>& argnums,
    const std::vector<array>&) {
  std::vector<int> wanted;
  for (int i : argnums) {
    if (has_gradient(primals[i])) {
      wanted.push_back(i);
    }
  }
  auto fn = fallback_of(primals, wanted, config_, stream());
  auto grads = mlx::core::vjp(fn, select(primals, wanted), cotangents).second;
  std::vector<array> result;
  for (size_t i = 0, j = 0; i < argnums.size(); ++i) {
    auto& primal = primals[argnums[i]];
    result.push_back(
        has_gradient(primal) ? grads[j++] : zeros_like(primal, stream()));
  }
  return result;
}

std::vector<array> QuantizedScaledDotProductAttention::jvp(
    const std::vector<array>& primals,
    const std::vector<array>& tangents,
    const std::vector<int>& argnums) {
  std::vector<int> wanted;
  std::vector<array> moves;
  for (size_t i = 0; i < argnums.size(); ++i) {
    if (has_gradient(primals[argnums[i]])) {
      wanted.push_back(argnums[i]);
      moves.push_back(tangents[i]);
    }
  }
  auto fn = fallback_of(primals, wanted, config_, stream());
  return mlx::core::jvp(fn, select(primals, wanted), moves).second;
}

namespace {

// Inputs without a batch axis. Where one of them is mapped, each element of
// the map is a call of its own.
std::vector<int> unbatched_slots(const QuantizedAttentionConfig& config) {
  auto slots = input_slots(config);
  std::vector<int> unbatched;
  for (auto& slot : {slots.sinks, slots.k.codebook, slots.v.codebook}) {
    if (slot) {
      unbatched.push_back(*slot);
    }
  }
  if (config.has_block_table) {
    for (auto* x : {&slots.k, &slots.v}) {
      unbatched.push_back(x->codes);
      unbatched.push_back(x->scales);
      if (x->biases) {
        unbatched.push_back(*x->biases);
      }
    }
  }
  return unbatched;
}

array take_one(const array& x, int axis, int index, Stream s) {
  Shape start(x.ndim(), 0);
  Shape stop = x.shape();
  start[axis] = index;
  stop[axis] = index + 1;
  return squeeze(slice(x, start, stop, s), axis, s);
}

// [V, B, ...] as [V * B, ...], with V given to inputs that are not mapped.
array fold_batch(const array& x, int axis, int size, Stream s) {
  if (axis >= 0) {
    return flatten(moveaxis(x, axis, 0, s), 0, 1, s);
  }
  Shape shape = x.shape();
  shape.insert(shape.begin(), size);
  return flatten(broadcast_to(expand_dims(x, 0, s), shape, s), 0, 1, s);
}

} // namespace

std::pair<std::vector<array>, std::vector<int>>
QuantizedScaledDotProductAttention::vmap(
    const std::vector<array>& mapped,
    const std::vector<int>& axes) {
  auto s = stream();
  auto inputs = hold_shapes(mapped, s);
  auto unbatched = unbatched_slots(config_);
  auto is_unbatched = [&](int i) {
    return std::find(unbatched.begin(), unbatched.end(), i) != unbatched.end();
  };
  int size = 0;
  bool foldable = true;
  for (int i = 0; i < inputs.size(); ++i) {
    if (axes[i] >= 0) {
      size = inputs[i].shape(axes[i]);
      foldable = foldable && !is_unbatched(i);
    }
  }
  std::vector<array> outputs;
  if (foldable) {
    std::vector<array> folded;
    for (int i = 0; i < inputs.size(); ++i) {
      folded.push_back(
          is_unbatched(i) ? inputs[i]
                          : fold_batch(inputs[i], axes[i], size, s));
    }
    int batch = inputs[0].shape(axes[0] == 0 ? 1 : 0);
    for (auto& out : quantized_attention(folded, config_, s)) {
      outputs.push_back(unflatten(out, 0, {size, batch}, s));
    }
  } else {
    std::vector<std::vector<array>> parts(config_.return_lse ? 2 : 1);
    for (int v = 0; v < size; ++v) {
      auto one = inputs;
      for (int i = 0; i < inputs.size(); ++i) {
        if (axes[i] >= 0) {
          one[i] = take_one(inputs[i], axes[i], v, s);
        }
      }
      auto outs = quantized_attention(one, config_, s);
      for (size_t i = 0; i < parts.size(); ++i) {
        parts[i].push_back(outs[i]);
      }
    }
    for (auto& part : parts) {
      outputs.push_back(stack(part, 0, s));
    }
  }
  return {outputs, std::vector<int>(outputs.size(), 0)};
}

} // namespace mlx::core::fast
