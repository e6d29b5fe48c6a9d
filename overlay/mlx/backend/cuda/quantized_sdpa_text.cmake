# Writes the C++ source of a function that returns the text of a header, with
# its own includes put in place, each once. NVRTC sees no include path. cmake
# -DROOT=.. -DHEADER=.. -DFUNCTION=.. -DOUTPUT=.. -P quantized_sdpa_text.cmake
cmake_minimum_required(VERSION 3.25)

function(flatten header result)
  get_property(seen GLOBAL PROPERTY seen_headers)
  if(header IN_LIST seen)
    set(${result}
        ""
        PARENT_SCOPE)
    return()
  endif()
  set_property(GLOBAL APPEND PROPERTY seen_headers "${header}")

  file(READ "${ROOT}/${header}" text)
  string(REPLACE "#pragma once\n" "" text "${text}")
  while(text MATCHES "(#include \"(mlx/[^\"]+)\"\n)")
    set(line "${CMAKE_MATCH_1}")
    set(included "${CMAKE_MATCH_2}")
    flatten("${included}" content)
    string(FIND "${text}" "${line}" begin)
    string(LENGTH "${line}" length)
    math(EXPR end "${begin} + ${length}")
    string(SUBSTRING "${text}" 0 ${begin} before)
    string(SUBSTRING "${text}" ${end} -1 after)
    set(text "${before}${content}${after}")
  endwhile()
  set(${result}
      "${text}"
      PARENT_SCOPE)
endfunction()

flatten("${HEADER}" text)
file(
  WRITE "${OUTPUT}"
  "namespace mlx::core::quantized_sdpa {\n\nconst char* ${FUNCTION}() {\n"
  "  return R\"cuda(${text})cuda\";\n}\n\n} // namespace mlx::core::quantized_sdpa\n"
)
