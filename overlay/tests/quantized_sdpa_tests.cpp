// The op on the CPU: its result, and its errors by their words.

#include <functional>
#include <string>

#include "doctest/doctest.h"

#include "mlx/mlx.h"
#include "mlx/quantized_sdpa.h"

using namespace mlx::core;

namespace {

using fast::QuantizedAttentionOptions;
using fast::QuantizedKV;

constexpr int B = 2, N_q = 4, N_kv = 2, T_q = 3, T_kv = 40, D = 64;

struct Call {
  array q = random::normal({B, N_q, T_q, D});
  array k_values = random::normal({B, N_kv, T_kv, D});
  array v_values = random::normal({B, N_kv, T_kv, D});
  QuantizedKV k = quantized(k_values);
  QuantizedKV v = quantized(v_values);
  QuantizedAttentionOptions options{.scale = 0.125f};

  static QuantizedKV quantized(const array& x) {
    auto parts = quantize(x, 64, 8);
    return {parts[0], parts[1], parts[2], 64, 8};
  }

  std::vector<array> run() const {
    return fast::quantized_scaled_dot_product_attention(
        q, k, v, options, Device::cpu);
  }

  array dense(const std::string& mask_mode) const {
    auto values = [](const QuantizedKV& x) {
      return dequantize(x.codes, x.scales, x.biases, 64, 8);
    };
    return fast::scaled_dot_product_attention(
        q, values(k), values(v), options.scale, mask_mode);
  }
};

std::string error_of(const std::function<void(Call&)>& change) {
  Call call;
  change(call);
  try {
    call.run();
  } catch (const std::invalid_argument& error) {
    return error.what();
  }
  return "no error";
}

} // namespace

TEST_CASE("test quantized attention is attention on dequantized keys") {
  for (bool causal : {false, true}) {
    Call call;
    call.options.causal = causal;
    call.options.force_fused = true;
    auto outputs = call.run();
    CHECK_EQ(outputs.size(), 1);
    auto expected = call.dense(causal ? "causal" : "");
    CHECK(allclose(outputs[0], expected, 1e-5, 1e-5).item<bool>());
  }
}

TEST_CASE("test quantized attention log-sum-exp merges disjoint keys") {
  Call whole;
  whole.options.return_lse = true;
  auto part = [&](int begin, int end) {
    Call call = whole;
    for (auto* x : {&call.k, &call.v}) {
      for (auto* y : {&x->codes, &x->scales, &*x->biases}) {
        *y = slice(*y, {0, 0, begin, 0}, {B, N_kv, end, y->shape(3)});
      }
    }
    return call.run();
  };
  auto a = part(0, 7), b = part(7, T_kv), all = whole.run();
  auto lse = logaddexp(a[1], b[1]);
  auto merged =
      add(multiply(a[0], expand_dims(exp(subtract(a[1], lse)), 3)),
          multiply(b[0], expand_dims(exp(subtract(b[1], lse)), 3)));
  CHECK(allclose(lse, all[1], 1e-5, 1e-5).item<bool>());
  CHECK(allclose(merged, all[0], 1e-5, 1e-5).item<bool>());
}

TEST_CASE("test quantized attention without a visible key is zero") {
  Call call;
  call.options.lengths = array({0, 0}, int32);
  call.options.return_lse = true;
  auto outputs = call.run();
  CHECK(array_equal(outputs[0], zeros_like(call.q)).item<bool>());
  CHECK(all(isneginf(outputs[1])).item<bool>());
}

TEST_CASE("test quantized attention levels of the turbo modes") {
  for (int bits : {2, 3, 4}) {
    auto& levels = fast::lloyd_max_levels(bits);
    CHECK_EQ(levels.size(), 1 << bits);
    for (size_t i = 0; i < levels.size(); ++i) {
      CHECK_EQ(levels[i], -levels[levels.size() - 1 - i]);
      CHECK((i == 0 || levels[i - 1] < levels[i]));
    }
  }
  // Max (1960), table I.
  CHECK_EQ(fast::lloyd_max_levels(2)[3], doctest::Approx(1.510).epsilon(1e-3));
  CHECK_EQ(fast::lloyd_max_levels(4)[15], doctest::Approx(2.733).epsilon(1e-3));
}

TEST_CASE("test quantized attention errors") {
  struct Row {
    const char* text;
    std::function<void(Call&)> change;
  };
  const Row rows[] = {
      {"q must have rank 4; got rank 2, shape [3, 4].",
       [](auto& c) { c.q = zeros({3, 4}); }},
      {"q must be float16, bfloat16 or float32; got dtype int32.",
       [](auto& c) { c.q = zeros({B, N_q, T_q, D}, int32); }},
      {"k must be uint32 codes; got dtype float32.",
       [](auto& c) { c.k.codes = c.k_values; }},
      {"k must hold the head dim 64 of q in 4 bits a value, a last axis of D * "
       "bits / 32; got 16 words.",
       [](auto& c) { c.k.bits = 4; }},
      {"v_bits must be 1, 2, 3, 4, 5, 6 or 8 for mode affine; got 7.",
       [](auto& c) { c.v.bits = 7; }},
      {"k_group_size must be 32, 64 or 128 for mode affine; got 16.",
       [](auto& c) { c.k.group_size = 16; }},
      {"k_mode must be one of affine, mxfp4, mxfp8, nvfp4, turbo2, turbo3, "
       "turbo4; got 'int8'.",
       [](auto& c) { c.k.mode = "int8"; }},
      {"v_biases must be given for mode affine; got None.",
       [](auto& c) {
         c.v.biases.reset();
         c.v.mode = "affine";
       }},
      {"k must have the batch size of q, 1; got 2.",
       [](auto& c) { c.q = zeros({1, N_q, T_q, D}); }},
      {"the heads of q must be a multiple of the heads of k; got 3 and 2.",
       [](auto& c) { c.q = zeros({B, 3, T_q, D}); }},
      {"mask must broadcast to [B, N_q, T_q, T_kv] = [2, 4, 3, 40]; got shape "
       "[39].",
       [](auto& c) { c.options.mask = zeros({39}); }},
      {"window_size must come with a causal mask; got no causal mask.",
       [](auto& c) { c.options.window_size = 4; }},
      {"block_table must come with lengths; got None.",
       [](auto& c) { c.options.block_table = zeros({B, 1}, int32); }},
  };
  for (auto& row : rows) {
    CHECK_EQ(
        error_of(row.change),
        "[quantized_scaled_dot_product_attention] " + std::string(row.text));
  }
}
