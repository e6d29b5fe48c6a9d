#include "mlx/backend/metal/quantized_sdpa_instance.h"

#include <sstream>
#include <stdexcept>

#include "mlx/backend/metal/kernels/quantized_sdpa_instances.h"

namespace mlx::core::quantized_sdpa {

namespace {

struct TypeNames {
  const char* name;
  const char* metal;
};

TypeNames names_of(MetalType type) {
  switch (type) {
    case MetalType::f32:
      return {"float32", "float"};
    case MetalType::f16:
      return {"float16", "half"};
    case MetalType::bf16:
      return {"bfloat16", "bfloat"};
    case MetalType::u8:
      return {"uint8", "uint8_t"};
  }
  throw std::invalid_argument("[metal_name] Unknown type.");
}

std::string codec_of(const KVFormat& format) {
  auto bits = std::to_string(format.bits);
  switch (format.mode) {
    case KVMode::Affine:
      return "Affine<" + bits + ", " + std::to_string(format.group_size) + ">";
    case KVMode::Mxfp4:
      return "Mxfp4";
    case KVMode::Mxfp8:
      return "Mxfp8";
    case KVMode::Nvfp4:
      return "Nvfp4";
    case KVMode::Turbo:
      return "Turbo<" + bits + ">";
  }
  throw std::invalid_argument("[metal_name] Unknown format.");
}

std::string operand_name(const MetalOperand& x) {
  std::string name = format_name(x.format) + "_" + std::to_string(x.dim) + "_" +
      names_of(x.scales).name;
  return x.format.mode == KVMode::Affine ? name + "_" + names_of(x.biases).name
                                         : name;
}

std::string operand_type(const MetalOperand& x) {
  return "mlx::core::quantized_sdpa::KVOperand<mlx::core::kv::" +
      codec_of(x.format) + ", " + names_of(x.scales).metal + ", " +
      names_of(x.biases).metal + ", " + std::to_string(x.dim) + ">";
}

} // namespace

MetalInstance make_metal_instance(
    const MetalPlan& plan,
    MetalType type,
    const MetalOperand& k,
    const MetalOperand& v) {
  return {plan.kernel, type, k, v, plan.rows, plan.keys, plan.simdgroups};
}

MetalName metal_name(const MetalInstance& x) {
  bool vector = x.kernel == MetalKernel::vector;
  std::string kernel =
      vector ? "quantized_sdpa_vector" : "quantized_sdpa_steel";
  std::ostringstream name;
  name << kernel << "_" << names_of(x.type).name << "_k_" << operand_name(x.k)
       << "_v_" << operand_name(x.v);
  std::ostringstream function;
  function << kernel << "<" << names_of(x.type).metal << ", "
           << operand_type(x.k) << ", " << operand_type(x.v);
  if (vector) {
    name << "_rows" << x.rows;
    function << ", " << x.rows << ">";
  } else {
    name << "_rows" << x.rows << "_keys" << x.keys;
    function << ", " << x.simdgroups << ", " << x.keys << ">";
  }
  return {name.str(), function.str()};
}

MetalName metal_merge_name(MetalType type, int dim) {
  auto size = std::to_string(dim);
  return {
      std::string("quantized_sdpa_merge_") + names_of(type).name + "_" + size,
      std::string("quantized_sdpa_merge<") + names_of(type).metal + ", " +
          size + ">"};
}

const std::unordered_set<std::string>& metal_prebuilt_names() {
#define PREBUILT_NAME(name, ...) name,
  static const std::unordered_set<std::string> names = {
      FOR_EACH_PREBUILT_QUANTIZED_SDPA(PREBUILT_NAME)};
#undef PREBUILT_NAME
  return names;
}

std::string metal_instantiation(const MetalName& x) {
  return "\ntemplate [[host_name(\"" + x.name + "\")]] [[kernel]] decltype(" +
      x.function + ") " + x.function + ";\n";
}

} // namespace mlx::core::quantized_sdpa
