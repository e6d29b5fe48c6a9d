// Kernels compiled at their first use: formats, types and sizes have far too
// many combinations to be compiled ahead.

#pragma once

#include <string>

#include "mlx/backend/cuda/device.h"

namespace mlx::core::quantized_sdpa {

struct CudaKernel {
  CUfunction function;
  int registers;
  // Of local memory a thread; above 0 where registers were spilled.
  int local_bytes;
};

// The kernel `quantized_sdpa` of `source` followed by `instance`, for the
// device and with that much shared memory. Compiled code is kept in memory and
// in a folder of the user's.
const CudaKernel& cuda_kernel_of(
    cu::Device& device,
    const char* source,
    const std::string& instance,
    int shared_bytes);

// Compiled code for an architecture such as "sm_90a"; needs no GPU.
std::string compile_cuda(const std::string& source, const std::string& arch);

// Zeros on the encoder's stream, before all that is not yet submitted.
void clear_cuda(cu::CommandEncoder& encoder, void* data, size_t words);

// For all that has been submitted to the device.
void wait_for_cuda(cu::Device& device);

int cuda_shared_limit(cu::Device& device);
int cuda_multiprocessors(cu::Device& device);

// The text of the decode kernel, all its headers put in place.
const char* decode_source();

} // namespace mlx::core::quantized_sdpa
