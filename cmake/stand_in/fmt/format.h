// MLX's CUDA headers format one error text with fmt, which its wheel does not
// bring: here the text comes without its values.

#pragma once

#include <string>

namespace fmt {

template <typename... Args>
std::string format(const char* text, const Args&...) {
  return text;
}

} // namespace fmt
