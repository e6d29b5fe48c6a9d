// Which tiles of keys a block works on, and who else works on their group.

#pragma once

#include "mlx/backend/cuda/quantized_sdpa_tiles.cuh"

namespace mlx::core::quantized_sdpa {

// Part of a group: rows of one KV head over a range of tiles.
struct Segment {
  int batch;
  int kv_head;
  int row_block;
  KeyRange keys;
  // Tiles of `keys` within the whole sequence.
  int tile_begin;
  int tile_end;
  // The blocks that hold parts of the group, and this block's place in them.
  int first_block;
  int n_blocks;
  int index;
  // Which of a block's two partial results this one and the first block's are.
  int slot;
  int first_slot;
};

struct TileCount {
  KeyRange keys;
  int begin;
  int n;
};

// A group without keys counts as one tile, so that its zeros are written.
template <int tile_keys>
KV_DEVICE TileCount tiles_of(const CudaParams& p, int batch) {
  TileCount x;
  x.keys =
      kv::visible_to_any(existing_keys(p, batch), key_rule(p), 0, p.q_len - 1);
  x.begin = x.keys.begin / tile_keys;
  bool empty = x.keys.end <= x.keys.begin;
  x.n = empty ? 1 : (x.keys.end + tile_keys - 1) / tile_keys - x.begin;
  return x;
}

KV_DEVICE int groups_a_batch(const CudaParams& p) {
  return p.n_kv_heads * int(p.work.row_blocks);
}

KV_DEVICE void
set_group(const CudaParams& p, int batch, int in_batch, Segment& segment) {
  segment.batch = batch;
  segment.kv_head = in_batch / int(p.work.row_blocks);
  segment.row_block = in_batch % int(p.work.row_blocks);
}

// Every group has the same number of blocks, which share its tiles.
template <int tile_keys>
KV_DEVICE Segment segment_of_split(const CudaParams& p) {
  Segment s;
  int splits = p.work.splits;
  int group = blockIdx.x / splits;
  s.index = blockIdx.x % splits;
  set_group(p, group / groups_a_batch(p), group % groups_a_batch(p), s);
  auto tiles = tiles_of<tile_keys>(p, s.batch);
  s.keys = tiles.keys;
  s.tile_begin = tiles.begin + int(int64_t(tiles.n) * s.index / splits);
  s.tile_end = tiles.begin + int(int64_t(tiles.n) * (s.index + 1) / splits);
  s.first_block = group * splits;
  s.n_blocks = splits;
  s.slot = 0;
  s.first_slot = 0;
  return s;
}

// Every block has the same number of tiles, of one group after another.
template <int tile_keys>
class SharedTiles {
 public:
  KV_DEVICE explicit SharedTiles(const CudaParams& p) : p_(p) {
    total_ = 0;
    for (int b = 0; b < p.batch; ++b) {
      total_ += batch_tiles(b);
    }
    n_blocks_ = min(int64_t(gridDim.x), total_);
    next_ = share(blockIdx.x);
    end_ = share(blockIdx.x + 1);
    start_ = next_;
    batch_ = 0;
    batch_begin_ = 0;
  }

  KV_DEVICE bool next(Segment& s) {
    if (next_ >= end_) {
      return false;
    }
    while (next_ >= batch_begin_ + batch_tiles(batch_)) {
      batch_begin_ += batch_tiles(batch_);
      ++batch_;
    }
    auto tiles = tiles_of<tile_keys>(p_, batch_);
    int in_batch = int((next_ - batch_begin_) / tiles.n);
    int64_t group = batch_begin_ + int64_t(in_batch) * tiles.n;
    int64_t stop = min(end_, group + tiles.n);
    set_group(p_, batch_, in_batch, s);
    s.keys = tiles.keys;
    s.tile_begin = tiles.begin + int(next_ - group);
    s.tile_end = tiles.begin + int(stop - group);
    s.first_block = block_of(group);
    s.n_blocks = block_of(group + tiles.n - 1) - s.first_block + 1;
    s.index = blockIdx.x - s.first_block;
    s.slot = next_ == start_ ? 0 : 1;
    s.first_slot = group == share(s.first_block) ? 0 : 1;
    next_ = stop;
    return true;
  }

 private:
  KV_DEVICE int64_t batch_tiles(int batch) const {
    return int64_t(tiles_of<tile_keys>(p_, batch).n) * groups_a_batch(p_);
  }
  KV_DEVICE int64_t share(int block) const {
    return total_ * min(int64_t(block), n_blocks_) / n_blocks_;
  }
  KV_DEVICE int block_of(int64_t tile) const {
    return int(((tile + 1) * n_blocks_ - 1) / total_);
  }

  const CudaParams& p_;
  int64_t total_;
  // Those with tiles: a group that spans a block without any would wait for it.
  int64_t n_blocks_;
  int64_t next_;
  int64_t end_;
  int64_t start_;
  int64_t batch_begin_;
  int batch_;
};

} // namespace mlx::core::quantized_sdpa
