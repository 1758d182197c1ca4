// The blocked matrix products of all rooms, compiled once for each ISA and type.
//
// A tile reads vectors of one operand and single elements of the other. The one is packed, depth by
// depth, in blocks that stay in the second-level cache. Of the other, groups of rows meet them one
// by one: read where they lie, or packed as well, once for each block. So blocks are of the smaller
// operand, or of the one that is cheaper to pack; where that is A, a tile is a piece of C^T.
// With few rows nothing is packed.
#include "gemm/few_rows.h"

namespace fastattn::FASTATTN_ISA {
namespace {

// A product in tiles: one operand is packed as panels of up to Tile::vecs vectors of its rows, and
// groups of rows of the other meet them. Tiles of C^T are turned when they are done. An element of
// what is packed is Unit depths.
template <class A, class T, int Unit = 1>
class TiledProduct {
 public:
  explicit TiledProduct(const Product<A, T>& product)
      : in_(product), depth_(ceil_div(in_.depth, Unit)) {
    const Side activations{in_.rows, 1, {in_.a}},
        weights{in_.cols, in_.count, {in_.weights[0], in_.weights[1]}};
    // Turning a tile costs about half as much an element as packing, and rows that lie along the
    // depth are turned as they are packed.
    const auto packing = [&](const Side& side) {
      return side.rows * side.count * depth_ * (side.matrices[0].inner == 1 ? 2 : 1);
    };
    const bool alone = in_.packed != nullptr || in_.finish.turned;  // a block of all rows
    turned_ =
        alone || packing(activations) + in_.rows * weights.rows * in_.count / 2 <= packing(weights);
    packed_ = turned_ ? activations : weights;
    placed_ = turned_ ? weights : activations;
    in_place_ = kInPlace && lies_as_read(placed_.matrices[0]) &&
                lies_as_read(placed_.matrices[placed_.count - 1]);
    const int64_t fitting =
        alone ? packed_.rows : Packed<A>::fitting(smaller(depth_, kSpan) * packed_.count);
    block_rows_ = round_up(ceil_div(packed_.rows, ceil_div(packed_.rows, fitting)), kWidth);
    blocks_ = ceil_div(packed_.rows, block_rows_);
    spans_ = larger(1, ceil_div(depth_, kSpan));
    groups_ = ceil_div(placed_.rows, kGroup);
    const int64_t work = in_.rows * in_.cols * larger(in_.depth, 1) / kWorth;
    ranges_ = smaller(groups_, ceil_div(in_.tasks(work, groups_ * blocks_), blocks_));
    ranges_ = larger(ranges_, ceil_div(groups_, kMostGroups));
    const int64_t threads = thread_count(), tasks = blocks_ * ranges_;
    const bool uneven = threads > 1 && tasks < kFew * threads;
    parted_ = uneven && block_rows_ >= 4 * kParts * kWidth ? smaller(threads, tasks) : 0;
  }

  void run() const {
    Scratch shared;
    A* panels = in_.packed != nullptr
                    ? in_.packed
                    : shared.take<A>(packed_.count * blocks_ * block_rows_ * depth_);
    SharedTasks* packing = shared.take<SharedTasks>(blocks_ * spans_);
    for (int64_t block = 0; block < blocks_; block++)
      for (int64_t span = 0; span < spans_; span++)
        packing[block * spans_ + span] = SharedTasks(ceil_div(block_at(block).count, kWidth));
    workers(blocks_ * ranges_ + parted_ * (kParts - 1), [&](TaskQueue& queue) {
      Scratch scratch;
      const int64_t kept = spans_ > 1 ? ceil_div(groups_, ranges_) : 1;
      const Memory memory{panels,
                          scratch.take<A>(placed_.count * kGroup * smaller(depth_, kSpan) + kSlack),
                          scratch.take<A>(kept * in_.count * kGroup * block_rows_),
                          scratch.take<A>(2 * kGroup * kWidth)};
      for (int64_t next; queue.next(next);) {
        const int64_t whole = blocks_ * ranges_ - parted_, part = next - whole;
        const int64_t task = part < 0 ? next : whole + part / kParts;
        const int64_t block = task / ranges_, range = task % ranges_;
        const Block rows = block_at(block);
        const Block panels = part < 0 ? Block{0, rows.count} : part_at(rows, part % kParts);
        const int64_t first = range * groups_ / ranges_, end = (range + 1) * groups_ / ranges_;
        for (int64_t n = 0; n < spans_; n++) {
          const Block span = span_at(n);
          if (in_.packed == nullptr) pack(memory, rows, span, packing[block * spans_ + n]);
          A* tiles = memory.tiles;
          for (int64_t group = first; group < end; group++) {
            const bool more = group + 1 < end;
            add(memory, rows, panels, group_at(group), span, group_at(more ? group + 1 : first),
                more ? span : span_at(n + 1), tiles);
            if (kept > 1) tiles += in_.count * kGroup * block_rows_;
          }
        }
      }
    });
  }

 private:
  static constexpr int64_t kWidth = Packed<A>::width;  // rows in a panel, fewer in the last
  static constexpr int64_t kGroup = 48;                // rows that meet a panel: whole tiles
  // Rows of a group that lie together at each depth: a tile's own, where a panel would else be
  // pushed out of the first-level cache by rows between.
  static constexpr int64_t kStrip = FASTATTN_LANES == 8 ? Tile<A>::rows : kGroup;
  // Whether elements are read where they lie, if they lie well: where six rows that begin at the
  // same place of a page leave room for a panel in the first-level cache.
  static constexpr bool kInPlace = kStrip == kGroup && (std::is_same_v<T, A> || Unit == 2);
  static constexpr int64_t kDepth = FASTATTN_LANES == 8 ? 192 : 64;  // no chain of sums is longer
  static constexpr int64_t kSpan = Packed<A>::span;
  static constexpr int64_t kMostGroups = 4;   // whose sums are kept from span to span
  static constexpr int64_t kFew = 16;         // tasks a thread: at their end some would be idle
  static constexpr int64_t kParts = 4;        // into which the last tasks are cut then
  static constexpr int64_t kWorth = 500'000;  // multiply-adds for which a thread is started
  static_assert(kGroup % lanes<A> == 0 && kGroup % Tile<A>::sums == 0);

  struct Side {
    int64_t rows, count;  // of matrices
    Operand<T> matrices[2];
  };
  struct Block {
    int64_t first, count;
  };
  using Place = typename Finish<A>::Place;
  struct Memory {
    A* panels;  // [matrices, blocks, spans, panels, elements of a span, kWidth], for all threads
    A* group;   // [matrices, strips, elements of a span, kStrip], unless read in place
    A* tiles;   // [groups, products, panels, kGroup, kWidth]
    A* block;   // [2, kWidth, kGroup] of C where it is turned
  };

  Block block_at(int64_t block) const {
    return {block * block_rows_, smaller(block_rows_, packed_.rows - block * block_rows_)};
  }

  // The elements that a block's panels are packed for at once; none past the end.
  Block span_at(int64_t span) const {
    return {span * kSpan, larger(0, smaller(kSpan, depth_ - span * kSpan))};
  }

  // A part of a block's rows, in whole panels; some may be empty.
  static Block part_at(Block rows, int64_t part) {
    const int64_t panels = ceil_div(rows.count, kWidth), first = part * panels / kParts * kWidth;
    return {first, smaller(rows.count, (part + 1) * panels / kParts * kWidth) - first};
  }

  static int64_t width_at(int64_t row, Block rows) {
    return smaller(kWidth, round_up(rows.count - row, lanes<A>));
  }

  A* panel_at(const Memory& memory, int64_t matrix, Block rows, Block span, int64_t row) const {
    return memory.panels + (matrix * blocks_ * block_rows_ + rows.first) * depth_ +
           span.first * round_up(rows.count, lanes<A>) + row * span.count;
  }

  // Whether a row's elements, pairs too, are whole and follow each other, as a tile reads them.
  bool lies_as_read(const Operand<T>& matrix) const {
    return matrix.inner == 1 && matrix.outer % Unit == 0 && in_.depth % Unit == 0 &&
           reinterpret_cast<uintptr_t>(matrix.data) % sizeof(A) == 0;
  }

  void pack_rows(A* to, int64_t width, Operand<T> matrix, Block rows, Block span) const {
    const Operand<T> from = matrix.from(rows.first, span.first * Unit);
    pack_units<Unit>(to, width, from.data, from.outer, from.inner, rows.count,
                     smaller(span.count * Unit, in_.depth - span.first * Unit));
  }

  // Packs the panels of a span that no other thread packs, and waits for those of the others.
  void pack(const Memory& memory, Block rows, Block span, SharedTasks& panels) const {
    for (int64_t panel; panels.next(panel); panels.done())
      for (int64_t m = 0; m < packed_.count; m++) {
        const int64_t row = panel * kWidth, width = width_at(row, rows);
        pack_rows(panel_at(memory, m, rows, span, row), width, packed_.matrices[m],
                  {rows.first + row, smaller(width, rows.count - row)}, span);
      }
    panels.wait();
  }

  Place place_at(Block rows, Block others, int64_t row) const {
    const int64_t width = width_at(row, rows), count = smaller(width, rows.count - row);
    if (turned_) return {rows.first + row, others.first, count, others.count, kGroup};
    return {others.first, rows.first + row, others.count, count, width};
  }

  // The memory of a group's rows, to be fetched in `steps`.
  static Fetch<false> fetch_group(Operand<T> matrix, int64_t count, int64_t depth, int64_t steps) {
    constexpr int64_t size = sizeof(T);
    if (matrix.inner == 1) return {matrix.data, matrix.outer * size, count, depth * size, steps};
    return {matrix.data, matrix.inner * size, depth, count * size, steps};
  }

  Block group_at(int64_t group) const {
    return {group * kGroup, smaller(kGroup, placed_.rows - group * kGroup)};
  }

  // Packs a group's rows, up to whole tiles.
  void pack_group(const Memory& memory, Block others, Block span) const {
    for (int64_t m = 0; m < placed_.count; m++) {
      A* to = memory.group + m * span.count * kGroup;
      if constexpr (kStrip == kGroup) {
        pack_rows(to, kGroup, placed_.matrices[m], others, span);
      } else {
        const Operand<T> from = placed_.matrices[m].from(others.first, span.first);
        pack_strips(to, kGroup, from.data, from.outer, from.inner, others.count, span.count);
      }
    }
  }

  // Adds what a span of depths gives to the tiles of a group, for `panels` of a block's rows, one
  // by one; after the last span a panel's sums are finished while they are in the cache. Meanwhile
  // group `next` of span `then` is fetched.
  void add(const Memory& memory, Block rows, Block panels, Block others, Block span, Block next,
           Block then, A* tiles) const {
    const bool last = span.first + span.count == depth_;
    const bool in_place = in_place_ && others.count == kGroup;
    if (!in_place) pack_group(memory, others, span);
    const int64_t steps =
        in_.count * ceil_div(larger(span.count, 1), kDepth) * ceil_div(others.count, Tile<A>::rows);
    Fetch<false> reads[2];
    for (int64_t m = 0; m < placed_.count; m++)
      reads[m] = fetch_group(placed_.matrices[m].from(next.first, then.first * Unit), next.count,
                             then.count * Unit, steps * ceil_div(panels.count, kWidth));
    for (int64_t row = panels.first; row < panels.first + panels.count; row += kWidth) {
      const int64_t width = width_at(row, rows);
      const Place place = place_at(rows, others, row);
      A* to = tiles + row * kGroup;
      Fetch<true> writes;
      if (last) writes = fetch_place(place, steps);
      with_vecs<A, Tile<A>::vecs>(width, [&](auto vecs) {
        constexpr int count = Tile<A>::rows_of(vecs);
        for (int64_t w = 0; w < in_.count; w++) {
          const int64_t m = turned_ ? w : 0;
          const A* panel = panel_at(memory, turned_ ? 0 : w, rows, span, row);
          const A* group = memory.group + m * span.count * kGroup;
          const Operand<T> lying = placed_.matrices[m].from(others.first, span.first * Unit);
          A* tile = to + w * block_rows_ * kGroup;
          for (int64_t start = 0; start == 0 || start < span.count; start += kDepth) {
            const int64_t length = smaller(kDepth, span.count - start);
            for (int64_t i = 0; i < others.count; i += count) {
              for (int64_t n = 0; n < placed_.count; n++) reads[n].step();
              writes.step();
              const A* next_panel =
                  panel + (start + length) * width + i / count * fetched<A, vecs>(length);
              const bool more = span.first + start > 0;
              if constexpr (kInPlace)
                if (in_place) {
                  multiply_tile<A, count, vecs, kApart, 1, true, Unit>(
                      reinterpret_cast<const A*>(lying.from(i, start * Unit).data),
                      lying.outer / Unit, panel + start * width, length, tile + i * width, width,
                      more, next_panel);
                  continue;
                }
              multiply_tile<A, count, vecs, 1, kStrip, true, Unit>(
                  group + start * kStrip + (kStrip == kGroup ? i : i * span.count),
                  kStrip == kGroup ? Tile<A>::rows : kStrip * span.count, panel + start * width,
                  length, tile + i * width, width, more, next_panel);
            }
          }
        }
      });
      if (last) finish(memory, place, to, width);
    }
  }

  Fetch<true> fetch_place(const Place& place, int64_t steps) const {
    const Finish<A>& to = in_.finish;
    if (to.turned) return {};
    return {to.out + place.row * to.out_row + place.col * to.size, to.out_row, place.rows,
            place.cols * to.size, steps};
  }

  void finish(const Memory& memory, const Place& place, A* tiles, int64_t width) const {
    A* blocks[2];
    for (int64_t w = 0; w < in_.count; w++) {
      blocks[w] = tiles + w * block_rows_ * kGroup;
      if (turned_ == in_.finish.turned) continue;
      A* block = memory.block + w * kWidth * kGroup;
      transpose_tile(blocks[w], width, round_up(place.cols, lanes<A>), width, block, kGroup);
      blocks[w] = block;
    }
    if (in_.count == 1) blocks[1] = blocks[0];
    in_.finish.call(in_.finish.body, place, blocks);
  }

  const Product<A, T>& in_;
  int64_t depth_;  // in elements of what is packed
  bool turned_;
  bool in_place_;  // whole groups are not packed
  Side packed_, placed_;
  int64_t block_rows_, blocks_, spans_, groups_, ranges_;
  int64_t parted_;  // tasks, the last, that are done in parts
};

// In pairs where the processor can: what is packed for the product by another may be so, too.
template <class A, class T>
void multiply_in_tiles(const Product<A, T>& product) {
  with_unit<T>([&](auto unit) { TiledProduct<A, T, unit>(product).run(); });
}

}  // namespace

template <class A, class T>
void multiply(int64_t rows, int64_t cols, int64_t depth, Operand<T> a,
              std::initializer_list<Operand<T>> weights, Finish<A> finish) {
  if (rows == 0 || cols == 0) return;
  const int64_t count = static_cast<int64_t>(weights.size());
  const Product<A, T> product{
      rows, cols, depth, a, {weights.begin()[0], weights.begin()[count - 1]}, count, finish};
  bool in_rows = true, in_columns = true;
  for (const Operand<T>& weight : weights) {
    in_rows = in_rows && weight.inner == 1;
    in_columns = in_columns && weight.outer == 1;
  }
  if (finish.turned) return multiply_in_tiles(product);
  if (in_columns && !in_rows && rows <= LineSum<A, T>::kMost) return LineSum<A, T>(product).run();
  if (!in_rows || rows > DotProduct<A, T, 4>::kMost) return multiply_in_tiles(product);
  if (rows > 2) return DotProduct<A, T, 4>(product).run();
  if (rows > 1) return DotProduct<A, T, 2>(product).run();
  return DotProduct<A, T, 1>(product).run();
}

template <class A, class T>
void multiply(const Packed<A>& a, int64_t cols, Operand<T> weight, Finish<A> finish) {
  if (a.rows == 0 || cols == 0) return;
  const Product<A, T> product{a.rows, cols, a.depth, {}, {weight, weight}, 1, finish, a.data};
  return multiply_in_tiles(product);
}

#define FASTATTN_PRODUCT(A, T)                                                \
  template void multiply<A, T>(int64_t, int64_t, int64_t, Operand<T>,         \
                               std::initializer_list<Operand<T>>, Finish<A>); \
  template void multiply<A, T>(const Packed<A>&, int64_t, Operand<T>, Finish<A>);
FASTATTN_PRODUCT(float, float)
FASTATTN_PRODUCT(float, bf16)
FASTATTN_PRODUCT(float, f16)
FASTATTN_PRODUCT(double, double)
#undef FASTATTN_PRODUCT

}  // namespace fastattn::FASTATTN_ISA
