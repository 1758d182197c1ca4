// Additive attention of many queries: panels of keys whose features stay in cache, an online
// softmax.
#pragma once

#include "additive_attention/head.h"

namespace fastattn::FASTATTN_ISA {
namespace {

constexpr int kVecs = 2;  // vectors of keys side by side, so that divisions overlap
template <class A>
constexpr int64_t kPanel = kVecs * lanes<A>;  // keys in a panel
constexpr int64_t kQueries = 64;              // queries that packed keys serve in the forward pass
static_assert(kKeys % kPanel<float> == 0 && kKeys % kPanel<double> == 0);

// tanh(q + k) = (e^2q e^2k - 1) / (e^2q e^2k + 1), so that a pair costs a division and a query or a
// key one exponential. Past this bound their product leaves the range of fp32, and tanh is taken of
// the sum.
constexpr double kTame = 20;

template <bool Tame, class A>
FASTATTN_INLINE Vec<A> activation(A query, Vec<A> key) {
  if constexpr (Tame) {
    return divide(query * key - 1, query * key + 1);
  } else {
    return tanh(key + query);
  }
}

// scores[c] += the sum over depth of weight * activation for a panel [depth, kPanel] of keys; where
// it was -inf it stays, even beside a NaN. The activations are kept for the backward pass.
template <bool Tame, bool Keep, class A>
__attribute__((noinline)) void add_scores(const A* query, const A* keys, const A* weight,
                                          int64_t depth, A* scores, A* activations) {
  for (int64_t start = 0; start < depth; start += kChain) {
    Vec<A> sums[kVecs] = {};
    for (int64_t d = start; d < smaller(start + kChain, depth); d++)
#pragma GCC unroll 4
      for (int v = 0; v < kVecs; v++) {
        const int64_t at = d * kPanel<A> + v * lanes<A>;
        const Vec<A> t = activation<Tame>(query[d], load<A>(keys + at));
        if constexpr (Keep) store(activations + at, t);
        sums[v] += weight[d] * t;
      }
#pragma GCC unroll 4
    for (int v = 0; v < kVecs; v++) {
      const Vec<A> before = load<A>(scores + v * lanes<A>);
      store(scores + v * lanes<A>, before == minus_infinity<A> ? before : before + sums[v]);
    }
  }
}

// to[c] += the sum over count of factors * rows for a panel [count, kPanel]; a factor of zero hides
// even a NaN.
template <class A>
void add_rows(const A* factors, const A* rows, int64_t count, A* to) {
  Vec<A> sums[kVecs] = {};
  for (int64_t k = 0; k < count; k++) {
    if (factors[k] == 0) continue;
#pragma GCC unroll 4
    for (int v = 0; v < kVecs; v++)
      sums[v] += factors[k] * load<A>(rows + k * kPanel<A> + v * lanes<A>);
  }
#pragma GCC unroll 4
  for (int v = 0; v < kVecs; v++) store(to + v * lanes<A>, load<A>(to + v * lanes<A>) + sums[v]);
}

// Panels [rows, kPanel] from + row * row_stride + col * col_stride, one for every kPanel columns.
template <class A, class T>
void pack_panels(A* to, const T* from, int64_t row_stride, int64_t col_stride, int64_t rows,
                 int64_t cols) {
  for (int64_t col = 0; col < cols; col += kPanel<A>)
    pack_panel(to + col * rows, kPanel<A>, from + col * col_stride, col_stride, row_stride,
               smaller(kPanel<A>, cols - col), rows);
}

// A head whose keys are packed.
template <class T, class A = Acc<T>>
struct PanelHead : Head<T> {
  using Head<T>::in, Head<T>::b, Head<T>::h, Head<T>::weight, Head<T>::read, Head<T>::key_end;
  bool tame;  // of the whole head, so that the same formula serves it however it is split

  PanelHead(const AdditiveAttention& in, int64_t head, Scratch& scratch)
      : Head<T>(in, head, scratch),
        tame(is_tame(in.query, in.q_len, scratch) && is_tame(in.key, in.kv_len, scratch)) {}

  bool is_tame(const Source& from, int64_t rows, Scratch& scratch) const {
    A* copy = scratch.take<A>(in.head_dim);
    Vec<A> wild{};
    for (int64_t i = 0; i < rows; i++) {
      const A* row = this->row(from, i, in.head_dim, copy);
      each_vector<A>(in.head_dim, [&](int64_t c, auto n) {
        const Vec<A> x = load_count<A>(row + c, n);
        wild = (x < 0 ? -x : x) <= static_cast<A>(kTame) ? wild : set<A>(1);
      });
    }
    return highest<A>(wild) == 0;
  }

  // What `activation` takes of features.
  void prepare(A* features, int64_t count) const {
    if (tame)
      each_vector<A>(count, [&](int64_t c, auto n) {
        store_count<A>(features + c, exp(2 * load_count<A>(features + c, n)), n);
      });
  }
  void read_query(A* to, int64_t i) const {
    read(to, in.query, i, in.head_dim);
    prepare(to, in.head_dim);
  }
  // Panels [D, kPanel] of the keys j ... j + count.
  void read_keys(A* to, int64_t j, int64_t count) const {
    const int64_t* stride = in.key.stride;
    pack_panels(to, at<T>(sequence(in.key, b), h, j, 0), stride[3], stride[2], in.head_dim, count);
    prepare(to, round_up(count, kPanel<A>) * in.head_dim);
  }

  // The scores of query i and the panel of keys j ... j + kPanel, -inf where it does not see them.
  // False where it sees none, and nothing is computed.
  bool score(const A* query, int64_t i, int64_t j, const A* keys, A* scores, A* activations) const {
    bool any = false;
    for (int64_t c = 0; c < kPanel<A>; c++) {
      const bool seen = this->sees(i, j + c);
      scores[c] = seen ? A{0} : minus_infinity<A>;
      any = any || seen;
    }
    if (!any) return false;
    const auto add =
        tame ? activations == nullptr ? &add_scores<true, false, A> : &add_scores<true, true, A>
        : activations == nullptr ? &add_scores<false, false, A>
                                 : &add_scores<false, true, A>;
    add(query, keys, weight, in.head_dim, scores, activations);
    return true;
  }
};

template <class T>
void forward_in_panels(const AdditiveForward& args) {
  using A = Acc<T>;
  const AdditiveAttention& in = args.in;
  const int64_t blocks = ceil_div(in.q_len, kQueries);
  const int64_t depth = in.head_dim, width = round_up(in.value_dim, kPanel<A>);
  parallel(in.batch * in.heads * blocks, [&](int64_t task) {
    Scratch scratch;
    const PanelHead<T> head(in, task / blocks, scratch);
    const int64_t first = task % blocks * kQueries;
    const int64_t count = smaller(kQueries, in.q_len - first);
    A* queries = scratch.take<A>(count * depth);
    A* keys = scratch.take<A>(kKeys * depth + kSlack);
    A* values = scratch.take<A>(kKeys * width + kSlack);
    A* weights = scratch.take<A>(kKeys);
    A* out = scratch.take<A>(count * width);
    A* row_max = scratch.take<A>(count);
    A* row_sum = scratch.take<A>(count);
    clear(out, count * width);
    for (int64_t r = 0; r < count; r++) {
      head.read_query(queries + r * depth, first + r);
      row_max[r] = minus_infinity<A>;
      row_sum[r] = 0;
    }
    const int64_t end = head.key_end(first + count - 1);
    for (int64_t j = 0; j < end; j += kKeys) {
      const int64_t key_count = smaller(kKeys, end - j), padded = round_up(key_count, kPanel<A>);
      head.read_keys(keys, j, key_count);
      const int64_t* stride = in.value.stride;
      pack_panels(values, at<T>(sequence(in.value, head.b), head.h, j, 0), stride[2], stride[3],
                  key_count, in.value_dim);
      for (int64_t r = 0; r < count; r++) {
        bool any = false;
        for (int64_t c = 0; c < padded; c += kPanel<A>)
          any |= head.score(queries + r * depth, first + r, j + c, keys + c * depth, weights + c,
                            nullptr);
        if (!any) continue;
        // Scores become weights relative to the highest so far, and what was summed is rescaled.
        Vec<A> top = set<A>(row_max[r]), sums[kVecs] = {};
        for (int64_t c = 0; c < padded; c += lanes<A>) top = max(top, load<A>(weights + c));
        const A before = row_max[r], now = highest<A>(top);
        for (int64_t c = 0; c < padded; c += kPanel<A>)
#pragma GCC unroll 4
          for (int v = 0; v < kVecs; v++) {
            A* at = weights + c + v * lanes<A>;
            const Vec<A> weight = relative(load<A>(at), now);
            sums[v] += weight;
            store(at, weight);
          }
        if (before < now && before > minus_infinity<A>) {
          const A rescale = std::exp(before - now);
          row_sum[r] *= rescale;
          for (int64_t c = 0; c < width; c++) out[r * width + c] *= rescale;
        }
        row_max[r] = now;
        for (const Vec<A> part : sums) row_sum[r] += sum<A>(part);
        for (int64_t c = 0; c < width; c += kPanel<A>)
          add_rows(weights, values + c * key_count, key_count, out + r * width + c);
      }
    }
    const int64_t row = task / blocks * in.q_len + first;
    for (int64_t r = 0; r < count; r++) {
      const A total = row_sum[r];
      static_cast<A*>(args.highest)[row + r] = total == 0 ? A{0} : row_max[r];
      static_cast<A*>(args.total)[row + r] = total;
      for (int64_t c = 0; c < width; c++) out[r * width + c] *= total == 0 ? A{0} : 1 / total;
      head.write(args.out, first + r, out + r * width, in.value_dim, nullptr);
    }
  });
}

// The gradients of a run of keys, and what it adds to those of the queries and of the weight.
template <class T>
class PanelBackward {
  using A = Acc<T>;

 public:
  PanelBackward(const AdditiveBackward& args, int64_t head, Scratch& scratch)
      : args_(args),
        in_(args.in),
        head_(in_, head, scratch),
        keys_(scratch.take<A>(kKeys * in_.head_dim + kSlack)),
        values_(scratch.take<A>(kKeys * in_.value_dim + kSlack)),
        grad_keys_(scratch.take<A>(kKeys * in_.head_dim)),
        grad_values_(scratch.take<A>(kKeys * in_.value_dim)),
        key_totals_(scratch.take<A>(kKeys * in_.head_dim)),
        value_totals_(scratch.take<A>(kKeys * in_.value_dim)),
        query_(scratch.take<A>(in_.head_dim)),
        grad_out_(scratch.take<A>(in_.value_dim)),
        out_(scratch.take<A>(in_.value_dim)),
        activations_(scratch.take<A>(kPanel<A> * in_.head_dim)),
        query_sums_(scratch.take<A>(lanes<A> * in_.head_dim)),
        weight_sums_(scratch.take<A>(lanes<A> * in_.head_dim)),
        rows_(scratch.take<A>(kPanel<A> * round_up(larger(in_.head_dim, in_.value_dim), lanes<A>) +
                              kSlack)) {}

  // The keys [first, end); grad_query [Sq, D] without the factor weight, grad_weight [D].
  void run(int64_t first, int64_t end, A* grad_query, double* grad_weight) const {
    const int64_t depth = in_.head_dim;
    clear(grad_query, in_.q_len * depth);
    clear(grad_weight, depth);
    for (int64_t j = first; j < end; j += kKeys) {
      const int64_t count = smaller(kKeys, end - j), padded = round_up(count, kPanel<A>);
      head_.read_keys(keys_, j, count);
      const int64_t* stride = in_.value.stride;
      pack_panels(values_, at<T>(sequence(in_.value, head_.b), head_.h, j, 0), stride[3], stride[2],
                  in_.value_dim, count);
      const int64_t key_size = padded * depth, value_size = padded * in_.value_dim;
      clear(grad_keys_, key_size);
      clear(grad_values_, value_size);
      clear(key_totals_, key_size);
      clear(value_totals_, value_size);
      for (int64_t start = 0; start < in_.q_len; start += kQueries) {
        for (int64_t i = start; i < smaller(start + kQueries, in_.q_len); i++)
          if (j < head_.key_end(i)) query(i, j, padded, grad_query + i * depth, grad_weight);
        move(grad_keys_, key_totals_, key_size);
        move(grad_values_, value_totals_, value_size);
      }
      write(args_.grad_key, j, count, depth, key_totals_, head_.weight);
      write(args_.grad_value, j, count, in_.value_dim, value_totals_, nullptr);
    }
  }

 private:
  void query(int64_t i, int64_t j, int64_t padded, A* grad_query, double* grad_weight) const {
    const int64_t depth = in_.head_dim, row = (head_.b * in_.heads + head_.h) * in_.q_len + i;
    const A highest = static_cast<const A*>(args_.highest)[row];
    const A total = static_cast<const A*>(args_.total)[row];
    head_.read_query(query_, i);
    head_.read(grad_out_, args_.grad_out, i, in_.value_dim);
    head_.read(out_, args_.out, i, in_.value_dim);
    A delta = 0;  // what the normalisation of the softmax takes off
    for (int64_t c = 0; c < in_.value_dim; c++) delta += grad_out_[c] * out_[c];
    clear(query_sums_, lanes<A> * depth);
    clear(weight_sums_, lanes<A> * depth);
    for (int64_t c = 0; c < padded; c += kPanel<A>) {
      A weights[kPanel<A>], grads[kPanel<A>] = {};
      if (!head_.score(query_, i, j + c, keys_ + c * depth, weights, activations_)) continue;
      add_rows(grad_out_, values_ + c * in_.value_dim, in_.value_dim, grads);
      Vec<A> weight[kVecs], grad[kVecs];
#pragma GCC unroll 4
      for (int v = 0; v < kVecs; v++) {
        weight[v] = relative(load<A>(weights + v * lanes<A>), highest);
        weight[v] = weight[v] == 0 ? weight[v] : weight[v] / total;
        grad[v] = weight[v] == 0 ? Vec<A>{} : weight[v] * (load<A>(grads + v * lanes<A>) - delta);
      }
      add_values(weight, grad_values_ + c * in_.value_dim);
      head_.tame ? add_features<true>(grad, grad_keys_ + c * depth)
                 : add_features<false>(grad, grad_keys_ + c * depth);
    }
    for (int64_t d = 0; d < depth; d++) {
      grad_query[d] += sum<A>(load<A>(query_sums_ + d * lanes<A>));
      grad_weight[d] += sum<A>(load<A>(weight_sums_ + d * lanes<A>));
    }
  }

  void add_values(const Vec<A>* weight, A* grad_values) const {
    for (int64_t c = 0; c < in_.value_dim; c++)
#pragma GCC unroll 4
      for (int v = 0; v < kVecs; v++) {
        A* to = grad_values + c * kPanel<A> + v * lanes<A>;
        store(to, load<A>(to) + grad_out_[c] * weight[v]);
      }
  }

  // Through tanh, whose slope is 1 - t^2. Wild features may be NaN where no query sees them.
  template <bool Tame>
  void add_features(const Vec<A>* grad, A* grad_keys) const {
    for (int64_t d = 0; d < in_.head_dim; d++) {
      Vec<A> query_sum = load<A>(query_sums_ + d * lanes<A>);
      Vec<A> weight_sum = load<A>(weight_sums_ + d * lanes<A>);
#pragma GCC unroll 4
      for (int v = 0; v < kVecs; v++) {
        const int64_t at = d * kPanel<A> + v * lanes<A>;
        Vec<A> t = load<A>(activations_ + at);
        if constexpr (!Tame) t = grad[v] == 0 ? Vec<A>{} : t;
        const Vec<A> slope = 1 - t * t;
        query_sum += grad[v] * slope;
        weight_sum += grad[v] * t;
        store(grad_keys + at, load<A>(grad_keys + at) + grad[v] * slope);
      }
      store(query_sums_ + d * lanes<A>, query_sum);
      store(weight_sums_ + d * lanes<A>, weight_sum);
    }
  }

  // Panels [depth, kPanel] to the rows j ... j + count, times a factor for every column if given.
  void write(const Target& to, int64_t j, int64_t count, int64_t depth, const A* panels,
             const A* factors) const {
    const int64_t width = round_up(depth, lanes<A>);
    for (int64_t c = 0; c < count; c += kPanel<A>) {
      const int64_t rows = smaller(kPanel<A>, count - c);
      pack_panel(rows_, width, panels + c * depth, kPanel<A>, 1, depth, rows);
      for (int64_t r = 0; r < rows; r++)
        head_.write(to, j + c + r, rows_ + r * width, depth, factors);
    }
  }

  const AdditiveBackward& args_;
  const AdditiveAttention& in_;
  const PanelHead<T> head_;
  A *keys_, *values_, *grad_keys_, *grad_values_, *key_totals_, *value_totals_;  // panels
  A *query_, *grad_out_, *out_;                                                  // one row
  A* activations_;                                                               // [D, kPanel]
  A *query_sums_, *weight_sums_;                                                 // [D, lanes]
  A* rows_;  // [kPanel, D or Dv]
};

}  // namespace
}  // namespace fastattn::FASTATTN_ISA
