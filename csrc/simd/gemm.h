// Blocked matrix products C = A B^T with an epilogue, where B is a weight and A holds activations.
//
// The weight is the larger operand, and packing it would cost a fifth of a product with a hundred
// rows: so it is the one that a tile reads element by element, in place wherever it can, while the
// activations are packed as panels. A tile is then a piece of C^T, and is turned when it is done.
// With few rows the weight's rows are vectors themselves, and each meets every row of A.
#pragma once

#include <initializer_list>

#include "simd/tile.h"

namespace fastattn::FASTATTN_ISA {
namespace {

// A matrix whose element (i, k) is data[i * outer + k * inner]; k runs along the summed dimension.
template <class T>
struct Operand {
  const T* data;
  int64_t outer, inner;

  Operand from(int64_t i, int64_t k) const { return {data + i * outer + k * inner, outer, inner}; }
};

// What to do with a finished block of C: blocks[w][i * width + j] is element (row + i, col + j) of
// product w for i < rows, j < cols. A reference, not a copy, of `body`.
template <class A>
struct Finish {
  static constexpr int64_t width = 2 * Tile<A>::sums;  // whole tiles and vectors of any shape
  static_assert(width % lanes<A> == 0);
  struct Place {
    int64_t row, col, rows, cols;
  };
  void (*call)(const void* body, const Place& place, const A* const* blocks);
  const void* body;

  template <class F>
  explicit Finish(const F& f)
      : call([](const void* to, const Place& place, const A* const* blocks) {
          (*static_cast<const F*>(to))(place, blocks);
        }),
        body(&f) {}
};

// Visits a finished block in vectors: f(row, col, count, sum of product 0, of product 1).
template <class A, class F>
FASTATTN_INLINE void each_in_block(const typename Finish<A>::Place& place, const A* const* blocks,
                                   F&& f) {
  for (int64_t i = 0; i < place.rows; i++)
    each_vector<A>(place.cols, [&](int64_t j, auto n) {
      const int64_t at = i * Finish<A>::width + j;
      f(place.row + i, place.col + j, n, load<A>(blocks[0] + at), load<A>(blocks[1] + at));
    });
}

template <class A, class T>
struct Product {
  int64_t rows, cols, depth;
  Operand<T> a;
  Operand<T> weights[2];
  int64_t count;  // of weights
  Finish<A> finish;

  // Tasks that are worth their start, and enough of them to even out threads of unequal speed.
  int64_t tasks(int64_t most) const {
    constexpr int64_t worth = 500'000;  // multiply-adds
    const int64_t work = rows * cols * larger(depth, 1) / worth;
    return larger(1, smaller(smaller(most, work), int64_t{4} * thread_count()));
  }
};

// A product in tiles: panels of up to Tile::vecs vectors of rows of C meet groups of its columns.
template <class A, class T>
class TiledProduct {
 public:
  explicit TiledProduct(const Product<A, T>& product) : in_(product) {
    const int64_t fitting =
        cache_bytes() / 2 / (larger(in_.depth, 1) * static_cast<int64_t>(sizeof(A)));
    const int64_t blocks = ceil_div(in_.rows, larger(2 * kWidth, round_up(fitting, kWidth)));
    block_rows_ = round_up(ceil_div(in_.rows, blocks), kWidth);
    row_blocks_ = ceil_div(in_.rows, block_rows_);
    groups_ = ceil_div(in_.cols, kGroup);
    ranges_ = smaller(groups_, ceil_div(in_.tasks(groups_ * row_blocks_), row_blocks_));
  }

  void run() const {
    workers(row_blocks_ * ranges_, [&](TaskQueue& queue) {
      Scratch scratch;
      const int64_t rows = smaller(block_rows_, round_up(in_.rows, lanes<A>));
      Memory memory{scratch.take<A>(rows * in_.depth + kSlack),
                    scratch.take<A>(kGroup * smaller(in_.depth, kDepth) + kSlack),
                    scratch.take<A>(in_.count * kGroup * rows),
                    scratch.take<A>(2 * kGroup * kWidth)};
      int64_t packed = -1;
      for (int64_t task; queue.next(task);) {
        const int64_t block = task / ranges_, range = task % ranges_;
        const Block rows{block * block_rows_, smaller(block_rows_, in_.rows - block * block_rows_)};
        if (packed != block) pack(memory, rows);
        packed = block;
        const int64_t end = (range + 1) * groups_ / ranges_;
        for (int64_t group = range * groups_ / ranges_; group < end; group++) {
          const Block cols{group * kGroup, smaller(kGroup, in_.cols - group * kGroup)};
          const bool more = group + 1 < end && cols.first + 2 * kGroup <= in_.cols;
          for (int64_t start = 0; start == 0 || start < in_.depth; start += kDepth)
            add(memory, rows, cols, start, more);
          finish(memory, rows, cols);
        }
      }
    });
  }

 private:
  static constexpr int64_t kWidth = Tile<A>::cols;     // rows of C in a panel, fewer in the last
  static constexpr int64_t kGroup = Finish<A>::width;  // columns of C that meet a panel at a time
  static constexpr int64_t kDepth = 64;                // no chain of additions is longer

  struct Block {
    int64_t first, count;
  };
  struct Memory {
    A* panels;  // [depth blocks, panels, depth, kWidth] of A
    A* copied;  // a group of a weight that cannot be read in place
    A* tiles;   // [weights, panels, kGroup, kWidth] of C^T
    A* block;   // [2, kWidth, kGroup] of C
  };

  static int64_t width_at(int64_t row, Block rows) {
    return smaller(kWidth, round_up(rows.count - row, lanes<A>));
  }

  void pack(const Memory& memory, Block rows) const {
    A* to = memory.panels;
    for (int64_t start = 0; start < in_.depth; start += kDepth) {
      const int64_t length = smaller(kDepth, in_.depth - start);
      for (int64_t row = 0; row < rows.count; row += kWidth) {
        const Operand<T> a = in_.a.from(rows.first + row, start);
        const int64_t width = width_at(row, rows);
        pack_panel(to, width, a.data, a.outer, a.inner, smaller(width, rows.count - row), length);
        to += width * length;
      }
    }
  }

  // A group of a weight's rows as the A operand of tiles: in place, or copied.
  static Rows<A> group_rows(Operand<T> weight, int64_t count, int64_t depth, int64_t ahead, A* to) {
    if constexpr (std::is_same_v<A, T>)
      if (weight.inner == 1 && count == kGroup) return {weight.data, weight.outer, 1, ahead};
    if (weight.inner != 1) {
      pack_panel(to, kGroup, weight.data, weight.outer, weight.inner, count, depth);
      return {to, 1, kGroup};
    }
    for (int64_t i = 0; i < kGroup; i++)
      each_vector<A>(depth, [&](int64_t k, auto n) {
        Vec<A> x{};
        if (i < count) x = load_count<A>(weight.data + i * weight.outer + k, n);
        store_count<A>(to + i * depth + k, x, n);
      });
    return {to, depth, 1};
  }

  // Adds what depths from `start` give to a group of columns of every product.
  void add(const Memory& memory, Block rows, Block cols, int64_t start, bool more) const {
    const int64_t length = smaller(kDepth, in_.depth - start);
    A* to = memory.tiles;
    for (int64_t w = 0; w < in_.count; w++) {
      const Operand<T> weight = in_.weights[w].from(cols.first, start);
      // The first panel fetches what comes next: the next depths, or the next group's first.
      const int64_t next = more ? kGroup * weight.outer - start : 0;
      const int64_t ahead = start + kDepth < in_.depth ? kDepth : next;
      Rows<A> group = group_rows(weight, cols.count, length, ahead, memory.copied);
      const A* panel = memory.panels + start * round_up(rows.count, lanes<A>);
      for (int64_t row = 0; row < rows.count; row += kWidth) {
        const int64_t width = width_at(row, rows);
        with_vecs<A, Tile<A>::vecs>(width, [&](auto vecs) {
          constexpr int count = Tile<A>::sums / vecs;
          for (int64_t i = 0; i < cols.count; i += count) {
            A* tile = to + i * width;
            if (start == 0) {
              multiply_tile<A, count, vecs, false>(group.from(i), panel, length, tile, width);
            } else {
              multiply_tile<A, count, vecs, true>(group.from(i), panel, length, tile, width);
            }
          }
        });
        panel += length * width;
        to += kGroup * width;
        group.ahead = 0;
      }
    }
  }

  void finish(const Memory& memory, Block rows, Block cols) const {
    const A* blocks[2] = {memory.block, memory.block + (in_.count - 1) * kGroup * kWidth};
    const int64_t size = kGroup * round_up(rows.count, lanes<A>);
    for (int64_t row = 0; row < rows.count; row += kWidth) {
      const int64_t width = width_at(row, rows);
      for (int64_t w = 0; w < in_.count; w++)
        transpose_tile(memory.tiles + w * size + row * kGroup, width,
                       round_up(cols.count, lanes<A>), width, memory.block + w * kGroup * kWidth,
                       kGroup);
      in_.finish.call(in_.finish.body,
                      {rows.first + row, cols.first, smaller(width, rows.count - row), cols.count},
                      blocks);
    }
  }

  const Product<A, T>& in_;
  int64_t block_rows_, row_blocks_, groups_, ranges_;
};

// Up to Count rows of A against rows of a weight that are vectors along depth: the weight streams
// through once. Sums over kChain are added in fp64: their error grows with the length of a chain.
template <class A, class T, int Count>
class DotProduct {
 public:
  explicit DotProduct(const Product<A, T>& product)
      : in_(product), padded_(round_up(in_.depth, lanes<A>)) {
    groups_ = ceil_div(in_.cols, kGroup);
    ranges_ = in_.tasks(groups_);
  }

  void run() const {
    workers(ranges_, [&](TaskQueue& queue) {
      Scratch scratch;
      A* rows = scratch.take<A>(Count * padded_);
      A* block = scratch.take<A>(2 * Count * kGroup);
      const A* blocks[2] = {block, block + (in_.count - 1) * Count * kGroup};
      widen(rows);
      for (int64_t task; queue.next(task);) {
        const int64_t end = (task + 1) * groups_ / ranges_;
        for (int64_t group = task * groups_ / ranges_; group < end; group++) {
          const int64_t col = group * kGroup, cols = smaller(kGroup, in_.cols - col);
          for (int64_t w = 0; w < in_.count; w++) {
            int64_t j = 0;
            A* to = block + w * Count * kGroup;
            for (; j + kWeights <= cols; j += kWeights)
              dot<kWeights>(rows, in_.weights[w].from(col + j, 0), to + j);
            for (; j < cols; j++) dot<1>(rows, in_.weights[w].from(col + j, 0), to + j);
          }
          in_.finish.call(in_.finish.body, {0, col, in_.rows, cols}, blocks);
        }
      }
    });
  }

 private:
  static constexpr int64_t kGroup = Finish<A>::width;
  static constexpr int kSums = FASTATTN_LANES == 16 ? 16 : 8;  // accumulators that fit in registers
  static constexpr int kWeights = kSums / Count > 8 ? 8 : kSums / Count;
  static constexpr int64_t kChain = FASTATTN_LANES == 1 ? 32 : 64 * lanes<A>;

  void widen(A* to) const {
    for (int64_t i = 0; i < Count; i++)
      for (int64_t k = 0; k < padded_; k += lanes<A>) {
        Vec<A> x{};
        for (int64_t j = 0; i < in_.rows && j < smaller(lanes<A>, in_.depth - k); j++)
          x[j] = load_one<A>(in_.a.from(i, k + j).data);
        store(to + i * padded_ + k, x);
      }
  }

  // to[i * kGroup + j] = row i of A times row j of the weight, for j < Weights.
  template <int Weights>
  void dot(const A* rows, Operand<T> weight, A* to) const {
    double total[Count][Weights] = {};
    for (int64_t start = 0; start < in_.depth; start += kChain) {
      Vec<A> sums[Count][Weights] = {};
      each_vector<A>(smaller(kChain, in_.depth - start), [&](int64_t offset, auto n) {
        const int64_t k = start + offset;
        Vec<A> x[Count];
#pragma GCC unroll 8
        for (int i = 0; i < Count; i++) x[i] = load<A>(rows + i * padded_ + k);
#pragma GCC unroll 8
        for (int j = 0; j < Weights; j++) {
          const Vec<A> factor = load_count<A>(weight.data + j * weight.outer + k, n);
#pragma GCC unroll 8
          for (int i = 0; i < Count; i++) sums[i][j] += factor * x[i];
        }
      });
      for (int i = 0; i < Count; i++)
        for (int j = 0; j < Weights; j++) total[i][j] += sum<A>(sums[i][j]);
    }
    for (int i = 0; i < Count; i++)
      for (int j = 0; j < Weights; j++) to[i * kGroup + j] = static_cast<A>(total[i][j]);
  }

  const Product<A, T>& in_;
  int64_t padded_, groups_, ranges_;
};

// C_w[rows, cols] = a b_w^T over `depth` for one or two b of equal shape, block by block to
// `finish`. A sum runs over depth in the same order whatever the number of threads.
template <class A, class T>
void multiply(int64_t rows, int64_t cols, int64_t depth, Operand<T> a,
              std::initializer_list<Operand<T>> weights, Finish<A> finish) {
  if (rows == 0 || cols == 0) return;
  const int64_t count = static_cast<int64_t>(weights.size());
  const Product<A, T> product{
      rows, cols, depth, a, {weights.begin()[0], weights.begin()[count - 1]}, count, finish};
  if (weights.begin()->inner != 1 || rows > 8) return TiledProduct<A, T>(product).run();
  if (rows > 4) return DotProduct<A, T, 8>(product).run();
  if (rows > 2) return DotProduct<A, T, 4>(product).run();
  if (rows > 1) return DotProduct<A, T, 2>(product).run();
  return DotProduct<A, T, 1>(product).run();
}

}  // namespace
}  // namespace fastattn::FASTATTN_ISA
