// The wheel's extension module: MLX's own build calls the same init function
// from its module instead.

#include <nanobind/nanobind.h>

#include "mlx/dtype.h"

namespace nb = nanobind;

void init_fast_quantized(nb::module_& m);

NB_MODULE(_ext, m) {
  init_fast_quantized(m);
  // Callable only if this module and MLX share nanobind's type registry.
  m.def("_shares_types_with_mlx", [](const mlx::core::Dtype&) { return true; });
}
