#pragma once

#include <optional>
#include <string>
#include <vector>

#include "mlx/api.h"
#include "mlx/array.h"
#include "mlx/utils.h"

namespace mlx::core::fast {

// K or V as mx.quantize stores it: codes, scales and, for affine, biases.
// What is not given follows the mode's default.
struct QuantizedKV {
  array codes;
  array scales;
  std::optional<array> biases = std::nullopt;
  std::optional<int> group_size = std::nullopt;
  std::optional<int> bits = std::nullopt;
  std::optional<std::string> mode = std::nullopt;
  std::optional<array> codebook = std::nullopt;
};

struct QuantizedAttentionOptions {
  float scale = 1.0f;
  bool causal = false;
  // "causal" or nothing. `mask` then hides keys, too.
  std::optional<std::string> mask_mode = std::nullopt;
  std::optional<array> mask = std::nullopt;
  std::optional<array> sinks = std::nullopt;
  std::optional<array> left_padding = std::nullopt;
  std::optional<array> lengths = std::nullopt;
  std::optional<array> block_table = std::nullopt;
  std::optional<int> window_size = std::nullopt;
  std::optional<float> softcap = std::nullopt;
  bool return_lse = false;
  bool force_fused = false;
};

/** Attention that reads a quantized KV cache.
 *
 * Returns the output [B, N_q, T_q, D_v] in the dtype of q and, with return_lse,
 * the log-sum-exp of the scores [B, N_q, T_q] in float32. **/
MLX_API std::vector<array> quantized_scaled_dot_product_attention(
    const array& q,
    const QuantizedKV& k,
    const QuantizedKV& v,
    const QuantizedAttentionOptions& options,
    StreamOrDevice s = {});

// The 2**bits ascending levels that quantize N(0, 1) with the least squared
// error (Lloyd 1982, Max 1960): the default table of the turbo modes.
MLX_API const std::vector<float>& lloyd_max_levels(int bits);

} // namespace mlx::core::fast
