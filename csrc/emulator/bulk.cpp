// Bulk copies: the copy engine moves boxes of tensors, or plain bytes, between global and shared
// memory. Loads complete on an mbarrier, stores in groups.
#include <algorithm>

#include "emulator/operations.h"

namespace fastattn::emulator {
namespace {

// What stands in the 128 bytes of a tensor map. The layout is the emulator's own: the fields are
// written by tensormap.replace (fastattn/emulator/translate.py) and by TensorMap in Python.
struct TensorMap {
  uint64_t address;
  uint32_t rank;  // less one
  uint32_t box[5], size[5];
  uint32_t pad;
  uint64_t stride[4];  // in bytes, of the second dimension and up
  uint32_t element_stride[5];
  uint32_t element, interleave, swizzle, fill;

  uint32_t element_bytes() const {
    static constexpr uint8_t kBytes[] = {1, 2, 4, 4, 8, 8, 2, 4, 4, 8, 2, 4, 4};
    return element < sizeof kBytes ? kBytes[element] : 0;
  }
};
static_assert(sizeof(TensorMap) == 128);

// A run of bytes that is whole on both sides.
struct Piece {
  uint64_t global;  // an address
  uint32_t shared;  // an offset
  uint32_t bytes;
  bool inside;  // of the tensor; else zeros
};

// The elements of a box in the order of shared memory.
std::vector<Piece> pieces(const TensorMap& map, uint32_t shared, const int32_t* corner) {
  std::vector<Piece> all;
  uint32_t bytes = map.element_bytes(), rank = map.rank + 1, count = 1;
  for (uint32_t d = 0; d < rank; d++) count *= map.box[d];
  for (uint32_t i = 0; i < count; i++) {
    uint64_t global = map.address;
    bool inside = true;
    for (uint32_t d = 0, rest = i; d < rank; rest /= map.box[d], d++) {
      int64_t at = int64_t{corner[d]} + rest % map.box[d];
      inside &= at >= 0 && at < map.size[d];
      global += at * (d ? map.stride[d - 1] : bytes);
    }
    uint32_t offset = shared + i * bytes;
    // 32-, 64- or 128-byte swizzle: the chunks of 16 bytes of eight rows change places.
    offset ^= (offset >> 7 & ((1u << map.swizzle) - 1)) << 4;
    Piece* last = all.empty() ? nullptr : &all.back();
    bool joins = last && last->inside == inside && last->shared + last->bytes == offset &&
                 (!inside || last->global + last->bytes == global) && last->bytes + bytes <= 16;
    if (joins)
      last->bytes += bytes;
    else
      all.push_back({global, offset, bytes, inside});
  }
  return all;
}

// The place of one lane's access, whose elements alone are aligned.
Place locate(Context& c, int lane, Space space, uint64_t address, uint32_t bytes, bool write) {
  Access a{space, bytes, write, {}, {}, true};
  Context one = c;
  one.active = 1u << lane;
  a.address[lane] = address;
  a.aligned = false;
  return c.machine.locate(one, a) ? a.place[lane] : Place{};
}

bool read_map(Context& c, int lane, uint64_t address, TensorMap& map) {
  bool whole = true;
  for (int i = 0; i < 8; i++) {
    Place place = locate(c, lane, kGeneric, address + 16 * i, 16, false);
    if (!place.host) return false;
    c.machine.check_read(c, lane, place, 16);
    std::memcpy(reinterpret_cast<uint8_t*>(&map) + 16 * i, place.host, 16);
  }
  for (uint32_t d = 0; d < map.rank && d < 4; d++) whole &= map.stride[d] % 16 == 0;
  if (map.rank > 4 || !map.element_bytes() || map.swizzle > 3 || map.interleave || map.fill ||
      map.address % 16 || !whole) {
    c.machine.report("bad-tensor-map", c.block, c.thread(lane), c.pc, {}, {},
                     "rank %u, element %u, swizzle %u, interleave %u, fill %u, address %#llx: "
                     "unknown or misaligned",
                     map.rank + 1, map.element, map.swizzle, map.interleave, map.fill,
                     static_cast<unsigned long long>(map.address));
    return false;
  }
  return true;
}

// Of shared memory here, or at the same place in another block of the cluster.
uint64_t address_in(const Block& block, uint64_t offset) {
  return uint64_t{block.rank + 1} << kClusterShift | (offset & ((1u << kClusterShift) - 1));
}

void load(Context& c, int lane, const std::vector<Piece>& all, uint64_t mbarrier, Block& to_block) {
  auto found = to_block.mbarriers.find(mbarrier & ((1u << kClusterShift) - 1));
  if (found == to_block.mbarriers.end() || !found->second.live)
    return c.machine.report("mbarrier-not-initialised", c.block, c.thread(lane), c.pc,
                            {nullptr, nullptr, mbarrier, kShared, -1}, {},
                            "a copy is to complete on it");
  Mbarrier& m = found->second;
  for (const Piece& piece : all) {
    Place to = locate(c, lane, kShared, address_in(to_block, piece.shared), piece.bytes, true);
    Place from;
    if (piece.inside) from = locate(c, lane, kGlobal, piece.global, piece.bytes, false);
    if (!to.host || (piece.inside && !from.host)) {
      m.bytes -= piece.bytes;
      continue;
    }
    if (piece.inside) c.machine.check_read(c, lane, from, piece.bytes);
    if (to.shadow) {
      c.machine.check_write(c, lane, to, piece.bytes, nullptr);
      Epoch epoch{m.block, m.phase + 1, c.pc, static_cast<uint16_t>(m.agent), false};
      to.shadow->write(to.offset, piece.bytes, c.state(lane).clock, epoch, nullptr, nullptr,
                       [](const Conflict&) {});
    }
    Delivery delivery{to.host, std::vector<uint8_t>(piece.bytes)};
    if (piece.inside) std::copy_n(from.host, piece.bytes, delivery.bytes.begin());
    std::memset(to.host, 0xff, piece.bytes);
    m.late.push_back(std::move(delivery));
  }
  if (!c.machine.launch.late) m.deliver_late();
}

void store(Context& c, int lane, const std::vector<Piece>& all) {
  const Thread& thread = c.state(lane);
  Epoch reader{c.block.linear, thread.stored + 1, c.pc,
               static_cast<uint16_t>(thread.clock.agent(kStores)), false};
  for (const Piece& piece : all) {
    if (!piece.inside) continue;
    Place from = locate(c, lane, kShared, piece.shared, piece.bytes, false);
    Place to = locate(c, lane, kGlobal, piece.global, piece.bytes, true);
    if (!from.host || !to.host) continue;
    c.machine.check_async_read(c, lane, from, piece.bytes, reader);
    c.machine.check_write(c, lane, to, piece.bytes, from.host);
    std::memcpy(to.host, from.host, piece.bytes);
  }
}

bool aligned(Context& c, int lane, uint64_t shared, uint32_t to) {
  if (shared % to == 0) return true;
  c.machine.report("misaligned", c.block, c.thread(lane), c.pc,
                   {nullptr, nullptr, shared, kShared, -1}, {},
                   "a bulk copy needs a multiple of %u in shared memory", to);
  return false;
}

// Calls f with every block of the cluster whose bit a lane's mask has, or with its own where the
// instruction has no mask.
template <class F>
void for_targets(Context& c, int lane, int mask_operand, F f) {
  if (c.operand(mask_operand) < 0) return f(c.block);
  uint32_t mask = c.lanes<uint16_t>(mask_operand)[lane];
  for_lanes(mask, [&](int rank) {
    if (Block* block = c.machine.peer(c.block, static_cast<uint32_t>(rank))) return f(*block);
    c.machine.report("out-of-bounds", c.block, c.thread(lane), c.pc, {}, {},
                     "a copy is to reach block %d of the cluster, which is not there", rank);
  });
}

// Operands: shared memory (3), the map (3), the mbarrier (3, of loads alone), the slot of a mask of
// blocks or -1, how many coordinates, their slots.
template <bool kLoad>
Flow copy_tensor(Context& c) {
  Access shared = access_at(c, 0, kShared, 16, kLoad),
         map_at = access_at(c, 3, kGeneric, 16, false);
  Access mbarrier = access_at(c, 6, kShared, 8, true);
  for_lanes(c.active, [&](int lane) {
    TensorMap map;
    if (!aligned(c, lane, shared.address[lane], 128)) return;
    if (!read_map(c, lane, map_at.address[lane], map)) return;
    int32_t corner[5] = {};
    for (int d = 0; d < c.operand(10); d++) corner[d] = c.lanes<int32_t>(11 + d)[lane];
    auto all = pieces(map, static_cast<uint32_t>(shared.address[lane]), corner);
    if (kLoad)
      for_targets(c, lane, 9, [&](Block& to) { load(c, lane, all, mbarrier.address[lane], to); });
    else
      store(c, lane, all);
  });
  return Flow::next;
}

// Operands: shared memory (3), global memory (3), the mbarrier (3, of loads alone), the slot of a
// mask of blocks or -1, the slot of how many bytes.
template <bool kLoad>
Flow copy_bytes(Context& c) {
  Access shared = access_at(c, 0, kShared, 16, kLoad),
         global = access_at(c, 3, kGlobal, 16, !kLoad);
  Access mbarrier = access_at(c, 6, kShared, 8, true);
  for_lanes(c.active, [&](int lane) {
    uint32_t bytes = c.lanes<uint32_t>(10)[lane];
    auto at = static_cast<uint32_t>(shared.address[lane]);
    if (!aligned(c, lane, at, 16) || !aligned(c, lane, bytes, 16)) return;
    std::vector<Piece> all;
    for (uint32_t i = 0; i < bytes; i += 16)
      all.push_back({global.address[lane] + i, at + i, 16, true});
    if (kLoad)
      for_targets(c, lane, 9, [&](Block& to) { load(c, lane, all, mbarrier.address[lane], to); });
    else
      store(c, lane, all);
  });
  return Flow::next;
}

Flow commit(Context& c) {
  for_lanes(c.active, [&](int lane) { c.state(lane).stored++; });
  return Flow::next;
}

// Operand: how many of the latest groups may still be under way.
Flow wait(Context& c) {
  uint32_t pending = c.operand(0);
  for_lanes(c.active, [&](int lane) {
    Thread& thread = c.state(lane);
    uint32_t done = thread.stored > pending ? thread.stored - pending : 0;
    uint32_t& seen = thread.clock.progress[kStores];
    seen = std::max(seen, done);
  });
  return Flow::next;
}

// A tensor map from shared into global memory. Operands: the one there (3), the one here (3).
Flow publish_map(Context& c) {
  Access to = access_at(c, 0, kGeneric, 16, true), from = access_at(c, 3, kShared, 16, false);
  int lane = std::countr_zero(c.active);
  for (int i = 0; i < 8; i++) {
    Place source = locate(c, lane, kShared, from.address[lane] + 16 * i, 16, false);
    Place target = locate(c, lane, kGeneric, to.address[lane] + 16 * i, 16, true);
    if (!source.host || !target.host) break;
    c.machine.check_read(c, lane, source, 16);
    c.machine.check_write(c, lane, target, 16, source.host);
    std::memcpy(target.host, source.host, 16);
  }
  return Flow::next;
}

}  // namespace

void add_bulk_copies(Table& table) {
  table.add("bulk.tensor.load", copy_tensor<true>);
  table.add("bulk.tensor.store", copy_tensor<false>);
  table.add("bulk.load", copy_bytes<true>);
  table.add("bulk.store", copy_bytes<false>);
  table.add("bulk.commit_group", commit);
  table.add("bulk.wait_group", wait);
  table.add("tensormap.publish", publish_map);
}

}  // namespace fastattn::emulator
