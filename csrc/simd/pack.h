// Packs the operands of matrix products as tiles read them; elements are widened on the way, or
// laid in pairs.
#pragma once

#include "simd/tile.h"

namespace fastattn::FASTATTN_ISA {
namespace {

// In-register transpose of lanes x lanes floats: pairs within 128 bits, then the 128-bit blocks.
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

#if FASTATTN_LANES == 8
// Six rows of eight floats as eight columns of six, one after the other.
FASTATTN_INLINE void interleave(Vec<float> (&r)[6]) {
  constexpr auto index = std::make_index_sequence<8>{};
  // Pairs of rows, at two columns in each half of a vector; then half columns.
  Vec<float> t[6];
#pragma GCC unroll 2
  for (int odd = 0; odd < 2; odd++) {
    Vec<float> pair[3];
#pragma GCC unroll 3
    for (int i = 0; i < 3; i++)
      pair[i] = odd ? shuffle(r[2 * i], r[2 * i + 1], index,
                              [](int j) constexpr { return j / 4 * 4 + 2 + j % 4 / 2 + j % 2 * 8; })
                    : shuffle(r[2 * i], r[2 * i + 1], index,
                              [](int j) constexpr { return j / 4 * 4 + j % 4 / 2 + j % 2 * 8; });
    t[3 * odd] = shuffle(pair[0], pair[1], index,
                         [](int j) constexpr { return j / 4 * 4 + j % 2 + j % 4 / 2 * 8; });
    t[3 * odd + 1] = shuffle(pair[2], pair[0], index,
                             [](int j) constexpr { return j / 4 * 4 + j % 2 + j % 4 / 2 * 10; });
    t[3 * odd + 2] = shuffle(pair[1], pair[2], index,
                             [](int j) constexpr { return j / 4 * 4 + 2 + j % 2 + j % 4 / 2 * 8; });
  }
#pragma GCC unroll 3
  for (int i = 0; i < 3; i++) {
    const Vec<float> a = t[2 * i], b = t[2 * i + 1];
    r[i] = shuffle(a, b, index, [](int j) constexpr { return j % 4 + j / 4 * 8; });
    r[i + 3] = shuffle(a, b, index, [](int j) constexpr { return 4 + j % 4 + j / 4 * 8; });
  }
}
#endif

// Packs one panel: to[k * width + i] = from[i * outer + k * inner] for i < count, 0 up to width.
// Writes whole vectors, up to kSlack elements past the panel: pack panels in order of address.
constexpr int64_t kSlack = 16;
template <class A, class T>
__attribute__((noinline)) void pack_panel(A* to, int64_t width, const T* from, int64_t outer,
                                          int64_t inner, int64_t count, int64_t depth) {
  if (outer == 1) {
    for (int64_t k = 0; k < depth; k++) {
      A* row = to + k * width;
      const T* source = from + k * inner;
      const T* later = source + 8 * inner;  // on a page of its own, which no processor foresees
      __builtin_prefetch(later);
      __builtin_prefetch(later + width - 1);
      int64_t i = 0;
      for (; i + lanes<A> <= count; i += lanes<A>) store(row + i, load<A>(source + i));
      for (; i < count; i++) row[i] = load_one<A>(source + i);
      for (; i < width; i++) row[i] = 0;
    }
    return;
  }
  for (int64_t i = 0; i < width; i += lanes<A>) {
    int64_t k = 0;
    if constexpr (std::is_same_v<A, float> && lanes<float> >= 4) {
      constexpr int n = lanes<float>;
      const auto turn = [&](auto rows) __attribute__((always_inline)) {
        for (; k + n <= depth; k += n) {
          Vec<float> block[n];
#pragma GCC unroll 16
          for (int j = 0; j < n; j++)
            block[j] = j < rows ? load<float>(from + (i + j) * outer + k) : Vec<float>{};
#pragma GCC unroll 16
          for (int j = 0; j < n; j++)  // each row is a stream of its own, too many to be foreseen
            if (j < rows) __builtin_prefetch(from + (i + j) * outer + k + 8 * n);
          transpose(block);
#pragma GCC unroll 16
          for (int j = 0; j < n; j++) store(to + (k + j) * width + i, block[j]);
        }
      };
      if (inner == 1 && i + n <= count)
        turn(std::integral_constant<int64_t, n>());
      else if (inner == 1 && (i == 0 || i + n <= width))  // else it would overwrite what is packed
        turn(count - i);
    }
    for (; k < depth; k++)
      for (int64_t j = i; j < smaller(i + lanes<A>, width); j++)
        to[k * width + j] = j < count ? load_one<A>(from + j * outer + k * inner) : A{0};
  }
}

// The same with pairs of depths as elements; the last of an odd depth has a zero.
template <class T>
__attribute__((noinline)) void pack_pairs(float* to, int64_t width, const T* from, int64_t outer,
                                          int64_t inner, int64_t count, int64_t depth) {
  constexpr int n = lanes<float>;
  const auto one = [=](int64_t i, int64_t k) {
    return i < count && k < depth ? bits<uint16_t>(from[i * outer + k * inner]) : uint16_t{0};
  };
  const auto each = [=](int64_t k, int64_t i) {
    return bits<float>(static_cast<uint32_t>(one(i, 2 * k)) | uint32_t{one(i, 2 * k + 1)} << 16);
  };
  const int64_t pairs = ceil_div(depth, 2), whole = depth / 2;
  if (outer == 1) {
    for (int64_t k = 0; k < pairs; k++) {
      const T* source = from + 2 * k * inner;
      __builtin_prefetch(source + 8 * inner);  // as above
      __builtin_prefetch(source + 9 * inner);
      int64_t i = 0;
      for (; k < whole && i + n <= count; i += n)
        store(to + k * width + i, pair(load<float>(source + i), load<float>(source + inner + i)));
      for (; i < width; i++) to[k * width + i] = each(k, i);
    }
    return;
  }
  for (int64_t i = 0; i < width; i += n) {
    int64_t k = 0;
    const auto turn = [&](auto rows) __attribute__((always_inline)) {
      for (; k + n <= whole; k += n) {
        Vec<float> block[n] = {};
#pragma GCC unroll 16
        for (int j = 0; j < n; j++)
          if (j < rows) std::memcpy(&block[j], from + (i + j) * outer + 2 * k, sizeof(block[j]));
        transpose(block);
#pragma GCC unroll 16
        for (int j = 0; j < n; j++) store(to + (k + j) * width + i, block[j]);
      }
    };
    if (inner == 1 && i + n <= count)
      turn(std::integral_constant<int64_t, n>());
    else if (inner == 1 && (i == 0 || i + n <= width))  // as above
      turn(count - i);
    for (; k < pairs; k++)
      for (int64_t j = i; j < smaller(i + n, width); j++) to[k * width + j] = each(k, j);
  }
}

// The one or the other, by the depths in an element.
template <int Unit, class A, class T>
FASTATTN_INLINE void pack_units(A* to, int64_t width, const T* from, int64_t outer, int64_t inner,
                                int64_t count, int64_t depth) {
  if constexpr (Unit == 2)
    pack_pairs(to, width, from, outer, inner, count, depth);
  else
    pack_panel(to, width, from, outer, inner, count, depth);
}

// Packs rows in strips of a tile's rows: to[i / high * high * depth + k * high + i % high] =
// from[i * outer + k * inner] for high = Tile::rows and i < count, 0 up to `rows`, a multiple of
// it. Writes up to kSlack elements past the end. With Unit = 2 there are half as many k, of pairs.
template <int Unit = 1, class A, class T>
__attribute__((noinline)) void pack_strips(A* to, int64_t rows, const T* from, int64_t outer,
                                           int64_t inner, int64_t count, int64_t depth) {
  [[maybe_unused]] constexpr int64_t n = lanes<A>, whole = round_up(Tile<A>::rows, n);
  constexpr int64_t high = Tile<A>::rows;
  const int64_t used = round_up(count, high), elements = ceil_div(depth, Unit);
  if (Unit == 1 && outer == 1) {
    for (int64_t k = 0; k < depth; k++) {
      const T* source = from + k * inner;
      const T* later = source + 8 * inner;  // on a page of its own, which no processor foresees
      __builtin_prefetch(later);
      __builtin_prefetch(later + used - 1);
      // Whole vectors, of which the next depths overwrite what is too much.
      int64_t row = 0;
      if ((depth - k) * high >= whole)
        for (; row + whole <= count; row += high)
          for (int64_t i = 0; i < whole; i += n)
            store(to + row * depth + k * high + i, load<A>(source + row + i));
      for (; row < used; row += high)
        for (int64_t i = row; i < row + high; i++)
          to[row * depth + k * high + i - row] = i < count ? load_one<A>(source + i) : A{0};
    }
  } else {
    for (int64_t row = 0; row < used; row += high) {
      int64_t k = 0;
#if FASTATTN_LANES == 8
      if constexpr (std::is_same_v<A, float> && Unit == 1)
        if (inner == 1 && row + high <= count)
          for (; k + n <= depth; k += n) {
            Vec<float> block[high];
#pragma GCC unroll 6
            for (int j = 0; j < high; j++) block[j] = load<float>(from + (row + j) * outer + k);
            interleave(block);
#pragma GCC unroll 6
            for (int j = 0; j < high; j++) store(to + row * depth + k * high + j * n, block[j]);
          }
#endif
      pack_units<Unit>(to + row * elements + k * high, high, from + row * outer + k * inner, outer,
                       inner, smaller(high, count - row), depth - k);
    }
  }
  std::memset(to + used * elements, 0, static_cast<size_t>((rows - used) * elements) * sizeof(A));
}

// to[j * to_row + i] = from[i * from_row + j] for i < rows, j < cols, multiples of lanes<A>.
template <class A>
void transpose_tile(const A* from, int64_t from_row, int64_t rows, int64_t cols, A* to,
                    int64_t to_row) {
  if constexpr (std::is_same_v<A, float> && lanes<float> >= 4) {
    constexpr int n = lanes<float>;
    for (int64_t i = 0; i < rows; i += n)
      for (int64_t j = 0; j < cols; j += n) {
        Vec<float> block[n];
#pragma GCC unroll 16
        for (int k = 0; k < n; k++) block[k] = load<float>(from + (i + k) * from_row + j);
        transpose(block);
#pragma GCC unroll 16
        for (int k = 0; k < n; k++) store(to + (j + k) * to_row + i, block[k]);
      }
  } else {
    for (int64_t i = 0; i < rows; i++)
      for (int64_t j = 0; j < cols; j++) to[j * to_row + i] = from[i * from_row + j];
  }
}

}  // namespace
}  // namespace fastattn::FASTATTN_ISA
