# The CUDA backend: host code, and the text of each kernel as a C++ function
# that returns it. Kernels are compiled at their first use, as formats, types
# and sizes have far too many combinations to be compiled ahead.
function(add_quantized_sdpa_cuda target)
  set(source_dir ${CMAKE_CURRENT_FUNCTION_LIST_DIR})
  file(
    GLOB
    headers
    CONFIGURE_DEPENDS
    ${source_dir}/quantized_sdpa*.h
    ${source_dir}/quantized_sdpa*.cuh
    ${source_dir}/../common/kv_codec.h
    ${source_dir}/../common/softmax_state.h
    ${source_dir}/../common/visible_keys.h)
  set(texts "")
  foreach(kernel ${ARGN})
    set(text ${CMAKE_CURRENT_BINARY_DIR}/quantized_sdpa_${kernel}.cpp)
    add_custom_command(
      OUTPUT ${text}
      COMMAND
        ${CMAKE_COMMAND} -DROOT=${source_dir}/../../..
        -DHEADER=mlx/backend/cuda/quantized_sdpa_${kernel}.cuh
        -DFUNCTION=${kernel}_source -DOUTPUT=${text} -P
        ${source_dir}/quantized_sdpa_text.cmake
      DEPENDS ${headers} ${source_dir}/quantized_sdpa_text.cmake
      VERBATIM)
    list(APPEND texts ${text})
  endforeach()
  add_custom_target(quantized_sdpa_cuda_texts DEPENDS ${texts})
  add_dependencies(${target} quantized_sdpa_cuda_texts)
  target_sources(
    ${target}
    PRIVATE ${source_dir}/quantized_sdpa.cpp
            ${source_dir}/quantized_sdpa_counters.cpp
            ${source_dir}/quantized_sdpa_jit.cpp
            ${source_dir}/quantized_sdpa_prefill.cpp
            ${texts})
endfunction()
