// mbarrier: barriers in shared memory, which threads and copies arrive at.
#include <algorithm>

#include "emulator/operations.h"

namespace fastattn::emulator {

void Mbarrier::settle() {
  if (pending || bytes) return;
  phase++;
  pending = expected;
  if (news) {
    auto all = std::make_shared<Known>();
    all->block = block;
    join(*all, *news);
    if (all->agents.size() <= agent) all->agents.resize(agent + 1);
    all->agents[agent] = phase;
    done = all;
  }
  news = nullptr;
}

void Mbarrier::deliver_late() {
  for (const Delivery& delivery : late) {
    std::copy(delivery.bytes.begin(), delivery.bytes.end(), delivery.to);
    bytes -= static_cast<int64_t>(delivery.bytes.size());
  }
  late.clear();
  settle();
}

namespace {

// Calls f(lane, mbarrier) for the active lanes whose mbarrier is where it should be.
template <class F>
void for_objects(Context& c, int first, bool initialising, F f) {
  Access a = access_at(c, first, kShared, 8, true);
  for_lanes(c.machine.locate(c, a), [&](int lane) {
    const Place& place = a.place[lane];
    auto& all = place.block->mbarriers;
    auto [entry, fresh] = all.try_emplace(place.offset);
    Mbarrier& mbarrier = entry->second;
    if (fresh) {
      mbarrier.agent = static_cast<Agent>(kRoles * c.block.threads.size() + all.size() - 1);
      mbarrier.block = place.block->linear;
    }
    if (!mbarrier.live && !initialising)
      return c.machine.report("mbarrier-not-initialised", c.block, c.thread(lane), c.pc, place, {},
                              "no mbarrier.init made this an mbarrier");
    // The object itself is memory, too: its initialisation must be seen by whoever uses it.
    if (initialising)
      c.machine.check_write(c, lane, place, 8, nullptr);
    else
      c.machine.check_read(c, lane, place, 8);
    f(lane, mbarrier, place);
  });
}

// Operands: address (3), the slot of the count.
Flow init(Context& c) {
  for_objects(c, 0, true, [&](int lane, Mbarrier& m, const Place& place) {
    if (m.live)
      c.machine.report("mbarrier-reinitialised", c.block, c.thread(lane), c.pc, place, {},
                       "it is in use: mbarrier.inval comes first");
    const auto [agent, block] = std::pair(m.agent, m.block);
    m = Mbarrier{};
    m.agent = agent, m.block = block;
    m.expected = m.pending = static_cast<int32_t>(c.lanes<uint32_t>(3)[lane]);
    m.live = true;
  });
  return Flow::next;
}

Flow invalidate(Context& c) {
  for_objects(c, 0, false, [&](int lane, Mbarrier& m, const Place& place) {
    if (m.bytes)
      c.machine.report("mbarrier-in-use", c.block, c.thread(lane), c.pc, place, {},
                       "%lld bytes are still on their way to it", static_cast<long long>(m.bytes));
    m.live = false;
  });
  return Flow::next;
}

void arrive_at(Context& c, int lane, Mbarrier& m, const Place& place, int count) {
  if (c.machine.launch.check) {
    Clock& clock = c.state(lane).clock;
    m.news = joined(m.news, clock.snapshot());
    clock.step();
  }
  m.pending -= count;
  if (m.pending < 0) {
    c.machine.report("mbarrier-too-many-arrivals", c.block, c.thread(lane), c.pc, place, {},
                     "its phase takes %d", m.expected);
    m.pending = 0;
  }
  c.machine.progress(c.warp);
  m.settle();
}

// Operands: the state, address (3), the slots of how many arrive and how many bytes to expect.
Flow arrive(Context& c) {
  for_objects(c, 1, false, [&](int lane, Mbarrier& m, const Place& place) {
    c.lanes<uint64_t>(0).set(lane, m.phase);
    m.bytes += c.lanes<uint32_t>(5)[lane];
    arrive_at(c, lane, m, place, static_cast<int>(c.lanes<uint32_t>(4)[lane]));
  });
  return Flow::next;
}

// Operands: address (3), the slot of how many bytes to expect.
Flow expect(Context& c) {
  for_objects(c, 0, false,
              [&](int lane, Mbarrier& m, const Place&) { m.bytes += c.lanes<uint32_t>(3)[lane]; });
  return Flow::next;
}

// The copies that a thread has issued with cp.async arrive for it. Operands: address (3), whether
// they count among the expected arrivals.
Flow arrive_after_copies(Context& c) {
  for_objects(c, 0, false, [&](int lane, Mbarrier& m, const Place& place) {
    Thread& thread = c.state(lane);
    for (const Copy& copy : thread.copies)
      if (c.machine.launch.late) deliver(copy);
    thread.copies.clear();
    thread.committed++;
    if (c.machine.launch.check) {
      // Whoever waits sees the copies; the thread itself does not before it waits, too.
      auto news = std::make_shared<Known>(*thread.clock.known);
      news->agents[thread.clock.agent(kCopies)] = thread.committed;
      m.news = joined(m.news, news);
    }
    arrive_at(c, lane, m, place, c.operand(3));
  });
  return Flow::next;
}

// Operands: p, address (3), a slot, whether that is a parity or else the state that an arrival
// returned.
Flow wait(Context& c) {
  uint32_t done = 0;
  for_objects(c, 1, false, [&](int lane, Mbarrier& m, const Place&) {
    auto complete = [&] {
      return c.operand(5) ? (m.phase & 1) != (c.lanes<uint32_t>(4)[lane] & 1)
                          : m.phase != static_cast<uint32_t>(c.lanes<uint64_t>(4)[lane]);
    };
    if (!complete() && m.pending == 0) m.deliver_late();
    if (!complete()) return;
    if (c.machine.launch.check && m.done) c.state(lane).clock.learn(m.done);
    done |= 1u << lane;
  });
  c.set_mask(0, done);
  if (done == c.active) {
    c.machine.progress(c.warp);
    return Flow::next;
  }
  for_lanes(c.active, [&](int lane) { c.warp.pc[lane] = c.pc + 1; });
  return Flow::yield;
}

}  // namespace

void add_mbarriers(Table& table) {
  table.add("mbarrier.init", init);
  table.add("mbarrier.inval", invalidate);
  table.add("mbarrier.arrive", arrive);
  table.add("mbarrier.expect_tx", expect);
  table.add("mbarrier.wait", wait);
  table.add("cp.async.mbarrier.arrive", arrive_after_copies);
}

}  // namespace fastattn::emulator
