// One head of additive attention: its rows, what its queries see, and sums that keep small errors.
#pragma once

#include "additive_attention/additive_attention.h"
#include "simd/pack.h"

namespace fastattn::FASTATTN_ISA {
namespace {

constexpr int64_t kKeys = 256;  // that are gone through at once
// Additions in a row, of which an error grows with the number.
constexpr int64_t kChain = 32;

// The weight of scores relative to the highest: 0 where they are hidden, even if that is NaN.
template <class A>
FASTATTN_INLINE Vec<A> relative(Vec<A> scores, A highest) {
  const Vec<A> weight = exp2_nonpositive((scores - highest) * static_cast<A>(kLog2e));
  return scores == minus_infinity<A> ? Vec<A>{} : weight;
}

template <class E>
void clear(E* sums, int64_t count) {
  std::memset(sums, 0, static_cast<size_t>(count) * sizeof(E));
}

// Empties sums into their totals: an error grows with the length of a chain of additions.
template <class A>
void move(A* sums, A* totals, int64_t count) {
  each_vector<A>(count, [&](int64_t c, auto n) {
    store_count<A>(totals + c, load_count<A>(totals + c, n) + load_count<A>(sums + c, n), n);
  });
  clear(sums, count);
}

// One head of one sequence.
template <class T, class A = Acc<T>>
struct Head {
  const AdditiveAttention& in;
  int64_t b, h;
  const A* weight;  // [D]

  Head(const AdditiveAttention& in, int64_t head, Scratch& scratch)
      : in(in), b(head / in.heads), h(head % in.heads) {
    A* row = scratch.take<A>(in.head_dim);
    weight = row;
    load_row(row, static_cast<const T*>(in.weight) + h * in.head_dim, 1, in.head_dim);
  }

  void read(A* to, const Source& from, int64_t i, int64_t count) const {
    load_row(to, at<T>(sequence(from, b), h, i, 0), from.stride[3], count);
  }
  // The same where it lies, if it can be read there.
  const A* row(const Source& from, int64_t i, int64_t count, A* copy) const {
    if constexpr (std::is_same_v<T, A>)
      if (from.stride[3] == 1) return at<T>(sequence(from, b), h, i, 0);
    read(copy, from, i, count);
    return copy;
  }

  // Row i of `to`, times a factor for every column if given.
  void write(const Target& to, int64_t i, const A* from, int64_t count, const A* factors) const {
    T* row = at<T>(sequence(to, b), h, i, 0);
    each_vector<A>(count, [&](int64_t c, auto n) {
      const Vec<A> x = load_count<A>(from + c, n);
      store_count<A>(row + c, factors == nullptr ? x : x * load_count<A>(factors + c, n), n);
    });
  }

  // The number of keys that query i sees before the mask.
  int64_t key_end(int64_t i) const { return larger(0, smaller(in.kv_len, i + in.right + 1)); }
  bool sees(int64_t i, int64_t j) const {
    return j < key_end(i) &&
           (in.mask.data == nullptr || *at<uint8_t>(sequence(in.mask, b), h, i, j));
  }
};

}  // namespace
}  // namespace fastattn::FASTATTN_ISA
