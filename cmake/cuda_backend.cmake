# The CUDA backend: host code only, for its kernels are compiled where they run.
# CUDA's headers come from the Python package index or from the system; what MLX
# and the driver have is found when the module is loaded.
find_path(
  CUDA_INCLUDE cuda_runtime.h
  HINTS "${Python_SITELIB}/nvidia/cu13/include"
  PATHS ENV CUDA_HOME ENV CUDA_PATH /usr/local/cuda
  PATH_SUFFIXES include REQUIRED)

set(decode_source "${CMAKE_CURRENT_BINARY_DIR}/quantized_sdpa_decode.cpp")
file(GLOB headers CONFIGURE_DEPENDS overlay/mlx/backend/cuda/*.cuh
     overlay/mlx/backend/cuda/*.h overlay/mlx/backend/common/*.h)
add_custom_command(
  OUTPUT "${decode_source}"
  COMMAND
    "${Python_EXECUTABLE}" "${CMAKE_CURRENT_SOURCE_DIR}/cmake/flatten_cuda.py"
    "${CMAKE_CURRENT_SOURCE_DIR}/overlay"
    mlx/backend/cuda/quantized_sdpa_decode.cuh decode_source >
    "${decode_source}"
  DEPENDS ${headers} cmake/flatten_cuda.py cmake/flatten_metal.py
  VERBATIM)

target_sources(
  _ext
  PRIVATE overlay/mlx/backend/cuda/quantized_sdpa.cpp
          overlay/mlx/backend/cuda/quantized_sdpa_jit.cpp "${decode_source}")
target_include_directories(_ext SYSTEM PRIVATE "${CUDA_INCLUDE}" cmake/stand_in)
target_link_libraries(_ext PRIVATE ${CMAKE_DL_LIBS})
