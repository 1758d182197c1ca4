// Who runs next: groups of lanes, warps and blocks, and what they wait for.
#include <algorithm>
#include <cstdio>

#include "emulator/machine.h"

namespace fastattn::emulator {
namespace {

constexpr uint64_t kSlice = 1 << 14;   // instructions until another warp gets its turn
constexpr uint64_t kPolls = 1 << 7;    // polls of every warp in a row that mean nobody moves
constexpr uint32_t kVisits = 1 << 10;  // jumps of a diverged group until the others get theirs

uint32_t volume(const uint32_t (&size)[3]) { return size[0] * size[1] * size[2]; }

std::array<uint32_t, 3> position(uint32_t linear, const uint32_t (&size)[3]) {
  return {linear % size[0], linear / size[0] % size[1], linear / size[0] / size[1]};
}

}  // namespace

Machine::Machine(const Program& p, const Launch& l)
    : program(p), launch(l), sites(p.instruction_count), random_(l.seed * 0x9E3779B97F4A7C15 + 1) {
  const auto& known = operations();
  for (int i = 0; i < p.instruction_count; i++) {
    const Instruction& in = p.instructions[i];
    const Operation& operation = known[in.operation];
    bool aligned = in.flags & kAligned;
    code_.push_back({operation.run, p.operands + in.operands, in.guard, in.flags,
                     aligned ? Together::warp : operation.together, in.leader != 0, in.operation,
                     operation.mask_operand});
  }
  image_.assign(p.file_bytes, 0);
  for (int i = 0; i < p.initial_count; i++) {
    const Initial& initial = p.initials[i];
    for (int lane = 0; lane < kWarp && initial.bytes; lane++)
      std::memcpy(&image_[initial.slot + lane * initial.bytes], &initial.value, initial.bytes);
    if (!initial.bytes) std::memcpy(&image_[initial.slot], &initial.value, 4);  // a predicate
  }
  if (launch.check) {
    shadows_.resize(launch.buffer_count);
    for (int i = 0; i < launch.buffer_count; i++) {
      const Buffer& buffer = launch.buffers[i];
      if (buffer.checked) shadows_[i].reset(buffer.size, buffer.initialised, 4);
    }
  }
}

uint32_t Machine::random() {
  random_ ^= random_ << 13;
  random_ ^= random_ >> 7;
  random_ ^= random_ << 17;
  return static_cast<uint32_t>(random_ >> 16);
}

void Machine::run() {
  uint32_t together = volume(launch.cluster);
  std::array<uint32_t, 3> clusters;
  for (int d = 0; d < 3; d++) clusters[d] = launch.grid[d] / launch.cluster[d];
  uint32_t count = clusters[0] * clusters[1] * clusters[2];
  std::vector<uint32_t> order(count);
  for (uint32_t i = 0; i < count; i++) order[i] = i;
  if (launch.order == kReverse) std::reverse(order.begin(), order.end());
  if (launch.order == kRandom)
    for (uint32_t i = count; i > 1; i--) std::swap(order[i - 1], order[random() % i]);
  for (uint32_t i = 0; i < together; i++) resident_.push_back(std::make_unique<Block>());
  for (uint32_t cluster : order) {
    cluster_ = {};
    for (uint32_t rank = 0; rank < together; rank++) {
      auto within = position(rank, launch.cluster);
      uint32_t corner[3] = {cluster % clusters[0], cluster / clusters[0] % clusters[1],
                            cluster / clusters[0] / clusters[1]};
      Block& block = *resident_[rank];
      block.rank = rank;
      for (int d = 0; d < 3; d++) block.index[d] = corner[d] * launch.cluster[d] + within[d];
      start(block,
            block.index[0] + launch.grid[0] * (block.index[1] + launch.grid[1] * block.index[2]));
    }
    run_resident();
  }
}

void Machine::start(Block& block, uint32_t linear) {
  uint32_t threads = volume(launch.block);
  block.linear = linear;
  block.live = threads;
  // Not zero: what is read before it is written is to look like nothing useful (NaN as fp16,
  // bf16 and fp32).
  block.shared.assign(program.static_shared + launch.dynamic_shared, 0xff);
  block.local.assign(size_t{threads} * program.local_bytes, 0xff);
  if (launch.check) block.shadow.reset(block.shared.size(), false, threads);
  block.barriers = {};
  block.published.clear();
  block.mbarriers.clear();
  block.threads.assign(threads, {});
  auto nothing = std::make_shared<Known>();
  nothing->block = linear;
  nothing->agents.assign(kRoles * threads, 0);
  for (uint32_t t = 0; t < threads; t++) {
    Clock& clock = block.threads[t].clock;
    clock.known = nothing;
    clock.thread = t;
    clock.threads = threads;
  }
  block.warps.resize((threads + kWarp - 1) / kWarp);
  for (size_t i = 0; i < block.warps.size(); i++) {
    Warp& warp = block.warps[i];
    auto file =
        warp.file ? std::move(warp.file) : std::make_unique_for_overwrite<uint8_t[]>(image_.size());
    warp = Warp{};
    warp.index = static_cast<int>(i);
    warp.file = std::move(file);
    std::copy(image_.begin(), image_.end(), warp.file.get());
    uint32_t lanes = std::min<uint32_t>(kWarp, threads - kWarp * static_cast<uint32_t>(i));
    warp.live = lanes == kWarp ? ~0u : (1u << lanes) - 1;
    fill_specials(block, warp);
  }
}

void Machine::fill_specials(Block& block, Warp& warp) {
  for (int i = 0; i < program.initial_count; i++) {
    const Initial& initial = program.initials[i];
    if (initial.special < 0) continue;
    for (int lane = 0; lane < kWarp; lane++) {
      auto tid = position(warp.index * kWarp + lane, launch.block);
      auto within = position(block.rank, launch.cluster);
      int s = initial.special;
      uint64_t value = 0;
      if (s <= kTidZ)
        value = tid[s - kTidX];
      else if (s <= kNtidZ)
        value = launch.block[s - kNtidX];
      else if (s <= kCtaidZ)
        value = block.index[s - kCtaidX];
      else if (s <= kNctaidZ)
        value = launch.grid[s - kNctaidX];
      else if (s == kLaneId)
        value = lane;
      else if (s == kWarpId)
        value = warp.index;
      else if (s == kNwarpId)
        value = block.warps.size();
      else if (s == kMaskEq)
        value = 1u << lane;
      else if (s == kMaskLe)
        value = (2ull << lane) - 1;
      else if (s == kMaskLt)
        value = (1ull << lane) - 1;
      else if (s == kMaskGe)
        value = ~0u << lane;
      else if (s == kMaskGt)
        value = static_cast<uint32_t>(~0ull << (lane + 1));
      else if (s <= kClusterZ)
        value = block.index[s - kClusterX] / launch.cluster[s - kClusterX];
      else if (s <= kNclusterZ)
        value = launch.grid[s - kNclusterX] / launch.cluster[s - kNclusterX];
      else if (s <= kClusterCtaidZ)
        value = within[s - kClusterCtaidX];
      else if (s <= kClusterNctaidZ)
        value = launch.cluster[s - kClusterNctaidX];
      else if (s == kClusterCtarank)
        value = block.rank;
      else if (s == kClusterNctarank)
        value = volume(launch.cluster);
      else if (s == kDynamicShared)
        value = launch.dynamic_shared;
      else if (s == kTotalShared)
        value = block.shared.size();
      std::memcpy(warp.file.get() + initial.slot + lane * initial.bytes, &value, initial.bytes);
    }
  }
}

void Machine::run_resident() {
  polls_ = 0;
  std::vector<std::pair<Block*, Warp*>> warps;
  for (auto& block : resident_)
    for (Warp& warp : block->warps) warps.push_back({block.get(), &warp});
  if (launch.order == kReverse) std::reverse(warps.begin(), warps.end());
  size_t turn = 0;
  for (;;) {
    if (launch.order == kRandom) turn = random() % warps.size();
    size_t tried = 0;
    while (tried < warps.size() && !warps[turn % warps.size()].second->runnable()) tried++, turn++;
    if (tried == warps.size()) {
      bool moved = false, left = false;
      for (auto& block : resident_) {
        left |= block->live > 0;
        if (block->live && !moved) moved = unblock(*block);
      }
      if (!left || !moved) return;
      continue;
    }
    auto [block, warp] = warps[turn % warps.size()];
    if (advance(*block, *warp)) turn++;
    if (warp->idle > launch.patience || polls_ > kPolls * warps.size()) {
      int lane = std::countr_zero(warp->live);
      report("hang", *block, warp->index * kWarp + lane, warp->pc[lane], {}, {},
             "%llu instructions of this warp and %llu polls of all without synchronisation",
             static_cast<unsigned long long>(warp->idle), static_cast<unsigned long long>(polls_));
      return;
    }
  }
}

Machine::Group Machine::pick(Warp& warp) {
  uint32_t lanes = warp.runnable();
  if (!(lanes & ~warp.tired)) warp.tired = 0;
  lanes &= ~warp.tired;
  int first = std::countr_zero(lanes);
  if (launch.order == kForward) {
    // The lanes that are furthest behind: those ahead wait where paths meet again.
    for_lanes(lanes, [&](int lane) {
      if (warp.pc[lane] < warp.pc[first]) first = lane;
    });
  } else if (launch.order == kReverse) {
    first = kWarp - 1 - std::countl_zero(lanes);
  } else {
    for (uint32_t skip = random() % std::popcount(lanes); skip; skip--) lanes &= lanes - 1;
    first = std::countr_zero(lanes);
    lanes = warp.runnable() & ~warp.tired;
  }
  Group group{warp.pc[first], 0};
  for_lanes(lanes, [&](int lane) {
    if (warp.pc[lane] == group.pc) group.lanes |= 1u << lane;
  });
  // Lanes of a warp need not run in step: now and then some go ahead.
  if (launch.order == kRandom && random() % 8 == 0) group.lanes &= random() | 1u << first;
  return group;
}

Flow Machine::execute(Block& block, Warp& warp, int32_t pc, uint32_t active) {
  Context context{*this, block, warp, code_[pc], pc, active};
  return code_[pc].run(context);
}

// Runs a group of lanes up to where they part, wait or may meet others. Returns whether it is the
// turn of another warp, even if this one can go on.
bool Machine::advance(Block& block, Warp& warp) {
  uint64_t enough = warp.idle + kSlice;
  Group group = pick(warp);
  bool whole = group.lanes == warp.live;
  if (whole) warp.visits = 0;
  auto leave = [&](int32_t pc, uint32_t lanes) {
    for_lanes(lanes, [&](int lane) { warp.pc[lane] = pc; });
  };
  for (;;) {
    const Decoded& in = code_[group.pc];
    uint32_t active = group.lanes;
    if (in.guard >= 0) {
      uint32_t predicate = Lanes<uint32_t>{warp.file.get() + in.guard}[0];
      active &= in.flags & kNegated ? ~predicate : predicate;
    }
    Site& site = sites[group.pc];
    site.executed++;
    site.lanes += std::popcount(active);
    warp.idle++;
    Flow flow = Flow::next;
    if (active && in.together != Together::nobody) {
      bool all_here = true;
      leave(group.pc, active);
      for_lanes(active, [&](int lane) { all_here &= (members(warp, lane) & warp.live) == active; });
      if (!all_here) {
        leave(group.pc + 1, group.lanes & ~active);
        warp.stopped |= active;
        complete(block, warp, false);
        return false;
      }
    }
    if (active) {
      leave(group.pc, active);
      flow = execute(block, warp, group.pc, active);
    }
    switch (flow) {
      case Flow::next:
        group.pc++;
        break;
      case Flow::jump:
        if (active != group.lanes) {
          leave(in.operands[0], active);
          leave(group.pc + 1, group.lanes & ~active);
          return false;
        }
        group.pc = in.operands[0];
        break;
      case Flow::yield:
        warp.tired |= active;
        polls_++;
        [[fallthrough]];
      case Flow::park:
        leave(group.pc + 1, group.lanes & ~active);
        return flow == Flow::yield;
    }
    if (!code_[group.pc].leader) continue;
    if (!whole || warp.idle > enough || (launch.order == kRandom && random() % 4 == 0)) {
      leave(group.pc, group.lanes);
      if (!whole && ++warp.visits % kVisits == 0) warp.tired |= group.lanes;
      if (warp.idle > enough) polls_ = 0;
      return warp.idle > enough;
    }
  }
}

// Who must be at the instruction that `lane` is at before it goes on.
uint32_t Machine::members(Warp& warp, int lane) const {
  const Decoded& in = code_[warp.pc[lane]];
  if (in.together == Together::warp) return warp.live;
  Lanes<uint32_t> mask{warp.file.get() + in.operands[in.mask_operand]};
  return mask[lane] | 1u << lane;
}

// Runs an instruction that lanes have stopped at once all its members are there. With `force`,
// whoever is there will do.
bool Machine::complete(Block& block, Warp& warp, bool force) {
  bool any = false;
  for (uint32_t left = warp.stopped; left; left &= left - 1) {
    int lane = std::countr_zero(left);
    if (!(warp.stopped >> lane & 1)) continue;
    const Decoded& in = code_[warp.pc[lane]];
    uint32_t need = members(warp, lane) & warp.live, here = 0;
    for_lanes(need & warp.stopped, [&](int l) {
      const Decoded& theirs = code_[warp.pc[l]];
      bool same = in.together == Together::warp
                      ? warp.pc[l] == warp.pc[lane]
                      : theirs.operation == in.operation && members(warp, l) == members(warp, lane);
      if (same) here |= 1u << l;
    });
    if (here != need) {
      if (!force) continue;
      report("divergence", block, warp.index * kWarp + lane, warp.pc[lane], {},
             {warp.pc[std::countr_zero(need & ~here)], -1,
              warp.index * kWarp + std::countr_zero(need & ~here)},
             "lanes 0x%08x of the warp are here, lanes 0x%08x are not", here, need & ~here);
    }
    int32_t pc = warp.pc[lane];
    warp.stopped &= ~here;
    auto before = warp.pc;
    if (execute(block, warp, pc, here) == Flow::next)
      for_lanes(here, [&](int l) { warp.pc[l] = before[l] + 1; });
    any = true;
    if (force) return true;
  }
  return any;
}

void Machine::arrive(Context& c, int id, uint32_t expected, bool sleep) {
  Barrier& barrier = c.block.barriers[id];
  auto report_mismatch = [&](const char* format, uint32_t ours, uint32_t theirs) {
    report("barrier-mismatch", c.block, c.thread(std::countr_zero(c.active)), c.pc, {},
           {barrier.instruction, -1, -1}, format, id, ours, theirs);
  };
  if (barrier.arrived && barrier.expected != expected)
    report_mismatch("barrier %d is given %u threads here and %u by those who wait (0: all)",
                    expected, barrier.expected);
  else if (barrier.arrived && expected == 0 && barrier.instruction != c.pc)
    report_mismatch("barrier %d of the whole block is reached in two places (%u, %u threads)",
                    std::popcount(c.active), barrier.arrived);
  if (!barrier.arrived) {
    barrier.expected = expected;
    barrier.instruction = c.pc;
  }
  for_lanes(c.active, [&](int lane) {
    c.warp.pc[lane] = c.pc + 1;
    barrier.arrived++;
    if (sleep) {
      c.warp.held |= 1u << lane;
      barrier.sleepers.push_back({&c.warp, lane});
    } else if (launch.check) {
      Clock& clock = c.state(lane).clock;
      barrier.news = joined(barrier.news, clock.snapshot());
      clock.step();
    }
  });
  uint32_t want = barrier.expected ? barrier.expected : c.block.live;
  if (barrier.arrived > want) {
    report_mismatch("barrier %d takes %u threads, and %u have arrived", want, barrier.arrived);
    barrier.arrived = want;
  }
  if (barrier.arrived == want) release(c.block, barrier);
}

void Machine::release(Block& block, Barrier& barrier) {
  if (!barrier.expected && block.live < block.threads.size() && !barrier.sleepers.empty()) {
    auto [warp, lane] = barrier.sleepers.front();
    report("barrier-after-exit", block, warp->index * kWarp + lane, barrier.instruction, {}, {},
           "%u threads meet at a barrier of the whole block, and the rest have ended",
           barrier.arrived);
  }
  std::vector<Clock*> group;
  for (auto [warp, lane] : barrier.sleepers) {
    warp->held &= ~(1u << lane);
    progress(*warp);
    group.push_back(&block.threads[warp->index * kWarp + lane].clock);
  }
  if (launch.check && !group.empty()) {
    if (barrier.news) group[0]->learn(barrier.news);
    meet(group);
  }
  barrier = {};
}

void Machine::arrive_at_cluster(Context& c, bool publish) {
  for_lanes(c.active, [&](int lane) {
    Thread& thread = c.state(lane);
    if (thread.phases > cluster_.phase)
      return report("barrier-mismatch", c.block, c.thread(lane), c.pc, {}, {},
                    "the cluster's barrier is arrived at twice without a wait");
    thread.phases = cluster_.phase + 1;
    cluster_.arrived++;
    if (!publish || !launch.check) return;
    cluster_.news = joined(cluster_.news, thread.clock.snapshot());
    thread.clock.step();
  });
  settle_cluster();
}

// Ends the phase of the cluster's barrier once all who are left have arrived.
void Machine::settle_cluster() {
  uint32_t live = 0;
  for (const auto& block : resident_) live += block->live;
  if (live == 0 || cluster_.arrived < live) return;
  cluster_ = {0, cluster_.phase + 1, nullptr, cluster_.news};
}

bool Machine::wait_for_cluster(Context& c, bool learn) {
  uint32_t waiting = 0;
  for_lanes(c.active, [&](int lane) { waiting |= c.state(lane).phases > cluster_.phase; });
  if (waiting) return false;
  for_lanes(c.active, [&](int lane) {
    Clock& clock = c.state(lane).clock;
    if (learn && launch.check && cluster_.done) clock.learn(cluster_.done);
  });
  progress(c.warp);
  return true;
}

void Machine::exit(Context& c) {
  for_lanes(c.active, [&](int lane) {
    Thread& thread = c.state(lane);
    for (const Copy& copy : thread.copies) {
      report("copy-never-waited-for", c.block, c.thread(lane), c.pc,
             {nullptr, nullptr, copy.offset, kShared, -1}, {}, "the thread ends with %zu copies",
             thread.copies.size());
      break;
    }
  });
  for_lanes(c.active, [&](int lane) { cluster_.arrived -= c.state(lane).phases > cluster_.phase; });
  c.warp.live &= ~c.active;
  c.block.live -= std::popcount(c.active);
  settle_cluster();
  if (c.block.live == 0)
    for (const auto& [offset, mbarrier] : c.block.mbarriers)
      if (!mbarrier.late.empty())
        report("copy-never-waited-for", c.block, c.thread(std::countr_zero(c.active)), c.pc,
               {nullptr, nullptr, offset, kShared, -1}, {},
               "the block ends with %zu copies under way to this mbarrier", mbarrier.late.size());
  progress(c.warp);
  // Those who wait for the rest of the warp may have waited for these.
  complete(c.block, c.warp, false);
}

// Nobody in the block can run: says why, and lets those go on whom the hardware might let go on.
bool Machine::unblock(Block& block) {
  for (Warp& warp : block.warps)
    if (warp.stopped) return complete(block, warp, true);
  for (Barrier& barrier : block.barriers) {
    if (barrier.sleepers.empty() || barrier.expected || barrier.arrived < block.live) continue;
    release(block, barrier);
    return true;
  }
  for (Barrier& barrier : block.barriers) {
    if (barrier.sleepers.empty()) continue;
    auto [warp, lane] = barrier.sleepers.front();
    report("deadlock", block, warp->index * kWarp + lane, barrier.instruction, {}, {},
           "barrier %d holds %u of %u threads, and nobody can run",
           static_cast<int>(&barrier - block.barriers.data()), barrier.arrived,
           barrier.expected ? barrier.expected : block.live);
  }
  return false;
}

}  // namespace fastattn::emulator
