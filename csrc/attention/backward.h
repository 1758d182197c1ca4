// Attention backward: scores are computed again, and gradients summed in an order of their own.
#pragma once

#include "attention/panels.h"
#include "attention/scores.h"

namespace fastattn::FASTATTN_ISA {
namespace {

constexpr int64_t kBackwardQueries = 96;  // queries in a block; gradients of keys sum over them
static_assert(kBackwardQueries % Tile<float>::rows == 0);
constexpr int64_t kKeyStep = 48;  // a multiple of a vector and of the tile's rows
static_assert(kKeyStep % Tile<float>::rows == 0 && kKeyStep % lanes<float> == 0);

// The n-th sequence of a batch, as a batch of its own.
inline AttentionBackward sequence(const AttentionBackward& args, int64_t n) {
  AttentionBackward one = args;
  one.in = sequence(args.in, n);
  for (Source* view : {&one.grad_out, &one.out})
    *view = sequence(*view, one.in.index, one.in.first_query);
  one.grad_query = sequence(args.grad_query, one.in.index, one.in.first_query);
  one.grad_key = sequence(args.grad_key, one.in.index, one.in.first_key);
  one.grad_value = sequence(args.grad_value, one.in.index, one.in.first_key);
  return one;
}

// The backward pass of a run of keys. Every task owns its keys' gradients and, where bias
// broadcasts over batch or heads, all that share one slice of its gradient; the gradient of the
// queries is a partial sum per run, added up in order afterwards.
template <class T, int Unit>
class BackwardTask {
  using A = Acc<T>;

 public:
  BackwardTask(const AttentionBackward& args, int64_t n, const A* delta, A* grad_bias,
               bool fresh_bias, A* partial_queries)
      : args_(sequence(args, n)),
        in_(args_.in),
        delta_(delta),
        grad_bias_(grad_bias),
        fresh_bias_(fresh_bias),
        partial_queries_(partial_queries),
        query_width_(Panels<A, Unit>::padded(in_.head_dim)),
        value_width_(Panels<A, Unit>::padded(in_.value_dim)) {
    int64_t stride = 1;
    for (int dim = 3; dim >= 0; dim--) {
      bias_stride_[dim] = args.bias_sizes[dim] == 1 ? 0 : stride;
      stride *= args.bias_sizes[dim];
    }
  }

  // The keys [first, end) of one key head, against all queries; `part` numbers the run.
  void run(int64_t key_head, int64_t first, int64_t end, int64_t part) const {
    const int64_t keys = end - first;
    Scratch scratch;
    Keys block{scratch.take<A>(packed_key_size<A, Unit>(keys, in_.head_dim)),
               scratch.take<A>(packed_key_size<A, Unit>(keys, in_.value_dim)),
               Panels<A, Unit>::take(scratch, keys, in_.head_dim),
               scratch.take<A>(round_up(keys, kKeys) * query_width_),
               scratch.take<A>(round_up(keys, kKeys) * value_width_),
               true};
    const T* key = at<T>(in_.key, key_head, first, 0);
    const T* value = at<T>(in_.value, key_head, first, 0);
    pack_keys<Unit>(block.keys, key, in_.key.stride[2], in_.key.stride[3], keys, in_.head_dim);
    pack_keys<Unit>(block.values, value, in_.value.stride[2], in_.value.stride[3], keys,
                    in_.value_dim);
    block.key_rows.pack(key, in_.key.stride[2], in_.key.stride[3], keys);
    block.finite = !can_hide(in_) ||
                   all_finite<A>(key, in_.key.stride[2], in_.key.stride[3], keys, in_.head_dim);
    std::memset(block.grad_key, 0,
                static_cast<size_t>(round_up(keys, kKeys) * query_width_) * sizeof(A));
    std::memset(block.grad_value, 0,
                static_cast<size_t>(round_up(keys, kKeys) * value_width_) * sizeof(A));
    Queries queries{scratch.take<A>(kBackwardQueries * in_.head_dim + kSlack),
                    scratch.take<A>(kBackwardQueries * in_.value_dim + kSlack),
                    Panels<A, Unit>::take(scratch, kBackwardQueries, in_.head_dim),
                    Panels<A, Unit>::take(scratch, kBackwardQueries, in_.value_dim),
                    scratch.take<A>(kBackwardQueries * query_width_),
                    scratch.take<A>(kBackwardQueries * kKeys),
                    scratch.take<A>(kBackwardQueries * kKeys),
                    scratch.take<A>(Unit == 1 ? 0 : kBackwardQueries * kKeys / Unit),
                    scratch.take<A>(kKeys),
                    scratch.take<A>(kKeys),
                    scratch.take<A>(kBackwardQueries + kKeys),
                    true};
    const int64_t group = in_.heads / in_.kv_heads;
    for (int64_t h = key_head * group; h < (key_head + 1) * group; h++)
      for (int64_t i = 0; i < in_.q_len; i += kBackwardQueries)
        pair(block, queries, h, i, smaller(kBackwardQueries, in_.q_len - i), first, end, part);
    write(args_.grad_key, key_head, first, keys, in_.head_dim, block.grad_key, query_width_,
          static_cast<A>(in_.scale));
    write(args_.grad_value, key_head, first, keys, in_.value_dim, block.grad_value, value_width_,
          A{1});
  }

  static void write(const Target& to, int64_t h, int64_t first, int64_t rows, int64_t cols,
                    const A* from, int64_t from_row, A factor) {
    for (int64_t r = 0; r < rows; r++) {
      T* row = at<T>(to, h, first + r, 0);
      each_vector<A>(cols, [&](int64_t c, auto n) {
        store_count<A>(row + c, load<A>(from + r * from_row + c) * factor, n);
      });
    }
  }

 private:
  struct Keys {
    A *keys, *values;          // B operands of products over head_dim and value_dim
    Panels<A, Unit> key_rows;  // B operand of products over keys
    A *grad_key, *grad_value;
    bool finite;
  };
  struct Queries {
    A *query, *grad_out;  // A operands of products over head_dim and value_dim
    Panels<A, Unit> query_rows, grad_out_rows;  // B operands of products over queries
    A* grad_query;
    A *weights, *grads;  // [kBackwardQueries, kKeys]
    A* paired_grads;     // [kBackwardQueries, kKeys / Unit], where they lie in pairs along a row
    A *factors, *cap_slope;
    A* diagonals;  // sums of grads, one for each distance of key and query
    bool finite;
  };

  void pair(const Keys& keys, Queries& queries, int64_t h, int64_t i, int64_t count, int64_t first,
            int64_t end, int64_t part) const {
    const Scores<A> scores(in_, h);
    const Range seen = visible_keys(in_, i, count);
    const int64_t begin = larger(first, seen.first), stop = smaller(end, seen.end);
    const int64_t padded = round_up(count, Tile<A>::rows);
    std::memset(queries.grad_query, 0, static_cast<size_t>(padded * query_width_) * sizeof(A));
    if (begin < stop) {
      const T* query = at<T>(in_.query, h, i, 0);
      const T* grad_out = at<T>(args_.grad_out, h, i, 0);
      const int64_t* q = in_.query.stride;
      const int64_t* g = args_.grad_out.stride;
      pack_rows<Unit>(queries.query, query, q[2], q[3], count, in_.head_dim,
                      Scores<A>::query_factor(in_));
      pack_rows<Unit>(queries.grad_out, grad_out, g[2], g[3], count, in_.value_dim, A{1});
      queries.query_rows.pack(query, q[2], q[3], count);
      queries.grad_out_rows.pack(grad_out, g[2], g[3], count);
      queries.finite =
          !can_hide(in_) || (all_finite<A>(query, q[2], q[3], count, in_.head_dim) &&
                             all_finite<A>(grad_out, g[2], g[3], count, in_.value_dim));
      for (int64_t j = first + (begin - first) / kKeys * kKeys; j < stop; j += kKeys)
        key_block(keys, queries, scores, h, i, count, first, j, smaller(kKeys, stop - j));
    }
    if (partial_queries_ == nullptr) {
      write(args_.grad_query, h, i, count, in_.head_dim, queries.grad_query, query_width_,
            static_cast<A>(in_.scale));
    } else {
      A* to = partial_queries_ + (part * in_.rows + row_number(in_, h, i)) * query_width_;
      std::memcpy(to, queries.grad_query, static_cast<size_t>(count * query_width_) * sizeof(A));
    }
  }

  void key_block(const Keys& keys, const Queries& queries, const Scores<A>& scores, int64_t h,
                 int64_t i, int64_t count, int64_t first, int64_t j, int64_t key_count) const {
    const int64_t at_key = j - first;
    multiply_block<A, Unit>(in_, queries.query, keys.keys + at_key * ceil_div(in_.head_dim, Unit),
                            in_.head_dim, i, count, j, key_count, queries.weights,
                            Scores<A>::query_factor(in_));
    multiply_block<A, Unit>(in_, queries.grad_out,
                            keys.values + at_key * ceil_div(in_.value_dim, Unit), in_.value_dim, i,
                            count, j, key_count, queries.grads, A{1});
    const int64_t width = round_up(key_count, kKeyStep);
    const int64_t row0 = row_number(in_, h, i);
    const auto* lse = static_cast<const A*>(args_.lse) + row0;
    const bool sums_diagonals = grad_bias_ != nullptr && args_.relative_bias;
    if (sums_diagonals)
      std::memset(queries.diagonals, 0, size_t{kBackwardQueries + kKeys} * sizeof(A));
    for (int64_t r = 0; r < count; r++) {
      A* weights = queries.weights + r * kKeys;
      A* grads = queries.grads + r * kKeys;
      scores.finish(weights, i + r, j, key_count, width,
                    in_.softcap != 0 ? queries.cap_slope : nullptr);
      if (in_.dropout_p > 0) scores.dropout(i + r, j, width, queries.factors);
      differentiate(queries, width, weights, grads, lse[r], delta_[row0 + r]);
      if (sums_diagonals)
        add(queries.diagonals + count - 1 - r, grads, key_count);
      else if (grad_bias_ != nullptr)
        add_bias(grads, h, i + r, j, key_count);
      if (in_.softcap != 0)
        for (int64_t c = 0; c < width; c += lanes<A>) {
          const Vec<A> grad = load<A>(grads + c);
          store(grads + c, grad == 0 ? grad : grad * load<A>(queries.cap_slope + c));
        }
      if constexpr (Unit == 2) {
        if (r % 2 == 1 || r + 1 == count) make_pairs(queries, r / 2 * 2, count, width);
      }
    }
    if (sums_diagonals)
      add(bias_gradient(h) + j - (i + count - 1) + in_.q_len - 1, queries.diagonals,
          count + key_count - 1);
    const int64_t rows = round_up(count, Tile<A>::rows);
    const int64_t key_rows = round_up(key_count, Tile<A>::rows);
    constexpr int64_t row_size = kKeys / Unit;
    A* of_rows = Unit == 1 ? queries.grads : queries.paired_grads;
    std::memset(of_rows + count * row_size, 0,  // the last tile reads rows past the end
                static_cast<size_t>((rows - count) * row_size) * sizeof(A));
    const auto of_queries = keys.finite ? &multiply_panels<A, Unit, row_size, 1>
                                        : &multiply_visible<A, Unit, row_size, 1>;
    of_queries(of_rows, rows, keys.key_rows, at_key, Depths<A>::seen(in_, i, count, j, key_count),
               queries.grad_query, query_width_);
    const auto of_keys = queries.finite ? &multiply_panels<A, Unit, 1, kKeys * Unit>
                                        : &multiply_visible<A, Unit, 1, kKeys * Unit>;
    const auto seeing = Depths<A>::seeing(in_, i, count, j, key_count);
    of_keys(queries.grads, key_rows, queries.query_rows, 0, seeing,
            keys.grad_key + at_key * query_width_, query_width_);
    of_keys(queries.weights, key_rows, queries.grad_out_rows, 0, seeing,
            keys.grad_value + at_key * value_width_, value_width_);
  }

  // Rows r and r + 1 of weights and gradients as operands: pairs along the rows, for the gradients
  // of queries, and pairs of rows in the place of the first, for those of keys and values.
  static void make_pairs(const Queries& queries, int64_t r, int64_t count, int64_t width) {
    for (A* rows : {queries.weights, queries.grads}) {
      A *first = rows + r * kKeys, *second = first + kKeys;
      if (r + 1 == count) std::memset(second, 0, static_cast<size_t>(width) * sizeof(A));
      if (rows == queries.grads) {
        round_row(first, width, queries.paired_grads + r * kKeys / 2);
        round_row(second, width, queries.paired_grads + (r + 1) * kKeys / 2);
      }
      for (int64_t c = 0; c < width; c += lanes<A>)
        store(first + c, round_pairs(load<A>(first + c), load<A>(second + c)));
    }
  }

  // One row: logits become the weights that met the values, and gradients of weights those of
  // scores: weight * (grad - delta).
  void differentiate(const Queries& queries, int64_t width, A* weights, A* grads, A lse,
                     A delta) const {
    const A base = static_cast<A>(lse * static_cast<A>(kLog2e));
    const bool empty = lse == minus_infinity<A>;
    for (int64_t c = 0; c < width; c += lanes<A>) {
      Vec<A> weight = empty ? Vec<A>{} : exp2_nonpositive(load<A>(weights + c) - base);
      const Vec<A> grad = load<A>(grads + c);
      Vec<A> factor = set<A>(1);
      if (in_.dropout_p > 0) factor = load<A>(queries.factors + c);
      store(grads + c, weight == 0 ? Vec<A>{} : weight * (grad * factor - delta));
      store(weights + c, weight * factor);
    }
  }

  static void add(A* to, const A* from, int64_t count) {
    each_vector<A>(count, [&](int64_t c, auto n) {
      store_count<A>(to + c, load_count<A>(to + c, n) + load_count<A>(from + c, n), n);
    });
  }

  A* bias_gradient(int64_t h) const {
    return grad_bias_ + in_.index * bias_stride_[0] + h * bias_stride_[1];
  }

  void add_bias(const A* grads, int64_t h, int64_t i, int64_t j, int64_t key_count) const {
    A* to = bias_gradient(h) + i * bias_stride_[2] + j * bias_stride_[3];
    if (bias_stride_[3] == 1) {
      const A* later = to + kRowsAhead * bias_stride_[2];
      each_vector<A>(key_count, [&](int64_t c, auto n) {
        __builtin_prefetch(later + c, 1);
        const Vec<A> grad = load_count<A>(grads + c, n);
        store_count<A>(to + c, fresh_bias_ ? grad : grad + load_count<A>(to + c, n), n);
      });
    } else {
      A total = fresh_bias_ ? A{0} : *to;
      for (int64_t c = 0; c < key_count; c++) total += grads[c];
      *to = total;
    }
  }

  AttentionBackward args_;
  const Attention& in_;
  const A* delta_;
  A* grad_bias_;
  bool fresh_bias_;  // nothing has been added to it yet
  A* partial_queries_;
  int64_t query_width_, value_width_;
  int64_t bias_stride_[4];
};

// delta[row] = grad_out . out - grad_lse: what the normalisation of a softmax row takes off.
template <class T, class A = Acc<T>>
void row_deltas(const AttentionBackward& args, A* delta) {
  const int64_t heads = args.in.heads;
  parallel(args.in.batch * heads, [&](int64_t task) {
    const AttentionBackward own = sequence(args, task / heads);
    const int64_t h = task % heads, first = row_number(own.in, h, 0);
    const auto* grad_lse = static_cast<const A*>(args.grad_lse);
    for (int64_t i = 0; i < own.in.q_len; i++) {
      const T* grad = at<T>(own.grad_out, h, i, 0);
      const T* out = at<T>(own.out, h, i, 0);
      const int64_t g = args.grad_out.stride[3], o = args.out.stride[3];
      A total = 0;
      if (g == 1 && o == 1) {
        Vec<A> sums{};
        each_vector<A>(args.in.value_dim, [&](int64_t c, auto n) {
          sums += load_count<A>(grad + c, n) * load_count<A>(out + c, n);
        });
        total = sum<A>(sums);
      } else {
        for (int64_t c = 0; c < args.in.value_dim; c++)
          total += load_one<A>(grad + c * g) * load_one<A>(out + c * o);
      }
      delta[first + i] = total - (grad_lse == nullptr ? A{0} : grad_lse[first + i]);
    }
  });
}

template <class T, class A = Acc<T>>
void sink_gradients(const AttentionBackward& args, const A* delta) {
  const Attention& in = args.in;
  const auto* lse = static_cast<const A*>(args.lse);
  for (int64_t h = 0; h < in.heads; h++) {
    double total = 0;
    for (int64_t n = 0; n < in.batch; n++) {
      const Attention own = sequence(in, n);
      const int64_t first = row_number(own, h, 0);
      for (int64_t row = first; row < first + own.q_len; row++)
        if (lse[row] != minus_infinity<A>) total -= std::exp(in.sinks[h] - lse[row]) * delta[row];
    }
    args.grad_sinks[h] = total;
  }
}

// Where the gradient of the bias is added up: in its own memory, if that is of the type of sums. A
// relative bias has one sum for each run of keys, since the diagonals of several runs meet.
template <class A>
struct BiasGradient {
  A* sums = nullptr;
  int64_t size = 1, runs = 1;
  bool fresh = false;  // what comes first is every element's, and is stored, not added

  BiasGradient(const AttentionBackward& args, int64_t most_runs, Scratch& scratch) {
    if (args.grad_bias == nullptr) return;
    const Attention& in = args.in;
    for (const int64_t count : args.bias_sizes) size *= count;
    if (args.relative_bias) runs = most_runs;
    sums = in_place(in) ? static_cast<A*>(args.grad_bias) : scratch.take<A>(runs * size);
    fresh = !args.relative_bias && args.bias_sizes[1] == in.heads &&
            args.bias_sizes[2] == in.q_len && args.bias_sizes[3] == in.kv_len &&
            in.left >= kUnbounded && in.right >= kUnbounded;
    if (fresh) return;
    in_parts(runs * size, [&](int64_t first, int64_t count) {
      std::memset(sums + first, 0, static_cast<size_t>(count) * sizeof(A));
    });
  }

  A* of_run(int64_t run) const { return runs > 1 ? sums + run * size : sums; }

  // Adds the runs' sums in order, and rounds them to the bias's type.
  void write(const AttentionBackward& args) const {
    if (sums == nullptr || in_place(args.in)) return;
    in_parts(size, [&](int64_t first, int64_t count) {
      for (int64_t run = 1; run < runs; run++)
        each_vector<A>(count, [&](int64_t c, auto n) {
          A* to = sums + first + c;
          store_count<A>(to, load_count<A>(to, n) + load_count<A>(to + run * size, n), n);
        });
    });
    with_type(args.in.bias_dtype, [&](auto* type) {
      using B = std::remove_pointer_t<decltype(type)>;
      auto* to = static_cast<B*>(args.grad_bias);
      in_parts(size, [&](int64_t first, int64_t count) {
        if constexpr (std::is_same_v<Acc<B>, A>) {
          each_vector<A>(count, [&](int64_t c, auto n) {
            store_count<A>(to + first + c, load_count<A>(sums + first + c, n), n);
          });
        } else if constexpr (std::is_same_v<B, float>) {  // fp32 bias of fp64 attention
          for (int64_t c = first; c < first + count; c++) to[c] = static_cast<float>(sums[c]);
        }
      });
    });
  }

 private:
  bool in_place(const Attention& in) const {
    return runs == 1 && in.bias_dtype == (std::is_same_v<A, double> ? Dtype::f64 : Dtype::f32);
  }

  template <class F>
  static void in_parts(int64_t size, const F& f) {
    constexpr int64_t part = 1 << 18;
    parallel(ceil_div(size, part), [&](int64_t n) { f(n * part, smaller(part, size - n * part)); });
  }
};

template <class T, int Unit>
void backward_in(const AttentionBackward& args) {
  using A = Acc<T>;
  const Attention& in = args.in;
  const bool bias = args.grad_bias != nullptr;
  const int64_t batches = bias && args.bias_sizes[0] == 1 ? 1 : in.batch;
  const int64_t heads = bias && args.bias_sizes[1] == 1 ? 1 : in.kv_heads;
  const int64_t query_width = Panels<A, Unit>::padded(in.head_dim);

  Scratch scratch;
  // The runs of keys depend on the shape alone, so that sums do not depend on the threads.
  const Shares share(in);
  int64_t most_runs = 1;
  const Pieces pieces(scratch, batches, [&](int64_t n) {
    const int64_t blocks = ceil_div(sequence(in, n).kv_len, kKeys);
    const int64_t wanted = share(n, 16 * in.batch, batches * heads);
    const bool one = bias && args.bias_sizes[3] == 1;
    const int64_t runs = one ? 1 : larger(1, smaller(wanted, ceil_div(blocks, 2)));
    most_runs = larger(most_runs, runs);
    return heads * runs;
  });
  A* delta = scratch.take<A>(in.rows);
  A* partial = most_runs > 1 ? scratch.take<A>(most_runs * in.rows * query_width) : nullptr;
  const BiasGradient<A> grad_bias(args, most_runs, scratch);
  row_deltas<T>(args, delta);
  if (args.grad_sinks != nullptr) sink_gradients<T>(args, delta);
  parallel_in_order(pieces.total(), [&](int64_t index) {
    const auto [batch, piece, count] = pieces[index];
    const int64_t runs = count / heads, part = piece % runs;
    const int64_t kv_len = sequence(in, batch).kv_len, blocks = ceil_div(kv_len, kKeys);
    const int64_t first = part * blocks / runs * kKeys;
    const int64_t end = smaller((part + 1) * blocks / runs * kKeys, kv_len);
    for (int64_t n = batch; n < in.batch; n += batches) {
      const BackwardTask<T, Unit> task(args, n, delta, grad_bias.of_run(part),
                                       grad_bias.fresh && n == batch, runs > 1 ? partial : nullptr);
      for (int64_t h = piece / runs; h < in.kv_heads; h += heads) task.run(h, first, end, part);
    }
  });
  if (partial != nullptr)
    parallel(in.batch * in.heads, [&](int64_t index) {
      const int64_t n = index / in.heads, h = index % in.heads;
      const int64_t runs = pieces.count(n % batches) / heads;
      if (runs == 1) return;
      const AttentionBackward own = sequence(args, n);
      A* to = partial + row_number(own.in, h, 0) * query_width;
      for (int64_t part = 1; part < runs; part++) {
        const A* from = to + part * in.rows * query_width;
        each_vector<A>(own.in.q_len * query_width, [&](int64_t c, auto width) {
          store_count<A>(to + c, load_count<A>(to + c, width) + load_count<A>(from + c, width),
                         width);
        });
      }
      BackwardTask<T, Unit>::write(own.grad_query, h, 0, own.in.q_len, in.head_dim, to, query_width,
                                   static_cast<A>(in.scale));
    });
  grad_bias.write(args);
}

template <class T>
void backward(const AttentionBackward& args) {
  with_unit<T>([&](auto unit) { backward_in<T, unit>(args); });
}

}  // namespace
}  // namespace fastattn::FASTATTN_ISA
