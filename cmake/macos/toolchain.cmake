# Compiles for arm64 macOS 14 on another system, by zig, and links by ld64.lld:
# zig's own linker would add a second C++ library. Expects ziglang in the Python
# that HOST_PYTHON names, and in MACOS_FOLDER what scripts/wheel_macos.py puts
# there.
set(CMAKE_SYSTEM_NAME Darwin)
set(CMAKE_SYSTEM_PROCESSOR arm64)
set(CMAKE_OSX_ARCHITECTURES arm64)
set(CMAKE_OSX_SYSROOT "")
set(CMAKE_TRY_COMPILE_TARGET_TYPE STATIC_LIBRARY)
set(CMAKE_TRY_COMPILE_PLATFORM_VARIABLES HOST_PYTHON MACOS_FOLDER)
set(CMAKE_BUILD_WITH_INSTALL_RPATH ON)
# Looked for on Darwin, of no use here.
set(CMAKE_INSTALL_NAME_TOOL true)

# Asked, zig would first compile a whole C++ library for the answer.
set(CMAKE_CXX_COMPILER_ID_RUN TRUE)
set(CMAKE_CXX_COMPILER_ID Clang)
set(CMAKE_CXX_COMPILER_VERSION 22.1.8)
set(CMAKE_CXX_COMPILER_FRONTEND_VARIANT GNU)
set(CMAKE_CXX_STANDARD_COMPUTED_DEFAULT 17)
set(CMAKE_CXX_EXTENSIONS_COMPUTED_DEFAULT ON)

set(zig "${HOST_PYTHON}" -m ziglang)
set(CMAKE_CXX_COMPILER ${zig} c++ -target aarch64-macos.14.0)
# Without the first two, code refers to symbols that macOS 14's C++ library has
# not; the last as Apple's clang does.
string(
  JOIN
  " "
  CMAKE_CXX_FLAGS_INIT
  -U_LIBCPP_HAS_VENDOR_AVAILABILITY_ANNOTATIONS
  -D_LIBCPP_HAS_VENDOR_AVAILABILITY_ANNOTATIONS=1
  -fno-sized-deallocation
  "-isystem ${CMAKE_CURRENT_LIST_DIR}/include")
