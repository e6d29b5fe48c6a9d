// In place of MLX's header, whose constructors differ in address space alone.

#pragma once

#include <metal_stdlib>

template <typename T>
struct complex_t {
  T real;
  T imag;
};
using complex64_t = complex_t<float>;
#define complex64_t(...) \
  complex64_t {          \
    __VA_ARGS__          \
  }
