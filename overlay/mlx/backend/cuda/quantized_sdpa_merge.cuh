// From the states of the warps to the result, over blocks where several hold
// parts of a group.

#pragma once

#define KV_EXP(x) ::mlx::core::quantized_sdpa::exp2_approx(x)
#define KV_LOG(x) ::log2f(x)

#include "mlx/backend/cuda/quantized_sdpa_queries.cuh"

#include "mlx/backend/common/softmax_state.h"

// States are in powers of two here.
namespace mlx::core::quantized_sdpa {

// Below every finite score: the level of a row that has seen no key.
constexpr float no_level = -1e30f;

template <typename I>
struct RowState;
template <typename I>
struct Output;

template <Scalar type>
KV_DEVICE void store_result(void* out, int64_t i, float x) {
  if constexpr (type == Scalar::f32) {
    static_cast<float*>(out)[i] = x;
  } else if constexpr (type == Scalar::f16) {
    static_cast<uint16_t*>(out)[i] = uint16_t(pack_f16(x, 0));
  } else {
    static_cast<uint16_t*>(out)[i] = uint16_t(pack_bf16(x, 0));
  }
}

// The factor of a row's sum of values; also writes its log-sum-exp.
template <typename I>
KV_DEVICE float finish_row(
    const CudaParams& p,
    int64_t out_row,
    int head,
    kv::SoftmaxState state,
    bool writes_lse) {
  float factor = 1.0f;
  if (p.sinks.data) {
    float sink = p.sinks.data[head * p.sinks.stride] * log2_of_e;
    factor =
        kv::softmax_merge(state, {sink, sink == -KV_INFINITY ? 0.0f : 1.0f})
            .first;
  }
  if (p.lse && writes_lse) {
    p.lse[out_row] = kv::softmax_lse(state) * log_of_2;
  }
  return factor * kv::softmax_finish(state);
}

template <typename I>
KV_DEVICE int64_t out_row_of(
    const CudaParams& p,
    const Segment& segment,
    const Rows<I>& rows,
    int row) {
  int64_t head = int64_t(segment.batch) * p.n_q_heads + rows.head(segment, row);
  return head * p.q_len + rows.position(row);
}

// Sums over the lanes of a row; each lane then has all of its rows' sums.
template <typename I>
KV_DEVICE void reduce_lanes(RowState<I>& state, Output<I>& out) {
  using T = Traits<I>;
#pragma unroll
  for (int d = 4; d < warp_size; d *= 2) {
#pragma unroll
    for (int n = 0; n < T::row_tiles; ++n) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        state.sum[n][i] += __shfl_xor_sync(all_lanes, state.sum[n][i], d);
        if constexpr (T::V::has_bias) {
#pragma unroll
          for (int g = 0; g < T::v_groups; ++g) {
            float& x = out.biases[n][g][i];
            x += __shfl_xor_sync(all_lanes, x, d);
          }
        }
      }
    }
  }
}

// Values a row in the memory where warps meet; 4 more spread the banks.
template <typename I>
constexpr int merge_pitch = I::v_dim + 4;

// States in shared memory.
constexpr int state_bytes = 8;

KV_DEVICE void store_state(uint32_t address, kv::SoftmaxState state) {
  store_shared(address, float_bits(state.max));
  store_shared(address + 4, float_bits(state.sum));
}

KV_DEVICE kv::SoftmaxState load_state(uint32_t address) {
  uint32_t words[2];
  load_shared(address, words);
  return {bits_float(words[0]), bits_float(words[1])};
}

// One row tile of one warp, [row_tile, v_dim] and the states, to shared memory.
template <typename I>
KV_DEVICE void put_tile(
    uint32_t values,
    uint32_t states,
    int n,
    int lane,
    float unit,
    const RowState<I>& state,
    const Output<I>& out) {
  using T = Traits<I>;
  using To = Convert<typename T::V>;
  int r = lane / 4;
  int j = lane % 4;
#pragma unroll
  for (int b = 0; b < T::v_blocks; ++b) {
#pragma unroll
    for (int t = 0; t < T::v_tiles; ++t) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        int d = 2 * t + i / 2;
        float x =
            out.values[n][b][t][i] * (unit / To::step(T::VRun::column_code(d)));
        if constexpr (T::V::has_bias) {
          x += out.biases[n][b / (T::v_blocks / T::v_groups)][i % 2];
        }
        int row = 2 * j + i % 2;
        int at = row * merge_pitch<I> + (b * 8 + r) * T::v_run + d;
        store_shared(values + at * 4, float_bits(x));
      }
    }
  }
  if (r < 2) {
    float level = r == 0 ? state.level[n][0] : state.level[n][1];
    float sum = r == 0 ? state.sum[n][0] : state.sum[n][1];
    store_state(
        states + (2 * j + r) * state_bytes,
        {sum == 0 ? -KV_INFINITY : level, sum});
  }
}

// The state of `n` parts together, `stride` bytes apart.
KV_DEVICE kv::SoftmaxState merge_states(uint32_t states, int n, int stride) {
  kv::SoftmaxState all = kv::softmax_init();
  for (int i = 0; i < n; ++i) {
    all.max = fmaxf(all.max, load_state(states + i * stride).max);
  }
  for (int i = 0; i < n; ++i) {
    auto x = load_state(states + i * stride);
    all.sum += x.sum * kv::softmax_weight(x.max, all.max);
  }
  return all;
}

template <typename I>
KV_DEVICE int64_t partial_row(int block, int slot) {
  return (int64_t(block) * 2 + slot) * Traits<I>::rows;
}

// Adds up the warps for one row tile and writes the result or the part.
template <typename I>
KV_DEVICE void merge_warps(
    const CudaParams& p,
    const Segment& segment,
    const Rows<I>& rows,
    uint32_t values,
    uint32_t states,
    int n) {
  using T = Traits<I>;
  constexpr int stride = row_tile * state_bytes;
  int n_rows = min(row_tile, rows.n - n * row_tile);
  for (int i = threadIdx.x; i < n_rows * I::v_dim; i += T::threads) {
    int row = i / I::v_dim;
    int d = i % I::v_dim;
    uint32_t state = states + row * state_bytes;
    auto all = merge_states(state, T::warps, stride);
    float x = 0;
#pragma unroll
    for (int w = 0; w < T::warps; ++w) {
      float weight =
          kv::softmax_weight(load_state(state + w * stride).max, all.max);
      int at = (w * row_tile + row) * merge_pitch<I> + d;
      x = fmaf(weight, bits_float(load_shared(values + at * 4)), x);
    }
    int in_block = n * row_tile + row;
    if (segment.n_blocks == 1) {
      int64_t at = out_row_of<I>(p, segment, rows, in_block);
      x *= finish_row<I>(p, at, rows.head(segment, in_block), all, d == 0);
      store_result<I::q_type>(p.out, at * I::v_dim + d, x);
    } else {
      int64_t at = partial_row<I>(blockIdx.x, segment.slot) + in_block;
      p.work.partial_acc[at * I::v_dim + d] = x;
      if (d == 0) {
        p.work.partial_state[2 * at] = all.max;
        p.work.partial_state[2 * at + 1] = all.sum;
      }
    }
  }
}

// The last block of a group to come here adds up the parts of all.
KV_DEVICE bool
is_last_block(const CudaParams& p, const Segment& segment, uint32_t flag) {
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) {
    uint32_t* counter = p.work.counters + segment.first_block;
    uint32_t last = segment.n_blocks - 1;
    store_shared(flag, atomicInc(counter, last) == last);
  }
  __syncthreads();
  __threadfence();
  return load_shared(flag) != 0;
}

template <typename I>
KV_DEVICE void
merge_blocks(const CudaParams& p, const Segment& segment, const Rows<I>& rows) {
  using T = Traits<I>;
  auto part_of = [&](int i) {
    return partial_row<I>(
        segment.first_block + i, i == 0 ? segment.first_slot : 0);
  };
  auto state_of = [&](int i, int row) {
    const float* x = p.work.partial_state + 2 * (part_of(i) + row);
    return kv::SoftmaxState{__ldcg(x), __ldcg(x + 1)};
  };
  constexpr int vectors = I::v_dim / 4;
  for (int i = threadIdx.x; i < rows.n * vectors; i += T::threads) {
    int row = i / vectors;
    int d = i % vectors * 4;
    kv::SoftmaxState all = kv::softmax_init();
    float4 x = {0, 0, 0, 0};
#pragma unroll 4
    for (int b = 0; b < segment.n_blocks; ++b) {
      auto from = p.work.partial_acc + (part_of(b) + row) * I::v_dim + d;
      float4 y = __ldcg(reinterpret_cast<const float4*>(from));
      auto factors = kv::softmax_merge(all, state_of(b, row));
      x.x = x.x * factors.first + y.x * factors.second;
      x.y = x.y * factors.first + y.y * factors.second;
      x.z = x.z * factors.first + y.z * factors.second;
      x.w = x.w * factors.first + y.w * factors.second;
    }
    int64_t at = out_row_of<I>(p, segment, rows, row);
    float factor = finish_row<I>(p, at, rows.head(segment, row), all, d == 0);
    store_result<I::q_type>(p.out, at * I::v_dim + d, x.x * factor);
    store_result<I::q_type>(p.out, at * I::v_dim + d + 1, x.y * factor);
    store_result<I::q_type>(p.out, at * I::v_dim + d + 2, x.z * factor);
    store_result<I::q_type>(p.out, at * I::v_dim + d + 3, x.w * factor);
  }
}

template <typename I>
KV_DEVICE void write_segment(
    const CudaParams& p,
    const Segment& segment,
    const Rows<I>& rows,
    uint32_t shared,
    float unit,
    RowState<I>& state,
    Output<I>& out) {
  using T = Traits<I>;
  int warp = threadIdx.x / warp_size;
  int lane = threadIdx.x % warp_size;
  reduce_lanes<I>(state, out);
  uint32_t values = shared + T::shared.ring;
  uint32_t states = shared + T::shared.states;
#pragma unroll
  for (int n = 0; n < T::row_tiles; ++n) {
    __syncthreads();
    put_tile<I>(
        values + warp * row_tile * merge_pitch<I> * 4,
        states + warp * row_tile * state_bytes,
        n,
        lane,
        unit,
        state,
        out);
    __syncthreads();
    merge_warps<I>(p, segment, rows, values, states, n);
  }
  if (segment.n_blocks > 1 &&
      is_last_block(p, segment, shared + T::shared.is_last)) {
    merge_blocks<I>(p, segment, rows);
  }
}

} // namespace mlx::core::quantized_sdpa
