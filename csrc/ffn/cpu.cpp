// Linear layers and feed-forward blocks on the CPU: blocked products with the rest in the epilogue.
#include "ffn/ffn.h"
#include "simd/gemm.h"

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

template <Activation kind, class V>
FASTATTN_INLINE V activate(V x) {
  if constexpr (kind == Activation::relu) return x > 0 ? x : (x == x ? V{} : x);
  if constexpr (kind == Activation::gelu) return x * normal_cdf(x);
  if constexpr (kind == Activation::gelu_tanh) return x * sigmoid(tanh_inner(x));
  if constexpr (kind == Activation::silu) return x * sigmoid(x);
  return x;
}

template <Activation kind, class V>
FASTATTN_INLINE V derivative(V x) {
  if constexpr (kind == Activation::relu) return x > 0 ? V{} + 1 : V{};
  if constexpr (kind == Activation::gelu) {
    using A = decltype(x[0] + x[0]);
    const V density = exp2_nonpositive(static_cast<A>(-0.72134752044448170368) * (x * x)) *
                      static_cast<A>(0.39894228040143267794);
    return normal_cdf(x) + x * density;
  }
  if constexpr (kind == Activation::gelu_tanh) {
    const V s = sigmoid(tanh_inner(x));
    using A = decltype(x[0] + x[0]);
    const V slope = static_cast<A>(1.5957691216057307) + static_cast<A>(0.2140644488178) * (x * x);
    return s + x * s * (1 - s) * slope;
  }
  if constexpr (kind == Activation::silu) {
    const V s = sigmoid(x);
    return s * (1 + x * (1 - s));
  }
  return V{} + 1;
}

template <class F>
void with_activation(Activation activation, F&& f) {
  switch (activation) {
    case Activation::identity:
      return f(std::integral_constant<Activation, Activation::identity>{});
    case Activation::relu:
      return f(std::integral_constant<Activation, Activation::relu>{});
    case Activation::gelu:
      return f(std::integral_constant<Activation, Activation::gelu>{});
    case Activation::gelu_tanh:
      return f(std::integral_constant<Activation, Activation::gelu_tanh>{});
    case Activation::silu:
      return f(std::integral_constant<Activation, Activation::silu>{});
  }
}

// Calls f(type, activation) with the element type and the activation as constants.
template <class F>
void with_both(Dtype dtype, Activation activation, F&& f) {
  with_type(dtype, [&](auto* type) { with_activation(activation, [&](auto a) { f(type, a); }); });
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

template <class T>
Operand<T> rows_of(const void* matrix, int64_t cols) {
  return {static_cast<const T*>(matrix), cols, 1};
}
template <class T>
Operand<T> columns_of(const void* matrix, int64_t cols) {
  return {static_cast<const T*>(matrix), 1, cols};
}

template <class T, Activation kind>
void linear(const LinearForward& args) {
  using A = Acc<T>;
  const auto* bias = static_cast<const T*>(args.bias);
  auto* out = static_cast<T*>(args.out);
  auto* pre = static_cast<T*>(args.pre);
  const auto body = [&](const auto& place, const A* const* blocks) {
    each_in_block<A>(place, blocks, [&](int64_t row, int64_t col, auto n, Vec<A> sum, Vec<A>) {
      const int64_t at = row * args.out_features + col;
      const Vec<A> x = rounded<T>(biased<T>(sum, bias, col, n));
      if (pre != nullptr) store_count<A>(pre + at, x, n);
      store_count<A>(out + at, activate<kind>(x), n);
    });
  };
  multiply<A, T>(
      args.rows, args.out_features, args.in_features, rows_of<T>(args.input, args.in_features),
      {rows_of<T>(args.weight, args.in_features)}, Finish<A>(body, out, args.out_features));
}

template <class T, Activation kind>
void gated(const GatedForward& args) {
  using A = Acc<T>;
  const auto* gate_bias = static_cast<const T*>(args.gate_bias);
  const auto* up_bias = static_cast<const T*>(args.up_bias);
  auto* hidden = static_cast<T*>(args.hidden);
  auto* gate = static_cast<T*>(args.gate);
  auto* up = static_cast<T*>(args.up);
  const auto body = [&](const auto& place, const A* const* blocks) {
    each_in_block<A>(place, blocks, [&](int64_t row, int64_t col, auto n, Vec<A> g, Vec<A> u) {
      const int64_t at = row * args.hidden_features + col;
      g = rounded<T>(biased<T>(g, gate_bias, col, n));
      u = rounded<T>(biased<T>(u, up_bias, col, n));
      if (gate != nullptr) store_count<A>(gate + at, g, n);
      if (up != nullptr) store_count<A>(up + at, u, n);
      store_count<A>(hidden + at, activate<kind>(g) * u, n);
    });
  };
  multiply<A, T>(args.rows, args.hidden_features, args.in_features,
                 rows_of<T>(args.input, args.in_features),
                 {rows_of<T>(args.gate_weight, args.in_features),
                  rows_of<T>(args.up_weight, args.in_features)},
                 Finish<A>(body, hidden, args.hidden_features));
}

template <class T, Activation kind>
void pointwise_backward(const ActivationBackward& args) {
  using A = Acc<T>;
  const auto* grad_out = static_cast<const T*>(args.grad_out);
  const auto* pre = static_cast<const T*>(args.pre);
  const auto* gate = static_cast<const T*>(args.gate);
  auto* grad_pre = static_cast<T*>(args.grad_pre);
  auto* grad_gate = static_cast<T*>(args.grad_gate);
  auto* hidden = static_cast<T*>(args.hidden);
  constexpr int64_t step = 8192;
  parallel(ceil_div(args.size, step), [&](int64_t task) {
    const int64_t start = task * step;
    each_vector<A>(smaller(step, args.size - start), [&](int64_t offset, auto n) {
      const int64_t i = start + offset;
      const Vec<A> grad = load_count<A>(grad_out + i, n), x = load_count<A>(pre + i, n);
      if (gate == nullptr) {
        store_count<A>(grad_pre + i, grad * derivative<kind>(x), n);
        if (hidden != nullptr) store_count<A>(hidden + i, activate<kind>(x), n);
      } else {
        const Vec<A> g = load_count<A>(gate + i, n);
        const Vec<A> open = activate<kind>(g);
        store_count<A>(grad_pre + i, grad * open, n);
        store_count<A>(grad_gate + i, grad * x * derivative<kind>(g), n);
        if (hidden != nullptr) store_count<A>(hidden + i, open * x, n);
      }
    });
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
    const auto body = [&](const auto& place, const A* const* blocks) {
      each_in_block<A>(place, blocks, [&](int64_t row, int64_t col, auto n, Vec<A> sum, Vec<A>) {
        const int64_t at = row * in + col;
        if (add != nullptr) sum += load_count<A>(add + at, n);
        store_count<A>(to + at, sum, n);
      });
    };
    multiply<A, T>(rows, in, out, rows_of<T>(grad, out), {columns_of<T>(args.weight, in)},
                   Finish<A>(body, to, in));
  }
  if (args.grad_weight != nullptr) {
    auto* to = static_cast<T*>(args.grad_weight);
    const auto body = [&](const auto& place, const A* const* blocks) {
      each_in_block<A>(place, blocks, [&](int64_t row, int64_t col, auto n, Vec<A> sum, Vec<A>) {
        store_count<A>(to + row * in + col, sum, n);
      });
    };
    multiply<A, T>(out, in, rows, columns_of<T>(grad, out), {columns_of<T>(args.input, in)},
                   Finish<A>(body, to, in));
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

void linear_forward(const LinearForward& args) {
  note_run(kIsa);
  with_both(args.dtype, args.activation, [&](auto* type, auto activation) {
    linear<std::remove_pointer_t<decltype(type)>, activation()>(args);
  });
}

void gated_forward(const GatedForward& args) {
  note_run(kIsa);
  with_both(args.dtype, args.activation, [&](auto* type, auto activation) {
    gated<std::remove_pointer_t<decltype(type)>, activation()>(args);
  });
}

void activation_backward(const ActivationBackward& args) {
  note_run(kIsa);
  with_both(args.dtype, args.activation, [&](auto* type, auto activation) {
    pointwise_backward<std::remove_pointer_t<decltype(type)>, activation()>(args);
  });
}

void linear_backward(const LinearBackward& args) {
  note_run(kIsa);
  with_type(args.dtype,
            [&](auto* type) { linear_gradients<std::remove_pointer_t<decltype(type)>>(args); });
}

}  // namespace fastattn::FASTATTN_ISA
