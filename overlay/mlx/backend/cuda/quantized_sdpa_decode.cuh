// Attention of few queries on the tensor cores.
//
// A warp owns a stream of key tiles, which come through a ring of its own in
// shared memory, so that the loop over keys has no block barrier. Keys are the
// M side of both products and the rows of a KV head, its query heads times the
// query positions, the N side: each code is read and converted once.
//
//   scores  S^T [16 keys, 8 rows] = K [16 keys, 16 dims] Q^T [16 dims, 8 rows]
//   output  O^T [16 dims, 8 rows] = V^T [16 dims, 16 keys] P^T [16 keys, 8
//   rows]
//
// Scales of K multiply the scores of their group, scales of V the weights.
// Affine codes of V are taken from their middle, for which biases make up.

#pragma once

#include "mlx/backend/cuda/quantized_sdpa_loader.cuh"
#include "mlx/backend/cuda/quantized_sdpa_merge.cuh"
#include "mlx/backend/cuda/quantized_sdpa_queries.cuh"

namespace mlx::core::quantized_sdpa {

// Finite scores of masked keys stay above the level of a row without keys.
constexpr float lowest_score = -6e29f;
// Weights times scales of V stay below the limit, well within float16. A new
// level puts them at 2 ** weight_place.
constexpr float weight_limit = 32768.0f;
constexpr float weight_place = 7.0f;
constexpr float least_v_scale = 1e-20f;

// One tile in shared memory.
struct Tile {
  uint32_t stage;
  int first_key;
};

// Scores of two keys and two rows of each row tile, before the softmax scale.
template <typename I>
KV_DEVICE void multiply_keys(
    const Tile& tile,
    const Queries<I>& queries,
    uint32_t shared,
    int sub,
    int lane,
    float (&s)[Traits<I>::row_tiles][4]) {
  using T = Traits<I>;
  using To = Convert<typename T::K>;
  int r = lane / 4;
  int j = lane % 4;
  int key = T::first_key(r, sub);
  uint32_t codes = tile.stage + T::stage.k;
  Row rows[2] = {T::k_row(codes, 2 * sub, r), T::k_row(codes, 2 * sub + 1, r)};
  uint32_t table = shared + T::shared.k_table + lane * 4;
  constexpr int groups = T::k_shape.groups;
  uint32_t scale_at =
      tile.stage + T::stage.k_scales + key * groups * T::k_shape.scale_bytes;
  Scalars<I::k_scale_type, 2 * T::k_groups> scales;
  Scalars<I::k_bias_type, 2 * T::k_groups> biases;
  if constexpr (!T::k_scaled) {
    scales.load(scale_at);
  }
  if constexpr (T::K::has_bias) {
    biases.load(
        tile.stage + T::stage.k_biases + key * groups * T::k_shape.bias_bytes);
  }
#pragma unroll
  for (int g = 0; g < T::k_groups; ++g) {
    float c[T::row_tiles][4] = {};
#pragma unroll
    for (int b = 0; b < T::k_blocks / T::k_groups; ++b) {
      int block = g * (T::k_blocks / T::k_groups) + b;
      int value = (block * 4 + j) * T::k_run;
      uint32_t x[2][T::KRun::pieces];
      uint32_t factor[2];
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        T::KRun::load_row(rows[h], value * T::K::bits, x[h]);
        if constexpr (T::k_scaled) {
          uint32_t code =
              load_shared_u8(scale_at + h * groups + value / I::k_group);
          factor[h] = e4m3_to_f16x2(code * 0x101u);
        }
      }
#pragma unroll
      for (int step = 0; step < T::k_steps; ++step) {
#pragma unroll
        for (int part = 0; part < T::k_parts; ++part) {
          uint32_t a[4];
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            auto place = T::KRun::place(2 * step + i / 2);
            uint32_t entries = table + part * T::k_shape.table_bytes();
            a[i] = To::pair(x[i % 2][place.piece], place.code, entries);
            if constexpr (T::k_scaled) {
              a[i] = multiply_f16x2(a[i], factor[i % 2]);
            }
          }
#pragma unroll
          for (int n = 0; n < T::row_tiles; ++n) {
#pragma unroll
            for (int q = 0; q + part < T::parts; ++q) {
              uint32_t y[2];
              queries.get(q, n, block * T::k_steps + step, y);
              mma_f16(c[n], a, y[0], y[1]);
            }
          }
        }
      }
    }
#pragma unroll
    for (int n = 0; n < T::row_tiles; ++n) {
      uint32_t sums[2];
      if constexpr (T::K::has_bias) {
        load_shared(
            shared + T::shared.query_sums +
                ((n * groups + g) * row_tile + 2 * j) * 4,
            sums);
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        float x = T::k_scaled ? c[n][i]
                              : scales.at(i / 2 * T::k_groups + g) * c[n][i];
        if constexpr (T::K::has_bias) {
          x += biases.at(i / 2 * T::k_groups + g) * bits_float(sums[i % 2]);
        }
        s[n][i] = g == 0 ? x : s[n][i] + x;
      }
    }
  }
}

// Softmax of the rows of a lane, two of each row tile. Weights are
// exp2(score - level); the level moves only when they would leave float16.
template <typename I>
struct RowState {
  using T = Traits<I>;
  float level[T::row_tiles][2];
  float sum[T::row_tiles][2];
  float scale[T::row_tiles][2];

  KV_DEVICE void init(uint32_t shared, int lane) {
#pragma unroll
    for (int n = 0; n < T::row_tiles; ++n) {
      uint32_t words[2];
      load_shared(
          shared + T::shared.query_scales + (n * row_tile + 2 * (lane % 4)) * 4,
          words);
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        level[n][i] = no_level;
        sum[n][i] = 0;
        scale[n][i] = bits_float(words[i]);
      }
    }
  }
};

// The weighted sum, and what the biases of V add to it in each group.
template <typename I>
struct Output {
  using T = Traits<I>;
  static constexpr int groups = T::V::has_bias ? T::v_groups : 1;
  float values[T::row_tiles][T::v_blocks][T::v_tiles][4];
  float biases[T::row_tiles][groups][2];

  KV_DEVICE void init() {
#pragma unroll
    for (int n = 0; n < T::row_tiles; ++n) {
      scale_by<true>(n, 0, 0);
    }
  }

  template <bool clear>
  KV_DEVICE void scale_by(int n, float f0, float f1) {
    float factor[2] = {f0, f1};
#pragma unroll
    for (int b = 0; b < T::v_blocks; ++b) {
#pragma unroll
      for (int t = 0; t < T::v_tiles; ++t) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          float& x = values[n][b][t][i];
          x = clear ? 0.0f : x * factor[i % 2];
        }
      }
    }
#pragma unroll
    for (int g = 0; g < groups; ++g) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        biases[n][g][i] = clear ? 0.0f : biases[n][g][i] * factor[i];
      }
    }
  }
};

// Hides what a row does not see; only at the ends of ranges.
template <typename I>
KV_DEVICE void hide_keys(
    int key,
    uint32_t shared,
    int lane,
    const RowState<I>& state,
    float (&s)[Traits<I>::row_tiles][4]) {
  using T = Traits<I>;
#pragma unroll
  for (int n = 0; n < T::row_tiles; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      int row = n * row_tile + 2 * (lane % 4) + i % 2;
      uint32_t range[2];
      load_shared(shared + T::shared.row_ranges + row * 16, range);
      int at = key + i / 2;
      if (at < int(range[0]) || at >= int(range[1])) {
        s[n][i] = copysignf(KV_INFINITY, -state.scale[n][i % 2]);
      }
    }
  }
}

// Soft cap and mask; the scores are then in powers of two.
template <typename I>
KV_DEVICE void adjust_scores(
    const CudaParams& p,
    int key,
    uint32_t shared,
    int lane,
    const RowState<I>& state,
    float (&s)[Traits<I>::row_tiles][4]) {
  using T = Traits<I>;
  const float hidden = -KV_INFINITY;
#pragma unroll
  for (int n = 0; n < T::row_tiles; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      float x = s[n][i] * state.scale[n][i % 2];
      if constexpr (I::has_softcap) {
        if (x != hidden) {
          x = capped_score(p.softcap, x);
        }
      }
      if constexpr (I::has_mask) {
        int row = n * row_tile + 2 * (lane % 4) + i % 2;
        uint32_t at[2];
        load_shared(shared + T::shared.row_ranges + row * 16 + 8, at);
        int64_t offset = int64_t(uint64_t(at[1]) << 32 | at[0]) +
            min(key + i / 2, p.kv_len - 1) * p.mask.strides[3];
        x = masked_score(p, p.mask.data + offset, x, lowest_score);
      }
      s[n][i] = x;
    }
  }
}

// Scales of V of the lane's two keys, one a group.
template <typename I>
struct ValueScales {
  using T = Traits<I>;
  float values[2][T::v_groups];
  // The largest of each key.
  float top[2];

  KV_DEVICE void init(const Scalars<I::v_scale_type, 2 * T::v_groups>& scales) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      top[h] = T::v_scaled ? 1.0f : 0.0f;
#pragma unroll
      for (int g = 0; g < T::v_groups; ++g) {
        values[h][g] = T::v_scaled ? 1.0f : scales.at(h * T::v_groups + g);
        top[h] = fmaxf(top[h], fabsf(values[h][g]));
      }
    }
  }
};

// New levels from the scores of 16 keys; what is held follows.
template <typename I>
KV_DEVICE void raise_level(
    float (&level)[2],
    float (&factor)[2],
    const float (&x)[4],
    float top) {
  float high[2] = {fmaxf(x[0], x[2]), fmaxf(x[1], x[3])};
  // An infinite scale spoils the output, but not the sum of the weights.
  top = top < KV_INFINITY ? top : 1.0f;
#pragma unroll
  for (int d = 4; d < warp_size; d *= 2) {
    top = fmaxf(top, __shfl_xor_sync(all_lanes, top, d));
    high[0] = fmaxf(high[0], __shfl_xor_sync(all_lanes, high[0], d));
    high[1] = fmaxf(high[1], __shfl_xor_sync(all_lanes, high[1], d));
  }
  float up = __log2f(fmaxf(top, least_v_scale)) - weight_place;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    float raised = fmaxf(level[i], high[i] + up);
    factor[i] = exp2_approx(level[i] - raised);
    level[i] = raised;
  }
}

template <typename I>
KV_DEVICE void compute_weights(
    const float (&s)[Traits<I>::row_tiles][4],
    const ValueScales<I>& scales,
    RowState<I>& state,
    Output<I>& out,
    float (&e)[Traits<I>::row_tiles][4]) {
  using T = Traits<I>;
  constexpr bool scaled = I::has_mask || I::has_softcap;
  auto exponentials = [&] {
    float largest = 0;
#pragma unroll
    for (int n = 0; n < T::row_tiles; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        float scale = scaled ? 1.0f : state.scale[n][i % 2];
        e[n][i] = exp2_approx(fmaf(s[n][i], scale, -state.level[n][i % 2]));
      }
      largest = fmaf(e[n][0] + e[n][1], scales.top[0], largest);
      largest = fmaf(e[n][2] + e[n][3], scales.top[1], largest);
    }
    return largest;
  };
  // Not a number is above the limit too.
  bool fits = exponentials() <= weight_limit;
  if (__any_sync(all_lanes, !fits)) {
#pragma unroll
    for (int n = 0; n < T::row_tiles; ++n) {
      float x[4], factor[2];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        x[i] = s[n][i] * (scaled ? 1.0f : state.scale[n][i % 2]);
      }
      raise_level<I>(
          state.level[n], factor, x, fmaxf(scales.top[0], scales.top[1]));
      state.sum[n][0] *= factor[0];
      state.sum[n][1] *= factor[1];
      out.template scale_by<false>(n, factor[0], factor[1]);
    }
    exponentials();
  }
#pragma unroll
  for (int n = 0; n < T::row_tiles; ++n) {
    state.sum[n][0] += e[n][0] + e[n][2];
    state.sum[n][1] += e[n][1] + e[n][3];
  }
}

// Scales of V for pairs of keys of the products, where they multiply values.
template <typename I>
KV_DEVICE uint32_t
value_factor(const Tile& tile, int sub, int half, int j, int group) {
  using T = Traits<I>;
  uint32_t scales =
      tile.stage + T::stage.v_scales + group + half * T::v_shape.groups;
  uint32_t first =
      load_shared_u8(scales + T::first_key(2 * j, sub) * T::v_shape.groups);
  uint32_t second =
      load_shared_u8(scales + T::first_key(2 * j + 1, sub) * T::v_shape.groups);
  return e4m3_to_f16x2(first | second << 8);
}

// Adds the values of 16 keys with weights e.
template <typename I>
KV_DEVICE void multiply_values(
    const Tile& tile,
    const ValueScales<I>& scales,
    uint32_t shared,
    int sub,
    int lane,
    const float (&e)[Traits<I>::row_tiles][4],
    Output<I>& out) {
  using T = Traits<I>;
  using To = Convert<typename T::V>;
  int r = lane / 4;
  int j = lane % 4;
  uint32_t codes = tile.stage + T::stage.v;
  uint32_t table = shared + T::shared.v_table + lane * 4;
#pragma unroll
  for (int g = 0; g < T::v_groups; ++g) {
    // The halves of each weight, transposed.
    uint32_t p[T::parts][T::row_tiles][2];
#pragma unroll
    for (int n = 0; n < T::row_tiles; ++n) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        float x = e[n][2 * h] * scales.values[h][g];
        float y = e[n][2 * h + 1] * scales.values[h][g];
#pragma unroll
        for (int part = 0; part < T::parts; ++part) {
          uint32_t halves = pack_f16(x, y);
          x -= f16_to_float(halves);
          y -= f16_to_float(halves >> 16);
          p[part][n][h] = transpose(halves);
        }
      }
    }
#pragma unroll
    for (int b = 0; b < T::v_blocks / T::v_groups; ++b) {
      int block = g * (T::v_blocks / T::v_groups) + b;
      int value = (block * 8 + r) * T::v_run;
      uint32_t x[2][T::VRun::column_pieces];
      uint32_t factor[2];
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        T::VRun::load_columns(
            T::v_row(codes, 2 * sub + h, 2 * j),
            T::v_row(codes, 2 * sub + h, 2 * j + 1),
            value * T::V::bits,
            x[h]);
        if constexpr (T::v_scaled) {
          factor[h] = value_factor<I>(tile, sub, h, j, value / I::v_group);
        }
      }
#pragma unroll
      for (int t = 0; t < T::v_tiles; ++t) {
#pragma unroll
        for (int part = 0; part < T::v_parts; ++part) {
          uint32_t a[4];
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            int d = 2 * t + i % 2;
            uint32_t entries = table + part * T::v_shape.table_bytes();
            a[i] = To::pair(
                x[i / 2][T::VRun::column_piece(d)],
                T::VRun::column_code(d),
                entries);
            if constexpr (T::V::has_bias) {
              a[i] = To::centred(a[i], T::VRun::column_code(d));
            }
            if constexpr (T::v_scaled) {
              a[i] = multiply_f16x2(a[i], factor[i / 2]);
            }
          }
#pragma unroll
          for (int n = 0; n < T::row_tiles; ++n) {
#pragma unroll
            for (int q = 0; q + part < T::parts; ++q) {
              mma_f16(out.values[n][block][t], a, p[q][n][0], p[q][n][1]);
            }
          }
        }
      }
    }
  }
}

// 16 keys from their codes to the output.
template <typename I>
KV_DEVICE void attend_keys(
    const CudaParams& p,
    const Tile& tile,
    const Queries<I>& queries,
    bool at_end,
    uint32_t shared,
    int sub,
    int lane,
    RowState<I>& state,
    Output<I>& out) {
  using T = Traits<I>;
  constexpr int groups = T::v_shape.groups;
  float s[T::row_tiles][4];
  multiply_keys<I>(tile, queries, shared, sub, lane, s);
  int in_tile = T::first_key(lane / 4, sub);
  int key = tile.first_key + in_tile;
  Scalars<I::v_scale_type, 2 * T::v_groups> scales;
  Scalars<I::v_bias_type, 2 * T::v_groups> biases;
  if constexpr (!T::v_scaled) {
    scales.load(
        tile.stage + T::stage.v_scales +
        in_tile * groups * T::v_shape.scale_bytes);
  }
  if constexpr (T::V::has_bias) {
    biases.load(
        tile.stage + T::stage.v_biases +
        in_tile * groups * T::v_shape.bias_bytes);
  }
  if (at_end) {
    hide_keys<I>(key, shared, lane, state, s);
  }
  if constexpr (I::has_mask || I::has_softcap) {
    adjust_scores<I>(p, key, shared, lane, state, s);
  }
  ValueScales<I> value_scales;
  value_scales.init(scales);
  float e[T::row_tiles][4];
  compute_weights<I>(s, value_scales, state, out, e);
  if constexpr (T::V::has_bias) {
#pragma unroll
    for (int g = 0; g < T::v_groups; ++g) {
      constexpr float middle = Convert<typename T::V>::middle;
      float b0 = fmaf(middle, value_scales.values[0][g], biases.at(g));
      float b1 =
          fmaf(middle, value_scales.values[1][g], biases.at(T::v_groups + g));
#pragma unroll
      for (int n = 0; n < T::row_tiles; ++n) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          out.biases[n][g][i] += fmaf(e[n][i], b0, e[n][2 + i] * b1);
        }
      }
    }
  }
  multiply_values<I>(tile, value_scales, shared, sub, lane, e, out);
}

// Zeros for V at the first n keys of a tile, which no row sees: they may hold
// anything, and 0 times infinity is not a number. The loader does so at the
// end.
template <typename I>
KV_DEVICE void clear_values(const Tile& tile, int n, int lane) {
  using T = Traits<I>;
  using Words = CodeCopy<
      T::tile_keys,
      T::v_shape.row_bytes(),
      T::v_shape.row_pitch(),
      T::v_width,
      4,
      true>;
  for (int i = lane; i < n * Words::chunks; i += warp_size) {
    int at = Words::offset_of(i / Words::chunks, i % Words::chunks);
    store_shared(tile.stage + T::stage.v + at, 0u);
  }
  auto clear = [&](int begin, int key_bytes) {
    for (int i = lane; i < n * key_bytes; i += warp_size) {
      store_shared_u8(tile.stage + begin + i, 0u);
    }
  };
  clear(T::stage.v_scales, T::v_shape.groups * T::v_shape.scale_bytes);
  clear(T::stage.v_biases, T::v_shape.groups * T::v_shape.bias_bytes);
  __syncwarp();
}

// What one block does for one segment, up to the state of each warp.
template <typename I>
KV_DEVICE void attend_segment(
    const CudaParams& p,
    const Segment& segment,
    const Rows<I>& rows,
    uint32_t shared,
    float k_unit,
    RowState<I>& state,
    Output<I>& out) {
  using T = Traits<I>;
  int warp = threadIdx.x / warp_size;
  int lane = threadIdx.x % warp_size;
  uint32_t ring = shared + T::shared.ring + warp * T::stages * T::stage.bytes;
  TileLoader<I> loader(p, segment, ring, warp, lane);
#pragma unroll
  for (int i = 0; i < T::stages - 1; ++i) {
    loader.load(i);
  }
  load_queries<I>(p, segment, rows, shared, k_unit, warp, lane);
  __syncthreads();
  Queries<I> queries;
  queries.init(shared, lane);
  state.init(shared, lane);
  out.init();
  // These need no masking.
  KeyRange common = kv::visible_to_all(
      existing_keys(p, segment.batch),
      key_rule(p),
      rows.position(0),
      rows.position(rows.n - 1));
  int slot = 0;
  int end = min(
      segment.tile_end, (segment.keys.end + T::tile_keys - 1) / T::tile_keys);
  for (int i = segment.tile_begin + warp; i < end; i += T::warps) {
    copy_wait<T::stages - 2>();
    __syncwarp();
    loader.load(slot == 0 ? T::stages - 1 : slot - 1);
    Tile tile{ring + slot * T::stage.bytes, i * T::tile_keys};
    slot = slot + 1 == T::stages ? 0 : slot + 1;
    if (tile.first_key < segment.keys.begin) {
      clear_values<I>(tile, segment.keys.begin - tile.first_key, lane);
    }
    bool at_end = tile.first_key < common.begin ||
        tile.first_key + T::tile_keys > common.end;
#pragma unroll
    for (int sub = 0; sub < T::tile_keys / key_tile; ++sub) {
      attend_keys<I>(p, tile, queries, at_end, shared, sub, lane, state, out);
    }
  }
  copy_wait<0>();
}

template <typename I>
KV_DEVICE void decode(const CudaParams& p) {
  using T = Traits<I>;
  extern __shared__ __align__(128) uint8_t memory[];
  uint32_t shared = shared_address(memory);
  float k_unit = Convert<typename T::K>::unit;
  float v_unit = Convert<typename T::V>::unit;
  if constexpr (T::K::has_codebook) {
    k_unit = table_unit<T::K::bits>(p.k.codebook);
    fill_table<T::K::bits, T::parts, T::threads>(
        shared + T::shared.k_table, p.k.codebook, k_unit);
  }
  if constexpr (T::V::has_codebook) {
    v_unit = table_unit<T::V::bits>(p.v.codebook);
    fill_table<T::V::bits, T::parts, T::threads>(
        shared + T::shared.v_table, p.v.codebook, v_unit);
  }
  auto work = [&](const Segment& segment) {
    Rows<I> rows(p, segment);
    RowState<I> state;
    Output<I> out;
    attend_segment<I>(p, segment, rows, shared, k_unit, state, out);
    write_segment<I>(p, segment, rows, shared, v_unit, state, out);
  };
  if (p.work.splits > 0) {
    work(segment_of_split<T::tile_keys>(p));
  } else {
    SharedTiles<T::tile_keys> tiles(p);
    Segment segment;
    while (tiles.next(segment)) {
      work(segment);
      __syncthreads();
    }
  }
}

} // namespace mlx::core::quantized_sdpa
