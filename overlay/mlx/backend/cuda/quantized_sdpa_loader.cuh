// Asks for the tiles of one segment, one after another.

#pragma once

#include "mlx/backend/cuda/quantized_sdpa_instance.cuh"
#include "mlx/backend/cuda/quantized_sdpa_work.cuh"

namespace mlx::core::quantized_sdpa {

// Copies of 16 bytes of scales and biases that one lane makes for each tile.
template <typename I>
struct DenseScales {
  using T = Traits<I>;
  struct Array {
    int begin;
    int bytes;
    int offset;
  };
  // The four arrays in the order of the stage.
  static constexpr int key_bytes(int i) {
    return i == 0 ? T::k_shape.groups * T::k_shape.scale_bytes
        : i == 1  ? T::k_shape.groups * T::k_shape.bias_bytes
        : i == 2  ? T::v_shape.groups * T::v_shape.scale_bytes
                  : T::v_shape.groups * T::v_shape.bias_bytes;
  }
  static constexpr int copies(int i) {
    return key_bytes(i) * T::tile_keys / copy_bytes;
  }
  static constexpr int total = copies(0) + copies(1) + copies(2) + copies(3);
  static constexpr int rounds = (total + warp_size - 1) / warp_size;

  // Of the lane's copy in each round: its array, source of the sequence's
  // first key, destination in the stage.
  const uint8_t* from[rounds];
  int64_t block_stride[rounds];
  int bytes[rounds];
  // In the stage, in its upper half, and in the array.
  uint32_t offset[rounds];

  KV_DEVICE void init(const CudaParams& p, int batch, int head, int lane) {
#pragma unroll
    for (int i = 0; i < rounds; ++i) {
      int id = i * warp_size + lane;
      const CudaTensor* x = &p.k.scales;
      int array = 0;
      int to = T::stage.k_scales;
      auto step = [&](int next, const CudaTensor& y, int stage_offset) {
        if (array == next - 1 && id >= copies(next - 1)) {
          id -= copies(next - 1);
          x = &y;
          array = next;
          to = stage_offset;
        }
      };
      step(1, p.k.biases, T::stage.k_biases);
      step(2, p.v.scales, T::stage.v_scales);
      step(3, p.v.biases, T::stage.v_biases);
      offset[i] = id * copy_bytes;
      bytes[i] = id < copies(array) ? key_bytes(array) : 0;
      block_stride[i] = x->strides[0];
      from[i] = x->data + head * x->strides[1] + offset[i];
      if constexpr (I::paging == Paging::none) {
        from[i] += batch * block_stride[i];
      }
      offset[i] += uint32_t(to) << 16;
    }
  }

  template <bool whole>
  KV_DEVICE void load(uint32_t stage, KeyPlace place, int valid) const {
#pragma unroll
    for (int i = 0; i < rounds; ++i) {
      if (total % warp_size != 0 && bytes[i] == 0) {
        continue;
      }
      const uint8_t* source = from[i] + int64_t(place.row) * bytes[i];
      if constexpr (I::paging != Paging::none) {
        source += place.outer * block_stride[i];
      }
      int in_array = int(offset[i] & 0xffff);
      uint32_t to = stage + (offset[i] >> 16) + in_array;
      if constexpr (whole) {
        copy_async<copy_bytes>(to, source);
      } else {
        int left = kv::clamp_index(valid * bytes[i] - in_array, 0, copy_bytes);
        copy_async<copy_bytes>(to, left > 0 ? source : from[i], left);
      }
    }
  }
};

template <typename I>
class TileLoader {
  using T = Traits<I>;
  static constexpr int keys = T::tile_keys;

 public:
  KV_DEVICE TileLoader(
      const CudaParams& p,
      const Segment& segment,
      uint32_t ring,
      int warp,
      int lane)
      : p_(p),
        ring_(ring),
        batch_(segment.batch),
        head_(segment.kv_head),
        lane_(lane),
        end_key_(segment.keys.end),
        next_(segment.tile_begin + warp),
        end_(segment.tile_end) {
    if constexpr (I::dense_scales) {
      scales_.init(p, batch_, head_, lane);
    }
    fetch_blocks(next_);
  }

  // Into stage `slot`; the group of copies is empty behind the last tile.
  KV_DEVICE void load(int slot) {
    if (next_ < end_ && next_ * keys < end_key_) {
      uint32_t stage = ring_ + slot * T::stage.bytes;
      int first = next_ * keys;
      int valid = end_key_ - first;
      if (valid >= keys) {
        load_tile<true>(stage, first, keys);
      } else {
        load_tile<false>(stage, first, valid);
      }
    }
    copy_commit();
    next_ += T::warps;
  }

 private:
  // Entries of the block table for this warp's tiles, one a lane.
  KV_DEVICE void fetch_blocks(int tile) {
    if constexpr (I::paging == Paging::tiles) {
      int mine = tile + lane_ * T::warps;
      blocks_from_ = tile;
      blocks_ = 0;
      if (mine < end_ && mine * keys < end_key_) {
        blocks_ = paged_place(p_, batch_, mine * keys).outer;
      }
    }
  }

  KV_DEVICE KeyPlace place(int key) {
    if constexpr (I::paging == Paging::tiles) {
      int ahead = (next_ - blocks_from_) / T::warps;
      if (ahead == warp_size) {
        fetch_blocks(next_);
        ahead = 0;
      }
      return {__shfl_sync(all_lanes, blocks_, ahead), key % p_.block_size};
    } else {
      return {batch_, key};
    }
  }

  template <bool whole>
  KV_DEVICE void load_tile(uint32_t stage, int first, int valid) {
    KeyPlace at = place(first);
    load_codes<
        whole,
        I::k_dense,
        CodeCopy<
            keys,
            T::k_shape.row_bytes(),
            T::k_shape.row_pitch(),
            T::k_width,
            I::k_chunk,
            false>>(stage + T::stage.k, p_.k.codes, at, first, valid);
    load_codes<
        whole,
        I::v_dense,
        CodeCopy<
            keys,
            T::v_shape.row_bytes(),
            T::v_shape.row_pitch(),
            T::v_width,
            I::v_chunk,
            true>>(stage + T::stage.v, p_.v.codes, at, first, valid);
    if constexpr (I::dense_scales) {
      scales_.template load<whole>(stage, at, valid);
    } else {
      load_scales<T::k_shape.groups, T::k_shape.scale_bytes, I::k_scale_chunk>(
          stage + T::stage.k_scales, p_.k.scales, at, first, valid);
      load_scales<T::k_shape.groups, T::k_shape.bias_bytes, I::k_bias_chunk>(
          stage + T::stage.k_biases, p_.k.biases, at, first, valid);
      load_scales<T::v_shape.groups, T::v_shape.scale_bytes, I::v_scale_chunk>(
          stage + T::stage.v_scales, p_.v.scales, at, first, valid);
      load_scales<T::v_shape.groups, T::v_shape.bias_bytes, I::v_bias_chunk>(
          stage + T::stage.v_biases, p_.v.biases, at, first, valid);
    }
  }

  template <bool whole, bool dense, typename Copy>
  KV_DEVICE void load_codes(
      uint32_t to,
      const CudaTensor& x,
      KeyPlace at,
      int first,
      int valid) {
    if constexpr (I::paging == Paging::keys) {
      Copy::template run<whole>(
          to, valid, column<dense, Copy>(x), lane_, [&](int key) {
            return address_of(x, paged_place(p_, batch_, first + key), head_);
          });
    } else {
      const uint8_t* base = address_of(x, at, head_);
      int64_t stride = dense ? int64_t(Copy::row_bytes) : x.strides[2];
      Copy::template run<whole>(
          to, valid, column<dense, Copy>(x), lane_, [&](int key) {
            return base + key * stride;
          });
    }
  }

  // From one chunk to the next; rows without gaps have none between chunks.
  template <bool dense, typename Copy>
  static KV_DEVICE int64_t column(const CudaTensor& x) {
    return dense || Copy::chunk_bytes > 4 ? int64_t(Copy::chunk_bytes)
                                          : x.strides[3];
  }

  template <int groups, int bytes, int chunk>
  KV_DEVICE void load_scales(
      uint32_t to,
      const CudaTensor& x,
      KeyPlace at,
      int first,
      int valid) {
    if constexpr (bytes > 0) {
      const uint8_t* base = address_of(x, at, head_);
      auto row_of = [&](int key) {
        if constexpr (I::paging == Paging::keys) {
          return address_of(x, paged_place(p_, batch_, first + key), head_);
        } else {
          return base + key * x.strides[2];
        }
      };
      if constexpr (chunk > 0) {
        ScaleRows<keys, groups * bytes, chunk>::run(to, valid, lane_, row_of);
      } else {
        ScaleValues<keys, groups, bytes>::run(
            to, valid, x.strides[3], lane_, row_of);
      }
    }
  }

  const CudaParams& p_;
  DenseScales<I> scales_;
  uint32_t ring_;
  int batch_;
  int head_;
  int lane_;
  int end_key_;
  int next_;
  int end_;
  int blocks_;
  int blocks_from_;
};

} // namespace mlx::core::quantized_sdpa
