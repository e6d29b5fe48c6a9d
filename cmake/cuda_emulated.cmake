# The CUDA backend on an emulated GPU, for tests: the CPU's streams run it.
set(rig "${CMAKE_CURRENT_SOURCE_DIR}/python_tests/cuda")
target_sources(
  _ext
  PRIVATE overlay/mlx/backend/cuda/quantized_sdpa.cpp
          overlay/mlx/backend/cuda/quantized_sdpa_counters.cpp
          overlay/mlx/backend/cuda/quantized_sdpa_prefill.cpp
          "${rig}/backend.cpp")
target_include_directories(_ext BEFORE PRIVATE "${rig}/include")
target_link_libraries(_ext PRIVATE ${CMAKE_DL_LIBS})
