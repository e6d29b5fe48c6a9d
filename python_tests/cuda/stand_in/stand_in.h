// Stands for the driver and a GPU under MLX's own CUDA library. Streams are
// threads that do their work late, graphs run their latest nodes first where
// edges allow, and memory is gone once it was given back, so that whoever
// counts on more than CUDA promises goes wrong. Kernels run on the emulated
// GPU.

#pragma once

#include <cuda.h>
#include <cuda_runtime_api.h>

#include <condition_variable>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "quantized_sdpa_grid.h"

namespace stand_in {

// As an H200.
constexpr int capability_major = 9;
constexpr int capability_minor = 0;
constexpr int multiprocessors = 132;
constexpr int shared_limit = 232448;

[[noreturn]] void fail(const std::string& what);

class Stream {
 public:
  Stream();
  void add(std::function<void()> task);
  void wait();

 private:
  void work();

  std::mutex mutex_;
  std::condition_variable changed_;
  std::deque<std::function<void()>> tasks_;
  bool busy_ = false;
  std::thread thread_;
};

// Null is the default stream.
Stream& stream_of(const void* handle);

// Until all of them have done what they were given.
void wait_for_streams();

std::vector<emulator::Buffer> memory_in_use();

// Of the grid's parameters, which are copied as CUDA does.
std::function<void()> launch_of(
    const void* function,
    dim3 blocks,
    dim3 threads,
    unsigned shared_bytes,
    void** args);

struct Node {
  std::vector<int> after;
  std::function<void()> run;
};

// A node's handle is its place, from 1 on.
struct Graph {
  std::vector<Node> nodes;

  void* add(const void* const* after, size_t n, std::function<void()> run);
  void run() const;
};

// What was compiled, so that a module's code can be traced to its text.
void keep_source(const std::string& code, const std::string& source);

} // namespace stand_in
