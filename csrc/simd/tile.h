// The register tile of a matrix product, and the fetching and packing of its operands.
//
// A tile reads rows of A element by element and panels of B, Tile::cols wide, with stride one.
// Elements are widened as they are packed.
#pragma once

#include "simd/vec.h"

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

// Where the processor adds up products of bf16 in pairs, two depths lie in the bits of one float,
// the first in the lower half; the emulated vector does the same, for tests.
#if defined(__clang__) && defined(__AVX512F__)
constexpr bool kPairs = false;  // clang assembles no instruction that it is not to compile to
#else
constexpr bool kPairs = FASTATTN_LANES == 16;
#endif
FASTATTN_INLINE Vec<float> pair(Vec<float> first, Vec<float> second) {
  return bits<Vec<float>>(bits<VecU>(first) >> 16 | (bits<VecU>(second) & 0xffff0000u));
}
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

// Elements of the next panel that a tile fetches while it goes through a panel of `depth`: whole
// lines, one or more a round, so that eight tiles which meet the same panel fetch all of the next.
constexpr int kRound = 8;  // depths; few enough are left over that a processor foresees the last
template <class A, int Vecs>
constexpr int64_t fetched(int64_t depth) {
  constexpr int line = 64 / sizeof(A), share = Vecs * lanes<A> * kRound / 8;
  return depth / kRound * round_up(share, line);
}

// C tile = Count rows of A * B panel over `depth`, added to what C holds if `add`. Element (i, k)
// of A is a[i / Tile::rows * strip + i % Tile::rows * Row + k * Step], row k of B is b[k * Vecs *
// lanes ...], row i of C is c[i * c_row ...]. What is added to C is summed on its own first: an
// error grows with the length of a chain of additions, so that partial sums of blocks round less
// than one long chain. Meanwhile it fetches its part of the panel at `next`, if Ahead: worth it
// where panels come from beyond the second-level cache. With Unit = 2 an element is a pair.
template <class A, int Count, int Vecs, int Row, int Step, bool Ahead = false, int Unit = 1>
__attribute__((noinline)) void multiply_tile(const A* a, int64_t strip, const A* b, int64_t depth,
                                             A* c, int64_t c_row, bool add,
                                             const A* next = nullptr) {
  constexpr int width = lanes<A>, high = Tile<A>::rows, strips = (Count + high - 1) / high;
  [[maybe_unused]] constexpr int64_t fetch = fetched<A, Vecs>(kRound);
  Vec<A> sum[Count][Vecs];
#pragma GCC unroll 24
  for (int i = 0; i < Count; i++)
#pragma GCC unroll 4
    for (int j = 0; j < Vecs; j++) sum[i][j] = Vec<A>{};
  const A* base[strips];
#pragma GCC unroll 8
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
#pragma GCC unroll 8
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
      if constexpr (write) {
        __builtin_prefetch(row_ + at_, 1, 3);
      } else {
        __builtin_prefetch(row_ + at_, 0, 2);
      }
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
    if (inner == 1 && i + n <= count)
      for (; k + n <= whole; k += n) {
        Vec<float> block[n];
#pragma GCC unroll 16
        for (int j = 0; j < n; j++)
          std::memcpy(&block[j], from + (i + j) * outer + 2 * k, sizeof(block[j]));
        transpose(block);
#pragma GCC unroll 16
        for (int j = 0; j < n; j++) store(to + (k + j) * width + i, block[j]);
      }
    for (; k < pairs; k++)
      for (int64_t j = i; j < smaller(i + n, width); j++) to[k * width + j] = each(k, j);
  }
}

// Packs rows in strips of a tile's rows: to[i / high * high * depth + k * high + i % high] =
// from[i * outer + k * inner] for high = Tile::rows and i < count, 0 up to `rows`, a multiple of
// it. Writes up to kSlack elements past the end.
template <class A, class T>
__attribute__((noinline)) void pack_strips(A* to, int64_t rows, const T* from, int64_t outer,
                                           int64_t inner, int64_t count, int64_t depth) {
  constexpr int64_t n = lanes<A>, high = Tile<A>::rows, whole = round_up(high, n);
  const int64_t used = round_up(count, high);
  if (outer == 1) {
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
      if constexpr (std::is_same_v<A, float>)
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
      pack_panel(to + row * depth + k * high, high, from + row * outer + k * inner, outer, inner,
                 smaller(high, count - row), depth - k);
    }
  }
  std::memset(to + used * depth, 0, static_cast<size_t>((rows - used) * depth) * sizeof(A));
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
