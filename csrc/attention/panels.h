// Queries, keys and values packed for the products of attention, and those products.
#pragma once

#include "attention/scores.h"

namespace fastattn::FASTATTN_ISA {
namespace {

// A matrix [rows, cols] packed as the B operand of products over its rows: panels of Tile::cols
// columns, the last one narrower by whole vectors.
template <class A>
struct Panels {
  static constexpr int width = Tile<A>::cols;
  int64_t rows, cols;  // rows of storage
  A* data;

  static int64_t padded(int64_t cols) { return round_up(cols, lanes<A>); }
  static Panels take(Scratch& scratch, int64_t rows, int64_t cols) {
    return {rows, cols, scratch.take<A>(rows * padded(cols) + kSlack)};
  }
  template <class T>
  void pack(const T* from, int64_t row_stride, int64_t col_stride, int64_t count) const {
    for (int64_t col = 0; col < cols; col += width)
      pack_panel(data + col * rows, smaller(width, padded(cols) - col), from + col * col_stride,
                 col_stride, row_stride, smaller(width, cols - col), count);
  }
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
// over their depths. A panel meets all rows while it is in the first-level cache.
template <class A, int ARow, int ADepth>
void multiply_panels(const A* a, int64_t rows, const Panels<A>& b, int64_t first,
                     const Depths<A>& depths, A* c, int64_t c_row) {
  for (int64_t col = 0; col < b.cols; col += b.width) {
    const int64_t width = smaller(b.width, Panels<A>::padded(b.cols) - col);
    const A* panel = b.data + col * b.rows + first * width;
    with_vecs<A, Tile<A>::vecs>(width, [&](auto vecs) {
      const auto multiply = [&](int64_t row, auto count) {
        const auto [begin, end] = depths.at(row, count);
        if (begin >= end) return;
        multiply_tile<A, count, vecs, ARow, ADepth>(
            a + row * ARow + begin * ADepth, Tile<A>::rows * ARow, panel + begin * width,
            end - begin, c + row * c_row + col, c_row, true);
      };
      constexpr int low = Tile<A>::rows, high = Tile<A>::rows_of(vecs);
      int64_t row = 0;
      for (; row + high <= rows; row += high) multiply(row, std::integral_constant<int, high>());
      for (; row < rows; row += low) multiply(row, std::integral_constant<int, low>());
    });
  }
}

// The same where b holds a NaN or an infinity: what a zero of `a` hides must not turn into NaN.
template <class A, int ARow, int ADepth>
void multiply_visible(const A* a, int64_t rows, const Panels<A>& b, int64_t first,
                      const Depths<A>& depths, A* c, int64_t c_row) {
  for (int64_t i = 0; i < rows; i++)
    for (int64_t k = depths.at(i, 1).first; k < depths.at(i, 1).end; k++) {
      const A factor = a[i * ARow + k * ADepth];
      if (factor == 0) continue;
      for (int64_t col = 0; col < b.cols; col++) {
        const int64_t panel = col / b.width * b.width;
        const int64_t width = smaller(b.width, Panels<A>::padded(b.cols) - panel);
        c[i * c_row + col] += factor * b.data[panel * b.rows + (first + k) * width + col - panel];
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

template <class A>
int64_t key_panels(int64_t keys) {
  return ceil_div(keys, Tile<A>::cols);
}

// Packs rows, times a factor, as the A operand of products over their columns.
template <class A, class T>
void pack_rows(A* to, const T* from, int64_t row_stride, int64_t col_stride, int64_t rows,
               int64_t cols, A factor) {
  const int64_t padded = round_up(rows, Tile<A>::rows);
  pack_strips(to, padded, from, row_stride, col_stride, rows, cols);
  if (factor != 1)
    each_vector<A>(padded * cols, [&](int64_t i, auto n) {
      store_count<A>(to + i, load_count<A>(to + i, n) * factor, n);
    });
}

// Packs keys or values as the B operand of products over their columns: panels of Tile::cols keys.
template <class A, class T>
void pack_keys(A* to, const T* from, int64_t row_stride, int64_t col_stride, int64_t keys,
               int64_t cols) {
  for (int64_t j = 0; j < keys; j += Tile<A>::cols)
    pack_panel(to + j * cols, Tile<A>::cols, from + j * row_stride, row_stride, col_stride,
               smaller(Tile<A>::cols, keys - j), cols);
}

// block[r * kKeys + c] = row r of `rows` times key j + c, for what the queries can see; the tiles
// outside hold whatever they held. A panel of keys meets all rows while it is cached.
template <class A>
void multiply_block(const Attention& in, const A* rows, const A* keys, int64_t depth, int64_t i,
                    int64_t count, int64_t j, int64_t key_count, A* block) {
  using Own = Tile<A>;
  for (int64_t c = 0; c < key_count; c += Own::cols)
    for (int64_t r = 0; r < count; r += Own::rows) {
      const Range range = visible_keys(in, i + r, smaller(Own::rows, count - r));
      if (j + c >= range.end || j + c + Own::cols <= range.first) continue;
      multiply_tile<A, Own::rows, Own::vecs, 1, Own::rows>(
          rows + r * depth, 0, keys + c * depth, depth, block + r * kKeys + c, kKeys, false);
    }
}

}  // namespace
}  // namespace fastattn::FASTATTN_ISA
