// Additive attention on the CPU: how the two passes are cut into tasks.
#include "additive_attention/few_queries.h"
#include "additive_attention/panels.h"

namespace fastattn::FASTATTN_ISA {
namespace {

// To pack keys pays once some queries share them.
constexpr int64_t kMostFew = 2;
bool few_queries(const AdditiveAttention& in) { return in.q_len <= kMostFew; }

// Task is a way to go through a run of keys.
template <class T, template <class> class Task>
void backward(const AdditiveBackward& args) {
  using A = Acc<T>;
  const AdditiveAttention& in = args.in;
  const int64_t heads = in.batch * in.heads, depth = in.head_dim, rows = in.q_len * depth;
  // The runs of keys depend on the shape alone, so that sums do not depend on the threads.
  const int64_t blocks = ceil_div(in.kv_len, kKeys);
  const int64_t runs = larger(1, smaller(ceil_div(16, heads), blocks));
  Scratch scratch;
  A* grad_query = scratch.take<A>(runs * heads * rows);              // [B H, runs, Sq, D]
  double* grad_weight = scratch.take<double>(runs * heads * depth);  // [B H, runs, D]
  parallel(heads * runs, [&](int64_t task) {
    const int64_t run = task % runs;
    Scratch mine;
    Task<T>(args, task / runs, mine)
        .run(run * blocks / runs * kKeys, smaller((run + 1) * blocks / runs * kKeys, in.kv_len),
             grad_query + task * rows, grad_weight + task * depth);
  });
  parallel(heads, [&](int64_t index) {
    Scratch mine;
    const Head<T> head(in, index, mine);
    A* total = grad_query + index * runs * rows;
    for (int64_t i = 0; i < in.q_len; i++) {
      each_vector<A>(depth, [&](int64_t c, auto n) {
        A* to = total + i * depth + c;
        Vec<A> sums = load_count<A>(to, n);
        for (int64_t run = 1; run < runs; run++) sums += load_count<A>(to + run * rows, n);
        store_count<A>(to, sums, n);
      });
      head.write(args.grad_query, i, total + i * depth, depth, head.weight);
    }
  });
  A* row = scratch.take<A>(depth);
  for (int64_t h = 0; h < in.heads; h++) {
    for (int64_t d = 0; d < depth; d++) {
      double total = 0;
      for (int64_t b = 0; b < in.batch; b++)
        for (int64_t run = 0; run < runs; run++)
          total += grad_weight[((b * in.heads + h) * runs + run) * depth + d];
      row[d] = static_cast<A>(total);
    }
    auto* to = static_cast<T*>(args.grad_weight) + h * depth;
    each_vector<A>(
        depth, [&](int64_t c, auto n) { store_count<A>(to + c, load_count<A>(row + c, n), n); });
  }
}

}  // namespace

void additive_forward(const AdditiveForward& args) {
  note_run(kIsa);
  with_type(args.in.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    few_queries(args.in) ? forward_of_few<T>(args) : forward_in_panels<T>(args);
  });
}

void additive_backward(const AdditiveBackward& args) {
  note_run(kIsa);
  with_type(args.in.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    few_queries(args.in) ? backward<T, FewBackward>(args) : backward<T, PanelBackward>(args);
  });
}

}  // namespace fastattn::FASTATTN_ISA
