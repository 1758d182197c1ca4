// Happens-before: which accesses a thread can rely on, as vector clocks that threads share.
#pragma once

#include <algorithm>
#include <cstdint>
#include <map>
#include <memory>
#include <span>
#include <vector>

namespace fastattn::emulator {

// Who touches memory in a block of n threads. Thread t acts as itself (agent t), through the copies
// that it has issued with cp.async (n + t), where it leads a warp through the products that the
// warp has issued with wgmma (2 n + t), and through its bulk stores (3 n + t). Behind these stand
// the mbarriers (4 n and up), for the copies that complete on them.
using Agent = uint32_t;
enum Role : uint32_t { kItself, kCopies, kProducts, kStores, kRoles };

// Who touched memory when. Clock 0 stands for nobody.
struct Epoch {
  uint32_t block = 0, clock = 0;
  int32_t instruction = -1;
  uint16_t agent = 0;
  bool strong = false;
};

// How far a thread has seen each agent of its own block and of others.
struct Known {
  uint32_t block = 0;
  std::vector<uint32_t> agents;
  std::vector<uint32_t> fenced;  // of these, what a fence lets the asynchronous units see
  std::map<uint32_t, std::vector<uint32_t>> others;
};
using Shared = std::shared_ptr<const Known>;

inline void join(std::vector<uint32_t>& into, const std::vector<uint32_t>& from) {
  if (into.size() < from.size()) into.resize(from.size());
  for (size_t i = 0; i < from.size(); i++) into[i] = std::max(into[i], from[i]);
}

inline bool covers(const std::vector<uint32_t>& seen, const Epoch& e) {
  return e.clock == 0 || (e.agent < seen.size() && seen[e.agent] >= e.clock);
}

inline void join(Known& into, const Known& from) {
  if (into.block == from.block) join(into.fenced, from.fenced);
  join(into.block == from.block ? into.agents : into.others[from.block], from.agents);
  for (const auto& [block, agents] : from.others)
    join(block == into.block ? into.agents : into.others[block], agents);
}

// Either may be null.
inline Shared joined(const Shared& a, const Shared& b) {
  if (!a || !b || a == b) return a ? a : b;
  auto both = std::make_shared<Known>(*a);
  join(*both, *b);
  return both;
}

// The clock of one thread. Everything that a group has seen together is one object for all of it;
// only the thread's own progress is apart.
struct Clock {
  Shared known;
  Agent thread = 0;
  uint32_t threads = 0;                      // in the block
  uint32_t progress[kRoles] = {1, 0, 0, 0};  // own clock; groups of each role waited for
  // Scope 0 reaches the block, scope 1 the device.
  Shared released[2];  // as of the last fence: what a relaxed write publishes
  Shared acquired[2];  // through relaxed reads: what the next fence brings in

  Agent agent(Role role) const {
    return role * threads + (role == kProducts ? thread / 32 * 32 : thread);
  }

  bool knows(const Epoch& e) const {
    if (e.block != known->block && e.clock) {
      auto other = known->others.find(e.block);
      return other != known->others.end() && covers(other->second, e);
    }
    if (e.agent == thread) return true;
    for (Role role : {kCopies, kProducts, kStores})
      if (e.agent == agent(role) && e.clock <= progress[role]) return true;
    return covers(known->agents, e);
  }

  // All that this thread has done and seen, for others to learn.
  Shared snapshot() const {
    auto all = std::make_shared<Known>(*known);
    publish(*all);
    return all;
  }

  void publish(Known& to) const {
    for (Role role : {kItself, kCopies, kProducts, kStores}) {
      uint32_t& seen = to.agents[agent(role)];
      seen = std::max(seen, progress[role]);
    }
  }

  // Moves on, so that what comes now is not mistaken for what others have been told of.
  void step() { progress[kItself]++; }

  void learn(const Shared& news) { known = joined(known, news); }

  // Scope 0 or 1; a fence of scope 1 is one of scope 0, too.
  void fence(int scope) {
    for (int s = 0; s <= scope; s++) {
      if (acquired[s]) learn(acquired[s]);
      acquired[s] = nullptr;
    }
    released[0] = snapshot();
    if (scope == 1) released[1] = released[0];
    step();
  }

  // Lets the asynchronous units see what this thread can see.
  void fence_proxy() {
    auto all = std::make_shared<Known>(*snapshot());
    join(all->fenced, all->agents);
    known = all;
    step();
  }
};

// Threads that meet: each then knows what any knew.
inline void meet(std::span<Clock* const> group) {
  auto all = std::make_shared<Known>(*group[0]->known);
  const Known* last = group[0]->known.get();
  Shared released[2];
  for (Clock* clock : group) {
    if (clock->known.get() != last) join(*all, *clock->known);
    last = clock->known.get();
    for (int s = 0; s < 2; s++) released[s] = joined(released[s], clock->released[s]);
  }
  for (Clock* clock : group) clock->publish(*all);
  for (Clock* clock : group) {
    clock->known = all;
    clock->step();
    for (int s = 0; s < 2; s++) clock->released[s] = released[s];
  }
}

}  // namespace fastattn::emulator
