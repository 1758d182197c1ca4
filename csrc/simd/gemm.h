// Matrix products: packing into panels, the register tile, and a blocked product with an epilogue.
//
// A product C = A B reads A in panels of Tile::rows rows and B in panels of Tile::cols columns,
// each laid out so that the tile walks both with stride one. Elements are widened as they are
// packed.
#pragma once

#include <initializer_list>

#include "simd/vec.h"

namespace fastattn::FASTATTN_ISA {
namespace {

// The register tile: rows x vecs accumulators, one row of B, one broadcast element of A.
template <class A>
struct Tile {
  static constexpr int rows = FASTATTN_LANES == 1 ? 4 : FASTATTN_LANES == 8 ? 6 : 12;
  static constexpr int vecs = 2;
  static constexpr int cols = vecs * lanes<A>;
};

constexpr int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }
constexpr int64_t ceil_div(int64_t n, int64_t by) { return (n + by - 1) / by; }
constexpr int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
constexpr int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

// C tile (=|+=) A panel * B panel over `depth`. Element (i, k) of A is a[i * ARow + k * ADepth],
// row k of B is b[k * Vecs * lanes ...], row i of C is c[i * c_row ...]. What is added to C is
// summed on its own first: an error grows with the length of a chain of additions. Every call sums
// from zero: partial sums of blocks round less than one long chain.
template <class A, int Vecs, bool Add, int ARow, int ADepth>
__attribute__((noinline)) void multiply_tile(const A* a, const A* b, int64_t depth, A* c,
                                             int64_t c_row) {
  constexpr int rows = Tile<A>::rows, width = lanes<A>;
  Vec<A> sum[rows][Vecs];
#pragma GCC unroll 16
  for (int i = 0; i < rows; i++)
#pragma GCC unroll 4
    for (int j = 0; j < Vecs; j++) sum[i][j] = Vec<A>{};
  for (int64_t k = 0; k < depth; k++) {
    Vec<A> row[Vecs];
#pragma GCC unroll 4
    for (int j = 0; j < Vecs; j++) row[j] = load<A>(b + j * width);
#pragma GCC unroll 16
    for (int i = 0; i < rows; i++) {
      const A factor = a[i * ARow];
#pragma GCC unroll 4
      for (int j = 0; j < Vecs; j++) sum[i][j] += factor * row[j];
    }
    a += ADepth;
    b += Vecs * width;
  }
#pragma GCC unroll 16
  for (int i = 0; i < rows; i++)
#pragma GCC unroll 4
    for (int j = 0; j < Vecs; j++) {
      A* to = c + i * c_row + j * width;
      store(to, Add ? load<A>(to) + sum[i][j] : sum[i][j]);
    }
}

// In-register transpose of lanes x lanes floats: pairs within 128 bits, then the 128-bit blocks.
template <class V, size_t... I, class Pattern>
FASTATTN_INLINE V shuffle(V a, V b, std::index_sequence<I...>, Pattern pattern) {
#if defined(__clang__) || __GNUC__ >= 12
  return __builtin_shufflevector(a, b, pattern(static_cast<int>(I))...);
#else
  return __builtin_shuffle(a, b, VecI{pattern(static_cast<int>(I))...});
#endif
}
FASTATTN_INLINE void transpose(Vec<float>* r) {
  constexpr int n = lanes<float>;
  if constexpr (n >= 4) {
    constexpr auto index = std::make_index_sequence<n>{};
    Vec<float> t[n];
#pragma GCC unroll 16
    for (int i = 0; i < n; i += 2) {
      t[i] = shuffle(r[i], r[i + 1], index,
                     [](int j) constexpr { return j / 4 * 4 + j % 4 / 2 + (j % 2) * n; });
      t[i + 1] = shuffle(r[i], r[i + 1], index,
                         [](int j) constexpr { return j / 4 * 4 + 2 + j % 4 / 2 + (j % 2) * n; });
    }
#pragma GCC unroll 16
    for (int i = 0; i < n; i += 4)
#pragma GCC unroll 2
      for (int half = 0; half < 2; half++) {
        const Vec<float> a = t[i + half], b = t[i + half + 2];
        r[i + 2 * half] = shuffle(
            a, b, index, [](int j) constexpr { return j / 4 * 4 + j % 2 + (j % 4 / 2) * n; });
        r[i + 2 * half + 1] = shuffle(
            a, b, index, [](int j) constexpr { return j / 4 * 4 + 2 + j % 2 + (j % 4 / 2) * n; });
      }
    // Now block q of r[i] holds column 4 q + i % 4 of the rows i / 4 * 4 ...: swap across blocks.
    if constexpr (n >= 8) {
#pragma GCC unroll 16
      for (int i = 0; i < n; i++)
        if ((i & 4) == 0) {
          const Vec<float> a = r[i], b = r[i + 4];
          r[i] = shuffle(a, b, index, [](int j) constexpr { return (j & 4) ? j - 4 + n : j; });
          r[i + 4] = shuffle(a, b, index, [](int j) constexpr { return (j & 4) ? j + n : j + 4; });
        }
    }
    if constexpr (n >= 16) {
#pragma GCC unroll 16
      for (int i = 0; i < n; i++)
        if ((i & 8) == 0) {
          const Vec<float> a = r[i], b = r[i + 8];
          r[i] = shuffle(a, b, index, [](int j) constexpr { return (j & 8) ? j - 8 + n : j; });
          r[i + 8] = shuffle(a, b, index, [](int j) constexpr { return (j & 8) ? j + n : j + 8; });
        }
    }
  }
}

// Folds n vectors of n lanes onto each other until lane i holds the sum of vector i.
template <int Half>
FASTATTN_INLINE void fold_pairs(Vec<float>* v) {
  constexpr int n = lanes<float>;
  constexpr auto index = std::make_index_sequence<n>{};
  if constexpr (Half > 0) {
#pragma GCC unroll 16
    for (int i = 0; i < Half; i++) {
      const Vec<float> a = v[i], b = v[i + Half];
      v[i] = shuffle(a, b, index, [](int j) constexpr { return (j & Half) ? j + n : j; }) +
             shuffle(a, b, index,
                     [](int j) constexpr { return (j & Half) ? (j ^ Half) + n : j ^ Half; });
    }
    fold_pairs<Half / 2>(v);
  }
}
// to[i] = the sum of the lanes of v[i].
template <int Count>
FASTATTN_INLINE void sum_each(Vec<float> (&v)[Count], float* to) {
#pragma GCC unroll 16
  for (int i = 0; i < Count; i += lanes<float>) {
    fold_pairs<lanes<float> / 2>(v + i);
    store(to + i, v[i]);
  }
}
template <int Count>
FASTATTN_INLINE void sum_each(Vec<double> (&v)[Count], double* to) {
#pragma GCC unroll 16
  for (int i = 0; i < Count; i++) to[i] = sum<double>(v[i]);
}

// Packs one panel: to[k * width + i] = from[i * outer + k * inner] for i < count, 0 up to width.
// Writes whole vectors, up to kSlack elements past the panel: pack panels in order of address.
constexpr int64_t kSlack = 16;
template <class A, class T>
void pack_panel(A* to, int64_t width, const T* from, int64_t outer, int64_t inner, int64_t count,
                int64_t depth) {
  if (outer == 1) {
    for (int64_t k = 0; k < depth; k++) {
      A* row = to + k * width;
      const T* source = from + k * inner;
      int64_t i = 0;
      for (; i + lanes<A> <= count; i += lanes<A>) store(row + i, load<A>(source + i));
      for (; i < count; i++) row[i] = load_one<A>(source + i);
      for (; i < width; i++) row[i] = 0;
    }
    return;
  }
  int64_t done = 0;
  if constexpr (std::is_same_v<A, float> && lanes<float> >= 4) {
    if (inner == 1) {
      constexpr int n = lanes<float>;
      for (; done + n <= depth; done += n)
        for (int64_t i = 0; i < width; i += n) {
          Vec<float> block[n];
#pragma GCC unroll 16
          for (int j = 0; j < n; j++)
            block[j] = i + j < count ? load<float>(from + (i + j) * outer + done) : Vec<float>{};
          transpose(block);
#pragma GCC unroll 16
          for (int j = 0; j < n; j++) store(to + (done + j) * width + i, block[j]);
        }
    }
  }
  for (int64_t k = done; k < depth; k++)
    for (int64_t i = 0; i < width; i++)
      to[k * width + i] = i < count ? load_one<A>(from + i * outer + k * inner) : A{0};
}

// A matrix whose element (i, k) is data[i * outer + k * inner]; k runs along the summed dimension.
template <class T>
struct Operand {
  const T* data;
  int64_t outer, inner;
};

// What to do with a finished tile: tiles[w][i * Tile::cols + j] is element (row + i, col + j) of
// product w, and rows, cols say how much of the tile is inside. A reference, not a copy, of `body`.
template <class A>
struct Finish {
  struct Place {
    int64_t row, col, rows, cols;
  };
  void (*call)(const void* body, const Place& place, const A* const* tiles);
  const void* body;

  template <class F>
  explicit Finish(const F& f)
      : call([](const void* to, const Place& place, const A* const* tiles) {
          (*static_cast<const F*>(to))(place, tiles);
        }),
        body(&f) {}
};

// C_w[rows, cols] = a b_w^T over `depth` for one or two b of equal shape, tile by tile to `finish`.
// A sum runs over depth in the same order whatever the number of threads.
template <class A, class T>
void multiply(int64_t rows, int64_t cols, int64_t depth, Operand<T> a,
              std::initializer_list<Operand<T>> weights, Finish<A> finish) {
  constexpr int tile_rows = Tile<A>::rows, tile_cols = Tile<A>::cols;
  constexpr int64_t tile_size = tile_rows * tile_cols;
  // A chain of additions is no longer than this; few rows wait for memory, and can afford less
  // error.
  const int64_t depth_block = rows <= tile_rows ? 64 : 256;
  const int64_t fitting = cache_bytes() * 2 / 5 / (depth_block * static_cast<int64_t>(sizeof(A)));
  const int64_t row_blocks = ceil_div(rows, larger(tile_rows, round_up(fitting, tile_rows)));
  const int64_t block_rows = round_up(ceil_div(rows, larger(1, row_blocks)), tile_rows);
  const int64_t panels = ceil_div(cols, tile_cols), products = static_cast<int64_t>(weights.size());
  const int64_t ranges =
      larger(1, smaller(panels, ceil_div(thread_count() * int64_t{4}, larger(1, row_blocks))));
  const bool one_pass = depth <= depth_block;
  parallel(row_blocks * ranges, [&](int64_t task) {
    const int64_t first_row = task / ranges * block_rows;
    const int64_t my_rows = smaller(block_rows, rows - first_row);
    if (my_rows <= 0) return;
    const int64_t first_panel = task % ranges * panels / ranges;
    const int64_t end_panel = (task % ranges + 1) * panels / ranges;
    const int64_t row_panels = ceil_div(my_rows, tile_rows);

    Scratch scratch;
    A* packed_a = scratch.take<A>(row_panels * tile_rows * smaller(depth, depth_block) + kSlack);
    A* packed_b = scratch.take<A>(tile_cols * smaller(depth, depth_block) + kSlack);
    // One pass over depth finishes a panel at once; several need all the tiles of the range.
    const int64_t kept_panels = one_pass ? 1 : end_panel - first_panel;
    A* tiles = scratch.take<A>(kept_panels * products * row_panels * tile_size);
    for (int64_t start = 0; start < larger(depth, 1); start += depth_block) {
      const int64_t length = smaller(depth_block, depth - start);
      for (int64_t p = 0; p < row_panels; p++) {
        const int64_t row = first_row + p * tile_rows;
        pack_panel(packed_a + p * tile_rows * length, tile_rows,
                   a.data + row * a.outer + start * a.inner, a.outer, a.inner,
                   smaller(tile_rows, rows - row), length);
      }
      for (int64_t panel = first_panel; panel < end_panel; panel++) {
        const int64_t col = panel * tile_cols;
        A* panel_tiles =
            tiles + (one_pass ? 0 : panel - first_panel) * products * row_panels * tile_size;
        int64_t product = 0;
        for (const Operand<T>& b : weights) {
          pack_panel(packed_b, tile_cols, b.data + col * b.outer + start * b.inner, b.outer,
                     b.inner, smaller(tile_cols, cols - col), length);
          for (int64_t p = 0; p < row_panels; p++) {
            A* tile = panel_tiles + (product * row_panels + p) * tile_size;
            const A* part = packed_a + p * tile_rows * length;
            if (start == 0) {
              multiply_tile<A, Tile<A>::vecs, false, 1, tile_rows>(part, packed_b, length, tile,
                                                                   tile_cols);
            } else {
              multiply_tile<A, Tile<A>::vecs, true, 1, tile_rows>(part, packed_b, length, tile,
                                                                  tile_cols);
            }
            if (start + length < depth || product + 1 < products) continue;
            const int64_t row = first_row + p * tile_rows;
            const A* finished[2] = {panel_tiles + p * tile_size, tile};
            finish.call(finish.body,
                        {row, col, smaller(tile_rows, rows - row), smaller(tile_cols, cols - col)},
                        finished);
          }
          product++;
        }
      }
    }
  });
}

// Visits a finished tile in vectors: f(row, col, count, sum of product 0, of product 1).
template <class A, class F>
FASTATTN_INLINE void each_in_tile(const typename Finish<A>::Place& place, const A* const* tiles,
                                  F&& f) {
  for (int64_t i = 0; i < place.rows; i++)
    each_vector<A>(place.cols, [&](int64_t j, auto n) {
      const int64_t at = i * Tile<A>::cols + j;
      f(place.row + i, place.col + j, n, load<A>(tiles[0] + at), load<A>(tiles[1] + at));
    });
}

}  // namespace
}  // namespace fastattn::FASTATTN_ISA
