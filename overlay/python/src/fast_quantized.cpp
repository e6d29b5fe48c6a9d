#include <nanobind/nanobind.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/variant.h>
#include <nanobind/stl/vector.h>

#include "mlx/quantized_sdpa.h"

namespace mx = mlx::core;
namespace nb = nanobind;
using namespace nb::literals;

namespace {

using OptionalArray = std::optional<mx::array>;
using OptionalInt = std::optional<int>;
using OptionalString = std::optional<std::string>;
using Mask = std::variant<std::monostate, std::string, mx::array>;

struct Formats {
  OptionalInt group_size, bits;
  OptionalString mode;
};

#define QUANTIZED_SDPA_SIGNATURE(POSITIONALS, BIASES)                    \
  "def quantized_scaled_dot_product_attention(q: array, " POSITIONALS    \
  ", *, " BIASES                                                         \
  "scale: float, mask: str | array | None = None, "                      \
  "sinks: array | None = None, causal: bool = False, "                   \
  "group_size: int | None = None, bits: int | None = None, "             \
  "mode: str | None = None, k_group_size: int | None = None, "           \
  "k_bits: int | None = None, k_mode: str | None = None, "               \
  "v_group_size: int | None = None, v_bits: int | None = None, "         \
  "v_mode: str | None = None, k_codebook: array | None = None, "         \
  "v_codebook: array | None = None, left_padding: array | None = None, " \
  "lengths: array | None = None, block_table: array | None = None, "     \
  "window_size: int | None = None, softcap: float | None = None, "       \
  "return_lse: bool = False, force_fused: bool = False, "                \
  "stream: StreamOrDevice = None) -> array | tuple[array, array]"

constexpr const char* doc = R"pbdoc(
Attention that reads a quantized KV cache inside the kernel.

Neither the dequantized cache nor the score matrix is ever in memory. Softmax
and sums are in float32. K and V may have different formats and head dims.

Two call forms: ``(q, *mx.quantize(k), *mx.quantize(v), scale=...)`` with
biases (``None`` allowed), and ``(q, k, k_scales, v, v_scales, scale=...)`` for
formats without.

Args:
  q (array): ``[B, N_q, T_q, D]`` in float16, bfloat16 or float32.
  k, v (array): uint32 codes ``[B, N_kv, T_kv, D * bits / 32]`` as
    :func:`quantize` packs them; any strides but on the last axis, so that
    ``cache[..., :offset, :]`` is read where it lies. ``N_q`` is a multiple of
    ``N_kv``.
  k_scales, v_scales (array): ``[B, N_kv, T_kv, D / group_size]``: any float
    dtype for affine, uint8 for ``mxfp4``, ``mxfp8`` and ``nvfp4``, one float a
    token (``[B, N_kv, T_kv]`` or ``[..., 1]``) for the turbo modes.
  k_biases, v_biases (array, optional): affine only, shaped as the scales.
  scale (float): Multiplies the scores, usually ``1 / sqrt(D)``.
  mask (str or array, optional): ``"causal"``, a bool array (``True`` keeps) or
    an additive one, broadcastable to ``[B, N_q, T_q, T_kv]``.
  sinks (array, optional): ``[N_q]``, a logit a head that takes probability
    and gives no value.
  causal (bool): Lower-right aligned causal mask; an array mask applies too.
  group_size, bits, mode (optional): Format of both operands, as in
    :func:`quantize`: ``affine`` (the default where biases are given; bits 1, 2,
    3, 4, 5, 6, 8 and groups of 32, 64, 128), ``mxfp4`` (the default without
    biases), ``mxfp8``, ``nvfp4``, ``turbo2``, ``turbo3``, ``turbo4``.
  k_group_size, k_bits, k_mode, v_group_size, v_bits, v_mode (optional): Format
    of one operand, over the above.
  k_codebook, v_codebook (array, optional): float32 ``[2 ** bits]``, ascending:
    the table of a turbo mode. Default: Lloyd-Max levels of N(0, 1).
  left_padding, lengths (array, optional): int32 ``[B]``; keys before the one
    and from the other on do not exist for that sequence. ``causal`` is then
    aligned to the sequence's end. Values are clamped.
  block_table (array, optional): int32 ``[B, max_blocks]``; K and V are then a
    pool ``[n_blocks, N_kv, block, ...]``. Needs ``lengths``.
  window_size (int, optional): With causal: a query sees its own position and
    the ``window_size - 1`` before it.
  softcap (float, optional): Scores become ``softcap * tanh(score / softcap)``
    before the mask.
  return_lse (bool): Also return the log-sum-exp of the scaled, masked scores
    with the sink, float32 ``[B, N_q, T_q]``.
  force_fused (bool): Raise, with the reason, where no fused kernel exists.
    Default: a chunked composition of MLX ops serves those cases.

Returns:
  array or tuple(array, array): ``[B, N_q, T_q, D_v]`` in the dtype of ``q``;
  rows with no visible key are zero and have a log-sum-exp of ``-inf``.

Raises:
  ValueError: Where an argument is not as above; nothing has run then.

NaN in ``q``, in K or in a mask makes NaN of the output and the log-sum-exp of
the rows that see it, and of no others; so does infinity in a mask that is added,
other than ``-inf``. NaN or infinity in V spoils the output of the rows that see
it, perhaps of others with the same KV head and sequence, and no log-sum-exp. What
an infinite ``q``, or scale or bias of K, makes of the rows that see it is not
defined. A key that no query may see, by ``left_padding``, ``lengths``, ``causal``
and ``window_size``, is as if it were not there, whatever it holds; one that a
bool mask hides is so in K, and in V as long as that is finite.

The turbo formats follow TurboQuant (arXiv 2504.19874), the ``mx`` formats the
OCP Microscaling specification 1.0.
)pbdoc";

struct Call {
  mx::array q;
  mx::fast::QuantizedKV k, v;
};

// Q, *quantize(K), *quantize(V).
Call call_with_biases(
    mx::array q,
    mx::array k,
    mx::array k_scales,
    OptionalArray k_biases,
    mx::array v,
    mx::array v_scales,
    OptionalArray v_biases) {
  return {q, {k, k_scales, k_biases}, {v, v_scales, v_biases}};
}

Call call_without_biases(
    mx::array q,
    mx::array k,
    mx::array k_scales,
    mx::array v,
    mx::array v_scales,
    OptionalArray k_biases,
    OptionalArray v_biases) {
  return {q, {k, k_scales, k_biases}, {v, v_scales, v_biases}};
}

void set_format(
    mx::fast::QuantizedKV& x,
    const Formats& own,
    const Formats& both,
    const OptionalArray& codebook) {
  x.group_size = own.group_size ? own.group_size : both.group_size;
  x.bits = own.bits ? own.bits : both.bits;
  x.mode = own.mode ? own.mode : both.mode;
  x.codebook = codebook;
}

nb::object run(
    const Call& call,
    mx::fast::QuantizedAttentionOptions& options,
    const Mask& mask,
    mx::StreamOrDevice s) {
  if (auto* array = std::get_if<mx::array>(&mask)) {
    options.mask = *array;
  } else if (auto* name = std::get_if<std::string>(&mask)) {
    options.mask_mode = *name;
  }
  auto outputs = mx::fast::quantized_scaled_dot_product_attention(
      call.q, call.k, call.v, options, s);
  return outputs.size() == 1 ? nb::cast(outputs[0])
                             : nb::make_tuple(outputs[0], outputs[1]);
}

// One overload: the arrays of `make_call`, then what both forms share.
template <typename... Arrays>
auto entry(Call (*make_call)(Arrays...)) {
  return [make_call](
             Arrays... arrays,
             float scale,
             const Mask& mask,
             const OptionalArray& sinks,
             bool causal,
             OptionalInt group_size,
             OptionalInt bits,
             const OptionalString& mode,
             OptionalInt k_group_size,
             OptionalInt k_bits,
             const OptionalString& k_mode,
             OptionalInt v_group_size,
             OptionalInt v_bits,
             const OptionalString& v_mode,
             const OptionalArray& k_codebook,
             const OptionalArray& v_codebook,
             const OptionalArray& left_padding,
             const OptionalArray& lengths,
             const OptionalArray& block_table,
             OptionalInt window_size,
             std::optional<float> softcap,
             bool return_lse,
             bool force_fused,
             mx::StreamOrDevice s) {
    auto call = make_call(arrays...);
    Formats both{group_size, bits, mode};
    set_format(call.k, {k_group_size, k_bits, k_mode}, both, k_codebook);
    set_format(call.v, {v_group_size, v_bits, v_mode}, both, v_codebook);
    mx::fast::QuantizedAttentionOptions options{
        .scale = scale,
        .causal = causal,
        .sinks = sinks,
        .left_padding = left_padding,
        .lengths = lengths,
        .block_table = block_table,
        .window_size = window_size,
        .softcap = softcap,
        .return_lse = return_lse,
        .force_fused = force_fused};
    return run(call, options, mask, s);
  };
}

template <typename... Arrays, typename... Names>
void define(
    nb::module_& m,
    Call (*make_call)(Arrays...),
    const char* signature,
    Names... names) {
  m.def(
      "quantized_scaled_dot_product_attention",
      entry(make_call),
      names...,
      "scale"_a,
      "mask"_a = nb::none(),
      "sinks"_a = nb::none(),
      "causal"_a = false,
      "group_size"_a = nb::none(),
      "bits"_a = nb::none(),
      "mode"_a = nb::none(),
      "k_group_size"_a = nb::none(),
      "k_bits"_a = nb::none(),
      "k_mode"_a = nb::none(),
      "v_group_size"_a = nb::none(),
      "v_bits"_a = nb::none(),
      "v_mode"_a = nb::none(),
      "k_codebook"_a = nb::none(),
      "v_codebook"_a = nb::none(),
      "left_padding"_a = nb::none(),
      "lengths"_a = nb::none(),
      "block_table"_a = nb::none(),
      "window_size"_a = nb::none(),
      "softcap"_a = nb::none(),
      "return_lse"_a = false,
      "force_fused"_a = false,
      "stream"_a = nb::none(),
      nb::sig(signature),
      doc);
}

} // namespace

void init_fast_quantized(nb::module_& m) {
  define(
      m,
      call_with_biases,
      QUANTIZED_SDPA_SIGNATURE(
          "k: array, k_scales: array, k_biases: array | None, v: array, "
          "v_scales: array, v_biases: array | None",
          ""),
      "q"_a,
      "k"_a,
      "k_scales"_a,
      "k_biases"_a.none(),
      "v"_a,
      "v_scales"_a,
      "v_biases"_a.none(),
      nb::kw_only());
  define(
      m,
      call_without_biases,
      QUANTIZED_SDPA_SIGNATURE(
          "k: array, k_scales: array, v: array, v_scales: array",
          "k_biases: array | None = None, v_biases: array | None = None, "),
      "q"_a,
      "k"_a,
      "k_scales"_a,
      "v"_a,
      "v_scales"_a,
      nb::kw_only(),
      "k_biases"_a = nb::none(),
      "v_biases"_a = nb::none());
}
