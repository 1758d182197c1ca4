// Products of bf16 in pairs: two depths lie in the bits of one float.
#pragma once

#include "simd/vec.h"

namespace fastattn::FASTATTN_ISA {
namespace {

// Where the processor adds up products of bf16 in pairs, two depths lie in the bits of one float,
// the first in the lower half; the emulated vector does the same, for tests.
#if defined(__clang__) && defined(__AVX512F__)
constexpr bool kPairs = false;  // clang assembles no instruction that it is not to compile to
#else
constexpr bool kPairs = FASTATTN_LANES == 16;
#endif

// How many depths of an operand are one element of what is packed.
template <class T>
int unit() {
  if constexpr (kPairs && std::is_same_v<T, bf16>) return multiplies_pairs(kIsa) ? 2 : 1;
  return 1;
}
// Calls f with it, as a constant.
template <class T, class F>
void with_unit(F&& f) {
  if constexpr (kPairs && std::is_same_v<T, bf16>)
    if (unit<T>() == 2) return f(std::integral_constant<int, 2>());
  f(std::integral_constant<int, 1>());
}

// sum += the products of both halves.
FASTATTN_INLINE void multiply_add_pairs(Vec<float>& sum, Vec<float> factor, Vec<float> row) {
#if defined(__AVX512F__) && FASTATTN_LANES == 16
  asm("vdpbf16ps %2, %1, %0" : "+v"(sum) : "v"(factor), "v"(row));
#else
  const auto first = [](Vec<float> x) { return bits<Vec<float>>(bits<VecU>(x) << 16); };
  const auto second = [](Vec<float> x) { return bits<Vec<float>>(bits<VecU>(x) & 0xffff0000u); };
  sum += second(factor) * second(row);
  sum += first(factor) * first(row);
#endif
}

// The pairs of what stands in the same place of two vectors, which bf16 holds exactly.
FASTATTN_INLINE Vec<float> pair(Vec<float> first, Vec<float> second) {
  return bits<Vec<float>>(bits<VecU>(first) >> 16 | (bits<VecU>(second) & 0xffff0000u));
}

// Rounds two vectors that follow each other, and pairs neighbours.
FASTATTN_INLINE Vec<float> round_neighbours(Vec<float> first, Vec<float> second) {
  Vec<float> pairs;
#if defined(__AVX512F__) && FASTATTN_LANES == 16
  asm("vcvtne2ps2bf16 %1, %2, %0" : "=v"(pairs) : "v"(first), "v"(second));
#else
  bf16 both[2 * lanes<float>];
  store(both, first);
  store(both + lanes<float>, second);
  std::memcpy(&pairs, both, sizeof(pairs));
#endif
  return pairs;
}

// Rounds two vectors, and pairs what stands in the same place of both.
FASTATTN_INLINE Vec<float> round_pairs(Vec<float> first, Vec<float> second) {
  constexpr int n = lanes<float>;
  using Halves = Vector<uint16_t, 2 * n>;
  const auto row = bits<Halves>(round_neighbours(first, second));
  return bits<Vec<float>>(shuffle(row, row, std::make_index_sequence<2 * n>{},
                                  [](int i) constexpr { return i / 2 + i % 2 * n; }));
}

// Depth k of a row, whose elements are `step` apart.
template <int Unit, class A>
A depth_at(const A* row, int64_t k, int64_t step) {
  const A element = row[k / Unit * step];
  if constexpr (Unit == 1) {
    return element;
  } else {
    const auto both = bits<uint32_t>(element);
    return bits<float>(k % 2 == 0 ? both << 16 : both & 0xffff0000u);
  }
}

}  // namespace
}  // namespace fastattn::FASTATTN_ISA
