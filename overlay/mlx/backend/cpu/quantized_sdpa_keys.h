// Which keys a row sees, where a tile of them lies, and its scales.

#pragma once

#include "mlx/backend/common/visible_keys.h"
#include "mlx/backend/cpu/quantized_sdpa_decode.h"
#include "mlx/backend/cpu/quantized_sdpa_kernels.h"

namespace {

using namespace mlx::core::quantized_sdpa;

constexpr int tile_keys = 64;

// Loops over the keys of a tile may run to this.
KV_INLINE int padded_keys(int n) {
  return (n + 15) / 16 * 16;
}

using kv::KeyRange;

inline kv::KeyRule key_rule(const CpuArgs& args) {
  return {args.causal, args.q_len, args.window_size};
}

inline KeyRange existing_keys(const CpuArgs& args, int batch) {
  return kv::existing_keys(
      args.kv_len,
      args.left_padding ? args.left_padding[batch] : 0,
      args.lengths ? args.lengths[batch] : args.kv_len);
}

// The keys of the item that at least one of its rows sees.
inline KeyRange item_keys(const CpuArgs& args, const CpuItem& item) {
  int heads = args.n_q_heads / args.n_kv_heads;
  auto range = kv::visible_to_any(
      existing_keys(args, item.batch),
      key_rule(args),
      item.row_begin / heads,
      (item.row_begin + item.n_rows - 1) / heads);
  range.begin = range.begin > item.key_begin ? range.begin : item.key_begin;
  range.end = range.end < item.key_end ? range.end : item.key_end;
  return range;
}

// Tiles start at multiples of tile_keys, so that all but the first and the last
// hold the same keys whatever else is visible.
KV_INLINE KeyRange tile_at(KeyRange keys, int start) {
  int end = start + tile_keys;
  return {
      start > keys.begin ? start : keys.begin, end < keys.end ? end : keys.end};
}

KV_INLINE int first_tile(KeyRange keys) {
  return keys.begin / tile_keys * tile_keys;
}

// One operand's codes and scales for a tile. Scales are group-major,
// [n_groups, tile_keys].
struct TileView {
  const uint8_t* rows[tile_keys];
  int n;
  int dim;
  int group_size;
  int n_groups;
  float* scales;
  float* biases;
  const float* table;
};

KV_INLINE int scalar_bytes(Scalar type) {
  return type == Scalar::f32 ? 4
      : type == Scalar::f16  ? 2
      : type == Scalar::bf16 ? 2
                             : 1;
}

template <Scalar type>
KV_INLINE float load_scalar(const void* data, int64_t i) {
  switch (type) {
    case Scalar::f32:
      return static_cast<const float*>(data)[i];
    case Scalar::f16:
      return half_to_float(static_cast<const uint16_t*>(data)[i]);
    case Scalar::bf16:
      return bfloat_to_float(static_cast<const uint16_t*>(data)[i]);
    case Scalar::e8m0:
      return kv::e8m0_to_float(static_cast<const uint8_t*>(data)[i]);
    case Scalar::e4m3:
      return kv::e4m3_to_float(static_cast<const uint8_t*>(data)[i]);
    case Scalar::boolean:
      return static_cast<const uint8_t*>(data)[i] ? 1.0f : 0.0f;
  }
  __builtin_unreachable();
}

// Whole vectors of the n values; returns how many they are.
template <Scalar type>
KV_INLINE int
convert_dense(const void* data, int64_t offset, int n, float* out) {
  int i = 0;
  if constexpr (type == Scalar::f16 || type == Scalar::bf16) {
    auto halves = static_cast<const uint16_t*>(data) + offset;
    for (; i + lanes <= n; i += lanes) {
      Halves h = load<Halves>(halves + i);
      Floats f = type == Scalar::f16 ? half_to_floats(h)
                                     : cast<Floats>(widen_halves(h) << 16);
      store(out + i, f);
    }
  } else if constexpr (type == Scalar::e8m0) {
    auto codes = static_cast<const uint8_t*>(data) + offset;
    for (; i + lanes <= n; i += lanes) {
      store(out + i, e8m0_to_floats(widen_bytes(codes + i)));
    }
  } else if constexpr (type == Scalar::e4m3) {
    auto codes = static_cast<const uint8_t*>(data) + offset;
    for (; i + block_codes <= n; i += block_codes) {
      Block block = decode_e4m3(codes + i);
      store(out + i, block);
    }
  }
  return i;
}

template <Scalar type>
void convert_strided(
    const void* data,
    int64_t offset,
    int64_t stride,
    int n,
    float* out) {
  int i = stride == 1 ? convert_dense<type>(data, offset, n, out) : 0;
  for (; i < n; ++i) {
    out[i] = load_scalar<type>(data, offset + i * stride);
  }
}

using ConvertFn = void (*)(const void*, int64_t, int64_t, int, float*);

inline ConvertFn convert_fn(Scalar type) {
  switch (type) {
    case Scalar::f32:
      return convert_strided<Scalar::f32>;
    case Scalar::f16:
      return convert_strided<Scalar::f16>;
    case Scalar::bf16:
      return convert_strided<Scalar::bf16>;
    case Scalar::e8m0:
      return convert_strided<Scalar::e8m0>;
    case Scalar::e4m3:
      return convert_strided<Scalar::e4m3>;
    case Scalar::boolean:
      return convert_strided<Scalar::boolean>;
  }
  __builtin_unreachable();
}

// A run of keys that lie evenly spaced: the whole cache, or one block of it.
struct Run {
  int outer;
  int pos;
  int n;
};

inline Run run_at(const CpuArgs& args, int batch, int key, int end) {
  if (!args.block_table) {
    return {batch, key, end - key};
  }
  int64_t max_blocks = args.kv_len / args.block_size;
  int block = key / args.block_size;
  int pos = key - block * args.block_size;
  int id = args.block_table[batch * max_blocks + block];
  int left = args.block_size - pos;
  return {
      kv::existing_block(id, args.n_blocks),
      pos,
      left < end - key ? left : end - key};
}

KV_INLINE int64_t row_offset(const Tensor& x, const Run& run, int head) {
  return run.outer * x.strides[0] + head * x.strides[1] +
      run.pos * x.strides[2];
}

inline void locate(
    const CpuArgs& args,
    const CpuOperand& x,
    const CpuItem& item,
    KeyRange tile,
    TileView& view) {
  view.n = tile.end - tile.begin;
  for (int i = 0; i < view.n;) {
    Run run = run_at(args, item.batch, tile.begin + i, tile.end);
    auto row = static_cast<const uint8_t*>(x.codes.data) +
        row_offset(x.codes, run, item.kv_head);
    for (int j = 0; j < run.n; ++j, ++i) {
      view.rows[i] = row;
      row += x.codes.strides[2];
    }
  }
  // Keys are read in eights.
  for (int i = view.n; i % 8; ++i) {
    view.rows[i] = view.rows[view.n - 1];
  }
}

constexpr int max_flat_groups = 16;

// [n, n_groups] to every `step`-th row of [n_groups * step, tile_keys]: even
// groups apart from odd ones, and each half again.
inline void
transpose_groups(const float* in, int n_groups, int n, int step, float* out) {
  int half = n * n_groups / 2;
  if (n_groups % 2 || half % lanes) {
    for (int g = 0; g < n_groups; ++g) {
      for (int i = 0; i < n; ++i) {
        out[g * step * tile_keys + i] = in[i * n_groups + g];
      }
    }
    return;
  }
  float* odd_out = out + step * tile_keys;
  float halves[max_flat_groups * tile_keys];
  float* even = n_groups == 2 ? out : halves;
  float* odd = n_groups == 2 ? odd_out : halves + half;
  for (int i = 0; i < half; i += lanes) {
    deinterleave(in + 2 * i, even + i, odd + i);
  }
  if (n_groups > 2) {
    transpose_groups(even, n_groups / 2, n, 2 * step, out);
    transpose_groups(odd, n_groups / 2, n, 2 * step, odd_out);
  }
}

inline void load_groups(
    const CpuArgs& args,
    const Tensor& x,
    const CpuItem& item,
    KeyRange tile,
    int n_groups,
    float* out) {
  auto convert = convert_fn(x.type);
  int n = tile.end - tile.begin;
  for (int i = 0; i < n;) {
    Run run = run_at(args, item.batch, tile.begin + i, tile.end);
    int64_t offset = row_offset(x, run, item.kv_head);
    bool dense = x.strides[2] == n_groups && x.strides[3] == 1;
    if (dense) {
      // The next tile's: these streams are too thin for the hardware to follow.
      int bytes = run.n * n_groups * scalar_bytes(x.type);
      auto start =
          static_cast<const char*>(x.data) + offset * scalar_bytes(x.type);
      prefetch(start + bytes, bytes);
    }
    if (dense && n_groups > 1 && n_groups <= max_flat_groups) {
      float flat[max_flat_groups * tile_keys];
      convert(x.data, offset, 1, run.n * n_groups, flat);
      transpose_groups(flat, n_groups, run.n, 1, out + i);
    } else {
      for (int g = 0; g < n_groups; ++g) {
        int64_t start = offset + g * x.strides[3];
        convert(x.data, start, x.strides[2], run.n, out + g * tile_keys + i);
      }
    }
    i += run.n;
  }
}

inline void load_scales(
    const CpuArgs& args,
    const CpuOperand& x,
    const CpuItem& item,
    KeyRange tile,
    TileView& view) {
  load_groups(args, x.scales, item, tile, view.n_groups, view.scales);
  if (x.biases.data) {
    load_groups(args, x.biases, item, tile, view.n_groups, view.biases);
  }
}

// Hands out pieces of the scratch memory.
class Arena {
 public:
  explicit Arena(float* base) : next_(base) {}

  float* take(size_t n) {
    float* p = next_;
    next_ += (n + 15) / 16 * 16;
    return p;
  }

  size_t taken(const float* base) const {
    return next_ - base;
  }

 private:
  float* next_;
};

// Of an operand's tile, and the table of its codes.
struct OperandScratch {
  float *scales, *biases, *table;

  OperandScratch(const CpuOperand& x, Arena& arena) {
    size_t n_groups = x.dim / x.group_size;
    scales = arena.take(n_groups * tile_keys);
    biases = arena.take(n_groups * tile_keys);
    table = arena.take(table_size);
  }
};

} // namespace
