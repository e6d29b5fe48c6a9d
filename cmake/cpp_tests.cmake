# The C++ tests, which MLX's own test program would hold, on the extension's
# sources without its bindings: cmake --build . --target quantized_sdpa_tests
find_path(DOCTEST_INCLUDE doctest/doctest.h)
if(NOT DOCTEST_INCLUDE)
  add_custom_target(
    quantized_sdpa_tests
    COMMAND
      ${CMAKE_COMMAND} -E echo
      "doctest is missing: apt-get install doctest-dev, or brew install it"
    COMMAND ${CMAKE_COMMAND} -E false)
  return()
endif()

get_target_property(sources _ext SOURCES)
list(FILTER sources EXCLUDE REGEX "python/")
file(GLOB tests CONFIGURE_DEPENDS
     "${CMAKE_CURRENT_SOURCE_DIR}/overlay/tests/*.cpp")
list(GET tests 0 first)
set_source_files_properties(
  "${first}" PROPERTIES COMPILE_DEFINITIONS DOCTEST_CONFIG_IMPLEMENT_WITH_MAIN)

add_executable(quantized_sdpa_tests EXCLUDE_FROM_ALL ${tests} ${sources})
get_target_property(definitions _ext COMPILE_DEFINITIONS)
target_compile_definitions(quantized_sdpa_tests PRIVATE ${definitions})
target_include_directories(quantized_sdpa_tests PRIVATE overlay
                                                        "${DOCTEST_INCLUDE}")
target_compile_options(quantized_sdpa_tests PRIVATE -O0)
target_link_libraries(quantized_sdpa_tests PRIVATE mlx)
get_target_property(libmlx mlx LOCATION)
cmake_path(GET libmlx PARENT_PATH libmlx)
set_target_properties(
  quantized_sdpa_tests PROPERTIES BUILD_WITH_INSTALL_RPATH OFF BUILD_RPATH
                                                               "${libmlx}")
