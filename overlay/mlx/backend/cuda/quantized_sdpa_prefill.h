// Prefill on CUDA: the instance of a kernel for many rows, its launch.

#pragma once

#include "mlx/backend/cuda/device.h"
#include "mlx/backend/cuda/quantized_sdpa_params.h"
#include "mlx/quantized_sdpa_plan.h"

namespace mlx::core::quantized_sdpa {

// How K or V is stored.
struct PrefillFormat {
  // The codec's name in C++.
  const char* codec;
  int bits;
  int group_size;
  Scalar scale_type;
  Scalar bias_type;
};

struct PrefillTypes {
  Scalar q;
  PrefillFormat k;
  PrefillFormat v;
};

// False where the plan or the codes' layout leaves the call to the decode
// kernel, which takes any number of queries. The outputs are set for the first
// launch already.
bool launch_prefill(
    cu::CommandEncoder& encoder,
    const Problem& problem,
    const CudaDevice& device,
    const PrefillTypes& types,
    CudaParams params,
    std::vector<array>& outputs);

// The text of the prefill kernels, all their headers put in place.
const char* prefill_wgmma_source();

} // namespace mlx::core::quantized_sdpa
