# The CPU kernels, compiled once for each instruction set from one source. They
# see no MLX header and take no part in LTO: an inline function that two targets
# share could otherwise reach an older processor with newer instructions.
function(add_quantized_sdpa_kernels target)
  set(flags_portable "")
  set(flags_neon "")
  set(flags_avx2 -mavx2 -mfma -mf16c)
  set(flags_avx512 -mavx512f -mavx512bw -mavx512vl -mavx512dq -mfma -mf16c)

  set(architecture "${CMAKE_SYSTEM_PROCESSOR}")
  if(CMAKE_OSX_ARCHITECTURES)
    set(architecture "${CMAKE_OSX_ARCHITECTURES}")
  endif()
  if(architecture MATCHES "^(x86_64|AMD64)$")
    set(instruction_sets portable avx2 avx512)
  elseif(architecture MATCHES "^(aarch64|arm64)$")
    set(instruction_sets neon)
  else()
    set(instruction_sets portable)
  endif()

  set(optimize -O3)
  if(QUANTIZED_SDPA_SANITIZE OR CMAKE_BUILD_TYPE STREQUAL "Debug")
    set(optimize -O1) # sanitized kernels take minutes to compile at -O3
  endif()

  set(source_dir ${CMAKE_CURRENT_FUNCTION_LIST_DIR})
  foreach(name ${instruction_sets})
    set(library quantized_sdpa_kernels_${name})
    add_library(${library} OBJECT ${source_dir}/quantized_sdpa_kernels.cpp)
    target_include_directories(${library} PRIVATE ${source_dir}/../../..)
    target_compile_definitions(${library} PRIVATE QUANTIZED_SDPA_TARGET=${name})
    # GCC takes the undefined operand in its own AVX-512 header for a mistake.
    target_compile_options(
      ${library}
      PRIVATE ${optimize} -fno-math-errno -ffp-contract=fast -fno-lto
              $<$<CXX_COMPILER_ID:GNU>:-Wno-maybe-uninitialized>
              ${flags_${name}})
    target_sources(${target} PRIVATE $<TARGET_OBJECTS:${library}>)
  endforeach()
endfunction()
