// Finds races in the shared memory of an emulated block, whatever the order in
// which its threads happen to run: two accesses to a byte, one of them a write,
// that no barrier orders. A thread knows of each other one up to when it has
// heard of it through barriers (a vector clock). Copies that nobody waited for,
// and tensor cores that read or are still reading, count as accesses too.

#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <vector>

namespace emulator {

[[noreturn]] inline void fail(const char* what) {
  std::fprintf(stderr, "emulated GPU: %s\n", what);
  std::abort();
}

constexpr int most_threads = 384;
constexpr int most_warps = most_threads / 32;
constexpr int memory_size = 256 << 10;
// What the tensor cores read is tracked by pieces of this size.
constexpr int piece_bytes = 16;

using Clock = std::array<uint32_t, most_threads>;

// What a thread knows of all others: up to when their accesses come before its
// own, and up to when their writes do for the tensor cores.
struct Knowledge {
  Clock seen{};
  Clock fenced{};

  void join(const Knowledge& other) {
    for (int i = 0; i < most_threads; ++i) {
      seen[i] = std::max(seen[i], other.seen[i]);
      fenced[i] = std::max(fenced[i], other.fenced[i]);
    }
  }
};
using Known = std::shared_ptr<const Knowledge>;

// The accesses of a warp at one time.
struct Access {
  uint32_t time = 0;
  uint32_t lanes = 0;
};

class RaceChecker;

// What passes through a barrier from those who arrive to those who wait.
class Passed {
 private:
  friend class RaceChecker;
  Knowledge gathered_;
  Known last_joined_;
  Known complete_;
  uint32_t time_ = 0;
  Known before_;
  Known after_;
};

class RaceChecker {
 public:
  // Nobody may count on what an earlier block left.
  void start(unsigned char* memory, int n_threads, int n_bytes) {
    memory_ = memory;
    n_bytes_ = n_bytes;
    std::memset(memory, 0xff, memory_size);
    std::memset(written_, 0xff, memory_size);
    // All that was before comes before this block.
    auto past = std::make_shared<Knowledge>();
    past->seen.fill(time_);
    past->fenced.fill(time_);
    ++time_;
    threads_.assign(n_threads, {past, time_, 0});
    atomics_.clear();
  }

  void check_address(uint32_t at, int bytes) const {
    if (at % bytes != 0) {
      fail("a misaligned access to shared memory");
    }
    if (at + bytes > uint32_t(n_bytes_)) {
      fail("an access outside of shared memory");
    }
  }

  void load(int thread, uint32_t at, int bytes, void* to) {
    check_address(at, bytes);
    if (std::memcmp(memory_ + at, written_ + at, bytes) != 0) {
      fail("shared memory was written behind the emulator's back");
    }
    for (int i = 0; i < bytes; ++i) {
      auto& byte = bytes_[at + i];
      check_writer(thread, at + i);
      auto& access = readers_[at + i][thread / 32];
      uint32_t time = threads_[thread].time;
      access.lanes = (access.time == time ? access.lanes : 0) | bit(thread);
      access.time = time;
      byte.readers |= 1u << thread / 32;
    }
    std::memcpy(to, memory_ + at, bytes);
  }

  void store(int thread, uint32_t at, int bytes, const void* from) {
    check_address(at, bytes);
    claim(thread, at, bytes);
    put(at, bytes, from);
  }

  // Atomic operations do not race with each other, and order nothing.
  template <typename T, typename F>
  T update(int thread, uint32_t at, F next) {
    check_address(at, sizeof(T));
    for (int i = 0; i < sizeof(T); ++i) {
      check_readers(thread, at + i);
      if (!bytes_[at + i].atomic) {
        check_writer(thread, at + i);
      }
      bytes_[at + i].atomic = true;
    }
    atomics_[at][thread] = threads_[thread].time;
    T before;
    std::memcpy(&before, memory_ + at, sizeof(T));
    T after = next(before);
    put(at, sizeof(T), &after);
    return before;
  }

  // The copy may come at any time before it is waited for.
  void start_copy(int thread, uint32_t at, int bytes) {
    check_address(at, bytes);
    claim(thread, at, bytes);
    for (int i = 0; i < bytes; ++i) {
      bytes_[at + i].copying = true;
    }
  }
  void end_copy(int thread, uint32_t at, int bytes, const void* from) {
    for (int i = 0; i < bytes; ++i) {
      bytes_[at + i].copying = false;
      bytes_[at + i].time = threads_[thread].time;
    }
    put(at, bytes, from);
  }

  // Tensor cores see a write that was fenced before a barrier. They may read
  // until each of the warps has waited, for which lane 0 stands.
  void start_tensor_read(const Knowledge& known, uint32_t at, int warps) {
    check_address(at, piece_bytes);
    for (int i = 0; i < piece_bytes; ++i) {
      auto& byte = bytes_[at + i];
      if (byte.copying || byte.atomic || byte.time > known.seen[byte.writer]) {
        fail("tensor cores read what no barrier has ordered");
      }
      if (byte.time > known.fenced[byte.writer]) {
        fail("tensor cores read what no proxy fence has shown them");
      }
    }
    pieces_[at / piece_bytes].reading += warps;
  }
  void end_tensor_read(int thread, uint32_t at) {
    auto& piece = pieces_[at / piece_bytes];
    --piece.reading;
    piece.readers[thread / 32] = {threads_[thread].time, bit(thread)};
    piece.warps |= 1u << thread / 32;
  }

  // What all of these threads know.
  Knowledge common(int first, int n) const {
    Knowledge common = view(first);
    for (int t = first + 1; t < first + n; ++t) {
      auto& other = *threads_[t].known;
      for (int i = 0; i < most_threads; ++i) {
        common.seen[i] = std::min(common.seen[i], other.seen[i]);
        common.fenced[i] = std::min(common.fenced[i], other.fenced[i]);
      }
    }
    return common;
  }

  // The thread's writes so far are for the tensor cores too.
  void fence(int thread) {
    threads_[thread].fenced = threads_[thread].time;
    threads_[thread].time = ++time_;
  }

  void arrive(int thread, Passed& at) {
    auto& t = threads_[thread];
    // Most have met before and know the same.
    if (t.known != at.last_joined_) {
      at.gathered_.join(*t.known);
      at.last_joined_ = t.known;
    }
    at.gathered_.seen[thread] = t.time;
    at.gathered_.fenced[thread] =
        std::max(at.gathered_.fenced[thread], t.fenced);
    t.time = ++time_;
  }
  // All that are awaited have arrived.
  void complete(Passed& at) {
    at.complete_ = std::make_shared<const Knowledge>(at.gathered_);
    at.gathered_ = {};
    at.last_joined_ = nullptr;
    at.time_ = ++time_;
    at.before_ = nullptr;
  }
  // For those who arrived, and have done nothing since.
  void pass(int thread, const Passed& at) {
    threads_[thread].known = at.complete_;
    threads_[thread].time = at.time_;
  }
  // For those who only waited.
  void learn(int thread, Passed& at) {
    if (!at.complete_) {
      return;
    }
    auto& known = threads_[thread].known;
    if (at.before_ != known) {
      auto after = std::make_shared<Knowledge>(*known);
      after->join(*at.complete_);
      at.before_ = known;
      at.after_ = std::move(after);
    }
    known = at.after_;
  }

  // Whether all others' accesses up to these times come before the thread's.
  bool knows(int thread, const Clock& times) const {
    auto& seen = threads_[thread].known->seen;
    for (int i = 0; i < threads_.size(); ++i) {
      if (i != thread && times[i] > seen[i]) {
        return false;
      }
    }
    return true;
  }
  uint32_t time_of(int thread) const {
    return threads_[thread].time;
  }

 private:
  struct Byte {
    uint32_t time = 0;
    uint16_t writer = 0;
    uint16_t readers = 0;
    bool copying = false;
    bool atomic = false;
  };
  struct Piece {
    int reading = 0;
    uint32_t warps = 0;
    Access readers[most_warps];
  };
  struct Thread {
    Known known;
    uint32_t time;
    uint32_t fenced;
  };

  static uint32_t bit(int thread) {
    return 1u << thread % 32;
  }

  Knowledge view(int thread) const {
    auto& t = threads_[thread];
    Knowledge all = *t.known;
    all.seen[thread] = t.time;
    all.fenced[thread] = std::max(all.fenced[thread], t.fenced);
    return all;
  }

  void put(uint32_t at, int bytes, const void* from) {
    std::memcpy(memory_ + at, from, bytes);
    std::memcpy(written_ + at, from, bytes);
  }

  bool comes_before(int warp, const Access& access, int thread) const {
    auto& seen = threads_[thread].known->seen;
    for (uint32_t left = access.lanes; left != 0; left &= left - 1) {
      int other = warp * 32 + __builtin_ctz(left);
      if (other != thread && access.time > seen[other]) {
        return false;
      }
    }
    return true;
  }

  void check_writer(int thread, uint32_t at) {
    auto& byte = bytes_[at];
    if (byte.copying) {
      fail_at(
          at, thread, "shared memory is used before its copy was waited for");
    }
    if (byte.writer != thread &&
        byte.time > threads_[thread].known->seen[byte.writer]) {
      fail_at(at, thread, "a race in shared memory: no barrier after a write");
    }
    if (byte.atomic && !knows(thread, atomics_[at / 4 * 4])) {
      fail_at(
          at,
          thread,
          "a race in shared memory: no barrier after an atomic operation");
    }
  }

  void check_readers(int thread, uint32_t at) {
    auto& byte = bytes_[at];
    for (uint32_t left = byte.readers; left != 0; left &= left - 1) {
      int warp = __builtin_ctz(left);
      if (!comes_before(warp, readers_[at][warp], thread)) {
        fail_at(
            at,
            thread,
            "a race in shared memory: no barrier between a read and a write");
      }
    }
  }

  // The byte is counted from the begin of dynamic shared memory.
  [[noreturn]] void fail_at(uint32_t at, int thread, const char* what) {
    std::fprintf(stderr, "byte %u, thread %d: ", at, thread);
    fail(what);
  }

  // Before a write.
  void claim(int thread, uint32_t at, int bytes) {
    for (int i = 0; i < bytes; ++i) {
      check_writer(thread, at + i);
      check_readers(thread, at + i);
      bytes_[at + i] = {threads_[thread].time, uint16_t(thread)};
    }
    for (uint32_t p = at / piece_bytes; p <= (at + bytes - 1) / piece_bytes;
         ++p) {
      if (pieces_[p].reading > 0) {
        fail("a write to what tensor cores are still reading");
      }
      for (uint32_t left = pieces_[p].warps; left != 0; left &= left - 1) {
        int warp = __builtin_ctz(left);
        if (!comes_before(warp, pieces_[p].readers[warp], thread)) {
          fail("a write to what tensor cores may still be reading");
        }
      }
    }
  }

  unsigned char* memory_ = nullptr;
  int n_bytes_ = 0;
  uint32_t time_ = 0;
  std::vector<Thread> threads_;
  std::map<uint32_t, Clock> atomics_;
  unsigned char written_[memory_size];
  Byte bytes_[memory_size];
  Access readers_[memory_size][most_warps];
  Piece pieces_[memory_size / piece_bytes];
};

inline RaceChecker checker;

} // namespace emulator
