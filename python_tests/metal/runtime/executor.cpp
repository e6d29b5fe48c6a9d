#include "executor.h"

#include <dlfcn.h>
#include <emmintrin.h>
#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include <algorithm>
#include <random>
#include <string>
#include <vector>

// AddressSanitizer's own fibers, where it is loaded.
extern "C" {
void __sanitizer_start_switch_fiber(void**, const void*, size_t)
    __attribute__((weak));
void __sanitizer_finish_switch_fiber(void*, const void**, size_t*)
    __attribute__((weak));
void __asan_poison_memory_region(const volatile void*, size_t)
    __attribute__((weak));
void __asan_unpoison_memory_region(const volatile void*, size_t)
    __attribute__((weak));
void msl_switch_stack(void** save, void* to);
}

asm(R"(
.text
.globl msl_switch_stack
.type msl_switch_stack,@function
msl_switch_stack:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size msl_switch_stack, .-msl_switch_stack
)");

namespace msl {

Counts counts;

namespace {

using float2 = float __attribute__((ext_vector_type(2)));

constexpr size_t stack_bytes = 512 << 10;
constexpr size_t arena_bytes = 1 << 20;
constexpr size_t red_zone = 64;
// What undefined lanes hold: a NaN in every float type, a huge index.
constexpr uint64_t undefined_value = 0x7fed7fed7fed7fed;

enum class State { running, at_simd_op, at_barrier, done };

struct Fiber {
  void* stack_pointer = nullptr;
  char* stack = nullptr;
  void* asan_stack = nullptr;
  State state = State::done;
  Index index = {};
  // What the thread waits for.
  int op = 0;
  int type = 0;
  int width = 0;
  int argument = 0;
  void* site = nullptr;
  uint64_t x = 0;
  uint64_t fill = 0;
  uint64_t result = 0;
  float2 a = 0, b = 0, c = 0, d = 0;
};

struct ThreadgroupArray {
  int key;
  size_t bytes;
  char* data;
};

struct Machine {
  std::vector<Fiber> fibers;
  Fiber* current = nullptr;
  void* stack_pointer = nullptr;
  void* asan_stack = nullptr;
  const void* asan_bottom = nullptr;
  size_t asan_size = 0;
  const Launch* launch = nullptr;
  void* buffers[max_buffers] = {};
  char* arena = nullptr;
  size_t arena_used = 0;
  size_t threadgroup_bytes = 0;
  std::vector<ThreadgroupArray> arrays;
  std::mt19937 random;
  std::string report;
  int errors = 0;
};
Machine machine;

void* poisoned(void* data, size_t bytes, bool poison) {
  auto* f =
      poison ? __asan_poison_memory_region : __asan_unpoison_memory_region;
  if (f) {
    f(data, bytes);
  }
  return data;
}

void to_scheduler() {
  Fiber* fiber = machine.current;
  if (__sanitizer_start_switch_fiber) {
    __sanitizer_start_switch_fiber(
        fiber->state == State::done ? nullptr : &fiber->asan_stack,
        machine.asan_bottom,
        machine.asan_size);
  }
  msl_switch_stack(&fiber->stack_pointer, machine.stack_pointer);
  if (__sanitizer_finish_switch_fiber) {
    __sanitizer_finish_switch_fiber(
        fiber->asan_stack, &machine.asan_bottom, &machine.asan_size);
  }
}

void fiber_main() {
  if (__sanitizer_finish_switch_fiber) {
    __sanitizer_finish_switch_fiber(
        nullptr, &machine.asan_bottom, &machine.asan_size);
  }
  machine.launch->entry(machine.buffers, &machine.current->index);
  machine.current->state = State::done;
  to_scheduler();
  abort();
}

void resume(Fiber& fiber) {
  machine.current = &fiber;
  if (__sanitizer_start_switch_fiber) {
    __sanitizer_start_switch_fiber(
        &machine.asan_stack, fiber.stack, stack_bytes);
  }
  msl_switch_stack(&machine.stack_pointer, fiber.stack_pointer);
  if (__sanitizer_finish_switch_fiber) {
    __sanitizer_finish_switch_fiber(machine.asan_stack, nullptr, nullptr);
  }
  machine.current = nullptr;
}

uint64_t wait(State state, int op, void* site) {
  Fiber& fiber = *machine.current;
  fiber.op = op;
  fiber.site = site;
  fiber.state = state;
  to_scheduler();
  return fiber.result;
}

// ---------------------------------------------------------------------------
// Operations of a simdgroup
// ---------------------------------------------------------------------------

int type_bytes(int type) {
  return type == type_f32 ? 4 : type >= type_f16 ? 2 : 1 << (type / 2);
}

template <typename T>
T from_bits(uint64_t bits) {
  T x;
  memcpy(&x, &bits, sizeof(T));
  return x;
}

template <typename T>
uint64_t to_bits(T x) {
  uint64_t bits = 0;
  memcpy(&bits, &x, sizeof(T));
  return bits;
}

template <typename F>
void dispatch_type(int type, F&& f) {
  switch (type) {
    case type_i8:
      return f(int8_t());
    case type_u8:
      return f(uint8_t());
    case type_i16:
      return f(int16_t());
    case type_u16:
      return f(uint16_t());
    case type_i32:
      return f(int32_t());
    case type_u32:
      return f(uint32_t());
    case type_i64:
      return f(int64_t());
    case type_u64:
      return f(uint64_t());
    case type_f16:
      return f(_Float16());
    case type_bf16:
      return f(__bf16());
    case type_f32:
      return f(float());
    default:
      complain("no type %d", type);
  }
}

template <typename T>
T combine(int op, T a, T b) {
  constexpr bool is_float = std::is_floating_point_v<T> ||
      std::is_same_v<T, _Float16> || std::is_same_v<T, __bf16>;
  switch (op) {
    case op_sum:
    case op_prefix_inclusive_sum:
    case op_prefix_exclusive_sum:
      if constexpr (is_float) {
        return a + b;
      } else {
        return T(uint64_t(a) + uint64_t(b));
      }
    case op_product:
    case op_prefix_inclusive_product:
    case op_prefix_exclusive_product:
      if constexpr (is_float) {
        return a * b;
      } else {
        return T(uint64_t(a) * uint64_t(b));
      }
    // A NaN gives way, as in MSL.
    case op_min:
      return b < a || a != a ? b : a;
    case op_max:
      return b > a || a != a ? b : a;
    default:
      break;
  }
  if constexpr (!is_float) {
    return op == op_and ? a & b : op == op_or ? a | b : a ^ b;
  }
  complain("a bit operation on floats");
  return a;
}

template <typename T>
T reduce(int op, T* values, int n) {
  if (machine.launch->order == 0) {
    for (int step = n / 2; step > 0; step /= 2) {
      for (int i = 0; i < step; i++) {
        values[i] = combine(op, values[i], values[i + step]);
      }
    }
    return values[0];
  }
  if (machine.launch->order == 2) {
    std::shuffle(values, values + n, machine.random);
  }
  for (int i = 1; i < n; i++) {
    values[0] = combine(op, values[0], values[i]);
  }
  return values[0];
}

template <typename T>
void reduce_lanes(Fiber* fibers, int op, int width) {
  for (int first = 0; first < lanes; first += width) {
    T values[lanes];
    for (int i = 0; i < width; i++) {
      values[i] = from_bits<T>(fibers[first + i].x);
    }
    uint64_t result = to_bits(reduce(op, values, width));
    for (int i = 0; i < width; i++) {
      fibers[first + i].result = result;
    }
  }
}

template <typename T>
void scan_lanes(Fiber* fibers, int op, int width) {
  bool product =
      op == op_prefix_inclusive_product || op == op_prefix_exclusive_product;
  bool inclusive =
      op == op_prefix_inclusive_sum || op == op_prefix_inclusive_product;
  for (int first = 0; first < lanes; first += width) {
    T before = product ? T(1) : T(0);
    for (int i = first; i < first + width; i++) {
      T after = combine(op, before, from_bits<T>(fibers[i].x));
      fibers[i].result = to_bits(inclusive ? after : before);
      before = after;
    }
  }
}

// The lane that lane i of the group takes from; outside, the value is not
// defined by MSL.
int source_lane(int op, int i, int n, int width) {
  switch (op) {
    case op_shuffle:
      return n;
    case op_shuffle_xor:
      return i ^ n;
    case op_shuffle_down:
    case op_fill_down:
      return i + n;
    case op_shuffle_up:
    case op_fill_up:
      return i - n;
    case op_rotate_down:
      return (i + n) % width;
    default:
      return (i + width - n % width) % width;
  }
}

void shuffle_lanes(Fiber* fibers, int op, int width) {
  for (int lane = 0; lane < lanes; lane++) {
    Fiber& fiber = fibers[lane];
    int source = source_lane(op, lane % width, fiber.argument, width);
    bool inside = source >= 0 && source < width;
    bool fills = op == op_fill_down || op == op_fill_up;
    fiber.result = inside ? fibers[lane - lane % width + source].x
        : fills ? fibers[lane - lane % width + (source + width) % width].fill
                : undefined_value;
  }
}

void ballot_lanes(Fiber* fibers) {
  uint64_t votes = 0;
  for (int lane = 0; lane < lanes; lane++) {
    votes |= uint64_t(fibers[lane].x & 1) << lane;
  }
  for (int lane = 0; lane < lanes; lane++) {
    fibers[lane].result = votes;
  }
}

float mma_element(const float* a, const float* b, float c) {
  float sum = c;
  switch (machine.launch->order) {
    case 0:
      for (int k = 0; k < 8; k++) {
        sum = fmaf(a[k], b[8 * k], sum);
      }
      return sum;
    case 1:
      for (int k = 7; k >= 0; k--) {
        sum = fmaf(a[k], b[8 * k], sum);
      }
      return sum;
    default:
      sum = 0;
      for (int k = 0; k < 8; k += 2) {
        sum += a[k] * b[8 * k] + a[k + 1] * b[8 * k + 8];
      }
      return sum + c;
  }
}

void multiply_matrices(Fiber* fibers) {
  float a[64], b[64];
  int place[lanes];
  for (int lane = 0; lane < lanes; lane++) {
    int row = ((lane / 4) & 4) + (lane / 2) % 4;
    int column = ((lane / 4) & 2) * 2 + (lane % 2) * 2;
    place[lane] = row * 8 + column;
    for (int j = 0; j < 2; j++) {
      a[place[lane] + j] = fibers[lane].a[j];
      b[place[lane] + j] = fibers[lane].b[j];
    }
  }
  for (int lane = 0; lane < lanes; lane++) {
    for (int j = 0; j < 2; j++) {
      int row = place[lane] / 8;
      int column = place[lane] % 8 + j;
      fibers[lane].d[j] =
          mma_element(a + 8 * row, b + column, fibers[lane].c[j]);
    }
  }
}

void complete(Fiber* fibers) {
  int op = fibers[0].op;
  if (op == op_simdgroup_barrier) {
    counts.simdgroup_barriers++;
    detector::simdgroup_barrier(
        fibers[0].index.simdgroup_index_in_threadgroup, fibers[0].argument);
  } else if (op == op_mma) {
    counts.mma++;
    multiply_matrices(fibers);
  } else if (op != op_converge) {
    counts.simd_ops++;
    int width = fibers[0].width;
    dispatch_type(fibers[0].type, [&](auto x) {
      using T = decltype(x);
      if (op <= op_xor) {
        reduce_lanes<T>(fibers, op, width);
      } else if (op <= op_prefix_exclusive_product) {
        scan_lanes<T>(fibers, op, width);
      } else if (op <= op_fill_up) {
        shuffle_lanes(fibers, op, width);
      } else {
        ballot_lanes(fibers);
      }
    });
  }
  detector::simdgroup_step(fibers[0].index.simdgroup_index_in_threadgroup);
}

// ---------------------------------------------------------------------------
// The schedule
// ---------------------------------------------------------------------------

const char* place(void* site, char* text, size_t size) {
  Dl_info info;
  if (dladdr(site, &info) && info.dli_fname) {
    snprintf(
        text,
        size,
        "[[%s+0x%lx]]",
        info.dli_fname,
        long((char*)site - (char*)info.dli_fbase) - 1);
    return text;
  }
  return "?";
}

bool same_site(Fiber* fibers, int n, const char* what) {
  for (int i = 1; i < n; i++) {
    if (fibers[i].op != fibers[0].op || fibers[i].site != fibers[0].site) {
      char first[512], second[512];
      complain(
          "DIVERGENT: %s is reached at %s and %s",
          what,
          place(fibers[0].site, first, sizeof(first)),
          place(fibers[i].site, second, sizeof(second)));
      return false;
    }
  }
  return true;
}

// Runs a simdgroup until it waits for others; whether it got anywhere.
bool run_simdgroup(Fiber* fibers, int steps, bool& failed) {
  bool moved = false;
  int order[lanes];
  for (int i = 0; i < lanes; i++) {
    order[i] = i;
  }
  while (steps-- > 0) {
    if (machine.launch->seed) {
      std::shuffle(order, order + lanes, machine.random);
    }
    for (int lane : order) {
      if (fibers[lane].state == State::running) {
        resume(fibers[lane]);
        moved = true;
      }
    }
    int waiting = std::count_if(fibers, fibers + lanes, [](Fiber& fiber) {
      return fiber.state == State::at_simd_op;
    });
    if (waiting < lanes) {
      break;
    }
    if (!same_site(fibers, lanes, "an operation of a simdgroup")) {
      failed = true;
      break;
    }
    complete(fibers);
    for (int lane = 0; lane < lanes; lane++) {
      fibers[lane].state = State::running;
    }
    moved = true;
  }
  return moved;
}

int count_state(int n, State state) {
  return std::count_if(
      machine.fibers.begin(), machine.fibers.begin() + n, [&](Fiber& fiber) {
        return fiber.state == state;
      });
}

// Whether the group ended.
bool run_group(int n) {
  auto* fibers = machine.fibers.data();
  std::vector<int> order(n / lanes);
  for (int i = 0; i < n / lanes; i++) {
    order[i] = i;
  }
  for (;;) {
    bool moved = false;
    bool failed = false;
    if (machine.launch->seed) {
      std::shuffle(order.begin(), order.end(), machine.random);
    }
    for (int simdgroup : order) {
      int steps = machine.launch->seed ? 1 + machine.random() % 4 : 1 << 30;
      moved |= run_simdgroup(fibers + simdgroup * lanes, steps, failed);
      if (failed) {
        return false;
      }
    }
    if (count_state(n, State::done) == n) {
      return true;
    }
    int waiting = count_state(n, State::at_barrier);
    if (waiting == n) {
      if (!same_site(fibers, n, "a threadgroup_barrier")) {
        return false;
      }
      counts.threadgroup_barriers++;
      detector::threadgroup_barrier(fibers[0].argument);
      for (int i = 0; i < n; i++) {
        fibers[i].state = State::running;
        detector::simdgroup_step(i / lanes);
      }
    } else if (!moved) {
      complain(
          "DIVERGENT: %d threads ended, %d wait at a threadgroup_barrier, %d "
          "at an operation of a simdgroup",
          count_state(n, State::done),
          waiting,
          count_state(n, State::at_simd_op));
      return false;
    }
  }
}

void fill_index(Index& index, const uint32_t* group, int t) {
  const Launch& launch = *machine.launch;
  auto* threads = launch.threads;
  uint32_t position[3] = {
      t % threads[0],
      t / threads[0] % threads[1],
      t / (threads[0] * threads[1])};
  for (int i = 0; i < 3; i++) {
    index.thread_position_in_threadgroup[i] = position[i];
    index.threadgroup_position_in_grid[i] = group[i];
    index.threads_per_threadgroup[i] = threads[i];
    index.threadgroups_per_grid[i] = launch.groups[i];
    index.threads_per_grid[i] = launch.groups[i] * threads[i];
    index.thread_position_in_grid[i] = group[i] * threads[i] + position[i];
  }
  index.thread_index_in_simdgroup = t % lanes;
  index.simdgroup_index_in_threadgroup = t / lanes;
  index.thread_index_in_threadgroup = t;
  index.simdgroups_per_threadgroup =
      threads[0] * threads[1] * threads[2] / lanes;
  index.threads_per_simdgroup = lanes;
  index.thread_index_in_quadgroup = t % 4;
  index.quadgroup_index_in_threadgroup = t / 4;
}

void start_group(const uint32_t* group, int n) {
  machine.arrays.clear();
  machine.arena_used = red_zone;
  machine.threadgroup_bytes = 0;
  poisoned(machine.arena, arena_bytes, true);
  detector::begin_group();
  for (int t = 0; t < n; t++) {
    Fiber& fiber = machine.fibers[t];
    fiber.state = State::running;
    fill_index(fiber.index, group, t);
    poisoned(fiber.stack, stack_bytes, false);
    auto** top = reinterpret_cast<void**>(fiber.stack + stack_bytes - 64);
    *--top = nullptr;
    *--top = reinterpret_cast<void*>(fiber_main);
    for (int i = 0; i < 6; i++) {
      *--top = nullptr;
    }
    fiber.stack_pointer = top;
  }
}

char* map_memory(size_t bytes) {
  void* data = mmap(
      nullptr,
      bytes,
      PROT_READ | PROT_WRITE,
      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE,
      -1,
      0);
  if (data == MAP_FAILED) {
    perror("mmap");
    abort();
  }
  return static_cast<char*>(data);
}

bool prepare(const Launch& launch, int n) {
  machine.launch = &launch;
  machine.report.clear();
  machine.errors = 0;
  machine.random.seed(launch.seed);
  counts = {};
  if (n == 0 || n % lanes != 0 || n > max_threads) {
    complain("a threadgroup of %d threads", n);
    return false;
  }
  if (!machine.arena) {
    machine.arena = map_memory(arena_bytes);
  }
  while (machine.fibers.size() < size_t(n)) {
    machine.fibers.emplace_back().stack = map_memory(stack_bytes);
  }
  for (int i = 0; i < max_buffers; i++) {
    machine.buffers[i] = launch.buffers[i].data;
  }
  return true;
}

void run_groups(const Launch& launch, int n) {
  std::vector<uint32_t> order(
      launch.groups[0] * launch.groups[1] * launch.groups[2]);
  for (size_t i = 0; i < order.size(); i++) {
    order[i] = i;
  }
  if (launch.seed) {
    std::shuffle(order.begin(), order.end(), machine.random);
  }
  for (uint32_t i : order) {
    uint32_t group[3] = {
        i % launch.groups[0],
        i / launch.groups[0] % launch.groups[1],
        i / (launch.groups[0] * launch.groups[1])};
    start_group(group, n);
    if (!run_group(n)) {
      return;
    }
  }
}

template <typename T>
uint64_t run_atomic(int op, void* object, uint64_t x, uint64_t expected) {
  T before;
  memcpy(&before, object, sizeof(T));
  T y = from_bits<T>(x);
  T after = before;
  constexpr int reductions[] = {
      op_sum, op_sum, op_min, op_max, op_and, op_or, op_xor};
  if (op == atomic_store || op == atomic_exchange) {
    after = y;
  } else if (op == atomic_compare_exchange) {
    after = to_bits(before) == expected ? y : before;
  } else if (op == atomic_sub) {
    after = combine(op_sum, before, T(-y));
  } else if (op >= atomic_add) {
    after = combine(reductions[op - atomic_add], before, y);
  }
  memcpy(object, &after, sizeof(T));
  return to_bits(before);
}

uint64_t
atomic_op(int op, int type, void* object, uint64_t x, uint64_t y, void* pc) {
  uint64_t before = 0;
  detector::atomic_access(object, type_bytes(type), op != atomic_load, pc);
  dispatch_type(type, [&](auto v) {
    before = run_atomic<decltype(v)>(op, object, x, y);
  });
  return before;
}

} // namespace

const Index* current_index() {
  return machine.current ? &machine.current->index : nullptr;
}

bool on_current_stack(const void* address) {
  auto* stack = machine.current->stack;
  return address >= stack && address < stack + stack_bytes;
}

void complain(const char* format, ...) {
  char text[2048];
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(text, sizeof(text), format, arguments);
  va_end(arguments);
  machine.errors++;
  // The first few say it all.
  if (machine.errors <= 20) {
    machine.report += text;
    machine.report += '\n';
  }
}

} // namespace msl

// ---------------------------------------------------------------------------
// What kernels call
// ---------------------------------------------------------------------------

using namespace msl;

extern "C" {

// Older compilers' libraries lack it.
__attribute__((weak)) __bf16 __truncsfbf2(float x) {
  uint32_t bits = __builtin_bit_cast(uint32_t, x);
  uint32_t rounded = bits + 0x7fff + ((bits >> 16) & 1);
  return __builtin_bit_cast(
      __bf16, uint16_t(x != x ? bits >> 16 | 0x40 : rounded >> 16));
}

uint64_t
msl_simd(int op, int type, int width, uint64_t x, uint64_t fill, int argument) {
  Fiber& fiber = *machine.current;
  fiber.type = type;
  fiber.width = width;
  fiber.x = x;
  fiber.fill = fill;
  fiber.argument = argument;
  return wait(State::at_simd_op, op, __builtin_return_address(0));
}

float2 msl_mma(float2 a, float2 b, float2 c) {
  Fiber& fiber = *machine.current;
  fiber.a = a;
  fiber.b = b;
  fiber.c = c;
  wait(State::at_simd_op, op_mma, __builtin_return_address(0));
  return fiber.d;
}

void msl_threadgroup_barrier(int flags) {
  machine.current->argument = flags;
  wait(State::at_barrier, 0, __builtin_return_address(0));
}

void msl_simdgroup_barrier(int flags) {
  machine.current->argument = flags;
  wait(State::at_simd_op, op_simdgroup_barrier, __builtin_return_address(0));
}

// The array of a declaration, the same for all threads of a group. It begins as
// NaN in every float type.
void* msl_threadgroup_memory(int key, size_t bytes) {
  for (auto& array : machine.arrays) {
    if (array.key == key && array.bytes == bytes) {
      return array.data;
    }
  }
  char* data = machine.arena + machine.arena_used;
  machine.arena_used += (bytes + red_zone + 63) / 64 * 64;
  machine.threadgroup_bytes += (bytes + 15) / 16 * 16;
  counts.threadgroup_bytes =
      std::max<uint64_t>(counts.threadgroup_bytes, machine.threadgroup_bytes);
  if (machine.threadgroup_bytes > max_threadgroup_bytes ||
      machine.arena_used > arena_bytes) {
    complain(
        "THREADGROUP MEMORY: %zu bytes, at most %zu",
        machine.threadgroup_bytes,
        max_threadgroup_bytes);
    machine.arena_used = red_zone;
    data = machine.arena + red_zone;
  }
  poisoned(data, bytes, false);
  memset(data, 0xff, bytes);
  detector::begin_threadgroup_memory(data, bytes, key);
  machine.arrays.push_back({key, bytes, data});
  return data;
}

void* msl_threadgroup_argument(int index) {
  return msl_threadgroup_memory(
      -1 - index, machine.launch->threadgroup_bytes[index]);
}

int msl_lane() {
  return machine.current->index.thread_index_in_simdgroup;
}

uint64_t msl_atomic_device(int op, int type, void* p, uint64_t x, uint64_t y) {
  return atomic_op(op, type, p, x, y, __builtin_return_address(0));
}

uint64_t
msl_atomic_threadgroup(int op, int type, void* p, uint64_t x, uint64_t y) {
  return atomic_op(op, type, p, x, y, __builtin_return_address(0));
}

int msl_launch(const Launch* launch) {
  int n = launch->threads[0] * launch->threads[1] * launch->threads[2];
  if (!prepare(*launch, n)) {
    return machine.errors;
  }
  unsigned control = _mm_getcsr();
  if (launch->flush_denormals) {
    _mm_setcsr(control | 0x8040);
  }
  detector::begin_launch(*launch);
  run_groups(*launch, n);
  detector::end_launch();
  _mm_setcsr(control);
  poisoned(machine.arena, arena_bytes, false);
  return machine.errors;
}

const char* msl_report() {
  return machine.report.c_str();
}

const Counts* msl_counts() {
  return &counts;
}
}
