// Attention of few queries, most often to a long cache: keys and values are read once, where they
// lie.
#pragma once

#include "attention/decode_tile.h"
#include "attention/rotation.h"
#include "attention/scores.h"

namespace fastattn::FASTATTN_ISA {
namespace {

// Keys of a task. It depends on nothing, so that a sequence's sums depend on no other sequence and
// on no number of threads.
constexpr int64_t kSplit = 256;
static_assert(kSplit % kTile == 0);

template <class A, class T>
void store_row(T* to, int64_t stride, const A* from, int64_t count) {
  if (stride == 1) {
    each_vector<A>(
        count, [&](int64_t c, auto n) { store_count<A>(to + c, load_count<A>(from + c, n), n); });
  } else {
    for (int64_t c = 0; c < count; c++) store_part<A>(to + c * stride, set<A>(from[c]), 1);
  }
}

template <class T>
void copy_row(T* to, int64_t to_stride, const T* from, int64_t from_stride, int64_t count) {
  if (to_stride == 1 && from_stride == 1) {
    std::memcpy(to, from, static_cast<size_t>(count) * sizeof(T));
  } else {
    for (int64_t c = 0; c < count; c++) to[c * to_stride] = from[c * from_stride];
  }
}

// Where a sequence's positions lie in a cache, one after the other.
template <class T>
class Walk {
 public:
  Walk(const Paging& paging, int64_t sequence, int64_t position)
      : paging_(paging),
        page_(paging.pages + sequence * paging.columns + position / paging.size),
        slot_(position % paging.size) {}
  template <class Pointer>
  auto operator()(const View<Pointer>& cache, int64_t head) const {
    return at<T>(cache, head, slot_, 0) + *page_ * cache.stride[0];
  }
  // Positions that this page has left, of which that many may be skipped.
  int64_t left() const { return paging_.size - slot_; }
  void skip(int64_t count) {
    if ((slot_ += count) < paging_.size) return;
    slot_ = 0;
    page_++;
  }

 private:
  const Paging& paging_;
  const int64_t* page_;
  int64_t slot_;
};

// What a split of the keys of one key head leaves behind: for each row of queries, weighted values
// relative to the highest logit, and the sum of weights.
template <class A>
struct Part {
  A *out, *row_max, *row_sum;
  static int64_t size(int64_t rows, int64_t width) { return rows * (width + 2); }
  Part(A* memory, int64_t rows, int64_t width)
      : out(memory), row_max(memory + rows * width), row_sum(row_max + rows) {}
};

// One sequence and one key head, whose rows are the queries of all heads that share it.
//
// A tile takes a key from each of kTile equal parts of a split: of n tiles, tile t has the keys t,
// t + n, t + 2 n ... A processor fetches ahead by itself what is read in order, as long as it is
// read at one place of a page of memory and not at several that lie next to each other; and of
// several such streams, each on pages of its own, it fetches more than of one.
template <class T, int Unit>
class DecodeTask {
  using A = Acc<T>;
  using Own = DecodeTile<T, Unit>;

 public:
  DecodeTask(const AttentionDecode& args, int64_t n, int64_t key_head)
      : args_(args),
        in_(sequence(args.in, n)),
        key_head_(key_head),
        group_(in_.heads / in_.kv_heads),
        rows_(group_ * in_.q_len),
        width_(round_up(in_.head_dim, lanes<A>)),
        value_width_(round_up(in_.value_dim, lanes<A>)),
        seen_(visible_keys(in_, 0, in_.q_len)) {}

  static int64_t splits(const Attention& one) {
    const Range seen = visible_keys(one, 0, one.q_len);
    return seen.first < seen.end ? ceil_div(seen.end, kSplit) - seen.first / kSplit : 0;
  }

  void run(int64_t split, Part<A> part) const {
    const int64_t block = (seen_.first / kSplit + split) * kSplit;
    const int64_t first = larger(seen_.first, block), end = smaller(seen_.end, block + kSplit);
    const int64_t count = end - first, tiles = ceil_div(count, kTile);
    Scratch scratch;
    const T** keys = scratch.take<const T*>(2 * kSplit + kTile);
    const T** values = keys + tiles * kTile;
    T* zeros = scratch.take<T>(larger(width_, value_width_));
    std::memset(static_cast<void*>(zeros), 0,
                static_cast<size_t>(larger(width_, value_width_)) * sizeof(T));
    find(scratch, args_.key_cache, in_.head_dim, first, count, zeros, keys);
    find(scratch, args_.value_cache, in_.value_dim, first, count, zeros, values);
    for (int k = 0; k < kTile; k++) values[tiles * kTile + k] = zeros;  // what is fetched last
    A* query = scratch.take<A>(rows_ * width_);
    load_queries(scratch, query);
    A* weights = scratch.take<A>(rows_ * kSplit);  // in the order of tiles
    const int64_t some = smaller(rows_, lanes<A>), width = tiles * kTile;
    A* ordered = scratch.take<A>(some * kSplit);  // of some rows, in that of keys
    for (int64_t t = 0; t < tiles; t++)
      each_rows([&](int64_t r, auto rows) {
        constexpr int together = rows < 2 ? 1 : 2, count = kTile / together;
        for (int k = 0; k < kTile; k += count)
          for (int i = 0; i < rows; i += together) {
            const T** key = keys + t * kTile + k;
            const auto dots = rows > 1 && r + i == 0 ? &Own::template dots<together, count, true>
                                                     : &Own::template dots<together, count, false>;
            dots(query + (r + i) * width_, width_, key, key + kTile,
                 weights + (r + i) * kSplit + t * kTile + k, kSplit);
          }
      });
    for (int64_t r = 0; r < rows_; r += some) {
      const int64_t together = smaller(some, rows_ - r);
      for (int64_t i = 0; i < together; i++) {
        A* row = ordered + i * kSplit;
        reorder(weights + (r + i) * kSplit, tiles, kTile, row);
        const Scores<A> scores(in_, head(r + i));
        scores.finish(row, (r + i) % in_.q_len, first, count, width, nullptr);
        part.row_max[r + i] = minus_infinity<A>;
      }
      weigh(ordered, kSplit, together, width, part.row_max + r, part.row_sum + r);
      for (int64_t i = 0; i < together; i++)
        reorder(ordered + i * kSplit, kTile, tiles, weights + (r + i) * kSplit);
    }
    std::memset(part.out, 0, static_cast<size_t>(rows_ * value_width_) * sizeof(A));
    // Where not every row sees every key, a weight of zero hides a value, which may be NaN.
    const bool bare = in_.mask.data == nullptr && in_.bias.data == nullptr;
    const int64_t shared_first = visible_keys(in_, in_.q_len - 1).first - first;
    const int64_t shared_end = smaller(visible_keys(in_, 0).end - first, count);
    for (int64_t t = 0; t < tiles; t++) {
      const int64_t last = t + (count - 1 - t) / tiles * tiles;
      const bool shared = bare && t >= shared_first && last < shared_end;
      each_rows([&](int64_t r, auto rows) {
        const A* weight = weights + r * kSplit + t * kTile;
        const T* const* value = values + t * kTile;
        A* out = part.out + r * value_width_;
        const auto add = rows > 1 && r == 0 ? &Own::template add_values<rows, true>
                                            : &Own::template add_values<rows, false>;
        const T* own[kTile];
        if (shared) {
          add(weight, kSplit, value, value + kTile, out, value_width_);
        } else if (Own::template seen_alike<rows>(weight, kSplit, value, zeros, own)) {
          add(weight, kSplit, own, value + kTile, out, value_width_);
        } else {
          Own::template add_seen_values<rows>(weight, kSplit, value, out, value_width_);
        }
      });
    }
  }

  // Adds the parts in their order, and a sink where there is one.
  void combine(A* memory, int64_t count) const {
    const int64_t stride = Part<A>::size(rows_, value_width_);
    Scratch scratch;
    A* sums = scratch.take<A>(value_width_);
    const Target out = sequence(args_.out, in_.index, 0);
    for (int64_t r = 0; r < rows_; r++) {
      const A sink =
          in_.sinks == nullptr ? minus_infinity<A> : static_cast<A>(in_.sinks[head(r)] * kLog2e);
      A top = sink;
      for (int64_t s = 0; s < count; s++) {
        const A own = Part<A>(memory + s * stride, rows_, value_width_).row_max[r];
        if (own > top || own != own) top = own;
      }
      A total = sink == minus_infinity<A> ? A{0} : std::exp2(sink - top);
      for (int64_t c = 0; c < value_width_; c++) sums[c] = 0;
      for (int64_t s = 0; s < count; s++) {
        const Part<A> part(memory + s * stride, rows_, value_width_);
        if (part.row_max[r] == minus_infinity<A>) continue;
        const A factor = std::exp2(part.row_max[r] - top);
        total += part.row_sum[r] * factor;
        const A* from = part.out + r * value_width_;
        for (int64_t c = 0; c < value_width_; c += lanes<A>)
          store(sums + c, load<A>(sums + c) + load<A>(from + c) * factor);
      }
      const A factor = total == 0 ? A{0} : 1 / total;
      T* to = at<T>(out, head(r), r % in_.q_len, 0);
      each_vector<A>(in_.value_dim, [&](int64_t c, auto n) {
        store_count<A>(to + c, load<A>(sums + c) * factor, n);
      });
      if (args_.lse == nullptr) continue;
      static_cast<A*>(args_.lse)[row_number(in_, head(r), r % in_.q_len)] =
          total == 0 ? minus_infinity<A> : static_cast<A>((top + std::log2(total)) * kLn2);
    }
  }

 private:
  int64_t head(int64_t r) const { return key_head_ * group_ + r / in_.q_len; }

  // Calls f(first row, number of rows as a constant) until all rows have been.
  template <class F>
  void each_rows(const F& f) const {
    int64_t r = 0;
    const auto call = [&](auto rows) {
      f(r, rows);
      r += rows;
    };
    while (r + kTileRows <= rows_) call(std::integral_constant<int, kTileRows>{});
    if (r + 2 <= rows_) call(std::integral_constant<int, 2>{});
    if (r < rows_) call(std::integral_constant<int, 1>{});
  }

  // to[j, i] = from[i, j] for i < rows, j < cols.
  static void reorder(const A* from, int64_t rows, int64_t cols, A* to) {
    if (rows % lanes<A> == 0 && cols % lanes<A> == 0)
      return transpose_tile(from, cols, rows, cols, to, rows);
    for (int64_t i = 0; i < rows; i++)
      for (int64_t j = 0; j < cols; j++) to[j * rows + i] = from[i * cols + j];
  }

  void load_queries(Scratch& scratch, A* to) const {
    const A factor = Scores<A>::query_factor(in_);
    for (int64_t i = 0; i < in_.q_len; i++) {
      const Rotation<A> rotation(args_.rotary, scratch, in_.offset + i);
      for (int64_t g = 0; g < group_; g++) {
        A* row = to + (g * in_.q_len + i) * width_;
        rotation.template load<T>(row, in_.query, key_head_ * group_ + g, i, in_.head_dim);
        for (int64_t c = 0; c < in_.head_dim; c++) row[c] *= factor;
        for (int64_t c = in_.head_dim; c < width_; c++) row[c] = 0;
        Own::lay_query(row, width_);
      }
    }
  }

  // The rows at `count` positions of a cache in the order of tiles, and zeros where the last tiles
  // have none. Only rows that are no whole vectors are copied.
  void find(Scratch& scratch, const Source& cache, int64_t cols, int64_t first, int64_t count,
            const T* zeros, const T** rows) const {
    const int64_t tiles = ceil_div(count, kTile);
    int64_t tile = 0, place = 0;
    const auto put = [&](const T* row, int64_t stride, int64_t rest) {
      for (int64_t some; rest > 0; rest -= some) {
        some = smaller(rest, tiles - tile);
        for (int64_t end = tile + some; tile < end; tile++, row += stride)
          rows[tile * kTile + place] = row;
        if (tile < tiles) continue;
        tile = 0;
        place++;
      }
    };
    Walk<T> walk(args_.paging, in_.index, first);
    for (int64_t j = 0; j < count;) {
      const int64_t some = smaller(count - j, walk.left());
      put(walk(cache, key_head_), cache.stride[2], some);
      walk.skip(some);
      j += some;
    }
    const int64_t width = round_up(cols, lanes<A>), step = cache.stride[3];
    if (step != 1 || width != cols) {
      T* copy = scratch.take<T>(count * width);
      for (int64_t j = 0; j < count; j++, copy += width) {
        const T*& row = rows[j % tiles * kTile + j / tiles];
        for (int64_t c = 0; c < width; c++) copy[c] = c < cols ? row[c * step] : T{};
        row = copy;
      }
    }
    put(zeros, 0, tiles * kTile - count);
  }

  const AttentionDecode& args_;
  Attention in_;
  int64_t key_head_, group_, rows_, width_, value_width_;
  Range seen_;
};

template <class T, int Unit>
void decode_in(const AttentionDecode& args) {
  using A = Acc<T>;
  const Attention& in = args.in;
  Scratch scratch;
  const Pieces pieces(scratch, in.batch, [&](int64_t n) {
    return in.kv_heads * DecodeTask<T, Unit>::splits(sequence(in, n));
  });
  const int64_t rows = in.heads / in.kv_heads * in.q_len;
  const int64_t width = round_up(in.value_dim, lanes<A>), size = Part<A>::size(rows, width);
  A* parts = scratch.take<A>(pieces.total() * size);
  parallel_in_order(pieces.total(), [&](int64_t index) {
    const auto [n, piece, count] = pieces[index];
    // All heads of a split come one after the other, for they may share pages of memory.
    const int64_t split = piece / in.kv_heads, h = piece % in.kv_heads,
                  splits = count / in.kv_heads;
    A* part = parts + (pieces.first(n) + h * splits + split) * size;
    DecodeTask<T, Unit>(args, n, h).run(split, Part<A>(part, rows, width));
  });
  parallel(in.batch * in.kv_heads, [&](int64_t index) {
    const int64_t n = index / in.kv_heads, h = index % in.kv_heads;
    const int64_t splits = pieces.count(n) / in.kv_heads;
    DecodeTask<T, Unit>(args, n, h).combine(parts + (pieces.first(n) + h * splits) * size, splits);
  });
}

template <class T>
void decode(const AttentionDecode& args) {
  with_unit<T>([&](auto unit) {
    constexpr int64_t wide = unit * lanes<Acc<T>>;
    if (args.in.head_dim % wide == 0 && args.in.value_dim % wide == 0)
      decode_in<T, unit>(args);
    else
      decode_in<T, 1>(args);
  });
}

// Attention of few queries to the keys of a call: each sequence is a page of its own.
template <class T>
void forward_few(const AttentionForward& args) {
  const Attention& in = args.in;
  Scratch scratch;
  int64_t* pages = scratch.take<int64_t>(in.batch);
  for (int64_t n = 0; n < in.batch; n++) pages[n] = n;
  AttentionDecode own{};
  own.in = in;
  own.key_cache = in.key;
  own.value_cache = in.value;
  own.paging = {pages, 1, in.kv_len, in.batch, {}, {}};
  own.rotary.dtype = in.dtype;
  own.out = args.out;
  own.lse = args.lse;
  decode<T>(own);
}

// Writes new keys, turned to their positions, and values into a cache. Sequences that share a page
// write in their order.
template <class T>
void append(const AttentionAppend& args) {
  using A = Acc<T>;
  constexpr int64_t worth = 16384;  // elements, to wake a thread for
  const int64_t size = args.batch * args.new_len * (args.head_dim + args.value_dim);  // of a head
  const int64_t step = larger(1, worth / larger(1, size));
  parallel(ceil_div(args.kv_heads, step), [&](int64_t task) {
    Scratch scratch;
    A* row = scratch.take<A>(args.head_dim);
    for (int64_t h = task * step; h < smaller((task + 1) * step, args.kv_heads); h++)
      for (int64_t b = 0; b < args.batch; b++) {
        Walk<T> walk(args.paging, b, args.lengths[b]);
        const Source key = sequence(args.key, b, 0), value = sequence(args.value, b, 0);
        for (int64_t j = 0; j < args.new_len; j++, walk.skip(1)) {
          T* to = walk(args.key_cache, h);
          if (args.rotary.pairs == 0) {
            copy_row(to, args.key_cache.stride[3], at<T>(key, h, j, 0), key.stride[3],
                     args.head_dim);
          } else {
            Scratch angles;
            const Rotation<A> rotation(args.rotary, angles, args.lengths[b] + j);
            rotation.template load<T>(row, key, h, j, args.head_dim);
            store_row(to, args.key_cache.stride[3], row, args.head_dim);
          }
          copy_row(walk(args.value_cache, h), args.value_cache.stride[3], at<T>(value, h, j, 0),
                   value.stride[3], args.value_dim);
        }
      }
  });
}

}  // namespace
}  // namespace fastattn::FASTATTN_ISA
