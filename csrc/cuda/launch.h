// What a launch of a CUDA kernel is, described once for a GPU and for the emulator.
#pragma once

#include <cmath>
#include <cstdint>
#include <string>
#include <type_traits>

#include "common/dtype.h"

namespace fastattn::cuda {

// Dynamic shared memory that a block can have on every GPU since sm_80, with some static beside it.
constexpr uint32_t kMostShared = 96 * 1024;
constexpr int kMostArguments = 32, kMostBoxed = 4;

// One parameter of a kernel: `bytes` bytes at `value`, as the driver copies them; or a Boxed there,
// of which it makes what it copies.
struct Argument {
  const void* value;
  int64_t bytes;
  int64_t extent;          // bytes of the memory that it points to, or -1 for what is no pointer
  int32_t written, fresh;  // whether the kernel may write there, and has to before it reads
  int32_t boxed;
};

struct Launch {
  const char* room;  // whose kernels these are
  const char* kernel;
  uint32_t grid[3], block[3], shared;
  int32_t count;
  const Argument* arguments;
};

// Where a torch op runs its kernels. Scratch memory lives as long as the op.
class Device {
 public:
  Device(int index, void* stream) : index(index), stream(stream) {}
  virtual ~Device() = default;
  virtual void* scratch(int64_t bytes) = 0;

  const int index;
  void* const stream;
};

// Runs a launch on the device's stream, or in the emulator where that is asked for. Throws
// std::runtime_error in words.
void run(const Device& device, const Launch& launch);

// Whether launches go to the emulator, which works on CPU tensors.
bool emulating();

// That of a device, or of the one which is emulated: 80 for sm_80.
int architecture(const Device& device);

// How many multiprocessors a device has, or the one which is emulated.
int multiprocessors(const Device& device);

// Memory as an argument: of `bytes` bytes, or null.
struct Memory {
  const void* data;
  int64_t bytes;
  bool written = false, fresh = false;
};
inline Memory reads(const void* data, int64_t bytes) { return {data, bytes}; }
inline Memory writes(void* data, int64_t bytes) { return {data, bytes, true, true}; }
inline Memory updates(void* data, int64_t bytes) { return {data, bytes, true, false}; }

// A matrix without gaps, of elements of 16 bits, for a kernel that has the copy engine of sm_90
// bring boxes of kBoxSide x kBoxSide of it, permuted as Panels are. Its data and rows begin at
// multiples of 16 bytes.
constexpr int kBoxSide = 64;
struct Boxed {
  const void* data;
  int64_t rows, cols;
};

inline int64_t size_of(Dtype dtype) {
  return dtype == Dtype::f64 ? 8 : dtype == Dtype::f32 ? 4 : 2;
}
inline std::string name_of(Dtype dtype) {
  return dtype == Dtype::f32 ? "f32" : dtype == Dtype::bf16 ? "bf16" : "f16";
}

// The random word below which dropout with probability p drops a position.
inline uint32_t dropout_threshold(double p) {
  const double scaled = std::nearbyint(p * 4294967296.0);
  return scaled >= 4294967295.0 ? 4294967295u : static_cast<uint32_t>(scaled);
}

struct Shape {
  uint32_t grid[3], block[3], shared = 0;
};

// Launches a kernel; arguments are Memory, Boxed, numbers, or structs which the kernel takes by
// value.
template <class... Args>
void launch(const Device& device, const char* room, const std::string& kernel, const Shape& shape,
            const Args&... args) {
  const auto argument = []<class A>(const A& arg) {
    if constexpr (std::is_same_v<A, Memory>) {
      return Argument{&arg.data, sizeof(void*), arg.bytes, arg.written, arg.fresh, false};
    } else if constexpr (std::is_same_v<A, Boxed>) {
      return Argument{&arg, sizeof(A), arg.rows * arg.cols * 2, false, false, true};
    } else {
      static_assert(std::is_trivially_copyable_v<A>);
      return Argument{&arg, sizeof(A), -1, false, false, false};
    }
  };
  static_assert(sizeof...(args) <= kMostArguments);
  static_assert((0 + ... + std::is_same_v<Args, Boxed>) <= kMostBoxed);
  const Argument arguments[] = {argument(args)...};
  const auto& [grid, block, shared] = shape;
  run(device, {room,
               kernel.c_str(),
               {grid[0], grid[1], grid[2]},
               {block[0], block[1], block[2]},
               shared,
               static_cast<int32_t>(sizeof...(args)),
               arguments});
}

}  // namespace fastattn::cuda
