// The table that each compiled library of kernels carries about itself. Also
// read by rig/executor.py.

#pragma once

namespace msl_library {

enum ArgumentKind { buffer_argument, threadgroup_argument };

struct Argument {
  const char* name;
  int kind;
  int index;
  // Of what a pointer points to, or of what a reference refers to.
  int bytes;
  int is_reference;
  int is_writable;
  // The function constant that turns the argument on; -1 without one.
  int condition;
};

struct Kernel {
  const char* name;
  void (*entry)(void* const* buffers, const void* index);
  int n_arguments;
  const Argument* arguments;
};

struct FunctionConstant {
  const char* name;
  const char* type;
  int index;
  int bytes;
  void* value;
};

struct Library {
  int n_kernels;
  const Kernel* kernels;
  int n_constants;
  const FunctionConstant* constants;
};

} // namespace msl_library
