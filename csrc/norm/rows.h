// Rows as the CPU norms read them, sum over them, write them and add them up.
#pragma once

#include "norm/norm.h"
#include "simd/philox.h"

namespace fastattn::FASTATTN_ISA {
namespace {

// f(0), f(1) ... f(N - 1) of constants: what they index stays in registers.
template <int N, class F>
FASTATTN_INLINE void unrolled(F&& f) {
  [&]<int... I>(std::integer_sequence<int, I...>) __attribute__((always_inline)) {
    (f(std::integral_constant<int, I>{}), ...);
  }(std::make_integer_sequence<int, N>{});
}

// N sums over each of some rows: f(offset, count, sums) adds its terms to vectors of sums, of which
// one row has several in turn, so that additions overlap. Chains of them are no longer than 64.
template <class A, int Rows, int N, class F>
FASTATTN_INLINE void sum_rows(int64_t cols, A (&sums)[Rows][N], F&& f) {
  constexpr std::integral_constant<int64_t, lanes<A>> whole{};
  constexpr int parts = Rows >= 4 ? 1 : 4 / Rows;
  constexpr int64_t step = parts * lanes<A>;
  double total[Rows][N] = {};
  int64_t c = 0;
  while (c < cols) {
    const int64_t end = smaller(cols, c + 64 * step);
    Vec<A> part[parts][Rows][N];
    unrolled<parts * Rows * N>(  // the initialiser {} would be one slow instruction
        [&](auto i) { part[i / (Rows * N)][i / N % Rows][i % N] = Vec<A>{}; });
    for (; c + step <= end; c += step)
      unrolled<parts>([&](auto i) { f(c + i * lanes<A>, whole, part[i]); });
    for (; c + lanes<A> <= end; c += lanes<A>) f(c, whole, part[0]);
    if (c < end) f(c, end - c, part[parts - 1]);
    c = end;
    unrolled<Rows * N>([&](auto i) {
      constexpr int r = i / N, n = i % N;
      Vec<A> all = part[0][r][n];
      unrolled<parts - 1>([&](auto k) { all += part[k + 1][r][n]; });
      total[r][n] += sum<A>(all);
    });
  }
  for (int r = 0; r < Rows; r++)
    for (int i = 0; i < N; i++) sums[r][i] = static_cast<A>(total[r][i]);
}

// Zeros in the lanes past `count`, whatever was computed there.
template <class A, class Count>
FASTATTN_INLINE Vec<A> first_lanes(Vec<A> v, Count count) {
  if constexpr (std::is_same_v<Count, int64_t>) {
    A part[lanes<A>];
    store(part, v);
    return load_part<A>(part, count);
  } else {
    return v;
  }
}

// Columns of a row that stay in the first-level cache while they are read several times.
constexpr int64_t kChunk = 4096;
static_assert(kChunk % kPhiloxBlock == 0);
constexpr int64_t kShort = 1024;  // columns of a row of which four stay there

// Where rows come from memory, a processor fetches a row ahead while it is read, and gives up on
// several that are read in turns: that pays only for rows so narrow that their sums would wait.
constexpr int64_t kNarrow = 96;                // columns
constexpr int64_t kCached = int64_t{4} << 20;  // bytes of a tensor that is found in the caches

// Where rows of results go: past the caches if they are too many to be found there. Not so in fresh
// memory, which the kernel has just zeroed in the caches, nor where several rows are written in
// turns and a vector is less than a line: processors that have half of many lines to combine give
// up.
template <class T, int Together>
class Results {
 public:
  Results(void* to, int64_t rows, int64_t cols) : to_(static_cast<T*>(to)), cols_(cols) {
    const int64_t size = rows * cols * static_cast<int64_t>(sizeof(T));
    const bool aligned =
        (reinterpret_cast<uintptr_t>(to) | static_cast<uintptr_t>(cols) * sizeof(T)) %
            (sizeof(T) * lanes<Acc<T>>) ==
        0;
    constexpr bool whole = Together == 1 || sizeof(T) * lanes<Acc<T>> == 64;
    streams_ = whole && to != nullptr && size >= kStreamed && aligned &&
               is_resident(static_cast<const char*>(to) + size / 2);
  }

  explicit operator bool() const { return to_ != nullptr; }
  bool streams() const { return streams_; }

  // Writes rows from one on. A copy, for else each store would seem to change where they lie.
  struct Writer {
    T* to;  // null where not asked for
    int64_t cols;
    bool streams;

    template <class Count>
    FASTATTN_INLINE void put(int64_t row, int64_t c, Vec<Acc<T>> from, Count n) const {
      if constexpr (!std::is_same_v<Count, int64_t>)
        if (streams) return stream<Acc<T>>(to + row * cols + c, from);
      store_count<Acc<T>>(to + row * cols + c, from, n);
    }
  };
  Writer writer(int64_t r) const {
    return {to_ == nullptr ? nullptr : to_ + r * cols_, cols_, streams_};
  }

 private:
  static constexpr int64_t kStreamed = int64_t{16} << 20;

  T* to_;
  int64_t cols_;
  bool streams_;
};

// Rows [0, Together) of those that are normalised, in the accumulation type: input, or its sum with
// a residual, of type R, and with dropout.
template <class T, class R, int Together>
class Rows {
 public:
  using A = Acc<T>;
  using SumWriter = typename Results<R, 1>::Writer;

  // `summed` holds the sum where it is known already.
  Rows(const Norm& in, const void* summed, Scratch& scratch)
      : in_(in),
        summed_(static_cast<const R*>(summed)),
        dropout_(in.dropout_p, in.seed),
        in_place_(std::is_same_v<R, A> && (summed != nullptr || in.residual == nullptr)),
        width_(round_up(in.cols, kPhiloxBlock)),
        rows_(in_place_ ? nullptr : scratch.take<A>(Together * width_)),
        factors_(in.dropout_p > 0 ? scratch.take<A>(Together * width_) : nullptr) {}

  // Columns [first, first + count) of row r, the i-th held; `first` is a multiple of kChunk. Writes
  // a sum that it computes to row 0 of `summed`, if that is wanted.
  FASTATTN_INLINE const A* load(int i, int64_t r, int64_t first, int64_t count,
                                SumWriter summed = {}) {
    if constexpr (std::is_same_v<R, A>)  // in line, for short rows
      if (in_place_ && factors_ == nullptr) {
        const int64_t start = r * in_.cols + first;
        if (summed_ != nullptr) return summed_ + start;
        if constexpr (std::is_same_v<T, A>) return static_cast<const A*>(in_.input) + start;
      }
    return compute(i, r, first, count, summed);
  }

  // The factors of dropout of the i-th row, null without it.
  const A* factors(int i) const { return factors_ == nullptr ? nullptr : factors_ + i * width_; }

  // Dropout of what stands in column c.
  template <class Count>
  static FASTATTN_INLINE Vec<A> dropped(const A* factors, Vec<A> x, int64_t c, Count n) {
    if (factors == nullptr) return x;
    const Vec<A> factor = load_count<A>(factors + c, n);
    return factor == A{0} ? Vec<A>{} : x * factor;
  }

 private:
  const A* compute(int i, int64_t r, int64_t first, int64_t count, SumWriter summed) {
    const int64_t start = r * in_.cols + first;
    const T* input = static_cast<const T*>(in_.input) + start;
    A* to = rows_ + i * width_ + first;
    const A* factors = nullptr;
    if (factors_ != nullptr) {
      factors = factors_ + i * width_ + first;
      dropout_.factors(0, static_cast<uint32_t>(r), first, count, factors_ + i * width_ + first);
    }
    if (summed_ != nullptr) return widened(summed_ + start, to, count);
    if (in_.residual == nullptr) return widened(input, to, count);
    const R* residual = static_cast<const R*>(in_.residual) + start;
    each_vector<A>(count, [=](int64_t c, auto n) {
      const Vec<A> x = dropped(factors, load_count<A>(input + c, n), c, n);
      R rounded[lanes<A>];
      store(rounded, x + load_count<A>(residual + c, n));
      const Vec<A> sum = load_count<A>(rounded, n);
      store_count<A>(to + c, sum, n);
      if (summed.to != nullptr) summed.put(0, first + c, sum, n);
    });
    return to;
  }

  template <class S>
  const A* widened(const S* from, A* to, int64_t count) {
    if constexpr (std::is_same_v<S, A>)
      if (in_place_) return from;
    each_vector<A>(
        count, [&](int64_t c, auto n) { store_count<A>(to + c, load_count<A>(from + c, n), n); });
    return to;
  }

  const Norm& in_;
  const R* summed_;
  Dropout<A> dropout_;
  bool in_place_;
  int64_t width_;  // of a row in scratch: whole blocks of bits
  A* rows_;        // [Together, width], unless rows are read where they lie
  A* factors_;     // [Together, width], null without dropout
};

// Calls f(r, n) for rows r ... r + n of [begin, end), with n = Together as long as there are so
// many and then 1: rows share the reading of what all of them need.
template <int Together, class F>
FASTATTN_INLINE void each_rows(int64_t begin, int64_t end, F&& f) {
  int64_t r = begin;
  for (; r + Together <= end; r += Together) f(r, std::integral_constant<int, Together>{});
  for (; r < end; r++) f(r, std::integral_constant<int, 1>{});
}

// A task's sum of rows for the gradient of weight or bias: short blocks of rows in the accumulation
// type, folded into fp64, for an error grows with the length of a chain of additions.
template <class A>
class RowSum {
 public:
  RowSum(double* total, Scratch& scratch, int64_t cols)
      : total_(total), block_(total == nullptr ? nullptr : scratch.take<A>(cols)), cols_(cols) {}

  // Adds to the block. A copy, as a Writer is.
  struct Block {
    A* to;  // null where not asked for
    bool fresh;

    template <class Count>
    FASTATTN_INLINE void add(int64_t c, Vec<A> x, Count n) const {
      if (to != nullptr) store_count<A>(to + c, fresh ? x : load_count<A>(to + c, n) + x, n);
    }
  };
  Block block() const { return {block_, rows_ == 0}; }

  FASTATTN_INLINE void end_rows(int count) {
    rows_ += count;
    if (rows_ >= 16) fold();
  }

  FASTATTN_INLINE void fold() {
    if (total_ != nullptr && rows_ > 0) {
      each_vector<A>(cols_, [=, total = total_, block = block_, more = folded_](int64_t c, auto n) {
        double sums[lanes<A>];
        for (int64_t i = 0; i < n; i++) sums[i] = block[c + i];
        if (more)
          for (int64_t i = 0; i < n; i++) sums[i] += total[c + i];
        for (int64_t i = 0; i < n; i++) total[c + i] = sums[i];
      });
      folded_ = true;
    }
    rows_ = 0;
  }

 private:
  double* total_;  // [cols], null where not asked for; of no row before the first fold
  A* block_;
  int64_t cols_, rows_ = 0;  // of the block
  bool folded_ = false;
};

}  // namespace
}  // namespace fastattn::FASTATTN_ISA
