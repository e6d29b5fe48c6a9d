// Prefill for sm_90a. One warpgroup decodes tiles of K and V into shared
// memory, two others multiply: the softmax of one runs beside the products of
// the other, and its own next scores beside its last weighted sum.

#pragma once

#include "mlx/backend/cuda/quantized_sdpa_prefill_mma.cuh"
#include "mlx/backend/cuda/quantized_sdpa_prefill_wgmma_ptx.cuh"

namespace mlx::core::quantized_sdpa::prefill {

template <
    typename K_,
    typename V_,
    Scalar q_type_,
    int dim_,
    int keys_,
    int stages_,
    bool bent_,
    bool paged_>
struct PrefillWgmma {
  using K = K_;
  using V = V_;
  static constexpr Scalar q_type = q_type_;
  static constexpr int dim = dim_;
  static constexpr int keys = keys_;
  static constexpr int stages = stages_;
  // Whether scores take a mask array or a soft cap.
  static constexpr bool bent = bent_;
  // Keys are found through a block table.
  static constexpr bool paged = paged_;

  static constexpr PrefillWgmmaShape shape{
      K::operand(dim),
      V::operand(dim),
      keys,
      stages};
  static constexpr int consumers = shape.consumers;
  static constexpr int group_threads = shape.group_threads;
  static constexpr int rows = shape.rows;
  static constexpr int threads = shape.threads;
  static constexpr int producer_registers = 104;
  static constexpr int consumer_registers = 200;
  static constexpr int q_part = shape.q_part();
  static constexpr int kv_part = shape.kv_part();
  static constexpr int kv_bytes = shape.tile_bytes();
  static constexpr int units = dim / unit_codes;
};

// Addresses of a stage's barriers: full and empty, of K and of V.
template <typename C>
struct Stages {
  uint32_t base;

  KV_DEVICE uint32_t full(bool v, int stage) const {
    return base + 8 * (4 * stage + 2 * v);
  }
  KV_DEVICE uint32_t empty(bool v, int stage) const {
    return full(v, stage) + 8;
  }
};

// Byte of piece `piece` (eight values) of a row, rows of 128 bytes swizzled.
KV_DEVICE int swizzled(int row, int piece, int part_bytes) {
  return piece / 8 * part_bytes + row * 128 + ((piece ^ row) & 7) * 16;
}

// Pieces of a unit change places with their neighbours in every other 64
// columns, so that the lanes of a store meet no bank twice.
KV_DEVICE int piece_of(int unit, int i) {
  return 4 * unit + (i ^ (unit & 2));
}

// Where column `position` of a tile lies in the head dim.
template <typename Codec>
KV_DEVICE int dim_of_column(int position) {
  int unit = position / unit_codes;
  int within = position % unit_codes ^ (unit & 2) * 8;
  return unit * unit_codes + F16Convert<Codec>::source(within);
}

// Codes and scales on their way from global memory: those of V arrive while K
// is decoded, those of the next K while V is.
template <typename C>
struct Arriving {
  using K = typename C::K;
  using V = typename C::V;
  static constexpr int n = C::keys * C::units / C::group_threads;
  static constexpr int n_words = K::bits > V::bits ? K::bits : V::bits;
  static constexpr int least_group =
      K::group_size < V::group_size ? K::group_size : V::group_size;

  uint32_t words[n][n_words];
  uint32_t scales[C::dim / least_group];
  uint32_t biases[C::dim / least_group];
};

// The producer's part for K or for V.
template <typename C, typename S, bool is_v>
struct Producer {
  using Codec = typename S::Codec;
  static constexpr int n = Arriving<C>::n;
  static constexpr int n_groups = C::dim / S::group_size;
  static constexpr int n_scales = scales_per_unit<Codec>;
  static constexpr int tile_at = is_v ? C::shape.v_tiles() : C::shape.k_tiles();
  static constexpr int scales_at =
      is_v ? C::shape.v_scales() : C::shape.k_scales();
  static_assert(C::keys <= C::group_threads, "a thread has one key's scales");

  int exponent = least_exponent;
  float table_unit;
  // Of the head, and of the sequence unless the cache is paged.
  const uint8_t* codes_base;
  const uint8_t* scales_base;
  const uint8_t* biases_base;

  static KV_DEVICE const uint8_t* base_of(
      const CudaTensor& x,
      const BlockPlace& b) {
    return address_of(x, {C::paged ? 0 : b.batch, 0}, b.kv_head);
  }

  KV_DEVICE void start(const CudaOperand& x, const BlockPlace& b) {
    codes_base = base_of(x.codes, b) + threadIdx.x % C::units * (4 * S::bits);
    scales_base = base_of(x.scales, b);
    biases_base = base_of(x.biases, b);
  }

  // The host sees to it that these strides fit in 32 bits.
  KV_DEVICE const uint8_t*
  at_key(const uint8_t* base, const CudaTensor& x, KeyPlace at) const {
    base += int64_t(at.row) * int(x.strides[2]);
    return C::paged ? base + at.outer * x.strides[0] : base;
  }

  KV_DEVICE KeyPlace
  place(const CudaParams& p, const BlockPlace& b, int key) const {
    return C::paged ? paged_place(p, b.batch, key) : KeyPlace{0, key};
  }

  // Past the end the last key is read again and gets a scale of zero.
  KV_DEVICE void load_codes(
      const CudaParams& p,
      const CudaOperand& x,
      const BlockPlace& b,
      int first_key,
      KeyRange seen,
      int i,
      Arriving<C>& arriving) const {
    constexpr int step = C::group_threads / C::units;
    int key = first_key + i * step + int(threadIdx.x / C::units);
    KeyPlace at = place(p, b, min(key, seen.end - 1));
    uint32_t words[S::bits];
    load_words<S::bits>(at_key(codes_base, x.codes, at), true, words);
#pragma unroll
    for (int w = 0; w < S::bits; ++w) {
      arriving.words[i][w] = words[w];
    }
  }

  KV_DEVICE void load_scales(
      const CudaParams& p,
      const CudaOperand& x,
      const BlockPlace& b,
      int first_key,
      KeyRange seen,
      Arriving<C>& arriving) const {
    KeyPlace at = place(p, b, min(first_key + int(threadIdx.x), seen.end - 1));
    const uint8_t* from = at_key(scales_base, x.scales, at);
#pragma unroll
    for (int g = 0; g < n_groups; ++g) {
      arriving.scales[g] = load_scalar_bits<S::scale_type>(from);
      from += int(x.scales.strides[3]);
    }
    if constexpr (Codec::has_bias) {
      from = at_key(biases_base, x.biases, at);
#pragma unroll
      for (int g = 0; g < n_groups; ++g) {
        arriving.biases[g] = load_scalar_bits<S::bias_type>(from);
        from += int(x.biases.strides[3]);
      }
    }
  }

  KV_DEVICE float scale(const Arriving<C>& arriving, int g) const {
    return decode_scalar<S::scale_type>(arriving.scales[g]) * table_unit;
  }

  KV_DEVICE float bias(const Arriving<C>& arriving, int g) const {
    return Codec::has_bias ? decode_scalar<S::bias_type>(arriving.biases[g])
                           : 0;
  }

  // Scales as pairs of float16 over the exponent, which rises first where
  // they would not fit.
  KV_DEVICE void
  prepare_scales(uint8_t* shared, int n_keys, const Arriving<C>& arriving) {
    bool exists = threadIdx.x < n_keys;
    float bound = 0;
#pragma unroll
    for (int g = 0; g < n_groups; ++g) {
      bound = fmaxf(
          bound, range_bound<Codec>(scale(arriving, g), bias(arriving, g)));
    }
    bool over = bound > power_of_two(exponent);
    if (any_thread(1, C::group_threads, over)) {
      int* peak = reinterpret_cast<int*>(shared + C::shape.peaks()) + is_v;
      atomicMax(peak, int(float_bits(bound)));
      sync_threads(1, C::group_threads);
      exponent = exponent_above(int(load_shared(shared_address(peak))));
    }
    if (threadIdx.x < C::keys) {
      uint32_t to = shared_address(shared) + scales_at + 8 * threadIdx.x;
#pragma unroll
      for (int g = 0; g < n_groups; ++g) {
        uint32_t scale2, bias2;
        scale_pair<Codec>(
            exists ? scale(arriving, g) : 0,
            exists ? bias(arriving, g) : 0,
            exponent,
            scale2,
            bias2);
        store_shared2(to + 8 * C::keys * g, scale2, bias2);
      }
    }
  }

  KV_DEVICE void
  decode(uint8_t* shared, int stage, int i, const Arriving<C>& arriving) const {
    int key = i * (C::group_threads / C::units) + threadIdx.x / C::units;
    int unit = threadIdx.x % C::units;
    uint32_t base = shared_address(shared);
    int first = unit * unit_codes / S::group_size;
    uint32_t scale2[n_scales];
    uint32_t bias2;
#pragma unroll
    for (int s = 0; s < n_scales; ++s) {
      uint32_t stored[2];
      load_shared(base + scales_at + 8 * (C::keys * (first + s) + key), stored);
      scale2[s] = stored[0];
      bias2 = stored[1];
    }
    uint32_t table = base + (is_v ? C::shape.v_table() : C::shape.k_table());
    uint32_t values[unit_codes / 2];
    uint32_t words[S::bits];
#pragma unroll
    for (int w = 0; w < S::bits; ++w) {
      words[w] = arriving.words[i][w];
    }
    F16Convert<Codec>::convert(words, scale2, bias2, table, values);
    uint32_t tile = base + tile_at + stage * C::kv_bytes;
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      store_shared4(
          tile + swizzled(key, piece_of(unit, c), C::kv_part), values + 4 * c);
    }
  }

  // Decodes a tile, and has the next one to decode arrive.
  template <typename Next>
  KV_DEVICE void produce(
      const CudaParams& p,
      const BlockPlace& b,
      uint8_t* shared,
      int tile,
      int n_keys,
      const Next& next,
      const CudaOperand& next_operand,
      int next_key,
      KeyRange seen,
      Arriving<C>& arriving) {
    Stages<C> barriers{shared_address(shared) + C::shape.barriers()};
    int stage = tile % C::stages;
    prepare_scales(shared, n_keys, arriving);
    next.load_scales(p, next_operand, b, next_key, seen, arriving);
    wait(barriers.empty(is_v, stage), tile / C::stages % 2 ^ 1);
    sync_threads(1, C::group_threads);
#pragma unroll
    for (int i = 0; i < n; ++i) {
      decode(shared, stage, i, arriving);
      next.load_codes(p, next_operand, b, next_key, seen, i, arriving);
    }
    if (threadIdx.x == 0) {
      uint32_t to = shared_address(shared) + C::shape.exponents();
      store_shared(to + 4 * (2 * stage + is_v), uint32_t(exponent));
    }
    fence_shared_writes();
    arrive(barriers.full(is_v, stage));
  }
};

template <typename C>
KV_DEVICE void produce_tiles(
    const CudaParams& p,
    const BlockPlace& b,
    KeyRange share,
    uint8_t* shared) {
  Producer<C, typename C::K, false> k;
  Producer<C, typename C::V, true> v;
  Arriving<C> arriving;
  k.table_unit = fill_table<typename C::K::Codec>(
      shared_address(shared) + C::shape.k_table(),
      p.k.codebook,
      threadIdx.x,
      C::group_threads);
  v.table_unit = fill_table<typename C::V::Codec>(
      shared_address(shared) + C::shape.v_table(),
      p.v.codebook,
      threadIdx.x,
      C::group_threads);
  if (share.begin >= share.end) {
    return;
  }
  k.start(p.k, b);
  v.start(p.v, b);
  k.load_scales(p, p.k, b, share.begin, share, arriving);
#pragma unroll
  for (int i = 0; i < Arriving<C>::n; ++i) {
    k.load_codes(p, p.k, b, share.begin, share, i, arriving);
  }
  int tile = 0;
  for (int key = share.begin; key < share.end; key += C::keys, ++tile) {
    int n = share.end - key;
    k.produce(p, b, shared, tile, n, v, p.v, key, share, arriving);
    v.produce(p, b, shared, tile, n, k, p.k, key + C::keys, share, arriving);
  }
}

// Rows of q in the order of K's decoded codes, and their factors.
template <typename C>
KV_DEVICE void load_swizzled_queries(
    const CudaParams& p,
    const BlockPlace& b,
    uint8_t* shared,
    int group) {
  int lane = threadIdx.x % 32;
  int warp = threadIdx.x / 32 % 4;
  uint32_t factors = shared_address(shared) + C::shape.factors();
  QueryRow<C::q_type, C::dim / 32> row;
  for (int r = 64 * group + warp; r < 64 * group + 64; r += 4) {
    row.load(p, b, b.first_row + r, [](int i) {
      return dim_of_column<typename C::K::Codec>(i);
    });
#pragma unroll
    for (int i = 0; i < C::dim / 32; ++i) {
      int column = 32 * i + lane;
      int byte = swizzled(r, column / 8, C::q_part) + column % 8 * 2;
      store_shared_u16(
          shared_address(shared) + byte, pack_f16(row.values[i], 0));
    }
    if (lane == 0) {
      store_shared(factors + 4 * r, float_bits(row.factor(p)));
    }
  }
}

#if QUANTIZED_SDPA_HAS_WGMMA

template <typename C>
KV_DEVICE void
start_scores(uint32_t q, uint32_t k, float (&scores)[C::keys / 8][4]) {
#pragma unroll
  for (int d = 0; d < C::dim / 16; ++d) {
    uint32_t at = d % 4 * 32;
    uint64_t a = matrix_descriptor(q + d / 4 * C::q_part + at, 16);
    uint64_t b = matrix_descriptor(k + d / 4 * C::kv_part + at, 16);
    if (d == 0) {
      wgmma_shared<false>(scores, a, b);
    } else {
      wgmma_shared<true>(scores, a, b);
    }
  }
  wgmma_commit();
}

template <typename C>
KV_DEVICE void start_values(
    const uint32_t (&weights)[C::keys / 16][4],
    uint32_t v,
    float (&out)[C::dim / 8][4]) {
#pragma unroll
  for (int j = 0; j < C::keys / 16; ++j) {
    wgmma_registers(
        out, weights[j], matrix_descriptor(v + j * 2048, C::kv_part));
  }
  wgmma_commit();
}

template <int n>
KV_DEVICE void pack_weights(
    const float (&scores)[2 * n][4],
    uint32_t (&weights)[n][4]) {
#pragma unroll
  for (int j = 0; j < n; ++j) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float* x = scores[2 * j + i / 2] + i % 2 * 2;
      weights[j][i] = pack_f16(x[0], x[1]);
    }
  }
}

// Lets the warpgroups start their products in turn.
KV_DEVICE void await_turn(int group) {
  sync_threads(2 + group, 256);
}

KV_DEVICE void pass_turn(int group) {
  arrive_threads(2 + (group ^ 1), 256);
}

// One arrival a warp, for all that its lanes have read.
KV_DEVICE void release(uint32_t barrier) {
  __syncwarp();
  if (threadIdx.x % 32 == 0) {
    arrive(barrier);
  }
}

// Sums so far follow the rows' levels and V's exponent.
template <int n>
KV_DEVICE void follow_exponent(
    int exponent,
    bool raised,
    const float (&rescale)[2],
    int& old_exponent,
    float (&out)[n][4]) {
  if (raised || exponent != old_exponent) {
    float unit = power_of_two(max(old_exponent - exponent, -126));
    rescale_rows(unit, rescale, out);
    old_exponent = exponent;
  }
}

template <typename C>
KV_DEVICE void consume_tiles(
    const CudaParams& p,
    const BlockPlace& b,
    const BlockKeys& range,
    KeyRange share,
    uint8_t* shared,
    int group) {
  int lane = threadIdx.x % 32;
  int warp_row = 64 * group + threadIdx.x / 32 % 4 * 16 + lane / 4;
  load_swizzled_queries<C>(p, b, shared, group);
  fence_shared_writes();
  sync_threads(4 + group, 128);

  Stages<C> barriers{shared_address(shared) + C::shape.barriers()};
  auto exponent_at = [&](bool is_v, int stage) {
    uint32_t exponents = shared_address(shared) + C::shape.exponents();
    return int(load_shared(exponents + 4 * (2 * stage + is_v)));
  };
  uint32_t factors = shared_address(shared) + C::shape.factors();
  uint32_t q = shared_address(shared) + group * 64 * 128;
  uint32_t k = shared_address(shared) + C::shape.k_tiles();
  uint32_t v = shared_address(shared) + C::shape.v_tiles();

  RowView views[2];
  RowState states[2];
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    int row = warp_row + 8 * r;
    float factor = bits_float(load_shared(factors + 4 * row));
    views[r] = view_row(p, b, b.first_row + row, factor);
  }
  int n_tiles = (share.end - share.begin + C::keys - 1) / C::keys;
  float scores[C::keys / 8][4];
  float out[C::dim / 8][4] = {};
  uint32_t weights[C::keys / 16][4];
  float rescale[2] = {1.0f, 1.0f};
  bool raised = false;
  int v_exponent = least_exponent;

  if (n_tiles > 0) {
    wait(barriers.full(false, 0), 0);
    int k_exponent = exponent_at(false, 0);
    wgmma_fence();
    start_scores<C>(q, k, scores);
    wgmma_wait<0>();
    hold_registers(scores);
    release(barriers.empty(false, 0));
    to_weights(
        p,
        C::bent,
        range,
        views,
        k_exponent,
        share.begin,
        states,
        scores,
        rescale);
    pack_weights(scores, weights);
    if (group == 1) {
      pass_turn(1);
    }
    for (int tile = 1; tile < n_tiles; ++tile) {
      int stage = tile % C::stages;
      int last = (tile - 1) % C::stages;
      // K of a tile comes after V of the one before.
      wait(barriers.full(true, last), (tile - 1) / C::stages % 2);
      wait(barriers.full(false, stage), tile / C::stages % 2);
      k_exponent = exponent_at(false, stage);
      follow_exponent(
          exponent_at(true, last), raised, rescale, v_exponent, out);
      await_turn(group);
      wgmma_fence();
      start_scores<C>(q, k + stage * C::kv_bytes, scores);
      start_values<C>(weights, v + last * C::kv_bytes, out);
      pass_turn(group);
      wgmma_wait<1>();
      hold_registers(scores);
      release(barriers.empty(false, stage));
      raised = to_weights(
          p,
          C::bent,
          range,
          views,
          k_exponent,
          share.begin + tile * C::keys,
          states,
          scores,
          rescale);
      wgmma_wait<0>();
      hold_registers(out);
      release(barriers.empty(true, last));
      pack_weights(scores, weights);
    }
    if (group == 0) {
      await_turn(0);
    }
    int last = (n_tiles - 1) % C::stages;
    wait(barriers.full(true, last), (n_tiles - 1) / C::stages % 2);
    follow_exponent(exponent_at(true, last), raised, rescale, v_exponent, out);
    wgmma_fence();
    start_values<C>(weights, v + last * C::kv_bytes, out);
    wgmma_wait<0>();
    hold_registers(out);
  }
  store_rows<C::q_type, C::dim>(
      p, b, b.first_row + warp_row, 0, v_exponent, states, out, [](int i) {
        return dim_of_column<typename C::V::Codec>(i);
      });
}

#endif

template <typename C>
KV_DEVICE void init_stages(uint8_t* shared) {
  Stages<C> barriers{shared_address(shared) + C::shape.barriers()};
  for (int stage = 0; stage < C::stages; ++stage) {
    for (int v = 0; v < 2; ++v) {
      init_barrier(barriers.full(v, stage), C::group_threads);
      init_barrier(barriers.empty(v, stage), 4 * C::consumers);
    }
  }
  store_shared2(shared_address(shared) + C::shape.peaks(), 0, 0);
}

template <typename C>
__device__ void prefill_wgmma(const CudaParams& p, uint8_t* shared) {
#if QUANTIZED_SDPA_HAS_WGMMA
  shared += -shared_address(shared) & 1023;
  BlockPlace b = locate_block(p, C::rows);
  BlockKeys range = block_keys(p, b, C::rows);
  KeyRange share = split_keys<C::keys>(range.any, b.split, p.work.splits);
  if (threadIdx.x == 0) {
    init_stages<C>(shared);
  }
  __syncthreads();
  int group = threadIdx.x / C::group_threads - 1;
  if (group < 0) {
    lower_registers<C::producer_registers>();
    produce_tiles<C>(p, b, share, shared);
  } else {
    raise_registers<C::consumer_registers>();
    consume_tiles<C>(p, b, range, share, shared, group);
  }
#endif
}

} // namespace mlx::core::quantized_sdpa::prefill
