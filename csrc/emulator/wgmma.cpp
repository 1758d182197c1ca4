// wgmma: products of a group of four warps, whose operands lie in shared memory.
#include <algorithm>
#include <cmath>

#include "emulator/operations.h"

namespace fastattn::emulator {
namespace {

// How a matrix of 16-bit elements lies in shared memory.
struct Descriptor {
  uint32_t start, leading, stride;
  int width;        // bytes of a row of a swizzled atom; 16 without swizzle
  bool transposed;  // m or n runs along the rows, and not k

  Descriptor(uint64_t bits, bool t) : transposed(t) {
    start = (bits & 0x3fff) << 4;
    leading = (bits >> 16 & 0x3fff) << 4;
    stride = (bits >> 32 & 0x3fff) << 4;
    static constexpr int kWidths[] = {16, 128, 64, 32};
    width = kWidths[bits >> 62];
  }

  // The address of the 16 bytes that begin with element (mn, k); the one that runs along the rows
  // is a multiple of 8.
  uint32_t chunk(int mn, int k) const {
    int along = transposed ? mn : k, across = transposed ? k : mn;
    uint32_t address = start;
    if (width == 16) {
      // 8 x 8 elements lie together; "leading" goes along k, "stride" along m or n.
      address += k / 8 * leading + mn / 8 * stride + across % 8 * 16;
    } else {
      address += across / 8 * stride + across % 8 * width + along % (width / 2) * 2;
      if (transposed) address += along / (width / 2) * leading;
      // The swizzle permutes the 16-byte chunks of eight rows.
      address ^= (address >> 7 & (width / 16 - 1)) << 4;
    }
    return address;
  }
};

struct Reader {
  Context& c;
  Epoch epoch;
  uint32_t leader;

  // Reads `rows` x 16 elements of a matrix, from row `first`, into out[row][k].
  template <class T>
  void read(const Descriptor& matrix, int first, int rows, float (*out)[16]) {
    Block& block = c.block;
    for (int line = 0; line < (matrix.transposed ? 16 : rows); line++) {
      for (int part = 0; part < (matrix.transposed ? rows : 16); part += 8) {
        int mn = matrix.transposed ? part : line, k = matrix.transposed ? line : part;
        uint32_t address = matrix.chunk(first + mn, k);
        Place place{nullptr, nullptr, address, kShared, -1};
        if (address + 16 > block.shared.size()) {
          c.machine.report("out-of-bounds", block, c.thread(leader), c.pc, place, {},
                           "a matrix descriptor leads out of %zu bytes", block.shared.size());
          continue;
        }
        place.host = block.shared.data() + address;
        if (c.machine.launch.check) {
          place.shadow = &block.shadow;
          c.machine.check_async_read(c, leader, place, 16, epoch);
        }
        T element[8];
        std::memcpy(element, place.host, 16);
        for (int i = 0; i < 8; i++)
          (matrix.transposed ? out[mn + i][k] : out[mn][k + i]) = to_float(element[i]);
      }
    }
  }
};

// Puts the results that are due where they belong.
template <class Due>
void deliver(Warp& warp, Due due) {
  std::erase_if(warp.late, [&](const Result& result) {
    if (!due(result)) return false;
    for (int lane = 0; lane < kWarp; lane++)
      Lanes<float>{warp.file.get() + result.slot}.set(lane, result.value[lane]);
    return true;
  });
}

// D [64, N] = A B (+ D), m64nNk16; a warp has rows 16 (w % 4) and up. Operands: N, whether A lies
// in registers, whether A and B are transposed, the signs of A and B, the predicate of whether to
// add, then the registers of D, the descriptor or registers of A, the descriptor of B.
template <class T>
Flow product(Context& c) {
  int n = c.operand(0), d_at = 7, a_at = d_at + n / 2;
  bool registers = c.operand(1);
  uint32_t leader = std::countr_zero(c.active);
  static thread_local float a[16][16], b[256][16];
  // Products may add to the same registers without a wait in between.
  deliver(c.warp, [&](const Result& result) {
    const int32_t* sums = c.in.operands + d_at;
    return std::find(sums, sums + n / 2, result.slot) != sums + n / 2;
  });
  if (c.machine.launch.check && !c.warp.fenced)
    c.machine.report("missing-register-fence", c.block, c.thread(leader), c.pc, {}, {},
                     "no wgmma.fence follows what threads did to registers");
  const Clock& clock = c.state(leader).clock;
  Epoch epoch{c.block.linear, c.warp.products + 1, c.pc,
              static_cast<uint16_t>(clock.agent(kProducts)), false};
  Reader reader{c, epoch, leader};
  if (registers) {
    for (int lane = 0; lane < kWarp; lane++)
      for (int r = 0; r < 4; r++) {
        Pair<T> pair = c.lanes<Pair<T>>(a_at + r)[lane];
        int row = lane / 4 + r % 2 * 8, k = lane % 4 * 2 + r / 2 * 8;
        a[row][k] = to_float(pair.low);
        a[row][k + 1] = to_float(pair.high);
      }
  } else {
    Descriptor matrix(c.lanes<uint64_t>(a_at)[leader], c.operand(2));
    reader.read<T>(matrix, c.warp.index % 4 * 16, 16, a);
  }
  Descriptor matrix(c.lanes<uint64_t>(a_at + (registers ? 4 : 1))[leader], c.operand(3));
  reader.read<T>(matrix, 0, n, b);
  float sign = static_cast<float>(c.operand(4) * c.operand(5));
  uint32_t adding = c.mask(6);
  for (int j = 0; j < n / 2; j++) {
    auto d = c.lanes<float>(d_at + j);
    Result result{c.warp.products, c.operand(d_at + j), {}};
    for_lanes(c.active, [&](int lane) {
      int row = lane / 4 + j / 2 % 2 * 8, column = j / 4 * 8 + lane % 4 * 2 + j % 2;
      double sum = 0;
      for (int k = 0; k < 16; k++) sum += double{a[row][k]} * b[column][k];
      result.value[lane] = static_cast<float>(sign * sum + (adding >> lane & 1 ? d[lane] : 0.0f));
      d.set(lane, c.machine.launch.late ? NAN : result.value[lane]);
    });
    if (c.machine.launch.late) c.warp.late.push_back(result);
  }
  return Flow::next;
}

// Products follow one another as they are; a thread touches registers before the first, and once it
// has waited for some.
Flow fence(Context& c) {
  c.warp.fenced = true;
  return Flow::next;
}

Flow commit(Context& c) {
  c.warp.products++;
  return Flow::next;
}

// Operand: how many of the latest groups may still be under way.
Flow wait(Context& c) {
  uint32_t pending = c.operand(0);
  uint32_t done = c.warp.products > pending ? c.warp.products - pending : 0;
  c.warp.fenced = false;
  deliver(c.warp, [&](const Result& result) { return result.group < done; });
  for_lanes(c.active, [&](int lane) {
    uint32_t& seen = c.state(lane).clock.progress[kProducts];
    seen = std::max(seen, done);
  });
  return Flow::next;
}

}  // namespace

void add_wgmma(Table& table) {
  table.add("wgmma.f16", product<f16>);
  table.add("wgmma.bf16", product<bf16>);
  table.add("wgmma.fence", fence);
  table.add("wgmma.commit_group", commit);
  table.add("wgmma.wait_group", wait);
}

}  // namespace fastattn::emulator
