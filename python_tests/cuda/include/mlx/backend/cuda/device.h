// What the launch uses of MLX's CUDA backend, on the CPU: a kernel is a
// function that runs a grid on an emulated GPU.

#pragma once

#include <functional>
#include <map>
#include <vector>

#include "mlx/array.h"
#include "mlx/backend/cpu/encoder.h"
#include "quantized_sdpa_grid.h"

struct dim3 {
  int x = 1;
  int y = 1;
  int z = 1;
};

namespace mlx::core {

namespace cu {

void* device_pointer(const array& x);

using Grid = emulator::RunGrid;

struct Device {
  int compute_capability_major() const {
    return 9;
  }
  int compute_capability_minor() const {
    return 0;
  }
  // One for each number of multiprocessors and size of shared memory, since
  // what is known of a device is kept.
  int cuda_device() const;
};

// As MLX's: inputs and outputs that are set hold for the next kernel only, and
// kernels that no array connects may run in any order. Kernels work on copies
// of the arrays that are aligned as a GPU's memory is.
class CommandEncoder {
 public:
  explicit CommandEncoder(Stream s) : encoder_(cpu::get_command_encoder(s)) {}

  void set_input_array(const array& x);
  void set_output_array(array& x);
  void add_temporary(const array& x);
  void add_kernel_node_raw(
      Grid grid,
      dim3 blocks,
      dim3 threads,
      dim3 cluster,
      int shared,
      void** args);
  // Runs the kernels of one primitive.
  void commit();

  Device& device() {
    return device_;
  }

 private:
  struct Kernel {
    std::function<void()> run;
    std::vector<int> after;
  };

  cpu::CommandEncoder& encoder_;
  Device device_;
  std::vector<Kernel> kernels_;
  std::vector<array> outputs_;
  // Buffers of the next kernel, and the kernel that last wrote a buffer.
  std::vector<const void*> depends_;
  std::vector<const void*> writes_;
  std::map<const void*, int> writer_;
};

CommandEncoder& get_command_encoder(Stream s);
Device& device(mlx::core::Device d);

} // namespace cu

template <typename T>
auto gpu_ptr(const array& x) {
  return static_cast<T*>(cu::device_pointer(x));
}

} // namespace mlx::core

using CUfunction = mlx::core::cu::Grid;
