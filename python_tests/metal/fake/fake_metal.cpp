#include "fake_metal.h"

#include <dlfcn.h>
#include <stdio.h>
#include <string.h>

#include <algorithm>
#include <fstream>
#include <map>
#include <mutex>
#include <sstream>
#include <stdexcept>

#include "executor.h"
#include "library.h"
#include "mlx/allocator.h"
#include "mlx/backend/metal/device.h"

namespace fake_metal {

namespace mx = mlx::core;

// ---------------------------------------------------------------------------
// Settings and reports
// ---------------------------------------------------------------------------

namespace {

// What the tests ask for, through fake_metal_set.
struct Settings {
  std::string executor;
  // Reads a text of kernels, prints the path of the library it becomes.
  std::string compiler;
  std::string architecture = "applegpu_g15s";
  uint32_t seed = 0;
  uint32_t order = 0;
  uint32_t flush_denormals = 1;
  uint32_t count_loads = 0;
  // The kernels report their stores: every byte of a result must see one.
  uint32_t checks = 0;
};
Settings settings;
std::mutex mutex;
std::string complaints;
std::string launches;

} // namespace

void complain(const std::string& what) {
  std::lock_guard lock(mutex);
  complaints += what + "\n";
}

// ---------------------------------------------------------------------------
// Libraries and pipelines
// ---------------------------------------------------------------------------

struct ObjectClass {
  std::string name;
  std::map<std::string, void*> methods;
};

void* method_of(const Object* object, const char* selector) {
  auto found = object->isa->methods.find(selector);
  if (found == object->isa->methods.end()) {
    throw std::logic_error(
        "[fake_metal] " + object->isa->name + " has no " + selector + ".");
  }
  return found->second;
}

namespace {

using msl_library::FunctionConstant;
using msl_library::Kernel;
using Constants = std::map<int, std::string>;

struct Library : Object {
  const msl_library::Library* table;
};

struct Pipeline : Object {
  std::string name;
  Library* library;
  const Kernel* kernel;
  Constants constants;
};

unsigned long max_threads(const Pipeline*, void*) {
  return msl::max_threads;
}
const ObjectClass library_class = {"MTLLibrary", {}};
const ObjectClass pipeline_class = {
    "MTLComputePipelineState",
    {{"maxTotalThreadsPerThreadgroup", (void*)max_threads}}};

void* load(const std::string& path, int flags) {
  void* loaded = dlopen(path.c_str(), RTLD_NOW | flags);
  if (!loaded) {
    throw std::runtime_error(std::string("[fake_metal] ") + dlerror());
  }
  return loaded;
}

template <typename F>
F* executor_function(const char* name) {
  static void* executor = load(settings.executor, RTLD_GLOBAL);
  return reinterpret_cast<F*>(dlsym(executor, name));
}

// Compiles as MLX does, from ASCII text.
Library* compile(const std::string& text) {
  if (std::any_of(text.begin(), text.end(), [](char c) { return c & 0x80; })) {
    complain("the source is not ASCII, as which MLX hands it to Metal");
  }
  char file[] = "/tmp/fake_metal_XXXXXX";
  close(mkstemp(file));
  std::ofstream(file) << text;
  FILE* pipe = popen((settings.compiler + " < " + file).c_str(), "r");
  char path[4096] = {};
  size_t n = fread(path, 1, sizeof(path) - 1, pipe);
  bool failed = pclose(pipe) != 0;
  remove(file);
  if (failed || n == 0) {
    throw std::runtime_error("[fake_metal] the kernels do not compile.");
  }
  executor_function<int(const msl::Launch*)>("msl_launch");
  std::string name(path, strcspn(path, "\n"));
  auto* table = static_cast<const msl_library::Library*>(
      dlsym(load(name, RTLD_LOCAL), "msl_library_table"));
  return new Library{{&library_class}, table};
}

const FunctionConstant* find_constant(const Library& library, int index) {
  auto* first = library.table->constants;
  auto* last = first + library.table->n_constants;
  auto* found = std::find_if(first, last, [&](const auto& constant) {
    return constant.index == index;
  });
  return found == last ? nullptr : found;
}

Constants check_constants(
    const std::string& name,
    const Library& library,
    const mx::metal::MTLFCList& given) {
  Constants values;
  for (auto& [value, type, index] : given) {
    auto* constant = find_constant(library, int(index));
    int bytes = type == MTL::DataTypeBool ? 1
        : type == MTL::DataTypeInt || type == MTL::DataTypeUInt ||
            type == MTL::DataTypeFloat
        ? 4
        : 0;
    if (!constant) {
      complain(name + ": no function constant " + std::to_string(index));
    } else if (constant->bytes != bytes) {
      complain(name + ": the type of function constant " + constant->name);
    } else {
      values[int(index)].assign(static_cast<const char*>(value), bytes);
    }
  }
  for (int i = 0; i < library.table->n_constants; i++) {
    auto& constant = library.table->constants[i];
    if (!values.count(constant.index)) {
      complain(name + ": function constant " + constant.name + " is not set");
    }
  }
  return values;
}

const Kernel* find_kernel(const Library& library, const std::string& name) {
  for (int i = 0; i < library.table->n_kernels; i++) {
    if (name == library.table->kernels[i].name) {
      return &library.table->kernels[i];
    }
  }
  complain("the library has no kernel " + name);
  throw std::runtime_error("[metal::Device] Unable to load function " + name);
}

// ---------------------------------------------------------------------------
// Commands
// ---------------------------------------------------------------------------

struct Binding {
  enum Kind { none, bytes, input, output } kind = none;
  std::string value;
  void* data = nullptr;
  void* begin = nullptr;
  size_t size = 0;
  size_t nbytes = 0;
  // Gone where the host let go of an array before its command ran.
  std::weak_ptr<mx::array::Data> owner;
};

struct Command {
  Pipeline* pipeline;
  Binding bindings[msl::max_buffers];
  uint32_t threadgroup_bytes[msl::max_buffers];
  uint32_t groups[3];
  uint32_t threads[3];
};

using Written = std::map<void*, std::vector<uint8_t>>;

struct Encoder : Object {
  Command next = {};
  std::vector<Command> commands;
  std::vector<mx::array> temporaries;
};

Binding& binding(Encoder* encoder, int index) {
  if (index < 0 || index >= msl::max_buffers) {
    complain("buffer index " + std::to_string(index));
    index = 0;
  }
  return encoder->next.bindings[index];
}

void set_pipeline(Encoder* encoder, void*, Pipeline* pipeline) {
  encoder->next.pipeline = pipeline;
}

void set_bytes(
    Encoder* encoder,
    void*,
    const void* data,
    unsigned long size,
    unsigned long index) {
  if (size > 4096 || size == 0) {
    complain("setBytes of " + std::to_string(size) + " bytes; at most 4096");
  }
  auto& x = binding(encoder, int(index));
  x = {};
  x.kind = Binding::bytes;
  x.value.assign(static_cast<const char*>(data), size);
}

void set_threadgroup_bytes(
    Encoder* encoder,
    void*,
    unsigned long size,
    unsigned long index) {
  if (size % 16 != 0) {
    complain("setThreadgroupMemoryLength must be a multiple of 16");
  }
  encoder->next.threadgroup_bytes[index] = size;
}

const ObjectClass encoder_class = {
    "MTLComputeCommandEncoder",
    {{"setComputePipelineState:", (void*)set_pipeline},
     {"setBytes:length:atIndex:", (void*)set_bytes},
     {"setThreadgroupMemoryLength:atIndex:", (void*)set_threadgroup_bytes}}};

Encoder& encoder() {
  static thread_local Encoder encoder = {{&encoder_class}};
  return encoder;
}

void bind_array(const mx::array& x, int index, int64_t offset, bool output) {
  auto& target = binding(&encoder(), index);
  target = {};
  target.kind = output ? Binding::output : Binding::input;
  auto buffer = x.buffer();
  target.begin = buffer.raw_ptr();
  target.size = x.buffer_size();
  target.data = const_cast<char*>(x.data<char>()) + offset;
  target.nbytes = x.nbytes();
  target.owner = x.data_shared_ptr();
  if (!target.begin || target.size == 0) {
    complain("buffer " + std::to_string(index) + " is bound to nothing");
  }
}

void check_size(
    const std::string& where,
    const msl_library::Argument& argument,
    const Binding& x) {
  if (x.kind == Binding::bytes) {
    bool fits = argument.is_reference
        ? int(x.value.size()) == argument.bytes
        : int(x.value.size()) % argument.bytes == 0;
    if (!fits) {
      complain(
          where + ": " + std::to_string(x.value.size()) +
          " bytes are set, the kernel reads " + std::to_string(argument.bytes));
    }
  } else if (
      reinterpret_cast<uintptr_t>(x.data) % std::min(argument.bytes, 16) != 0) {
    complain(where + ": not aligned to " + std::to_string(argument.bytes));
  }
}

bool is_on(const Command& command, const msl_library::Argument& argument) {
  auto& constants = command.pipeline->constants;
  auto found = constants.find(argument.condition);
  return argument.condition < 0 ||
      (found != constants.end() && found->second[0] != 0);
}

void check_bindings(const Command& command) {
  auto& kernel = *command.pipeline->kernel;
  bool known[msl::max_buffers] = {};
  for (int i = 0; i < kernel.n_arguments; i++) {
    auto& argument = kernel.arguments[i];
    auto where = std::string(kernel.name) + ": buffer " +
        std::to_string(argument.index) + " (" + argument.name + ")";
    if (argument.kind == msl_library::threadgroup_argument) {
      if (command.threadgroup_bytes[argument.index] == 0) {
        complain(where + ": no threadgroup memory");
      }
      continue;
    }
    auto& x = command.bindings[argument.index];
    known[argument.index] = true;
    if (!is_on(command, argument)) {
      continue;
    }
    if (x.kind == Binding::none) {
      complain(where + " is not bound");
      continue;
    }
    check_size(where, argument, x);
    if (argument.is_writable && x.kind != Binding::output) {
      complain(where + " is written by the kernel, but not bound as an output");
    }
    if (!argument.is_writable && x.kind == Binding::output) {
      complain(
          where + " is bound as an output, but the kernel cannot write it");
    }
  }
}

void check_grid(const Command& command) {
  std::string name = command.pipeline->kernel->name;
  size_t threads =
      size_t(command.threads[0]) * command.threads[1] * command.threads[2];
  size_t groups =
      size_t(command.groups[0]) * command.groups[1] * command.groups[2];
  if (threads == 0 || threads > msl::max_threads) {
    complain(name + ": a group of " + std::to_string(threads) + " threads");
  }
  if (groups == 0) {
    complain(name + ": an empty grid");
  }
}

void dispatch(MTL::Size groups, MTL::Size threads) {
  auto& e = encoder();
  auto& command = e.next;
  if (!command.pipeline) {
    complain("a dispatch without a pipeline");
    return;
  }
  command.groups[0] = uint32_t(groups.width);
  command.groups[1] = uint32_t(groups.height);
  command.groups[2] = uint32_t(groups.depth);
  command.threads[0] = uint32_t(threads.width);
  command.threads[1] = uint32_t(threads.height);
  command.threads[2] = uint32_t(threads.depth);
  check_bindings(command);
  check_grid(command);
  e.commands.push_back(command);
}

// ---------------------------------------------------------------------------
// Execution
// ---------------------------------------------------------------------------

void log_counts(std::ostringstream& log, const msl::Counts& counts) {
  log << ", \"simd_ops\": " << counts.simd_ops << ", \"mma\": " << counts.mma
      << ", \"threadgroup_barriers\": " << counts.threadgroup_barriers
      << ", \"simdgroup_barriers\": " << counts.simdgroup_barriers
      << ", \"threadgroup_bytes\": " << counts.threadgroup_bytes
      << ", \"threadgroup_load_bytes\": " << counts.threadgroup_load_bytes
      << ", \"threadgroup_store_bytes\": " << counts.threadgroup_store_bytes;
}

void log_buffer(
    std::ostringstream& log,
    const msl_library::Argument& argument,
    const msl::BufferCounts& c) {
  log << "{\"index\": " << argument.index << ", \"name\": \"" << argument.name
      << "\", \"lane_loads\": " << c.lane_loads
      << ", \"lane_load_bytes\": " << c.lane_load_bytes
      << ", \"simdgroup_load_bytes\": " << c.simdgroup_load_bytes
      << ", \"distinct_load_bytes\": " << c.distinct_load_bytes
      << ", \"lane_store_bytes\": " << c.lane_store_bytes
      << ", \"loads_by_width\": [";
  for (int i = 0; i < 5; i++) {
    log << (i ? ", " : "") << c.loads_by_width[i];
  }
  log << "]}";
}

// A line of JSON a launch.
void log_launch(const Command& command) {
  auto& kernel = *command.pipeline->kernel;
  auto& counts = *executor_function<const msl::Counts*()>("msl_counts")();
  std::ostringstream log;
  log << "{\"kernel\": \"" << kernel.name << "\", \"pipeline\": \""
      << command.pipeline->name << "\", \"groups\": [" << command.groups[0]
      << ", " << command.groups[1] << ", " << command.groups[2]
      << "], \"threads\": [" << command.threads[0] << ", " << command.threads[1]
      << ", " << command.threads[2] << "]";
  log << ", \"constants\": {";
  for (auto& [index, value] : command.pipeline->constants) {
    auto* constant = find_constant(*command.pipeline->library, index);
    log << (index == command.pipeline->constants.begin()->first ? "" : ", ")
        << "\"" << constant->name << "\": " << int(value[0]);
  }
  log << "}";
  log_counts(log, counts);
  log << ", \"buffers\": [";
  bool first = true;
  for (int i = 0; i < kernel.n_arguments; i++) {
    auto& argument = kernel.arguments[i];
    if (argument.kind == msl_library::buffer_argument &&
        is_on(command, argument)) {
      log << (first ? "" : ", ");
      log_buffer(log, argument, counts.buffers[argument.index]);
      first = false;
    }
  }
  log << "]}\n";
  std::lock_guard lock(mutex);
  launches += log.str();
}

void fill_buffers(
    msl::Launch& launch,
    const Command& command,
    Written& written) {
  auto& kernel = *command.pipeline->kernel;
  for (int i = 0; i < kernel.n_arguments; i++) {
    auto& argument = kernel.arguments[i];
    auto& x = command.bindings[argument.index];
    if (argument.kind != msl_library::buffer_argument) {
      continue;
    }
    auto& buffer = launch.buffers[argument.index];
    if (!is_on(command, argument) || x.kind == Binding::none) {
      // A compiler may read through a reference before it is sure to.
      static char nothing[4096];
      if (argument.is_reference) {
        buffer = {nothing, nothing, sizeof(nothing), nullptr, 0};
      }
      continue;
    }
    buffer.data = x.data;
    buffer.begin = x.begin;
    buffer.bytes = x.size;
    buffer.writable = argument.is_writable;
    if (x.kind == Binding::bytes) {
      buffer.data = const_cast<char*>(x.value.data());
      buffer.begin = buffer.data;
      buffer.bytes = x.value.size();
    } else if (x.owner.expired()) {
      complain(
          std::string(kernel.name) + ": buffer " +
          std::to_string(argument.index) + " (" + argument.name +
          ") was freed before the kernel ran");
    } else if (argument.is_writable && !written.count(x.begin)) {
      // NaN in every float type, so that what is not written shows.
      memset(x.begin, 0xff, x.size);
      written[x.begin].resize(x.size);
    }
    if (auto found = written.find(x.begin); found != written.end()) {
      buffer.written = found->second.data();
    }
  }
}

void run(const Command& command, Written& written) {
  static std::mutex one_at_a_time;
  std::lock_guard lock(one_at_a_time);
  msl::Launch launch = {};
  launch.entry = reinterpret_cast<msl::Entry>(command.pipeline->kernel->entry);
  fill_buffers(launch, command, written);
  std::copy_n(command.groups, 3, launch.groups);
  std::copy_n(command.threads, 3, launch.threads);
  std::copy_n(
      command.threadgroup_bytes, msl::max_buffers, launch.threadgroup_bytes);
  launch.seed = settings.seed;
  launch.order = settings.order;
  launch.flush_denormals = settings.flush_denormals;
  launch.count_loads = settings.count_loads;
  for (auto& [index, value] : command.pipeline->constants) {
    auto* constant = find_constant(*command.pipeline->library, index);
    memcpy(constant->value, value.data(), value.size());
  }
  if (executor_function<int(const msl::Launch*)>("msl_launch")(&launch)) {
    complain(
        std::string(command.pipeline->kernel->name) + ":\n" +
        executor_function<const char*()>("msl_report")());
  }
  log_launch(command);
}

void check_results(const Command& command, const Written& written) {
  for (auto& x : command.bindings) {
    auto found = written.find(x.begin);
    if (x.kind == Binding::output && found != written.end() &&
        std::count(
            found->second.begin(), found->second.begin() + x.nbytes, 0)) {
      complain(
          std::string(command.pipeline->kernel->name) +
          ": bytes of a result that no kernel wrote");
    }
  }
}

void run_all(const std::vector<Command>& commands) {
  Written written;
  for (auto& command : commands) {
    run(command, written);
  }
  for (auto& command : commands) {
    if (settings.checks) {
      check_results(command, written);
    }
  }
}

} // namespace

std::function<void()> take_commands() {
  auto& e = encoder();
  auto commands = std::make_shared<std::vector<Command>>(std::move(e.commands));
  auto temporaries =
      std::make_shared<std::vector<mx::array>>(std::move(e.temporaries));
  e.commands.clear();
  e.temporaries.clear();
  e.next = {};
  return [commands, temporaries] { run_all(*commands); };
}

} // namespace fake_metal

// ---------------------------------------------------------------------------
// The symbols of MLX's Metal backend that an extension calls
// ---------------------------------------------------------------------------

namespace mlx::core::metal {

using namespace fake_metal;

// Never constructed: no Metal device stands behind them. This file is compiled
// without access control, to fill in what their inline methods read.
Device& device(mlx::core::Device) {
  alignas(Device) static char memory[sizeof(Device)];
  auto* device = reinterpret_cast<Device*>(memory);
  static bool once = [&] {
    new (&device->arch_) std::string(settings.architecture);
    device->arch_gen_ = 15;
    return true;
  }();
  device->arch_ = once ? settings.architecture : "";
  return *device;
}

CommandEncoder& get_command_encoder(Stream) {
  alignas(CommandEncoder) static char memory[sizeof(CommandEncoder)];
  return *reinterpret_cast<CommandEncoder*>(memory);
}

MTL::Library* Device::get_library(
    const std::string& name,
    const CompileOptions&,
    const std::function<std::string()>& builder) {
  static std::map<std::string, Library*> libraries;
  // Compiled anew where the tests ask for another kind of library.
  auto& library = libraries[settings.compiler + name];
  if (!library) {
    library = compile(builder());
  }
  return reinterpret_cast<MTL::Library*>(library);
}

MTL::ComputePipelineState* Device::get_kernel(
    const std::string& base_name,
    MTL::Library* mtl_library,
    const std::string& hash_name,
    const MTLFCList& constants,
    const std::vector<MTL::Function*>&) {
  static std::map<std::string, Pipeline*> pipelines;
  auto* library = reinterpret_cast<Library*>(mtl_library);
  auto* kernel = find_kernel(*library, base_name);
  auto name = hash_name.empty() ? base_name : hash_name;
  auto values = check_constants(base_name, *library, constants);
  auto& pipeline = pipelines[settings.compiler + name];
  if (!pipeline) {
    pipeline = new Pipeline{{&pipeline_class}, name, library, kernel, values};
  } else if (pipeline->kernel != kernel || pipeline->constants != values) {
    complain(name + ": the name of a pipeline with other function constants");
  }
  return reinterpret_cast<MTL::ComputePipelineState*>(pipeline);
}

MTL::ComputeCommandEncoder* CommandEncoder::get_command_encoder() {
  return reinterpret_cast<MTL::ComputeCommandEncoder*>(&encoder());
}

void CommandEncoder::set_input_array(
    const array& x,
    int index,
    int64_t offset) {
  bind_array(x, index, offset, false);
}

void CommandEncoder::set_output_array(array& x, int index, int64_t offset) {
  bind_array(x, index, offset, true);
}

void CommandEncoder::register_output_array(const array&) {}
void CommandEncoder::maybeInsertBarrier() {}
void CommandEncoder::barrier() {}

void CommandEncoder::add_temporary(array x) {
  encoder().temporaries.push_back(std::move(x));
}

void CommandEncoder::add_temporaries(std::vector<array> arrays) {
  for (auto& x : arrays) {
    add_temporary(std::move(x));
  }
}

void CommandEncoder::dispatch_threadgroups(
    MTL::Size groups,
    MTL::Size threads) {
  dispatch(groups, threads);
}

void CommandEncoder::dispatch_threads(MTL::Size grid, MTL::Size group) {
  if (grid.width % group.width || grid.height % group.height ||
      grid.depth % group.depth) {
    complain("the last threadgroups of a grid are not whole");
  }
  MTL::Size groups(
      grid.width / group.width,
      grid.height / group.height,
      grid.depth / group.depth);
  dispatch(groups, group);
}

} // namespace mlx::core::metal

// ---------------------------------------------------------------------------
// What the tests call
// ---------------------------------------------------------------------------

extern "C" {

__attribute__((visibility("default"))) int fake_metal_set(
    const char* name,
    const char* value) {
  using fake_metal::settings;
  std::map<std::string, std::string*> texts = {
      {"executor", &settings.executor},
      {"compiler", &settings.compiler},
      {"architecture", &settings.architecture}};
  std::map<std::string, uint32_t*> numbers = {
      {"seed", &settings.seed},
      {"order", &settings.order},
      {"flush_denormals", &settings.flush_denormals},
      {"count_loads", &settings.count_loads},
      {"checks", &settings.checks}};
  if (texts.count(name)) {
    *texts[name] = value;
  } else if (numbers.count(name)) {
    *numbers[name] = uint32_t(std::stoul(value));
  } else {
    return 0;
  }
  return 1;
}

// What was wrong since the last call.
__attribute__((visibility("default"))) const char* fake_metal_complaints() {
  static std::string text;
  std::lock_guard lock(fake_metal::mutex);
  text = std::move(fake_metal::complaints);
  fake_metal::complaints.clear();
  return text.c_str();
}

// What was launched since the last call, a line of JSON each.
__attribute__((visibility("default"))) const char* fake_metal_launches() {
  static std::string text;
  std::lock_guard lock(fake_metal::mutex);
  text = std::move(fake_metal::launches);
  fake_metal::launches.clear();
  return text.c_str();
}
}
