#pragma once

#include <optional>
#include <tuple>
#include <vector>

#include "mlx/primitives.h"
#include "mlx/quantized_sdpa_plan.h"

namespace mlx::core::fast {

// All that a call says besides its arrays, fully resolved.
struct QuantizedAttentionConfig {
  quantized_sdpa::KVFormat k;
  quantized_sdpa::KVFormat v;
  float scale;
  bool causal;
  // 0: no window, no cap.
  int window_size;
  float softcap;
  bool return_lse;
  bool has_mask;
  bool has_sinks;
  bool has_left_padding;
  bool has_lengths;
  bool has_block_table;

  bool operator==(const QuantizedAttentionConfig& other) const = default;
};

// Where each array stands among the inputs of the primitive.
template <typename Array>
struct QuantizedAttentionArrays {
  using Optional = std::optional<Array>;
  struct Operand {
    Array codes;
    Array scales;
    Optional biases = std::nullopt;
    Optional codebook = std::nullopt;
  };
  Array q;
  Operand k;
  Operand v;
  // [B, N_q, T_q, T_kv], [N_q] float32, [B] int32, [B], [B, max_blocks].
  Optional mask = std::nullopt;
  Optional sinks = std::nullopt;
  Optional left_padding = std::nullopt;
  Optional lengths = std::nullopt;
  Optional block_table = std::nullopt;
};

using AttentionArrays = QuantizedAttentionArrays<array>;
// The same with the position of each array in place of the array.
using AttentionSlots = QuantizedAttentionArrays<int>;

AttentionSlots input_slots(const QuantizedAttentionConfig& config);
std::vector<array> pack_inputs(const AttentionArrays& arrays);
AttentionArrays unpack_inputs(
    const QuantizedAttentionConfig& config,
    const std::vector<array>& inputs);

// The same arrays; a graph that is traced with them refuses other shapes, for
// reshape goes by numbers.
std::vector<array> hold_shapes(std::vector<array> xs, Stream s);
// Values in a row of codes.
int head_dim(const array& codes, const quantized_sdpa::KVFormat& format);
// T_kv: the length of K, or of what the block table can hold.
int kv_length(const AttentionArrays& arrays);
quantized_sdpa::Problem make_problem(
    const AttentionArrays& arrays,
    const QuantizedAttentionConfig& config);
// Empty where a fused kernel runs on the stream's device, else why none does.
std::string unsupported_reason(
    const quantized_sdpa::Problem& problem,
    const Stream& stream);
// By the backend for CUDA.
quantized_sdpa::CudaDevice cuda_device_of(const Stream& stream);

// Throws the op's errors for shapes that a primitive of this config, traced
// with others, cannot take.
void check_shapes(
    const AttentionArrays& arrays,
    const QuantizedAttentionConfig& config,
    const Stream& stream);

// The fused op from validated arrays.
std::vector<array> quantized_attention(
    const std::vector<array>& inputs,
    const QuantizedAttentionConfig& config,
    Stream stream);

// The same result by MLX's own ops, over chunks of the keys.
std::vector<array> quantized_attention_fallback(
    const std::vector<array>& inputs,
    const QuantizedAttentionConfig& config,
    Stream stream);

class QuantizedScaledDotProductAttention : public Primitive {
 public:
  QuantizedScaledDotProductAttention(
      Stream stream,
      const QuantizedAttentionConfig& config)
      : Primitive(stream), config_(config) {}

  // Mode, bits and group size.
  using FormatState = std::tuple<quantized_sdpa::KVMode, int, int>;

  // From what state() gave, for import_function.
  template <typename... Rest>
  QuantizedScaledDotProductAttention(
      Stream stream,
      const FormatState& k,
      const FormatState& v,
      Rest... rest)
      : Primitive(stream), config_{from_state(k), from_state(v), rest...} {}

  void eval_cpu(const std::vector<array>& inputs, std::vector<array>& outputs)
      override;
  void eval_gpu(const std::vector<array>& inputs, std::vector<array>& outputs)
      override;

  DEFINE_VMAP()
  DEFINE_GRADS()
  DEFINE_NAME(QuantizedScaledDotProductAttention)

  bool is_equivalent(const Primitive& other) const override;
  std::vector<Shape> output_shapes(const std::vector<array>& inputs) override;

  // Bindings, so that a member that is missing here does not compile.
  auto state() const {
    auto& [k, v, scale, causal, window, cap, lse, mask, sinks, pad, len, table] =
        config_;
    return std::make_tuple(
        to_state(k),
        to_state(v),
        scale,
        causal,
        window,
        cap,
        lse,
        mask,
        sinks,
        pad,
        len,
        table);
  }

 private:
  static FormatState to_state(const quantized_sdpa::KVFormat& format) {
    auto& [mode, bits, group_size] = format;
    return {mode, bits, group_size};
  }
  static quantized_sdpa::KVFormat from_state(const FormatState& state) {
    auto& [mode, bits, group_size] = state;
    return {mode, bits, group_size};
  }

  QuantizedAttentionConfig config_;
};

} // namespace mlx::core::fast
