// The cross-entropy of a linear layer on the CPU. All products of a chunk of rows are done while
// its logits are there, so that none is computed twice and most never exist at once.
#include "gemm/gemm.h"
#include "loss/loss.h"

namespace fastattn::FASTATTN_ISA {
namespace {

// A chunk of the rows that belong to a class.
template <class T>
struct Chunk {
  using A = Acc<T>;

  const LinearCrossEntropy& args;
  int64_t first, rows;

  const int64_t* live() const { return args.live + first; }
  A* logits() const { return static_cast<A*>(args.logits); }
  // The gradients of the logits take their place.
  Operand<T> gradients() const {
    constexpr int64_t narrower = sizeof(A) / sizeof(T);
    return {static_cast<const T*>(args.logits), narrower * args.logits_row, 1};
  }

  // The rows of the input, one behind the other.
  const T* input() const {
    const auto* all = static_cast<const T*>(args.input);
    const int64_t size = args.features;
    if (live()[rows - 1] - live()[0] == rows - 1) return all + live()[0] * size;
    auto* to = static_cast<T*>(args.gathered);
    parallel(rows, [&](int64_t i) {
      std::memcpy(to + i * size, all + live()[i] * size, static_cast<size_t>(size) * sizeof(T));
    });
    return to;
  }

  void run() const {
    const T* x = input();
    project(x);
    const int64_t step = larger(1, 16384 / args.classes);
    parallel(ceil_div(rows, step), [&](int64_t task) {
      for (int64_t i = task * step; i < smaller((task + 1) * step, rows); i++)
        measure(live()[i], logits() + i * args.logits_row);
    });
    if (args.grad_input != nullptr) find_grad_input();
    if (args.grad_weight != nullptr) find_grad_weight(x);
    if (args.grad_bias != nullptr) find_grad_bias();
  }

 private:
  void project(const T* x) const {
    const int64_t features = args.features, to_row = args.logits_row;
    const auto* bias = static_cast<const T*>(args.bias);
    const A cap = static_cast<A>(args.softcap);
    A* to = logits();
    const auto body = [&](const auto& place, A* const* blocks) {
      each_in_block<A>(place, [=, sums = blocks[0]](int64_t row, int64_t col, int64_t at, auto n) {
        Vec<A> x = load<A>(sums + at);
        if (bias != nullptr) x += load_count<A>(bias + col, n);
        if (cap != 0) x = cap * tanh(x / cap);
        store_count<A>(to + row * to_row + col, x, n);
      });
    };
    multiply<A, T>(rows, args.classes, features, {x, features, 1},
                   {{static_cast<const T*>(args.weight), features, 1}},
                   Finish<A>(body, to, to_row));
  }

  // Finds the loss of a row and, if any gradient is asked for, puts those of its logits in place
  // of these: softmax - (1 - smoothing) at the target - smoothing / classes everywhere.
  void measure(int64_t index, A* logits) const {
    const int64_t end = args.logits_row, target = args.target[index];
    for (int64_t j = args.classes; j < end; j++) logits[j] = minus_infinity<A>;
    const A own = logits[target];
    Vec<A> tops = set(minus_infinity<A>);
    for (int64_t j = 0; j < end; j += lanes<A>) tops = max(tops, load<A>(logits + j));
    const A top = highest<A>(tops);
    const auto power = [&](Vec<A> x) {
      return exp2_nonpositive((x - top) * static_cast<A>(kLog2e));
    };
    const double total = summed(end, [&](int64_t j) { return power(load<A>(logits + j)); });
    const double share = args.label_smoothing / static_cast<double>(args.classes);
    const double highest_logit = top;
    double loss = std::log(total) + (1 - args.label_smoothing) * (highest_logit - own);
    if (share != 0) {
      const int64_t whole = args.classes / lanes<A> * lanes<A>;
      double all = summed(whole, [&](int64_t j) { return load<A>(logits + j); });
      for (int64_t j = whole; j < args.classes; j++) all += logits[j];
      loss += share * (static_cast<double>(args.classes) * highest_logit - all);
    }
    static_cast<A*>(args.losses)[index] = static_cast<A>(loss);
    if (args.grad_input == nullptr && args.grad_weight == nullptr && args.grad_bias == nullptr)
      return;

    const auto* grads = static_cast<const A*>(args.grad_losses);
    const A grad = grads == nullptr ? 1 : grads[index];
    const A shrink = static_cast<A>(args.softcap == 0 ? 0 : 1 / (args.softcap * args.softcap));
    const auto slope = [&](Vec<A> x, A wanted) {
      Vec<A> found = power(x) * static_cast<A>(1 / total) - wanted;
      if (shrink != 0) found *= 1 - x * x * shrink;
      return found * grad;
    };
    auto* to = reinterpret_cast<T*>(logits);  // no wider: a store never meets what is to be read
    for (int64_t j = 0; j < args.classes; j += lanes<A>)
      store(to + j, slope(load<A>(logits + j), static_cast<A>(share)));
    store_part<A>(to + target, slope(set(own), static_cast<A>(share + 1 - args.label_smoothing)),
                  1);
  }

  // The sum of f(j) over [0, end), in short chains: their error grows with their length.
  template <class F>
  static double summed(int64_t end, const F& f) {
    constexpr int64_t chain = 32 * lanes<A>;
    double total = 0;
    for (int64_t start = 0; start < end; start += chain) {
      Vec<A> sums{};
      for (int64_t j = start; j < smaller(start + chain, end); j += lanes<A>) sums += f(j);
      total += sum<A>(sums);
    }
    return total;
  }

  void find_grad_input() const {
    const int64_t features = args.features;
    auto* to = static_cast<A*>(args.grad_input);
    const A scale = static_cast<A>(args.scale);
    const auto body = [&](const auto& place, A* const* blocks) {
      each_in_block<A>(place, [=, sums = blocks[0], rows = live()](int64_t row, int64_t col,
                                                                   int64_t at, auto n) {
        store_count<A>(to + rows[row] * features + col, load<A>(sums + at) * scale, n);
      });
    };
    multiply<A, T>(rows, features, args.classes, gradients(),
                   {{static_cast<const T*>(args.weight), 1, features}},
                   Finish<A>(body, to + live()[0] * features, features));
  }

  void find_grad_weight(const T* x) const {
    const int64_t features = args.features;
    auto* to = static_cast<A*>(args.grad_weight);
    const A scale = static_cast<A>(args.scale);
    const Operand<T> grads = gradients();
    const auto body = [&](const auto& place, A* const* blocks) {
      const bool add = first > 0;
      each_in_block<A>(place, [=, sums = blocks[0]](int64_t row, int64_t col, int64_t at, auto n) {
        A* here = to + row * features + col;
        Vec<A> sum = load<A>(sums + at) * scale;
        if (add) sum += load_count<A>(here, n);
        store_count<A>(here, sum, n);
      });
    };
    multiply<A, T>(args.classes, features, rows, {grads.data, 1, grads.outer}, {{x, 1, features}},
                   Finish<A>(body, to, features));
  }

  void find_grad_bias() const {
    auto* to = static_cast<A*>(args.grad_bias);
    const Operand<T> grads = gradients();
    constexpr int64_t step = 16 * lanes<A>, chain = 16;
    parallel(ceil_div(args.classes, step), [&](int64_t task) {
      const int64_t col = task * step;
      each_vector<A>(smaller(step, args.classes - col), [&](int64_t offset, auto n) {
        Vec<A> total{};
        for (int64_t start = 0; start < rows; start += chain) {
          Vec<A> part{};
          for (int64_t i = start; i < smaller(start + chain, rows); i++)
            part += load_count<A>(grads.from(i, col + offset).data, n);
          total += part;
        }
        A* here = to + col + offset;
        total *= static_cast<A>(args.scale);
        if (first > 0) total += load_count<A>(here, n);
        store_count<A>(here, total, n);
      });
    });
  }
};

template <class A>
void clear(void* memory, int64_t count) {
  if (memory != nullptr) std::memset(memory, 0, static_cast<size_t>(count) * sizeof(A));
}

template <class T>
void in_chunks(const LinearCrossEntropy& args) {
  using A = Acc<T>;
  auto* losses = static_cast<A*>(args.losses);
  auto* grad_input = static_cast<A*>(args.grad_input);
  const int64_t* live = args.live;
  for (int64_t row = 0; row < args.rows; row++) {
    if (live < args.live + args.count && *live == row) {
      live++;
      continue;
    }
    losses[row] = 0;
    if (grad_input != nullptr) clear<A>(grad_input + row * args.features, args.features);
  }
  if (args.count == 0) {
    clear<A>(args.grad_weight, args.classes * args.features);
    clear<A>(args.grad_bias, args.classes);
  }
  for (int64_t first = 0; first < args.count; first += args.chunk)
    Chunk<T>{args, first, smaller(args.chunk, args.count - first)}.run();
  if (args.loss == nullptr) return;
  double total = 0;
  for (int64_t row = 0; row < args.rows; row++) total += losses[row];
  *static_cast<A*>(args.loss) = static_cast<A>(total * args.loss_scale);
}

}  // namespace

void linear_cross_entropy(const LinearCrossEntropy& args) {
  note_run(kIsa);
  with_type(args.dtype,
            [&](auto* type) { in_chunks<std::remove_pointer_t<decltype(type)>>(args); });
}

}  // namespace fastattn::FASTATTN_ISA
