// The register tile of a matrix product, and the fetching of what it meets.
//
// A tile reads rows of A element by element and panels of B, Tile::cols wide, with stride one.
#pragma once

#include "simd/pairs.h"

namespace fastattn::FASTATTN_ISA {
namespace {

// The register tile: rows x vecs accumulators, a row of B, one broadcast element of A; narrower B
// makes it higher, with about as many accumulators.
template <class A>
struct Tile {
  static constexpr int sums = FASTATTN_LANES == 1 ? 8 : FASTATTN_LANES == 8 ? 12 : 24;
  static constexpr int vecs = FASTATTN_LANES == 1 || FASTATTN_LANES == 8 ? 2 : 4;
  static constexpr int rows = sums / vecs;
  static constexpr int cols = vecs * lanes<A>;
  static constexpr int rows_of(int narrow) { return sums / narrow / rows * rows; }
};

// sum += factor * row. Left to itself g++ moves the sums of a tile from register to register, which
// takes a tenth of its time.
template <class A>
FASTATTN_INLINE void multiply_add(Vec<A>& sum, Vec<A> factor, Vec<A> row) {
#if defined(__AVX2__) && FASTATTN_LANES == 8
  if constexpr (sizeof(A) == 4)
    asm("vfmadd231ps %2, %1, %0" : "+x"(sum) : "x"(factor), "x"(row));
  else
    asm("vfmadd231pd %2, %1, %0" : "+x"(sum) : "x"(factor), "x"(row));
#else
  sum += factor * row;
#endif
}

// Elements of the next panel that a tile fetches while it goes through a panel of `depth`: whole
// lines, one or more a round, so that eight tiles which meet the same panel fetch all of the next.
constexpr int kRound = 8;  // depths; few enough are left over that a processor foresees the last
template <class A, int Vecs>
constexpr int64_t fetched(int64_t depth) {
  constexpr int line = 64 / sizeof(A), share = Vecs * lanes<A> * kRound / 8;
  return depth / kRound * round_up(share, line);
}

constexpr int kApart = 0;  // as Row: rows lie apart by what is known at run time alone

// C tile = Count rows of A * B panel over `depth`, added to what C holds if `add`. Element (i, k)
// of A is a[i / Tile::rows * strip + i % Tile::rows * Row + k * Step], or a[i * strip + k * Step]
// if Row is kApart, row k of B is b[k * Vecs * lanes ...], row i of C is c[i * c_row ...]. What is
// added to C is summed on its own first: an error grows with the length of a chain of additions, so
// that partial sums of blocks round less than one long chain. Meanwhile it fetches its part of the
// panel at `next`, if Ahead: worth it where panels come from beyond the second-level cache. With
// Unit = 2 an element is a pair, and what is summed is multiplied by `factor`.
template <class A, int Count, int Vecs, int Row, int Step, bool Ahead = false, int Unit = 1>
__attribute__((noinline)) void multiply_tile(const A* a, int64_t strip, const A* b, int64_t depth,
                                             A* c, int64_t c_row, bool add, const A* next = nullptr,
                                             [[maybe_unused]] A factor = 1) {
  constexpr int width = lanes<A>, high = Row == kApart ? 1 : Tile<A>::rows;
  constexpr int strips = (Count + high - 1) / high;
  [[maybe_unused]] constexpr int64_t fetch = fetched<A, Vecs>(kRound);
  Vec<A> sum[Count][Vecs];
#pragma GCC unroll 24
  for (int i = 0; i < Count; i++)
#pragma GCC unroll 4
    for (int j = 0; j < Vecs; j++) sum[i][j] = Vec<A>{};
  const A* base[strips];
#pragma GCC unroll 24
  for (int i = 0; i < strips; i++) base[i] = a + i * strip;
  const auto step = [&](int at) __attribute__((always_inline)) {
    Vec<A> row[Vecs];
#pragma GCC unroll 4
    for (int j = 0; j < Vecs; j++) row[j] = load<A>(b + (at * Vecs + j) * width);
#pragma GCC unroll 24
    for (int i = 0; i < Count; i++) {
      const Vec<A> factor = set<A>(base[i / high][i % high * Row + at * Step]);
#pragma GCC unroll 4
      for (int j = 0; j < Vecs; j++)
        if constexpr (Unit == 2)
          multiply_add_pairs(sum[i][j], factor, row[j]);
        else
          multiply_add<A>(sum[i][j], factor, row[j]);
    }
  };
  const auto advance = [&](int steps) __attribute__((always_inline)) {
#pragma GCC unroll 24
    for (int i = 0; i < strips; i++) base[i] += steps * Step;
    b += steps * Vecs * width;
  };
  for (int64_t rounds = depth / kRound; rounds > 0; rounds--) {
#pragma GCC unroll 8
    for (int at = 0; at < kRound; at++) step(at);
    advance(kRound);
    if constexpr (Ahead) {
#pragma GCC unroll 8
      for (int64_t line = 0; line < fetch; line += 64 / sizeof(A))
        __builtin_prefetch(next + line, 0, 2);
      next += fetch;
    }
  }
  for (int64_t rest = depth % kRound; rest > 0; rest--) {
    step(0);
    advance(1);
  }
#pragma GCC unroll 24
  for (int i = 0; i < Count; i++)
#pragma GCC unroll 4
    for (int j = 0; j < Vecs; j++) {
      A* to = c + i * c_row + j * width;
      if constexpr (Unit == 2) sum[i][j] *= factor;
      if (add) sum[i][j] += load<A>(to);
      store(to, sum[i][j]);
    }
}

// Calls f with the number of vectors in `width`, at most Vecs, as a constant.
template <class A, int Vecs, class F>
FASTATTN_INLINE void with_vecs(int64_t width, F&& f) {
  if constexpr (Vecs > 1)
    if (width < Vecs * lanes<A>) return with_vecs<A, Vecs - 1>(width, f);
  f(std::integral_constant<int, Vecs>{});
}

// Folds n vectors of n lanes onto each other until lane i holds what `join` makes of vector i.
template <int Half, class Join>
FASTATTN_INLINE void fold_pairs(Vec<float>* v, Join join) {
  constexpr int n = lanes<float>;
  constexpr auto index = std::make_index_sequence<n>{};
  if constexpr (Half > 0) {
#pragma GCC unroll 16
    for (int i = 0; i < Half; i++) {
      const Vec<float> a = v[i], b = v[i + Half];
      v[i] = join(shuffle(a, b, index, [](int j) constexpr { return (j & Half) ? j + n : j; }),
                  shuffle(a, b, index,
                          [](int j) constexpr { return (j & Half) ? (j ^ Half) + n : j ^ Half; }));
    }
    fold_pairs<Half / 2>(v, join);
  }
}
// to[i] = the sum, or the highest, of the lanes of v[i].
template <int Count>
FASTATTN_INLINE void sum_each(Vec<float> (&v)[Count], float* to) {
#pragma GCC unroll 16
  for (int i = 0; i < Count; i += lanes<float>) {
    fold_pairs<lanes<float> / 2>(v + i, [](Vec<float> a, Vec<float> b) { return a + b; });
    store(to + i, v[i]);
  }
}
template <int Count>
FASTATTN_INLINE void highest_each(Vec<float> (&v)[Count], float* to) {
#pragma GCC unroll 16
  for (int i = 0; i < Count; i += lanes<float>) {
    fold_pairs<lanes<float> / 2>(v + i, [](Vec<float> a, Vec<float> b) { return max(a, b); });
    store(to + i, v[i]);
  }
}
template <int Count>
FASTATTN_INLINE void sum_each(Vec<double> (&v)[Count], double* to) {
#pragma GCC unroll 16
  for (int i = 0; i < Count; i++) to[i] = sum<double>(v[i]);
}
template <int Count>
FASTATTN_INLINE void highest_each(Vec<double> (&v)[Count], double* to) {
#pragma GCC unroll 16
  for (int i = 0; i < Count; i++) to[i] = highest<double>(v[i]);
}

// Fetches rows of memory into the cache before they are needed, a little at each of `steps` steps:
// a burst would keep the loads of a tile waiting.
template <bool write>
class Fetch {
 public:
  Fetch() = default;  // of nothing
  Fetch(const void* first, int64_t row_bytes, int64_t rows, int64_t bytes, int64_t steps)
      : row_(static_cast<const char*>(first)),
        row_bytes_(row_bytes),
        rows_(rows),
        bytes_(bytes),
        lines_(rows * ceil_div(bytes, kLine)),
        steps_(steps) {}

  void step() {
    for (due_ += lines_; due_ > 0 && rows_ > 0; due_ -= steps_) {
      __builtin_prefetch(row_ + at_, write ? 1 : 0, 3);
      at_ += kLine;
      if (at_ < bytes_) continue;
      at_ = 0;
      row_ += row_bytes_;
      rows_--;
    }
  }

 private:
  static constexpr int64_t kLine = 64;
  const char* row_ = nullptr;
  int64_t row_bytes_ = 0, rows_ = 0, bytes_ = 0, lines_ = 0, steps_ = 1, at_ = 0, due_ = 0;
};

}  // namespace
}  // namespace fastattn::FASTATTN_ISA
