# The Metal kernels as text that mlx::core::metal::quantized_sdpa() returns: the
# wheel compiles an instance when it is first asked for.
set(QUANTIZED_SDPA_METAL_SOURCE
    "${CMAKE_CURRENT_BINARY_DIR}/quantized_sdpa_metal.cpp")
file(GLOB metal_headers CONFIGURE_DEPENDS
     "${CMAKE_CURRENT_SOURCE_DIR}/overlay/mlx/backend/common/*.h"
     "${CMAKE_CURRENT_SOURCE_DIR}/overlay/mlx/backend/metal/kernels/*.h")
add_custom_command(
  OUTPUT "${QUANTIZED_SDPA_METAL_SOURCE}"
  COMMAND
    "${Python_EXECUTABLE}" "${CMAKE_CURRENT_SOURCE_DIR}/cmake/flatten_metal.py"
    "${CMAKE_CURRENT_SOURCE_DIR}/overlay"
    mlx/backend/metal/kernels/quantized_sdpa.h quantized_sdpa >
    "${QUANTIZED_SDPA_METAL_SOURCE}"
  DEPENDS ${metal_headers} "${CMAKE_CURRENT_SOURCE_DIR}/cmake/flatten_metal.py"
  VERBATIM)
