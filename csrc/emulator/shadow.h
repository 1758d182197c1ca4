// Shadow memory: for every few bytes who wrote them last, who has read them since, and whether
// anybody ever wrote them.
#pragma once

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <vector>

#include "emulator/clock.h"

namespace fastattn::emulator {

// Stands for 4, 2 or 1 bytes. All zero means untouched.
struct Cell {
  Epoch write, read;
  uint32_t more_readers = 0;  // index into Shadow::readers_, 0 for none
  bool written = false;
};

// What is wrong with an access, and who made the other one.
struct Conflict {
  const char* kind;
  Epoch other;
  uint64_t offset;
};

class Shadow {
 public:
  // The readers of a cell between two writes are all kept up to `most_readers`.
  void reset(uint64_t bytes, bool initialised, size_t most_readers) {
    bytes_ = bytes;
    initialised_ = initialised;
    most_readers_ = most_readers;
    readers_.assign(1, {});
    shift_ = 2;
    allocate();
  }

  // Both call `report` with a Conflict for each cell that has one.
  template <class Report>
  void read(uint64_t offset, uint64_t size, const Clock& clock, const Epoch& access,
            Report report) {
    each(offset, size, [&](Cell& cell, uint64_t at) {
      if (!initialised_ && !cell.written) {
        report(Conflict{"uninitialised-read", {}, at});
        cell.written = true;
      }
      if (!clock.knows(cell.write) && !(access.strong && cell.write.strong))
        report(Conflict{"race-read-after-write", cell.write, at});
      note_read(cell, clock, access);
    });
  }

  // `before` and `after` are the bytes in memory and those about to be written: two unordered
  // writes of the same value do no harm. Null counts as different.
  template <class Report>
  void write(uint64_t offset, uint64_t size, const Clock& clock, const Epoch& access,
             const uint8_t* before, const uint8_t* after, Report report) {
    each(offset, size, [&](Cell& cell, uint64_t at) {
      if (!clock.knows(cell.write) && !(access.strong && cell.write.strong)) {
        uint64_t from = std::max(at, offset), to = std::min(at + (1 << shift_), offset + size);
        bool same =
            before && !std::memcmp(before + (from - offset), after + (from - offset), to - from);
        if (!same) report(Conflict{"race-write-after-write", cell.write, at});
      }
      auto check = [&](const Epoch& reader) {
        if (!clock.knows(reader) && !(access.strong && reader.strong))
          report(Conflict{"race-write-after-read", reader, at});
      };
      check(cell.read);
      for (const Epoch& reader : readers_[cell.more_readers]) check(reader);
      cell.write = access;
      cell.read = {};
      if (cell.more_readers) readers_[cell.more_readers].clear();
      cell.written = true;
    });
  }

  // The cell that holds a byte, to look at.
  const Cell& at(uint64_t offset) const { return cells_[offset >> shift_]; }

 private:
  struct Free {
    void operator()(Cell* cells) const { std::free(cells); }
  };

  void allocate() {
    // calloc: pages of cells that no kernel touches cost nothing.
    auto count = ((bytes_ + 3) >> shift_) + 4;
    cells_.reset(static_cast<Cell*>(std::calloc(count, sizeof(Cell))));
    if (!cells_) throw std::bad_alloc();
  }

  // Calls visit(cell, offset of its first byte) for the cells of [offset, offset + size). Cells
  // stand for four bytes until a finer access comes, and are then split.
  template <class Visit>
  void each(uint64_t offset, uint64_t size, Visit visit) {
    while ((offset | size) & ((1u << shift_) - 1)) split();
    uint64_t end = (offset + size) >> shift_;
    for (uint64_t i = offset >> shift_; i < end; i++) visit(cells_[i], i << shift_);
  }

  void split() {
    auto old = std::move(cells_);
    uint64_t count = ((bytes_ + 3) >> shift_) + 1;
    shift_--;
    allocate();
    for (uint64_t i = 0; i < count; i++) {
      if (!old.get()[i].written && !old.get()[i].read.clock) continue;
      for (int half = 0; half < 2; half++) {
        Cell& cell = cells_[2 * i + half] = old.get()[i];
        if (half && cell.more_readers) {
          readers_.push_back(readers_[cell.more_readers]);
          cell.more_readers = static_cast<uint32_t>(readers_.size() - 1);
        }
      }
    }
  }

  // A reader whom the new one has seen needs no entry: who is ordered after the new one is
  // ordered after both.
  void note_read(Cell& cell, const Clock& clock, const Epoch& access) {
    auto same = [&](const Epoch& old) {
      return old.agent == access.agent && old.block == access.block;
    };
    if (same(cell.read) || clock.knows(cell.read)) {
      cell.read = access;
      return;
    }
    if (!cell.more_readers) {
      readers_.emplace_back();
      cell.more_readers = static_cast<uint32_t>(readers_.size() - 1);
    }
    auto& readers = readers_[cell.more_readers];
    // Who reads again, as those who poll do, is found without asking a clock about all others.
    auto entry = std::find_if(readers.begin(), readers.end(), same);
    if (entry == readers.end())
      entry = std::find_if(readers.begin(), readers.end(),
                           [&](const Epoch& old) { return clock.knows(old); });
    if (entry != readers.end())
      *entry = access;
    else if (readers.size() < most_readers_)
      readers.push_back(access);
  }

  std::unique_ptr<Cell[], Free> cells_;
  std::vector<std::vector<Epoch>> readers_;
  uint64_t bytes_ = 0;
  size_t most_readers_ = 0;
  int shift_ = 2;
  bool initialised_ = true;
};

}  // namespace fastattn::emulator
