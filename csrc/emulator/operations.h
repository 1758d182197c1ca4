// How operations are defined: PTX's types, and a table that instructions are looked up in.
#pragma once

#include <type_traits>
#include <utility>

#include "emulator/half.h"
#include "emulator/machine.h"

namespace fastattn::emulator {

// Two values in one register.
template <class T>
struct Pair {
  T low, high;
};

// PTX's name for a type, and what a lane of it holds.
#define FASTATTN_PTX_TYPE(Name, text, lane_type) \
  struct Name {                                  \
    using lane = lane_type;                      \
    static constexpr const char* name = text;    \
  };
FASTATTN_PTX_TYPE(S8, "s8", int8_t)
FASTATTN_PTX_TYPE(U8, "u8", uint8_t)
FASTATTN_PTX_TYPE(S16, "s16", int16_t)
FASTATTN_PTX_TYPE(U16, "u16", uint16_t)
FASTATTN_PTX_TYPE(S32, "s32", int32_t)
FASTATTN_PTX_TYPE(U32, "u32", uint32_t)
FASTATTN_PTX_TYPE(S64, "s64", int64_t)
FASTATTN_PTX_TYPE(U64, "u64", uint64_t)
FASTATTN_PTX_TYPE(B16, "b16", uint16_t)
FASTATTN_PTX_TYPE(B32, "b32", uint32_t)
FASTATTN_PTX_TYPE(B64, "b64", uint64_t)
FASTATTN_PTX_TYPE(F32, "f32", float)
FASTATTN_PTX_TYPE(F64, "f64", double)
FASTATTN_PTX_TYPE(F16, "f16", f16)
FASTATTN_PTX_TYPE(BF16, "bf16", bf16)
FASTATTN_PTX_TYPE(F16x2, "f16x2", Pair<f16>)
FASTATTN_PTX_TYPE(BF16x2, "bf16x2", Pair<bf16>)
FASTATTN_PTX_TYPE(F32x2, "f32x2", Pair<float>)
#undef FASTATTN_PTX_TYPE

template <class T>
constexpr bool is_half = std::is_same_v<T, f16> || std::is_same_v<T, bf16>;
template <class T>
constexpr bool is_float = is_half<T> || std::is_floating_point_v<T>;

// What a function computes with: halves in fp64, so that only the last step rounds.
template <class T>
auto widen(T x) {
  if constexpr (is_half<T>)
    return static_cast<double>(to_float(x));
  else
    return x;
}
template <class T, class V>
T narrow(V x) {
  if constexpr (is_half<T>)
    return from_float<T>(to_odd(static_cast<double>(x)));
  else
    return static_cast<T>(x);
}

template <class T>
T flushed(T x) {
  if constexpr (std::is_same_v<T, float>)
    return flush(x);
  else
    return x;
}
// Into [0, 1] or [0, inf), NaN to 0.
template <class V>
V clamped(V x, uint32_t flags) {
  if constexpr (std::is_floating_point_v<V>) {
    if (flags & kSat) return x > 0 ? std::min(x, V(1)) : V(0);
    if (flags & kRelu) return x > 0 ? x : V(0);
  }
  return x;
}

// F of one value of each operand, under the flags of the instruction.
template <class F, class T, class... A>
T apply(uint32_t flags, A... a) {
  if (!(flags & (kFtz | kSat | kRelu))) return narrow<T>(F{}(widen(a)...));
  if (!(flags & kFtz)) return narrow<T>(clamped(F{}(widen(a)...), flags));
  return flushed(narrow<T>(clamped(F{}(widen(flushed(a))...), flags)));
}
template <class F, class P, class... A>
P apply_pair(uint32_t flags, A... a) {
  using T = decltype(P::low);
  return {apply<F, T>(flags, a.low...), apply<F, T>(flags, a.high...)};
}
template <class T>
constexpr bool is_pair = false;
template <class T>
constexpr bool is_pair<Pair<T>> = true;

template <class F, class D, class... A>
void for_operands(uint32_t active, uint32_t flags, Lanes<D> d, Lanes<A>... a) {
  for_lanes(active, [&](int lane) {
    if constexpr (is_pair<D>)
      d.set(lane, apply_pair<F, D>(flags, a[lane]...));
    else
      d.set(lane, apply<F, D>(flags, a[lane]...));
  });
}

// d = F(a, b, ...) in every active lane. Operands: d, a, b, ...
template <class F, class D, class... A>
Flow elementwise(Context& c) {
  uint32_t flags = c.in.flags & (kFtz | kSat | kRelu);
  [&]<size_t... I>(std::index_sequence<I...>) {
    auto run = [&](uint32_t constant) {
      for_operands<F>(c.active, constant, c.lanes<typename D::lane>(0),
                      c.lanes<typename A::lane>(I + 1)...);
    };
    // The common case on its own, for the compiler to vectorise.
    if (flags == 0)
      run(0);
    else
      run(flags);
  }(std::index_sequence_for<A...>{});
  return Flow::next;
}

// The three operands of an address from `first`: a slot, its bytes a lane, an offset to add.
inline Access access_at(const Context& c, int first, Space space, uint32_t bytes, bool write) {
  Access a{space, bytes, write, {}, {}, true};
  const uint8_t* slot = c.warp.file.get() + c.operand(first);
  int width = c.operand(first + 1);
  int64_t offset = c.operand(first + 2);
  for_lanes(c.active, [&](int lane) {
    uint64_t address = 0;
    std::memcpy(&address, slot + lane * width, width);
    address += offset;
    a.address[lane] = width == 4 ? static_cast<uint32_t>(address) : address;
    // A generic address of shared memory is as good as one of shared memory.
    if (space == kShared) a.address[lane] &= kSharedWindow - 1;
  });
  return a;
}

class Table {
 public:
  explicit Table(std::vector<Operation>& rows) : rows_(rows) {}

  void add(std::string name, Run run, Together together = Together::nobody, int mask_operand = 0) {
    rows_.push_back({std::move(name), run, together, mask_operand});
  }

  // F of one, two or three operands of the same type, for each of the types.
  template <class... Types, class F>
  void unary(const char* name, F) {
    (add(dotted(name, Types::name), elementwise<F, Types, Types>), ...);
  }
  template <class... Types, class F>
  void binary(const char* name, F) {
    (add(dotted(name, Types::name), elementwise<F, Types, Types, Types>), ...);
  }
  template <class... Types, class F>
  void ternary(const char* name, F) {
    (add(dotted(name, Types::name), elementwise<F, Types, Types, Types, Types>), ...);
  }
  // Result and operands of any types.
  template <class D, class... A, class F>
  void function(const char* name, F) {
    add(name, elementwise<F, D, A...>);
  }

  static std::string dotted(const char* a, const char* b) { return std::string(a) + '.' + b; }

 private:
  std::vector<Operation>& rows_;
};

// One function a file.
void add_arithmetic(Table& table);
void add_logic(Table& table);
void add_conversions(Table& table);
void add_accesses(Table& table);
void add_exchanges(Table& table);
void add_matrix(Table& table);
void add_mbarriers(Table& table);
void add_wgmma(Table& table);
void add_bulk_copies(Table& table);

}  // namespace fastattn::emulator
