// Rows of the next tile on their way to the caches while this one is
// multiplied.

#pragma once

#include "mlx/backend/cpu/quantized_sdpa_keys.h"

namespace {

// Rows of a tile that are read soon.
struct Ahead {
  const TileView* view;
  int row_bytes;
};

// Fetches them a line or two at a time while others are multiplied: in bursts
// they fill the core's miss buffers, and it waits.
class Fetch {
 public:
  Fetch() = default;

  // Over `n_steps` steps; scattered rows by larger parts.
  KV_INLINE Fetch(const Ahead& ahead, int n_steps) : ahead_(ahead) {
    const TileView& view = *ahead.view;
    if (view.n > 0) {
      next_ = view.rows[0];
      int64_t bytes = int64_t(view.n - 1) * ahead.row_bytes;
      dense_ = view.rows[view.n - 1] - next_ == bytes;
      int64_t lines = (bytes + ahead.row_bytes + line - 1) / line;
      lines_ = dense_ ? int((lines + n_steps - 1) / n_steps) : 0;
    }
  }

  // What lies behind the last row may be fetched too: it is read next.
  KV_INLINE void step() {
    for (int i = 0; i < lines_; ++i) {
      __builtin_prefetch(next_);
      next_ += line;
    }
  }

  KV_INLINE void part(int i, int n_parts) const {
    int end = dense_ ? 0 : ahead_.view->n * (i + 1) / n_parts;
    for (int t = ahead_.view->n * i / n_parts; t < end; ++t) {
      prefetch(ahead_.view->rows[t], ahead_.row_bytes);
    }
  }

 private:
  static constexpr int line = 64;

  Ahead ahead_ = {};
  const uint8_t* next_ = nullptr;
  bool dense_ = false;
  int lines_ = 0;
};

} // namespace
