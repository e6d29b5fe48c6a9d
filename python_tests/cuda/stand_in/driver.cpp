// libcuda.so.1: modules, kernels and the nodes that run them.

#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <map>

#include "mlx/backend/cuda/quantized_sdpa_params.h"
#include "stand_in.h"

namespace stand_in {

namespace {

struct Kernel {
  emulator::RunGrid grid;
  int shared_bytes = 48 << 10;
};

std::string folder() {
  return std::getenv("QUANTIZED_SDPA_EMULATOR_FOLDER");
}

std::string read_file(const std::filesystem::path& path) {
  std::ifstream file(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(file), {}};
}

std::string source_of(const void* image) {
  for (auto& entry : std::filesystem::directory_iterator(folder())) {
    auto path = entry.path();
    if (path.extension() == ".code") {
      auto code = read_file(path);
      if (std::memcmp(code.data(), image, code.size()) == 0) {
        return read_file(path.replace_extension(".source"));
      }
    }
  }
  fail("a module whose code was not compiled here");
}

// What is specific to a kernel comes after the headers that all share.
std::string instance_of(const std::string& source) {
  auto begin = source.rfind("\nusing namespace mlx::core::quantized_sdpa;");
  if (begin == std::string::npos) {
    fail("a kernel of somebody else");
  }
  return source.substr(begin);
}

Kernel* load(const std::string& instance) {
  static std::mutex mutex;
  static auto* kernels = new std::map<std::string, Kernel*>;
  std::lock_guard lock(mutex);
  auto& kernel = (*kernels)[instance];
  if (!kernel) {
    bool decodes = instance.find("decode<Instance>") != std::string::npos;
    auto source = decodes ? "decode_kernel.cpp" : "prefill_kernel.cpp";
    kernel = new Kernel{emulator::compile_grid(source, instance)};
  }
  return kernel;
}

} // namespace

void keep_source(const std::string& code, const std::string& source) {
  auto stem = folder() + "/" + std::to_string(std::hash<std::string>{}(code));
  std::ofstream(stem + ".source") << source;
  std::ofstream(stem + ".code", std::ios::binary) << code;
}

std::function<void()> launch_of(
    const void* function,
    dim3 blocks,
    dim3 threads,
    unsigned shared_bytes,
    void** args) {
  using mlx::core::quantized_sdpa::CudaParams;
  auto kernel = static_cast<const Kernel*>(function);
  if (blocks.x < 1 || blocks.y != 1 || blocks.z != 1 || threads.x % 32 != 0 ||
      threads.x > 1024 || threads.y != 1 || threads.z != 1 ||
      shared_bytes > kernel->shared_bytes) {
    fail("a launch that no GPU takes");
  }
  auto params = *static_cast<const CudaParams*>(args[0]);
  return [=, grid = kernel->grid] {
    // The emulator's threads share what they are.
    static std::mutex one_at_a_time;
    std::lock_guard lock(one_at_a_time);
    auto memory = memory_in_use();
    auto n = int(memory.size());
    grid(&params, blocks.x, threads.x, shared_bytes, memory.data(), n);
  };
}

} // namespace stand_in

using namespace stand_in;

extern "C" {

// NVRTC asks for these too; it does without a driver.
CUresult cuInit(unsigned) {
  return CUDA_ERROR_NO_DEVICE;
}

CUresult cuGetExportTable(const void**, const CUuuid*) {
  return CUDA_ERROR_NOT_FOUND;
}

CUresult cuGetErrorString(CUresult, const char** text) {
  *text = "an error of the stand-in";
  return CUDA_SUCCESS;
}

CUresult cuDeviceGetAttribute(int* value, CUdevice_attribute which, CUdevice) {
  switch (which) {
    case CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT:
      *value = multiprocessors;
      return CUDA_SUCCESS;
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN:
      *value = shared_limit;
      return CUDA_SUCCESS;
    default:
      return CUDA_ERROR_INVALID_VALUE;
  }
}

CUresult cuModuleLoadData(CUmodule* module, const void* image) {
  auto kernel = load(instance_of(source_of(image)));
  *module = reinterpret_cast<CUmodule>(kernel);
  return CUDA_SUCCESS;
}

CUresult cuModuleLoadDataEx(
    CUmodule* module,
    const void* image,
    unsigned,
    CUjit_option*,
    void**) {
  return cuModuleLoadData(module, image);
}

CUresult cuModuleUnload(CUmodule) {
  return CUDA_SUCCESS;
}

CUresult
cuModuleGetFunction(CUfunction* function, CUmodule module, const char* name) {
  if (std::strcmp(name, "quantized_sdpa") != 0) {
    return CUDA_ERROR_NOT_FOUND;
  }
  *function = reinterpret_cast<CUfunction>(module);
  return CUDA_SUCCESS;
}

CUresult
cuFuncSetAttribute(CUfunction function, CUfunction_attribute which, int value) {
  if (which != CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES ||
      value > shared_limit) {
    return CUDA_ERROR_INVALID_VALUE;
  }
  auto& held = reinterpret_cast<Kernel*>(function)->shared_bytes;
  held = std::max(held, value);
  return CUDA_SUCCESS;
}

// Registers and stack are the compiler's matter.
CUresult cuFuncGetAttribute(int* value, CUfunction_attribute, CUfunction) {
  *value = 0;
  return CUDA_SUCCESS;
}

CUresult cuCtxSynchronize() {
  wait_for_streams();
  return CUDA_SUCCESS;
}

CUresult
cuMemsetD32Async(CUdeviceptr to, unsigned x, size_t n, CUstream stream) {
  stream_of(stream).add([=] {
    auto words = reinterpret_cast<unsigned*>(to);
    std::fill_n(words, n, x);
  });
  return CUDA_SUCCESS;
}

CUresult cuGraphAddKernelNode_v2(
    CUgraphNode* node,
    CUgraph graph,
    const CUgraphNode* after,
    size_t n,
    const CUDA_KERNEL_NODE_PARAMS* x) {
  auto run = launch_of(
      x->func,
      {x->gridDimX, x->gridDimY, x->gridDimZ},
      {x->blockDimX, x->blockDimY, x->blockDimZ},
      x->sharedMemBytes,
      x->kernelParams);
  auto deps = reinterpret_cast<const void* const*>(after);
  auto handle = reinterpret_cast<Graph*>(graph)->add(deps, n, run);
  *node = static_cast<CUgraphNode>(handle);
  return CUDA_SUCCESS;
}

CUresult cuGraphKernelNodeSetAttribute(
    CUgraphNode,
    CUkernelNodeAttrID,
    const CUkernelNodeAttrValue*) {
  return CUDA_SUCCESS;
}

CUresult cuLaunchKernelEx(
    const CUlaunchConfig* x,
    CUfunction function,
    void** args,
    void**) {
  stream_of(x->hStream)
      .add(launch_of(
          function,
          {x->gridDimX, x->gridDimY, x->gridDimZ},
          {x->blockDimX, x->blockDimY, x->blockDimZ},
          x->sharedMemBytes,
          args));
  return CUDA_SUCCESS;
}
}
