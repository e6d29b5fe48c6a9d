// All kernels of quantized attention, for the library that is compiled from
// source when an instance is first asked for.

#pragma once

#include "mlx/backend/metal/kernels/quantized_sdpa_merge.h"
#include "mlx/backend/metal/kernels/quantized_sdpa_steel.h"
#include "mlx/backend/metal/kernels/quantized_sdpa_vector.h"
