// Runs Metal kernels on the CPU: what kernels, the host side and the detector
// of races share. A fiber a thread, 32 lanes meet at each operation of a
// simdgroup.

#pragma once

#include <stddef.h>
#include <stdint.h>

namespace msl {

constexpr int lanes = 32;
constexpr int max_buffers = 31;
constexpr int max_threads = 1024;
constexpr size_t max_threadgroup_bytes = 32768;

// Kept in step with include/msl.h.
enum Op {
  op_sum,
  op_product,
  op_min,
  op_max,
  op_and,
  op_or,
  op_xor,
  op_prefix_inclusive_sum,
  op_prefix_exclusive_sum,
  op_prefix_inclusive_product,
  op_prefix_exclusive_product,
  op_shuffle,
  op_shuffle_xor,
  op_shuffle_down,
  op_shuffle_up,
  op_rotate_down,
  op_rotate_up,
  op_fill_down,
  op_fill_up,
  op_ballot,
  op_converge,
  op_mma,
  op_simdgroup_barrier,
};

enum Type {
  type_i8,
  type_u8,
  type_i16,
  type_u16,
  type_i32,
  type_u32,
  type_i64,
  type_u64,
  type_f16,
  type_bf16,
  type_f32,
};

enum AtomicOp {
  atomic_load,
  atomic_store,
  atomic_exchange,
  atomic_compare_exchange,
  atomic_add,
  atomic_sub,
  atomic_min,
  atomic_max,
  atomic_and,
  atomic_or,
  atomic_xor,
};

// mem_flags of MSL.
constexpr int mem_device = 1;
constexpr int mem_threadgroup = 2;

// The attributes of a thread, by their names in MSL.
struct Index {
  uint32_t thread_position_in_grid[4];
  uint32_t thread_position_in_threadgroup[4];
  uint32_t threadgroup_position_in_grid[4];
  uint32_t threads_per_threadgroup[4];
  uint32_t threadgroups_per_grid[4];
  uint32_t threads_per_grid[4];
  uint32_t thread_index_in_simdgroup;
  uint32_t simdgroup_index_in_threadgroup;
  uint32_t thread_index_in_threadgroup;
  uint32_t simdgroups_per_threadgroup;
  uint32_t threads_per_simdgroup;
  uint32_t thread_index_in_quadgroup;
  uint32_t quadgroup_index_in_threadgroup;
};

using Entry = void (*)(void* const* buffers, const Index* index);

struct Buffer {
  // What the kernel is given.
  void* data;
  // The memory that it may touch.
  void* begin;
  size_t bytes;
  // One byte for each: whether it holds a value. Null: all do.
  uint8_t* written;
  int32_t writable;
};

struct Launch {
  Entry entry;
  Buffer buffers[max_buffers];
  uint32_t groups[3];
  uint32_t threads[3];
  uint32_t threadgroup_bytes[max_buffers];
  // 0: threads in order, groups in order; else a random schedule.
  uint32_t seed;
  // In which order simd_sum and MMA add: 0 tree, 1 sequential, 2 random.
  uint32_t order;
  // Denormal floats count as zero, as in the libraries that MLX builds.
  uint32_t flush_denormals;
  // For kernels compiled for the detector.
  uint32_t count_loads;
};

struct BufferCounts {
  uint64_t lane_loads;
  uint64_t lane_load_bytes;
  // Each address once for the 32 lanes of a load.
  uint64_t simdgroup_load_bytes;
  // Each byte once for the launch.
  uint64_t distinct_load_bytes;
  uint64_t lane_stores;
  uint64_t lane_store_bytes;
  // Loads of 1, 2, 4, 8 and 16 bytes.
  uint64_t loads_by_width[5];
};

struct Counts {
  uint64_t simd_ops;
  uint64_t mma;
  uint64_t threadgroup_barriers;
  uint64_t simdgroup_barriers;
  uint64_t threadgroup_bytes;
  uint64_t threadgroup_loads;
  uint64_t threadgroup_stores;
  uint64_t threadgroup_load_bytes;
  uint64_t threadgroup_store_bytes;
  BufferCounts buffers[max_buffers];
};

extern Counts counts;

// The thread that runs now; null between threads.
const Index* current_index();
bool on_current_stack(const void* address);
// Adds a line to the report of the launch.
void complain(const char* format, ...) __attribute__((format(printf, 1, 2)));

// Only kernels compiled for it call the detector; the rest costs them nothing.
namespace detector {
void begin_launch(const Launch& launch);
void begin_group();
void begin_threadgroup_memory(char* data, size_t bytes, int key);
void threadgroup_barrier(int flags);
void simdgroup_barrier(int simdgroup, int flags);
void simdgroup_step(int simdgroup);
void end_launch();
void atomic_access(const void* address, size_t bytes, bool writes, void* pc);
} // namespace detector

} // namespace msl

extern "C" {
// The number of errors; msl_report has them in words.
int msl_launch(const msl::Launch* launch);
const char* msl_report();
const msl::Counts* msl_counts();
}
