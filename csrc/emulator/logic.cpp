// Bits, comparisons, selection and moves between registers.
#include <algorithm>
#include <bit>
#include <functional>

#include "emulator/operations.h"

namespace fastattn::emulator {
namespace {

// --- bits

// Shifts by the width or more give what is left: zeros, or copies of the sign.
auto shift_left = [](auto a, uint32_t by) {
  return by < 8 * sizeof a ? static_cast<uint64_t>(a) << by : 0;
};
auto shift_right = [](auto a, uint32_t by) {
  return static_cast<int64_t>(a) >> std::min<uint32_t>(by, 63);
};
auto shift_right_bits = [](auto a, uint32_t by) {
  return by < 8 * sizeof a ? static_cast<uint64_t>(a) >> by : 0;
};

uint64_t both(uint32_t low, uint32_t high) { return uint64_t{high} << 32 | low; }

template <class T>
T extract(T a, uint32_t position, uint32_t length) {
  constexpr uint32_t bits = 8 * sizeof(T);
  position &= 255;
  length &= 255;
  bool is_signed = std::is_signed_v<T>;
  if (length == 0) return 0;
  uint64_t value = position < bits ? static_cast<std::make_unsigned_t<T>>(a) >> position : 0;
  uint32_t top = std::min(position + length - 1, bits - 1);
  bool sign = is_signed && (a >> top & 1);
  if (length < 64) value &= (uint64_t{1} << length) - 1;
  uint32_t filled = std::min(length, bits - std::min(position, bits));
  if (sign) value |= filled < 64 ? ~uint64_t{0} << filled : 0;
  return static_cast<T>(value);
}

template <class T>
T insert(T a, T b, uint32_t position, uint32_t length) {
  constexpr uint32_t bits = 8 * sizeof(T);
  position &= 255;
  length &= 255;
  if (position >= bits || length == 0) return b;
  T mask = (length < bits ? (T{1} << length) - 1 : ~T{0}) << position;
  return (b & ~mask) | (a << position & mask);
}

// Picks four of the eight bytes of b:a; bit 3 of a selector replicates the byte's sign.
uint32_t permute(uint32_t a, uint32_t b, uint32_t selectors) {
  uint64_t bytes = uint64_t{b} << 32 | a;
  uint32_t result = 0;
  for (int i = 0; i < 4; i++) {
    uint32_t selector = selectors >> 4 * i & 15;
    uint32_t byte = bytes >> 8 * (selector & 7) & 255;
    if (selector & 8) byte = byte & 0x80 ? 255 : 0;
    result |= byte << 8 * i;
  }
  return result;
}

// Operands: d, a, b, c, then the truth table as a number.
Flow lop3(Context& c) {
  auto d = c.lanes<uint32_t>(0), x = c.lanes<uint32_t>(1), y = c.lanes<uint32_t>(2),
       z = c.lanes<uint32_t>(3);
  int table = c.operand(4);
  for_lanes(c.active, [&](int lane) {
    uint32_t result = 0;
    for (int row = 0; row < 8; row++)
      if (table >> row & 1)
        result |= (row & 4 ? x[lane] : ~x[lane]) & (row & 2 ? y[lane] : ~y[lane]) &
                  (row & 1 ? z[lane] : ~z[lane]);
    d.set(lane, result);
  });
  return Flow::next;
}

template <class T>
T reverse_bits(T a) {
  T result = 0;
  for (size_t i = 0; i < 8 * sizeof(T); i++) result |= (a >> i & 1) << (8 * sizeof(T) - 1 - i);
  return result;
}

// The highest bit that differs from the sign, or -1.
template <class T>
uint32_t find_high(T a) {
  if (std::is_signed_v<T> && a < 0) a = ~a;
  return 8 * sizeof(T) - 1 - std::countl_zero(static_cast<std::make_unsigned_t<T>>(a));
}

// --- predicates, one bit a lane

template <class F>
Flow predicates(Context& c) {
  c.set_mask(0, F{}(c.mask(1), c.mask(2)));
  return Flow::next;
}
Flow predicate_not(Context& c) {
  c.set_mask(0, ~c.mask(1));
  return Flow::next;
}
Flow predicate_move(Context& c) {
  c.set_mask(0, c.mask(1));
  return Flow::next;
}

// --- comparisons

// Operands: p, its complement q (where a and b are pairs, p is of the low ones and q of the high
// ones), a, b, a predicate to combine with, how (0: not at all, 1: and, 2: or, 3: xor), whether
// that predicate is negated.
template <class F, class T>
Flow compare(Context& c) {
  constexpr bool pairs = is_pair<typename T::lane>;
  auto a = c.lanes<typename T::lane>(2), b = c.lanes<typename T::lane>(3);
  uint32_t result = 0, other = 0;
  const auto holds = [ftz = c.flag(kFtz)](auto x, auto y) -> uint32_t {
    if (ftz) x = flushed(x), y = flushed(y);
    return F{}(widen(x), widen(y));
  };
  for_lanes(c.active, [&](int lane) {
    if constexpr (pairs) {
      result |= holds(a[lane].low, b[lane].low) << lane;
      other |= holds(a[lane].high, b[lane].high) << lane;
    } else {
      result |= holds(a[lane], b[lane]) << lane;
    }
  });
  if constexpr (!pairs) other = ~result;
  if (int how = c.operand(5)) {
    uint32_t with = c.mask(4) ^ (c.operand(6) ? ~0u : 0);
    auto combine = [&](uint32_t x) { return how == 1 ? x & with : how == 2 ? x | with : x ^ with; };
    result = combine(result);
    other = combine(other);
  }
  c.set_mask(0, result);
  c.set_mask(1, other);
  return Flow::next;
}

template <class... Types, class F>
void add_comparison(Table& table, const char* name, F) {
  (table.add("setp." + Table::dotted(name, Types::name), compare<F, Types>), ...);
}

template <class... Types>
void add_ordered(Table& table) {
  add_comparison<Types...>(table, "eq", [](auto a, auto b) { return a == b; });
  // For numbers "ne" is ordered: false where either is NaN.
  add_comparison<Types...>(table, "ne", [](auto a, auto b) { return a < b || a > b; });
  add_comparison<Types...>(table, "lt", [](auto a, auto b) { return a < b; });
  add_comparison<Types...>(table, "le", [](auto a, auto b) { return a <= b; });
  add_comparison<Types...>(table, "gt", [](auto a, auto b) { return a > b; });
  add_comparison<Types...>(table, "ge", [](auto a, auto b) { return a >= b; });
}

template <class... Types>
void add_unordered(Table& table) {
  add_comparison<Types...>(table, "equ", [](auto a, auto b) { return !(a < b || a > b); });
  add_comparison<Types...>(table, "neu", [](auto a, auto b) { return a != b; });
  add_comparison<Types...>(table, "ltu", [](auto a, auto b) { return !(a >= b); });
  add_comparison<Types...>(table, "leu", [](auto a, auto b) { return !(a > b); });
  add_comparison<Types...>(table, "gtu", [](auto a, auto b) { return !(a <= b); });
  add_comparison<Types...>(table, "geu", [](auto a, auto b) { return !(a < b); });
  add_comparison<Types...>(table, "num", [](auto a, auto b) { return a == a && b == b; });
  add_comparison<Types...>(table, "nan", [](auto a, auto b) { return a != a || b != b; });
}

// --- selection and moves

template <class T>
Flow select(Context& c) {
  auto d = c.lanes<T>(0), a = c.lanes<T>(1), b = c.lanes<T>(2);
  uint32_t which = c.mask(3);
  for_lanes(c.active, [&](int lane) { d.set(lane, which >> lane & 1 ? a[lane] : b[lane]); });
  return Flow::next;
}

// Several registers into one. Operands: d, its bytes a lane, how many sources, their bytes, the
// sources from the lowest.
Flow pack(Context& c) {
  int total = c.operand(1), count = c.operand(2), bytes = c.operand(3);
  uint8_t* file = c.warp.file.get();
  for_lanes(c.active, [&](int lane) {
    for (int i = 0; i < count; i++)
      std::memcpy(file + c.operand(0) + lane * total + i * bytes,
                  file + c.operand(4 + i) + lane * bytes, bytes);
  });
  return Flow::next;
}
// The reverse; operands: the source, its bytes, how many results, their bytes, the results.
Flow unpack(Context& c) {
  int total = c.operand(1), count = c.operand(2), bytes = c.operand(3);
  uint8_t* file = c.warp.file.get();
  for_lanes(c.active, [&](int lane) {
    std::array<uint8_t, 16> value;  // the source may be one of the results
    std::memcpy(value.data(), file + c.operand(0) + lane * total, total);
    for (int i = 0; i < count; i++)
      std::memcpy(file + c.operand(4 + i) + lane * bytes, &value[i * bytes], bytes);
  });
  return Flow::next;
}

}  // namespace

void add_logic(Table& table) {
  table.binary<B16, B32, B64>("and", [](auto a, auto b) { return a & b; });
  table.binary<B16, B32, B64>("or", [](auto a, auto b) { return a | b; });
  table.binary<B16, B32, B64>("xor", [](auto a, auto b) { return a ^ b; });
  table.unary<B16, B32, B64>("not", [](auto a) { return ~a; });
  table.unary<B16, B32, B64>("cnot", [](auto a) { return a == 0; });
  table.add("and.pred", predicates<std::bit_and<uint32_t>>);
  table.add("or.pred", predicates<std::bit_or<uint32_t>>);
  table.add("xor.pred", predicates<std::bit_xor<uint32_t>>);
  table.add("not.pred", predicate_not);
  table.add("mov.pred", predicate_move);

  table.function<B16, B16, U32>("shl.b16", shift_left);
  table.function<B32, B32, U32>("shl.b32", shift_left);
  table.function<B64, B64, U32>("shl.b64", shift_left);
  table.function<U16, U16, U32>("shr.u16", shift_right_bits);
  table.function<U32, U32, U32>("shr.u32", shift_right_bits);
  table.function<U64, U64, U32>("shr.u64", shift_right_bits);
  table.function<S16, S16, U32>("shr.s16", shift_right);
  table.function<S32, S32, U32>("shr.s32", shift_right);
  table.function<S64, S64, U32>("shr.s64", shift_right);
  table.function<B32, B32, B32, U32>("shf.l.wrap.b32", [](uint32_t a, uint32_t b, uint32_t n) {
    return both(a, b) << (n & 31) >> 32;
  });
  table.function<B32, B32, B32, U32>(
      "shf.r.wrap.b32", [](uint32_t a, uint32_t b, uint32_t n) { return both(a, b) >> (n & 31); });
  table.function<B32, B32, B32, U32>("shf.l.clamp.b32", [](uint32_t a, uint32_t b, uint32_t n) {
    return both(a, b) << std::min(n, 32u) >> 32;
  });
  table.function<B32, B32, B32, U32>("shf.r.clamp.b32", [](uint32_t a, uint32_t b, uint32_t n) {
    return both(a, b) >> std::min(n, 32u);
  });
  auto bfe = [](auto a, uint32_t position, uint32_t length) {
    return extract(a, position, length);
  };
  table.function<S32, S32, U32, U32>("bfe.s32", bfe);
  table.function<U32, U32, U32, U32>("bfe.u32", bfe);
  table.function<S64, S64, U32, U32>("bfe.s64", bfe);
  table.function<U64, U64, U32, U32>("bfe.u64", bfe);
  auto bfi = [](auto a, auto b, uint32_t position, uint32_t length) {
    return insert(a, b, position, length);
  };
  table.function<B32, B32, B32, U32, U32>("bfi.b32", bfi);
  table.function<B64, B64, B64, U32, U32>("bfi.b64", bfi);
  table.function<B32, B32, B32, B32>("prmt.b32", [](uint32_t a, uint32_t b, uint32_t selectors) {
    return permute(a, b, selectors);
  });
  table.add("lop3.b32", lop3);
  table.unary<B32, B64>("brev", [](auto a) { return reverse_bits(a); });
  table.function<U32, B32>("popc.b32", [](uint32_t a) { return std::popcount(a); });
  table.function<U32, B64>("popc.b64", [](uint64_t a) { return std::popcount(a); });
  table.function<U32, B32>("clz.b32", [](uint32_t a) { return std::countl_zero(a); });
  table.function<U32, B64>("clz.b64", [](uint64_t a) { return std::countl_zero(a); });
  auto bfind = [](auto a) { return find_high(a); };
  table.function<U32, U32>("bfind.u32", bfind);
  table.function<U32, S32>("bfind.s32", bfind);
  table.function<U32, U64>("bfind.u64", bfind);
  table.function<U32, S64>("bfind.s64", bfind);
  auto shift_of = [](auto a) {  // that moves the bit to the highest
    const uint32_t at = find_high(a);
    return at == ~0u ? at : uint32_t{8 * sizeof(a) - 1} - at;
  };
  table.function<U32, U32>("bfind.shiftamt.u32", shift_of);
  table.function<U32, S32>("bfind.shiftamt.s32", shift_of);
  table.function<U32, U64>("bfind.shiftamt.u64", shift_of);
  table.function<U32, S64>("bfind.shiftamt.s64", shift_of);

  add_ordered<S16, U16, S32, U32, S64, U64, B16, B32, B64, F32, F64, F16, BF16, F16x2, BF16x2>(
      table);
  add_unordered<F32, F64, F16, BF16, F16x2, BF16x2>(table);

  table.add("selp.b16", select<uint16_t>);
  table.add("selp.b32", select<uint32_t>);
  table.add("selp.b64", select<uint64_t>);
  table.unary<B16, B32, B64>("mov", [](auto a) { return a; });
  table.add("pack", pack);
  table.add("unpack", unpack);
}

}  // namespace fastattn::emulator
