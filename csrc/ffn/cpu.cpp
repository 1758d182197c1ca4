// Linear layers and feed-forward blocks on the CPU: blocked products with the rest in the epilogue.
#include "ffn/ffn.h"
#include "gemm/gemm.h"
#include "simd/philox.h"

namespace fastattn::FASTATTN_ISA {
namespace {

template <class V>
FASTATTN_INLINE V tanh_inner(V x) {
  return x * (1.5957691216057308f + 0.0713548162726f * (x * x));  // 2 sqrt(2/pi) (x + 0.044715 x^3)
}
template <>
FASTATTN_INLINE Vec<double> tanh_inner(Vec<double> x) {
  return x * (1.5957691216057307117597842397375 * (1 + 0.044715 * (x * x)));
}

template <class V>
struct Point {
  V value, slope;
};

// An activation and, where the caller reads it, its derivative.
template <Activation kind, class V>
FASTATTN_INLINE Point<V> activate(V x) {
  using A = std::remove_cvref_t<decltype(x[0])>;
  if constexpr (kind == Activation::relu)
    return {x > 0 ? x : (x == x ? V{} : x), x > 0 ? V{} + 1 : V{}};
  if constexpr (kind == Activation::gelu) {
    const V below = normal_cdf(x);
    const V density = exp2_nonpositive(static_cast<A>(-0.72134752044448170368) * (x * x)) *
                      static_cast<A>(0.39894228040143267794);
    return {x * below, below + x * density};
  }
  if constexpr (kind == Activation::gelu_tanh) {
    const V t = tanh_inner(x), s = sigmoid(t), rest = sigmoid(-t);  // 1 - s would cancel
    const V slope = static_cast<A>(1.5957691216057307) + static_cast<A>(0.2140644488178) * (x * x);
    return {x * s, s + x * s * rest * slope};
  }
  if constexpr (kind == Activation::silu) {
    const V s = sigmoid(x), rest = sigmoid(-x);
    return {x * s, s * (1 + x * rest)};
  }
  return {x, V{} + 1};
}

// Calls f with the activation as a constant.
template <class F>
FASTATTN_INLINE void with_activation(Activation activation, F&& f) {
#define FASTATTN_CASE(name) \
  case Activation::name:    \
    return f(std::integral_constant<Activation, Activation::name>{});
  switch (activation) {
    FASTATTN_CASE(identity)
    FASTATTN_CASE(relu)
    FASTATTN_CASE(gelu)
    FASTATTN_CASE(gelu_tanh)
    FASTATTN_CASE(silu)
  }
#undef FASTATTN_CASE
}

// x = activation(x) for `count` elements, rounded up to whole vectors. That the loops stand here,
// once for an accumulator's type, spares their compilation for each type of tensor.
template <class A>
__attribute__((noinline)) void activate_all(Activation activation, A* x, int64_t count) {
  if (activation == Activation::identity) return;
  with_activation(activation, [&](auto kind) __attribute__((always_inline)) {
    for (int64_t i = 0; i < count; i += lanes<A>)
      store(x + i, activate<kind()>(load<A>(x + i)).value);
  });
}

// The same, with the derivatives besides.
template <class A>
__attribute__((noinline)) void differentiate_all(Activation activation, A* x, A* slope,
                                                 int64_t count) {
  with_activation(activation, [&](auto kind) __attribute__((always_inline)) {
    for (int64_t i = 0; i < count; i += lanes<A>) {
      const Point<Vec<A>> point = activate<kind()>(load<A>(x + i));
      store(x + i, point.value);
      store(slope + i, point.slope);
    }
  });
}

template <class T, class A = Acc<T>, class Count>
FASTATTN_INLINE Vec<A> biased(Vec<A> sum, const T* bias, int64_t col, Count n) {
  return bias == nullptr ? sum : sum + load_count<A>(bias + col, n);
}

// Rounds to T and back, so that what is saved for backward is what forward has used.
template <class T, class A = Acc<T>>
FASTATTN_INLINE Vec<A> rounded(Vec<A> x) {
  if constexpr (std::is_same_v<T, A>) return x;
  T narrow[lanes<A>];
  store(narrow, x);
  return load<A>(narrow);
}

// block = what the product left in it, plus the bias and rounded, which also goes to `kept` if that
// is not null.
template <class T, class A = Acc<T>>
void add_bias(const typename Finish<A>::Place& place, A* block, const T* bias, T* kept,
              int64_t kept_row) {
  each_in_block<A>(place, [=](int64_t row, int64_t col, int64_t at, auto n) {
    const Vec<A> x = rounded<T>(biased<T>(load<A>(block + at), bias, col, n));
    if (kept != nullptr) store_count<A>(kept + row * kept_row + col, x, n);
    store(block + at, x);
  });
}

// out = what the product left in a block, plus the bias.
template <class T, class A = Acc<T>>
void write_biased(const typename Finish<A>::Place& place, const A* block, const T* bias, T* out,
                  int64_t out_row) {
  each_in_block<A>(place, [=](int64_t row, int64_t col, int64_t at, auto n) {
    store_count<A>(out + row * out_row + col, biased<T>(load<A>(block + at), bias, col, n), n);
  });
}

template <class T>
Operand<T> rows_of(const void* matrix, int64_t cols) {
  return {static_cast<const T*>(matrix), cols, 1};
}
template <class T>
Operand<T> columns_of(const void* matrix, int64_t cols) {
  return {static_cast<const T*>(matrix), 1, cols};
}

// Row i of a weight's [out_features, in_features] along the features of the input.
template <class T>
Operand<T> operand(Weight weight, int64_t out, int64_t in) {
  return weight.transposed ? columns_of<T>(weight.data, out) : rows_of<T>(weight.data, in);
}

template <class T>
void linear(const LinearForward& args) {
  using A = Acc<T>;
  const int64_t out_row = args.out_features;
  auto* out = static_cast<T*>(args.out);
  const auto body = [&](const auto& place, A* const* blocks) {
    const auto* bias = static_cast<const T*>(args.bias);
    if (args.activation != Activation::identity) {
      add_bias(place, blocks[0], bias, static_cast<T*>(args.pre), out_row);
      activate_all(args.activation, blocks[0], place.rows * place.width);
      bias = nullptr;
    }
    write_biased(place, blocks[0], bias, out, out_row);
  };
  multiply<A, T>(args.rows, args.out_features, args.in_features,
                 rows_of<T>(args.input, args.in_features),
                 {operand<T>(args.weight, args.out_features, args.in_features)},
                 Finish<A>(body, out, args.out_features));
}

template <class T>
void gated(const GatedForward& args) {
  using A = Acc<T>;
  const int64_t out_row = args.hidden_features;
  auto* hidden = static_cast<T*>(args.hidden);
  const auto body = [&](const auto& place, A* const* blocks) {
    add_bias(place, blocks[0], static_cast<const T*>(args.gate_bias), static_cast<T*>(args.gate),
             out_row);
    add_bias(place, blocks[1], static_cast<const T*>(args.up_bias), static_cast<T*>(args.up),
             out_row);
    activate_all(args.activation, blocks[0], place.rows * place.width);
    const A *gate = blocks[0], *up = blocks[1];
    each_in_block<A>(place, [=](int64_t row, int64_t col, int64_t at, auto n) {
      store_count<A>(hidden + row * out_row + col, load<A>(gate + at) * load<A>(up + at), n);
    });
  };
  multiply<A, T>(args.rows, args.hidden_features, args.in_features,
                 rows_of<T>(args.input, args.in_features),
                 {operand<T>(args.gate_weight, args.hidden_features, args.in_features),
                  operand<T>(args.up_weight, args.hidden_features, args.in_features)},
                 Finish<A>(body, hidden, args.hidden_features));
}

// panel[j * width + i] = the same plus the bias of feature j, rounded, for whole vectors of rows i.
template <class T, class A = Acc<T>>
void add_bias_turned(A* panel, int64_t features, int64_t width, const T* bias) {
  for (int64_t j = 0; j < features; j++) {
    const Vec<A> term = bias == nullptr ? Vec<A>{} : set<A>(load_one<A>(bias + j));
    for (int64_t i = j * width; i < (j + 1) * width; i += lanes<A>)
      store(panel + i, rounded<T>(load<A>(panel + i) + term));
  }
}

// As many rows as are packed together: what is hidden of them goes from the registers of the one
// product to the panels of the other.
template <class T>
void feed_forward_packed(const FeedForward& args) {
  using A = Acc<T>;
  const bool gated = args.gate_weight.data != nullptr;
  const int64_t in = args.in_features, features = args.hidden_features;
  const int64_t blocks = ceil_div(args.rows, Packed<A>::fitting(Packed<A>::span));
  const int64_t block = round_up(ceil_div(args.rows, larger(1, blocks)), Packed<A>::width);
  const Operand<T> up = operand<T>(args.up_weight, features, in);
  const Operand<T> gate = gated ? operand<T>(args.gate_weight, features, in) : up;
  for (int64_t first = 0; first < args.rows; first += block) {
    const int64_t rows = smaller(block, args.rows - first);
    Scratch scratch;
    const auto hidden = Packed<A>::take(scratch, rows, features, unit<T>());
    const auto open = [&](const auto& place, A* const* blocks) {
      const int64_t width = hidden.width_at(place.row), size = place.cols * width;
      const auto add = [&](A* panel, const void* bias) {
        const auto* own = static_cast<const T*>(bias);
        add_bias_turned(panel, place.cols, width, own == nullptr ? own : own + place.col);
      };
      add(blocks[0], gated ? args.gate_bias : args.up_bias);
      if (gated) add(blocks[1], args.up_bias);
      activate_all(args.activation, blocks[0], size);
      const auto value = [=](int64_t j, int64_t i) {
        if (j >= place.cols) return Vec<A>{};
        Vec<A> x = load<A>(blocks[0] + j * width + i);
        if (gated) x *= load<A>(blocks[1] + j * width + i);
        return x;
      };
      for (int64_t j = 0; j < place.cols; j += hidden.unit) {
        A* to = hidden.at(place.row, (place.col + j) / hidden.unit);
        for (int64_t i = 0; i < width; i += lanes<A>) {
          if constexpr (std::is_same_v<T, bf16>)
            if (hidden.unit == 2) {
              store(to + i, round_pairs(value(j, i), value(j + 1, i)));
              continue;
            }
          store(to + i, rounded<T>(value(j, i)));
        }
      }
    };
    const Operand<T> input = rows_of<T>(args.input, in).from(first, 0);
    if (gated)
      multiply<A, T>(rows, features, in, input, {gate, up}, Finish<A>(open));
    else
      multiply<A, T>(rows, features, in, input, {up}, Finish<A>(open));
    const auto* bias = static_cast<const T*>(args.down_bias);
    auto* out = static_cast<T*>(args.out) + first * args.out_features;
    const auto close = [&](const auto& place, A* const* blocks) {
      write_biased(place, blocks[0], bias, out, args.out_features);
    };
    multiply<A, T>(hidden, args.out_features,
                   operand<T>(args.down_weight, args.out_features, features),
                   Finish<A>(close, out, args.out_features));
  }
}

template <class T>
void drop_out(const Drop& args) {
  using A = Acc<T>;
  const Dropout<A> dropout(args.dropout_p, args.seed);
  constexpr int64_t chunk = 1024, worth = 16384;  // columns at a time, and elements in a task
  static_assert(chunk % kPhiloxBlock == 0);
  const int64_t step = larger(1, worth / larger(1, args.cols));
  parallel(ceil_div(args.rows, step), [&](int64_t task) {
    A factors[chunk];
    for (int64_t row = task * step; row < smaller((task + 1) * step, args.rows); row++)
      for (int64_t first = 0; first < args.cols; first += chunk) {
        const int64_t count = smaller(chunk, args.cols - first);
        dropout.factors(0, static_cast<uint32_t>(row), first, count, factors);
        T* x = static_cast<T*>(args.x) + row * args.cols + first;
        each_vector<A>(count, [&](int64_t c, auto n) {
          const Vec<A> factor = load_count<A>(factors + c, n);
          store_count<A>(x + c, factor == A{0} ? Vec<A>{} : load_count<A>(x + c, n) * factor, n);
        });
      }
  });
}

template <class T>
void pointwise_backward(const ActivationBackward& args) {
  using A = Acc<T>;
  const auto* grad_out = static_cast<const T*>(args.grad_out);
  const auto* pre = static_cast<const T*>(args.pre);
  const auto* gate = static_cast<const T*>(args.gate);
  auto* grad_pre = static_cast<T*>(args.grad_pre);
  auto* grad_gate = static_cast<T*>(args.grad_gate);
  auto* hidden = static_cast<T*>(args.hidden);
  constexpr int64_t step = 8192, part = 512;
  parallel(ceil_div(args.size, step), [&](int64_t task) {
    A open[part], slope[part];  // of the activation
    const int64_t end = smaller((task + 1) * step, args.size);
    for (int64_t first = task * step; first < end; first += part) {
      const int64_t count = smaller(part, end - first);
      const T* x = (gate == nullptr ? pre : gate) + first;
      each_vector<A>(count, [&](int64_t i, auto n) { store(open + i, load_count<A>(x + i, n)); });
      differentiate_all(args.activation, open, slope, count);
      each_vector<A>(count, [&](int64_t at, auto n) {
        const int64_t i = first + at;
        const Vec<A> grad = load_count<A>(grad_out + i, n);
        Vec<A> value = load<A>(open + at), inner = grad * load<A>(slope + at);
        if (gate != nullptr) {
          const Vec<A> up = load_count<A>(pre + i, n);
          store_count<A>(grad_gate + i, inner * up, n);
          inner = grad * value;
          value *= up;
        }
        store_count<A>(grad_pre + i, inner, n);
        if (hidden != nullptr) store_count<A>(hidden + i, value, n);
      });
    }
  });
}

template <class T>
void linear_gradients(const LinearBackward& args) {
  using A = Acc<T>;
  const int64_t rows = args.rows, in = args.in_features, out = args.out_features;
  const auto* grad = static_cast<const T*>(args.grad_pre);
  if (args.grad_input != nullptr) {
    const auto* add = static_cast<const T*>(args.add);
    auto* to = static_cast<T*>(args.grad_input);
    const auto body = [&](const auto& place, A* const* blocks) {
      each_in_block<A>(place, [=, sums = blocks[0]](int64_t row, int64_t col, int64_t at, auto n) {
        Vec<A> sum = load<A>(sums + at);
        if (add != nullptr) sum += load_count<A>(add + row * in + col, n);
        store_count<A>(to + row * in + col, sum, n);
      });
    };
    const Weight turned{args.weight.data, !args.weight.transposed};
    multiply<A, T>(rows, in, out, rows_of<T>(grad, out), {operand<T>(turned, in, out)},
                   Finish<A>(body, to, in));
  }
  if (args.grad_weight != nullptr) {
    const Operand<T> grads = columns_of<T>(grad, out), inputs = columns_of<T>(args.input, in);
    const bool transposed = args.weight.transposed;
    const int64_t lines = transposed ? in : out, width = transposed ? out : in;
    auto* to = static_cast<T*>(args.grad_weight);
    const auto body = [&](const auto& place, A* const* blocks) {
      each_in_block<A>(place, [=, sums = blocks[0]](int64_t row, int64_t col, int64_t at, auto n) {
        store_count<A>(to + row * width + col, load<A>(sums + at), n);
      });
    };
    multiply<A, T>(lines, width, rows, transposed ? inputs : grads, {transposed ? grads : inputs},
                   Finish<A>(body, to, width));
  }
  if (args.grad_bias != nullptr) {
    auto* to = static_cast<T*>(args.grad_bias);
    constexpr int64_t step = 4 * lanes<A>;
    parallel(ceil_div(out, step), [&](int64_t task) {
      const int64_t col = task * step;
      each_vector<A>(smaller(step, out - col), [&](int64_t j, auto n) {
        double total[lanes<A>] = {};  // of short chains: their error grows with their length
        for (int64_t start = 0; start < rows; start += 16) {
          Vec<A> block{};
          for (int64_t r = start; r < smaller(start + 16, rows); r++)
            block += load_count<A>(grad + r * out + col + j, n);
          for (int i = 0; i < lanes<A>; i++) total[i] += block[i];
        }
        Vec<A> sum{};
        for (int i = 0; i < lanes<A>; i++) sum[i] = static_cast<A>(total[i]);
        store_count<A>(to + col + j, sum, n);
      });
    });
  }
}

}  // namespace

#define FASTATTN_DISPATCH(name, Args, body)                                                        \
  void name(const Args& args) {                                                                    \
    note_run(kIsa);                                                                                \
    with_type(args.dtype, [&](auto* type) { body<std::remove_pointer_t<decltype(type)>>(args); }); \
  }
FASTATTN_DISPATCH(linear_forward, LinearForward, linear)
FASTATTN_DISPATCH(gated_forward, GatedForward, gated)
FASTATTN_DISPATCH(feed_forward, FeedForward, feed_forward_packed)
FASTATTN_DISPATCH(drop, Drop, drop_out)
FASTATTN_DISPATCH(activation_backward, ActivationBackward, pointwise_backward)
FASTATTN_DISPATCH(linear_backward, LinearBackward, linear_gradients)
#undef FASTATTN_DISPATCH

}  // namespace fastattn::FASTATTN_ISA
