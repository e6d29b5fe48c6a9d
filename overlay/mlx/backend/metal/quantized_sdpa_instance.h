// Which instance of a Metal kernel a call needs, and what it is called. Plain
// text: no Metal header, so that other systems can check it.

#pragma once

#include <string>
#include <unordered_set>

#include "mlx/quantized_sdpa_plan.h"

namespace mlx::core::quantized_sdpa {

enum class MetalType { f32, f16, bf16, u8 };

struct MetalOperand {
  KVFormat format;
  int dim;
  MetalType scales;
  // Of the scales where the format has no biases.
  MetalType biases;
};

struct MetalInstance {
  MetalKernel kernel;
  // Of q and the result.
  MetalType type;
  MetalOperand k;
  MetalOperand v;
  int rows;
  int keys;
  int simdgroups;
};

MetalInstance make_metal_instance(
    const MetalPlan& plan,
    MetalType type,
    const MetalOperand& k,
    const MetalOperand& v);

// A kernel as the library names it, and the C++ name that makes it.
struct MetalName {
  std::string name;
  std::string function;
};

MetalName metal_name(const MetalInstance& instance);
// The second pass of a plan with splits.
MetalName metal_merge_name(MetalType type, int dim);

// The kernels that MLX's own build compiles ahead of time.
const std::unordered_set<std::string>& metal_prebuilt_names();

// The line that makes a library hold the kernel.
std::string metal_instantiation(const MetalName& name);

} // namespace mlx::core::quantized_sdpa
