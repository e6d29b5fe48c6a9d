# CUDA's headers come from the Python package index or from the system; what MLX
# and the driver have is found when the module is loaded.
find_path(
  CUDA_INCLUDE cuda_runtime.h
  HINTS "${Python_SITELIB}/nvidia/cu13/include"
  PATHS ENV CUDA_HOME ENV CUDA_PATH /usr/local/cuda
  PATH_SUFFIXES include REQUIRED)
include(overlay/mlx/backend/cuda/quantized_sdpa.cmake)
add_quantized_sdpa_cuda(_ext decode prefill_wgmma)
target_link_libraries(_ext PRIVATE ${CMAKE_DL_LIBS})
target_include_directories(_ext SYSTEM PRIVATE "${CUDA_INCLUDE}" cmake/stand_in)
