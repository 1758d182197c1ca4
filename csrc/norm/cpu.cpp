// Layer norm and RMS norm on the CPU, forward and backward, a few rows at a time in cache.
#include "norm/rows.h"

namespace fastattn::FASTATTN_ISA {
namespace {

// A row vector of parameters in the accumulation type, all of them `missing` where there is none.
template <class A>
const A* widened(Scratch& scratch, const void* from, Dtype dtype, int64_t cols, A missing) {
  if (from == nullptr) {
    A* to = scratch.take<A>(cols);
    for (int64_t c = 0; c < cols; c++) to[c] = missing;
    return to;
  }
  const A* to = nullptr;
  with_type(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const T* own = static_cast<const T*>(from);
    if constexpr (std::is_same_v<T, A>) {
      to = own;
    } else {
      A* copy = scratch.take<A>(cols);
      if constexpr (std::is_same_v<Acc<T>, A>) {
        each_vector<A>(cols, [&](int64_t c, auto n) {
          store_count<A>(copy + c, load_count<A>(own + c, n), n);
        });
      } else if constexpr (std::is_same_v<T, float>) {  // fp32 parameters of an fp64 input
        for (int64_t c = 0; c < cols; c++) copy[c] = own[c];
      }
      to = copy;
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

template <class T, class R>
void forward(const NormForward& args) {
  using A = Acc<T>;
  const Norm& in = args.in;
  const int64_t cols = in.cols;
  constexpr int together = 4;  // short rows, whose sums would else wait for each other
  constexpr int written = FASTATTN_LANES == 16 ? 2 : 1;  // of them in turns, past the caches
  const Results<T, written> out(args.out, in.rows, cols);
  const Results<R, 1> summed(args.summed, in.rows, cols);
  auto* means = static_cast<A*>(args.mean);
  auto* rstds = static_cast<A*>(args.rstd);
  Scratch parameters;
  const A* weight = widened<A>(parameters, in.weight, in.weight_dtype, cols, 1);
  const A* bias = widened<A>(parameters, in.bias, in.bias_dtype, cols, 0);

  const int64_t step = round_up(rows_per_task(in.rows, cols), together);
  parallel(ceil_div(in.rows, step), [&](int64_t task) {
    Scratch scratch;
    Rows<T, R, together> rows(in, nullptr, scratch);

    // Means and sums of squared distances from them, joined from chunks of columns (Chan et al.
    // 1979), of rows from the r-th on.
    const auto moments = [&](int64_t r, auto many, const A** row, auto& mean, auto& square) {
      for (int i = 0; i < many; i++) mean[i] = square[i] = 0;
      for (int64_t first = 0; first < cols; first += kChunk) {
        const int64_t count = smaller(kChunk, cols - first);
        const A* x[many];
        for (int i = 0; i < many; i++) {
          x[i] = rows.load(i, r + i, first, count, summed.writer(r + i));
          if (first == 0) row[i] = x[i];
        }
        A own_mean[many][1] = {}, own_square[many][1];
        if (in.centred) {
          sum_rows(count, own_mean, [&](int64_t c, auto n, auto& sums) {
            unrolled<many>([&](auto i) { sums[i][0] += load_count<A>(x[i] + c, n); });
          });
          for (int i = 0; i < many; i++) own_mean[i][0] /= static_cast<A>(count);
        }
        sum_rows(count, own_square, [&](int64_t c, auto n, auto& sums) {
          unrolled<many>([&](auto i) {
            const Vec<A> distance = load_count<A>(x[i] + c, n) - own_mean[i][0];
            sums[i][0] += first_lanes<A>(distance * distance, n);
          });
        });
        const A share = static_cast<A>(count) / static_cast<A>(first + count);
        for (int i = 0; i < many; i++) {
          const A apart = own_mean[i][0] - mean[i];
          square[i] += own_square[i][0] + apart * apart * static_cast<A>(first) * share;
          mean[i] += apart * share;
        }
      }
    };

    const auto normalize = [&](int64_t r, auto many) {
      const A* row[many] = {};
      A mean[many], square[many], rstd[many];
      moments(r, many, row, mean, square);
      for (int i = 0; i < many; i++) {
        const double variance = static_cast<double>(square[i]) / static_cast<double>(cols);
        rstd[i] = static_cast<A>(1 / std::sqrt(variance + args.eps));
        if (means != nullptr) means[r + i] = mean[i];
        if (rstds != nullptr) rstds[r + i] = rstd[i];
      }
      const auto finish = [&](auto turns) {
        for (int first = 0; first < many; first += turns) {
          const A* x[turns];
          Vec<A> own_mean[turns], own_rstd[turns];
          unrolled<turns>([&](auto i) {
            x[i] = row[first + i];
            own_mean[i] = set(mean[first + i]);
            own_rstd[i] = set(rstd[first + i]);
          });
          each_vector<A>(cols, [=, to = out.writer(r + first)](int64_t c, auto count) {
            const Vec<A> w = load_count<A>(weight + c, count), b = load_count<A>(bias + c, count);
            unrolled<turns>([&](auto i) {
              const Vec<A> distance = load_count<A>(x[i] + c, count) - own_mean[i];
              to.put(i, c, distance * own_rstd[i] * w + b, count);
            });
          });
        }
      };
      constexpr int streamed = many < written ? 1 : written;
      if (out.streams())
        finish(std::integral_constant<int, streamed>{});
      else
        finish(many);
    };
    const int64_t begin = task * step, end = smaller((task + 1) * step, in.rows);
    if (cols > kShort)
      each_rows<2>(begin, end, normalize);
    else if (cols > kNarrow && in.rows * cols * int64_t{sizeof(T)} >= kCached)
      each_rows<1>(begin, end, normalize);
    else
      each_rows<together>(begin, end, normalize);
    end_stream();
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
  constexpr int64_t share = 4096;  // columns that are worth a thread
  parallel(ceil_div(cols, share), [&](int64_t n) {
    const int64_t first = n * share, count = smaller(share, cols - first);
    Scratch scratch;
    A* rounded = scratch.take<A>(count);
    each_vector<A>(count, [=](int64_t c, auto n) {
      double total[lanes<A>];
      for (int64_t i = 0; i < n; i++) total[i] = 0;
      for (int64_t task = 0; task < tasks; task++)
        for (int64_t i = 0; i < n; i++) total[i] += parts[task * cols + first + c + i];
      for (int64_t i = 0; i < n; i++) rounded[c + i] = static_cast<A>(total[i]);
    });
    with_type(dtype, [&](auto* type) {
      using W = std::remove_pointer_t<decltype(type)>;
      auto* to = static_cast<W*>(grad) + first;
      if constexpr (std::is_same_v<Acc<W>, A>) {
        each_vector<A>(count, [&](int64_t c, auto n) {
          store_count<A>(to + c, load_count<A>(rounded + c, n), n);
        });
      } else if constexpr (std::is_same_v<W, float>) {  // fp32 parameters of an fp64 input
        for (int64_t c = 0; c < count; c++) to[c] = static_cast<float>(rounded[c]);
      }
    });
  });
}

template <class T, class R>
void backward(const NormBackward& args) {
  using A = Acc<T>;
  const Norm& in = args.in;
  const int64_t cols = in.cols;
  const auto* grad_out = static_cast<const T*>(args.grad_out);
  const auto* grad_summed = static_cast<const R*>(args.grad_summed);
  const auto* means = static_cast<const A*>(args.mean);
  const auto* rstds = static_cast<const A*>(args.rstd);
  constexpr int together = 2;
  const Results<T, together> grad_input(args.grad_input, in.rows, cols);
  const Results<R, together> grad_residual(args.grad_residual, in.rows, cols);
  Scratch shared;
  const A* weight = widened<A>(shared, in.weight, in.weight_dtype, cols, 1);
  const int64_t tasks = partial_sums(in.rows, cols);
  double* weight_parts = args.grad_weight == nullptr ? nullptr : shared.take<double>(tasks * cols);
  double* bias_parts = args.grad_bias == nullptr ? nullptr : shared.take<double>(tasks * cols);
  const bool plain =
      grad_out != nullptr && grad_summed == nullptr && !grad_residual && in.dropout_p == 0;

  parallel(tasks, [&](int64_t task) {
    Scratch scratch;
    Rows<T, R, together> rows(in, args.summed, scratch);
    RowSum<A> weight_sum(weight_parts ? weight_parts + task * cols : nullptr, scratch, cols);
    RowSum<A> bias_sum(bias_parts ? bias_parts + task * cols : nullptr, scratch, cols);
    const int64_t begin = task * in.rows / tasks, end = (task + 1) * in.rows / tasks;
    const auto differentiate = [&](int64_t r, auto n) {
      constexpr int many = n;
      const A* x[many];
      A mean[many], rstd[many];
      // Of grad_out * weight, and of its product with the normal row, both times rstd.
      A means_of_grad[many][2] = {};
      for (int i = 0; i < many; i++) {
        x[i] = rows.load(i, r + i, 0, cols);
        mean[i] = in.centred ? means[r + i] : A{0};
        rstd[i] = rstds[r + i];
      }
      const auto grad = [=](int i, int64_t c, auto count) {
        return load_count<A>(grad_out + (r + i) * cols + c, count);
      };
      const auto distance = [=](int i, int64_t c, auto count) {
        return load_count<A>(x[i] + c, count) - mean[i];
      };
      if (grad_out != nullptr) {
        sum_rows(cols, means_of_grad, [=](int64_t c, auto count, auto& sums) {
          const Vec<A> w = load_count<A>(weight + c, count);
#pragma GCC unroll 4
          for (int i = 0; i < many; i++) {
            const Vec<A> scaled = grad(i, c, count) * w;
            sums[i][0] += scaled;
            sums[i][1] += scaled * distance(i, c, count);
          }
        });
        for (int i = 0; i < many; i++) {
          const A scale = rstd[i] / static_cast<A>(cols);
          means_of_grad[i][0] *= in.centred ? scale : A{0};
          means_of_grad[i][1] = means_of_grad[i][1] * rstd[i] * scale;  // rstd^2 may be infinite
        }
      }
      // Copies, or each store would seem to change what they were read from.
      const auto finish = [=, &rows, input_to = grad_input.writer(r),
                           residual_to = grad_residual.writer(r), weight_block = weight_sum.block(),
                           bias_block = bias_sum.block()](auto plain) {
        each_vector<A>(cols, [&](int64_t c, auto count) {
          const Vec<A> w = load_count<A>(weight + c, count);
          Vec<A> weight_grad{}, bias_grad{};
#pragma GCC unroll 4
          for (int i = 0; i < many; i++) {
            Vec<A> dx{};
            if (plain || grad_out != nullptr) {
              const Vec<A> g = grad(i, c, count), y = distance(i, c, count) * rstd[i];
              weight_grad += g * y;
              bias_grad += g;
              dx = g * w * rstd[i] - means_of_grad[i][0] - y * means_of_grad[i][1];
            }
            if (!plain && grad_summed != nullptr)
              dx += load_count<A>(grad_summed + (r + i) * cols + c, count);
            if (!plain && residual_to.to != nullptr) residual_to.put(i, c, dx, count);
            input_to.put(i, c, plain ? dx : rows.dropped(rows.factors(i), dx, c, count), count);
          }
          weight_block.add(c, weight_grad, count);
          bias_block.add(c, bias_grad, count);
        });
      };
      if (plain)
        finish(std::true_type{});
      else
        finish(std::false_type{});
      weight_sum.end_rows(many);
      bias_sum.end_rows(many);
    };
    if (cols > kNarrow && cols <= kShort)
      each_rows<1>(begin, end, differentiate);
    else
      each_rows<together>(begin, end, differentiate);
    weight_sum.fold();
    bias_sum.fold();
    end_stream();
  });

  add_parts<A>(args.grad_weight, in.weight_dtype, weight_parts, tasks, cols);
  add_parts<A>(args.grad_bias, in.bias_dtype, bias_parts, tasks, cols);
}

// Calls f with null pointers of the types of input and residual.
template <class F>
void with_types(const Norm& in, F&& f) {
  with_type(in.dtype, [&](auto* type) {
    if constexpr (sizeof(*type) == 2)
      if (in.residual_dtype == Dtype::f32) return f(type, static_cast<float*>(nullptr));
    f(type, type);
  });
}

}  // namespace

void norm_forward(const NormForward& args) {
  note_run(kIsa);
  with_types(args.in, [&](auto* type, auto* residual) {
    using T = std::remove_pointer_t<decltype(type)>;
    using R = std::remove_pointer_t<decltype(residual)>;
    forward<T, R>(args);
  });
}

void norm_backward(const NormBackward& args) {
  note_run(kIsa);
  with_types(args.in, [&](auto* type, auto* residual) {
    using T = std::remove_pointer_t<decltype(type)>;
    using R = std::remove_pointer_t<decltype(residual)>;
    backward<T, R>(args);
  });
}

}  // namespace fastattn::FASTATTN_ISA
