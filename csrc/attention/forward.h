// Attention forward: blocks of queries against blocks of keys, with an online softmax.
#pragma once

#include "attention/panels.h"
#include "attention/rotation.h"
#include "attention/scores.h"

namespace fastattn::FASTATTN_ISA {
namespace {

constexpr int64_t kQueries = 48;  // queries in a block
static_assert(kQueries % Tile<float>::rows == 0);

template <class T, int Unit>
class ForwardTask {
  using A = Acc<T>;

 public:
  ForwardTask(const AttentionForward& args, const Rotary& rotary, int64_t n)
      : in_(sequence(args.in, n)),
        rotary_(rotary),
        out_(sequence(args.out, in_.index, in_.first_query)),
        lse_(static_cast<A*>(args.lse)),
        value_width_(Panels<A, Unit>::padded(in_.value_dim)) {}

  // The rows that another task will read, fetched in `steps` while this one computes: rows far
  // apart are slow to come.
  struct Ahead {
    Fetch<false> queries, keys, values;
    void step() {
      queries.step();
      keys.step();
      values.step();
    }
  };
  Ahead ahead(int64_t key_head, int64_t first, int64_t end, int64_t steps) const {
    constexpr int64_t size = sizeof(T);
    const auto rows = [&](const Source& from, int64_t h, int64_t i, int64_t count, int64_t width) {
      if (from.stride[3] != 1) return Fetch<false>();
      return Fetch<false>(at<T>(from, h, i, 0), from.stride[2] * size, count, width * size, steps);
    };
    const Range keys = visible_keys(in_, first, end - first);
    const int64_t queries = end - first, count = larger(0, keys.end - keys.first);
    const int64_t elements = (queries + count) * in_.head_dim + count * in_.value_dim;
    if (elements * size > cache_bytes() / 4) return {};
    return {rows(in_.query, key_head * (in_.heads / in_.kv_heads), first, queries, in_.head_dim),
            rows(in_.key, key_head, keys.first, count, in_.head_dim),
            rows(in_.value, key_head, keys.first, count, in_.value_dim)};
  }

  // The queries [first, end) of every head that shares one key head.
  void run(int64_t key_head, int64_t first, int64_t end, Ahead ahead) const {
    const Range keys = visible_keys(in_, first, end - first);
    // Blocks of keys begin at multiples of kKeys wherever the queries were split, so that sums do
    // not depend on the number of threads.
    const int64_t start = keys.first / kKeys * kKeys;
    const int64_t key_count = larger(0, keys.end - start);
    Scratch scratch;
    A* packed_keys = scratch.take<A>(packed_key_size<A, Unit>(key_count, in_.head_dim));
    const auto values = Panels<A, Unit>::take(scratch, key_count, in_.value_dim);
    const T* value = at<T>(in_.value, key_head, start, 0);
    pack_keys<Unit>(packed_keys, at<T>(in_.key, key_head, start, 0), in_.key.stride[2],
                    in_.key.stride[3], key_count, in_.head_dim);
    values.pack(value, in_.value.stride[2], in_.value.stride[3], key_count);
    const bool finite =
        !can_hide(in_) ||
        all_finite<A>(value, in_.value.stride[2], in_.value.stride[3], key_count, in_.value_dim);
    const Keys packed{
        packed_keys,           values, finite, start, scratch.take<A>(kQueries * kKeys),
        scratch.take<A>(kKeys)};
    // Keys that are far from any core are read once for several blocks of queries.
    const int64_t bytes = key_count * (in_.head_dim + value_width_) * int64_t{sizeof(A)} / Unit;
    const int64_t together = bytes > kFar ? kTogether : 1;
    Block blocks[kTogether];
    for (int64_t b = 0; b < together; b++) blocks[b] = Block(*this, scratch);
    const int64_t group = in_.heads / in_.kv_heads;
    for (int64_t h = key_head * group; h < (key_head + 1) * group; h++) {
      const Scores<A> scores(in_, h);
      for (int64_t i = first; i < end; i += together * kQueries) {
        const int64_t used = smaller(together, ceil_div(end - i, kQueries));
        for (int64_t b = 0; b < used; b++)
          begin(blocks[b], h, i + b * kQueries, smaller(kQueries, end - i - b * kQueries));
        const Range seen = visible_keys(in_, i, smaller(together * kQueries, end - i));
        for (int64_t j = start + (seen.first - start) / kKeys * kKeys; j < seen.end; j += kKeys)
          for (int64_t b = 0; b < used; b++) meet(blocks[b], scores, packed, j, ahead);
        for (int64_t b = 0; b < used; b++) finish(blocks[b], h);
      }
    }
  }

 private:
  static constexpr int64_t kTogether = 4, kFar = int64_t{2} << 20;

  // Keys and values of a task, and where the weights that a block of queries gives some are made.
  struct Keys {
    const A* keys;
    const Panels<A, Unit>& values;
    bool finite;
    int64_t start;
    A *weights, *factors;
  };

  // Queries [first, first + count) of a head, and what the keys so far have made of them.
  struct Block {
    int64_t first, count;
    Range seen;
    Fetch<true> written;
    A *query, *out, *row_max, *row_sum;

    Block() = default;
    Block(const ForwardTask& task, Scratch& scratch)
        : query(scratch.take<A>(kQueries * task.in_.head_dim + kSlack)),
          out(scratch.take<A>(kQueries * task.value_width_)),
          row_max(scratch.take<A>(kQueries)),
          row_sum(scratch.take<A>(kQueries)) {}
    int64_t padded() const { return round_up(count, Tile<A>::rows); }
  };

  void begin(Block& block, int64_t h, int64_t i, int64_t count) const {
    block.first = i, block.count = count, block.seen = visible_keys(in_, i, count);
    load_queries(block.query, h, i, count);
    std::memset(block.out, 0, static_cast<size_t>(block.padded() * value_width_) * sizeof(A));
    for (int64_t r = 0; r < count; r++) {
      block.row_max[r] =
          in_.sinks == nullptr ? minus_infinity<A> : static_cast<A>(in_.sinks[h] * kLog2e);
      block.row_sum[r] = block.row_max[r] > minus_infinity<A> ? A{1} : A{0};
    }
    constexpr int64_t size = sizeof(T);
    block.written = Fetch<true>(at<T>(out_, h, i, 0), out_.stride[2] * size, count,
                                in_.value_dim * size, block.padded() / Tile<A>::rows);
  }

  void load_queries(A* packed, int64_t h, int64_t i, int64_t count) const {
    const A factor = Scores<A>::query_factor(in_);
    if (Unit == 2 || rotary_.pairs == 0)
      return pack_rows<Unit>(packed, at<T>(in_.query, h, i, 0), in_.query.stride[2],
                             in_.query.stride[3], count, in_.head_dim, factor);
    Scratch scratch;
    A* rows = scratch.take<A>(count * in_.head_dim);
    for (int64_t r = 0; r < count; r++) {
      Scratch angles;
      const Rotation<A> rotation(rotary_, angles, in_.offset + i + r);
      rotation.template load<T>(rows + r * in_.head_dim, in_.query, h, i + r, in_.head_dim);
    }
    pack_rows<1>(packed, rows, in_.head_dim, 1, count, in_.head_dim, factor);
  }

  // Adds what the queries see of keys j to j + kKeys.
  void meet(Block& block, const Scores<A>& scores, const Keys& from, int64_t j,
            Ahead& ahead) const {
    const auto [first, end] = block.seen;
    if (j >= end || j + kKeys <= first) return;
    const int64_t i = block.first, key_count = smaller(kKeys, end - j), at_key = j - from.start;
    multiply_block<A, Unit>(in_, block.query, from.keys + at_key * ceil_div(in_.head_dim, Unit),
                            in_.head_dim, i, block.count, j, key_count, from.weights,
                            Scores<A>::query_factor(in_));
    for (int64_t r = 0; r < block.count; r += lanes<A>)
      soften(block, from, scores, r, smaller(lanes<A>, block.count - r), j, key_count, ahead);
    const auto multiply =
        from.finite ? &multiply_panels<A, Unit, kKeys, 1> : &multiply_visible<A, Unit, kKeys, 1>;
    multiply(from.weights, block.padded(), from.values, at_key,
             Depths<A>::seen(in_, i, block.count, j, key_count), block.out, value_width_);
  }

  void finish(const Block& block, int64_t h) const {
    const int64_t i = block.first;
    A* lse = lse_ == nullptr ? nullptr : lse_ + row_number(in_, h, i);
    for (int64_t r = 0; r < block.count; r++) {
      const A total = block.row_sum[r];
      const A factor = total == 0 ? A{0} : 1 / total;
      T* out = at<T>(out_, h, i + r, 0);
      each_vector<A>(in_.value_dim, [&](int64_t c, auto n) {
        store_count<A>(out + c, load<A>(block.out + r * value_width_ + c) * factor, n);
      });
      if (lse == nullptr) continue;
      lse[r] = total == 0 ? minus_infinity<A>
                          : static_cast<A>((block.row_max[r] + std::log2(total)) * kLn2);
    }
  }

  // Some rows of a block: logits to weights relative to the highest logit so far, with what was
  // summed before rescaled to it.
  void soften(Block& block, const Keys& from, const Scores<A>& scores, int64_t first, int64_t count,
              int64_t j, int64_t key_count, Ahead& ahead) const {
    const int64_t i = block.first, width = round_up(key_count, lanes<A>);
    for (int64_t r = first; r < first + count; r++) {
      if (r % Tile<A>::rows == 0) {
        ahead.step();
        block.written.step();
      }
      scores.finish(from.weights + r * kKeys, i + r, j, key_count, width, nullptr);
    }
    A before[lanes<A>], totals[lanes<A>];
    std::memcpy(before, block.row_max + first, static_cast<size_t>(count) * sizeof(A));
    weigh(from.weights + first * kKeys, kKeys, count, width, block.row_max + first, totals);
    for (int64_t r = first; r < first + count; r++) {
      A* row = from.weights + r * kKeys;
      const A old = before[r - first], now = block.row_max[r];
      if (old != now && old != minus_infinity<A>) {
        const A rescale = std::exp2(old - now);
        block.row_sum[r] *= rescale;
        for (int64_t c = 0; c < value_width_; c += lanes<A>) {
          A* out = block.out + r * value_width_ + c;
          store(out, load<A>(out) * rescale);
        }
      }
      block.row_sum[r] += totals[r - first];
      if (in_.dropout_p > 0) {
        scores.dropout(i + r, j, width, from.factors);
        for (int64_t c = 0; c < width; c += lanes<A>)
          store(row + c, load<A>(row + c) * load<A>(from.factors + c));
      }
      if constexpr (Unit == 2) round_row(row, width, row);
    }
  }

  Attention in_;
  const Rotary& rotary_;  // of the queries
  Target out_;
  A* lse_;
  int64_t value_width_;
};

template <class T, int Unit>
void forward_in(const AttentionForward& args, const Rotary& rotary) {
  const Attention& in = args.in;
  const Shares share(in);
  Scratch scratch;
  // Heads are the tasks; where they are few, a head's queries are split, at the price of packing
  // its keys again.
  const Pieces pieces(scratch, in.batch, [&](int64_t n) {
    const int64_t wanted = share(n, int64_t{4} * thread_count(), in.kv_heads);
    const int64_t blocks = ceil_div(sequence(in, n).q_len, kQueries);
    return in.kv_heads * smaller(wanted, ceil_div(blocks, 4));
  });
  struct Place {
    int64_t sequence, key_head, first, end;
  };
  const auto place = [&](int64_t index) -> Place {
    const auto [n, piece, count] = pieces[index];
    const int64_t q_len = sequence(in, n).q_len, blocks = ceil_div(q_len, kQueries);
    const int64_t splits = count / in.kv_heads, split = splits - 1 - piece % splits;  // longest
    return {n, piece / splits, split * blocks / splits * kQueries,                    // first
            smaller((split + 1) * blocks / splits * kQueries, q_len)};
  };
  parallel_in_order(pieces.total(), [&](int64_t index) {
    const auto [n, key_head, first, end] = place(index);
    typename ForwardTask<T, Unit>::Ahead ahead;
    if (index + thread_count() < pieces.total()) {  // most often this thread's next
      const Place next = place(index + thread_count());
      const int64_t steps = in.heads / in.kv_heads * ceil_div(end - first, Tile<Acc<T>>::rows);
      ahead = ForwardTask<T, Unit>(args, rotary, next.sequence)
                  .ahead(next.key_head, next.first, next.end, larger(1, steps));
    }
    ForwardTask<T, Unit>(args, rotary, n).run(key_head, first, end, ahead);
  });
}

template <class T>
void forward(const AttentionForward& args, const Rotary& rotary = {}) {
  if (rotary.pairs > 0) return forward_in<T, 1>(args, rotary);  // pairs would round what is turned
  with_unit<T>([&](auto unit) { forward_in<T, unit>(args, rotary); });
}

}  // namespace
}  // namespace fastattn::FASTATTN_ISA
