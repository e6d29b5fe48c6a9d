// Compares the CPU kernels of one instruction set with float64 attention, for
// machines that only an emulator stands for. Prints the worst error.

#include <cmath>
#include <cstdio>
#include <cstring>
#include <random>
#include <vector>

#include "mlx/backend/common/kv_codec.h"
#include "mlx/backend/cpu/quantized_sdpa_kernels.h"

using namespace mlx::core;
using namespace mlx::core::quantized_sdpa;

namespace {

struct Format {
  const char* name;
  int bits;
  int group_size;
  bool has_bias;
  bool has_codebook;
  bool byte_scale;
  float (*decode)(uint64_t pack, int i);
};

#define KV_FORMAT(text, mode, width, codec) \
  {#text,                                   \
   codec::bits,                             \
   codec::group_size,                       \
   codec::has_bias,                         \
   codec::has_codebook,                     \
   codec::byte_scale,                       \
   codec::decode},
const Format formats[] = {FOR_EACH_KV_CODEC(KV_FORMAT)};
#undef KV_FORMAT

struct Case {
  int k_format;
  int v_format;
  int dim;
  int heads;
  int q_len;
  int kv_len;
  Scalar q_type;
  bool causal;
  int window_size;
  float softcap;
  bool bool_mask;
  bool sinks;
};

// Everything that a call reads, and its result.
class Call {
 public:
  Call(const Case& c, unsigned seed) : case_(c), random_(seed) {
    args_.k = operand(c.k_format, 0);
    args_.v = operand(c.v_format, 1);
    fill_query();
    if (c.bool_mask) {
      fill_mask();
    }
    for (int i = 0; i < c.heads; ++i) {
      sinks_.push_back(uniform(-1, 1));
    }
    args_.sinks = c.sinks ? sinks_.data() : nullptr;
    args_.n_q_heads = c.heads;
    args_.n_kv_heads = 1;
    args_.q_len = c.q_len;
    args_.kv_len = c.kv_len;
    args_.scale = 1.0f / std::sqrt(float(c.dim));
    args_.softcap = c.softcap;
    args_.window_size = c.window_size;
    args_.causal = c.causal;
    args_.out.strides[0] = c.heads * c.q_len * c.dim;
    args_.out.strides[1] = c.q_len * c.dim;
    args_.out.strides[2] = c.dim;
    args_.out.strides[3] = 1;
  }

  // The result, then the log-sum-exp, in float64.
  std::vector<double> expected() const {
    std::vector<double> result(case_.heads * case_.q_len * (case_.dim + 1));
    for (int head = 0; head < case_.heads; ++head) {
      for (int pos = 0; pos < case_.q_len; ++pos) {
        attend(head, pos, result);
      }
    }
    return result;
  }

  // The same by one of the two float kernels.
  std::vector<float> run(const CpuKernels& kernels, bool tile) {
    int rows = case_.heads * case_.q_len;
    std::vector<float> result(rows * (case_.dim + 1));
    args_.out.data = result.data();
    args_.lse = result.data() + rows * case_.dim;
    size_t scratch = tile ? kernels.tile_scratch(args_, rows)
                          : kernels.vector_scratch(args_);
    std::vector<float> memory(scratch + 16);
    auto aligned = reinterpret_cast<float*>(
        (reinterpret_cast<uintptr_t>(memory.data()) + 63) / 64 * 64);
    // Two parts, so that they are merged too.
    std::vector<float> acc(2 * rows * case_.dim);
    std::vector<kv::SoftmaxState> states(2 * rows);
    int middle = case_.kv_len / 2;
    auto attend_part = tile ? kernels.attend_tile : kernels.attend_vector;
    CpuItem item{0, 0, 0, rows, 0, middle};
    attend_part(args_, item, aligned, {acc.data(), states.data(), 1});
    item.key_begin = middle;
    item.key_end = case_.kv_len;
    CpuPartials second{acc.data() + rows * case_.dim, states.data() + rows, 1};
    attend_part(args_, item, aligned, second);
    kernels.finish(args_, item, {acc.data(), states.data(), 2});
    return result;
  }

 private:
  bool sees(int pos, int key) const {
    int last = case_.kv_len - case_.q_len + pos;
    if (case_.causal &&
        (key > last ||
         (case_.window_size > 0 && key <= last - case_.window_size))) {
      return false;
    }
    return !case_.bool_mask || mask_[pos * case_.kv_len + key];
  }

  void attend(int head, int pos, std::vector<double>& result) const {
    int dim = case_.dim;
    int row = head * case_.q_len + pos;
    double* out = result.data() + row * dim;
    double sum = case_.sinks ? std::exp(double(sinks_[head])) : 0;
    for (int key = 0; key < case_.kv_len; ++key) {
      if (!sees(pos, key)) {
        continue;
      }
      double score = 0;
      for (int d = 0; d < dim; ++d) {
        score += query_[row * dim + d] * values_[0][key * dim + d];
      }
      score *= args_.scale;
      if (case_.softcap > 0) {
        score = case_.softcap * std::tanh(score / case_.softcap);
      }
      double weight = std::exp(score);
      sum += weight;
      for (int d = 0; d < dim; ++d) {
        out[d] += weight * values_[1][key * dim + d];
      }
    }
    for (int d = 0; d < dim; ++d) {
      out[d] = sum > 0 ? out[d] / sum : 0;
    }
    result[case_.heads * case_.q_len * dim + row] = std::log(sum);
  }

  float uniform(float low, float high) {
    return std::uniform_real_distribution<float>(low, high)(random_);
  }

  CpuOperand operand(int index, int place) {
    const Format& format = formats[index];
    CpuOperand x;
    int dim = case_.dim;
    x.format = index;
    x.dim = dim;
    x.group_size = format.has_codebook ? dim
        : format.group_size > 0        ? format.group_size
                                       : 32;
    int row = dim * format.bits / 8;
    int n_groups = dim / x.group_size;
    bool e4m3 = format.group_size == 16;
    for (int i = 0; i < case_.kv_len * row; ++i) {
      uint8_t code = random_();
      // 0x7f and 0xff are not numbers in e4m3.
      codes_[place].push_back(
          format.byte_scale && (code & 0x7f) == 0x7f ? 0 : code);
    }
    x.codes.data = codes_[place].data();
    x.codes.strides[2] = row;
    x.codes.strides[3] = 1;
    for (int i = 0; i < case_.kv_len * n_groups; ++i) {
      scales_[place].push_back(uniform(0.01f, 0.02f));
      biases_[place].push_back(uniform(-0.5f, 0.1f));
      byte_scales_[place].push_back(
          e4m3 ? 0x20 + random_() % 0x18 : 118 + random_() % 8);
    }
    x.scales.strides[2] = n_groups;
    x.scales.strides[3] = 1;
    x.biases = x.scales;
    if (format.byte_scale) {
      x.scales.data = byte_scales_[place].data();
      x.scales.type = e4m3 ? Scalar::e4m3 : Scalar::e8m0;
    } else {
      x.scales.data = scales_[place].data();
    }
    if (format.has_bias) {
      x.biases.data = biases_[place].data();
    }
    for (int i = 0; i < 16; ++i) {
      codebook_[i] = 0.3f * float(i) - 2.0f;
    }
    x.codebook = codebook_;
    dequantize(format, x, place);
    return x;
  }

  void dequantize(const Format& format, const CpuOperand& x, int place) {
    int n_groups = x.dim / x.group_size;
    int pack_codes = kv::pack_codes(format.bits);
    int pack_bytes = pack_codes * format.bits / 8;
    for (int i = 0; i < case_.kv_len * x.dim; ++i) {
      uint64_t pack = 0;
      memcpy(&pack, &codes_[place][i / pack_codes * pack_bytes], pack_bytes);
      double value = format.decode(pack, i % pack_codes);
      if (format.has_codebook) {
        value = codebook_[int(value)];
      }
      int group = i / x.dim * n_groups + i % x.dim / x.group_size;
      double scale = scales_[place][group];
      if (format.byte_scale) {
        uint32_t stored = byte_scales_[place][group];
        scale = x.scales.type == Scalar::e4m3 ? kv::e4m3_to_float(stored)
                                              : kv::e8m0_to_float(stored);
      }
      double bias = format.has_bias ? biases_[place][group] : 0;
      values_[place].push_back(scale * value + bias);
    }
  }

  // Values that every type of q holds exactly.
  void fill_query() {
    int n = case_.heads * case_.q_len * case_.dim;
    for (int i = 0; i < n; ++i) {
      float x = std::round(uniform(-64, 64)) / 32;
      uint32_t bits;
      memcpy(&bits, &x, sizeof(x));
      uint32_t half = x == 0
          ? 0
          : (bits >> 16 & 0x8000) | ((bits & 0x7fffffff) - (112u << 23)) >> 13;
      query_.push_back(x);
      half_query_.push_back(case_.q_type == Scalar::f16 ? half : bits >> 16);
    }
    args_.q.type = case_.q_type;
    args_.q.data = case_.q_type == Scalar::f32 ? (void*)query_.data()
                                               : (void*)half_query_.data();
    args_.q.strides[1] = case_.q_len * case_.dim;
    args_.q.strides[2] = case_.dim;
    args_.q.strides[3] = 1;
  }

  void fill_mask() {
    for (int i = 0; i < case_.q_len * case_.kv_len; ++i) {
      mask_.push_back(random_() % 4 != 0);
    }
    args_.mask.data = mask_.data();
    args_.mask.type = Scalar::boolean;
    args_.mask.strides[2] = case_.kv_len;
    args_.mask.strides[3] = 1;
  }

  Case case_;
  std::mt19937 random_;
  CpuArgs args_{};
  std::vector<uint8_t> codes_[2], byte_scales_[2], mask_;
  std::vector<float> scales_[2], biases_[2], query_, sinks_;
  std::vector<uint16_t> half_query_;
  std::vector<double> values_[2];
  float codebook_[16];
};

// Normalised mean squared error; infinite where only one is finite.
double error_of(
    const std::vector<float>& found,
    const std::vector<double>& wanted) {
  double error = 0;
  double size = 0;
  for (size_t i = 0; i < found.size(); ++i) {
    if (std::isfinite(wanted[i]) && std::isfinite(found[i])) {
      error += (found[i] - wanted[i]) * (found[i] - wanted[i]);
      size += wanted[i] * wanted[i];
    } else if (found[i] != wanted[i]) {
      return INFINITY;
    }
  }
  return size > 0 ? error / size : error;
}

std::vector<Case> make_cases() {
  constexpr int n_formats = sizeof(formats) / sizeof(formats[0]);
  const Scalar types[] = {Scalar::f32, Scalar::f16, Scalar::bf16};
  std::vector<Case> cases;
  for (int k = 0; k < n_formats; ++k) {
    for (int other : {0, 4}) {
      int i = int(cases.size());
      Case c{};
      c.k_format = k;
      c.v_format = (k + other) % n_formats;
      c.dim = i % 3 == 0 ? 64 : i % 3 == 1 ? 128 : 256;
      c.heads = 1 << i % 3;
      c.q_len = 1;
      c.kv_len = 1 + (i * 67) % 300;
      c.q_type = types[i % 3];
      cases.push_back(c);
      c.q_len = 2 + i % 21;
      c.causal = i % 2;
      c.window_size = c.causal ? i % 3 * 20 : 0;
      c.softcap = i % 4 == 3 ? 10.0f : 0.0f;
      c.bool_mask = i % 4 == 1;
      c.sinks = i % 3 == 2;
      cases.push_back(c);
    }
  }
  return cases;
}

} // namespace

#ifndef COMPARED_KERNELS
#define COMPARED_KERNELS cpu_kernels_neon
#endif

int main() {
  constexpr double bound = 1e-10;
  const CpuKernels& kernels = COMPARED_KERNELS();
  double worst = 0;
  int n = 0;
  for (const Case& c : make_cases()) {
    Call call(c, unsigned(n));
    std::vector<double> wanted = call.expected();
    for (bool tile : {false, true}) {
      if (!tile && c.heads * c.q_len > 4) {
        continue;
      }
      double error = error_of(call.run(kernels, tile), wanted);
      if (!(error < bound)) {
        printf(
            "%s keys, %s values, %s kernel, q_len %d, kv_len %d: error %g\n",
            formats[c.k_format].name,
            formats[c.v_format].name,
            tile ? "tile" : "vector",
            c.q_len,
            c.kv_len,
            error);
        return 1;
      }
      worst = error > worst ? error : worst;
      ++n;
    }
  }
  printf(
      "%d cases of the %s kernels, worst normalised squared error %.2g\n",
      n,
      kernels.target,
      worst);
}
