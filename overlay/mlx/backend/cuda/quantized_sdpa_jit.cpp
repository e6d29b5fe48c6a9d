// NVRTC and the driver, both found at run time: MLX has loaded them, and a
// build of this file needs neither.

#include "mlx/backend/cuda/quantized_sdpa_jit.h"

#include <dlfcn.h>
#include <unistd.h>

#include <algorithm>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <map>
#include <mutex>

#include "mlx/backend/cuda/quantized_sdpa_host.h"

namespace mlx::core::quantized_sdpa {

namespace {

namespace fs = std::filesystem;

class Library {
 public:
  explicit Library(const char* name) : name_(name) {
    handle_ = dlopen(name, RTLD_NOW | RTLD_GLOBAL);
    if (!handle_) {
      fail(
          std::string("CUDA kernels need ") + name + "; got " + dlerror() +
          ".");
    }
  }

  template <typename F>
  F* get(const char* symbol) const {
    auto f = reinterpret_cast<F*>(dlsym(handle_, symbol));
    if (!f) {
      fail(std::string(name_) + " must have " + symbol + "; got none.");
    }
    return f;
  }

 private:
  const char* name_;
  void* handle_;
};

// What is used of NVRTC's interface, which has kept it since its first release.
struct Nvrtc {
  using Program = void*;
  // Of the CUDA that MLX is compiled for.
  Library library{CUDA_VERSION >= 13000 ? "libnvrtc.so.13" : "libnvrtc.so.12"};

  template <typename... Args>
  void call(const char* name, Args... args) const {
    int error = library.get<int(Args...)>(name)(args...);
    if (error != 0) {
      auto text = library.get<const char*(int)>("nvrtcGetErrorString")(error);
      fail(std::string(name) + " failed: " + text + ".");
    }
  }

  std::string version() const {
    int major = 0, minor = 0;
    call("nvrtcVersion", &major, &minor);
    return std::to_string(major) + "." + std::to_string(minor);
  }
};

const Nvrtc& nvrtc() {
  static const Nvrtc* instance = new Nvrtc;
  return *instance;
}

const Library& driver() {
  static const Library* library = new Library("libcuda.so.1");
  return *library;
}

template <typename... Args>
CUresult driver_result(const char* name, Args... args) {
  return driver().get<CUresult(Args...)>(name)(args...);
}

template <typename... Args>
void driver_call(const char* name, Args... args) {
  CUresult error = driver_result(name, args...);
  if (error != CUDA_SUCCESS) {
    const char* text = "unknown error";
    driver().get<CUresult(CUresult, const char**)>("cuGetErrorString")(
        error, &text);
    fail(std::string(name) + " failed: " + text + ".");
  }
}

#define DRIVER(name, ...) \
  driver_call(CUDA_SYMBOL(name) __VA_OPT__(, ) __VA_ARGS__)
#define CUDA_SYMBOL(name) CUDA_TEXT(name)
#define CUDA_TEXT(name) #name

// The kernels include these; NVRTC has no headers of its own.
constexpr const char* header_names[] = {"cstdint", "cstring", "math.h"};
constexpr const char* headers[] = {
    "#pragma once\n"
    "using uint8_t = unsigned char;\n"
    "using uint16_t = unsigned short;\n"
    "using uint32_t = unsigned int;\n"
    "using uint64_t = unsigned long long;\n"
    "using int32_t = int;\n"
    "using int64_t = long long;\n",
    "",
    ""};

std::string program_log(Nvrtc::Program program) {
  size_t size = 0;
  nvrtc().call("nvrtcGetProgramLogSize", program, &size);
  std::string log(size, '\0');
  nvrtc().call("nvrtcGetProgramLog", program, log.data());
  return log;
}

std::string architecture_of(cu::Device& device) {
  int major = device.compute_capability_major();
  std::string name =
      std::to_string(major) + std::to_string(device.compute_capability_minor());
  return "sm_" + name + (major >= 9 ? "a" : "");
}

fs::path cache_folder() {
  if (auto folder = std::getenv("MLX_QUANTIZED_SDPA_CACHE")) {
    return folder;
  }
  if (auto cache = std::getenv("XDG_CACHE_HOME")) {
    return fs::path(cache) / "mlx_quantized_sdpa";
  }
  if (auto home = std::getenv("HOME")) {
    return fs::path(home) / ".cache" / "mlx_quantized_sdpa";
  }
  return {};
}

// FNV-1a, twice with different starts: it guards against accidents only.
std::string hash_of(const std::string& text) {
  std::string name;
  for (uint64_t hash : {0xcbf29ce484222325ull, 0x9ae16a3b2f90404full}) {
    for (unsigned char c : text) {
      hash = (hash ^ c) * 0x100000001b3ull;
    }
    char part[17];
    std::snprintf(part, sizeof(part), "%016llx", (unsigned long long)hash);
    name += part;
  }
  return name;
}

// The code of a file, which begins with its hash; none where that does not fit.
std::string read_code(const fs::path& path) {
  std::ifstream file(path, std::ios::binary);
  std::string content{std::istreambuf_iterator<char>(file), {}};
  auto size = std::min(content.size(), hash_of("").size());
  auto code = content.substr(size);
  return content.substr(0, size) == hash_of(code) ? code : "";
}

// Renamed into place, so that no process sees half a file. Without a folder to
// write to, code is compiled again by the next process.
void write_code(const fs::path& path, const std::string& code) {
  std::error_code error;
  fs::create_directories(path.parent_path(), error);
  auto temporary = path;
  temporary += "." + std::to_string(getpid());
  std::ofstream file(temporary, std::ios::binary);
  file << hash_of(code) << code;
  file.close();
  if (file) {
    fs::rename(temporary, path, error);
  }
  fs::remove(temporary, error);
}

std::string compiled(const std::string& source, const std::string& arch) {
  auto folder = cache_folder();
  if (folder.empty()) {
    return compile_cuda(source, arch);
  }
  auto key = arch + nvrtc().version() + source;
  auto path = folder / (hash_of(key) + ".cubin");
  auto code = read_code(path);
  if (code.empty()) {
    code = compile_cuda(source, arch);
    write_code(path, code);
  }
  return code;
}

CudaKernel load(const std::string& code, int shared_bytes) {
  CUmodule module;
  DRIVER(cuModuleLoadData, &module, static_cast<const void*>(code.data()));
  CudaKernel kernel{};
  DRIVER(cuModuleGetFunction, &kernel.function, module, "quantized_sdpa");
  DRIVER(
      cuFuncSetAttribute,
      kernel.function,
      CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES,
      shared_bytes);
  DRIVER(
      cuFuncGetAttribute,
      &kernel.registers,
      CU_FUNC_ATTRIBUTE_NUM_REGS,
      kernel.function);
  DRIVER(
      cuFuncGetAttribute,
      &kernel.local_bytes,
      CU_FUNC_ATTRIBUTE_LOCAL_SIZE_BYTES,
      kernel.function);
  return kernel;
}

int attribute(cu::Device& device, CUdevice_attribute which) {
  int value = 0;
  DRIVER(cuDeviceGetAttribute, &value, which, device.cuda_device());
  return value;
}

} // namespace

std::string compile_cuda(const std::string& source, const std::string& arch) {
  auto& rtc = nvrtc();
  Nvrtc::Program program = nullptr;
  rtc.call(
      "nvrtcCreateProgram",
      &program,
      source.c_str(),
      "quantized_sdpa.cu",
      int(std::size(headers)),
      headers,
      header_names);
  auto target = "--gpu-architecture=" + arch;
  const char* options[] = {
      target.c_str(), "--std=c++20", "--device-as-default-execution-space"};
  try {
    rtc.call("nvrtcCompileProgram", program, int(std::size(options)), options);
  } catch (const std::runtime_error& error) {
    auto log = program_log(program);
    rtc.call("nvrtcDestroyProgram", &program);
    throw std::runtime_error(error.what() + ("\n" + log));
  }
  size_t size = 0;
  rtc.call("nvrtcGetCUBINSize", program, &size);
  std::string code(size, '\0');
  rtc.call("nvrtcGetCUBIN", program, code.data());
  rtc.call("nvrtcDestroyProgram", &program);
  return code;
}

const CudaKernel& cuda_kernel_of(
    cu::Device& device,
    const char* source,
    const std::string& instance,
    int shared_bytes) {
  static std::mutex mutex;
  // Never destroyed: the driver may be gone when the process ends.
  static auto* kernels =
      new std::map<std::tuple<int, const char*, std::string>, CudaKernel>;
  std::lock_guard lock(mutex);
  auto key = std::tuple(device.cuda_device(), source, instance);
  auto found = kernels->find(key);
  if (found == kernels->end()) {
    device.make_current();
    auto code = compiled(source + instance, architecture_of(device));
    found = kernels->emplace(key, load(code, shared_bytes)).first;
  }
  return found->second;
}

void clear_cuda(cu::CommandEncoder& encoder, void* data, size_t words) {
  encoder.device().make_current();
  DRIVER(
      cuMemsetD32Async,
      reinterpret_cast<CUdeviceptr>(data),
      0u,
      words,
      static_cast<CUstream>(static_cast<cudaStream_t>(encoder.stream())));
}

void wait_for_cuda(cu::Device& device) {
  device.make_current();
  DRIVER(cuCtxSynchronize);
}

int cuda_shared_limit(cu::Device& device) {
  return attribute(
      device, CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN);
}

int cuda_multiprocessors(cu::Device& device) {
  return attribute(device, CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT);
}

} // namespace mlx::core::quantized_sdpa
