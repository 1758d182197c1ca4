// What the kernels of attention's gradients share: rows that stand against rows, and how the scores
// become gradients.
//
// A `Side` is the queries with the gradients of their outputs, or the keys with their values;
// either side's gradients come from the same products with the other.
#pragma once

#include "attention/scores.cuh"

namespace fastattn::cuda {
namespace {

// What backward reads, for all heads. `statistics` are two numbers for each row of the queries: its
// lse in base 2, and what the normalisation takes off the gradients of its weights.
template <class T>
struct Inputs {
  const T *query, *key, *value, *grad_out;
  Terms terms;
  const uint64_t* seed;
  const float2* statistics;
  const AttentionBackwardScalars& all;

  __device__ uint32_t head_number(const Sequence& sequence, int head) const {
    return static_cast<uint32_t>(sequence.index * all.in.heads + head);
  }
  __device__ const float2* statistics_of(const Sequence& sequence, int head) const {
    return statistics + sequence.row(all.in, head);
  }
};

// One head's rows on one side of the products: scored * scored^T are the scores, and
// weighed * weighed^T the gradients of their weights.
template <class T>
struct Side {
  Matrix<const T> scored, weighed;

  __device__ static Side queries(const Inputs<T>& from, const Sequence& of, int head) {
    const AttentionScalars& in = from.all.in;
    const bool none = from.grad_out == nullptr;  // zeros
    return {matrix(from.query, in.query, of.index, head, of.query, of.q_len, in.head_dim),
            matrix(none ? from.query : from.grad_out, from.all.grad_out, of.index, head, of.query,
                   none ? 0 : of.q_len, in.value_dim)};
  }
  __device__ static Side keys(const Inputs<T>& from, const Sequence& of, int head) {
    const AttentionScalars& in = from.all.in;
    return {matrix(from.key, in.key, of.index, head, of.key, of.kv_len, in.head_dim),
            matrix(from.value, in.value, of.index, head, of.key, of.kv_len, in.value_dim)};
  }
};

// Some rows of a side in shared memory.
template <class T, int Dim, int Rows>
struct SideTiles {
  Tile<T, Dim> scored, weighed;

  __device__ explicit SideTiles(T* memory) : scored{memory}, weighed{memory + Rows * Dim} {}
  template <bool Dealt>  // as keys are, see Runs
  __device__ void fetch(const Side<T>& from, int first) const {
    copy<Rows, BackwardTiles<sizeof(T), Dim>::kThreads, Dealt>(scored, from.scored, first);
    copy<Rows, BackwardTiles<sizeof(T), Dim>::kThreads, Dealt>(weighed, from.weighed, first);
  }
  // Takes what is not finite for 0.
  __device__ void clean() const {
    cuda::clean(scored.memory, 2 * Rows * Dim, static_cast<int>(threadIdx.x),
                static_cast<int>(blockDim.x));
  }
};

// Which rows meet: row r of this side and those of the other from r + shift - before to
// r + shift + after.
struct Band {
  int shift, before, after, rows, others;

  __device__ static Band queries(const AttentionScalars& in, const Sequence& of) {
    return {of.offset, in.left, in.right, of.q_len, of.kv_len};
  }
  __device__ static Band keys(const AttentionScalars& in, const Sequence& of) {
    return {-of.offset, in.right, in.left, of.kv_len, of.q_len};
  }
  // The others [begin, end) are all that meet any of the rows [first, first + count).
  __device__ int begin(int first) const { return max(first + shift - before, 0); }
  __device__ int end(int first, int count) const {
    return first < rows ? min(min(first + count, rows) + shift + after, others) : 0;
  }
  // Whether any of [first, first + count) meet any of [other, other + other_count).
  __device__ bool meet(int first, int count, int other, int other_count) const {
    return other < end(first, count) && other + other_count > begin(first);
  }
  // Whether all of [first, first + count) meet all of [other, other + other_count).
  __device__ bool whole(int first, int count, int other, int other_count) const {
    return first + count <= rows && other + other_count <= others &&
           other >= first + count - 1 + shift - before &&
           other + other_count - 1 <= first + shift + after;
  }
};

// Flags of a lane's Runs: what dropout keeps and the mask hides.
struct Flags {
  uint32_t kept = 0, hidden = 0;
};

// The products of 16 rows of this side, in `weights` and `grads`, become the weights that dropout
// lets meet the values, which it has not scaled, and the gradients of the logits or, if OfProducts,
// of what softcap made them from. The rows begin at `first` and the columns at `other`; if `whole`,
// all are within each other's bounds; `statistic(query)` is that of a query behind the first; of
// the bias see Scores. Without Extras there are no more than products and bounds. Where the bias
// hides something that is no number, only the gradient of logits is one.
template <class T, bool OfKeys, bool OfProducts, bool Extras, int N, class Statistic, class Bias>
__device__ void differentiate(Accumulator<N>& weights, Accumulator<N>& grads,
                              const Scores<T>& scores, const Flags& flags, int first, int other,
                              bool whole, const Statistic& statistic, const Bias& bias) {
  using Own = Runs<OfKeys, N>;
  const AttentionScalars& in = scores.in;
  const int i = OfKeys ? other : first, j = OfKeys ? first : other;
  const auto grad = [&](int run, int k) -> float& { return grads[Own::n(run, k)][Own::e(run, k)]; };
  const auto hide = [&](int run, int k) {
    weights[Own::n(run, k)][Own::e(run, k)] = grad(run, k) = 0;
  };
  const bool drops = Extras && in.threshold != 0;
  const uint32_t kept = in.kept == 0 ? 0 : flags.kept;
  const auto keeps = [&](int run, int k) { return kept >> Own::bit(run, k) & 1; };
  float scale = in.scale;  // that products still lack

  if (drops)
    Own::each(grads, [&](int run, int k, float& value) {
      const float off = statistic(Own::query(run)).y;
      value = keeps(run, k) ? fmaf(value, in.kept, -off) : -off;
    });
  else
    Own::each(grads, [&](int run, int, float& value) { value -= statistic(Own::query(run)).y; });
  if (Extras && !in.plain) {
    Own::each(weights, [&](int, int, float& weight) { weight *= in.scale; });
    scale = 1;
    if (in.softcap != 0)
      Own::each(weights, [&](int run, int k, float& weight) {
        const float tangent = hyperbolic_tangent(weight);
        weight = tangent * in.softcap;
        if (OfProducts) grad(run, k) *= 1 - tangent * tangent;
      });
    scores.template add_terms<OfKeys, !OfProducts, N>(weights, i, j, bias);
  }
  Own::each(weights, [&](int run, int k, float& weight) {
    weight = ptx::exp2(fmaf(weight, scale, -statistic(Own::query(run)).x));
    grad(run, k) *= weight;
  });
  if (!whole) scores.template hide_outside<OfKeys, N>(i, j, hide);
  if (Extras && scores.masks)
    Own::each(weights, [&](int run, int k, float&) {
      if (flags.hidden >> Own::bit(run, k) & 1) hide(run, k);
    });
  if (!OfProducts && scores.biases)
    Own::each(weights, [&](int run, int k, float& weight) {
      if (weight == 0) grad(run, k) = 0;
    });
  if (OfKeys && drops)
    Own::each(weights, [&](int run, int k, float& weight) {
      if (!keeps(run, k)) weight = 0;
    });
}
// The same where the bias is read from global memory. A tile inside, of a call without extras,
// takes a pass of its own, without what `scores_of()` and `flags_of(scores)` make.
template <class T, bool OfKeys, bool OfProducts, int N, class ScoresOf, class FlagsOf,
          class Statistic>
__device__ void differentiate(Accumulator<N>& weights, Accumulator<N>& grads,
                              const AttentionScalars& in, const ScoresOf& scores_of,
                              const FlagsOf& flags_of, int first, int other, bool whole,
                              const Statistic& statistic) {
  if (whole && in.plain && in.threshold == 0) {
    using Own = Runs<OfKeys, N>;
    Own::each(weights, [&](int run, int k, float& weight) {
      float& grad = grads[Own::n(run, k)][Own::e(run, k)];
      const float2 of_query = statistic(Own::query(run));
      weight = ptx::exp2(fmaf(weight, in.scale, -of_query.x));
      grad = weight * (grad - of_query.y);
    });
    return;
  }
  const Scores<T> scores = scores_of();
  const auto bias =
      scores.template bias_here<OfKeys, N>(OfKeys ? other : first, OfKeys ? first : other);
  differentiate<T, OfKeys, OfProducts, true, N>(weights, grads, scores, flags_of(scores), first,
                                                other, whole, statistic, bias);
}

}  // namespace
}  // namespace fastattn::cuda

#define FASTATTN_INPUTS(T)                                                              \
  const T *query, const T *key, const T *value, const T *grad_out, const uint8_t *mask, \
      const void *bias, const float *alibi_slopes, const uint64_t *seed, const float2 *statistics

#define FASTATTN_KERNEL(Tiles, blocks) \
  extern "C" __global__ void __launch_bounds__(Tiles::kThreads, blocks)

#define FASTATTN_FROM \
  {query, key, value, grad_out, {mask, bias, alibi_slopes}, seed, statistics, all}

#define FASTATTN_FOREACH_TILES(X) \
  X(f32, float, 64)               \
  X(f32, float, 128)              \
  X(bf16, __nv_bfloat16, 64)      \
  X(bf16, __nv_bfloat16, 128)     \
  X(bf16, __nv_bfloat16, 256)     \
  X(f16, __half, 64)              \
  X(f16, __half, 128)             \
  X(f16, __half, 256)
