// Counters by which the blocks of a launch find out which of them is the last.

#pragma once

#include <cstdint>

#include "mlx/backend/cuda/device.h"

namespace mlx::core::quantized_sdpa {

// n zeros that no launch in flight uses; a launch leaves them as zeros.
uint32_t* take_counters(cu::CommandEncoder& encoder, const Stream& s, int n);

} // namespace mlx::core::quantized_sdpa
