// The op: all validation and every user error, defaults, layout of the inputs.

#include "mlx/quantized_sdpa.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <limits>
#include <map>
#include <mutex>
#include <sstream>
#include <stdexcept>

#include "mlx/ops.h"
#include "mlx/quantized_sdpa_primitive.h"
#include "mlx/transforms.h"

namespace mlx::core::fast {

namespace {

using quantized_sdpa::KVFormat;
using quantized_sdpa::KVMode;

// A wider window is no window, and positions minus this cannot overflow.
constexpr int largest_window = 1 << 30;

template <typename... Got>
[[noreturn]] void fail(const std::string& required, const Got&... got) {
  std::ostringstream text;
  text << "[quantized_scaled_dot_product_attention] " << required << "; got ";
  (text << ... << got);
  text << ".";
  throw std::invalid_argument(text.str());
}

std::string to_text(const Shape& shape) {
  std::ostringstream text;
  text << "[";
  for (size_t i = 0; i < shape.size(); ++i) {
    text << (i ? ", " : "") << shape[i];
  }
  text << "]";
  return text.str();
}

bool is_attention_float(Dtype type) {
  return type == float16 || type == bfloat16 || type == float32;
}

void check_float(const std::string& name, const array& x) {
  if (!is_attention_float(x.dtype())) {
    fail(name + " must be float16, bfloat16 or float32", "dtype ", x.dtype());
  }
}

void check_int32(const std::string& name, const array& x) {
  if (x.dtype() != int32) {
    fail(name + " must be int32", "dtype ", x.dtype());
  }
}

void check_shape(
    const std::string& name,
    const array& x,
    const std::string& meaning,
    const Shape& shape) {
  if (x.shape() != shape) {
    fail(
        name + " must have shape " + meaning + " = " + to_text(shape),
        "shape ",
        to_text(x.shape()));
  }
}

// What a mode fixes and what it defaults to.
struct ModeRule {
  const char* name;
  KVMode mode;
  std::vector<int> bits;
  // Empty: one scale a token.
  std::vector<int> groups;
  int default_bits;
  int default_group;
};

const std::vector<ModeRule>& mode_rules() {
  static const std::vector<ModeRule> rules = {
      {"affine", KVMode::Affine, {1, 2, 3, 4, 5, 6, 8}, {32, 64, 128}, 4, 64},
      {"mxfp4", KVMode::Mxfp4, {4}, {32}, 4, 32},
      {"mxfp8", KVMode::Mxfp8, {8}, {32}, 8, 32},
      {"nvfp4", KVMode::Nvfp4, {4}, {16}, 4, 16},
      {"turbo2", KVMode::Turbo, {2}, {}, 2, 0},
      {"turbo3", KVMode::Turbo, {3}, {}, 3, 0},
      {"turbo4", KVMode::Turbo, {4}, {}, 4, 0},
  };
  return rules;
}

const ModeRule& find_rule(const std::string& name, const QuantizedKV& x) {
  std::string mode = x.mode.value_or(x.biases ? "affine" : "mxfp4");
  std::string names;
  for (auto& rule : mode_rules()) {
    if (mode == rule.name) {
      return rule;
    }
    names += (names.empty() ? "" : ", ") + std::string(rule.name);
  }
  fail(name + "_mode must be one of " + names, "'", mode, "'");
}

std::string to_text(const std::vector<int>& values) {
  std::ostringstream text;
  for (size_t i = 0; i < values.size(); ++i) {
    text << (i == 0 ? "" : i + 1 == values.size() ? " or " : ", ") << values[i];
  }
  return text.str();
}

int pick(
    const std::string& name,
    const ModeRule& rule,
    const std::vector<int>& allowed,
    std::optional<int> given,
    int fallback) {
  int value = given.value_or(fallback);
  for (int a : allowed) {
    if (value == a) {
      return value;
    }
  }
  fail(name + " must be " + to_text(allowed) + " for mode " + rule.name, value);
}

void check_codes(const std::string& name, const array& codes) {
  if (codes.ndim() != 4) {
    fail(
        name + " must have rank 4",
        "rank ",
        codes.ndim(),
        ", shape ",
        to_text(codes.shape()));
  }
  if (codes.dtype() != uint32) {
    fail(name + " must be uint32 codes", "dtype ", codes.dtype());
  }
}

void check_width(
    const std::string& name,
    const array& codes,
    int bits,
    std::optional<int> q_dim) {
  int width = codes.shape(3);
  if (q_dim) {
    int64_t row_bits = int64_t(*q_dim) * bits;
    if (row_bits % 32 != 0 || width != row_bits / 32) {
      fail(
          name + " must hold the head dim " + std::to_string(*q_dim) +
              " of q in " + std::to_string(bits) +
              " bits a value, a last axis of D * bits / 32",
          width,
          " words");
    }
  } else if (width == 0 || int64_t(width) * 32 % bits != 0) {
    fail(
        name + " must hold whole values of " + std::to_string(bits) +
            " bits in its last axis",
        width,
        " words");
  }
}

void check_scales(
    const std::string& name,
    const array& scales,
    const array& codes,
    const KVFormat& format,
    int dim) {
  bool bytes = format.mode == KVMode::Mxfp4 || format.mode == KVMode::Mxfp8 ||
      format.mode == KVMode::Nvfp4;
  if (bytes && scales.dtype() != uint8) {
    fail(
        name + " must be uint8 for " + quantized_sdpa::format_name(format),
        "dtype ",
        scales.dtype());
  }
  if (!bytes) {
    check_float(name, scales);
  }
  Shape shape = codes.shape();
  shape[3] = dim / format.group_size;
  if (format.mode == KVMode::Turbo && scales.ndim() == 3) {
    shape.pop_back();
  }
  check_shape(name, scales, "[B, N_kv, T_kv, D / group_size]", shape);
}

void check_biases(
    const std::string& name,
    const QuantizedKV& x,
    const ModeRule& rule) {
  if (rule.mode == KVMode::Affine && !x.biases) {
    fail(name + "_biases must be given for mode affine", "None");
  }
  if (rule.mode != KVMode::Affine && x.biases) {
    fail(
        name + "_biases must be None for mode " + rule.name,
        "an array of shape ",
        to_text(x.biases->shape()));
  }
  if (x.biases) {
    check_float(name + "_biases", *x.biases);
  }
}

// Of an operand whose format is known. `q_dim` is given for K; V brings its own
// head dim.
void check_operand(
    const std::string& name,
    const AttentionArrays::Operand& x,
    const KVFormat& format,
    std::optional<int> q_dim) {
  check_width(name, x.codes, format.bits, q_dim);
  int dim = head_dim(x.codes, format);
  bool one_group = format.mode == KVMode::Turbo;
  if (one_group ? dim != format.group_size : dim % format.group_size != 0) {
    fail(
        "the head dim of " + name + " must be " +
            (one_group ? "" : "a multiple of ") + "the group size " +
            std::to_string(format.group_size),
        dim);
  }
  check_scales(name + "_scales", x.scales, x.codes, format, dim);
  if (x.biases) {
    check_shape(name + "_biases", *x.biases, "of the scales", x.scales.shape());
  }
  if (x.codebook) {
    check_shape(
        name + "_codebook", *x.codebook, "[2 ** bits]", {1 << format.bits});
  }
}

void check_ascending(const std::string& name, const array& codebook) {
  if (codebook.is_tracer()) {
    return;
  }
  array table = codebook;
  table.eval();
  for (int i = 1; i < table.size(); ++i) {
    float low = table.data<float>()[(i - 1) * table.strides(0)];
    float high = table.data<float>()[i * table.strides(0)];
    if (!(low < high)) {
      fail(name + " must ascend", low, " before ", high, " at ", i);
    }
  }
}

// One array for all calls, which GPUs need not fetch each time.
const array& usual_codebook(int bits) {
  static std::mutex mutex;
  static auto* codebooks = new std::map<int, array>;
  std::lock_guard lock(mutex);
  auto found = codebooks->find(bits);
  if (found == codebooks->end()) {
    auto& levels = lloyd_max_levels(bits);
    array codebook(levels.begin(), {int(levels.size())}, float32);
    found = codebooks->emplace(bits, codebook).first;
  }
  return found->second;
}

std::optional<array> resolve_codebook(
    const std::string& name,
    const QuantizedKV& x,
    const ModeRule& rule,
    int bits) {
  if (rule.mode != KVMode::Turbo) {
    if (x.codebook) {
      fail(name + "_codebook must come with a turbo mode", "mode ", rule.name);
    }
    return std::nullopt;
  }
  if (!x.codebook) {
    return usual_codebook(bits);
  }
  if (x.codebook->dtype() != float32) {
    fail(name + "_codebook must be float32", "dtype ", x.codebook->dtype());
  }
  return x.codebook;
}

struct ResolvedKV {
  KVFormat format;
  AttentionArrays::Operand arrays;
};

ResolvedKV resolve(
    const std::string& name,
    const QuantizedKV& x,
    std::optional<int> q_dim,
    Stream stream) {
  auto& rule = find_rule(name, x);
  int bits = pick(name + "_bits", rule, rule.bits, x.bits, rule.default_bits);
  check_codes(name, x.codes);
  KVFormat format{rule.mode, bits, 0};
  int dim = q_dim.value_or(head_dim(x.codes, format));
  auto groups = rule.groups.empty() ? std::vector<int>{dim} : rule.groups;
  int default_group = rule.groups.empty() ? dim : rule.default_group;
  format.group_size =
      pick(name + "_group_size", rule, groups, x.group_size, default_group);
  check_biases(name, x, rule);
  AttentionArrays::Operand arrays{
      x.codes, x.scales, x.biases, resolve_codebook(name, x, rule, bits)};
  check_operand(name, arrays, format, q_dim);
  if (x.codebook) {
    check_ascending(name + "_codebook", *x.codebook);
  }
  if (arrays.scales.ndim() == 3) {
    arrays.scales = expand_dims(arrays.scales, 3, stream);
  }
  return {format, arrays};
}

void check_q(const array& q) {
  if (q.ndim() != 4) {
    fail(
        "q must have rank 4",
        "rank ",
        q.ndim(),
        ", shape ",
        to_text(q.shape()));
  }
  check_float("q", q);
  if (q.shape(3) == 0) {
    fail("q must have a head dim above 0", "shape ", to_text(q.shape()));
  }
}

void check_heads(const array& q, const array& k, const array& v) {
  if (k.shape(1) == 0 || q.shape(1) % k.shape(1) != 0) {
    fail(
        "the heads of q must be a multiple of the heads of k",
        q.shape(1),
        " and ",
        k.shape(1));
  }
  Shape shape(k.shape().begin(), k.shape().begin() + 3);
  Shape v_shape(v.shape().begin(), v.shape().begin() + 3);
  if (v_shape != shape) {
    fail(
        "v must have the batch, heads and length of k, " + to_text(shape),
        to_text(v_shape));
  }
}

void check_block_table(const AttentionArrays& arrays) {
  auto& q = arrays.q;
  auto& k = arrays.k.codes;
  if (!arrays.block_table) {
    if (k.shape(0) != q.shape(0)) {
      fail(
          "k must have the batch size of q, " + std::to_string(q.shape(0)),
          k.shape(0));
    }
    return;
  }
  auto& table = *arrays.block_table;
  check_int32("block_table", table);
  if (table.ndim() != 2 || table.shape(0) != q.shape(0)) {
    fail(
        "block_table must have shape [B, max_blocks] with B = " +
            std::to_string(q.shape(0)),
        "shape ",
        to_text(table.shape()));
  }
  int64_t capacity = int64_t(table.shape(1)) * k.shape(2);
  if (capacity > std::numeric_limits<int>::max()) {
    fail("block_table must hold fewer than 2 ** 31 keys a sequence", capacity);
  }
  if (!arrays.lengths) {
    fail("block_table must come with lengths", "None");
  }
  if (table.shape(1) > 0 && (k.shape(0) == 0 || k.shape(2) == 0)) {
    fail(
        "block_table must point into a pool with blocks",
        "shape ",
        to_text(k.shape()));
  }
}

// All arrays but the mask against each other.
void check_together(const AttentionArrays& arrays) {
  check_heads(arrays.q, arrays.k.codes, arrays.v.codes);
  check_block_table(arrays);
  int batch = arrays.q.shape(0);
  if (arrays.lengths) {
    check_int32("lengths", *arrays.lengths);
    check_shape("lengths", *arrays.lengths, "[B]", {batch});
  }
  if (arrays.left_padding) {
    check_int32("left_padding", *arrays.left_padding);
    check_shape("left_padding", *arrays.left_padding, "[B]", {batch});
  }
  if (arrays.sinks) {
    check_float("sinks", *arrays.sinks);
    check_shape("sinks", *arrays.sinks, "[N_q]", {arrays.q.shape(1)});
  }
}

bool is_causal(const QuantizedAttentionOptions& options) {
  return options.causal || options.mask_mode == "causal";
}

void check_scalars(const QuantizedAttentionOptions& options) {
  if (options.mask_mode && *options.mask_mode != "causal") {
    fail(
        "mask must be None, 'causal' or an array",
        "'",
        *options.mask_mode,
        "'");
  }
  if (!std::isfinite(options.scale)) {
    fail("scale must be finite", options.scale);
  }
  if (options.window_size && *options.window_size <= 0) {
    fail("window_size must be above 0", *options.window_size);
  }
  if (options.window_size && !is_causal(options)) {
    fail("window_size must come with a causal mask", "no causal mask");
  }
  if (options.softcap &&
      !(std::isfinite(*options.softcap) && *options.softcap > 0)) {
    fail("softcap must be finite and above 0", *options.softcap);
  }
}

// [B, N_q, T_q, T_kv].
Shape mask_shape(const AttentionArrays& arrays) {
  auto& q = arrays.q;
  return {q.shape(0), q.shape(1), q.shape(2), kv_length(arrays)};
}

// A view of the whole; nothing is copied.
std::optional<array> resolve_mask(
    const std::optional<array>& mask,
    const Shape& full,
    Stream stream) {
  if (!mask) {
    return std::nullopt;
  }
  if (mask->dtype() != bool_ && !is_attention_float(mask->dtype())) {
    fail(
        "mask must be bool, float16, bfloat16 or float32",
        "dtype ",
        mask->dtype());
  }
  bool fits = mask->ndim() <= 4;
  for (int i = 0; fits && i < mask->ndim(); ++i) {
    int size = mask->shape(-1 - i);
    fits = size == 1 || size == full[3 - i];
  }
  if (!fits) {
    fail(
        "mask must broadcast to [B, N_q, T_q, T_kv] = " + to_text(full),
        "shape ",
        to_text(mask->shape()));
  }
  return broadcast_to(*mask, full, stream);
}

bool env_is_set(const char* name) {
  const char* value = std::getenv(name);
  return value && *value && std::string(value) != "0";
}

void check_range(const std::string& name, array x, int64_t low, int64_t high) {
  if (x.is_tracer()) {
    return;
  }
  x = contiguous(x);
  x.eval();
  for (int i = 0; i < x.size(); ++i) {
    int value = x.data<int>()[i];
    if (value < low || value > high) {
      fail(
          name + " must lie between " + std::to_string(low) + " and " +
              std::to_string(high),
          value,
          " at ",
          i);
    }
  }
}

// Only with MLX_QUANTIZED_SDPA_CHECK=1: values are known once evaluated.
void check_values(const AttentionArrays& arrays) {
  int kv_len = kv_length(arrays);
  if (arrays.lengths) {
    check_range("lengths", *arrays.lengths, 0, kv_len);
  }
  if (arrays.left_padding) {
    check_range("left_padding", *arrays.left_padding, 0, kv_len);
  }
  if (arrays.block_table) {
    int last = arrays.k.codes.shape(0) - 1;
    check_range("block_table", *arrays.block_table, 0, last);
  }
}

} // namespace

void check_shapes(
    const AttentionArrays& arrays,
    const QuantizedAttentionConfig& config,
    const Stream& stream) {
  check_q(arrays.q);
  check_operand("k", arrays.k, config.k, arrays.q.shape(3));
  check_operand("v", arrays.v, config.v, std::nullopt);
  check_together(arrays);
  if (arrays.mask) {
    check_shape(
        "mask, in a graph for all shapes,",
        *arrays.mask,
        "[B, N_q, T_q, T_kv]",
        mask_shape(arrays));
  }
  auto reason = unsupported_reason(make_problem(arrays, config), stream);
  if (!reason.empty()) {
    fail("a graph for all shapes needs a fused kernel for each call", reason);
  }
}

std::vector<array> quantized_scaled_dot_product_attention(
    const array& q,
    const QuantizedKV& k,
    const QuantizedKV& v,
    const QuantizedAttentionOptions& options,
    StreamOrDevice s /* = {} */) {
  auto stream = to_stream(s);
  check_q(q);
  check_scalars(options);
  auto rk = resolve("k", k, q.shape(3), stream);
  auto rv = resolve("v", v, std::nullopt, stream);
  AttentionArrays arrays{
      .q = q,
      .k = rk.arrays,
      .v = rv.arrays,
      .sinks = options.sinks,
      .left_padding = options.left_padding,
      .lengths = options.lengths,
      .block_table = options.block_table};
  check_together(arrays);
  arrays.mask = resolve_mask(options.mask, mask_shape(arrays), stream);
  if (arrays.sinks) {
    arrays.sinks = astype(*arrays.sinks, float32, stream);
  }
  if (env_is_set("MLX_QUANTIZED_SDPA_CHECK")) {
    check_values(arrays);
  }

  QuantizedAttentionConfig config{
      .k = rk.format,
      .v = rv.format,
      .scale = options.scale,
      .causal = is_causal(options),
      .window_size = std::min(options.window_size.value_or(0), largest_window),
      .softcap = options.softcap.value_or(0.0f),
      .return_lse = options.return_lse,
      .has_mask = options.mask.has_value(),
      .has_sinks = options.sinks.has_value(),
      .has_left_padding = options.left_padding.has_value(),
      .has_lengths = options.lengths.has_value(),
      .has_block_table = options.block_table.has_value()};
  auto reason = unsupported_reason(make_problem(arrays, config), stream);
  if (env_is_set("MLX_QUANTIZED_SDPA_FORCE_FALLBACK")) {
    reason = "MLX_QUANTIZED_SDPA_FORCE_FALLBACK in the environment";
  }
  if (options.force_fused && !reason.empty()) {
    fail("force_fused needs a fused kernel for the call", reason);
  }
  auto inputs = pack_inputs(arrays);
  return reason.empty() ? quantized_attention(inputs, config, stream)
                        : quantized_attention_fallback(inputs, config, stream);
}

} // namespace mlx::core::fast
