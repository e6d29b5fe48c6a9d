// The rows of q as operands of the matrix instructions, and what goes with
// them.

#pragma once

#include "mlx/backend/cuda/quantized_sdpa_instance.cuh"
#include "mlx/backend/cuda/quantized_sdpa_work.cuh"

namespace mlx::core::quantized_sdpa {

// A softmax scale of 0 is this instead, since masked scores are infinite.
constexpr float least_scale = 1e-30f;

// What the kernel knows of a row.
struct RowInfo {
  int begin;
  int end;
  // Of its mask, in bytes.
  int64_t mask;
};

// A row of the group: query position `row / heads` of head `row % heads`.
template <typename I>
struct Rows {
  using T = Traits<I>;
  int heads;
  int first;
  // Rows that exist, of T::rows.
  int n;

  KV_DEVICE Rows(const CudaParams& p, const Segment& segment) {
    heads = p.n_q_heads / p.n_kv_heads;
    first = segment.row_block * T::rows;
    n = min(T::rows, heads * p.q_len - first);
  }
  KV_DEVICE int position(int row) const {
    return (first + row) / heads;
  }
  KV_DEVICE int head(const Segment& segment, int row) const {
    return segment.kv_head * heads + (first + row) % heads;
  }
};

// The largest entry of a codebook to below 2: entries are kept as halves.
template <int bits>
KV_DEVICE float table_unit(const CudaVector<float>& codebook) {
  float top = 0;
  for (int i = 0; i < 1 << bits; ++i) {
    top = fmaxf(top, fabsf(codebook.data[i * codebook.stride]));
  }
  int exponent = int(float_bits(top) >> 23) - 127;
  return power_of_two(kv::clamp_index(exponent, -100, 100));
}

// All pairs of entries, once for each lane; a second table has what the
// rounding of the first left out.
template <int bits, int parts, int threads>
KV_DEVICE void
fill_table(uint32_t table, const CudaVector<float>& codebook, float unit) {
  constexpr int entries = 1 << 2 * bits;
  for (int i = threadIdx.x; i < entries * warp_size; i += threads) {
    int index = i / warp_size;
    int low = index & ((1 << bits) - 1);
    float x = codebook.data[low * codebook.stride] / unit;
    float y = codebook.data[(index >> bits) * codebook.stride] / unit;
    uint32_t halves = pack_f16(x, y);
    store_shared(table + i * 4, halves);
    if constexpr (parts > 1) {
      store_shared(
          table + (entries * warp_size + i) * 4,
          pack_f16(x - f16_to_float(halves), y - f16_to_float(halves >> 16)));
    }
  }
}

template <typename I>
struct QueryLoader {
  using T = Traits<I>;
  static constexpr int values = (I::k_dim + warp_size - 1) / warp_size;

  // Where value d of row goes, [parts, row_tiles, pieces, lanes, 2, 2] halves.
  static KV_DEVICE uint32_t offset_of(int part, int row, int d) {
    int block = d / (4 * T::k_run);
    int j = d / T::k_run % 4;
    int in_run = d % T::k_run;
    int pair = T::KRun::pair_of(in_run);
    int piece = block * T::k_steps + pair / 2;
    int tile = part * T::row_tiles + row / row_tile;
    int lane = row % row_tile * 4 + j;
    return ((tile * T::query_pieces + piece) * warp_size + lane) * 8 +
        pair % 2 * 4 + T::KRun::position_of(in_run) * 2;
  }

  static KV_DEVICE float step_of(int d) {
    int pair = T::KRun::pair_of(d % T::k_run);
    return Convert<typename T::K>::step(pair % Convert<typename T::K>::codes);
  }

  // One row, by one warp. `unit` is that of the codes of K.
  static KV_DEVICE void load_row(
      const CudaParams& p,
      const uint8_t* from,
      int row,
      uint32_t shared,
      float unit,
      int lane) {
    float x[values];
    float top = 0;
#pragma unroll
    for (int i = 0; i < values; ++i) {
      int d = i * warp_size + lane;
      bool exists = from && (I::k_dim % warp_size == 0 || d < I::k_dim);
      x[i] = exists ? load_scalar<I::q_type>(from + d * p.q.strides[3]) : 0.0f;
      top = fmaxf(top, fabsf(x[i]));
    }
#pragma unroll
    for (int d = warp_size / 2; d > 0; d /= 2) {
      top = fmaxf(top, __shfl_xor_sync(all_lanes, top, d));
    }
    // The largest value comes between 64 and 128.
    int exponent = min(133 - int(float_bits(top) >> 23), 120);
    float up = power_of_two(exponent);
    float sums[T::k_shape.groups] = {};
#pragma unroll
    for (int i = 0; i < values; ++i) {
      int d = i * warp_size + lane;
      if (I::k_dim % warp_size == 0 || d < I::k_dim) {
        sums[i * warp_size / I::k_group] += store(shared, row, d, x[i] * up);
      }
    }
    if constexpr (T::K::has_bias) {
      store_sums(shared, row, sums, unit, lane);
    }
    if (lane == 0) {
      float scale = p.scale * log2_of_e * unit * power_of_two(-exponent);
      scale = scale == 0 ? least_scale : scale;
      store_shared(
          shared + T::shared.query_scales + row * 4, float_bits(scale));
    }
  }

 private:
  // The result is what the halves add up to.
  static KV_DEVICE float store(uint32_t shared, int row, int d, float x) {
    float step = step_of(d);
    float rest = x / step;
    float sum = 0;
#pragma unroll
    for (int part = 0; part < T::parts; ++part) {
      uint32_t half = pack_f16(rest, 0) & 0xffff;
      store_shared_u16(
          shared + T::shared.queries + offset_of(part, row, d), half);
      rest -= f16_to_float(half);
      sum += f16_to_float(half) * step;
    }
    return sum;
  }

  static KV_DEVICE void store_sums(
      uint32_t shared,
      int row,
      float (&sums)[T::k_shape.groups],
      float unit,
      int lane) {
#pragma unroll
    for (int g = 0; g < T::k_shape.groups; ++g) {
#pragma unroll
      for (int d = warp_size / 2; d > 0; d /= 2) {
        sums[g] += __shfl_xor_sync(all_lanes, sums[g], d);
      }
      if (lane == 0) {
        int tile = row / row_tile * T::k_shape.groups + g;
        store_shared(
            shared + T::shared.query_sums +
                (tile * row_tile + row % row_tile) * 4,
            float_bits(sums[g] / unit));
      }
    }
  }
};

// All rows of a segment; their ranges are offset into the sequence.
template <typename I>
KV_DEVICE void load_queries(
    const CudaParams& p,
    const Segment& segment,
    const Rows<I>& rows,
    uint32_t shared,
    float unit,
    int warp,
    int lane) {
  using T = Traits<I>;
  KeyRange existing = existing_keys(p, segment.batch);
  for (int row = warp; row < T::rows; row += T::warps) {
    // Rows that do not exist see what the last one sees.
    int known = min(row, rows.n - 1);
    int position = rows.position(known);
    int head = rows.head(segment, known);
    const uint8_t* from = p.q.data + segment.batch * p.q.strides[0] +
        head * p.q.strides[1] + position * p.q.strides[2];
    QueryLoader<I>::load_row(
        p, row < rows.n ? from : nullptr, row, shared, unit, lane);
    if (lane == 0) {
      KeyRange seen = kv::visible_keys(existing, key_rule(p), position);
      uint32_t info = shared + T::shared.row_ranges + row * 16;
      int64_t mask = segment.batch * p.mask.strides[0] +
          head * p.mask.strides[1] + position * p.mask.strides[2];
      store_shared(info, seen.begin);
      store_shared(info + 4, seen.end);
      store_shared(info + 8, uint32_t(mask));
      store_shared(info + 12, uint32_t(uint64_t(mask) >> 32));
    }
  }
}

// The operand for piece `piece`, from registers where they fit.
template <typename I>
struct Queries {
  using T = Traits<I>;
  static constexpr int kept = T::keeps_queries ? T::query_pieces : 1;
  uint32_t words[T::parts][T::row_tiles][kept][2];
  uint32_t address;

  KV_DEVICE void init(uint32_t shared, int lane) {
    address = shared + T::shared.queries + lane * 8;
    if constexpr (T::keeps_queries) {
#pragma unroll
      for (int part = 0; part < T::parts; ++part) {
#pragma unroll
        for (int n = 0; n < T::row_tiles; ++n) {
#pragma unroll
          for (int i = 0; i < kept; ++i) {
            load_shared(at(part, n, i), words[part][n][i]);
          }
        }
      }
    }
  }

  KV_DEVICE void get(int part, int n, int piece, uint32_t (&x)[2]) const {
    if constexpr (T::keeps_queries) {
      x[0] = words[part][n][piece][0];
      x[1] = words[part][n][piece][1];
    } else {
      load_shared(at(part, n, piece), x);
    }
  }

 private:
  KV_DEVICE uint32_t at(int part, int n, int piece) const {
    return address +
        ((part * T::row_tiles + n) * T::query_pieces + piece) * warp_size * 8;
  }
};

} // namespace mlx::core::quantized_sdpa
