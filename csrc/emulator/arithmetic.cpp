// Arithmetic on integers and floating-point numbers.
#include <algorithm>
#include <cmath>
#include <limits>

#include "emulator/operations.h"

namespace fastattn::emulator {
namespace {

// Wraps around, as the hardware does: exact modulo 2^64, then cut to the type of the result.
uint64_t u(int64_t x) { return static_cast<uint64_t>(x); }

template <class T>
constexpr bool exact = std::is_integral_v<T>;

auto add = [](auto a, auto b) {
  if constexpr (exact<decltype(a)>)
    return u(a) + u(b);
  else
    return a + b;
};
auto sub = [](auto a, auto b) {
  if constexpr (exact<decltype(a)>)
    return u(a) - u(b);
  else
    return a - b;
};
auto mul = [](auto a, auto b) {
  if constexpr (exact<decltype(a)>)
    return u(a) * u(b);
  else
    return a * b;
};
auto fused = [](auto a, auto b, auto c) {
  if constexpr (exact<decltype(a)>)
    return u(a) * u(b) + u(c);
  else
    return std::fma(a, b, c);
};

template <size_t kBytes>
struct Twice;  // the integers of twice the width
template <>
struct Twice<2> {
  using s = int32_t;
  using u = uint32_t;
};
template <>
struct Twice<4> {
  using s = int64_t;
  using u = uint64_t;
};
template <>
struct Twice<8> {
  using s = __int128;
  using u = unsigned __int128;
};
// In no wider type than it takes: g++ 12 at -O3 gets the 16-bit case wrong by way of 64 bits.
auto mul_high = [](auto a, auto b) {
  using T = decltype(a);
  using Wide = std::conditional_t<std::is_signed_v<T>, typename Twice<sizeof(T)>::s,
                                  typename Twice<sizeof(T)>::u>;
  return static_cast<T>(static_cast<Wide>(a) * static_cast<Wide>(b) >> 8 * sizeof(T));
};
auto mad_high = [](auto a, auto b, auto c) {
  return static_cast<decltype(c)>(u(mul_high(a, b)) + u(c));
};

// What the hardware gives for a division by zero: all bits set.
auto divide = [](auto a, auto b) {
  using T = decltype(a);
  if constexpr (exact<T>) {
    if (b == 0) return static_cast<T>(-1);
    if (std::is_signed_v<T> && b == static_cast<T>(-1)) return static_cast<T>(0 - u(a));
    return static_cast<T>(a / b);
  } else {
    return a / b;
  }
};
auto remainder_of = [](auto a, auto b) {
  using T = decltype(a);
  if (b == 0) return a;
  if (std::is_signed_v<T> && b == static_cast<T>(-1)) return static_cast<T>(0);
  return static_cast<T>(a % b);
};

auto negate = [](auto a) {
  if constexpr (exact<decltype(a)>)
    return 0 - u(a);
  else
    return -a;
};
auto magnitude = [](auto a) {
  if constexpr (exact<decltype(a)>)
    return a < 0 ? 0 - u(a) : u(a);
  else
    return std::fabs(a);
};

// min and max of numbers ignore a NaN, order -0 before +0, and with kNan return the NaN.
template <bool kMax>
struct Extreme {
  template <class T>
  T operator()(T a, T b) const {
    if constexpr (!exact<T>) {
      if (std::isnan(a)) return b;
      if (std::isnan(b)) return a;
      if (a == b) return std::signbit(a) == kMax ? b : a;
    }
    return kMax ? std::max(a, b) : std::min(a, b);
  }
  template <class T>
  T operator()(T a, T b, T c) const {
    return (*this)((*this)(a, b), c);
  }
};
template <bool kMax>
struct ExtremeOrNan : Extreme<kMax> {
  template <class... T>
  auto operator()(T... a) const {
    using R = std::common_type_t<T...>;
    return (std::isnan(a) || ...) ? std::numeric_limits<R>::quiet_NaN() : Extreme<kMax>{}(a...);
  }
};

template <bool kMax>
void add_extreme(Table& table, const char* name, const char* nan_name) {
  table.binary<S16, U16, S32, U32, S64, U64, F32, F64, F16, BF16, F16x2, BF16x2>(name,
                                                                                 Extreme<kMax>{});
  table.binary<F32, F16, BF16, F16x2, BF16x2>(nan_name, ExtremeOrNan<kMax>{});
  table.ternary<F32>(Table::dotted(name, "3").c_str(), Extreme<kMax>{});
  table.ternary<F32>(Table::dotted(nan_name, "3").c_str(), ExtremeOrNan<kMax>{});
}

// Four products of bytes, added up.
template <class A, class B>
int64_t dot4(uint32_t a, uint32_t b) {
  int64_t sum = 0;
  for (int i = 0; i < 32; i += 8) sum += int64_t{static_cast<A>(a >> i)} * static_cast<B>(b >> i);
  return sum;
}

}  // namespace

void add_arithmetic(Table& table) {
  table.binary<S16, U16, S32, U32, S64, U64>("add", add);
  table.binary<S16, U16, S32, U32, S64, U64>("sub", sub);
  table.binary<S16, U16, S32, U32, S64, U64>("mul.lo", mul);
  table.binary<S16, U16, S32, U32, S64, U64>("mul.hi", mul_high);
  table.ternary<S16, U16, S32, U32, S64, U64>("mad.lo", fused);
  table.ternary<S16, U16, S32, U32, S64, U64>("mad.hi", mad_high);
  table.function<S32, S16, S16>("mul.wide.s16", [](int a, int b) { return a * b; });
  table.function<U32, U16, U16>("mul.wide.u16", [](uint32_t a, uint32_t b) { return a * b; });
  table.function<S64, S32, S32>("mul.wide.s32", [](int64_t a, int64_t b) { return a * b; });
  table.function<U64, U32, U32>("mul.wide.u32", [](uint64_t a, uint64_t b) { return a * b; });
  auto mad = [](auto a, auto b, auto c) { return u(a) * u(b) + u(c); };
  table.function<S32, S16, S16, S32>("mad.wide.s16", mad);
  table.function<U32, U16, U16, U32>("mad.wide.u16", mad);
  table.function<S64, S32, S32, S64>("mad.wide.s32", mad);
  table.function<U64, U32, U32, U64>("mad.wide.u32", mad);
  table.binary<S16, U16, S32, U32, S64, U64>("div", divide);
  table.binary<S16, U16, S32, U32, S64, U64>("rem", remainder_of);
  table.unary<S16, S32, S64>("neg", negate);
  table.unary<S16, S32, S64>("abs", magnitude);
  table.function<S32, S32, S32, S32>(
      "sad.s32", [](int64_t a, int64_t b, int64_t c) { return u(std::abs(a - b)) + u(c); });
  table.function<U32, U32, U32, U32>(
      "sad.u32", [](int64_t a, int64_t b, int64_t c) { return u(std::abs(a - b)) + u(c); });
  table.ternary<S32>("dp4a.s32", [](uint32_t a, uint32_t b, uint32_t c) {
    return u(dot4<int8_t, int8_t>(a, b)) + c;
  });
  table.ternary<U32>("dp4a.u32", [](uint32_t a, uint32_t b, uint32_t c) {
    return u(dot4<uint8_t, uint8_t>(a, b)) + c;
  });

  table.binary<F32, F64, F16, BF16, F16x2, BF16x2, F32x2>("add", add);
  table.binary<F32, F64, F16, BF16, F16x2, BF16x2, F32x2>("sub", sub);
  table.binary<F32, F64, F16, BF16, F16x2, BF16x2, F32x2>("mul", mul);
  table.ternary<F32, F64, F16, BF16, F16x2, BF16x2, F32x2>("fma", fused);
  table.binary<F32, F64>("div", divide);
  table.unary<F32, F64, F16, BF16, F16x2, BF16x2>("neg", negate);
  table.unary<F32, F64, F16, BF16, F16x2, BF16x2>("abs", magnitude);
  add_extreme<false>(table, "min", "min.NaN");
  add_extreme<true>(table, "max", "max.NaN");
  table.unary<F32, F64>("rcp", [](auto a) { return 1 / a; });
  table.unary<F32, F64>("sqrt", [](auto a) { return std::sqrt(a); });
  table.unary<F32, F64>("rsqrt", [](auto a) { return 1 / std::sqrt(a); });
  table.unary<F32, F16, BF16, F16x2, BF16x2>("ex2", [](auto a) { return std::exp2(a); });
  table.unary<F32, F16, BF16, F16x2, BF16x2>("tanh", [](auto a) { return std::tanh(a); });
  table.unary<F32>("lg2", [](float a) { return std::log2(a); });
  table.unary<F32>("sin", [](float a) { return std::sin(a); });
  table.unary<F32>("cos", [](float a) { return std::cos(a); });
  // PTX takes the sign from the first operand.
  table.binary<F32, F64>("copysign", [](auto a, auto b) { return std::copysign(b, a); });
}

}  // namespace fastattn::emulator
