// Where addresses lead, whether an access is legal and ordered, and what it costs the hardware.
#include <algorithm>
#include <cstdarg>
#include <cstdio>

#include "emulator/machine.h"

namespace fastattn::emulator {
namespace {

const char* action(bool write) { return write ? "write" : "read"; }

template <size_t N>
size_t distinct(std::array<uint64_t, N>& values, size_t count) {
  std::sort(values.begin(), values.begin() + count);
  return std::unique(values.begin(), values.begin() + count) - values.begin();
}

// Shared memory serves 32 banks of 4 bytes at a time, to 32, 16 or 8 lanes of 4, 8 or 16 bytes.
// A word that several lanes of those ask for is served once.
struct Wavefronts {
  uint64_t total = 0, fewest = 0;  // fewest: were there no two words in a bank
};
Wavefronts wavefronts(const std::array<uint64_t, kWarp>& address, uint32_t lanes, uint32_t bytes) {
  uint32_t words = std::max(1u, bytes / 4), group = kWarp / words;
  Wavefronts found;
  for (uint32_t first = 0; first < kWarp; first += group) {
    std::array<uint64_t, kWarp> seen;
    std::array<uint8_t, 32> load{};
    size_t count = 0;
    for (uint32_t lane = first; lane < first + group; lane++)
      for (uint32_t w = 0; (lanes >> lane & 1) && w < words; w++)
        seen[count++] = address[lane] / 4 + w;
    count = distinct(seen, count);
    uint8_t most = 0;
    for (size_t i = 0; i < count; i++) most = std::max(most, ++load[seen[i] % 32]);
    found.total += most;
    found.fewest += count > 0;
  }
  return found;
}

}  // namespace

Block* Machine::peer(Block& block, uint32_t rank) {
  return rank == block.rank ? &block : rank < resident_.size() ? resident_[rank].get() : nullptr;
}

uint32_t Machine::locate(Context& c, Access& access) {
  uint32_t good = 0;
  for_lanes(c.active, [&](int lane) {
    uint64_t address = access.address[lane];
    Place& place = access.place[lane];
    place = {};
    Space space = access.space;
    if (space == kGeneric) {
      space = address >= kLocalWindow ? kLocal : address >= kSharedWindow ? kShared : kGlobal;
      if (space != kGlobal) address &= kSharedWindow - 1;
    }
    place.space = space;
    auto fail = [&](const char* kind, const char* what, uint64_t size) {
      report(kind, c.block, c.thread(lane), c.pc, place, {}, "%s of %u bytes %s %llu bytes",
             action(access.write), access.bytes, what, static_cast<unsigned long long>(size));
    };
    uint64_t size = 0;
    uint8_t* base = nullptr;
    if (space == kShared) {
      Block* owner = &c.block;
      if (uint32_t rank = address >> kClusterShift) owner = peer(c.block, rank - 1);
      address &= (1u << kClusterShift) - 1;
      place.offset = address;
      place.block = owner;
      if (!owner || !owner->live) return fail("out-of-bounds", "in a block that is not there;", 0);
      base = owner->shared.data();
      size = owner->shared.size();
      if (launch.check) place.shadow = &owner->shadow;
    } else if (space == kLocal) {
      place.offset = address;
      base = c.block.local.data() + size_t(c.thread(lane)) * program.local_bytes;
      size = program.local_bytes;
    } else {
      uint64_t index = (address >> kBufferShift) - 1;
      place.offset = address;
      if (index >= static_cast<uint64_t>(launch.buffer_count))
        return fail("out-of-bounds", "outside of all buffers;", 0);
      const Buffer& buffer = launch.buffers[index];
      place.buffer = static_cast<int32_t>(index);
      place.offset = address - buffer.base;
      base = buffer.host;
      size = buffer.size;
      if (access.write && !buffer.writable)
        return fail("write-to-read-only", "into a constant buffer of", size);
      if (buffer.checked && launch.check) place.shadow = &shadows_[index];
    }
    uint32_t align = access.bytes & -access.bytes;
    if (access.aligned && access.address[lane] % align)
      return fail("misaligned", "not on a multiple of its size, in a buffer of", size);
    if (place.offset >= size || access.bytes > size - place.offset)
      return fail("out-of-bounds", "outside of", size);
    place.host = base + place.offset;
    good |= 1u << lane;
  });
  if (launch.count && good) count_access(c, access, good);
  return good;
}

void Machine::count_access(Context& c, const Access& access, uint32_t lanes) {
  Site& site = sites[c.pc];
  std::array<uint64_t, kWarp> offset;
  std::array<uint64_t, kWarp> units;
  size_t global = 0;
  uint32_t shared_lanes = 0;
  for_lanes(lanes, [&](int lane) {
    const Place& place = access.place[lane];
    offset[lane] = place.offset;
    if (place.space == kShared) shared_lanes |= 1u << lane;
  });
  if (shared_lanes) {
    const Wavefronts found = wavefronts(offset, shared_lanes, access.bytes);
    site.transfers += found.total;
    site.ideal += found.fewest;
  }
  std::array<uint64_t, kWarp> starts;
  for_lanes(lanes & ~shared_lanes, [&](int lane) {
    if (access.place[lane].space != kGlobal) return;
    starts[global] = access.address[lane];
    units[global++] = access.address[lane] / 32;
  });
  if (global) {
    site.transfers += distinct(units, global);
    site.ideal += (distinct(starts, global) * access.bytes + 31) / 32;
  }
}

void Machine::check_read(Context& c, int lane, const Place& place, uint32_t bytes) {
  if (!place.shadow) return;
  const Clock& clock = c.state(lane).clock;
  place.shadow->read(place.offset, bytes, clock, c.epoch(lane), [&](const Conflict& conflict) {
    Place at = place;
    at.offset = conflict.offset;
    bool copy = conflict.other.clock && conflict.other.block == c.block.linear &&
                conflict.other.agent >= clock.threads;
    report(copy ? "copy-not-waited-for" : conflict.kind, c.block, c.thread(lane), c.pc, at,
           other(c.block, conflict.other), "%s",
           copy                   ? "an asynchronous copy may still be on its way"
           : conflict.other.clock ? "nothing orders this read after the write"
                                  : "nobody has written it");
  });
}

void Machine::check_write(Context& c, int lane, const Place& place, uint32_t bytes,
                          const uint8_t* after) {
  if (!place.shadow) return;
  const Clock& clock = c.state(lane).clock;
  place.shadow->write(place.offset, bytes, clock, c.epoch(lane), after ? place.host : nullptr,
                      after, [&](const Conflict& conflict) {
                        Place at = place;
                        at.offset = conflict.offset;
                        bool copy = conflict.other.block == c.block.linear &&
                                    conflict.other.agent >= clock.threads;
                        report(copy ? "copy-not-waited-for" : conflict.kind, c.block,
                               c.thread(lane), c.pc, at, other(c.block, conflict.other), "%s",
                               copy ? "an asynchronous copy may still be on its way"
                                    : "nothing orders this write after the other access");
                      });
}

void Machine::check_async_read(Context& c, int lane, const Place& place, uint32_t bytes,
                               Epoch reader) {
  if (!place.shadow) return;
  const Clock& clock = c.state(lane).clock;
  for (uint32_t i = 0; i < bytes; i += 4) {
    const Epoch& write = place.shadow->at(place.offset + i).write;
    // Threads write, and cp.async does, where asynchronous units do not look without a fence.
    bool generic = write.block == c.block.linear && write.agent < kProducts * clock.threads;
    if (!generic || !clock.knows(write) || covers(clock.known->fenced, write)) continue;
    Place at = place;
    at.offset += i;
    report("missing-proxy-fence", c.block, c.thread(lane), c.pc, at, other(c.block, write),
           "no fence.proxy.async lets an asynchronous unit see what a thread wrote");
  }
  // As for a thread, and then on record as the unit's.
  check_read(c, lane, place, bytes);
  place.shadow->read(place.offset, bytes, clock, reader, [](const Conflict&) {});
}

// Relaxed or stronger accesses carry what their writers have fenced off to those who read them.
void Machine::publish(Context& c, int lane, const Place& place) {
  if (!launch.check) return;
  bool shared = place.space == kShared;
  Clock& clock = c.state(lane).clock;
  if (c.flag(kRelease)) clock.fence(c.flag(kGpuScope));
  if (!clock.released[0] && !clock.released[1]) return;
  auto& cell = shared ? place.block->published[place.offset]
                      : published_[uint64_t(place.buffer) << 48 | place.offset];
  for (int scope = 0; scope < 2; scope++) cell[scope] = joined(cell[scope], clock.released[scope]);
}

void Machine::observe(Context& c, int lane, const Place& place) {
  if (!launch.check) return;
  bool shared = place.space == kShared;
  Clock& clock = c.state(lane).clock;
  auto& map = shared ? place.block->published : published_;
  auto cell = map.find(shared ? place.offset : uint64_t(place.buffer) << 48 | place.offset);
  if (cell == map.end()) return;
  for (int scope = 0; scope < 2; scope++) {
    const Shared& news = cell->second[scope];
    // What was fenced for a block alone does not reach another.
    if (news && (scope == 1 || news->block == c.block.linear))
      clock.acquired[scope] = joined(clock.acquired[scope], news);
  }
  if (c.flag(kAcquire)) clock.fence(c.flag(kGpuScope));
}

Machine::Other Machine::other(const Block& block, const Epoch& e) const {
  if (!e.clock) return {};
  uint32_t threads = block.threads[0].clock.threads;
  int32_t thread = e.agent < kRoles * threads ? e.agent % threads : -1;
  return {e.instruction, static_cast<int32_t>(e.block), thread};
}

void Machine::report(const char* kind, const Block& block, int thread, int32_t instruction,
                     const Place& place, Other other, const char* format, ...) {
  std::string key = std::string(kind) + '@' + std::to_string(instruction) + '@' +
                    std::to_string(other.instruction);
  auto [entry, fresh] = known_findings_.try_emplace(key, findings.size());
  if (!fresh) {
    if (entry->second < findings.size()) findings[entry->second].count++;
    return;
  }
  if (findings.size() >= static_cast<size_t>(launch.max_findings)) return;
  Finding finding{kind,
                  instruction,
                  other.instruction,
                  static_cast<int32_t>(block.linear),
                  other.block,
                  thread,
                  other.thread,
                  place.space,
                  place.buffer,
                  static_cast<int64_t>(place.offset),
                  1,
                  {}};
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(finding.detail, sizeof finding.detail, format, arguments);
  va_end(arguments);
  findings.push_back(finding);
}

}  // namespace fastattn::emulator
