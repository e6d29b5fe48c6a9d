// Finds races, accesses out of bounds and reads of what was never written, and
// counts bytes. Kernels are compiled with -fsanitize=thread, and this file
// stands in for that sanitizer's runtime: it knows which thread runs and which
// barriers it passed. A race is found in every schedule that executes its two
// accesses.

#include <dlfcn.h>
#include <link.h>
#include <stdio.h>
#include <string.h>

#include <map>
#include <set>
#include <string>
#include <tuple>
#include <unordered_map>
#include <unordered_set>
#include <vector>

#include "executor.h"

namespace msl {

namespace {

constexpr uint16_t no_thread = 0xffff;
constexpr size_t near = 4096;

enum Space { in_device, in_threadgroup };
enum Readers : uint8_t { one_thread, one_simdgroup, several_simdgroups };

// The last accesses of a byte. Epochs count the barriers that order memory.
struct Shadow {
  uint32_t write_epoch = 0;
  uint32_t write_simd_epoch = 0;
  uint32_t read_epoch = 0;
  uint32_t read_simd_epoch = 0;
  uint32_t write_group = 0;
  uint32_t read_group = 0;
  uint16_t writer = no_thread;
  uint16_t reader = no_thread;
  Readers readers = one_thread;
};

struct Region {
  char* data;
  size_t bytes;
  Space space;
  // The buffer's index, or the number of the threadgroup array.
  int id;
  bool writable;
  uint8_t* written;
  std::vector<Shadow> shadow;
  std::vector<uint8_t> own_written;
  std::vector<uint8_t> loaded;
};

struct Access {
  char* address;
  size_t bytes;
  bool writes;
  bool atomic;
  void* pc;
};

struct Detector {
  std::vector<Region> buffers;
  std::vector<Region> arrays;
  uint32_t group = 0;
  uint32_t epoch[2] = {};
  uint32_t simd_epoch[2][max_threads / lanes] = {};
  std::set<std::pair<void*, std::string>> seen;
  bool count_loads = false;
  // How often each lane came by an instruction since its simdgroup last met,
  // and which addresses that visit of the instruction has loaded.
  std::unordered_map<void*, uint32_t> visits[max_threads];
  std::map<std::tuple<void*, uint32_t>, std::unordered_set<char*>>
      loads[max_threads / lanes];
};
Detector state;

void report(const char* kind, const Access& access, const std::string& where) {
  if (!state.seen.insert({access.pc, kind}).second) {
    return;
  }
  auto* index = current_index();
  Dl_info info = {};
  dladdr(access.pc, &info);
  auto* group = index->threadgroup_position_in_grid;
  complain(
      "%s: %s of %zu bytes of %s by thread %u of group (%u, %u, %u) at "
      "[[%s+0x%lx]]",
      kind,
      access.writes ? "write" : "read",
      access.bytes,
      where.c_str(),
      index->thread_index_in_threadgroup,
      group[0],
      group[1],
      group[2],
      info.dli_fname ? info.dli_fname : "?",
      long((char*)access.pc - (char*)info.dli_fbase) - 1);
}

std::string place(const Region& region, const Access& access) {
  char text[128];
  snprintf(
      text,
      sizeof(text),
      "%s %d (%zu bytes), byte %ld",
      region.space == in_device ? "buffer" : "threadgroup array",
      region.id,
      region.bytes,
      long(access.address - region.data));
  return text;
}

// Whether a barrier stands between an access of another thread and now.
bool ordered(
    Space space,
    uint32_t thread,
    uint32_t other,
    uint32_t epoch,
    uint32_t simd_epoch) {
  uint32_t simdgroup = thread / lanes;
  return thread == other || epoch != state.epoch[space] ||
      (other / lanes == simdgroup &&
       simd_epoch != state.simd_epoch[space][simdgroup]);
}

bool read_before_unordered(const Shadow& s, Space space, uint32_t thread) {
  if (s.reader == no_thread || s.read_epoch != state.epoch[space]) {
    return false;
  }
  switch (s.readers) {
    case one_thread:
      return !ordered(space, thread, s.reader, s.read_epoch, s.read_simd_epoch);
    case one_simdgroup:
      return s.reader / lanes != thread / lanes ||
          s.read_simd_epoch == state.simd_epoch[space][thread / lanes];
    default:
      return true;
  }
}

void note_read(Shadow& s, Space space, uint32_t thread) {
  uint32_t simd_epoch = state.simd_epoch[space][thread / lanes];
  bool fresh = s.reader == no_thread || s.read_epoch != state.epoch[space] ||
      s.read_group != state.group;
  if (fresh) {
    s.readers = one_thread;
  } else if (s.reader / lanes != thread / lanes) {
    s.readers = several_simdgroups;
  } else if (s.readers != several_simdgroups) {
    bool same_step = s.read_simd_epoch == simd_epoch;
    s.readers = same_step && (s.readers == one_simdgroup || s.reader != thread)
        ? one_simdgroup
        : one_thread;
  }
  s.reader = thread;
  s.read_epoch = state.epoch[space];
  s.read_simd_epoch = simd_epoch;
  s.read_group = state.group;
}

void note_write(Shadow& s, Space space, uint32_t thread) {
  s.writer = thread;
  s.write_epoch = state.epoch[space];
  s.write_simd_epoch = state.simd_epoch[space][thread / lanes];
  s.write_group = state.group;
}

// Why the access of a byte is wrong; null where it is not.
const char* check_byte(Region& region, size_t i, const Access& access) {
  Shadow& s = region.shadow[i];
  uint32_t thread = current_index()->thread_index_in_threadgroup;
  if (!access.atomic) {
    bool written = s.writer != no_thread;
    if (written && s.write_group != state.group) {
      return "RACE BETWEEN GROUPS";
    }
    if (access.writes && s.reader != no_thread && s.read_group != state.group) {
      return "RACE BETWEEN GROUPS";
    }
    if (written &&
        !ordered(
            region.space,
            thread,
            s.writer,
            s.write_epoch,
            s.write_simd_epoch)) {
      return "RACE";
    }
    if (access.writes && read_before_unordered(s, region.space, thread)) {
      return "RACE";
    }
  }
  if (!access.writes && region.written && !region.written[i]) {
    return "UNINITIALISED";
  }
  if (access.writes) {
    if (region.written) {
      region.written[i] = 1;
    }
    if (!access.atomic) {
      note_write(s, region.space, thread);
    }
  } else if (!access.atomic) {
    note_read(s, region.space, thread);
  }
  return nullptr;
}

void check_region(Region& region, const Access& access) {
  if (access.address < region.data ||
      access.address + access.bytes > region.data + region.bytes) {
    report("OUT OF BOUNDS", access, place(region, access));
    return;
  }
  if (!region.writable && access.writes) {
    report("WRITE TO READ-ONLY", access, place(region, access));
    return;
  }
  if (!region.writable && !region.written) {
    return;
  }
  size_t first = access.address - region.data;
  for (size_t i = first; i < first + access.bytes; i++) {
    const char* kind = region.writable ? check_byte(region, i, access)
        : region.written[i]            ? nullptr
                                       : "UNINITIALISED";
    if (kind) {
      report(kind, access, place(region, access));
      return;
    }
  }
}

void count_load(Region& region, const Access& access) {
  auto& c = counts.buffers[region.id];
  c.lane_loads++;
  c.lane_load_bytes += access.bytes;
  int width = 0;
  while (width < 4 && (1u << width) < access.bytes) {
    width++;
  }
  c.loads_by_width[width]++;
  if (!state.count_loads) {
    return;
  }
  auto* index = current_index();
  uint32_t visit =
      state.visits[index->thread_index_in_threadgroup][access.pc]++;
  auto& loads = state.loads[index->simdgroup_index_in_threadgroup];
  if (loads[{access.pc, visit}].insert(access.address).second) {
    c.simdgroup_load_bytes += access.bytes;
  }
  if (region.loaded.empty()) {
    region.loaded.resize(region.bytes);
  }
  size_t first = access.address - region.data;
  for (size_t i = first; i < first + access.bytes && i < region.bytes; i++) {
    c.distinct_load_bytes += !region.loaded[i];
    region.loaded[i] = 1;
  }
}

void count(Region& region, const Access& access) {
  if (region.space == in_threadgroup) {
    if (access.writes) {
      counts.threadgroup_stores++;
      counts.threadgroup_store_bytes += access.bytes;
    } else {
      counts.threadgroup_loads++;
      counts.threadgroup_load_bytes += access.bytes;
    }
  } else if (access.writes) {
    auto& c = counts.buffers[region.id];
    c.lane_stores++;
    c.lane_store_bytes += access.bytes;
  } else if (
      access.address >= region.data &&
      access.address + access.bytes <= region.data + region.bytes) {
    count_load(region, access);
  }
}

// Tables and function constants of the kernel's own library.
bool in_library(const char* address) {
  Dl_info info;
  return dladdr(address, &info) && info.dli_fname;
}

Region* find(std::vector<Region>& regions, const char* address, size_t margin) {
  for (auto& region : regions) {
    if (address + margin >= region.data &&
        address < region.data + region.bytes + margin) {
      return &region;
    }
  }
  return nullptr;
}

void check(const Access& access) {
  if (!current_index() || on_current_stack(access.address)) {
    return;
  }
  auto* region = find(state.buffers, access.address, 0);
  if (!region) {
    region = find(state.arrays, access.address, 0);
  }
  if (!region && in_library(access.address)) {
    return;
  }
  // A red zone lies around each threadgroup array.
  if (!region) {
    region = find(state.arrays, access.address, 32);
  }
  if (!region) {
    region = find(state.buffers, access.address, near);
  }
  if (!region) {
    report("OUT OF BOUNDS", access, "no buffer");
    return;
  }
  count(*region, access);
  check_region(*region, access);
}

} // namespace

namespace detector {

void begin_launch(const Launch& launch) {
  state.buffers.clear();
  state.arrays.clear();
  state.seen.clear();
  state.group = 0;
  state.count_loads = launch.count_loads;
  for (int i = 0; i < max_buffers; i++) {
    auto& buffer = launch.buffers[i];
    if (!buffer.data) {
      continue;
    }
    state.buffers.push_back(
        {static_cast<char*>(buffer.begin),
         buffer.bytes,
         in_device,
         i,
         buffer.writable != 0,
         buffer.written,
         std::vector<Shadow>(buffer.writable ? buffer.bytes : 0),
         {},
         {}});
  }
}

void begin_group() {
  state.group++;
  state.arrays.clear();
  for (auto& epoch : state.epoch) {
    epoch++;
  }
}

// Memory that the kernel declares: of it nothing is written yet.
void begin_threadgroup_memory(char* data, size_t bytes, int key) {
  state.arrays.push_back(
      {data,
       bytes,
       in_threadgroup,
       key,
       true,
       nullptr,
       std::vector<Shadow>(bytes),
       std::vector<uint8_t>(bytes),
       {}});
  for (auto& region : state.arrays) {
    region.written = region.own_written.data();
  }
}

void threadgroup_barrier(int flags) {
  state.epoch[in_device] += (flags & mem_device) != 0;
  state.epoch[in_threadgroup] += (flags & mem_threadgroup) != 0;
}

void simdgroup_barrier(int simdgroup, int flags) {
  state.simd_epoch[in_device][simdgroup] += (flags & mem_device) != 0;
  state.simd_epoch[in_threadgroup][simdgroup] += (flags & mem_threadgroup) != 0;
}

void simdgroup_step(int simdgroup) {
  if (state.count_loads) {
    state.loads[simdgroup].clear();
    for (int i = 0; i < lanes; i++) {
      state.visits[simdgroup * lanes + i].clear();
    }
  }
}

void end_launch() {
  for (int i = 0; i < max_threads / lanes; i++) {
    simdgroup_step(i);
  }
}

void atomic_access(const void* address, size_t bytes, bool writes, void* pc) {
  check({(char*)address, bytes, writes, true, pc});
}

} // namespace detector

} // namespace msl

// ---------------------------------------------------------------------------
// The calls that -fsanitize=thread puts before each load and store
// ---------------------------------------------------------------------------

#define PC __builtin_return_address(0)
#define ACCESSES(bytes)                              \
  void __tsan_read##bytes(void* p) {                 \
    msl::check({(char*)p, bytes, false, false, PC}); \
  }                                                  \
  void __tsan_write##bytes(void* p) {                \
    msl::check({(char*)p, bytes, true, false, PC});  \
  }                                                  \
  void __tsan_unaligned_read##bytes(void* p) {       \
    msl::check({(char*)p, bytes, false, false, PC}); \
  }                                                  \
  void __tsan_unaligned_write##bytes(void* p) {      \
    msl::check({(char*)p, bytes, true, false, PC});  \
  }                                                  \
  void __tsan_read_write##bytes(void* p) {           \
    msl::check({(char*)p, bytes, false, false, PC}); \
    msl::check({(char*)p, bytes, true, false, PC});  \
  }                                                  \
  void __tsan_unaligned_read_write##bytes(void* p) { \
    msl::check({(char*)p, bytes, false, false, PC}); \
    msl::check({(char*)p, bytes, true, false, PC});  \
  }

extern "C" {
ACCESSES(1)
ACCESSES(2)
ACCESSES(4)
ACCESSES(8)
ACCESSES(16)

void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}

void* __tsan_memcpy(void* to, const void* from, size_t bytes) {
  msl::check({(char*)from, bytes, false, false, PC});
  msl::check({(char*)to, bytes, true, false, PC});
  return memcpy(to, from, bytes);
}
void* __tsan_memmove(void* to, const void* from, size_t bytes) {
  msl::check({(char*)from, bytes, false, false, PC});
  msl::check({(char*)to, bytes, true, false, PC});
  return memmove(to, from, bytes);
}
void* __tsan_memset(void* to, int value, size_t bytes) {
  msl::check({(char*)to, bytes, true, false, PC});
  return memset(to, value, bytes);
}
}
