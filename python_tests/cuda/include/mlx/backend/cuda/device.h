// What the launch uses of MLX's CUDA backend, on the CPU: a kernel is a
// function that runs a grid on an emulated GPU.

#pragma once

#include <functional>

#include "mlx/array.h"
#include "mlx/backend/cpu/encoder.h"

struct dim3 {
  int x = 1;
};

namespace mlx::core {

template <typename T>
auto gpu_ptr(const array& x) {
  return const_cast<T*>(x.data<T>());
}

namespace cu {

using Grid = void (*)(const void* params, int blocks, int threads, int shared);

struct Device {
  int compute_capability_major() const {
    return 9;
  }
  int compute_capability_minor() const {
    return 0;
  }
  int cuda_device() const {
    return 0;
  }
};

class CommandEncoder {
 public:
  explicit CommandEncoder(Stream s) : encoder_(cpu::get_command_encoder(s)) {}

  void set_input_array(const array& x) {
    encoder_.set_input_array(x);
  }
  void set_output_array(array& x) {
    encoder_.set_output_array(x);
  }
  void add_temporary(const array& x) {
    encoder_.add_temporary(x);
  }
  Device& device() {
    return device_;
  }
  void add_kernel_node_raw(
      Grid grid,
      dim3 blocks,
      dim3 threads,
      dim3 cluster,
      int shared,
      void** args);

 private:
  cpu::CommandEncoder& encoder_;
  Device device_;
};

CommandEncoder& get_command_encoder(Stream s);
Device& device(mlx::core::Device d);

} // namespace cu
} // namespace mlx::core

using CUfunction = mlx::core::cu::Grid;
