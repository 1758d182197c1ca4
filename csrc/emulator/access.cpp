// Loads, stores, atomics, asynchronous copies and fences.
#include <algorithm>

#include "emulator/operations.h"

namespace fastattn::emulator {
namespace {

// Stores of one instruction to the same place win in the order of the schedule.
template <class F>
void for_lanes_in_order(const Context& c, uint32_t lanes, F f) {
  if (c.machine.launch.order == kForward) return for_lanes(lanes, f);
  while (lanes) {
    int lane = kWarp - 1 - std::countl_zero(lanes);
    lanes &= ~(1u << lane);
    f(lane);
  }
}

// Operands: address (3), space, bytes of an element, how many, whether signed, then for each
// element a slot and its bytes a lane.
Flow load(Context& c) {
  uint32_t bytes = c.operand(4), count = c.operand(5);
  bool is_signed = c.operand(6);
  Access a = access_at(c, 0, static_cast<Space>(c.operand(3)), bytes * count, false);
  for_lanes(c.machine.locate(c, a), [&](int lane) {
    const Place& place = a.place[lane];
    if (c.flag(kStrong)) c.machine.observe(c, lane, place);
    c.machine.check_read(c, lane, place, bytes * count);
    for (uint32_t i = 0; i < count; i++) {
      int slot = c.operand(7 + 2 * i), width = c.operand(8 + 2 * i);
      uint64_t value = 0;
      std::memcpy(&value, place.host + i * bytes, std::min(bytes, 8u));
      if (is_signed && bytes < 8 && value >> (8 * bytes - 1)) value |= ~0ull << 8 * bytes;
      uint8_t* to = c.warp.file.get() + slot + lane * width;
      std::memcpy(to, &value, std::min(width, 8));
      if (bytes > 8) std::memcpy(to + 8, place.host + i * bytes + 8, bytes - 8);
    }
  });
  return Flow::next;
}

// Operands: address (3), space, bytes of an element, how many, then for each element a slot and
// its bytes a lane.
Flow store(Context& c) {
  uint32_t bytes = c.operand(4), count = c.operand(5);
  Access a = access_at(c, 0, static_cast<Space>(c.operand(3)), bytes * count, true);
  for_lanes_in_order(c, c.machine.locate(c, a), [&](int lane) {
    const Place& place = a.place[lane];
    uint8_t value[64];
    for (uint32_t i = 0; i < count; i++)
      std::memcpy(value + i * bytes,
                  c.warp.file.get() + c.operand(6 + 2 * i) + lane * c.operand(7 + 2 * i), bytes);
    c.machine.check_write(c, lane, place, bytes * count, value);
    if (c.flag(kStrong)) c.machine.publish(c, lane, place);
    std::memcpy(place.host, value, bytes * count);
  });
  return Flow::next;
}

// Operands: d, address (3), space, b, c. F(old, b, c) is the new value.
template <class F, class T>
Flow atomic(Context& c) {
  using V = typename T::lane;
  auto d = c.lanes<V>(0), x = c.lanes<V>(5), y = c.lanes<V>(6);
  Access a = access_at(c, 1, static_cast<Space>(c.operand(4)), sizeof(V), true);
  for_lanes_in_order(c, c.machine.locate(c, a), [&](int lane) {
    const Place& place = a.place[lane];
    c.machine.observe(c, lane, place);
    c.machine.check_write(c, lane, place, sizeof(V), nullptr);
    c.machine.publish(c, lane, place);
    V old, b = x[lane];
    std::memcpy(&old, place.host, sizeof old);
    V fresh = F{}(old, b, y[lane]);
    std::memcpy(place.host, &fresh, sizeof fresh);
    d.set(lane, old);
  });
  return Flow::next;
}

template <class... Types, class F>
void add_atomic(Table& table, const char* name, F) {
  (table.add("atom." + Table::dotted(name, Types::name), atomic<F, Types>), ...);
}

auto atomic_add = [](auto a, auto b, auto) {
  using T = decltype(a);
  if constexpr (is_pair<T>) {
    using H = decltype(a.low);
    return T{narrow<H>(widen(a.low) + widen(b.low)), narrow<H>(widen(a.high) + widen(b.high))};
  } else if constexpr (std::is_integral_v<T>) {
    return static_cast<T>(static_cast<uint64_t>(a) + static_cast<uint64_t>(b));
  } else {
    return narrow<T>(widen(a) + widen(b));
  }
};

// --- cp.async: a copy that somebody must wait for

// Operands: destination (3), source (3), bytes, the slot of how many of them to take from the
// source or -1, the predicate of whether to take none or -1.
Flow copy_async(Context& c) {
  Machine& machine = c.machine;
  uint32_t bytes = c.operand(6);
  Access to = access_at(c, 0, kShared, bytes, true), from = access_at(c, 3, kGlobal, bytes, false);
  std::array<uint32_t, kWarp> taken;
  uint32_t ignore = c.operand(8) < 0 ? 0 : c.mask(8);
  uint32_t reading = 0;
  for_lanes(c.active, [&](int lane) {
    taken[lane] = c.operand(7) < 0 ? bytes : std::min(bytes, c.lanes<uint32_t>(7)[lane]);
    if (ignore >> lane & 1) taken[lane] = 0;
    if (taken[lane]) reading |= 1u << lane;
  });
  uint32_t good = machine.locate(c, to);
  Context reads = c;
  reads.active = reading & good;
  uint32_t readable = reads.active ? machine.locate(reads, from) : 0;
  for_lanes(good & (readable | ~reading), [&](int lane) {
    Thread& thread = c.state(lane);
    Place& place = to.place[lane];
    if (taken[lane]) machine.check_read(c, lane, from.place[lane], taken[lane]);
    if (place.shadow) {
      // The copy writes in its own time, after all that its thread knows of now.
      machine.check_write(c, lane, place, bytes, nullptr);
      Epoch epoch = c.epoch(lane);
      epoch.agent = static_cast<uint16_t>(thread.clock.agent(kCopies));
      epoch.clock = thread.committed + 1;
      place.shadow->write(place.offset, bytes, thread.clock, epoch, nullptr, nullptr,
                          [](const Conflict&) {});
    }
    Copy copy{place.host,  from.place[lane].host, bytes,
              taken[lane], thread.committed,      place.offset};
    if (machine.launch.late)
      std::memset(copy.to, 0xff, bytes);
    else
      deliver(copy);
    thread.copies.push_back(copy);
  });
  return Flow::next;
}

Flow commit_copies(Context& c) {
  for_lanes(c.active, [&](int lane) { c.state(lane).committed++; });
  return Flow::next;
}

// Operand: how many of the latest groups may stay on their way.
Flow wait_copies(Context& c) {
  for_lanes(c.active, [&](int lane) {
    Thread& thread = c.state(lane);
    uint32_t pending = c.operand(0);
    uint32_t done = thread.committed > pending ? thread.committed - pending : 0;
    auto rest = thread.copies.begin();
    for (; rest != thread.copies.end() && rest->group < done; ++rest)
      if (c.machine.launch.late) deliver(*rest);
    thread.copies.erase(thread.copies.begin(), rest);
    uint32_t& seen = thread.clock.progress[kCopies];
    seen = std::max(seen, done);
  });
  return Flow::next;
}

Flow wait_all_copies(Context& c) {
  commit_copies(c);
  return wait_copies(c);
}

// --- fences and addresses

Flow fence(Context& c) {
  if (!c.machine.launch.check) return Flow::next;
  for_lanes(c.active, [&](int lane) {
    Clock& clock = c.state(lane).clock;
    if (c.flag(kAsyncProxy))
      clock.fence_proxy();
    else
      clock.fence(c.flag(kGpuScope));
  });
  return Flow::next;
}

// Operands: p, the address, the space asked about.
Flow is_space(Context& c) {
  auto address = c.lanes<uint64_t>(1);
  uint32_t result = 0;
  for_lanes(c.active, [&](int lane) {
    Space space = address[lane] >= kLocalWindow    ? kLocal
                  : address[lane] >= kSharedWindow ? kShared
                                                   : kGlobal;
    result |= static_cast<uint32_t>(space == c.operand(2)) << lane;
  });
  c.set_mask(0, result);
  return Flow::next;
}

}  // namespace

void add_accesses(Table& table) {
  table.add("ld", load);
  table.add("st", store);
  add_atomic<U32, S32, U64, F32, F64, F16, BF16, F16x2, BF16x2>(table, "add", atomic_add);
  add_atomic<U32, S32, U64, S64>(table, "min", [](auto a, auto b, auto) { return std::min(a, b); });
  add_atomic<U32, S32, U64, S64>(table, "max", [](auto a, auto b, auto) { return std::max(a, b); });
  add_atomic<B32, B64>(table, "and", [](auto a, auto b, auto) { return a & b; });
  add_atomic<B32, B64>(table, "or", [](auto a, auto b, auto) { return a | b; });
  add_atomic<B32, B64>(table, "xor", [](auto a, auto b, auto) { return a ^ b; });
  add_atomic<B32, B64>(table, "exch", [](auto, auto b, auto) { return b; });
  add_atomic<B16, B32, B64>(table, "cas", [](auto a, auto b, auto c) { return a == b ? c : a; });
  add_atomic<U32>(table, "inc",
                  [](uint32_t a, uint32_t b, uint32_t) { return a >= b ? 0 : a + 1; });
  add_atomic<U32>(table, "dec",
                  [](uint32_t a, uint32_t b, uint32_t) { return a == 0 || a > b ? b : a - 1; });
  table.add("cp.async", copy_async);
  table.add("cp.async.commit_group", commit_copies);
  table.add("cp.async.wait_group", wait_copies);
  table.add("cp.async.wait_all", wait_all_copies);
  table.add("fence", fence);
  table.add("isspacep", is_space);
}

}  // namespace fastattn::emulator
