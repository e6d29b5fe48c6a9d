// clang-format off
#include "mlx/backend/metal/kernels/defines.h"
#include "mlx/backend/metal/kernels/quantized_sdpa.h"
#include "mlx/backend/metal/kernels/quantized_sdpa_instances.h"

FOR_EACH_PREBUILT_QUANTIZED_SDPA(instantiate_kernel)
// clang-format on
