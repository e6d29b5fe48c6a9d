// K or V as the kernels read them: where a key lies, its codes, its scales.

#pragma once

#include "mlx/backend/metal/kernels/quantized_sdpa_features.h"

namespace mlx {
namespace core {
namespace quantized_sdpa {

template <typename Codec_, typename Scale_, typename Bias_, int dim_>
struct KVOperand {
  using Codec = Codec_;
  using Scale = Scale_;
  using Bias = Bias_;
  KV_CONST int dim = dim_;
  KV_CONST int group_size = Codec_::group_size > 0 ? Codec_::group_size : dim_;
  KV_CONST int table_size = Codec_::has_codebook ? 1 << Codec_::bits : 1;
};

// One KV head.
template <typename Operand>
struct KVHead {
  const device uint32_t* codes;
  const device typename Operand::Scale* scales;
  const device typename Operand::Bias* biases;
};

template <typename Operand>
METAL_FUNC KVHead<Operand> kv_head(
    const device uint32_t* codes,
    const device typename Operand::Scale* scales,
    const device typename Operand::Bias* biases,
    int head,
    const constant MetalOperandParams& params) {
  KVHead<Operand> x;
  x.codes = codes + head * params.codes[1];
  x.scales = scales + head * params.scales[1];
  x.biases = biases + head * params.biases[1];
  return x;
}

// Index on the first and on the sequence axis.
struct KeyPlace {
  int64_t block;
  int64_t row;
};

METAL_FUNC KeyPlace find_key(
    int key,
    int batch,
    const device int* block_table,
    const constant MetalParams& params) {
  KeyPlace place;
  place.block = batch;
  place.row = key;
  if (has_block_table) {
    int slot = key / params.block_size;
    int id = block_table
        [batch * params.block_table[0] + slot * params.block_table[1]];
    place.block = metal::clamp(id, 0, params.n_blocks - 1);
    place.row = key - slot * params.block_size;
  }
  return place;
}

// Consecutive codes of one key, from a word boundary on; they share a scale
// run by run.
template <typename Operand, int n_codes_>
struct CodeSegment {
  using Codec = typename Operand::Codec;
  KV_CONST int n_codes = n_codes_;
  KV_CONST int n_words = n_codes_ * Codec::bits / 32;
  KV_CONST int run =
      n_codes_ < Operand::group_size ? n_codes_ : Operand::group_size;
  KV_CONST int n_runs = n_codes_ / run;
  static_assert(n_codes_ % kv::word_codes(Codec::bits) == 0, "whole words");
  static_assert(Operand::group_size % run == 0, "a run lies in one group");
  uint32_t words[n_words];
  float scales[n_runs];
  float biases[n_runs];
};

// Where a key does not exist nothing is read and every value is 0.
template <typename Operand, int n>
METAL_FUNC void load_segment(
    thread CodeSegment<Operand, n>& segment,
    const thread KVHead<Operand>& x,
    KeyPlace place,
    int first,
    bool exists,
    const constant MetalOperandParams& params) {
  using Segment = CodeSegment<Operand, n>;
  using Codec = typename Operand::Codec;
  if (!exists) {
    KV_UNROLL
    for (int i = 0; i < Segment::n_words; ++i) {
      segment.words[i] = 0;
    }
    KV_UNROLL
    for (int i = 0; i < Segment::n_runs; ++i) {
      segment.scales[i] = 0;
      segment.biases[i] = 0;
    }
    return;
  }
  const device uint32_t* codes =
      x.codes + place.block * params.codes[0] + place.row * params.codes[2];
  int word = first / 32 * Codec::bits + first % 32 * Codec::bits / 32;
  KV_UNROLL
  for (int i = 0; i < Segment::n_words; ++i) {
    segment.words[i] =
        has_code_gaps ? codes[(word + i) * params.codes[3]] : codes[word + i];
  }
  int group = first / Operand::group_size;
  int64_t scale = place.block * params.scales[0] + place.row * params.scales[2];
  int64_t bias = place.block * params.biases[0] + place.row * params.biases[2];
  KV_UNROLL
  for (int i = 0; i < Segment::n_runs; ++i) {
    segment.scales[i] =
        Codec::decode_scale(x.scales[scale + (group + i) * params.scales[3]]);
    segment.biases[i] = 0;
    if (Codec::has_bias) {
      segment.biases[i] =
          float(x.biases[bias + (group + i) * params.biases[3]]);
    }
  }
}

// Code i as a number, before scale and bias. i is known when unrolled.
template <typename Operand, int n>
METAL_FUNC float code_value(
    const thread CodeSegment<Operand, n>& segment,
    int i,
    const threadgroup float* table) {
  using Codec = typename Operand::Codec;
  constexpr int codes = kv::pack_codes(Codec::bits);
  constexpr int bits = kv::pack_bytes(Codec::bits) * 8;
  int word = i / codes * bits / 32;
  int shift = i / codes * bits % 32;
  uint64_t pack = segment.words[word] >> shift;
  if (shift + bits > 32) {
    pack |= uint64_t(segment.words[word + 1]) << (32 - shift);
  }
  if (Codec::has_codebook) {
    return table[kv::extract<Codec::bits>(pack, i % codes)];
  }
  return Codec::decode(pack, i % codes);
}

template <typename Operand>
METAL_FUNC void load_table(
    threadgroup float* table,
    const device float* codebook,
    uint thread_index,
    const constant MetalOperandParams& params) {
  if (Operand::Codec::has_codebook &&
      thread_index < uint(Operand::table_size)) {
    table[thread_index] = codebook[thread_index * params.codebook];
  }
}

} // namespace quantized_sdpa
} // namespace core
} // namespace mlx
