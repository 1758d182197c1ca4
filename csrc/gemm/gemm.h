// Blocked matrix products C = A B^T with an epilogue, where B is a weight and A holds activations.
#pragma once

#include <initializer_list>

#include "simd/pack.h"

namespace fastattn::FASTATTN_ISA {

// A matrix whose element (i, k) is data[i * outer + k * inner]; k runs along the summed dimension.
template <class T>
struct Operand {
  const T* data;
  int64_t outer, inner;

  Operand from(int64_t i, int64_t k) const { return {data + i * outer + k * inner, outer, inner}; }
};

// Activations [rows, depth] as tiles read them, so that one product can leave them for the next:
// panels of Tile::cols rows, the last one narrower by whole vectors, over a span of depths, then
// the panels of the next span.
template <class A>
struct Packed {
  static constexpr int64_t width = Tile<A>::cols;
  static constexpr int64_t span = FASTATTN_LANES == 8 ? 192 : 256;  // elements of a row at once
  static constexpr int64_t share = FASTATTN_LANES == 8 ? 1 : 2;     // of the cache: 1 / share

  int64_t rows, depth;
  int unit;  // depths in an element
  A* data;

  // Rows of a block that fills its share of the cache, at `elements` a row: whole panels.
  static int64_t fitting(int64_t elements) {
    const int64_t bytes = larger(elements, 1) * static_cast<int64_t>(sizeof(A));
    return larger(2, cache_bytes() / share / (bytes * width)) * width;
  }
  static Packed take(Scratch& scratch, int64_t rows, int64_t depth, int unit) {
    const int64_t size = round_up(rows, lanes<A>) * ceil_div(depth, unit) + kSlack;
    return {rows, depth, unit, scratch.take<A>(size)};
  }
  int64_t width_at(int64_t row) const { return smaller(width, round_up(rows - row, lanes<A>)); }
  // Element k of the panel that begins with `row`.
  A* at(int64_t row, int64_t k) const {
    const int64_t start = k / span * span, deep = smaller(span, ceil_div(depth, unit) - start);
    return data + start * round_up(rows, lanes<A>) + row * deep + (k - start) * width_at(row);
  }
};

// What to do with a finished block of C: blocks[w][i * width + j] is element (row + i, col + j) of
// product w for i < rows, j < cols. A reference, not a copy, of `body`, which stores it to `out`
// and may use the blocks, up to whole vectors of whole rows, on its way there.
template <class A>
struct Finish {
  struct Place {
    int64_t row, col, rows, cols, width;
  };
  void (*call)(const void* body, const Place& place, A* const* blocks);
  const void* body;
  const char* out;
  int64_t out_row, size;  // bytes of a row and of an element
  bool turned = false;    // blocks[w][j * width + i] instead, for whole vectors of i: as in a panel

  template <class F, class T>
  Finish(const F& f, const T* to, int64_t to_row)
      : call([](const void* self, const Place& place, A* const* blocks) {
          (*static_cast<const F*>(self))(place, blocks);
        }),
        body(&f),
        out(reinterpret_cast<const char*>(to)),
        out_row(to_row * static_cast<int64_t>(sizeof(T))),
        size(sizeof(T)) {}
  // For what goes nowhere but into Packed activations, all rows of which are one block.
  template <class F>
  explicit Finish(const F& f) : Finish(f, static_cast<const A*>(nullptr), 0) {
    turned = true;
  }
};

// C_w[rows, cols] = a b_w^T over `depth` for one or two b of equal shape, block by block to
// `finish`. A sum runs over depth in the same order whatever the number of threads.
template <class A, class T>
void multiply(int64_t rows, int64_t cols, int64_t depth, Operand<T> a,
              std::initializer_list<Operand<T>> weights, Finish<A> finish);

// The same for packed activations of one block.
template <class A, class T>
void multiply(const Packed<A>& a, int64_t cols, Operand<T> weight, Finish<A> finish);

namespace {

// Visits a finished block in vectors: f(row, col, index in the block, count). What f captures by
// value, like `place`, stays in registers; what it captures by reference is read again after each
// store.
template <class A, class F>
FASTATTN_INLINE void each_in_block(typename Finish<A>::Place place, F f) {
  for (int64_t i = 0; i < place.rows; i++)
    each_vector<A>(place.cols, [&](int64_t j, auto n) {
      f(place.row + i, place.col + j, i * place.width + j, n);
    });
}

}  // namespace
}  // namespace fastattn::FASTATTN_ISA
