// The part of CUDA's runtime that MLX needs to run ops of ours: memory,
// streams, events and graphs. load.py puts these in the place of those that are
// linked into MLX's library.

#include <sys/mman.h>

#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <set>

#include "stand_in.h"

namespace stand_in {

void fail(const std::string& what) {
  std::fprintf(stderr, "The stand-in for CUDA met %s.\n", what.c_str());
  std::abort();
}

namespace {

std::mutex mutex;

std::set<Stream*>& streams() {
  static auto* instance = new std::set<Stream*>;
  return *instance;
}

struct Buffer {
  char* pages;
  size_t mapped;
  size_t bytes;
};

std::map<void*, Buffer>& buffers() {
  static auto* instance = new std::map<void*, Buffer>;
  return *instance;
}

// New memory holds NaN of every type; behind it, and once it was given back, is
// nothing.
void* allocate(size_t bytes) {
  constexpr size_t alignment = 512;
  constexpr size_t page = 4096;
  auto round_up = [](size_t x, size_t to) { return (x + to - 1) / to * to; };
  auto used = round_up(bytes, page);
  auto pages = static_cast<char*>(mmap(
      nullptr,
      used + page,
      PROT_READ | PROT_WRITE,
      MAP_PRIVATE | MAP_ANONYMOUS,
      -1,
      0));
  if (pages == MAP_FAILED) {
    fail("the end of memory");
  }
  mprotect(pages + used, page, PROT_NONE);
  std::memset(pages, 0xff, used);
  void* p = pages + used - round_up(bytes, alignment);
  std::lock_guard lock(mutex);
  buffers()[p] = {pages, used + page, bytes};
  return p;
}

void release(void* p) {
  if (!p) {
    return;
  }
  std::lock_guard lock(mutex);
  auto found = buffers().find(p);
  if (found == buffers().end()) {
    fail("memory given back that nobody has");
  }
  munmap(found->second.pages, found->second.mapped);
  buffers().erase(found);
}

struct Event {
  std::mutex mutex;
  std::condition_variable changed;
  int recorded = 0;
  int reached = 0;

  int latest() {
    std::lock_guard lock(mutex);
    return recorded;
  }
  void wait(int record) {
    std::unique_lock lock(mutex);
    changed.wait(lock, [&] { return reached >= record; });
  }
};

Event& event_of(cudaEvent_t handle) {
  return *reinterpret_cast<Event*>(handle);
}

// MLX's own kernels that tell streams and the CPU of each other's progress.
const void* signal_kernel;
const void* wait_kernel;

} // namespace

std::vector<emulator::Buffer> memory_in_use() {
  std::vector<emulator::Buffer> found;
  std::lock_guard lock(mutex);
  for (auto& [begin, buffer] : buffers()) {
    found.push_back({static_cast<const char*>(begin), buffer.bytes});
  }
  return found;
}

Stream::Stream() : thread_([this] { work(); }) {
  thread_.detach();
  std::lock_guard lock(mutex);
  streams().insert(this);
}

void Stream::add(std::function<void()> task) {
  std::lock_guard lock(mutex_);
  tasks_.push_back(std::move(task));
  changed_.notify_all();
}

void Stream::wait() {
  std::unique_lock lock(mutex_);
  changed_.wait(lock, [&] { return tasks_.empty() && !busy_; });
}

void Stream::work() {
  constexpr std::chrono::microseconds late{300};
  std::unique_lock lock(mutex_);
  for (;;) {
    busy_ = false;
    changed_.notify_all();
    changed_.wait(lock, [&] { return !tasks_.empty(); });
    auto task = std::move(tasks_.front());
    tasks_.pop_front();
    busy_ = true;
    lock.unlock();
    std::this_thread::sleep_for(late);
    task();
    lock.lock();
  }
}

void wait_for_streams() {
  std::set<Stream*> all;
  {
    std::lock_guard lock(mutex);
    all = streams();
  }
  for (auto stream : all) {
    stream->wait();
  }
}

Stream& stream_of(const void* handle) {
  static auto* standard = new Stream;
  return handle ? *static_cast<Stream*>(const_cast<void*>(handle)) : *standard;
}

void* Graph::add(
    const void* const* after,
    size_t n,
    std::function<void()> run) {
  Node node{{}, std::move(run)};
  for (size_t i = 0; i < n; ++i) {
    node.after.push_back(int(reinterpret_cast<uintptr_t>(after[i])) - 1);
  }
  nodes.push_back(std::move(node));
  return reinterpret_cast<void*>(nodes.size());
}

// The latest node that may run runs first.
void Graph::run() const {
  std::vector<bool> done(nodes.size());
  for (size_t left = nodes.size(); left > 0; --left) {
    int next = int(nodes.size()) - 1;
    auto waits = [&](int i) {
      bool may = !done[i];
      for (int other : nodes[i].after) {
        may = may && done[other];
      }
      return !may;
    };
    while (next >= 0 && waits(next)) {
      --next;
    }
    if (next < 0) {
      fail("a graph with a circle");
    }
    nodes[next].run();
    done[next] = true;
  }
}

} // namespace stand_in

using namespace stand_in;

extern "C" {

void stand_in_set_event_kernels(const void* signal, const void* wait) {
  signal_kernel = signal;
  wait_kernel = wait;
}

// The device.

cudaError_t cudaGetDeviceCount(int* n) {
  *n = 1;
  return cudaSuccess;
}

cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}

cudaError_t cudaSetDevice(int) {
  return cudaSuccess;
}

cudaError_t cudaGetLastError() {
  return cudaSuccess;
}

const char* cudaGetErrorString(cudaError_t) {
  return "an error of the stand-in";
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr which, int) {
  switch (which) {
    case cudaDevAttrComputeCapabilityMajor:
      *value = capability_major;
      break;
    case cudaDevAttrComputeCapabilityMinor:
      *value = capability_minor;
      break;
    case cudaDevAttrManagedMemory:
    case cudaDevAttrConcurrentManagedAccess:
    case cudaDevAttrMemoryPoolsSupported:
      *value = 1;
      break;
    default:
      *value = 0;
  }
  return cudaSuccess;
}

// Memory.

cudaError_t cudaMemGetInfo(size_t* available, size_t* total) {
  *available = *total = size_t(8) << 30;
  return cudaSuccess;
}

cudaError_t cudaMallocManaged(void** p, size_t bytes, unsigned) {
  *p = allocate(bytes);
  return cudaSuccess;
}

cudaError_t cudaMallocAsync(void** p, size_t bytes, cudaStream_t) {
  *p = allocate(bytes);
  return cudaSuccess;
}

cudaError_t cudaFree(void* p) {
  wait_for_streams();
  release(p);
  return cudaSuccess;
}

cudaError_t cudaFreeAsync(void* p, cudaStream_t stream) {
  stream_of(stream).add([=] { release(p); });
  return cudaSuccess;
}

cudaError_t cudaMemcpyAsync(
    void* to,
    const void* from,
    size_t bytes,
    cudaMemcpyKind,
    cudaStream_t stream) {
  stream_of(stream).add([=] { std::memcpy(to, from, bytes); });
  return cudaSuccess;
}

cudaError_t
cudaMemAdvise(const void*, size_t, cudaMemoryAdvise, cudaMemLocation) {
  return cudaSuccess;
}

cudaError_t cudaMemPrefetchAsync(
    const void*,
    size_t,
    cudaMemLocation,
    unsigned,
    cudaStream_t) {
  return cudaSuccess;
}

cudaError_t cudaDeviceGetDefaultMemPool(cudaMemPool_t* pool, int) {
  *pool = nullptr;
  return cudaSuccess;
}

cudaError_t cudaMemPoolSetAttribute(cudaMemPool_t, cudaMemPoolAttr, void*) {
  return cudaSuccess;
}

// Streams and events.

cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned) {
  *stream = reinterpret_cast<cudaStream_t>(new Stream);
  return cudaSuccess;
}

cudaError_t cudaStreamDestroy(cudaStream_t stream) {
  stream_of(stream).wait();
  return cudaSuccess;
}

cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
  stream_of(stream).wait();
  return cudaSuccess;
}

cudaError_t
cudaLaunchHostFunc(cudaStream_t stream, cudaHostFn_t call, void* data) {
  stream_of(stream).add([=] { call(data); });
  return cudaSuccess;
}

cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned) {
  *event = reinterpret_cast<cudaEvent_t>(new Event);
  return cudaSuccess;
}

cudaError_t cudaEventDestroy(cudaEvent_t) {
  return cudaSuccess;
}

cudaError_t cudaEventRecord(cudaEvent_t handle, cudaStream_t stream) {
  auto& event = event_of(handle);
  std::lock_guard lock(event.mutex);
  stream_of(stream).add([&event, record = ++event.recorded] {
    std::lock_guard lock(event.mutex);
    event.reached = std::max(event.reached, record);
    event.changed.notify_all();
  });
  return cudaSuccess;
}

cudaError_t cudaEventQuery(cudaEvent_t handle) {
  auto& event = event_of(handle);
  std::lock_guard lock(event.mutex);
  return event.reached == event.recorded ? cudaSuccess : cudaErrorNotReady;
}

cudaError_t cudaEventSynchronize(cudaEvent_t handle) {
  auto& event = event_of(handle);
  event.wait(event.latest());
  return cudaSuccess;
}

cudaError_t
cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t handle, unsigned) {
  auto& event = event_of(handle);
  stream_of(stream).add(
      [&event, record = event.latest()] { event.wait(record); });
  return cudaSuccess;
}

// void signal(uint32_t* counter, uint32_t value), and wait for it.
cudaError_t cudaLaunchKernel(
    const void* function,
    dim3,
    dim3,
    void** args,
    size_t,
    cudaStream_t stream) {
  if (function != signal_kernel && function != wait_kernel) {
    fail("a kernel of MLX's own");
  }
  auto counter = *static_cast<unsigned**>(args[0]);
  auto value = *static_cast<unsigned*>(args[1]);
  bool signals = function == signal_kernel;
  stream_of(stream).add([=] {
    if (signals) {
      __atomic_store_n(counter, value, __ATOMIC_RELEASE);
    }
    while (__atomic_load_n(counter, __ATOMIC_ACQUIRE) < value) {
      std::this_thread::yield();
    }
  });
  return cudaSuccess;
}

// Graphs.

cudaError_t cudaGraphCreate(cudaGraph_t* graph, unsigned) {
  *graph = reinterpret_cast<cudaGraph_t>(new Graph);
  return cudaSuccess;
}

cudaError_t cudaGraphDestroy(cudaGraph_t graph) {
  delete reinterpret_cast<Graph*>(graph);
  return cudaSuccess;
}

cudaError_t cudaGraphAddDependencies(
    cudaGraph_t graph,
    const cudaGraphNode_t* from,
    const cudaGraphNode_t* to,
    const cudaGraphEdgeData*,
    size_t n) {
  auto place = [](cudaGraphNode_t node) {
    return int(reinterpret_cast<uintptr_t>(node)) - 1;
  };
  auto& nodes = reinterpret_cast<Graph*>(graph)->nodes;
  for (size_t i = 0; i < n; ++i) {
    nodes[place(to[i])].after.push_back(place(from[i]));
  }
  return cudaSuccess;
}

cudaError_t cudaGraphInstantiate(
    cudaGraphExec_t* exec,
    cudaGraph_t graph,
    unsigned long long) {
  auto copy = new Graph(*reinterpret_cast<Graph*>(graph));
  *exec = reinterpret_cast<cudaGraphExec_t>(copy);
  return cudaSuccess;
}

cudaError_t cudaGraphExecUpdate(
    cudaGraphExec_t exec,
    cudaGraph_t graph,
    cudaGraphExecUpdateResultInfo* info) {
  auto& now = *reinterpret_cast<Graph*>(exec);
  auto& next = *reinterpret_cast<Graph*>(graph);
  bool same = now.nodes.size() == next.nodes.size();
  for (size_t i = 0; same && i < now.nodes.size(); ++i) {
    same = now.nodes[i].after == next.nodes[i].after;
  }
  *info = {};
  info->result = same ? cudaGraphExecUpdateSuccess
                      : cudaGraphExecUpdateErrorTopologyChanged;
  now = same ? next : now;
  return same ? cudaSuccess : cudaErrorGraphExecUpdateFailure;
}

cudaError_t cudaGraphExecDestroy(cudaGraphExec_t exec) {
  delete reinterpret_cast<Graph*>(exec);
  return cudaSuccess;
}

cudaError_t cudaGraphLaunch(cudaGraphExec_t exec, cudaStream_t stream) {
  auto graph = *reinterpret_cast<Graph*>(exec);
  stream_of(stream).add([=] { graph.run(); });
  return cudaSuccess;
}
}
