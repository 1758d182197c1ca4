// What lanes do together: control flow, barriers, shuffles and votes.
#include <algorithm>
#include <functional>

#include "emulator/operations.h"

namespace fastattn::emulator {
namespace {

// --- control flow

Flow branch(Context&) { return Flow::jump; }

Flow leave(Context& c) {
  c.machine.exit(c);
  return Flow::park;
}

// Operands: the index, how many targets there are, the targets.
Flow branch_indexed(Context& c) {
  auto index = c.lanes<uint32_t>(0);
  uint32_t lost = 0;
  for_lanes(c.active, [&](int lane) {
    if (index[lane] < static_cast<uint32_t>(c.operand(1)))
      c.warp.pc[lane] = c.operand(2 + static_cast<int>(index[lane]));
    else
      lost |= 1u << lane;
  });
  if (lost) {
    int lane = std::countr_zero(lost);
    c.machine.report("bad-jump", c.block, c.thread(lane), c.pc, {}, {}, "target %u of %d",
                     index[lane], c.operand(1));
    Context leaving = c;
    leaving.active = lost;
    c.machine.exit(leaving);
  }
  return Flow::park;
}

Flow trap(Context& c) {
  int lane = std::countr_zero(c.active);
  c.machine.report("trap", c.block, c.thread(lane), c.pc, {}, {}, "the kernel stops itself");
  c.machine.exit(c);
  return Flow::park;
}

Flow nothing(Context&) { return Flow::next; }

Flow yield(Context& c) {
  for_lanes(c.active, [&](int lane) { c.warp.pc[lane] = c.pc + 1; });
  return Flow::yield;
}

// --- barriers of the block. Operands: the barrier, how many threads or -1, both slots.

template <bool kSleep>
Flow barrier(Context& c) {
  uint32_t left = c.active;
  while (left) {
    int first = std::countr_zero(left);
    uint32_t id = c.lanes<uint32_t>(0)[first];
    uint32_t expected = c.operand(1) < 0 ? 0 : c.lanes<uint32_t>(1)[first];
    Context group = c;
    group.active = 0;
    for_lanes(left, [&](int lane) {
      if (c.lanes<uint32_t>(0)[lane] == id) group.active |= 1u << lane;
    });
    left &= ~group.active;
    if (id < c.block.barriers.size() && expected % kWarp == 0) {
      c.machine.arrive(group, id, expected, kSleep);
    } else {
      c.machine.report("barrier-mismatch", c.block, c.thread(first), c.pc, {}, {},
                       "barrier %u of %u threads: there are 16, for multiples of 32", id, expected);
      for_lanes(group.active, [&](int lane) { c.warp.pc[lane] = c.pc + 1; });
    }
  }
  return Flow::park;
}

// --- exchanges. The lanes of a group may stand at different instructions of the same kind, so
// operands are looked up lane by lane.

template <class T>
T value(const Context& c, int k, int lane) {
  const int32_t* operands = c.machine.operands_at(c.warp.pc[lane]);
  return Lanes<T>{c.warp.file.get() + operands[k]}[lane];
}
bool predicate(const Context& c, int k, int lane) {
  const int32_t* operands = c.machine.operands_at(c.warp.pc[lane]);
  return Lanes<uint32_t>{c.warp.file.get() + operands[k]}[0] >> lane & 1;
}
template <class T>
void set_value(const Context& c, int k, int lane, T x) {
  const int32_t* operands = c.machine.operands_at(c.warp.pc[lane]);
  Lanes<T>{c.warp.file.get() + operands[k]}.set(lane, x);
}
void set_predicate(const Context& c, int k, int lane, bool x) {
  const int32_t* operands = c.machine.operands_at(c.warp.pc[lane]);
  Lanes<uint32_t> slot{c.warp.file.get() + operands[k]};
  slot.set(0, (slot[0] & ~(1u << lane)) | static_cast<uint32_t>(x) << lane);
}

// A mask must name the lane that passes it.
void check_mask(Context& c, int k) {
  for_lanes(c.active, [&](int lane) {
    uint32_t mask = value<uint32_t>(c, k, lane);
    if (!(mask >> lane & 1))
      c.machine.report("mask-without-self", c.block, c.thread(lane), c.warp.pc[lane], {}, {},
                       "lane %d passes the mask 0x%08x", lane, mask);
  });
}

Flow warp_barrier(Context& c) {
  check_mask(c, 0);
  c.machine.progress(c.warp);
  if (!c.machine.launch.check) return Flow::next;
  std::vector<Clock*> group;
  for_lanes(c.active, [&](int lane) { group.push_back(&c.state(lane).clock); });
  meet(group);
  return Flow::next;
}

enum Shuffle { kBfly, kUp, kDown, kIdx };

// Operands: d, p, a, b, c, the mask, which shuffle.
Flow shuffle(Context& c) {
  check_mask(c, 5);
  std::array<uint32_t, kWarp> result{};
  uint32_t inside = 0;
  for_lanes(c.active, [&](int lane) {
    int b = value<uint32_t>(c, 3, lane) & 31, limits = value<uint32_t>(c, 4, lane);
    int segment = limits >> 8 & 31, clamp = limits & 31;
    int low = lane & segment, high = low | (clamp & ~segment), source = lane;
    bool in_range = false;
    switch (c.machine.operands_at(c.warp.pc[lane])[6]) {
      case kBfly:
        source = lane ^ b;
        in_range = source <= high;
        break;
      case kUp:
        source = lane - b;
        in_range = source >= high;
        break;
      case kDown:
        source = lane + b;
        in_range = source <= high;
        break;
      case kIdx:
        source = low | (b & ~segment);
        in_range = source <= high;
        break;
    }
    if (!in_range) source = lane;
    inside |= static_cast<uint32_t>(in_range) << lane;
    if (!(c.active >> source & 1)) {
      c.machine.report("shuffle-from-inactive-lane", c.block, c.thread(lane), c.warp.pc[lane], {},
                       {}, "lane %d reads lane %d, and only 0x%08x take part", lane, source,
                       c.active);
      result[lane] = 0xffffffffu;
    } else {
      result[lane] = value<uint32_t>(c, 2, source);
    }
  });
  for_lanes(c.active, [&](int lane) {
    set_value(c, 0, lane, result[lane]);
    set_predicate(c, 1, lane, inside >> lane & 1);
  });
  return Flow::next;
}

uint32_t ballot(Context& c, int k) {
  uint32_t votes = 0;
  for_lanes(c.active,
            [&](int lane) { votes |= static_cast<uint32_t>(predicate(c, k, lane)) << lane; });
  return votes;
}

// Operands: d, the predicate, the mask, whether the predicate is negated.
enum Vote { kBallot, kAny, kAll, kUni };
template <int kVote>
Flow vote(Context& c) {
  check_mask(c, 2);
  uint32_t votes = ballot(c, 1);
  if (c.operand(3)) votes = ~votes & c.active;
  bool all = votes == c.active, none = votes == 0;
  for_lanes(c.active, [&](int lane) {
    if (kVote == kBallot)
      set_value(c, 0, lane, votes);
    else
      set_predicate(c, 0, lane, kVote == kAny ? !none : kVote == kAll ? all : all || none);
  });
  return Flow::next;
}

// Operands: d, a, the mask.
template <class F, class T>
Flow reduce(Context& c) {
  check_mask(c, 2);
  bool first = true;
  T all{};
  for_lanes(c.active, [&](int lane) {
    T x = value<T>(c, 1, lane);
    all = first ? x : static_cast<T>(F{}(all, x));
    first = false;
  });
  for_lanes(c.active, [&](int lane) { set_value(c, 0, lane, all); });
  return Flow::next;
}

// Operands: d, p, a, the mask.
template <class T, bool kAllEqual>
Flow match(Context& c) {
  check_mask(c, 3);
  std::array<uint32_t, kWarp> result{};
  for_lanes(c.active, [&](int lane) {
    for_lanes(c.active, [&](int other) {
      if (value<T>(c, 2, other) == value<T>(c, 2, lane)) result[lane] |= 1u << other;
    });
  });
  for_lanes(c.active, [&](int lane) {
    bool all = result[lane] == c.active;
    set_value(c, 0, lane, kAllEqual && !all ? 0 : result[lane]);
    if (kAllEqual) set_predicate(c, 1, lane, all);
  });
  return Flow::next;
}

// --- clusters

// Operand: whether what a thread has done is for those who wait to see.
Flow arrive_at_cluster(Context& c) {
  c.machine.arrive_at_cluster(c, c.operand(0));
  return Flow::next;
}

// Operand: whether a thread sees what those have done who arrived.
Flow wait_for_cluster(Context& c) {
  return c.machine.wait_for_cluster(c, c.operand(0)) ? Flow::next : Flow::yield;
}

// Operands: d, its bytes a lane, the address of shared memory here (3), the slot of a block's rank
// in the cluster. Where the address names no space, d does not either.
Flow map_address(Context& c) {
  Access a = access_at(c, 2, kGeneric, 1, false);
  for_lanes(c.active, [&](int lane) {
    const uint64_t window = a.address[lane] & kSharedWindow;
    const uint64_t offset = a.address[lane] & ((1u << kClusterShift) - 1);
    const uint64_t rank = c.lanes<uint32_t>(5)[lane];
    const uint64_t there = window | (rank + 1) << kClusterShift | offset;
    std::memcpy(c.warp.file.get() + c.operand(0) + lane * c.operand(1), &there, c.operand(1));
  });
  return Flow::next;
}

// Operands: d, p, the mask. The lowest lane is elected.
Flow elect(Context& c) {
  uint32_t leader = std::countr_zero(c.active);
  for_lanes(c.active, [&](int lane) {
    set_value(c, 0, lane, leader);
    set_predicate(c, 1, lane, lane == static_cast<int>(leader));
  });
  return Flow::next;
}

Flow active_mask(Context& c) {
  auto d = c.lanes<uint32_t>(0);
  for_lanes(c.active, [&](int lane) { d.set(lane, c.active); });
  return Flow::next;
}

// Some clock that never stands still. Operand: d.
template <class T>
Flow read_clock(Context& c) {
  auto d = c.lanes<T>(0);
  for_lanes(c.active, [&](int lane) { d.set(lane, static_cast<T>(c.machine.tick())); });
  return Flow::next;
}

}  // namespace

void add_exchanges(Table& table) {
  auto members = [&](const char* name, Run run, int mask) {
    table.add(name, run, Together::members, mask);
  };
  table.add("bra", branch);
  table.add("brx.idx", branch_indexed);
  table.add("exit", leave);
  table.add("trap", trap);
  table.add("nothing", nothing);
  table.add("yield", yield);
  table.add("bar.sync", barrier<true>);
  table.add("bar.arrive", barrier<false>);
  table.add("barrier.cluster.arrive", arrive_at_cluster);
  table.add("barrier.cluster.wait", wait_for_cluster);
  table.add("mapa", map_address);
  members("bar.warp.sync", warp_barrier, 0);
  members("shfl", shuffle, 5);
  members("vote.ballot", vote<kBallot>, 2);
  members("vote.any", vote<kAny>, 2);
  members("vote.all", vote<kAll>, 2);
  members("vote.uni", vote<kUni>, 2);
  auto sum = [](auto a, auto b) { return static_cast<uint64_t>(a) + b; };
  auto low = [](auto a, auto b) { return std::min(a, b); };
  auto high = [](auto a, auto b) { return std::max(a, b); };
  members("redux.add.s32", reduce<decltype(sum), int32_t>, 2);
  members("redux.add.u32", reduce<decltype(sum), uint32_t>, 2);
  members("redux.min.s32", reduce<decltype(low), int32_t>, 2);
  members("redux.min.u32", reduce<decltype(low), uint32_t>, 2);
  members("redux.max.s32", reduce<decltype(high), int32_t>, 2);
  members("redux.max.u32", reduce<decltype(high), uint32_t>, 2);
  members("redux.and.b32", reduce<std::bit_and<uint32_t>, uint32_t>, 2);
  members("redux.or.b32", reduce<std::bit_or<uint32_t>, uint32_t>, 2);
  members("redux.xor.b32", reduce<std::bit_xor<uint32_t>, uint32_t>, 2);
  members("match.any.b32", match<uint32_t, false>, 3);
  members("match.any.b64", match<uint64_t, false>, 3);
  members("match.all.b32", match<uint32_t, true>, 3);
  members("match.all.b64", match<uint64_t, true>, 3);
  members("elect", elect, 2);
  table.add("activemask", active_mask);
  table.add("clock.b32", read_clock<uint32_t>);
  table.add("clock.b64", read_clock<uint64_t>);
}

}  // namespace fastattn::emulator
