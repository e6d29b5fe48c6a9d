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

// One KV head of one sequence.
template <typename Operand>
struct KVHead {
  const device uint32_t* codes;
  const device typename Operand::Scale* scales;
  const device typename Operand::Bias* biases;
  const threadgroup float* table;
  const device int* block_table;
  int batch;
};

template <typename Operand>
METAL_FUNC KVHead<Operand> make_kv_head(
    const device uint32_t* codes,
    const device typename Operand::Scale* scales,
    const device typename Operand::Bias* biases,
    const threadgroup float* table,
    const device int* block_table,
    uint3 group,
    const constant MetalOperandParams& params) {
  KVHead<Operand> x;
  x.codes = codes + group.y * params.codes[1];
  x.scales = scales + group.y * params.scales[1];
  x.biases = biases + group.y * params.biases[1];
  x.table = table;
  x.block_table = block_table;
  x.batch = group.z;
  return x;
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

// Index on the first and on the sequence axis.
struct KeyPlace {
  int64_t block;
  int64_t row;
};

template <typename Operand>
METAL_FUNC KeyPlace find_key(
    const thread KVHead<Operand>& x,
    int key,
    const constant MetalParams& params) {
  KeyPlace place;
  place.block = x.batch;
  place.row = key;
  if (has_block_table) {
    int slot = key / params.block_size;
    int id =
        x.block_table
            [x.batch * params.block_table[0] + slot * params.block_table[1]];
    place.block = kv::existing_block(id, params.n_blocks);
    place.row = key - slot * params.block_size;
  }
  return place;
}

// Consecutive codes of one key; the first begins the first word.
template <typename Operand, int n_codes_>
struct CodeSegment {
  using Codec = typename Operand::Codec;
  KV_CONST int n_codes = n_codes_;
  KV_CONST int n_words = (n_codes_ * Codec::bits + 31) / 32;
  static_assert(
      n_codes_ % kv::pack_codes(Codec::bits) == 0 || n_words == 1,
      "packs lie in the words");
  uint32_t words[n_words];
};

template <typename Operand>
METAL_FUNC const device uint32_t* key_codes(
    const thread KVHead<Operand>& x,
    KeyPlace place,
    const constant MetalOperandParams& params) {
  return x.codes + place.block * params.codes[0] + place.row * params.codes[2];
}

METAL_FUNC uint32_t load_word(
    const device uint32_t* codes,
    int i,
    const constant MetalOperandParams& params) {
  return has_code_gaps ? codes[i * params.codes[3]] : codes[i];
}

// From a word boundary on.
template <typename Operand, int n>
METAL_FUNC void load_codes(
    thread CodeSegment<Operand, n>& segment,
    const thread KVHead<Operand>& x,
    KeyPlace place,
    int first,
    const constant MetalOperandParams& params) {
  using Codec = typename Operand::Codec;
  const device uint32_t* codes = key_codes(x, place, params);
  int word = first / 32 * Codec::bits + first % 32 * Codec::bits / 32;
  KV_UNROLL
  for (int i = 0; i < CodeSegment<Operand, n>::n_words; ++i) {
    segment.words[i] = load_word(codes, word + i, params);
  }
}

// Code i as a number, before scale and bias. i is known when unrolled.
template <typename Operand, int n>
METAL_FUNC float code_value(
    const thread CodeSegment<Operand, n>& segment,
    int i,
    const thread KVHead<Operand>& x) {
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
    return x.table[kv::extract<Codec::bits>(pack, i % codes)];
  }
  return Codec::decode(pack, i % codes);
}

template <typename Operand>
METAL_FUNC float load_scale(
    const thread KVHead<Operand>& x,
    KeyPlace place,
    int group,
    const constant MetalOperandParams& params) {
  int64_t at = place.block * params.scales[0] + place.row * params.scales[2] +
      group * params.scales[3];
  return Operand::Codec::decode_scale(x.scales[at]);
}

template <typename Operand>
METAL_FUNC float load_bias(
    const thread KVHead<Operand>& x,
    KeyPlace place,
    int group,
    const constant MetalOperandParams& params) {
  if (!Operand::Codec::has_bias) {
    return 0;
  }
  int64_t at = place.block * params.biases[0] + place.row * params.biases[2] +
      group * params.biases[3];
  return float(x.biases[at]);
}

} // namespace quantized_sdpa
} // namespace core
} // namespace mlx
