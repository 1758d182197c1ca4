// Launches through the CUDA driver, found at run time, or through the emulator.
//
// The library holds the PTX of every csrc/*/cuda*.cu for the oldest architecture that the kernels
// know, and the driver compiles it for the GPU at hand and keeps the result on disk. So the build
// takes seconds and one compiler pass a file, later architectures are served, nothing of CUDA is
// linked, and what the emulator executes is what a GPU gets.
#include <dlfcn.h>

#include <atomic>
#include <map>
#include <mutex>
#include <stdexcept>
#include <utility>

#include "cuda/launch.h"

#define FASTATTN_FOREACH_ROOM(X) \
  X(attention) X(attention_backward) X(attention_bias) X(attention_decode) X(ffn) X(norm)

// Files that the linker took in as they are; null where the build had no nvcc.
#define FASTATTN_DECLARE_PTX(room)                                          \
  extern "C" __attribute__((weak)) const char _binary_##room##_ptx_start[]; \
  extern "C" __attribute__((weak)) const char _binary_##room##_ptx_end[];
FASTATTN_FOREACH_ROOM(FASTATTN_DECLARE_PTX)

namespace fastattn::cuda {
namespace {

constexpr int kMaxDynamicShared = 8;  // CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES

std::pair<const char*, int64_t> ptx(const std::string& room) {
#define FASTATTN_FIND_PTX(name)                    \
  if (room == #name && _binary_##name##_ptx_start) \
    return {_binary_##name##_ptx_start, _binary_##name##_ptx_end - _binary_##name##_ptx_start};
  FASTATTN_FOREACH_ROOM(FASTATTN_FIND_PTX)
  return {nullptr, 0};
}

// The part of the driver's interface that launches need, under its own names.
struct Driver {
  using Context = void*;
  using Module = void*;
  using Function = void*;

  int (*cuInit)(unsigned);
  int (*cuDeviceGet)(int*, int);
  int (*cuDevicePrimaryCtxRetain)(Context*, int);
  int (*cuCtxPushCurrent_v2)(Context);
  int (*cuCtxPopCurrent_v2)(Context*);
  int (*cuModuleLoadData)(Module*, const void*);
  int (*cuModuleGetFunction)(Function*, Module, const char*);
  int (*cuFuncSetAttribute)(Function, int, int);
  int (*cuLaunchKernel)(Function, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned,
                        unsigned, void*, void**, void**);
  int (*cuGetErrorString)(int, const char**);

  Driver() {
    void* library = dlopen("libcuda.so.1", RTLD_NOW);
    if (library == nullptr) throw std::runtime_error("fastattn: there is no CUDA driver");
    const auto find = [&](auto& function, const char* name) {
      function =
          reinterpret_cast<std::remove_reference_t<decltype(function)>>(dlsym(library, name));
      if (function == nullptr)
        throw std::runtime_error(std::string("fastattn: the CUDA driver lacks ") + name);
    };
#define FASTATTN_FIND(name) find(name, #name)
    FASTATTN_FIND(cuInit);
    FASTATTN_FIND(cuDeviceGet);
    FASTATTN_FIND(cuDevicePrimaryCtxRetain);
    FASTATTN_FIND(cuCtxPushCurrent_v2);
    FASTATTN_FIND(cuCtxPopCurrent_v2);
    FASTATTN_FIND(cuModuleLoadData);
    FASTATTN_FIND(cuModuleGetFunction);
    FASTATTN_FIND(cuFuncSetAttribute);
    FASTATTN_FIND(cuLaunchKernel);
    FASTATTN_FIND(cuGetErrorString);
    check(cuInit(0), "to start the driver");
  }

  void check(int code, const std::string& what) const {
    if (code == 0) return;
    const char* text = nullptr;
    cuGetErrorString(code, &text);
    throw std::runtime_error("fastattn: CUDA failed " + what + ": " +
                             (text ? text : "error " + std::to_string(code)));
  }
};

// Makes the context that torch uses on a device current, for as long as it lives.
class Current {
 public:
  Current(const Driver& driver, Driver::Context context) : driver_(driver) {
    driver.check(driver.cuCtxPushCurrent_v2(context), "to make a device current");
  }
  ~Current() {
    Driver::Context popped;
    driver_.cuCtxPopCurrent_v2(&popped);
  }
  Current(const Current&) = delete;
  Current& operator=(const Current&) = delete;

 private:
  const Driver& driver_;
};

// Contexts, modules and functions, each made once a process and never given back.
class Functions {
 public:
  explicit Functions(const Driver& driver) : driver_(driver) {}

  Driver::Context context(int device) {
    const std::lock_guard lock(mutex_);
    Driver::Context& context = contexts_[device];
    if (context == nullptr) {
      int handle;
      driver_.check(driver_.cuDeviceGet(&handle, device), "to find a device");
      driver_.check(driver_.cuDevicePrimaryCtxRetain(&context, handle), "to open a device");
    }
    return context;
  }

  // With the device's context current.
  Driver::Function find(int device, const Launch& launch) {
    const std::lock_guard lock(mutex_);
    Driver::Function& function = functions_[{device, launch.kernel}];
    if (function == nullptr) {
      Driver::Function found;
      const std::string name = launch.kernel;
      driver_.check(driver_.cuModuleGetFunction(&found, module(device, launch.room), name.c_str()),
                    "to find the kernel " + name);
      driver_.check(driver_.cuFuncSetAttribute(found, kMaxDynamicShared, kMostShared),
                    "to give " + name + " its shared memory");
      function = found;
    }
    return function;
  }

 private:
  Driver::Module module(int device, const std::string& room) {
    Driver::Module& module = modules_[{device, room}];
    if (module == nullptr) {
      const auto [text, bytes] = ptx(room);
      if (text == nullptr) throw std::runtime_error("fastattn: built without CUDA kernels");
      const std::string terminated(text, static_cast<size_t>(bytes));
      driver_.check(driver_.cuModuleLoadData(&module, terminated.c_str()),
                    "to load the kernels of " + room);
    }
    return module;
  }

  const Driver& driver_;
  std::mutex mutex_;
  std::map<int, Driver::Context> contexts_;
  std::map<std::pair<int, std::string>, Driver::Module> modules_;
  std::map<std::pair<int, std::string>, Driver::Function> functions_;
};

// Runs a launch; returns null, or what went wrong.
using Emulator = const char* (*)(const Launch*);
std::atomic<Emulator> emulator = nullptr;

}  // namespace

bool emulating() { return emulator.load() != nullptr; }

void run(const Device& device, const Launch& launch) {
  for (const uint32_t size : launch.grid)
    if (size == 0) return;
  if (const Emulator emulate = emulator.load()) {
    if (const char* message = emulate(&launch)) throw std::runtime_error(message);
    return;
  }
  static const Driver driver;
  static Functions functions(driver);
  const Current current(driver, functions.context(device.index));
  const Driver::Function function = functions.find(device.index, launch);
  void* values[kMostArguments];
  for (int i = 0; i < launch.count; i++) values[i] = const_cast<void*>(launch.arguments[i].value);
  const auto& [x, y, z] = launch.grid;
  const auto& [threads_x, threads_y, threads_z] = launch.block;
  driver.check(driver.cuLaunchKernel(function, x, y, z, threads_x, threads_y, threads_z,
                                     launch.shared, device.stream, values, nullptr),
               std::string("to launch ") + launch.kernel);
}

}  // namespace fastattn::cuda

#define FASTATTN_EXPORT extern "C" __attribute__((visibility("default")))

// Sends launches to the emulator from now on; null sends them to the GPU again.
FASTATTN_EXPORT void fastattn_emulate(fastattn::cuda::Emulator emulate) {
  fastattn::cuda::emulator = emulate;
}

// The PTX of a room, which has no terminator, and its length; null where it was not built.
FASTATTN_EXPORT const char* fastattn_cuda_ptx(const char* room, int64_t* bytes) {
  const auto [text, length] = fastattn::cuda::ptx(room);
  *bytes = length;
  return text;
}
