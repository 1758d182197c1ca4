// Queries, keys and values packed for the products of attention, and those products.
#pragma once

#include "attention/scores.h"

namespace fastattn::FASTATTN_ISA {
namespace {

// What is packed has elements of Unit depths, along the sums of a product.

// A matrix [rows, cols] packed as the B operand of products over its rows: panels of Tile::cols
// columns, the last one narrower by whole vectors.
template <class A, int Unit>
struct Panels {
  static constexpr int width = Tile<A>::cols;
  int64_t rows, cols;  // rows of storage, elements
  A* data;

  static int64_t padded(int64_t cols) { return round_up(cols, lanes<A>); }
  static Panels take(Scratch& scratch, int64_t rows, int64_t cols) {
    const int64_t elements = ceil_div(rows, Unit);
    return {elements, cols, scratch.take<A>(elements * padded(cols) + kSlack)};
  }
  template <class T>
  void pack(const T* from, int64_t row_stride, int64_t col_stride, int64_t count) const {
    for (int64_t col = 0; col < cols; col += width)
      pack_units<Unit>(data + col * rows, width_at(col), from + col * col_stride, col_stride,
                       row_stride, smaller(width, cols - col), count);
  }
  int64_t width_at(int64_t col) const { return smaller(width, padded(cols) - col); }
};

// The depths that count for each Tile::rows rows of a product: elsewhere their elements are 0.
template <class A>
struct Depths {
  static constexpr int low = Tile<A>::rows;
  Range of[kKeys / low];

  // Of the keys [j, j + keys) those that the queries [i, i + count) see.
  static Depths seen(const Attention& in, int64_t i, int64_t count, int64_t j, int64_t keys) {
    Depths depths;
    for (int64_t row = 0; row < count; row += low) {
      const Range range = visible_keys(in, i + row, smaller(low, count - row));
      depths.of[row / low] = {larger(0, range.first - j), smaller(keys, range.end - j)};
    }
    return depths;
  }
  // Of the queries those that see the keys.
  static Depths seeing(const Attention& in, int64_t i, int64_t count, int64_t j, int64_t keys) {
    const int64_t shift = j - i - in.offset;  // from a query's own key
    Depths depths;
    for (int64_t row = 0; row < keys; row += low) {
      const int64_t last = row + smaller(low, keys - row) - 1;
      depths.of[row / low] = {
          in.right >= kUnbounded ? 0 : larger(0, row + shift - in.right),
          in.left >= kUnbounded ? count : smaller(count, last + shift + in.left + 1)};
    }
    return depths;
  }
  Range at(int64_t row, int64_t count) const {
    return {of[row / low].first, of[(row + count - 1) / low].end};
  }
};

// c[i, :] += sum over k of a[i, k] * panels[first + k, :] for whole tiles of rows, where k runs
// over their depths, and `first` is even. A panel meets all rows while it is in the first-level
// cache.
template <class A, int Unit, int ARow, int ADepth>
void multiply_panels(const A* a, int64_t rows, const Panels<A, Unit>& b, int64_t first,
                     const Depths<A>& depths, A* c, int64_t c_row) {
  for (int64_t col = 0; col < b.cols; col += b.width) {
    const int64_t width = b.width_at(col);
    const A* panel = b.data + col * b.rows + first / Unit * width;
    with_vecs<A, Tile<A>::vecs>(width, [&](auto vecs) {
      const auto multiply = [&](int64_t row, auto count) {
        const auto [begin, end] = depths.at(row, count);
        if (begin >= end) return;
        const int64_t start = begin / Unit;
        multiply_tile<A, count, vecs, ARow, ADepth, false, Unit>(
            a + row * ARow + start * ADepth, Tile<A>::rows * ARow, panel + start * width,
            ceil_div(end, Unit) - start, c + row * c_row + col, c_row, true);
      };
      constexpr int low = Tile<A>::rows, high = Tile<A>::rows_of(vecs);
      int64_t row = 0;
      for (; row + high <= rows; row += high) multiply(row, std::integral_constant<int, high>());
      for (; row < rows; row += low) multiply(row, std::integral_constant<int, low>());
    });
  }
}

// The same where b holds a NaN or an infinity: what a zero of `a` hides must not turn into NaN.
template <class A, int Unit, int ARow, int ADepth>
void multiply_visible(const A* a, int64_t rows, const Panels<A, Unit>& b, int64_t first,
                      const Depths<A>& depths, A* c, int64_t c_row) {
  for (int64_t i = 0; i < rows; i++)
    for (int64_t k = depths.at(i, 1).first; k < depths.at(i, 1).end; k++) {
      const A factor = depth_at<Unit>(a + i * ARow, k, ADepth);
      if (factor == 0) continue;
      for (int64_t col = 0; col < b.cols; col++) {
        const int64_t panel = col / b.width * b.width;
        const A* from = b.data + panel * b.rows + col - panel;
        c[i * c_row + col] += factor * depth_at<Unit>(from, first + k, b.width_at(panel));
      }
    }
}

// Whether all of a block [rows, cols] of a tensor is finite.
template <class A, class T>
bool all_finite(const T* from, int64_t row_stride, int64_t col_stride, int64_t rows, int64_t cols) {
  Vec<A> sum{};
  A rest = 0;
  for (int64_t r = 0; r < rows; r++) {
    const T* row = from + r * row_stride;
    if (col_stride == 1) {
      each_vector<A>(cols, [&](int64_t c, auto n) { sum += load_count<A>(row + c, n) * A{0}; });
    } else {
      for (int64_t c = 0; c < cols; c++) rest += load_one<A>(row + c * col_stride) * A{0};
    }
  }
  return highest<A>(sum != sum ? set<A>(1) : Vec<A>{}) == 0 && rest == rest;
}

// Weights or their gradients as an operand: rounded, in pairs; `to` may be `row`.
inline void round_row(const float* row, int64_t width, float* to) {
  constexpr int n = lanes<float>;
  for (int64_t c = 0; c < width; c += 2 * n)
    store(to + c / 2, round_neighbours(load<float>(row + c), load<float>(row + c + n)));
}

// Numbers that packed keys, or values, of `cols` columns take.
template <class A, int Unit>
int64_t packed_key_size(int64_t keys, int64_t cols) {
  return round_up(keys, Tile<A>::cols) * ceil_div(cols, Unit) + kSlack;
}

// Packs rows as the A operand of products over their columns, times a factor; but in pairs, which
// would round it, the products take the factor instead.
template <int Unit, class A, class T>
void pack_rows(A* to, const T* from, int64_t row_stride, int64_t col_stride, int64_t rows,
               int64_t cols, A factor) {
  const int64_t padded = round_up(rows, Tile<A>::rows);
  pack_strips<Unit>(to, padded, from, row_stride, col_stride, rows, cols);
  if (Unit == 1 && factor != 1)
    each_vector<A>(padded * cols, [&](int64_t i, auto n) {
      store_count<A>(to + i, load_count<A>(to + i, n) * factor, n);
    });
}

// Packs keys or values as the B operand of products over their columns: panels of Tile::cols keys.
template <int Unit, class A, class T>
void pack_keys(A* to, const T* from, int64_t row_stride, int64_t col_stride, int64_t keys,
               int64_t cols) {
  for (int64_t j = 0; j < keys; j += Tile<A>::cols)
    pack_units<Unit>(to + j * ceil_div(cols, Unit), Tile<A>::cols, from + j * row_stride,
                     row_stride, col_stride, smaller(Tile<A>::cols, keys - j), cols);
}

// block[r * kKeys + c] = row r of `rows` times key j + c, for what the queries can see; the tiles
// outside hold whatever they held. A panel of keys meets all rows while it is cached.
template <class A, int Unit>
void multiply_block(const Attention& in, const A* rows, const A* keys, int64_t depth, int64_t i,
                    int64_t count, int64_t j, int64_t key_count, A* block, A factor) {
  using Own = Tile<A>;
  const int64_t elements = ceil_div(depth, Unit);
  for (int64_t c = 0; c < key_count; c += Own::cols)
    for (int64_t r = 0; r < count; r += Own::rows) {
      const Range range = visible_keys(in, i + r, smaller(Own::rows, count - r));
      if (j + c >= range.end || j + c + Own::cols <= range.first) continue;
      multiply_tile<A, Own::rows, Own::vecs, 1, Own::rows, false, Unit>(
          rows + r * elements, 0, keys + c * elements, elements, block + r * kKeys + c, kKeys,
          false, nullptr, Unit == 1 ? A{1} : factor);
    }
}

}  // namespace
}  // namespace fastattn::FASTATTN_ISA
