// A tile of keys or values, which lie anywhere, and the products of some rows of queries or weights
// with it.
#pragma once

#include "simd/pack.h"

namespace fastattn::FASTATTN_ISA {
namespace {

// Vectors of sums in registers, of which there are some twice as many, and keys of a tile.
constexpr int kTile = FASTATTN_LANES == 8 ? 8 : 16;
constexpr int kTileRows = 4;  // that share a load of a key or value
static_assert(kTile % lanes<float> == 0);

// The products of a type T whose rows are read Unit vectors at a time: where that is two, as pairs
// of bf16, and rows are whole pairs of vectors.
template <class T, int Unit>
class DecodeTile {
  using A = Acc<T>;

 public:
  // Rows of queries as `dots` reads them: in pairs as two numbers of bf16 whose sum is the query,
  // or the first of which is infinite.
  static void lay_query(A* row, int64_t width) {
    if constexpr (Unit == 2) {
      const auto rest = [](Vec<A> x, const bf16* rounded) {
        const Vec<A> difference = x - load<A>(rounded);
        return difference == difference ? difference : Vec<A>{};
      };
      for (int64_t d = 0; d < width; d += 2 * n) {
        const Vec<A> first = load<A>(row + d), second = load<A>(row + d + n);
        const Vec<A> high = round_neighbours(first, second);
        bf16 rounded[2 * n];
        std::memcpy(rounded, &high, sizeof(high));
        store(row + d, high);
        store(row + d + n, round_neighbours(rest(first, rounded), rest(second, rounded + n)));
      }
    }
  }

  // The products with some keys of a tile. Fetches the keys `next` meanwhile, if Ahead.
  template <int Rows, int Keys, bool Ahead>
  static void dots(const A* query, int64_t width, const T* const* keys, const T* const* next, A* to,
                   int64_t to_row) {
    static_assert(Rows * Keys == kTile);
    Vec<A> sums[kTile] = {};
    for (int64_t d = 0; d < width; d += Unit * lanes<A>) {
      Vec<A> row[Rows][Unit];
#pragma GCC unroll 4
      for (int r = 0; r < Rows; r++)
#pragma GCC unroll 2
        for (int u = 0; u < Unit; u++) row[r][u] = load<A>(query + r * width + d + u * lanes<A>);
#pragma GCC unroll 16
      for (int k = 0; k < Keys; k++) {
        const Vec<A> key = load_unit(keys[k] + d);
        if constexpr (Ahead) fetch(next[k], d);
#pragma GCC unroll 4
        for (int r = 0; r < Rows; r++)
          if constexpr (Unit == 2) {
            multiply_add_pairs(sums[r * Keys + k], row[r][0], key);
            multiply_add_pairs(sums[r * Keys + k], row[r][1], key);
          } else {
            sums[r * Keys + k] += row[r][0] * key;
          }
      }
    }
    A totals[kTile];
    sum_each(sums, totals);
    for (int r = 0; r < Rows; r++)
      std::memcpy(to + r * to_row, totals + r * Keys, sizeof(A) * Keys);
  }

  // Adds the values of a tile to rows of `width`.
  template <int Rows, bool Ahead>
  static void add_values(const A* weights, int64_t weights_row, const T* const* values,
                         const T* const* next, A* out, int64_t width) {
    constexpr int vecs = kTile / (Rows == 1 ? 4 : Rows);
    A weight[Rows][kTile];
    for (int r = 0; r < Rows; r++) {
      for (int k = 0; k < kTile; k++) weight[r][k] = weights[r * weights_row + k];
      if constexpr (Unit == 2) store(weight[r], round_neighbours(load<A>(weight[r]), Vec<A>{}));
    }
    int64_t d = 0;
    for (; d + vecs * lanes<A> <= width; d += vecs * lanes<A>)
      add_columns<Rows, vecs, Ahead>(weight, values, next, d, out + d, width);
    for (; d < width; d += Unit * lanes<A>)
      add_columns<Rows, Unit, Ahead>(weight, values, next, d, out + d, width);
  }

  // Adds them to those rows which see them.
  template <int Rows>
  static void add_seen_values(const A* weights, int64_t weights_row, const T* const* values, A* out,
                              int64_t width) {
    for (int r = 0; r < Rows; r++)
      for (int k = 0; k < kTile; k++) {
        const A weight = weights[r * weights_row + k];
        if (weight == 0) continue;
        for (int64_t d = 0; d < width; d += lanes<A>) {
          A* to = out + r * width + d;
          store(to, load<A>(to) + weight * load<A>(values[k] + d));
        }
      }
  }

  // Whether each value of a tile is seen by all of the rows or by none, to whom it is zeros.
  template <int Rows>
  static bool seen_alike(const A* weights, int64_t weights_row, const T* const* values,
                         const T* zeros, const T** own) {
    bool alike = true;
    for (int k = 0; k < kTile; k++) {
      int seeing = 0;
      for (int r = 0; r < Rows; r++) seeing += weights[r * weights_row + k] != 0;
      own[k] = seeing > 0 ? values[k] : zeros;
      alike = alike && (seeing == 0 || seeing == Rows);
    }
    return alike;
  }

 private:
  static constexpr int n = lanes<A>;
  using Halves = Vector<uint16_t, 2 * lanes<float>>;

  FASTATTN_INLINE static Vec<A> load_unit(const T* from) {
    if constexpr (Unit == 1) return load<A>(from);
    Vec<A> pairs;
    std::memcpy(&pairs, from, sizeof(pairs));
    return pairs;
  }

  // Fetches column d of a row, where it begins a line.
  FASTATTN_INLINE static void fetch(const T* row, int64_t d) {
    constexpr int64_t line = 64 / sizeof(T);
    if (Unit * n >= line || d % line == 0) __builtin_prefetch(row + d);
  }

  template <int Rows, int Vecs, bool Ahead>
  FASTATTN_INLINE static void add_columns(const A (&weight)[Rows][kTile], const T* const* values,
                                          const T* const* next, int64_t d, A* out, int64_t width) {
    Vec<A> sums[Rows][Vecs];
#pragma GCC unroll 4
    for (int r = 0; r < Rows; r++)
#pragma GCC unroll 8
      for (int v = 0; v < Vecs; v++) sums[r][v] = load<A>(out + r * width + v * n);
#pragma GCC unroll 16
    for (int k = 0; k < kTile / Unit; k++)
#pragma GCC unroll 8
      for (int v = 0; v < Vecs; v += Unit) {
        const int64_t column = d + v * n;
        Vec<A> value[Unit];
        if constexpr (Unit == 2) {
          pair_values(values[2 * k] + column, values[2 * k + 1] + column, value);
        } else {
          value[0] = load<A>(values[k] + column);
        }
        if constexpr (Ahead)
#pragma GCC unroll 2
          for (int u = 0; u < Unit; u++) fetch(next[k * Unit + u], column);
#pragma GCC unroll 4
        for (int r = 0; r < Rows; r++)
#pragma GCC unroll 2
          for (int u = 0; u < Unit; u++)
            if constexpr (Unit == 2)
              multiply_add_pairs(sums[r][v + u], set<A>(weight[r][k]), value[u]);
            else
              sums[r][v] += weight[r][k] * value[0];
      }
#pragma GCC unroll 4
    for (int r = 0; r < Rows; r++)
#pragma GCC unroll 8
      for (int v = 0; v < Vecs; v++) store(out + r * width + v * n, sums[r][v]);
  }

  // Two vectors of pairs of what two rows have in 2 n columns.
  FASTATTN_INLINE static void pair_values(const T* first, const T* second, Vec<A> (&pairs)[2]) {
    constexpr auto index = std::make_index_sequence<2 * n>{};
    Halves a, b;
    std::memcpy(&a, first, sizeof(a));
    std::memcpy(&b, second, sizeof(b));
    pairs[0] =
        bits<Vec<A>>(shuffle(a, b, index, [](int i) constexpr { return i / 2 + i % 2 * 2 * n; }));
    pairs[1] = bits<Vec<A>>(
        shuffle(a, b, index, [](int i) constexpr { return n + i / 2 + i % 2 * 2 * n; }));
  }
};

}  // namespace
}  // namespace fastattn::FASTATTN_ISA
