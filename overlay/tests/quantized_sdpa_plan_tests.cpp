// The codecs, the online softmax and the plan: none of them needs an array.

#include <cmath>
#include <limits>
#include <string>
#include <vector>

#include "doctest/doctest.h"

#include "mlx/backend/common/kv_codec.h"
#include "mlx/backend/common/softmax_state.h"
#include "mlx/backend/common/visible_keys.h"
#include "mlx/quantized_sdpa_plan.h"

using namespace mlx::core;
using namespace mlx::core::quantized_sdpa;

namespace {

constexpr float infinity = std::numeric_limits<float>::infinity();

// A small float without infinities, from its definition.
double small_float(int code, int exponent_bits, int mantissa_bits, int bias) {
  int mantissa = code % (1 << mantissa_bits);
  int exponent = (code >> mantissa_bits) % (1 << exponent_bits);
  bool negative = code >> (exponent_bits + mantissa_bits);
  double fraction = std::ldexp(mantissa, -mantissa_bits) + (exponent > 0);
  double magnitude = std::ldexp(fraction, std::max(exponent, 1) - bias);
  return negative ? -magnitude : magnitude;
}

double e4m3(int code) {
  return code % 128 == 127 ? std::nan("") : small_float(code, 4, 3, 7);
}

double e2m1(int code) {
  return small_float(code, 2, 1, 1);
}

double e8m0(int code) {
  return code == 255 ? infinity : std::ldexp(1.0, code - 127);
}

double value_of(KVMode mode, int bits, int code) {
  switch (mode) {
    case KVMode::Mxfp8:
      return e4m3(code);
    case KVMode::Mxfp4:
    case KVMode::Nvfp4:
      return e2m1(code);
    default:
      REQUIRE(code < (1 << bits));
      return code;
  }
}

bool same(double a, double b) {
  return a == b ? std::signbit(a) == std::signbit(b)
                : std::isnan(a) && std::isnan(b);
}

// Places of a pack that decode a code to another value than its definition's.
template <typename Codec>
int wrong_places(KVMode mode) {
  int wrong = 0;
  for (int place = 0; place < kv::pack_codes(Codec::bits); ++place) {
    for (int code = 0; code < 1 << Codec::bits; ++code) {
      uint64_t others =
          ~(uint64_t((1 << Codec::bits) - 1) << (place * Codec::bits));
      for (uint64_t rest : {uint64_t(0), others}) {
        uint64_t pack = rest | uint64_t(code) << (place * Codec::bits);
        double expected = value_of(mode, Codec::bits, code);
        wrong += !same(Codec::decode(pack, place), expected);
      }
    }
  }
  return wrong;
}

template <typename Codec>
int wrong_scales(double (*expected)(int)) {
  int wrong = 0;
  for (int code = 0; code < 256; ++code) {
    wrong += !same(Codec::decode_scale(code), expected(code));
  }
  return wrong;
}

Problem problem(int q_len, int kv_len, int dim = 128) {
  KVFormat format{KVMode::Affine, 4, 64};
  return {
      .batch = 1,
      .n_q_heads = 32,
      .n_kv_heads = 8,
      .q_len = q_len,
      .kv_len = kv_len,
      .k_dim = dim,
      .v_dim = dim,
      .k = format,
      .v = format,
      .half_precision = true};
}

} // namespace

TEST_CASE("test kv codecs decode every code at every place"){
#define CHECK_CODEC(name, mode, width, codec)       \
  SUBCASE(#name) {                                  \
    CHECK_EQ(wrong_places<codec>(KVMode::mode), 0); \
    CHECK_EQ(codec::bits, width);                   \
    CHECK_EQ(kv::pack_bytes(width) * 8 % width, 0); \
  }
    FOR_EACH_KV_CODEC(CHECK_CODEC)
#undef CHECK_CODEC
}

TEST_CASE("test kv codec byte scales") {
  CHECK_EQ(wrong_scales<kv::Mxfp4>(e8m0), 0);
  CHECK_EQ(wrong_scales<kv::Mxfp8>(e8m0), 0);
  CHECK_EQ(wrong_scales<kv::Nvfp4>(e4m3), 0);
}

TEST_CASE("test kv codec dot on raw codes") {
  // 2 * (0.5 * 3 + 0.25) + 4 * (0.5 * 7 + 0.25)
  CHECK_EQ(kv::finish_dot<kv::Affine<4>>(34, 6, 0.5f, 0.25f), 18.5f);
  CHECK_EQ(kv::finish_dot<kv::Mxfp4>(34, 6, 0.5f, 0.25f), 17.0f);
}

TEST_CASE("test softmax state of pieces is that of the whole") {
  std::vector<float> scores = {3, -infinity, 80, 79, -5, 80, 1};
  double sum = 0;
  for (float x : scores) {
    sum += std::exp(double(x) - 80);
  }
  for (size_t cut = 0; cut <= scores.size(); ++cut) {
    kv::SoftmaxState parts[2] = {kv::softmax_init(), kv::softmax_init()};
    for (size_t i = 0; i < scores.size(); ++i) {
      auto& part = parts[i >= cut];
      kv::softmax_raise(part, scores[i]);
      part.sum += kv::softmax_weight(scores[i], part.max);
    }
    kv::softmax_merge(parts[0], parts[1]);
    CHECK_EQ(parts[0].max, 80);
    CHECK_EQ(kv::softmax_lse(parts[0]), doctest::Approx(80 + std::log(sum)));
    CHECK_EQ(kv::softmax_finish(parts[0]), doctest::Approx(1 / sum));
  }
}

TEST_CASE("test softmax state without a visible key") {
  auto state = kv::softmax_init();
  kv::softmax_raise(state, -infinity);
  auto factors = kv::softmax_merge(state, kv::softmax_init());
  CHECK_EQ(factors.first, 0);
  CHECK_EQ(factors.second, 0);
  CHECK_EQ(kv::softmax_finish(state), 0);
  CHECK_EQ(kv::softmax_lse(state), -infinity);
}

TEST_CASE("test quantized attention plan covers rows and keys") {
  auto check = [](int q_len, int kv_len, int threads) {
    CAPTURE(q_len);
    CAPTURE(kv_len);
    CAPTURE(threads);
    auto plan = plan_cpu(problem(q_len, kv_len), true, threads);
    int rows = 32 / 8 * q_len;
    CHECK_GE(plan.n_row_blocks * plan.row_block, rows);
    CHECK_LT((plan.n_row_blocks - 1) * plan.row_block, rows);
    CHECK_GE(plan.n_key_chunks * plan.key_chunk, kv_len);
    CHECK_GE(plan.n_key_chunks, 1);
    CHECK_LT((plan.n_key_chunks - 1) * plan.key_chunk, std::max(kv_len, 1));
  };
  for (int q_len : {1, 2, 7, 33, 512}) {
    for (int kv_len : {0, 1, 511, 512, 513, 4096, 100000}) {
      check(q_len, kv_len, 1);
      check(q_len, kv_len, 8);
      check(q_len, kv_len, 256);
    }
  }
}

TEST_CASE("test quantized attention plan takes no integers in float32") {
  for (int q_len : {1, 8, 512}) {
    auto p = problem(q_len, 4096);
    p.half_precision = false;
    CHECK(plan_cpu(p, true, 2).kernel != CpuKernel::integer);
    p.half_precision = true;
    CHECK(plan_cpu(p, false, 2).kernel != CpuKernel::integer);
  }
}

TEST_CASE("test quantized attention visible keys") {
  constexpr int most = std::numeric_limits<int>::max();
  auto check = [](kv::KeyRange keys, int begin, int end) {
    CHECK_EQ(keys.begin, begin);
    CHECK_EQ(keys.end, end);
  };
  check(kv::existing_keys(40, 3, 30), 3, 30);
  check(kv::existing_keys(40, most, 30), 30, 30);
  check(kv::existing_keys(40, -most, most), 0, 40);
  check(kv::existing_keys(40, 3, -1), 0, 0);
  CHECK_EQ(kv::existing_block(-5, 4), 0);
  CHECK_EQ(kv::existing_block(most, 4), 3);

  kv::KeyRange keys{3, 30};
  check(kv::visible_keys(keys, {false, 4, 0}, 0), 3, 30);
  check(kv::visible_keys(keys, {true, 4, 0}, 3), 3, 30);
  check(kv::visible_keys(keys, {true, 4, 0}, 0), 3, 27);
  check(kv::visible_keys(keys, {true, 4, 5}, 0), 22, 27);
  check(kv::visible_keys(keys, {true, 4, most}, 0), 3, 27);
  // The first queries are before every key.
  check(kv::visible_keys(keys, {true, 40, 5}, 0), 3, 3);
  check(kv::visible_to_any(keys, {true, 4, 5}, 0, 3), 22, 30);
  check(kv::visible_to_all(keys, {true, 4, 5}, 0, 3), 25, 27);
}

TEST_CASE("test quantized attention plan of threads") {
  CHECK_EQ(cpu_threads(problem(1, 1), 64), 1);
  CHECK_EQ(cpu_threads(problem(512, 100000), 64), 64);
}

TEST_CASE("test quantized attention cpu partial results are bounded") {
  for (int batch : {1, 100, 100000}) {
    auto p = problem(1, 100000);
    p.batch = batch;
    auto plan = plan_cpu(p, true, 64);
    int64_t groups = cpu_groups_at_once(p, plan, 64);
    CHECK(groups >= 1);
    CHECK(groups <= int64_t(batch) * p.n_kv_heads * plan.n_row_blocks);
    CHECK(groups * plan.n_key_chunks * plan.row_block * p.v_dim <= 1 << 22);
  }
}

TEST_CASE("test quantized attention fallback chunk is whole blocks or less") {
  for (int block : {8, 48, 100, 1024}) {
    CHECK_EQ(fallback_chunk(problem(1, 4096), block) % block, 0);
  }
  for (int q_len : {1, 512}) {
    for (int block : {1025, 4096, 99991, 1 << 30}) {
      int chunk = fallback_chunk(problem(q_len, block), block);
      int most = fallback_chunk(problem(q_len, block), 0);
      CHECK(chunk <= most);
      CHECK(2 * chunk > most);
    }
  }
  CHECK_EQ(fallback_chunk(problem(1, 5), 0), 5);
  CHECK_EQ(fallback_chunk(problem(1, 0), 0), 1);
}

TEST_CASE("test quantized attention names what has no kernel") {
  CHECK_EQ(unsupported_reason(problem(1, 64), Backend::cpu), "");
  CHECK_EQ(
      unsupported_reason(problem(1, 64, 72), Backend::cpu),
      "a head dim of 72; the CPU kernels take multiples of 16 up to 1024");
  CHECK_EQ(
      unsupported_reason(problem(1, 64), Backend::none),
      "a GPU stream in a build without a GPU");
  CHECK_EQ(format_name({KVMode::Nvfp4, 4, 16}), "nvfp44_16");
}
