// cvt: between integers and floating-point numbers of every width.
#include <algorithm>
#include <cmath>
#include <limits>

#include "emulator/operations.h"

namespace fastattn::emulator {
namespace {

enum Mode { kNone, kNearest, kZero, kDown, kUp, kAway };

double integral(double x, int mode) {
  switch (mode) {
    case kNearest:
      return std::nearbyint(x);
    case kZero:
      return std::trunc(x);
    case kDown:
      return std::floor(x);
    case kUp:
      return std::ceil(x);
    default:
      return x;
  }
}

// Out of range goes to the nearest that there is, NaN to 0.
template <class D>
D to_integer(double x) {
  if (std::isnan(x)) return 0;
  if (x <= static_cast<double>(std::numeric_limits<D>::min())) return std::numeric_limits<D>::min();
  if (x >= static_cast<double>(std::numeric_limits<D>::max())) return std::numeric_limits<D>::max();
  return static_cast<D>(x);
}

template <class D, class S>
D saturated(S x) {
  auto wide = static_cast<__int128>(x);
  return static_cast<D>(
      std::clamp<__int128>(wide, std::numeric_limits<D>::min(), std::numeric_limits<D>::max()));
}

template <class D, class S>
D convert(S x, int mode, uint32_t flags) {
  if constexpr (!is_float<D> && !is_float<S>) {
    return flags & kSat ? saturated<D>(x) : static_cast<D>(x);
  } else if constexpr (!is_float<D>) {
    if (flags & kFtz) x = flushed(x);
    return to_integer<D>(integral(widen(x), mode));
  } else if constexpr (!is_float<S>) {
    if constexpr (is_half<D>)
      return narrow<D>(x);
    else
      return static_cast<D>(x);
  } else {
    if (flags & kFtz) x = flushed(x);
    double value = widen(x);
    if constexpr (sizeof(D) >= sizeof(S)) value = integral(value, mode);
    value = clamped(value, flags);
    D result;
    if constexpr (std::is_same_v<D, bf16>)
      result = to_bf16(to_odd(value), mode == kZero ? Round::zero : Round::nearest);
    else if constexpr (std::is_same_v<D, f16>)
      result = to_f16(to_odd(value), mode == kZero ? Round::zero : Round::nearest);
    else
      result = static_cast<D>(value);
    return flags & kFtz ? flushed(result) : result;
  }
}

// Operands: d, bytes of its register, a, bytes of its register, the rounding. A register may be
// wider than the type: a narrow result is then extended.
template <class D, class S>
Flow cvt(Context& c) {
  uint8_t* file = c.warp.file.get();
  int to = c.operand(0), to_bytes = c.operand(1), from = c.operand(2), from_bytes = c.operand(3);
  for_lanes(c.active, [&](int lane) {
    typename S::lane x;
    std::memcpy(&x, file + from + lane * from_bytes, sizeof x);
    auto y = convert<typename D::lane>(x, c.operand(4), c.in.flags);
    uint64_t extended = 0;
    if constexpr (is_float<decltype(y)>)
      std::memcpy(&extended, &y, sizeof y);
    else
      extended = static_cast<uint64_t>(static_cast<int64_t>(y));
    std::memcpy(file + to + lane * to_bytes, &extended, to_bytes);
  });
  return Flow::next;
}

template <class D, class... S>
void add_from(Table& table) {
  (table.add("cvt." + Table::dotted(D::name, S::name), cvt<D, S>), ...);
}
template <class... D>
void add_all(Table& table) {
  (add_from<D, S8, U8, S16, U16, S32, U32, S64, U64, F16, BF16, F32, F64>(table), ...);
}

// Two numbers into one register, the first one high. Operands: d, a, b, the rounding.
template <class T>
Flow cvt_pair(Context& c) {
  auto d = c.lanes<Pair<T>>(0);
  auto a = c.lanes<float>(1), b = c.lanes<float>(2);
  for_lanes(c.active, [&](int lane) {
    d.set(lane, {convert<T>(b[lane], c.operand(3), c.in.flags),
                 convert<T>(a[lane], c.operand(3), c.in.flags)});
  });
  return Flow::next;
}

// To ten bits of mantissa: ties away from zero, or to even. Operands: d, a, the rounding.
Flow cvt_tf32(Context& c) {
  auto d = c.lanes<uint32_t>(0), a = c.lanes<uint32_t>(1);
  Round round = c.operand(2) == kNearest ? Round::nearest
                : c.operand(2) == kZero  ? Round::zero
                                         : Round::away;
  for_lanes(c.active, [&](int lane) {
    uint32_t magnitude = a[lane] & 0x7fffffffu;
    if (magnitude < 0x7f800000u) magnitude = drop(magnitude, 13, round) << 13;
    d.set(lane, (a[lane] & 0x80000000u) | magnitude);
  });
  return Flow::next;
}

}  // namespace

void add_conversions(Table& table) {
  add_all<S8, U8, S16, U16, S32, U32, S64, U64, F16, BF16, F32, F64>(table);
  table.add("cvt.f16x2.f32", cvt_pair<f16>);
  table.add("cvt.bf16x2.f32", cvt_pair<bf16>);
  table.add("cvt.tf32.f32", cvt_tf32);
}

}  // namespace fastattn::emulator
