// Quantized attention by MLX's own ops, chunk by chunk over the keys, so that
// the score matrix never exists. It serves gradients, export and devices
// without a kernel.

#include <algorithm>
#include <limits>

#include "mlx/backend/common/kv_codec.h"
#include "mlx/ops.h"
#include "mlx/quantized_sdpa_primitive.h"
#include "mlx/transforms.h"

namespace mlx::core::fast {

namespace {

using quantized_sdpa::KVFormat;
using quantized_sdpa::KVMode;

constexpr float infinity = std::numeric_limits<float>::infinity();

array constant(float value) {
  return array(value, float32);
}

// Codes of a dense LSB-first bit stream, one uint32 a value.
array unpack_codes(const array& packed, int bits, int dim, Stream s) {
  std::vector<int> low_word, high_word;
  std::vector<uint32_t> low_shift, high_shift, high_mask;
  int words = packed.shape(-1);
  for (int i = 0; i < dim; ++i) {
    int word = i * bits / 32;
    int shift = i * bits % 32;
    int spill = shift + bits - 32;
    low_word.push_back(word);
    high_word.push_back(std::min(word + 1, words - 1));
    low_shift.push_back(shift);
    high_shift.push_back(spill > 0 ? bits - spill : 0);
    high_mask.push_back(spill > 0 ? (1u << spill) - 1 : 0);
  }
  auto ints = [&](auto& v, Dtype t) { return array(v.begin(), {dim}, t); };
  auto low = right_shift(
      take(packed, ints(low_word, int32), -1, s), ints(low_shift, uint32), s);
  auto high = left_shift(
      bitwise_and(
          take(packed, ints(high_word, int32), -1, s),
          ints(high_mask, uint32),
          s),
      ints(high_shift, uint32),
      s);
  auto mask = array((1u << bits) - 1, uint32);
  return bitwise_and(bitwise_or(low, high, s), mask, s);
}

// The value of every code, or of every scale, of a format.
template <typename F>
array table_of(int size, F value) {
  std::vector<float> values;
  for (int i = 0; i < size; ++i) {
    values.push_back(value(uint32_t(i)));
  }
  return array(values.begin(), {size}, float32);
}

array code_table(const KVFormat& format) {
  return format.mode == KVMode::Mxfp8 ? table_of(256, kv::e4m3_to_float)
                                      : table_of(16, kv::e2m1_to_float);
}

array scale_table(const KVFormat& format) {
  return format.mode == KVMode::Nvfp4 ? table_of(256, kv::e4m3_to_float)
                                      : table_of(256, kv::e8m0_to_float);
}

// Formats other than affine go through tables: MLX's own conversion from fp8
// can neither be exported nor read an odd number of scales.
array decode(
    const AttentionArrays::Operand& x,
    const KVFormat& format,
    int dim,
    Stream s) {
  bool affine = format.mode == KVMode::Affine;
  if (affine && kv::mlx_dequantizes(format.bits)) {
    return dequantize(
        x.codes,
        astype(x.scales, float32, s),
        astype(*x.biases, float32, s),
        format.group_size,
        format.bits,
        "affine",
        std::nullopt,
        float32,
        s);
  }
  bool turbo = format.mode == KVMode::Turbo;
  auto codes = unpack_codes(x.codes, format.bits, dim, s);
  auto values = affine
      ? astype(codes, float32, s)
      : take(turbo ? *x.codebook : code_table(format), codes, s);
  auto scales = affine || turbo ? astype(x.scales, float32, s)
                                : take(scale_table(format), x.scales, s);
  int n_groups = dim / format.group_size;
  values = unflatten(values, -1, {n_groups, format.group_size}, s);
  values = multiply(values, expand_dims(scales, -1, s), s);
  if (affine) {
    values = add(values, expand_dims(astype(*x.biases, float32, s), -1, s), s);
  }
  return flatten(values, -2, -1, s);
}

array slice_keys(const array& x, int axis, int begin, int end, Stream s) {
  Shape start(x.ndim(), 0);
  Shape stop = x.shape();
  start[axis] = begin;
  stop[axis] = end;
  return slice(x, start, stop, s);
}

// x, computed after `before`. Depends has neither jvp nor vmap, so that traced
// graphs get a zero made of it instead.
array after(array x, const std::vector<array>& before, Stream s) {
  if (!before[0].is_tracer()) {
    return depends({x}, before)[0];
  }
  for (auto& each : before) {
    auto top = max(stop_gradient(each, s), s);
    auto never = less(top, constant(-infinity), s);
    x = bitwise_or(x, astype(never, x.dtype(), s), s);
  }
  return x;
}

array clamp(const array& x, const array& low, const array& high, Stream s) {
  return minimum(maximum(x, low, s), high, s);
}

// Rows, masks and the running state of the walk over the keys.
class Walk {
 public:
  Walk(
      const AttentionArrays& arrays,
      const QuantizedAttentionConfig& config,
      Stream s)
      : a_(arrays),
        c_(config),
        s_(s),
        p_(make_problem(arrays, config)),
        groups_(p_.n_q_heads / p_.n_kv_heads),
        q_(split_heads(
            multiply(astype(arrays.q, float32, s), constant(config.scale), s))),
        end_(sequence_end()),
        begin_(sequence_begin()),
        max_(zeros({1}, float32, s)),
        sum_(max_),
        acc_(max_) {
    Shape rows{p_.batch, p_.n_kv_heads, groups_, p_.q_len, 1};
    Shape values = rows;
    values[4] = p_.v_dim;
    max_ = full(rows, constant(-infinity), s);
    sum_ = zeros(rows, float32, s);
    acc_ = zeros(values, float32, s);
    if (a_.sinks) {
      auto sinks = reshape(*a_.sinks, {1, p_.n_kv_heads, groups_, 1, 1}, s);
      max_ = broadcast_to(stop_gradient(sinks, s), rows, s);
      auto shifted = subtract(broadcast_to(sinks, rows, s), finite(max_), s);
      sum_ = exp(shifted, s);
    }
  }

  void attend(int begin, int end) {
    auto k = load(a_.k, c_.k, p_.k_dim, begin, end);
    auto v = load(a_.v, c_.v, p_.v_dim, begin, end);
    auto scores = matmul(q_, swapaxes(expand_dims(k, 2, s_), -1, -2, s_), s_);
    if (c_.softcap > 0) {
      auto cap = constant(c_.softcap);
      scores = multiply(tanh(divide(scores, cap, s_), s_), cap, s_);
    }
    scores = apply_masks(scores, begin, end);
    // The result does not depend on the maximum, so it needs no gradient.
    auto top = stop_gradient(max(scores, -1, true, s_), s_);
    auto new_max = maximum(max_, top, s_);
    auto shift = finite(new_max);
    auto weights = exp(subtract(scores, shift, s_), s_);
    auto decay = exp(subtract(max_, shift, s_), s_);
    sum_ = add(multiply(sum_, decay, s_), sum(weights, -1, true, s_), s_);
    acc_ =
        add(multiply(acc_, decay, s_),
            matmul(weights, expand_dims(v, 2, s_), s_),
            s_);
    max_ = new_max;
  }

  std::vector<array> finish() {
    auto empty = equal(sum_, constant(0), s_);
    auto safe_sum = where(empty, constant(1), sum_, s_);
    auto out = divide(acc_, safe_sum, s_);
    std::vector<array> results{astype(join_heads(out), a_.q.dtype(), s_)};
    if (c_.return_lse) {
      auto lse = where(
          empty, constant(-infinity), add(max_, log(safe_sum, s_), s_), s_);
      results.push_back(squeeze(join_heads(lse), -1, s_));
    }
    return results;
  }

 private:
  // -inf - -inf is NaN: a maximum of nothing counts as 0.
  array finite(const array& max) {
    auto nothing = equal(max, constant(-infinity), s_);
    return where(nothing, constant(0), max, s_);
  }

  array split_heads(const array& x) {
    return unflatten(x, 1, {p_.n_kv_heads, groups_}, s_);
  }

  array join_heads(const array& x) {
    return flatten(x, 1, 2, s_);
  }

  // [B, 1, 1, 1, 1], so that it meets [B, N_kv, G, T_q, T_kv].
  array per_row(const array& x) {
    return reshape(x, {p_.batch, 1, 1, 1, 1}, s_);
  }

  array sequence_end() {
    auto whole = array(p_.kv_len, int32);
    return a_.lengths ? per_row(clamp(*a_.lengths, array(0, int32), whole, s_))
                      : whole;
  }

  // The first key that the first query may see.
  array sequence_begin() {
    auto begin = array(0, int32);
    if (a_.left_padding) {
      begin = maximum(per_row(*a_.left_padding), begin, s_);
    }
    if (c_.causal && c_.window_size > 0) {
      auto before = array(p_.q_len + c_.window_size - 1, int32);
      begin = maximum(subtract(end_, before, s_), begin, s_);
    }
    return begin;
  }

  // Keys that no query sees may hold anything, and 0 * inf is NaN.
  array load(
      const AttentionArrays::Operand& x,
      const KVFormat& format,
      int dim,
      int begin,
      int end) {
    auto part = keys(x, begin, end);
    // Chunks wait for both sums over the weights of the last one, or the scores
    // of all of them would be in memory at once.
    if (begin > 0) {
      part.codes = after(part.codes, {acc_, sum_}, s_);
    }
    auto values = decode(part, format, dim, s_);
    if (!a_.lengths && !a_.left_padding && c_.window_size == 0) {
      return values;
    }
    auto exists = squeeze(existing(begin, end), {2, 3}, s_);
    return where(expand_dims(exists, -1, s_), values, constant(0), s_);
  }

  array key_index(int begin, int end) {
    return reshape(arange(begin, end, int32, s_), {1, 1, 1, 1, -1}, s_);
  }

  array existing(int begin, int end) {
    auto key = key_index(begin, end);
    return logical_and(less(key, end_, s_), greater_equal(key, begin_, s_), s_);
  }

  AttentionArrays::Operand
  keys(const AttentionArrays::Operand& x, int begin, int end) {
    auto part = [&](const array& a) {
      if (!a_.block_table) {
        return slice_keys(a, 2, begin, end, s_);
      }
      int block = x.codes.shape(2);
      auto table = slice_keys(
          *a_.block_table, 1, begin / block, (end - 1) / block + 1, s_);
      auto ids =
          clamp(table, array(0, int32), array(x.codes.shape(0) - 1, int32), s_);
      // The whole of several blocks, or a part of one.
      int from = begin % block;
      auto pool =
          slice_keys(a, 2, from, std::min(block, from + end - begin), s_);
      // [B, blocks, N_kv, block, W] to [B, N_kv, keys, W].
      auto blocks = swapaxes(take(pool, ids, 0, s_), 1, 2, s_);
      return flatten(blocks, 2, 3, s_);
    };
    return {
        part(x.codes),
        part(x.scales),
        x.biases ? std::optional(part(*x.biases)) : std::nullopt,
        x.codebook};
  }

  array apply_masks(array scores, int begin, int end) {
    auto key = key_index(begin, end);
    auto visible = existing(begin, end);
    if (c_.causal) {
      auto step = reshape(arange(0, p_.q_len, int32, s_), {1, 1, 1, -1, 1}, s_);
      auto pos = add(subtract(end_, array(p_.q_len, int32), s_), step, s_);
      visible = logical_and(visible, less_equal(key, pos, s_), s_);
      if (c_.window_size > 0) {
        auto oldest = subtract(pos, array(c_.window_size - 1, int32), s_);
        visible = logical_and(visible, greater_equal(key, oldest, s_), s_);
      }
    }
    if (a_.mask) {
      auto mask = split_heads(slice_keys(*a_.mask, 3, begin, end, s_));
      if (mask.dtype() == bool_) {
        visible = logical_and(visible, mask, s_);
      } else {
        scores = add(scores, astype(mask, float32, s_), s_);
      }
    }
    return where(visible, scores, constant(-infinity), s_);
  }

  const AttentionArrays& a_;
  const QuantizedAttentionConfig& c_;
  Stream s_;
  quantized_sdpa::Problem p_;
  int groups_;
  array q_;
  array end_;
  array begin_;
  array max_;
  array sum_;
  array acc_;
};

std::vector<array> empty_results(
    const AttentionArrays& arrays,
    const QuantizedAttentionConfig& config,
    Stream s) {
  Shape shape = arrays.q.shape();
  shape[3] = make_problem(arrays, config).v_dim;
  std::vector<array> results{zeros(shape, arrays.q.dtype(), s)};
  if (config.return_lse) {
    shape.pop_back();
    results.push_back(zeros(shape, float32, s));
  }
  return results;
}

} // namespace

std::vector<array> quantized_attention_fallback(
    const std::vector<array>& inputs,
    const QuantizedAttentionConfig& config,
    Stream stream) {
  auto arrays = unpack_inputs(config, hold_shapes(inputs, stream));
  if (arrays.q.size() == 0) {
    return empty_results(arrays, config, stream);
  }
  int kv_len = kv_length(arrays);
  int block = arrays.block_table ? arrays.k.codes.shape(2) : 0;
  int step =
      quantized_sdpa::fallback_chunk(make_problem(arrays, config), block);
  Walk walk(arrays, config, stream);
  for (int begin = 0, end; begin < kv_len; begin = end) {
    end = begin + std::min(step, kv_len - begin);
    if (step < block) {
      // A chunk within a block ends with it.
      end = std::min(end, begin - begin % block + block);
    }
    walk.attend(begin, end);
  }
  return walk.finish();
}

} // namespace mlx::core::fast
