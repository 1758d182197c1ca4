// Products of few rows, of which nothing is packed: the weight's rows, or its columns, are vectors
// where they lie.
#pragma once

#include "gemm/product.h"

namespace fastattn::FASTATTN_ISA {
namespace {

// Few rows of A, Count at a time, against rows of a weight that are vectors along depth: the weight
// streams through once. Rows that are read at the same time lie apart, on different pages of
// memory: a processor fetches ahead by itself, one stream in each page, and more of several streams
// than of one.
template <class A, class T, int Count>
class DotProduct {
 public:
  static constexpr int64_t kMost = Count == 4 ? 24 : Count;  // rows of A

  explicit DotProduct(const Product<A, T>& product)
      : in_(product), rows_(round_up(in_.rows, Count)), padded_(round_up(in_.depth, lanes<A>)) {
    groups_ = ceil_div(in_.cols, kGroup);
    ranges_ = in_.tasks(in_.cols * in_.depth / kWorth, groups_);
  }

  void run() const {
    workers(ranges_, [&](TaskQueue& queue) {
      Scratch scratch;
      A* rows = scratch.take<A>(rows_ * padded_);
      A* block = scratch.take<A>(2 * rows_ * kGroup);
      A* const blocks[2] = {block, block + (in_.count - 1) * rows_ * kGroup};
      widen(rows);
      for (int64_t task; queue.next(task);) {
        const int64_t end = (task + 1) * groups_ / ranges_;
        for (int64_t group = task * groups_ / ranges_; group < end; group++) {
          const int64_t col = group * kGroup, cols = smaller(kGroup, in_.cols - col);
          const int64_t apart = cols / kWeights;
          for (int64_t w = 0; w < in_.count; w++) {
            const Operand<T> weight = in_.weights[w].from(col, 0);
            A* to = block + w * rows_ * kGroup;
            for (int64_t j = 0; j < apart; j++)
              dot<kWeights>(rows, weight.from(j, 0), apart, to + j);
            for (int64_t j = apart * kWeights; j < cols; j++)
              dot<1>(rows, weight.from(j, 0), 0, to + j);
          }
          in_.finish.call(in_.finish.body, {0, col, in_.rows, cols, kGroup}, blocks);
        }
      }
    });
  }

 private:
  static constexpr int kWeights = Count == 1 ? 8 : Tile<A>::sums / Count;
  static constexpr int64_t kGroup = 8 * kWeights;
  static constexpr int64_t kChain = (FASTATTN_LANES == 1 ? 32 : 64) * lanes<A>;
  static constexpr int64_t kWorth = 65'536;  // elements of a weight for which a thread is started
  static_assert(kGroup % lanes<A> == 0);

  void widen(A* to) const {
    std::memset(to, 0, static_cast<size_t>(rows_ * padded_) * sizeof(A));
    for (int64_t i = 0; i < in_.rows; i++)
      load_row(to + i * padded_, in_.a.from(i, 0).data, in_.a.inner, in_.depth);
  }

  // to[i * kGroup + j * apart] = row i of A times row j * apart of the weight, for j < Weights.
  // What was summed over kChain is added to the sum of the others: an error grows with a chain's
  // length.
  template <int Weights>
  void dot(const A* rows, Operand<T> weight, int64_t apart, A* to) const {
    Vec<A> total[kMost][Weights];
    for (int64_t i = 0; i < rows_; i++)
      for (int j = 0; j < Weights; j++) total[i][j] = Vec<A>{};
    for (int64_t start = 0; start < in_.depth; start += kChain)
      for (int64_t first = 0; first < rows_; first += Count) {
        Vec<A> sums[Count][Weights] = {};
        each_vector<A>(smaller(kChain, in_.depth - start), [&](int64_t offset, auto n) {
          const int64_t k = start + offset;
          Vec<A> factor[Weights];
#pragma GCC unroll 16
          for (int j = 0; j < Weights; j++)
            factor[j] = load_count<A>(weight.data + j * apart * weight.outer + k, n);
#pragma GCC unroll 16
          for (int i = 0; i < Count; i++) {
            const Vec<A> x = load<A>(rows + (first + i) * padded_ + k);
#pragma GCC unroll 16
            for (int j = 0; j < Weights; j++) sums[i][j] += factor[j] * x;
          }
        });
#pragma GCC unroll 16
        for (int i = 0; i < Count; i++)
#pragma GCC unroll 16
          for (int j = 0; j < Weights; j++) total[first + i][j] += sums[i][j];
      }
    for (int64_t i = 0; i < rows_; i++)
      for (int j = 0; j < Weights; j++) to[i * kGroup + j * apart] = sum<A>(total[i][j]);
  }

  const Product<A, T>& in_;
  int64_t rows_, padded_, groups_, ranges_;
};

// Few rows of A against a weight that lies transposed: C adds up lines of the weight, each times an
// element of A. The weight streams through once, lines that lie apart at the same time, as above;
// threads share out the lines, and the sums of all are added up at the end.
template <class A, class T>
class LineSum {
 public:
  static constexpr int64_t kMost = 16;  // rows of A

  explicit LineSum(const Product<A, T>& product)
      : in_(product),
        width_(round_up(in_.cols, lanes<A>)),
        chains_(larger(1, ceil_div(in_.depth, kChain))) {}

  void run() const {
    Scratch shared;
    A* sums = shared.take<A>(in_.count * chains_ * in_.rows * width_);
    const int64_t parts = ceil_div(in_.cols, kPart);
    share(in_.count * chains_ * parts, in_.cols * in_.depth, [&](int64_t piece, A* rows) {
      add(piece / parts / chains_, piece / parts % chains_, piece % parts * kPart, rows, sums);
    });
    share(ceil_div(in_.cols, kGroup), in_.rows * in_.cols * chains_,
          [&](int64_t group, A*) { finish(group * kGroup, sums); });
  }

 private:
  static constexpr int kLines = 8;           // read at the same time
  static constexpr int64_t kChain = 128;     // depths that are summed in one go
  static constexpr int64_t kPart = 4096;     // columns of a task
  static constexpr int64_t kGroup = 256;     // columns that are finished at once
  static constexpr int64_t kStep = 256;      // columns that meet every row while they are cached
  static constexpr int64_t kWorth = 65'536;  // additions for which a thread is started

  // Calls f(piece, scratch for A's rows) for all pieces, on as many threads as `work` is worth.
  template <class F>
  void share(int64_t pieces, int64_t work, const F& f) const {
    const int64_t ranges = in_.tasks(work / kWorth, pieces);
    workers(ranges, [&](TaskQueue& queue) {
      Scratch scratch;
      A* rows = scratch.take<A>(in_.rows * kChain);
      for (int64_t task; queue.next(task);)
        for (int64_t n = task * pieces / ranges; n < (task + 1) * pieces / ranges; n++) f(n, rows);
    });
  }

  A* sum_of(A* sums, int64_t weight, int64_t chain, int64_t col) const {
    return sums + (weight * chains_ + chain) * in_.rows * width_ + col;
  }

  // What the lines of a chain give, from column `col` on.
  void add(int64_t w, int64_t chain, int64_t col, A* rows, A* sums) const {
    const int64_t first = chain * kChain, depth = smaller(kChain, in_.depth - first);
    const int64_t cols = smaller(kPart, in_.cols - col);
    const Operand<T> weight = in_.weights[w].from(col, first);
    A* to = sum_of(sums, w, chain, col);
    for (int64_t i = 0; i < in_.rows; i++) {
      load_row(rows + i * kChain, in_.a.from(i, first).data, in_.a.inner, depth);
      std::memset(to + i * width_, 0, static_cast<size_t>(round_up(cols, lanes<A>)) * sizeof(A));
    }
    const int64_t apart = depth / kLines;
    for (int64_t k = 0; k < apart; k++)
      add_lines<kLines>(weight.from(0, k), apart, cols, rows + k, to);
    for (int64_t k = apart * kLines; k < depth; k++)
      add_lines<1>(weight.from(0, k), 0, cols, rows + k, to);
  }

  // Adds lines that lie so many depths apart.
  template <int Lines>
  void add_lines(Operand<T> weight, int64_t apart, int64_t cols, const A* rows, A* to) const {
    for (int64_t col = 0; col < cols; col += kStep)
      for (int64_t i = 0; i < in_.rows; i++) {
        A factor[Lines];
#pragma GCC unroll 8
        for (int j = 0; j < Lines; j++) factor[j] = rows[i * kChain + j * apart];
        A* sums = to + i * width_ + col;
        each_vector<A>(smaller(kStep, cols - col), [&](int64_t c, auto n) {
          Vec<A> sum{};
#pragma GCC unroll 8
          for (int j = 0; j < Lines; j++)
            sum += factor[j] * load_count<A>(weight.data + j * apart * weight.inner + col + c, n);
          store(sums + c, load<A>(sums + c) + sum);
        });
      }
  }

  void finish(int64_t col, A* sums) const {
    const int64_t cols = smaller(kGroup, in_.cols - col), width = round_up(cols, lanes<A>);
    A block[2][kMost * kGroup];
    A* const blocks[2] = {block[0], block[in_.count - 1]};
    for (int64_t w = 0; w < in_.count; w++)
      for (int64_t i = 0; i < in_.rows; i++)
        for (int64_t c = 0; c < cols; c += lanes<A>) {
          Vec<A> total{};
          for (int64_t chain = 0; chain < chains_; chain++)
            total += load<A>(sum_of(sums, w, chain, col) + i * width_ + c);
          store(block[w] + i * width + c, total);
        }
    in_.finish.call(in_.finish.body, {0, col, in_.rows, cols, width}, blocks);
  }

  const Product<A, T>& in_;
  int64_t width_, chains_;
};

}  // namespace
}  // namespace fastattn::FASTATTN_ISA
