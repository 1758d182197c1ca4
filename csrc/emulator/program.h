// What Python and the emulator tell each other: plain structs, mirrored in
// fastattn/emulator/abi.py.
#pragma once

#include <cstdint>

namespace fastattn::emulator {

constexpr int kWarp = 32;  // lanes of a warp

// Modifiers that an operation may be asked to honour.
enum Flag : uint32_t {
  kFtz = 1 << 0,         // subnormal inputs and results count as zero
  kSat = 1 << 1,         // clamp to [0, 1], or to the range of an integer
  kRelu = 1 << 2,        // clamp to [0, inf)
  kNan = 1 << 3,         // min and max propagate NaN
  kNegated = 1 << 4,     // the guard is @!p
  kStrong = 1 << 5,      // volatile, relaxed or stronger: not a data race with its like
  kAcquire = 1 << 6,     // memory order
  kRelease = 1 << 7,     // memory order
  kGpuScope = 1 << 8,    // orders accesses of other blocks, too
  kAligned = 1 << 9,     // every live lane of the warp must execute it together
  kAsyncProxy = 1 << 10  // a fence between ordinary accesses and those of the copy engine
};

// One PTX instruction. Its operands are slots (offsets in bytes into the register file of a warp,
// where a register holds its 32 lanes side by side) or plain numbers, as its operation defines.
struct Instruction {
  int32_t operation;
  uint32_t flags;
  int32_t guard;     // the slot of a predicate, or -1
  int32_t operands;  // index of the first in Program::operands
  int32_t leader;    // 1 where a jump may arrive
};

// A slot that holds the same from the beginning of every block: constants and special registers.
struct Initial {
  int32_t slot, bytes;  // bytes of a lane
  int32_t special;      // a Special, or -1 for `value`
  int32_t pad;
  uint64_t value;
};

enum Special : int32_t {
  kTidX,
  kTidY,
  kTidZ,
  kNtidX,
  kNtidY,
  kNtidZ,
  kCtaidX,
  kCtaidY,
  kCtaidZ,
  kNctaidX,
  kNctaidY,
  kNctaidZ,
  kLaneId,
  kWarpId,
  kNwarpId,
  kMaskEq,
  kMaskLe,
  kMaskLt,
  kMaskGe,
  kMaskGt,
  kClusterX,
  kClusterY,
  kClusterZ,
  kNclusterX,
  kNclusterY,
  kNclusterZ,
  kClusterCtaidX,
  kClusterCtaidY,
  kClusterCtaidZ,
  kClusterNctaidX,
  kClusterNctaidY,
  kClusterNctaidZ,
  kClusterCtarank,
  kClusterNctarank,
  kDynamicShared,
  kTotalShared
};

struct Program {
  const Instruction* instructions;
  const int32_t* operands;
  const Initial* initials;
  int32_t instruction_count, initial_count;
  int32_t file_bytes;     // the register file of a warp
  int32_t local_bytes;    // local memory of a thread
  int32_t static_shared;  // before the dynamic shared memory
  int32_t pad;
};

// Memory that kernels may address: an argument, a variable of the module or the parameters.
struct Buffer {
  uint8_t* host;
  uint64_t base;  // the address that kernels see
  uint64_t size;
  int32_t writable;
  int32_t checked;      // whether accesses can race
  int32_t initialised;  // whether it holds values before the launch
  int32_t pad;
};

enum Order : int32_t { kForward, kReverse, kRandom };

struct Launch {
  uint32_t grid[3], block[3], cluster[3];
  uint32_t dynamic_shared;
  int32_t order;
  int32_t late;   // asynchronous copies arrive when they are waited for, not when issued
  int32_t check;  // data races, uninitialised memory
  int32_t count;  // bank conflicts and sectors
  uint64_t seed;
  uint64_t patience;  // warp instructions without progress that count as a hang
  int32_t buffer_count;
  int32_t max_findings;
  const Buffer* buffers;
};

struct Finding {
  const char* kind;
  int32_t instruction, other_instruction;  // indices, or -1
  int32_t block, other_block;              // linear indices, or -1
  int32_t thread, other_thread;            // in their blocks, or -1
  int32_t space;                           // a Space
  int32_t buffer;                          // index in Launch::buffers, or -1
  int64_t offset;                          // in the buffer or window
  uint64_t count;                          // how often it was seen
  char detail[160];
};

// What one instruction did in all.
struct Site {
  uint64_t executed, lanes;   // by warps, by threads
  uint64_t transfers, ideal;  // wavefronts of shared or sectors of global memory
};

enum Space : int32_t { kGeneric, kGlobal, kShared, kLocal, kConst };

}  // namespace fastattn::emulator
