set(optimize -O3)
if(QUANTIZED_SDPA_SANITIZE)
  set(optimize -O1) # sanitized kernels take minutes to compile at -O3
endif()

# The CPU kernels, compiled once for each instruction set from one source. They
# see no MLX header and take no part in LTO: an inline function that two targets
# share could otherwise reach an older processor with newer instructions.
function(add_kernel_target name)
  set(library quantized_sdpa_kernels_${name})
  add_library(${library} OBJECT
              overlay/mlx/backend/cpu/quantized_sdpa_kernels.cpp)
  target_include_directories(${library} PRIVATE overlay)
  target_compile_definitions(${library} PRIVATE QUANTIZED_SDPA_TARGET=${name})
  # GCC takes the undefined operand in its own AVX-512 header for a mistake.
  target_compile_options(
    ${library}
    PRIVATE ${optimize} -fno-math-errno -ffp-contract=fast -fno-lto
            $<$<CXX_COMPILER_ID:GNU>:-Wno-maybe-uninitialized> ${ARGN})
  set(QUANTIZED_SDPA_KERNELS
      ${QUANTIZED_SDPA_KERNELS} ${library}
      PARENT_SCOPE)
endfunction()

set(architecture "${CMAKE_SYSTEM_PROCESSOR}")
if(CMAKE_OSX_ARCHITECTURES)
  set(architecture "${CMAKE_OSX_ARCHITECTURES}")
endif()

if(architecture MATCHES "^(x86_64|AMD64)$")
  add_kernel_target(portable)
  add_kernel_target(avx2 -mavx2 -mfma -mf16c)
  add_kernel_target(
    avx512
    -mavx512f
    -mavx512bw
    -mavx512vl
    -mavx512dq
    -mfma
    -mf16c)
elseif(architecture MATCHES "^(aarch64|arm64)$")
  add_kernel_target(neon)
else()
  add_kernel_target(portable)
endif()
