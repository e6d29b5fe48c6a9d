// libnvrtc.so.13: the real one, and what it compiled is remembered.
// QUANTIZED_SDPA_NVRTC names its file.

#include <dlfcn.h>
#include <nvrtc.h>

#include <cstdlib>
#include <map>

#include "stand_in.h"

namespace {

template <typename F>
F* real(F*, const char* name) {
  // It must find its own functions, not these.
  static void* library = dlopen(
      std::getenv("QUANTIZED_SDPA_NVRTC"),
      RTLD_NOW | RTLD_LOCAL | RTLD_DEEPBIND);
  if (!library) {
    stand_in::fail(dlerror());
  }
  return reinterpret_cast<F*>(dlsym(library, name));
}

#define REAL(name) real(name, #name)

std::map<nvrtcProgram, std::string>& sources() {
  static auto* instance = new std::map<nvrtcProgram, std::string>;
  return *instance;
}

} // namespace

extern "C" {

nvrtcResult nvrtcCreateProgram(
    nvrtcProgram* program,
    const char* source,
    const char* name,
    int n_headers,
    const char* const* headers,
    const char* const* header_names) {
  auto result = REAL(nvrtcCreateProgram)(
      program, source, name, n_headers, headers, header_names);
  sources()[*program] = source;
  return result;
}

nvrtcResult nvrtcGetCUBIN(nvrtcProgram program, char* code) {
  size_t size = 0;
  REAL(nvrtcGetCUBINSize)(program, &size);
  auto result = REAL(nvrtcGetCUBIN)(program, code);
  stand_in::keep_source(std::string(code, size), sources()[program]);
  return result;
}

nvrtcResult
nvrtcCompileProgram(nvrtcProgram program, int n, const char* const* options) {
  return REAL(nvrtcCompileProgram)(program, n, options);
}

nvrtcResult nvrtcDestroyProgram(nvrtcProgram* program) {
  return REAL(nvrtcDestroyProgram)(program);
}

nvrtcResult nvrtcGetCUBINSize(nvrtcProgram program, size_t* size) {
  return REAL(nvrtcGetCUBINSize)(program, size);
}

nvrtcResult nvrtcGetProgramLog(nvrtcProgram program, char* log) {
  return REAL(nvrtcGetProgramLog)(program, log);
}

nvrtcResult nvrtcGetProgramLogSize(nvrtcProgram program, size_t* size) {
  return REAL(nvrtcGetProgramLogSize)(program, size);
}

const char* nvrtcGetErrorString(nvrtcResult result) {
  return REAL(nvrtcGetErrorString)(result);
}

nvrtcResult nvrtcVersion(int* major, int* minor) {
  return REAL(nvrtcVersion)(major, minor);
}
}
