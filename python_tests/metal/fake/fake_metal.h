// Metal on Linux: what MLX's backend would send to the GPU is checked against
// the kernels' own signatures and run by the executor of ../runtime.

#pragma once

#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "mlx/array.h"

namespace fake_metal {

// An Objective-C object, as far as metal-cpp sends messages to it.
struct Object {
  const struct ObjectClass* isa;
};
void* method_of(const Object* object, const char* selector);

// The host broke the contract with its kernels; collected for the tests.
void complain(const std::string& what);

// What was encoded since the last call. It keeps temporaries alive as Metal
// does.
std::function<void()> take_commands();

} // namespace fake_metal
