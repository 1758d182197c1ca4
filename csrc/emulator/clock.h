// Happens-before: which accesses a thread can rely on, as vector clocks that threads share.
#pragma once

#include <algorithm>
#include <cstdint>
#include <map>
#include <memory>
#include <span>
#include <vector>

namespace fastattn::emulator {

// Agents of a block of n threads: its threads 0..n-1, the copies that thread t has issued with
// cp.async (n + t), and one per mbarrier for the copies that complete on it (2n and up).
using Agent = uint32_t;

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
  std::map<uint32_t, std::vector<uint32_t>> others;
};
using Shared = std::shared_ptr<const Known>;

inline void join(std::vector<uint32_t>& into, const std::vector<uint32_t>& from) {
  if (into.size() < from.size()) into.resize(from.size());
  for (size_t i = 0; i < from.size(); i++) into[i] = std::max(into[i], from[i]);
}

inline void join(Known& into, const Known& from) {
  join(into.block == from.block ? into.agents : into.others[from.block], from.agents);
  for (const auto& [block, agents] : from.others)
    if (block != into.block) join(into.others[block], agents);
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
  uint32_t threads = 0;  // in the block
  uint32_t own = 1;
  uint32_t copied = 0;  // groups of cp.async waited for
  uint32_t fenced = 0;  // own clock at the last fence.proxy.async
  // Scope 0 reaches the block, scope 1 the device.
  Shared released[2];  // as of the last fence: what a relaxed write publishes
  Shared acquired[2];  // through relaxed reads: what the next fence brings in

  bool knows(const Epoch& e) const {
    if (e.clock == 0) return true;
    if (e.block != known->block) {
      auto other = known->others.find(e.block);
      return other != known->others.end() && e.agent < other->second.size() &&
             other->second[e.agent] >= e.clock;
    }
    if (e.agent == thread) return true;
    if (e.agent == threads + thread && e.clock <= copied) return true;
    return e.agent < known->agents.size() && known->agents[e.agent] >= e.clock;
  }

  // All that this thread has done and seen, for others to learn.
  Shared snapshot() const {
    auto all = std::make_shared<Known>(*known);
    publish(*all);
    return all;
  }

  void publish(Known& to) const {
    to.agents[thread] = std::max(to.agents[thread], own);
    to.agents[threads + thread] = std::max(to.agents[threads + thread], copied);
  }

  void learn(const Shared& news) { known = joined(known, news); }

  // Scope 0 or 1; a fence of scope 1 is one of scope 0, too.
  void fence(int scope) {
    for (int s = 0; s <= scope; s++) {
      if (acquired[s]) learn(acquired[s]);
      acquired[s] = nullptr;
    }
    released[0] = snapshot();
    if (scope == 1) released[1] = released[0];
    own++;
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
    clock->own++;
    for (int s = 0; s < 2; s++) clock->released[s] = released[s];
  }
}

}  // namespace fastattn::emulator
