// Additive attention of few queries: keys and values are read where they lie, row by row.
#pragma once

#include "additive_attention/head.h"

namespace fastattn::FASTATTN_ISA {
namespace {

// tanh(query + key), by an eps of 1 where it is small: it joins a sum.
template <class A>
FASTATTN_INLINE Vec<A> squashed(Vec<A> query, Vec<A> key) {
  const Vec<A> power = exp(2 * (query + key));
  return divide(power - 1, power + 1);
}

// The sum of the vectors that f(column, count) gives for `count` columns.
template <class A, class F>
FASTATTN_INLINE A sum_over(int64_t count, const F& f) {
  constexpr int64_t part = kChain * lanes<A>;
  A total = 0;
  for (int64_t start = 0; start < count; start += part) {
    Vec<A> sums{};
    each_vector<A>(smaller(part, count - start),
                   [&](int64_t c, auto n) { sums += f(start + c, n); });
    total += sum<A>(sums);
  }
  return total;
}

// to += factor * from.
template <class A>
FASTATTN_INLINE void add_scaled(A factor, const A* from, int64_t count, A* to) {
  each_vector<A>(count, [&](int64_t c, auto n) {
    store_count<A>(to + c, load_count<A>(to + c, n) + factor * load_count<A>(from + c, n), n);
  });
}

// w . tanh(query + key), whose tanh is kept if asked for.
template <bool Keep, class A>
A score_of(const A* query, const A* key, const A* weight, int64_t depth, A* activations) {
  return sum_over<A>(depth, [&](int64_t c, auto n) {
    const Vec<A> t = squashed<A>(load_count<A>(query + c, n), load_count<A>(key + c, n));
    if constexpr (Keep) store_count<A>(activations + c, t, n);
    return load_count<A>(weight + c, n) * t;
  });
}

template <class T>
void forward_of_few(const AdditiveForward& args) {
  using A = Acc<T>;
  const AdditiveAttention& in = args.in;
  parallel(in.batch * in.heads * in.q_len, [&](int64_t row) {
    Scratch scratch;
    const Head<T> head(in, row / in.q_len, scratch);
    const int64_t i = row % in.q_len, end = head.key_end(i), padded = round_up(end, lanes<A>);
    A* copy = scratch.take<A>(larger(in.head_dim, in.value_dim));
    A* weights = scratch.take<A>(padded);
    A* sums = scratch.take<A>(in.value_dim);
    A* out = scratch.take<A>(in.value_dim);
    A* query = scratch.take<A>(in.head_dim);
    head.read(query, in.query, i, in.head_dim);
    A top = minus_infinity<A>;
    for (int64_t j = 0; j < padded; j++) {
      weights[j] = minus_infinity<A>;
      if (!head.sees(i, j)) continue;
      const A* key = head.row(in.key, j, in.head_dim, copy);
      weights[j] = score_of<false, A>(query, key, head.weight, in.head_dim, nullptr);
      top = weights[j] <= top ? top : weights[j];  // NaN remains
    }
    A total = 0;
    clear(sums, in.value_dim);
    clear(out, in.value_dim);
    for (int64_t first = 0; first < padded; first += kKeys) {
      const int64_t count = smaller(kKeys, padded - first);
      total += sum_over<A>(count, [&](int64_t c, auto) {
        const Vec<A> weight = relative<A>(load<A>(weights + first + c), top);
        store(weights + first + c, weight);
        return weight;
      });
      for (int64_t j = first; j < first + count; j++)
        if (weights[j] != 0)
          add_scaled(weights[j], head.row(in.value, j, in.value_dim, copy), in.value_dim, sums);
      move(sums, out, in.value_dim);
    }
    static_cast<A*>(args.highest)[row] = total == 0 ? A{0} : top;
    static_cast<A*>(args.total)[row] = total;
    for (int64_t c = 0; c < in.value_dim; c++) out[c] *= total == 0 ? A{0} : 1 / total;
    head.write(args.out, i, out, in.value_dim, nullptr);
  });
}

// The gradients of a run of keys, and what it adds to those of the queries and of the weight.
template <class T>
class FewBackward {
  using A = Acc<T>;

 public:
  FewBackward(const AdditiveBackward& args, int64_t head, Scratch& scratch)
      : args_(args),
        in_(args.in),
        head_(in_, head, scratch),
        queries_(scratch.take<A>(in_.q_len * in_.head_dim)),
        grads_out_(scratch.take<A>(in_.q_len * in_.value_dim)),
        deltas_(scratch.take<A>(in_.q_len)),
        query_sums_(scratch.take<A>(in_.q_len * in_.head_dim)),
        weight_sums_(scratch.take<A>(in_.head_dim)),
        activations_(scratch.take<A>(in_.head_dim)),
        key_copy_(scratch.take<A>(in_.head_dim)),
        value_copy_(scratch.take<A>(in_.value_dim)),
        grad_key_(scratch.take<A>(in_.head_dim)),
        grad_value_(scratch.take<A>(in_.value_dim)) {
    for (int64_t i = 0; i < in_.q_len; i++) {
      head_.read(queries_ + i * in_.head_dim, in_.query, i, in_.head_dim);
      A* grad_out = grads_out_ + i * in_.value_dim;
      head_.read(grad_out, args_.grad_out, i, in_.value_dim);
      const A* out = head_.row(args_.out, i, in_.value_dim, value_copy_);
      deltas_[i] = sum_over<A>(in_.value_dim, [&](int64_t c, auto n) {
        return load_count<A>(grad_out + c, n) * load_count<A>(out + c, n);
      });
    }
  }

  // The keys [first, end); grad_query [Sq, D] without the factor weight, grad_weight [D].
  void run(int64_t first, int64_t end, A* grad_query, double* grad_weight) const {
    const int64_t queries = in_.q_len * in_.head_dim;
    clear(grad_query, queries);
    clear(grad_weight, in_.head_dim);
    clear(query_sums_, queries);
    clear(weight_sums_, in_.head_dim);
    for (int64_t start = first; start < end; start += kChain) {
      for (int64_t j = start; j < smaller(start + kChain, end); j++) key(j);
      move(query_sums_, grad_query, queries);
      for (int64_t d = 0; d < in_.head_dim; d++) grad_weight[d] += weight_sums_[d];
      clear(weight_sums_, in_.head_dim);
    }
  }

 private:
  void key(int64_t j) const {
    const A* key = head_.row(in_.key, j, in_.head_dim, key_copy_);
    const A* value = head_.row(in_.value, j, in_.value_dim, value_copy_);
    clear(grad_key_, in_.head_dim);
    clear(grad_value_, in_.value_dim);
    for (int64_t i = 0; i < in_.q_len; i++) {
      if (!head_.sees(i, j)) continue;
      const int64_t row = (head_.b * in_.heads + head_.h) * in_.q_len + i;
      const A highest = static_cast<const A*>(args_.highest)[row];
      const A total = static_cast<const A*>(args_.total)[row];
      const A score = score_of<true>(queries_ + i * in_.head_dim, key, head_.weight, in_.head_dim,
                                     activations_);
      const A weight = relative<A>(set<A>(score), highest)[0] / total;
      if (weight == 0) continue;
      const A* grad_out = grads_out_ + i * in_.value_dim;
      const A grad_weight = sum_over<A>(in_.value_dim, [&](int64_t c, auto n) {
        return load_count<A>(grad_out + c, n) * load_count<A>(value + c, n);
      });
      add_scaled(weight, grad_out, in_.value_dim, grad_value_);
      add_features(weight * (grad_weight - deltas_[i]), query_sums_ + i * in_.head_dim);
    }
    head_.write(args_.grad_key, j, grad_key_, in_.head_dim, head_.weight);
    head_.write(args_.grad_value, j, grad_value_, in_.value_dim, nullptr);
  }

  // Through tanh, whose slope is 1 - t^2.
  void add_features(A grad, A* query_sums) const {
    each_vector<A>(in_.head_dim, [&](int64_t c, auto n) {
      const Vec<A> t = load_count<A>(activations_ + c, n), change = grad * (1 - t * t);
      store_count<A>(query_sums + c, load_count<A>(query_sums + c, n) + change, n);
      store_count<A>(grad_key_ + c, load_count<A>(grad_key_ + c, n) + change, n);
      store_count<A>(weight_sums_ + c, load_count<A>(weight_sums_ + c, n) + grad * t, n);
    });
  }

  const AdditiveBackward& args_;
  const AdditiveAttention& in_;
  const Head<T> head_;
  A *queries_, *grads_out_, *deltas_;                    // of all queries
  A *query_sums_, *weight_sums_, *activations_;          // of some keys, and of one query and key
  A *key_copy_, *value_copy_, *grad_key_, *grad_value_;  // of one key
};

}  // namespace
}  // namespace fastattn::FASTATTN_ISA
