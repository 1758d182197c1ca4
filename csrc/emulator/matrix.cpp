// Tensor cores: mma, and the loads and stores of 8x8 tiles in their layout.
#include <algorithm>
#include <cmath>

#include "emulator/operations.h"

namespace fastattn::emulator {
namespace {

// --- ldmatrix, stmatrix: up to four tiles of 8x8 16-bit elements. Lane 8 t + i names the address
// of row i of tile t; lane l holds elements 2 (l % 4) and the next of row l / 4 of every tile.

// Operands: address (3), tiles, transposed, then a register for each tile.
template <bool kStore>
Flow tiles(Context& c) {
  int count = c.operand(3);
  bool transposed = c.operand(4);
  Access a = access_at(c, 0, kShared, 16, kStore);
  Context rows = c;
  rows.active = c.active & (count == 4 ? ~0u : (1u << 8 * count) - 1);
  uint32_t good = c.machine.locate(rows, a);
  uint16_t element[32][8];
  std::memset(element, 0xff, sizeof element);
  auto at = [&](int tile, int row, int column) -> uint16_t& {
    return transposed ? element[8 * tile + column][row] : element[8 * tile + row][column];
  };
  auto exchange = [&](auto visit) {
    for (int tile = 0; tile < count; tile++) {
      auto pairs = c.lanes<Pair<uint16_t>>(5 + tile);
      for_lanes(c.active, [&](int lane) { visit(pairs, lane, tile, lane / 4, lane % 4 * 2); });
    }
  };
  if (kStore)
    exchange([&](auto pairs, int lane, int tile, int row, int column) {
      Pair<uint16_t> pair = pairs[lane];
      at(tile, row, column) = pair.low;
      at(tile, row, column + 1) = pair.high;
    });
  for_lanes(good, [&](int lane) {
    const Place& place = a.place[lane];
    if (kStore) {
      c.machine.check_write(c, lane, place, 16, reinterpret_cast<uint8_t*>(element[lane]));
      std::memcpy(place.host, element[lane], 16);
    } else {
      c.machine.check_read(c, lane, place, 16);
      std::memcpy(element[lane], place.host, 16);
    }
  });
  if (!kStore)
    exchange([&](auto pairs, int lane, int tile, int row, int column) {
      pairs.set(lane, {at(tile, row, column), at(tile, row, column + 1)});
    });
  return Flow::next;
}

// --- mma

// The elements of a 32-bit register of A or B, as the products are formed.
struct HalfOperand {
  static constexpr int per = 2;
  static double get(uint32_t bits, int i) {
    return to_float(f16{static_cast<uint16_t>(bits >> 16 * i)});
  }
};
struct Bf16Operand {
  static constexpr int per = 2;
  static double get(uint32_t bits, int i) {
    return to_float(bf16{static_cast<uint16_t>(bits >> 16 * i)});
  }
};
struct Tf32Operand {
  static constexpr int per = 1;
  static double get(uint32_t bits, int) { return tf32_operand(bits); }
};
template <bool kE4m3>
struct Fp8Operand {
  static constexpr int per = 4;
  static double get(uint32_t bits, int i) { return from_fp8(bits >> 8 * i & 255, kE4m3); }
};
template <class T>
struct IntOperand {
  static constexpr int per = 4;
  static double get(uint32_t bits, int i) { return static_cast<T>(bits >> 8 * i); }
};

// D = A B + C with A 16 x K, B K x 8. Lane l holds rows l / 4 and l / 4 + 8. Products and sums
// are formed in fp64 and rounded once: exact for integers, and closer than the hardware for the
// rest. Operands: K, whether C and D are packed fp16, then the registers of D, A, B and C.
template <class A, class B, class Acc>
Flow mma(Context& c) {
  int k = c.operand(0);
  bool half = c.operand(1);
  int a_count = k / (2 * A::per), b_count = k / (4 * A::per), d_count = half ? 2 : 4;
  int d_at = 2, a_at = d_at + d_count, b_at = a_at + a_count, c_at = b_at + b_count;
  double a[16][64], b[64][8], sum[16][8];
  for (int lane = 0; lane < kWarp; lane++) {
    int row = lane / 4, column = lane % 4;
    for (int r = 0; r < a_count; r++)
      for (int i = 0; i < A::per; i++)
        a[row + r % 2 * 8][(column + r / 2 * 4) * A::per + i] =
            A::get(c.lanes<uint32_t>(a_at + r)[lane], i);
    for (int r = 0; r < b_count; r++)
      for (int i = 0; i < B::per; i++)
        b[(column + r * 4) * B::per + i][row] = B::get(c.lanes<uint32_t>(b_at + r)[lane], i);
    for (int e = 0; e < 4; e++) {
      double& to = sum[row + e / 2 * 8][column * 2 + e % 2];
      if (half) {
        auto pair = c.lanes<Pair<f16>>(c_at + e / 2)[lane];
        to = to_float(e % 2 ? pair.high : pair.low);
      } else {
        to = static_cast<double>(c.lanes<Acc>(c_at + e)[lane]);
      }
    }
  }
  for (int i = 0; i < 16; i++)
    for (int j = 0; j < k; j++)
      for (int n = 0; n < 8; n++) sum[i][n] += a[i][j] * b[j][n];
  for_lanes(c.active, [&](int lane) {
    int row = lane / 4, column = lane % 4 * 2;
    for (int h = 0; h < 2; h++) {
      double x = sum[row + 8 * h][column], y = sum[row + 8 * h][column + 1];
      if (half) {
        c.lanes<Pair<f16>>(d_at + h).set(lane, {narrow<f16>(x), narrow<f16>(y)});
      } else if (std::is_integral_v<Acc>) {
        c.lanes<Acc>(d_at + 2 * h).set(lane, static_cast<Acc>(static_cast<int64_t>(x)));
        c.lanes<Acc>(d_at + 2 * h + 1).set(lane, static_cast<Acc>(static_cast<int64_t>(y)));
      } else {
        c.lanes<Acc>(d_at + 2 * h).set(lane, static_cast<Acc>(x));
        c.lanes<Acc>(d_at + 2 * h + 1).set(lane, static_cast<Acc>(y));
      }
    }
  });
  return Flow::next;
}

// m8n8k4 in fp64. Operands: the registers of D (2), A, B and C (2).
Flow mma_f64(Context& c) {
  double a[8][4], b[4][8];
  for (int lane = 0; lane < kWarp; lane++) {
    a[lane / 4][lane % 4] = c.lanes<double>(2)[lane];
    b[lane % 4][lane / 4] = c.lanes<double>(3)[lane];
  }
  for_lanes(c.active, [&](int lane) {
    for (int e = 0; e < 2; e++) {
      double sum = c.lanes<double>(4 + e)[lane];
      for (int k = 0; k < 4; k++) sum = std::fma(a[lane / 4][k], b[k][lane % 4 * 2 + e], sum);
      c.lanes<double>(e).set(lane, sum);
    }
  });
  return Flow::next;
}

}  // namespace

void add_matrix(Table& table) {
  table.add("ldmatrix", tiles<false>);
  table.add("stmatrix", tiles<true>);
  table.add("mma.f16.f16", mma<HalfOperand, HalfOperand, float>);
  table.add("mma.bf16.bf16", mma<Bf16Operand, Bf16Operand, float>);
  table.add("mma.tf32.tf32", mma<Tf32Operand, Tf32Operand, float>);
  table.add("mma.e4m3.e4m3", mma<Fp8Operand<true>, Fp8Operand<true>, float>);
  table.add("mma.e4m3.e5m2", mma<Fp8Operand<true>, Fp8Operand<false>, float>);
  table.add("mma.e5m2.e4m3", mma<Fp8Operand<false>, Fp8Operand<true>, float>);
  table.add("mma.e5m2.e5m2", mma<Fp8Operand<false>, Fp8Operand<false>, float>);
  table.add("mma.s8.s8", mma<IntOperand<int8_t>, IntOperand<int8_t>, int32_t>);
  table.add("mma.s8.u8", mma<IntOperand<int8_t>, IntOperand<uint8_t>, int32_t>);
  table.add("mma.u8.s8", mma<IntOperand<uint8_t>, IntOperand<int8_t>, int32_t>);
  table.add("mma.u8.u8", mma<IntOperand<uint8_t>, IntOperand<uint8_t>, int32_t>);
  table.add("mma.f64.f64", mma_f64);
}

}  // namespace fastattn::emulator
