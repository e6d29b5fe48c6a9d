#include "mlx/backend/cuda/quantized_sdpa_prefill.h"

#include <cstdint>
#include <map>
#include <sstream>
#include <string>
#include <tuple>

#include "mlx/backend/cuda/quantized_sdpa_host.h"

namespace mlx::core::quantized_sdpa {

namespace {

std::string format_text(const PrefillFormat& x) {
  std::ostringstream text;
  text << "StoredAs<" << x.codec << ", " << x.group_size << ", "
       << scalar_name(x.scale_type) << ", " << scalar_name(x.bias_type) << ">";
  return text.str();
}

std::string config_text(
    const Problem& problem,
    const PrefillTypes& types,
    const CudaPrefillPlan& plan,
    bool paged) {
  std::ostringstream text;
  bool wgmma = plan.kernel == CudaPrefillKernel::wgmma;
  text << (wgmma ? "PrefillWgmma<" : "PrefillMma<") << format_text(types.k)
       << ", " << format_text(types.v) << ", " << scalar_name(types.q) << ", "
       << problem.k_dim << ", ";
  if (wgmma) {
    text << plan.keys << ", " << plan.stages << ", " << plan.bent << ", "
         << paged;
  } else {
    text << problem.v_dim;
  }
  text << ">";
  return text.str();
}

std::string kernel_text(
    const std::string& bounds,
    const std::string& shared,
    const std::string& call) {
  return "\nusing namespace mlx::core::quantized_sdpa;\n"
         "using namespace mlx::core::quantized_sdpa::prefill;\n"
         "extern \"C\" __global__ void __launch_bounds__(" +
      bounds +
      ")\n"
      "    quantized_sdpa(const __grid_constant__ CudaParams p) {\n" +
      shared + "  " + call + ";\n}\n";
}

std::string attention_text(const std::string& config, bool wgmma) {
  return kernel_text(
      config + "::threads, 1",
      "  extern __shared__ __align__(16) uint8_t shared[];\n",
      (wgmma ? "prefill_wgmma<" : "prefill_mma<") + config + ">(p, shared)");
}

std::string merge_text(Scalar q_type, int v_dim) {
  std::ostringstream call;
  call << "prefill_merge<" << scalar_name(q_type) << ", " << v_dim << ">(p)";
  return kernel_text(std::to_string(prefill_merge_threads), "", call.str());
}

bool rows_start_at(const CudaTensor& x, int bytes) {
  uint64_t bits = reinterpret_cast<uint64_t>(x.data);
  for (int i = 0; i < 3; ++i) {
    bits |= uint64_t(x.strides[i]);
  }
  return bits % bytes == 0;
}

bool fits_int(int64_t x) {
  return x == int32_t(x);
}

// What the wgmma kernel asks of the arrays: codes in the widest pieces that a
// unit of them has, distances between keys in 32 bits.
bool has_wide_rows(const CudaOperand& x, int bits) {
  int unit_bytes = unit_codes / 8 * bits;
  int piece = unit_bytes & -unit_bytes;
  bool fits = rows_start_at(x.codes, piece < 16 ? piece : 16) &&
      fits_int(x.codes.strides[2]);
  for (auto* t : {&x.scales, &x.biases}) {
    fits = fits && fits_int(t->strides[2]) && fits_int(t->strides[3]);
  }
  return fits;
}

// What all prefill kernels ask of codes: no gaps between the words of a row.
bool has_whole_rows(const CudaOperand& x) {
  return x.codes.strides[3] == sizeof(uint32_t);
}

struct Kernels {
  const CudaKernel* attention;
  const CudaKernel* merge;
};

// A launch finds its kernels without making their text.
Kernels& find_kernels(
    cu::Device& device,
    const Problem& problem,
    const PrefillTypes& types,
    const CudaPrefillPlan& plan,
    bool paged) {
  auto format = [](const PrefillFormat& x) {
    return std::tuple(
        uintptr_t(x.codec), x.group_size, x.scale_type, x.bias_type);
  };
  auto key = std::tuple(
      device.cuda_device(),
      types.q,
      format(types.k),
      format(types.v),
      problem.k_dim,
      problem.v_dim,
      plan.kernel,
      plan.bent,
      paged);
  static thread_local std::map<decltype(key), Kernels> found;
  auto& kernels = found[key];
  if (!kernels.attention) {
    bool wgmma = plan.kernel == CudaPrefillKernel::wgmma;
    auto config = config_text(problem, types, plan, paged);
    kernels.attention = &cuda_kernel_of(
        device,
        prefill_wgmma_source(),
        attention_text(config, wgmma),
        plan.shared_bytes);
  }
  if (plan.splits > 1 && !kernels.merge) {
    kernels.merge = &cuda_kernel_of(
        device, prefill_wgmma_source(), merge_text(types.q, problem.v_dim), 0);
  }
  return kernels;
}

} // namespace

bool launch_prefill(
    cu::CommandEncoder& encoder,
    const Problem& problem,
    const CudaDevice& device,
    const PrefillTypes& types,
    CudaParams params,
    std::vector<array>& outputs) {
  if (!has_whole_rows(params.k) || !has_whole_rows(params.v)) {
    return false;
  }
  bool bent = params.mask.data || params.softcap > 0;
  bool wide = has_wide_rows(params.k, types.k.bits) &&
      has_wide_rows(params.v, types.v.bits);
  auto plan = plan_cuda_prefill(problem, device, bent, wide);
  if (plan.kernel == CudaPrefillKernel::none) {
    return false;
  }
  auto& kernels = find_kernels(
      encoder.device(), problem, types, plan, params.block_size > 0);
  int heads = problem.batch * problem.n_kv_heads;
  int rows = problem.n_q_heads / problem.n_kv_heads * problem.q_len;
  params.work = {};
  params.work.splits = plan.splits;
  params.work.row_blocks = plan.row_blocks;
  if (plan.splits > 1) {
    int64_t n = int64_t(plan.splits) * heads * rows;
    params.work.partial_acc = temporary(encoder, n * problem.v_dim);
    params.work.partial_state = temporary(encoder, n * 2);
  }
  launch(
      encoder,
      *kernels.attention,
      params,
      plan.row_blocks * heads * plan.splits,
      plan.threads,
      plan.shared_bytes);
  if (plan.splits > 1) {
    // Or else the graph would not know that it comes after the first.
    for (auto& out : outputs) {
      encoder.set_output_array(out);
    }
    constexpr int merged_rows = prefill_merge_threads / 32;
    params.work.row_blocks = (rows + merged_rows - 1) / merged_rows;
    launch(
        encoder,
        *kernels.merge,
        params,
        params.work.row_blocks * heads,
        prefill_merge_threads,
        0);
  }
  return true;
}

} // namespace mlx::core::quantized_sdpa
