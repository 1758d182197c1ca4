// The machine that a launch runs on: blocks of warps, their memory, and what is found on the way.
#pragma once

#include <array>
#include <bit>
#include <cstring>
#include <memory>
#include <string>
#include <unordered_map>
#include <vector>

#include "emulator/clock.h"
#include "emulator/program.h"
#include "emulator/shadow.h"

namespace fastattn::emulator {

// Where kernels see shared and local memory when an address names no space. Buffers lie below,
// 2^34 bytes apart, so that no overrun of one reaches another.
constexpr uint64_t kSharedWindow = 1ull << 44, kLocalWindow = 2ull << 44;
constexpr int kBufferShift = 34;
// Shared memory of the r-th block of a cluster, in 32-bit addresses: (r + 1) << 24.
constexpr int kClusterShift = 24;

enum class Flow {
  next,   // go on behind the instruction
  jump,   // the active lanes go to operand 0
  park,   // the operation has set the lanes' pc, or put them to sleep
  yield,  // like park, after a poll that failed: let others go first
};

// Who must execute an operation together.
enum class Together { nobody, members, warp };

struct Context;
using Run = Flow (*)(Context&);

struct Operation {
  std::string name;
  Run run;
  Together together = Together::nobody;
  int mask_operand = 0;  // with `members`: the slot that names them
};

// An Instruction made ready to run.
struct Decoded {
  Run run;
  const int32_t* operands;
  int32_t guard;
  uint32_t flags;
  Together together;
  bool leader;
  int32_t operation;
  int32_t mask_operand;
};

template <class F>
inline void for_lanes(uint32_t mask, F f) {
  if (mask == ~0u) {
    for (int lane = 0; lane < kWarp; lane++) f(lane);
  } else {
    for (; mask; mask &= mask - 1) f(std::countr_zero(mask));
  }
}

// A register: its lanes side by side.
template <class T>
struct Lanes {
  uint8_t* at;
  T operator[](int lane) const {
    T value;
    std::memcpy(&value, at + lane * sizeof(T), sizeof(T));
    return value;
  }
  void set(int lane, T value) { std::memcpy(at + lane * sizeof(T), &value, sizeof(T)); }
};

// A copy that cp.async has issued.
struct Copy {
  uint8_t* to;
  const uint8_t* from;
  uint32_t bytes, taken;  // of which `taken` come from memory, zeros follow
  uint32_t group;
  uint64_t offset;  // in shared memory
};

inline void deliver(const Copy& copy) {
  std::memset(copy.to, 0, copy.bytes);
  if (copy.taken) std::memcpy(copy.to, copy.from, copy.taken);
}

struct Thread {
  Clock clock;
  std::vector<Copy> copies;
  uint32_t committed = 0;  // groups of copies
  uint32_t stored = 0;     // groups of bulk stores
  uint32_t phases = 0;     // of the cluster's barrier, the last of which it has arrived at
};

// A register that a product is still to write.
struct Result {
  uint32_t group;
  int32_t slot;
  std::array<float, kWarp> value;
};

struct Warp {
  int index = 0;
  uint32_t live = 0;
  uint32_t held = 0;      // lanes asleep at a barrier
  uint32_t stopped = 0;   // lanes at an instruction that others must reach, too
  uint32_t tired = 0;     // lanes that others go before, so that a poll cannot starve them
  uint32_t visits = 0;    // jumps since the warp diverged
  uint64_t idle = 0;      // instructions since the last synchronisation
  uint32_t products = 0;  // groups of wgmma issued
  bool fenced = false;    // whether products see what threads have done to registers
  std::vector<Result> late;
  std::array<int32_t, kWarp> pc{};
  std::unique_ptr<uint8_t[]> file;

  uint32_t runnable() const { return live & ~held & ~stopped; }
};

struct Barrier {
  struct Sleeper {
    Warp* warp;
    int lane;
  };
  std::vector<Sleeper> sleepers;
  uint32_t arrived = 0;   // threads, asleep or gone on
  uint32_t expected = 0;  // 0: all of the block
  int32_t instruction = -1;
  Shared news;  // from those who have gone on
};

// Bytes that the copy engine holds back until they are waited for.
struct Delivery {
  uint8_t* to;
  std::vector<uint8_t> bytes;
};

struct Mbarrier {
  Agent agent = 0;
  int32_t expected = 0, pending = 0;  // arrivals
  int64_t bytes = 0;                  // on their way
  uint32_t phase = 0;                 // phases completed
  bool live = false;
  uint32_t block = 0;  // whose memory it is in
  Shared news, done;   // from the arrivals of this phase, and of the one completed last
  std::vector<Delivery> late;

  void settle();  // ends the phase once all have arrived
  void deliver_late();
};

struct Block {
  uint32_t linear = 0;
  std::array<uint32_t, 3> index{};
  uint32_t rank = 0;  // in its cluster
  uint32_t live = 0;  // threads
  std::vector<Thread> threads;
  std::vector<Warp> warps;
  std::vector<uint8_t> shared, local;
  Shadow shadow;
  std::array<Barrier, 16> barriers;
  std::unordered_map<uint64_t, std::array<Shared, 2>> published;  // by atomics in shared memory
  std::unordered_map<uint64_t, Mbarrier> mbarriers;
};

// The barrier of all threads of a cluster's blocks.
struct ClusterBarrier {
  uint32_t arrived = 0, phase = 0;  // threads, and phases completed
  Shared news, done;                // from the arrivals of this phase, and of the one before
};

// Where an address leads. A null host means nowhere.
struct Place {
  uint8_t* host = nullptr;
  Shadow* shadow = nullptr;
  uint64_t offset = 0;
  Space space = kGeneric;  // which stands for none
  int32_t buffer = -1;
  Block* block = nullptr;  // whose shared memory it is
};

class Machine;

// One instruction as a group of lanes executes it.
struct Context {
  Machine& machine;
  Block& block;
  Warp& warp;
  const Decoded& in;
  int32_t pc;
  uint32_t active;

  int32_t operand(int k) const { return in.operands[k]; }
  template <class T>
  Lanes<T> lanes(int k) const {
    return {warp.file.get() + in.operands[k]};
  }
  uint32_t mask(int k) const { return Lanes<uint32_t>{warp.file.get() + in.operands[k]}[0]; }
  void set_mask(int k, uint32_t value) const {
    Lanes<uint32_t> slot{warp.file.get() + in.operands[k]};
    slot.set(0, (slot[0] & ~active) | (value & active));
  }
  bool flag(uint32_t f) const { return in.flags & f; }
  int thread(int lane) const { return warp.index * kWarp + lane; }
  Thread& state(int lane) const { return block.threads[thread(lane)]; }
  Epoch epoch(int lane) const {
    return {block.linear, state(lane).clock.progress[kItself], pc,
            static_cast<uint16_t>(thread(lane)), flag(kStrong)};
  }
};

// What an instruction does to memory in all its lanes.
struct Access {
  Space space;
  uint32_t bytes;  // of a lane
  bool write;
  std::array<uint64_t, kWarp> address;
  std::array<Place, kWarp> place;
  bool aligned = true;  // whether it must be, to its size
};

class Machine {
 public:
  Machine(const Program& program, const Launch& launch);
  void run();

  const Program& program;
  const Launch& launch;
  std::vector<Finding> findings;
  std::vector<Site> sites;

  // --- memory (memory.cpp)
  // Fills in the places of the active lanes and returns those whose access is legal; the rest are
  // reported.
  uint32_t locate(Context& c, Access& access);
  void check_read(Context& c, int lane, const Place& place, uint32_t bytes);
  void check_write(Context& c, int lane, const Place& place, uint32_t bytes, const uint8_t* after);
  // What an asynchronous unit reads for a thread that acts in `role`.
  void check_async_read(Context& c, int lane, const Place& place, uint32_t bytes, Epoch reader);
  // Ordering through memory, for strong accesses.
  void publish(Context& c, int lane, const Place& place);
  void observe(Context& c, int lane, const Place& place);
  void count_access(Context& c, const Access& access, uint32_t lanes);
  Block* peer(Block& block, uint32_t rank);

  // --- scheduling (schedule.cpp)
  void arrive(Context& c, int barrier, uint32_t expected, bool sleep);
  void arrive_at_cluster(Context& c, bool publish);
  // Whether all threads of the cluster have arrived; then the active ones know what those did.
  bool wait_for_cluster(Context& c, bool learn);
  void exit(Context& c);
  uint32_t random();
  // Says that a warp has got somewhere, and does not hang.
  void progress(Warp& warp) { warp.idle = polls_ = 0; }
  uint64_t tick() { return ++ticks_; }
  const int32_t* operands_at(int32_t pc) const { return code_[pc].operands; }

  // --- findings
  struct Other {
    int32_t instruction = -1, block = -1, thread = -1;
  };
  Other other(const Block& block, const Epoch& e) const;
  void report(const char* kind, const Block& block, int thread, int32_t instruction,
              const Place& place, Other other, const char* format, ...)
      __attribute__((format(printf, 8, 9)));

 private:
  struct Group {
    int32_t pc;
    uint32_t lanes;
  };
  void start(Block& block, uint32_t linear);
  void fill_specials(Block& block, Warp& warp);
  void run_resident();
  Group pick(Warp& warp);
  bool advance(Block& block, Warp& warp);
  uint32_t members(Warp& warp, int lane) const;
  bool complete(Block& block, Warp& warp, bool force);
  void release(Block& block, Barrier& barrier);
  bool unblock(Block& block);
  void settle_cluster();
  Flow execute(Block& block, Warp& warp, int32_t pc, uint32_t active);

  std::vector<Decoded> code_;
  std::vector<uint8_t> image_;  // the register file at the start of a warp
  std::vector<std::unique_ptr<Block>> resident_;
  ClusterBarrier cluster_;
  std::vector<Shadow> shadows_;  // of the buffers
  std::unordered_map<uint64_t, std::array<Shared, 2>> published_;
  std::unordered_map<std::string, size_t> known_findings_;
  uint64_t random_;
  uint64_t ticks_ = 0;
  uint64_t polls_ = 0;  // that failed, without anything else happening
};

// All operations that the emulator knows.
const std::vector<Operation>& operations();

}  // namespace fastattn::emulator
