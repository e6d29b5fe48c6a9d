// Where a block's keys lie, and their way into shared memory.

#pragma once

#include "mlx/backend/cuda/quantized_sdpa_convert.cuh"
#include "mlx/backend/cuda/quantized_sdpa_keys.cuh"
#include "mlx/backend/cuda/quantized_sdpa_layout.h"

namespace mlx::core::quantized_sdpa {

// Keys in the order of memory become rows of a tile such that a lane's keys,
// one in each of the blocks of 8 rows, are neighbours in the scales.
template <int keys>
KV_DEVICE constexpr int block_of_key(int key) {
  return key % (keys / row_tile);
}

// Rows 2j and 2j + 1 of V are read by the same lanes.
template <bool is_v>
KV_DEVICE constexpr int row_in_block(int slot) {
  return is_v ? slot / 2 + slot % 2 * 4 : slot;
}

KV_DEVICE constexpr int power_of_two_from(int x) {
  int y = 1;
  while (y < x) {
    y *= 2;
  }
  return y;
}

// What the offsets in row `row` of 8 are combined with, so that the lanes that
// read at a time, `width` bytes of a row, find all banks free.
template <int row_bytes, int width>
KV_DEVICE uint32_t swizzle_of(int row) {
  if constexpr (row_bytes % (bank_bytes / 2) != 0 || width < copy_bytes) {
    return 0;
  } else {
    // Whole copies change places, within what divides a row.
    constexpr int step = power_of_two_from(width);
    constexpr int rows_apart = row_bytes % bank_bytes == 0 ? 1 : 2;
    constexpr int rows_same = bank_bytes / step / rows_apart;
    return rows_same > 1 ? row / rows_apart % rows_same * step : 0;
  }
}

// Copies `keys` rows of codes, of which those from `valid` on become zeros.
// place(key) says where a row lies; only rows that exist are asked for.
template <int keys, int row_bytes_, int pitch, int width, int chunk, bool is_v>
struct CodeCopy {
  static constexpr int row_bytes = row_bytes_;
  static constexpr int chunk_bytes = chunk;
  static constexpr int chunks = row_bytes / chunk;
  // Where a row is fewer copies than lanes have rows, some lanes copy nothing.
  static constexpr int least_lanes = keys < warp_size ? warp_size / keys : 1;
  static constexpr int lanes_a_row = chunks >= warp_size ? warp_size
      : chunks > least_lanes ? power_of_two_from(chunks)
                             : least_lanes;
  static constexpr int rows_at_once = warp_size / lanes_a_row;

  static KV_DEVICE uint32_t offset_of(int key, int chunk_id) {
    int row = row_in_block<is_v>(key / (keys / row_tile));
    int byte = chunk_id * chunk;
    return (block_of_key<keys>(key) * row_tile + row) * pitch +
        (byte ^ swizzle_of<row_bytes, width>(row));
  }

  // Without `valid` all rows exist.
  template <bool whole, typename RowOf>
  static KV_DEVICE void
  run(uint32_t to, int valid, int64_t column, int lane, RowOf row_of) {
    int first = lane / lanes_a_row;
#pragma unroll
    for (int i = 0; i < keys; i += rows_at_once) {
      int key = i + first;
      bool exists = whole || key < valid;
      const uint8_t* row = row_of(exists ? key : 0);
#pragma unroll
      for (int j = 0; j < chunks; j += lanes_a_row) {
        int id = j + lane % lanes_a_row;
        if (chunks % lanes_a_row == 0 || id < chunks) {
          uint32_t address = to + offset_of(key, id);
          if constexpr (whole) {
            copy_async<chunk>(address, row + id * column);
          } else {
            copy_async<chunk>(address, row + id * column, exists ? chunk : 0);
          }
        }
      }
    }
  }
};

// Copies the scales or biases of a tile, [keys, groups], row by row.
template <int keys, int row_bytes, int chunk>
struct ScaleRows {
  template <typename RowOf>
  static KV_DEVICE void run(uint32_t to, int valid, int lane, RowOf row_of) {
    constexpr int chunks = row_bytes / chunk;
#pragma unroll
    for (int i = 0; i < keys * chunks; i += warp_size) {
      int key = (i + lane) / chunks;
      int byte = (i + lane) % chunks * chunk;
      if (key < keys) {
        bool exists = key < valid;
        copy_async<chunk>(
            to + key * row_bytes + byte,
            row_of(exists ? key : 0) + byte,
            exists ? chunk : 0);
      }
    }
  }
};

// The same value by value, for any strides; this waits for memory.
template <int keys, int groups, int bytes>
struct ScaleValues {
  template <typename RowOf>
  static KV_DEVICE void
  run(uint32_t to, int valid, int64_t column, int lane, RowOf row_of) {
    for (int i = lane; i < keys * groups; i += warp_size) {
      int key = i / groups;
      uint32_t x = 0;
      if (key < valid) {
        const uint8_t* from = row_of(key) + (i % groups) * column;
        x = bytes == 4   ? *reinterpret_cast<const uint32_t*>(from)
            : bytes == 2 ? uint32_t(*reinterpret_cast<const uint16_t*>(from))
                         : uint32_t(*from);
      }
      uint32_t address = to + i * bytes;
      if constexpr (bytes == 4) {
        store_shared(address, x);
      } else if constexpr (bytes == 2) {
        store_shared_u16(address, x);
      } else {
        store_shared_u8(address, x);
      }
    }
  }
};

} // namespace mlx::core::quantized_sdpa
