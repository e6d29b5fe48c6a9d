// The CUDA backend on an emulated GPU: kernels are compiled by the C++ compiler
// at their first use, and the CPU's streams run them.

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <stdexcept>
#include <string>

#include "mlx/backend/cuda/quantized_sdpa_jit.h"
#include "mlx/backend/cuda/quantized_sdpa_params.h"
#include "mlx/backend/cuda/quantized_sdpa_prefill.h"
#include "mlx/quantized_sdpa_primitive.h"

namespace mlx::core {

namespace cu {

namespace {

int environment(const char* name, int otherwise) {
  auto value = std::getenv(name);
  return value ? std::atoi(value) : otherwise;
}

// Above what any GPU has.
constexpr int most_multiprocessors = 1 << 10;

} // namespace

int Device::cuda_device() const {
  int kib = environment("QUANTIZED_SDPA_EMULATED_SHARED_KIB", 227) *
      most_multiprocessors;
  return kib + environment("QUANTIZED_SDPA_EMULATED_MULTIPROCESSORS", 132);
}

// An array's buffer as a GPU has it.
struct DeviceBuffer {
  explicit DeviceBuffer(const array& x)
      : bytes(x.buffer_size()), memory(bytes + alignment, char(0xff)) {
    int offset = environment("QUANTIZED_SDPA_EMULATED_ALIGNMENT", 0);
    auto address = reinterpret_cast<uintptr_t>(memory.data());
    begin = memory.data() + (-address & (alignment / 2 - 1)) + offset;
  }

  static constexpr int alignment = 512;
  size_t bytes;
  std::vector<char> memory;
  char* begin;
};

// Of the primitive that is being evaluated, by buffer.
thread_local std::map<const void*, std::shared_ptr<DeviceBuffer>> buffers;

// Holds NaN of every type, so that nobody counts on what is there.
std::shared_ptr<DeviceBuffer> buffer_of(const array& x) {
  auto& found = buffers[x.buffer().ptr()];
  if (!found) {
    found = std::make_shared<DeviceBuffer>(x);
  }
  return found;
}

void* device_pointer(const array& x) {
  auto host = const_cast<char*>(x.data<char>());
  auto found = buffers.find(x.buffer().ptr());
  return found == buffers.end() ? host
                                : found->second->begin +
          (host - static_cast<char*>(x.buffer().raw_ptr()));
}

void CommandEncoder::set_input_array(const array& x) {
  encoder_.set_input_array(x);
  depends_.push_back(x.buffer().ptr());
  if (x.buffer().ptr()) {
    auto host = static_cast<const char*>(x.buffer().raw_ptr());
    encoder_.dispatch([host, device = buffer_of(x)] {
      std::copy_n(host, device->bytes, device->begin);
    });
  }
}

void CommandEncoder::set_output_array(array& x) {
  encoder_.set_output_array(x);
  depends_.push_back(x.buffer().ptr());
  writes_.push_back(x.buffer().ptr());
  buffer_of(x);
  outputs_.push_back(x);
}

void CommandEncoder::add_temporary(const array& x) {
  encoder_.add_temporary(x);
  buffer_of(x);
}

void CommandEncoder::add_kernel_node_raw(
    Grid grid,
    dim3 blocks,
    dim3 threads,
    dim3,
    int shared,
    void** args) {
  if (blocks.x < 1 || blocks.y != 1 || blocks.z != 1 || threads.x % 32 != 0 ||
      threads.x > 1024 || shared > quantized_sdpa::cuda_shared_limit(device_)) {
    throw std::runtime_error("The emulated GPU cannot launch this.");
  }
  auto params = *static_cast<quantized_sdpa::CudaParams*>(args[0]);
  std::vector<emulator::Buffer> memory;
  for (auto& [host, device] : buffers) {
    memory.push_back({device->begin, device->bytes});
  }
  auto run = [=, used = buffers] {
    auto n = int(memory.size());
    grid(&params, blocks.x, threads.x, shared, memory.data(), n);
  };
  Kernel kernel{run, {}};
  for (auto buffer : depends_) {
    if (auto found = writer_.find(buffer); found != writer_.end()) {
      kernel.after.push_back(found->second);
    }
  }
  for (auto buffer : writes_) {
    writer_[buffer] = int(kernels_.size());
  }
  depends_.clear();
  writes_.clear();
  kernels_.push_back(std::move(kernel));
}

// The latest kernel that may run runs first.
void CommandEncoder::commit() {
  std::vector<bool> done(kernels_.size());
  for (int left = int(done.size()); left > 0; --left) {
    int next = int(done.size()) - 1;
    auto& all = kernels_;
    auto waits = [&](int i) {
      auto& after = all[i].after;
      return done[i] || std::any_of(after.begin(), after.end(), [&](int j) {
               return !done[j];
             });
    };
    while (waits(next)) {
      --next;
    }
    encoder_.dispatch(all[next].run);
    done[next] = true;
  }
  // Whoever reads the outputs waits for their last writer alone.
  for (auto [buffer, last] : writer_) {
    if (last + 1 != int(kernels_.size())) {
      throw std::runtime_error("A kernel writes after the last known writer.");
    }
  }
  for (auto& x : outputs_) {
    auto host = static_cast<char*>(x.buffer().raw_ptr());
    encoder_.dispatch([host, device = buffer_of(x)] {
      std::copy_n(device->begin, device->bytes, host);
    });
  }
  outputs_.clear();
  buffers.clear();
  kernels_.clear();
  depends_.clear();
  writes_.clear();
  writer_.clear();
}

CommandEncoder& get_command_encoder(Stream s) {
  static auto* encoders = new std::map<int, CommandEncoder>;
  return encoders->try_emplace(s.index, s).first->second;
}

Device& device(mlx::core::Device) {
  static Device instance;
  return instance;
}

} // namespace cu

namespace quantized_sdpa {

const CudaKernel& cuda_kernel_of(
    cu::Device&,
    const char* source,
    const std::string& instance,
    int) {
  static auto* kernels = new std::map<std::string, CudaKernel>;
  auto found = kernels->find(instance);
  if (found != kernels->end()) {
    return found->second;
  }
  auto grid = emulator::compile_grid(source, instance);
  return kernels->emplace(instance, CudaKernel{grid, 0, 0}).first->second;
}

void clear_cuda(cu::CommandEncoder&, void* data, size_t words) {
  std::fill_n(static_cast<uint32_t*>(data), words, 0u);
}

// Threads here end once their results are there.
void wait_for_cuda(cu::Device&) {}

int cuda_shared_limit(cu::Device& device) {
  return device.cuda_device() / cu::most_multiprocessors << 10;
}

int cuda_multiprocessors(cu::Device& device) {
  return device.cuda_device() % cu::most_multiprocessors;
}

const char* decode_source() {
  return "decode_kernel.cpp";
}

const char* prefill_wgmma_source() {
  return "prefill_kernel.cpp";
}

} // namespace quantized_sdpa

namespace fast {

void QuantizedScaledDotProductAttention::eval_cpu(
    const std::vector<array>& inputs,
    std::vector<array>& outputs) {
  eval_gpu(inputs, outputs);
  cu::get_command_encoder(stream()).commit();
}

} // namespace fast
} // namespace mlx::core
