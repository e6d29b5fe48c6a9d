// How a host reaches a kernel on the emulated GPU: a library that the compiler
// makes of the kernel's text.

#pragma once

#include <dlfcn.h>
#include <unistd.h>

#include <cstdlib>
#include <fstream>
#include <stdexcept>
#include <string>

namespace emulator {

// A piece of global memory.
struct Buffer {
  const char* begin;
  size_t bytes;
};

using RunGrid = void (*)(
    const void* params,
    int blocks,
    int threads,
    int shared_bytes,
    const Buffer* buffers,
    int n_buffers);

// QUANTIZED_SDPA_EMULATOR holds the compiler's command line up to the folder of
// the sources, to which source, instance and output are added.
inline RunGrid compile_grid(
    const std::string& source,
    const std::string& instance) {
  static int n_compiled = 0;
  std::string stem =
      std::string(std::getenv("QUANTIZED_SDPA_EMULATOR_FOLDER")) + "/" +
      std::to_string(getpid()) + "_" + std::to_string(n_compiled++);
  std::ofstream(stem + ".cpp") << instance;
  auto command = std::string(std::getenv("QUANTIZED_SDPA_EMULATOR")) + source +
      " -o " + stem + ".so -DINSTANCE='\"" + stem + ".cpp\"'";
  if (std::system(command.c_str()) != 0) {
    throw std::runtime_error("The emulated kernel does not compile.");
  }
  auto library = dlopen((stem + ".so").c_str(), RTLD_NOW | RTLD_LOCAL);
  auto grid =
      library ? reinterpret_cast<RunGrid>(dlsym(library, "run_grid")) : nullptr;
  if (!grid) {
    throw std::runtime_error("The emulated kernel does not load.");
  }
  return grid;
}

} // namespace emulator
