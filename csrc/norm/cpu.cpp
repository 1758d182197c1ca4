// Layer norm and RMS norm on the CPU, forward and backward, a few rows at a time in cache.
#include "norm/norm.h"
#include "simd/philox.h"

namespace fastattn::FASTATTN_ISA {
namespace {

// f(0), f(1) ... f(N - 1) of constants: what they index stays in registers.
template <int N, class F>
FASTATTN_INLINE void unrolled(F&& f) {
  [&]<int... I>(std::integer_sequence<int, I...>) __attribute__((always_inline)) {
    (f(std::integral_constant<int, I>{}), ...);
  }(std::make_integer_sequence<int, N>{});
}

// N sums over each of some rows: f(offset, count, sums) adds its terms to vectors of sums, of which
// one row has several in turn, so that additions overlap. Chains of them are no longer than 64.
template <class A, int Rows, int N, class F>
FASTATTN_INLINE void sum_rows(int64_t cols, A (&sums)[Rows][N], F&& f) {
  constexpr std::integral_constant<int64_t, lanes<A>> whole{};
  constexpr int parts = Rows >= 4 ? 1 : 4 / Rows;
  constexpr int64_t step = parts * lanes<A>;
  double total[Rows][N] = {};
  int64_t c = 0;
  while (c < cols) {
    const int64_t end = smaller(cols, c + 64 * step);
    Vec<A> part[parts][Rows][N];
    unrolled<parts * Rows * N>(  // the initialiser {} would be one slow instruction
        [&](auto i) { part[i / (Rows * N)][i / N % Rows][i % N] = Vec<A>{}; });
    for (; c + step <= end; c += step)
      unrolled<parts>([&](auto i) { f(c + i * lanes<A>, whole, part[i]); });
    for (; c + lanes<A> <= end; c += lanes<A>) f(c, whole, part[0]);
    if (c < end) f(c, end - c, part[parts - 1]);
    c = end;
    unrolled<Rows * N>([&](auto i) {
      constexpr int r = i / N, n = i % N;
      Vec<A> all = part[0][r][n];
      unrolled<parts - 1>([&](auto k) { all += part[k + 1][r][n]; });
      total[r][n] += sum<A>(all);
    });
  }
  for (int r = 0; r < Rows; r++)
    for (int i = 0; i < N; i++) sums[r][i] = static_cast<A>(total[r][i]);
}

// Zeros in the lanes past `count`, whatever was computed there.
template <class A, class Count>
FASTATTN_INLINE Vec<A> first_lanes(Vec<A> v, Count count) {
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
const A* widened(Scratch& scratch, const void* from, Dtype dtype, int64_t cols) {
  const A* to = nullptr;
  with_type(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const T* own = static_cast<const T*>(from);
    if constexpr (std::is_same_v<T, A>) {
      to = own;
    } else if (from != nullptr) {
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

// Columns of a row that stay in the first-level cache while they are read several times.
constexpr int64_t kChunk = 4096;
static_assert(kChunk % kPhiloxBlock == 0);
constexpr int64_t kShort = 1024;  // columns of a row of which several stay there

// Rows [0, Together) of those that are normalised, in the accumulation type: input, or its sum with
// a residual, of type R, and with dropout.
template <class T, class R, int Together>
class Rows {
 public:
  using A = Acc<T>;

  // `summed` holds the sum where it is known already.
  Rows(const Norm& in, const void* summed, Scratch& scratch)
      : in_(in),
        summed_(static_cast<const R*>(summed)),
        dropout_(in.dropout_p, in.seed),
        in_place_(std::is_same_v<R, A> && (summed != nullptr || in.residual == nullptr)),
        width_(round_up(in.cols, kPhiloxBlock)),
        rows_(in_place_ ? nullptr : scratch.take<A>(Together * width_)),
        factors_(in.dropout_p > 0 ? scratch.take<A>(Together * width_) : nullptr) {}

  // Columns [first, first + count) of row r, the i-th held; `first` is a multiple of kChunk.
  const A* load(int i, int64_t r, int64_t first, int64_t count) {
    const int64_t start = r * in_.cols + first;
    const T* input = static_cast<const T*>(in_.input) + start;
    A* to = rows_ + i * width_ + first;
    if (factors_ != nullptr)
      dropout_.factors(0, static_cast<uint32_t>(r), first, count, factors_ + i * width_ + first);
    if (summed_ != nullptr) return widened(summed_ + start, to, count);
    if (in_.residual == nullptr) return widened(input, to, count);
    const R* residual = static_cast<const R*>(in_.residual) + start;
    each_vector<A>(count, [&](int64_t c, auto n) {
      const Vec<A> x = dropped(i, load_count<A>(input + c, n), first + c, n);
      R rounded[lanes<A>];
      store(rounded, x + load_count<A>(residual + c, n));
      store_count<A>(to + c, load_count<A>(rounded, n), n);
    });
    return to;
  }

  // Dropout of what stands in column c of the i-th row.
  template <class Count>
  FASTATTN_INLINE Vec<A> dropped(int i, Vec<A> x, int64_t c, Count n) const {
    if (factors_ == nullptr) return x;
    const Vec<A> factor = load_count<A>(factors_ + i * width_ + c, n);
    return factor == A{0} ? Vec<A>{} : x * factor;
  }

 private:
  template <class S>
  const A* widened(const S* from, A* to, int64_t count) {
    if constexpr (std::is_same_v<S, A>)
      if (in_place_) return from;
    each_vector<A>(
        count, [&](int64_t c, auto n) { store_count<A>(to + c, load_count<A>(from + c, n), n); });
    return to;
  }

  const Norm& in_;
  const R* summed_;
  Dropout<A> dropout_;
  bool in_place_;
  int64_t width_;  // of a row in scratch: whole blocks of bits
  A* rows_;        // [Together, width], unless rows are read where they lie
  A* factors_;     // [Together, width], null without dropout
};

// Calls f(r, n) for rows r ... r + n of [begin, end), with n = Together as long as there are so
// many and then 1: rows share the reading of what all of them need.
template <int Together, class F>
FASTATTN_INLINE void each_rows(int64_t begin, int64_t end, F&& f) {
  int64_t r = begin;
  for (; r + Together <= end; r += Together) f(r, std::integral_constant<int, Together>{});
  for (; r < end; r++) f(r, std::integral_constant<int, 1>{});
}

// Where rows of results go: past the caches if they are too many to be found there. Not so in fresh
// memory, which the kernel has just zeroed in the caches, nor where several rows are written in
// turns and a vector is less than a line: processors that have half of many lines to combine give
// up.
template <class T, int Together>
class Results {
 public:
  Results(void* to, int64_t rows, int64_t cols) : to_(static_cast<T*>(to)), cols_(cols) {
    const int64_t size = rows * cols * static_cast<int64_t>(sizeof(T));
    const bool aligned =
        (reinterpret_cast<uintptr_t>(to) | static_cast<uintptr_t>(cols) * sizeof(T)) %
            (sizeof(T) * lanes<Acc<T>>) ==
        0;
    constexpr bool whole = Together == 1 || sizeof(T) * lanes<Acc<T>> == 64;
    streams_ = whole && to != nullptr && size >= kStreamed && aligned &&
               is_resident(static_cast<const char*>(to) + size / 2);
  }

  explicit operator bool() const { return to_ != nullptr; }

  template <class Count>
  FASTATTN_INLINE void put(int64_t r, int64_t c, Vec<Acc<T>> from, Count n) const {
    T* to = to_ + r * cols_ + c;
    if constexpr (!std::is_same_v<Count, int64_t>)
      if (streams_) return stream<Acc<T>>(to, from);
    store_count<Acc<T>>(to, from, n);
  }

 private:
  static constexpr int64_t kStreamed = int64_t{16} << 20;

  T* to_;
  int64_t cols_;
  bool streams_;
};

template <class T, class R>
void forward(const NormForward& args) {
  using A = Acc<T>;
  const Norm& in = args.in;
  const int64_t cols = in.cols;
  constexpr int together = 4;  // short rows, whose sums would else wait for each other
  constexpr int written = FASTATTN_LANES == 16 ? 2 : 1;  // of them in turns
  const Results<T, written> out(args.out, in.rows, cols);
  const Results<R, 1> summed(args.summed, in.rows, cols);
  auto* means = static_cast<A*>(args.mean);
  auto* rstds = static_cast<A*>(args.rstd);
  Scratch parameters;
  const A* weight = widened<A>(parameters, in.weight, in.weight_dtype, cols);
  const A* bias = widened<A>(parameters, in.bias, in.bias_dtype, cols);

  const int64_t step = rows_per_task(in.rows, cols);
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
          x[i] = rows.load(i, r + i, first, count);
          if (first == 0) row[i] = x[i];
          if (summed)
            each_vector<A>(count, [&](int64_t c, auto n) {
              summed.put(r + i, first + c, load_count<A>(x[i] + c, n), n);
            });
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
        if (in.centred) means[r + i] = mean[i];
        rstds[r + i] = rstd[i];
      }
      constexpr int turns = many < written ? 1 : written;
      for (int first = 0; first < many; first += turns)
        each_vector<A>(cols, [&](int64_t c, auto count) {
          const Vec<A> w = weight == nullptr ? set(A{1}) : load_count<A>(weight + c, count);
          const Vec<A> b = bias == nullptr ? Vec<A>{} : load_count<A>(bias + c, count);
#pragma GCC unroll 4
          for (int i = first; i < first + turns; i++)
            out.put(r + i, c, (load_count<A>(row[i] + c, count) - mean[i]) * rstd[i] * w + b,
                    count);
        });
    };
    const int64_t begin = task * step, end = smaller((task + 1) * step, in.rows);
    if (cols > kShort)
      each_rows<written>(begin, end, normalize);
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
  Scratch scratch;
  A* rounded = scratch.take<A>(cols);
  constexpr int64_t block = 64;
  for (int64_t first = 0; first < cols; first += block) {
    const int64_t count = smaller(block, cols - first);
    double total[block] = {};
    for (int64_t task = 0; task < tasks; task++)
      for (int64_t c = 0; c < count; c++) total[c] += parts[task * cols + first + c];
    for (int64_t c = 0; c < count; c++) rounded[first + c] = static_cast<A>(total[c]);
  }
  with_type(dtype, [&](auto* type) {
    using W = std::remove_pointer_t<decltype(type)>;
    auto* to = static_cast<W*>(grad);
    if constexpr (std::is_same_v<Acc<W>, A>) {
      each_vector<A>(cols, [&](int64_t c, auto n) {
        store_count<A>(to + c, load_count<A>(rounded + c, n), n);
      });
    } else if constexpr (std::is_same_v<W, float>) {  // fp32 parameters of an fp64 input
      for (int64_t c = 0; c < cols; c++) to[c] = static_cast<float>(rounded[c]);
    }
  });
}

// A task's sum of rows for the gradient of weight or bias: short blocks of rows in the accumulation
// type, folded into fp64, for an error grows with the length of a chain of additions.
template <class A>
class RowSum {
 public:
  RowSum(double* total, Scratch& scratch, int64_t cols)
      : total_(total), block_(total == nullptr ? nullptr : scratch.take<A>(cols)), cols_(cols) {}

  template <class Count>
  FASTATTN_INLINE void add(int64_t c, Vec<A> x, Count n) {
    if (total_ == nullptr) return;
    store_count<A>(block_ + c, rows_ == 0 ? x : load_count<A>(block_ + c, n) + x, n);
  }

  FASTATTN_INLINE void end_rows(int count) {
    rows_ += count;
    if (rows_ >= 16) fold();
  }

  FASTATTN_INLINE void fold() {
    if (total_ != nullptr && rows_ > 0) {
      double* __restrict total = total_;
      const A* __restrict block = block_;
      if (folded_)
        for (int64_t c = 0; c < cols_; c++) total[c] += block[c];
      else
        for (int64_t c = 0; c < cols_; c++) total[c] = block[c];
      folded_ = true;
    }
    rows_ = 0;
  }

 private:
  double* total_;  // [cols], null where not asked for; of no row before the first fold
  A* block_;
  int64_t cols_, rows_ = 0;  // of the block
  bool folded_ = false;
};

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
  const A* weight = widened<A>(shared, in.weight, in.weight_dtype, cols);
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
    each_rows<together>(begin, end, [&](int64_t r, auto n) {
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
      const auto weight_at = [=](int64_t c, auto count) {
        return weight == nullptr ? set(A{1}) : load_count<A>(weight + c, count);
      };
      if (grad_out != nullptr) {
        sum_rows(cols, means_of_grad, [=](int64_t c, auto count, auto& sums) {
          const Vec<A> w = weight_at(c, count);
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
      const auto finish = [=, &rows, &weight_sum, &bias_sum](auto plain) {
        each_vector<A>(cols, [&](int64_t c, auto count) {
          const Vec<A> w = weight_at(c, count);
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
            if (!plain && grad_residual) grad_residual.put(r + i, c, dx, count);
            grad_input.put(r + i, c, plain ? dx : rows.dropped(i, dx, c, count), count);
          }
          weight_sum.add(c, weight_grad, count);
          bias_sum.add(c, bias_grad, count);
        });
      };
      if (plain)
        finish(std::true_type{});
      else
        finish(std::false_type{});
      weight_sum.end_rows(many);
      bias_sum.end_rows(many);
    });
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
