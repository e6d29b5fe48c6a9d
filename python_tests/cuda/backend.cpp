// The CUDA backend on an emulated GPU: kernels are compiled by the C++ compiler
// at their first use, and the CPU's streams run them.

#include <dlfcn.h>
#include <unistd.h>

#include <cstdlib>
#include <fstream>
#include <functional>
#include <map>
#include <stdexcept>
#include <string>

#include "mlx/backend/cuda/quantized_sdpa_jit.h"
#include "mlx/backend/cuda/quantized_sdpa_params.h"
#include "mlx/backend/cuda/quantized_sdpa_prefill.h"
#include "mlx/quantized_sdpa_primitive.h"

namespace mlx::core {

namespace cu {

void CommandEncoder::add_kernel_node_raw(
    Grid grid,
    dim3 blocks,
    dim3 threads,
    dim3,
    int shared,
    void** args) {
  auto params = *static_cast<quantized_sdpa::CudaParams*>(args[0]);
  encoder_.dispatch([=]() { grid(&params, blocks.x, threads.x, shared); });
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

// QUANTIZED_SDPA_EMULATOR holds the compiler's command line up to the folder of
// the sources, to which source, instance and output are added.
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
  std::string stem =
      std::string(std::getenv("QUANTIZED_SDPA_EMULATOR_FOLDER")) + "/" +
      std::to_string(getpid()) + "_" + std::to_string(kernels->size());
  std::ofstream(stem + ".cpp") << instance;
  auto command = std::string(std::getenv("QUANTIZED_SDPA_EMULATOR")) + source +
      " -o " + stem + ".so -DINSTANCE='\"" + stem + ".cpp\"'";
  if (std::system(command.c_str()) != 0) {
    throw std::runtime_error("The emulated kernel does not compile.");
  }
  auto library = dlopen((stem + ".so").c_str(), RTLD_NOW | RTLD_LOCAL);
  auto grid = library ? reinterpret_cast<cu::Grid>(dlsym(library, "run_grid"))
                      : nullptr;
  if (!grid) {
    throw std::runtime_error("The emulated kernel does not load.");
  }
  return kernels->emplace(instance, CudaKernel{grid, 0, 0}).first->second;
}

void clear_cuda(cu::CommandEncoder&, void* data, size_t words) {
  std::fill_n(static_cast<uint32_t*>(data), words, 0u);
}

int cuda_shared_limit(cu::Device&) {
  return 232448;
}

int cuda_multiprocessors(cu::Device&) {
  auto value = std::getenv("QUANTIZED_SDPA_EMULATED_MULTIPROCESSORS");
  return value ? std::atoi(value) : 132;
}

const char* decode_source() {
  return "kernel.cpp";
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
}

} // namespace fast
} // namespace mlx::core
