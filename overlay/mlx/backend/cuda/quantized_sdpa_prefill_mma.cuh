// Prefill by mma.sync, for sm_80 and newer and for every format, head dim and
// type of q. All warps decode a tile of K, then of V, into one buffer; other
// blocks of the multiprocessor fill the waits. float32 is kept as two halves.

#pragma once

#include "mlx/backend/cuda/quantized_sdpa_prefill.cuh"

namespace mlx::core::quantized_sdpa::prefill {

template <typename K_, typename V_, Scalar q_type_, int k_dim_, int v_dim_>
struct PrefillMma {
  using K = K_;
  using V = V_;
  static constexpr Scalar q_type = q_type_;
  static constexpr int k_dim = k_dim_;
  static constexpr int v_dim = v_dim_;
  static constexpr int parts = q_type == Scalar::f32 ? 2 : 1;
  static constexpr PrefillMmaShape shape{
      K::operand(k_dim),
      V::operand(v_dim),
      parts};
  static constexpr int rows = shape.rows();
  static constexpr int keys = shape.keys();
  static constexpr int threads = shape.threads();
  static constexpr int column_warps = shape.column_warps();
  static constexpr int columns = v_dim / column_warps;
  static constexpr int k_pitch = shape.pitch(k_dim);
  static constexpr int v_pitch = shape.pitch(v_dim);
  static constexpr int q_part = rows * k_pitch;
  static constexpr int k_part = keys * k_pitch;
  static constexpr int v_part = keys * v_pitch;
};

// Where position i of a decoded row lies in the head dim.
template <typename Codec, int parts>
KV_DEVICE int dim_at(int i) {
  int within = i % unit_codes;
  return parts == 1 ? i - within + F16Convert<Codec>::source(within) : i;
}

// A thread's units of a tile, from global memory to the shared tile.
template <typename S, int dim, int keys, int threads, int parts>
struct TileLoader {
  using Codec = typename S::Codec;
  static constexpr int units = dim / unit_codes;
  static constexpr int n = (keys * units + threads - 1) / threads;
  static constexpr int n_scales = scales_per_unit<Codec>;
  static constexpr int group =
      S::group_size < unit_codes ? unit_codes : S::group_size;

  uint32_t words[n][S::bits];
  uint32_t scales[n][n_scales];
  uint32_t biases[n];

  static KV_DEVICE int unit_of(int i) {
    return i * threads + threadIdx.x;
  }

  // Keys outside `seen` become zeros whatever is stored there.
  KV_DEVICE void load(
      const CudaParams& p,
      const CudaOperand& x,
      const BlockPlace& b,
      int first_key,
      KeyRange seen,
      bool wide) {
#pragma unroll
    for (int i = 0; i < n; ++i) {
      int unit = unit_of(i) % units;
      int key = first_key + unit_of(i) / units;
      biases[i] = 0;
      if (unit_of(i) < keys * units && key >= seen.begin && key < seen.end) {
        KeyPlace at = place_of_key(p, b.batch, key);
        const uint8_t* row = address_of(x.codes, at, b.kv_head);
        load_words<S::bits>(row + unit * 4 * S::bits, wide, words[i]);
        int first = unit * unit_codes / group * n_scales;
        row = address_of(x.scales, at, b.kv_head) + first * x.scales.strides[3];
#pragma unroll
        for (int s = 0; s < n_scales; ++s) {
          scales[i][s] =
              load_scalar_bits<S::scale_type>(row + s * x.scales.strides[3]);
        }
        if (Codec::has_bias) {
          row =
              address_of(x.biases, at, b.kv_head) + first * x.biases.strides[3];
          biases[i] = load_scalar_bits<S::bias_type>(row);
        }
      } else {
#pragma unroll
        for (int w = 0; w < S::bits; ++w) {
          words[i][w] = 0;
        }
#pragma unroll
        for (int s = 0; s < n_scales; ++s) {
          scales[i][s] = 0;
        }
      }
    }
  }

  KV_DEVICE float scale(int i, int s, float table_unit) const {
    return decode_scalar<S::scale_type>(scales[i][s]) * table_unit;
  }

  KV_DEVICE float bias(int i) const {
    return Codec::has_bias ? decode_scalar<S::bias_type>(biases[i]) : 0;
  }

  KV_DEVICE float bound(float table_unit) const {
    float top = 0;
#pragma unroll
    for (int i = 0; i < n; ++i) {
#pragma unroll
      for (int s = 0; s < n_scales; ++s) {
        top = fmaxf(
            top, range_bound<Codec, parts>(scale(i, s, table_unit), bias(i)));
      }
    }
    return top;
  }

  KV_DEVICE void store(
      uint32_t tile,
      int pitch,
      int part_bytes,
      int exponent,
      float table_unit,
      uint32_t table,
      const CudaVector<float>& codebook) const {
#pragma unroll
    for (int i = 0; i < n; ++i) {
      if (unit_of(i) < keys * units) {
        uint32_t at = tile + unit_of(i) / units * pitch +
            unit_of(i) % units * unit_codes * 2;
        uint32_t values[parts][unit_codes / 2];
        if constexpr (parts == 1) {
          uint32_t scale2[n_scales];
          uint32_t bias2;
#pragma unroll
          for (int s = 0; s < n_scales; ++s) {
            scale_pair<Codec>(
                scale(i, s, table_unit), bias(i), exponent, scale2[s], bias2);
          }
          F16Convert<Codec>::convert(words[i], scale2, bias2, table, values[0]);
        } else {
          decode_exact(i, exponent, codebook, values);
        }
#pragma unroll
        for (int part = 0; part < parts; ++part) {
#pragma unroll
          for (int c = 0; c < 4; ++c) {
            store_shared4(
                at + part * part_bytes + 16 * c, values[part] + 4 * c);
          }
        }
      }
    }
  }

  KV_DEVICE float value(int i, int code, const CudaVector<float>& codebook)
      const {
    float x = decode_one<Codec>(words[i], code);
    if constexpr (Codec::has_codebook) {
      x = __ldg(codebook.data + int(x) * codebook.stride);
    }
    return x * scale(i, code * n_scales / unit_codes, 1.0f) + bias(i);
  }

  KV_DEVICE void decode_exact(
      int i,
      int exponent,
      const CudaVector<float>& codebook,
      uint32_t (&values)[parts][unit_codes / 2]) const {
    float unit = power_of_two(-exponent);
#pragma unroll
    for (int c = 0; c < unit_codes; c += 2) {
      split_f16(
          value(i, c, codebook) * unit,
          value(i, c + 1, codebook) * unit,
          values[0][c / 2],
          values[parts - 1][c / 2]);
    }
  }
};

// Rows of q in the order of K's decoded codes, and their factors.
template <typename C>
KV_DEVICE void load_queries(
    const CudaParams& p,
    const BlockPlace& b,
    uint32_t q_tile,
    uint32_t factors) {
  int lane = threadIdx.x % 32;
  QueryRow<C::q_type, C::k_dim / 32> row;
  for (int r = threadIdx.x / 32; r < C::rows; r += C::threads / 32) {
    row.load(p, b, b.first_row + r, [](int i) {
      return dim_at<typename C::K::Codec, C::parts>(i);
    });
    uint32_t at = q_tile + r * C::k_pitch + 2 * lane;
#pragma unroll
    for (int i = 0; i < C::k_dim / 32; ++i) {
      uint32_t rounded, rest;
      split_f16(row.values[i], 0, rounded, rest);
      store_shared_u16(at + 64 * i, rounded);
      if (C::parts > 1) {
        store_shared_u16(at + C::q_part + 64 * i, rest);
      }
    }
    if (lane == 0) {
      store_shared(factors + 4 * r, float_bits(row.factor(p)));
    }
  }
}

// Raises the exponent where a value of the tile would not fit; also the
// barrier after which the tile's buffer is free.
KV_DEVICE void settle_exponent(int& exponent, int* peak, float bound) {
  if (__syncthreads_or(bound > power_of_two(exponent))) {
    atomicMax(peak, int(float_bits(bound)));
    __syncthreads();
    exponent = exponent_above(int(load_shared(shared_address(peak))));
  }
}

// scores = q k^T over this warp's 16 rows.
template <typename C>
KV_DEVICE void
multiply_queries(uint32_t q, uint32_t tile, float (&scores)[C::keys / 8][4]) {
  int lane = threadIdx.x % 32;
  q += lane % 16 * C::k_pitch + lane / 16 * 16;
  tile += (lane / 16 * 8 + lane % 8) * C::k_pitch + lane / 8 % 2 * 16;
#pragma unroll
  for (int j = 0; j < C::keys / 8; ++j) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      scores[j][i] = 0;
    }
  }
#pragma unroll 4
  for (int d = 0; d < C::k_dim; d += 16) {
    uint32_t a[C::parts][4];
#pragma unroll
    for (int part = 0; part < C::parts; ++part) {
      load_matrices(q + part * C::q_part + 2 * d, a[part]);
    }
#pragma unroll
    for (int j = 0; j < C::keys / 8; j += 2) {
#pragma unroll
      for (int part = 0; part < C::parts; ++part) {
        uint32_t x[4];
        load_matrices(tile + part * C::k_part + 8 * j * C::k_pitch + 2 * d, x);
        // The product of the two small parts is below float32's rounding.
#pragma unroll
        for (int other = 0; other < C::parts - part; ++other) {
          mma_f16(scores[j], a[other], x[0], x[1]);
          mma_f16(scores[j + 1], a[other], x[2], x[3]);
        }
      }
    }
  }
}

// out += weights v over this warp's columns.
template <typename C>
KV_DEVICE void multiply_values(
    uint32_t tile,
    const float (&weights)[C::keys / 8][4],
    float (&out)[C::columns / 8][4]) {
  int lane = threadIdx.x % 32;
  tile += lane % 16 * C::v_pitch + lane / 16 * 16;
#pragma unroll
  for (int j = 0; j < C::keys / 8; j += 2) {
    uint32_t a[C::parts][4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float* w = weights[j + i / 2] + i % 2 * 2;
      if constexpr (C::parts == 1) {
        a[0][i] = pack_f16(w[0], w[1]);
      } else {
        split_f16(w[0], w[1], a[0][i], a[C::parts - 1][i]);
      }
    }
#pragma unroll
    for (int d = 0; d < C::columns / 8; d += 2) {
#pragma unroll
      for (int part = 0; part < C::parts; ++part) {
        uint32_t x[4];
        load_matrices_transposed(
            tile + part * C::v_part + 8 * j * C::v_pitch + 16 * d, x);
#pragma unroll
        for (int other = 0; other < C::parts - part; ++other) {
          mma_f16(out[d], a[other], x[0], x[1]);
          mma_f16(out[d + 1], a[other], x[2], x[3]);
        }
      }
    }
  }
}

template <Scalar type>
KV_DEVICE void store_result(void* out, int64_t i, float x) {
  if constexpr (type == Scalar::f32) {
    static_cast<float*>(out)[i] = x;
  } else {
    uint32_t bits = type == Scalar::f16 ? pack_f16(x, 0) : pack_bf16(x, 0);
    static_cast<uint16_t*>(out)[i] = uint16_t(bits);
  }
}

KV_DEVICE int64_t out_row(const CudaParams& p, const BlockPlace& b, int row) {
  int64_t head =
      b.batch * int64_t(p.n_q_heads) + b.kv_head * b.group + row % b.group;
  return head * p.q_len + row / b.group;
}

KV_DEVICE int64_t
partial_row(const CudaParams& p, const BlockPlace& b, int split, int row) {
  int64_t head = int64_t(split) * p.batch + b.batch;
  return (head * p.n_kv_heads + b.kv_head) * b.n_rows + row;
}

KV_DEVICE kv::SoftmaxState* partial_states(const CudaParams& p) {
  return reinterpret_cast<kv::SoftmaxState*>(p.work.partial_state);
}

// The sink's part, once all keys of a row are in.
KV_DEVICE float
add_sink(const CudaParams& p, int head, kv::SoftmaxState& state) {
  if (!p.sinks.data) {
    return 1.0f;
  }
  kv::SoftmaxState sink{p.sinks.data[head * p.sinks.stride], 1.0f};
  return kv::softmax_merge(state, sink).first;
}

// Writes two rows of a thread: results, or partial sums where keys are split.
// dim_of(position): where a column of the result lies in the head dim.
template <Scalar q_type, int v_dim, int n, typename DimOf>
KV_DEVICE void store_rows(
    const CudaParams& p,
    const BlockPlace& b,
    int first_row,
    int first_column,
    int v_exponent,
    const RowState (&rows)[2],
    const float (&acc)[n][4],
    DimOf dim_of) {
  int lane = threadIdx.x % 32;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    int row = first_row + 8 * r;
    kv::SoftmaxState state = finish_state(rows[r]);
    if (row >= b.n_rows) {
      continue;
    }
    float factor = power_of_two(-int(weight_log2)) * power_of_two(v_exponent);
    bool split = p.work.splits > 1;
    int64_t at = out_row(p, b, row);
    if (split) {
      at = partial_row(p, b, b.split, row);
    } else {
      factor *= add_sink(p, b.kv_head * b.group + row % b.group, state);
      factor *= kv::softmax_finish(state);
    }
    if (lane % 4 == 0 && first_column == 0) {
      if (split) {
        partial_states(p)[at] = state;
      } else if (p.lse) {
        p.lse[at] = kv::softmax_lse(state);
      }
    }
    auto write = [&](auto store) {
#pragma unroll
      for (int j = 0; j < n; ++j) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          int position = first_column + 8 * j + 2 * (lane % 4) + i;
          store(at * v_dim + dim_of(position), acc[j][2 * r + i] * factor);
        }
      }
    };
    if (split) {
      write([&](int64_t i, float x) { p.work.partial_acc[i] = x; });
    } else {
      write([&](int64_t i, float x) { store_result<q_type>(p.out, i, x); });
    }
  }
}

template <typename C>
__device__ void prefill_mma(const CudaParams& p, uint8_t* shared) {
  using K = typename C::K;
  using V = typename C::V;
  uint32_t q_tile = shared_address(shared);
  uint32_t tile = q_tile + C::shape.tile();
  uint32_t factors = q_tile + C::shape.factors();
  int* peaks = reinterpret_cast<int*>(shared + C::shape.peaks());
  int warp = threadIdx.x / 32;
  int lane = threadIdx.x % 32;
  int warp_row = warp / C::column_warps * 16;
  int warp_column = warp % C::column_warps * C::columns;

  BlockPlace b = locate_block(p, C::rows);
  BlockKeys range = block_keys(p, b, C::rows);
  KeyRange share = split_keys<C::keys>(range.any, b.split, p.work.splits);
  float k_table = fill_table<typename K::Codec>(
      q_tile + C::shape.k_table(), p.k.codebook, threadIdx.x, C::threads);
  float v_table = fill_table<typename V::Codec>(
      q_tile + C::shape.v_table(), p.v.codebook, threadIdx.x, C::threads);
  if (threadIdx.x < 2) {
    store_shared(shared_address(peaks + threadIdx.x), 0);
  }
  load_queries<C>(p, b, q_tile, factors);
  __syncthreads();

  int row = b.first_row + warp_row + lane / 4;
  RowView views[2];
  RowState states[2];
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    float factor =
        bits_float(load_shared(factors + 4 * (warp_row + lane / 4 + 8 * r)));
    views[r] = view_row(p, b, row + 8 * r, factor);
  }
  float out[C::columns / 8][4] = {};
  int k_exponent = least_exponent;
  int v_exponent = least_exponent;
  bool k_wide = is_wide(p.k.codes);
  bool v_wide = is_wide(p.v.codes);
  bool bent = p.softcap > 0 || p.mask.data;
  TileLoader<K, C::k_dim, C::keys, C::threads, C::parts> k;
  TileLoader<V, C::v_dim, C::keys, C::threads, C::parts> v;
  k.load(p, p.k, b, share.begin, share, k_wide);
  for (int key = share.begin; key < share.end; key += C::keys) {
    settle_exponent(k_exponent, peaks, k.bound(k_table));
    k.store(
        tile,
        C::k_pitch,
        C::k_part,
        k_exponent,
        k_table,
        q_tile + C::shape.k_table(),
        p.k.codebook);
    __syncthreads();
    v.load(p, p.v, b, key, share, v_wide);
    float scores[C::keys / 8][4];
    multiply_queries<C>(q_tile + warp_row * C::k_pitch, tile, scores);

    int old_exponent = v_exponent;
    settle_exponent(v_exponent, peaks + 1, v.bound(v_table));
    v.store(
        tile,
        C::v_pitch,
        C::v_part,
        v_exponent,
        v_table,
        q_tile + C::shape.v_table(),
        p.v.codebook);
    __syncthreads();
    k.load(p, p.k, b, key + C::keys, share, k_wide);
    float rescale[2];
    bool raised = to_weights(
        p, bent, range, views, k_exponent, key, states, scores, rescale);
    if (raised || v_exponent != old_exponent) {
      rescale_rows(
          power_of_two(max(old_exponent - v_exponent, -126)), rescale, out);
    }
    multiply_values<C>(tile + 2 * warp_column, scores, out);
  }
  store_rows<C::q_type, C::v_dim>(
      p, b, row, warp_column, v_exponent, states, out, [](int i) {
        return dim_at<typename V::Codec, C::parts>(i);
      });
}

// Adds up what blocks with different keys found; a warp a row.
template <Scalar q_type, int v_dim>
__device__ void prefill_merge(const CudaParams& p) {
  int warps = blockDim.x / 32;
  int lane = threadIdx.x % 32;
  BlockPlace b = locate_block(p, warps);
  int row = b.first_row + threadIdx.x / 32;
  if (row >= b.n_rows) {
    return;
  }
  float acc[v_dim / 32] = {};
  kv::SoftmaxState state = kv::softmax_init();
  for (int split = 0; split < p.work.splits; ++split) {
    int64_t at = partial_row(p, b, split, row);
    kv::MergeFactors factors = kv::softmax_merge(state, partial_states(p)[at]);
#pragma unroll
    for (int i = 0; i < v_dim / 32; ++i) {
      float x = p.work.partial_acc[at * v_dim + 32 * i + lane];
      acc[i] = acc[i] * factors.first + x * factors.second;
    }
  }
  float factor = add_sink(p, b.kv_head * b.group + row % b.group, state);
  factor *= kv::softmax_finish(state);
  int64_t at = out_row(p, b, row);
#pragma unroll
  for (int i = 0; i < v_dim / 32; ++i) {
    store_result<q_type>(p.out, at * v_dim + 32 * i + lane, acc[i] * factor);
  }
  if (p.lse && lane == 0) {
    p.lse[at] = kv::softmax_lse(state);
  }
}

} // namespace mlx::core::quantized_sdpa::prefill
