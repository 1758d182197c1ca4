// Layer norm and RMS norm on the CPU, forward and backward, one row at a time in cache.
#include "norm/norm.h"
#include "simd/vec.h"

namespace fastattn::FASTATTN_ISA {
namespace {

// The sum over a row of f(offset, count), in four chains so that additions overlap.
template <class A, class F>
FASTATTN_INLINE A sum_row(int64_t cols, F&& f) {
  constexpr std::integral_constant<int64_t, lanes<A>> whole{};
  Vec<A> part[4] = {};
  int64_t c = 0;
  for (; c + 4 * lanes<A> <= cols; c += 4 * lanes<A>)
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) part[i] += f(c + i * lanes<A>, whole);
  for (; c + lanes<A> <= cols; c += lanes<A>) part[0] += f(c, whole);
  if (c < cols) part[1] += f(c, cols - c);
  return sum<A>((part[0] + part[1]) + (part[2] + part[3]));
}

// Zeros in the lanes past `count`, whatever was computed there.
template <class A, class Count>
FASTATTN_INLINE Vec<A> first(Vec<A> v, Count count) {
  if constexpr (std::is_same_v<Count, int64_t>) {
    A part[lanes<A>];
    store(part, v);
    return load_part<A>(part, count);
  } else {
    return v;
  }
}

// A row vector of parameters in the accumulation type, or null.
template <class A>
A* widened(Scratch& scratch, const void* from, Dtype dtype, int64_t cols) {
  if (from == nullptr) return nullptr;
  A* to = scratch.take<A>(cols);
  with_type(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    if constexpr (std::is_same_v<Acc<T>, A>) {
      each_vector<A>(cols, [&](int64_t c, auto n) {
        store_count<A>(to + c, load_count<A>(static_cast<const T*>(from) + c, n), n);
      });
    } else if constexpr (std::is_same_v<T, float>) {  // fp32 parameters of an fp64 input
      for (int64_t c = 0; c < cols; c++) to[c] = static_cast<const float*>(from)[c];
    }
  });
  return to;
}

constexpr int64_t kRowsPerTask = 16;  // and at least this many elements:
constexpr int64_t kElementsPerTask = 16384;

int64_t rows_per_task(int64_t rows, int64_t cols) {
  const int64_t wanted = cols > 0 ? kElementsPerTask / cols + 1 : rows;
  return wanted > kRowsPerTask ? wanted : kRowsPerTask;
}

template <class T, bool Centred>
void forward(const NormForward& args) {
  using A = Acc<T>;
  const int64_t cols = args.cols;
  const auto* input = static_cast<const T*>(args.input);
  const auto* residual = static_cast<const T*>(args.residual);
  auto* out = static_cast<T*>(args.out);
  auto* summed = static_cast<T*>(args.summed);
  auto* means = static_cast<A*>(args.mean);
  auto* rstds = static_cast<A*>(args.rstd);
  Scratch parameters;
  const A* weight = widened<A>(parameters, args.weight, args.weight_dtype, cols);
  const A* bias = widened<A>(parameters, args.bias, args.bias_dtype, cols);

  const int64_t step = rows_per_task(args.rows, cols);
  parallel((args.rows + step - 1) / step, [&](int64_t task) {
    Scratch scratch;
    A* buffer = std::is_same_v<T, A> && residual == nullptr ? nullptr : scratch.take<A>(cols);
    const int64_t end = (task + 1) * step < args.rows ? (task + 1) * step : args.rows;
    for (int64_t r = task * step; r < end; r++) {
      const T* source = input + r * cols;
      const A* row = buffer;
      if constexpr (std::is_same_v<T, A>)
        if (residual == nullptr) row = source;
      if (row == buffer) {
        each_vector<A>(cols, [&](int64_t c, auto n) {
          Vec<A> x = load_count<A>(source + c, n);
          if (residual != nullptr) {
            store_count<A>(summed + r * cols + c, x + load_count<A>(residual + r * cols + c, n), n);
            x = load_count<A>(summed + r * cols + c, n);  // rounded as it is stored
          }
          store_count<A>(buffer + c, x, n);
        });
      }
      A mean = 0;
      if constexpr (Centred) {
        mean = sum_row<A>(cols, [&](int64_t c, auto n) { return load_count<A>(row + c, n); }) /
               static_cast<A>(cols);
        means[r] = mean;
      }
      const A square = sum_row<A>(cols, [&](int64_t c, auto n) {
        const Vec<A> x = load_count<A>(row + c, n) - mean;
        return first<A>(x * x, n);
      });
      const A rstd = 1 / std::sqrt(square / static_cast<A>(cols) + static_cast<A>(args.eps));
      rstds[r] = rstd;
      each_vector<A>(cols, [&](int64_t c, auto n) {
        Vec<A> y = (load_count<A>(row + c, n) - mean) * rstd;
        if (weight != nullptr) y *= load_count<A>(weight + c, n);
        if (bias != nullptr) y += load_count<A>(bias + c, n);
        store_count<A>(out + r * cols + c, y, n);
      });
    }
  });
}

// The number of partial sums of the parameters' gradients: fixed by the shape, so that the result
// does not depend on the number of threads.
int64_t partial_sums(int64_t rows, int64_t cols) {
  const int64_t tasks = (rows + rows_per_task(rows, cols) - 1) / rows_per_task(rows, cols);
  return tasks < 32 ? tasks : 32;
}

// grad[c] = the sum of parts[c] over the tasks, in their order; nothing if grad is null.
template <class A>
void add_parts(void* grad, Dtype dtype, const double* parts, int64_t tasks, int64_t cols) {
  if (grad == nullptr) return;
  Scratch scratch;
  A* total = scratch.take<A>(cols);
  for (int64_t c = 0; c < cols; c++) {
    double sum = 0;
    for (int64_t task = 0; task < tasks; task++) sum += parts[task * cols + c];
    total[c] = static_cast<A>(sum);
  }
  with_type(dtype, [&](auto* type) {
    using W = std::remove_pointer_t<decltype(type)>;
    auto* to = static_cast<W*>(grad);
    if constexpr (std::is_same_v<Acc<W>, A>) {
      each_vector<A>(
          cols, [&](int64_t c, auto n) { store_count<A>(to + c, load_count<A>(total + c, n), n); });
    } else if constexpr (std::is_same_v<W, float>) {  // fp32 parameters of an fp64 input
      for (int64_t c = 0; c < cols; c++) to[c] = static_cast<float>(total[c]);
    }
  });
}

// A task's sum of rows for the gradient of weight or bias: short blocks of rows in the accumulation
// type, folded into fp64, for an error grows with the length of a chain of additions.
template <class A>
class RowSum {
 public:
  RowSum(double* total, Scratch& scratch, int64_t cols)
      : total_(total), block_(total == nullptr ? nullptr : scratch.take<A>(cols)), cols_(cols) {
    if (total == nullptr) return;
    std::memset(total, 0, static_cast<size_t>(cols) * sizeof(double));
    std::memset(block_, 0, static_cast<size_t>(cols) * sizeof(A));
  }

  template <class F>
  FASTATTN_INLINE void add_row(F&& row) {
    if (total_ == nullptr) return;
    each_vector<A>(cols_, [&](int64_t c, auto n) {
      store_count<A>(block_ + c, load_count<A>(block_ + c, n) + row(c, n), n);
    });
    if (++rows_ % 16 == 0) fold();
  }

  void fold() {
    if (total_ == nullptr) return;
    for (int64_t c = 0; c < cols_; c++) {
      total_[c] += block_[c];
      block_[c] = 0;
    }
  }

 private:
  double* total_;  // [cols], null where not asked for
  A* block_;
  int64_t cols_, rows_ = 0;
};

template <class T, bool Centred>
void backward(const NormBackward& args) {
  using A = Acc<T>;
  const int64_t rows = args.rows, cols = args.cols;
  const auto* grad_out = static_cast<const T*>(args.grad_out);
  const auto* grad_summed = static_cast<const T*>(args.grad_summed);
  const auto* summed = static_cast<const T*>(args.summed);
  const auto* means = static_cast<const A*>(args.mean);
  const auto* rstds = static_cast<const A*>(args.rstd);
  auto* grad_input = static_cast<T*>(args.grad_input);
  const bool need_weight = args.grad_weight != nullptr, need_bias = args.grad_bias != nullptr;
  Scratch shared;
  const A* weight = widened<A>(shared, args.weight, args.weight_dtype, cols);
  const int64_t tasks = partial_sums(rows, cols);
  double* weight_parts = need_weight ? shared.take<double>(tasks * cols) : nullptr;
  double* bias_parts = need_bias ? shared.take<double>(tasks * cols) : nullptr;

  parallel(tasks, [&](int64_t task) {
    Scratch scratch;
    RowSum<A> weight_sum(need_weight ? weight_parts + task * cols : nullptr, scratch, cols);
    RowSum<A> bias_sum(need_bias ? bias_parts + task * cols : nullptr, scratch, cols);
    for (int64_t r = task * rows / tasks; r < (task + 1) * rows / tasks; r++) {
      const T* x_row = summed + r * cols;
      const A mean = Centred ? means[r] : A{0}, rstd = rstds[r];
      A mean_grad = 0, mean_product = 0;
      if (grad_out != nullptr) {
        const T* grad_row = grad_out + r * cols;
        const auto scaled = [&](int64_t c, auto n) {
          const Vec<A> g = load_count<A>(grad_row + c, n);
          return weight == nullptr ? g : g * load_count<A>(weight + c, n);
        };
        const auto normed = [&](int64_t c, auto n) {
          return (load_count<A>(x_row + c, n) - mean) * rstd;
        };
        mean_product =
            sum_row<A>(cols, [&](int64_t c, auto n) { return scaled(c, n) * normed(c, n); }) /
            static_cast<A>(cols);
        if constexpr (Centred) mean_grad = sum_row<A>(cols, scaled) / static_cast<A>(cols);
        weight_sum.add_row(
            [&](int64_t c, auto n) { return load_count<A>(grad_row + c, n) * normed(c, n); });
        bias_sum.add_row([&](int64_t c, auto n) { return load_count<A>(grad_row + c, n); });
        each_vector<A>(cols, [&](int64_t c, auto n) {
          Vec<A> dx = (scaled(c, n) - mean_grad - normed(c, n) * mean_product) * rstd;
          if (grad_summed != nullptr) dx += load_count<A>(grad_summed + r * cols + c, n);
          store_count<A>(grad_input + r * cols + c, dx, n);
        });
      } else {
        each_vector<A>(cols, [&](int64_t c, auto n) {
          const Vec<A> dx =
              grad_summed == nullptr ? Vec<A>{} : load_count<A>(grad_summed + r * cols + c, n);
          store_count<A>(grad_input + r * cols + c, dx, n);
        });
      }
    }
    weight_sum.fold();
    bias_sum.fold();
  });

  add_parts<A>(args.grad_weight, args.weight_dtype, weight_parts, tasks, cols);
  add_parts<A>(args.grad_bias, args.bias_dtype, bias_parts, tasks, cols);
}

}  // namespace

void norm_forward(const NormForward& args) {
  note_run(kIsa);
  with_type(args.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    args.centred ? forward<T, true>(args) : forward<T, false>(args);
  });
}

void norm_backward(const NormBackward& args) {
  note_run(kIsa);
  with_type(args.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    args.centred ? backward<T, true>(args) : backward<T, false>(args);
  });
}

}  // namespace fastattn::FASTATTN_ISA
