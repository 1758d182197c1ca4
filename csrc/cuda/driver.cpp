// Launches through the CUDA driver, found at run time, or through the emulator.
//
// The library holds the PTX of every csrc/*/cuda*.cu for the oldest architecture that its kernels
// know. On its first launch a kernel is compiled by the driver for the GPU at hand, alone, for a
// room's take half a minute together; the driver keeps the result on disk. So the build takes
// seconds and one compiler pass a file, later architectures are served, nothing of CUDA is linked,
// and what the emulator executes is what a GPU gets.
#include <dlfcn.h>

#include <algorithm>
#include <atomic>
#include <map>
#include <mutex>
#include <stdexcept>
#include <string_view>
#include <utility>

#include "cuda/launch.h"

#define FASTATTN_FOREACH_ROOM(X) \
  X(attention)                   \
  X(attention_backward)          \
  X(attention_backward_sm90)     \
  X(attention_bias)              \
  X(attention_bias_sm90)         \
  X(attention_decode) X(attention_sm90) X(ffn) X(ffn_sm90) X(norm)

// Files that the linker took in as they are; null where the build had no nvcc.
#define FASTATTN_DECLARE_PTX(room)                                          \
  extern "C" __attribute__((weak)) const char _binary_##room##_ptx_start[]; \
  extern "C" __attribute__((weak)) const char _binary_##room##_ptx_end[];
FASTATTN_FOREACH_ROOM(FASTATTN_DECLARE_PTX)

namespace fastattn::cuda {
namespace {

// Of the driver's enumerations.
constexpr int kMaxDynamicShared = 8;     // CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
constexpr int kMajor = 75, kMinor = 76;  // CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_...
constexpr int kMultiprocessors = 16;     // CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT
constexpr int kWords = 1;                // CU_TENSOR_MAP_DATA_TYPE_UINT16
constexpr int kLines = 3;                // CU_TENSOR_MAP_SWIZZLE_128B
constexpr int kSector = 2;               // CU_TENSOR_MAP_L2_PROMOTION_L2_128B

// The PTX of a room; empty where it was not built.
std::string_view ptx(std::string_view room) {
#define FASTATTN_FIND_PTX(name)                    \
  if (room == #name && _binary_##name##_ptx_start) \
    return {_binary_##name##_ptx_start, _binary_##name##_ptx_end};
  FASTATTN_FOREACH_ROOM(FASTATTN_FIND_PTX)
  return {};
}

// The PTX of one kernel of a room, in the lines that it has there. Made once a process.
const std::string& ptx(const std::string& room, const std::string& kernel) {
  static std::mutex mutex;
  static std::map<std::pair<std::string, std::string>, std::string> made;
  const std::lock_guard lock(mutex);
  const auto [at, fresh] = made.try_emplace({room, kernel});
  if (!fresh) return at->second;
  constexpr std::string_view entry = "\n.visible .entry ", end = "\n}\n";
  std::string_view rest = ptx(room);
  while (true) {
    const size_t begin = std::min(rest.find(entry), rest.size());
    at->second.append(rest.substr(0, begin));
    if (begin == rest.size()) return at->second;
    const size_t behind = rest.find(end, begin) + end.size() - 1;
    const std::string_view own = rest.substr(begin, behind - begin);
    if (own.substr(entry.size()).starts_with(kernel + "("))
      at->second.append(own);
    else
      at->second.append(static_cast<size_t>(std::count(own.begin(), own.end(), '\n')), '\n');
    rest.remove_prefix(behind);
  }
}

// The part of the driver's interface that launches need, under its own names.
struct Driver {
  using Context = void*;
  using Module = void*;
  using Function = void*;

  int (*cuInit)(unsigned);
  int (*cuDeviceGet)(int*, int);
  int (*cuDeviceGetAttribute)(int*, int, int);
  int (*cuDevicePrimaryCtxRetain)(Context*, int);
  int (*cuCtxPushCurrent_v2)(Context);
  int (*cuCtxPopCurrent_v2)(Context*);
  int (*cuModuleLoadData)(Module*, const void*);
  int (*cuModuleGetFunction)(Function*, Module, const char*);
  int (*cuFuncSetAttribute)(Function, int, int);
  int (*cuLaunchKernel)(Function, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned,
                        unsigned, void*, void**, void**);
  int (*cuTensorMapEncodeTiled)(void*, int, unsigned, const void*, const uint64_t*, const uint64_t*,
                                const uint32_t*, const uint32_t*, int, int, int, int);
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
    FASTATTN_FIND(cuDeviceGetAttribute);
    FASTATTN_FIND(cuDevicePrimaryCtxRetain);
    FASTATTN_FIND(cuCtxPushCurrent_v2);
    FASTATTN_FIND(cuCtxPopCurrent_v2);
    FASTATTN_FIND(cuModuleLoadData);
    FASTATTN_FIND(cuModuleGetFunction);
    FASTATTN_FIND(cuFuncSetAttribute);
    FASTATTN_FIND(cuLaunchKernel);
    FASTATTN_FIND(cuTensorMapEncodeTiled);
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

// A matrix as the copy engine knows it: CUtensorMap.
struct alignas(64) TensorMap {
  char bytes[128];

  void encode(const Driver& driver, const Boxed& of) {
    const uint64_t sizes[] = {static_cast<uint64_t>(of.cols), static_cast<uint64_t>(of.rows)};
    const uint64_t stride = 2 * sizes[0];
    const uint32_t box[] = {kBoxSide, kBoxSide}, steps[] = {1, 1};
    driver.check(driver.cuTensorMapEncodeTiled(this, kWords, 2, of.data, sizes, &stride, box, steps,
                                               0, kLines, kSector, 0),
                 "to describe a matrix");
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

// Devices and functions, each opened or made once a process and never given back.
class Functions {
 public:
  struct Opened {
    Driver::Context context = nullptr;
    int architecture = 0, multiprocessors = 0;
  };

  const Opened& open(int device) {
    const std::lock_guard lock(mutex_);
    Opened& opened = devices_[device];
    if (opened.context == nullptr) {
      int handle, major, minor;
      driver.check(driver.cuDeviceGet(&handle, device), "to find a device");
      driver.check(driver.cuDeviceGetAttribute(&major, kMajor, handle), "to know a device");
      driver.check(driver.cuDeviceGetAttribute(&minor, kMinor, handle), "to know a device");
      opened.architecture = 10 * major + minor;
      driver.check(driver.cuDeviceGetAttribute(&opened.multiprocessors, kMultiprocessors, handle),
                   "to know a device");
      driver.check(driver.cuDevicePrimaryCtxRetain(&opened.context, handle), "to open a device");
    }
    return opened;
  }

  // With the device's context current.
  Driver::Function find(int device, const Launch& launch) {
    const std::lock_guard lock(mutex_);
    Made& made = functions_[{device, launch.kernel}];
    const std::string name = launch.kernel;
    if (made.function == nullptr) {
      const std::string& text = ptx(launch.room, name);
      if (text.empty()) throw std::runtime_error("fastattn: built without CUDA kernels");
      Driver::Module module;
      driver.check(driver.cuModuleLoadData(&module, text.c_str()), "to load the kernel " + name);
      driver.check(driver.cuModuleGetFunction(&made.function, module, name.c_str()),
                   "to find the kernel " + name);
    }
    if (made.shared < launch.shared) {  // which may differ from launch to launch
      driver.check(driver.cuFuncSetAttribute(made.function, kMaxDynamicShared,
                                             static_cast<int>(launch.shared)),
                   "to give " + name + " its shared memory");
      made.shared = launch.shared;
    }
    return made.function;
  }

  const Driver driver;

 private:
  struct Made {
    Driver::Function function = nullptr;
    uint32_t shared = 0;  // as much dynamic memory as it may have by now
  };

  std::mutex mutex_;
  std::map<int, Opened> devices_;
  std::map<std::pair<int, std::string>, Made> functions_;
};

// Opened on first use, for there may be no driver.
Functions& functions() {
  static Functions functions;
  return functions;
}

// Runs a launch; returns null, or what went wrong.
using Emulator = const char* (*)(const Launch*);
std::atomic<Emulator> emulator = nullptr;
std::atomic<int> emulated = 80;              // the architecture of the emulator's GPU
constexpr int kEmulatedMultiprocessors = 2;  // so that blocks have several things to do

}  // namespace

bool emulating() { return emulator.load() != nullptr; }

int architecture(const Device& device) {
  return emulating() ? emulated.load() : functions().open(device.index).architecture;
}

int multiprocessors(const Device& device) {
  return emulating() ? kEmulatedMultiprocessors : functions().open(device.index).multiprocessors;
}

void run(const Device& device, const Launch& launch) {
  for (const uint32_t size : launch.grid)
    if (size == 0) return;
  if (const Emulator emulate = emulator.load()) {
    if (const char* message = emulate(&launch)) throw std::runtime_error(message);
    return;
  }
  Functions& all = functions();
  const Driver& driver = all.driver;
  const Current current(driver, all.open(device.index).context);
  const Driver::Function function = all.find(device.index, launch);
  void* values[kMostArguments];
  TensorMap maps[kMostBoxed];
  TensorMap* map = maps;
  for (int i = 0; i < launch.count; i++) {
    const Argument& argument = launch.arguments[i];
    values[i] = const_cast<void*>(argument.value);
    if (!argument.boxed) continue;
    map->encode(driver, *static_cast<const Boxed*>(argument.value));
    values[i] = map++;
  }
  const auto& [x, y, z] = launch.grid;
  const auto& [threads_x, threads_y, threads_z] = launch.block;
  driver.check(driver.cuLaunchKernel(function, x, y, z, threads_x, threads_y, threads_z,
                                     launch.shared, device.stream, values, nullptr),
               std::string("to launch ") + launch.kernel);
}

}  // namespace fastattn::cuda

#define FASTATTN_EXPORT extern "C" __attribute__((visibility("default")))

// Sends launches to the emulator from now on, as to a GPU of this architecture, say 80 for sm_80;
// null sends them to the GPU again.
FASTATTN_EXPORT void fastattn_emulate(fastattn::cuda::Emulator emulate, int architecture) {
  fastattn::cuda::emulated = architecture;
  fastattn::cuda::emulator = emulate;
}

// The PTX of a room, or of one kernel in it unless that is null, and its length; it has no
// terminator. Empty where the room was not built.
FASTATTN_EXPORT const char* fastattn_cuda_ptx(const char* room, const char* kernel,
                                              int64_t* bytes) {
  const std::string_view text =
      kernel == nullptr ? fastattn::cuda::ptx(room) : fastattn::cuda::ptx(room, kernel);
  *bytes = static_cast<int64_t>(text.size());
  return text.data();
}
