// Which keys exist and which of them a query sees, one rule for every backend.

#pragma once

#include "mlx/backend/common/kv_codec.h"

namespace mlx {
namespace core {
namespace kv {

struct KeyRange {
  int begin;
  int end;
};

// What a causal mask needs to know; without one all queries see all keys.
struct KeyRule {
  bool causal;
  // Query positions; the last one is that of the last key.
  int q_len;
  // Keys that a query sees, its own among them; 0: no limit.
  int window_size;
};

KV_FN int clamp_index(int x, int low, int high) {
  return x < low ? low : x > high ? high : x;
}

// The keys of a sequence. What callers pass is clamped, so that no read leaves
// the cache.
KV_FN KeyRange existing_keys(int kv_len, int left_padding, int length) {
  KeyRange keys;
  keys.end = clamp_index(length, 0, kv_len);
  keys.begin = clamp_index(left_padding, 0, keys.end);
  return keys;
}

// An entry of a block table, where `n_blocks` exist.
KV_FN int existing_block(int id, int n_blocks) {
  return clamp_index(id, 0, n_blocks - 1);
}

KV_FN KeyRange visible_keys(KeyRange existing, KeyRule rule, int position) {
  KeyRange keys = existing;
  if (rule.causal) {
    int own = existing.end - rule.q_len + position;
    keys.end = own + 1;
    if (rule.window_size > 0 && own - keys.begin >= rule.window_size) {
      keys.begin = own + 1 - rule.window_size;
    }
    keys.end = keys.end > keys.begin ? keys.end : keys.begin;
  }
  return keys;
}

// What at least one of the positions first to last sees.
KV_FN KeyRange
visible_to_any(KeyRange existing, KeyRule rule, int first, int last) {
  KeyRange keys;
  keys.begin = visible_keys(existing, rule, first).begin;
  keys.end = visible_keys(existing, rule, last).end;
  return keys;
}

// What all of them see; without such keys the end may be before the beginning.
KV_FN KeyRange
visible_to_all(KeyRange existing, KeyRule rule, int first, int last) {
  KeyRange keys;
  keys.begin = visible_keys(existing, rule, last).begin;
  keys.end = visible_keys(existing, rule, first).end;
  return keys;
}

} // namespace kv
} // namespace core
} // namespace mlx
