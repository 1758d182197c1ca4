// The gradient of attention's bias on a GPU, whatever dimensions share it.
#include "attention/backward.cuh"

namespace fastattn::cuda {
namespace {

// The bias' gradient at a block of queries and keys, summed over all batches, heads, queries and
// keys that share it.
template <class T, int Dim>
__device__ void bias_gradient(const Inputs<T>& from, void* grad_bias) {
  using Tiles = BackwardTiles<sizeof(T), Dim>;
  constexpr int rows = Tiles::kRows, others = Tiles::kOthers;
  const AttentionBackwardScalars& all = from.all;
  const AttentionScalars& in = all.in;
  const int (&sizes)[4] = all.bias_sizes;
  // A dimension of size 1 is one block, which goes through all that share it.
  int block = static_cast<int>(blockIdx.x);
  const auto range = [&](int size, int length, int each) {
    if (size == 1) return int2{0, length};
    const int blocks = (length + each - 1) / each, own = block % blocks * each;
    block /= blocks;
    return int2{own, min(own + each, length)};
  };
  const int2 keys = range(sizes[3], in.kv_len, others), queries = range(sizes[2], in.q_len, rows);
  const int2 heads = range(sizes[1], in.heads, 1), batches = range(sizes[0], in.batch, 1);
  const int lane = lane_index(), row = static_cast<int>(threadIdx.x / kWarp) * 16;

  T* memory = reinterpret_cast<T*>(shared_memory);
  const SideTiles<T, Dim, rows> own(memory);
  const SideTiles<T, Dim, others> tiles(memory + 2 * Dim * rows);
  const uint64_t seed = in.threshold == 0 ? 0 : *from.seed;
  Accumulator<others> sum = {};
  for (int batch = batches.x; batch < batches.y; batch++) {
    const Sequence sequence = {batch, 0, in.q_len, 0, in.kv_len, in.offset};
    const Band band = Band::queries(in, sequence);
    for (int head = heads.x; head < heads.y; head++)
      for (int first = queries.x; first < queries.y; first += rows)
        for (int other = keys.x; other < keys.y; other += others) {
          if (other >= band.end(first, rows) || other + others <= band.begin(first)) continue;
          own.template fetch<false>(Side<T>::queries(from, sequence, head), first);
          tiles.template fetch<true>(Side<T>::keys(from, sequence, head / in.group), other);
          ptx::wait_for_copies();
          __syncthreads();
          Accumulator<others> weights = {}, grads = {};
          using Rows = Left<T, Dim, false>;
          multiply_transposed<others>(weights, Rows(own.scored, row), tiles.scored, in.head_dim);
          multiply_transposed<others>(grads, Rows(own.weighed, row), tiles.weighed, in.value_dim);
          const int i = first + row + lane / 4;
          const float2* statistics = from.statistics_of(sequence, head);
          const float2 of_rows[2] = {i < in.q_len ? statistics[i] : float2{},
                                     i + 8 < in.q_len ? statistics[i + 8] : float2{}};
          const Scores<T> scores(in, sequence, from.terms, head);
          Flags flags;
          if (in.threshold != 0)
            flags.kept =
                kept<others>(in.threshold, seed, from.head_number(sequence, head), i, other);
          if (from.terms.mask != nullptr)
            flags.hidden = scores.template hidden<others>(first + row, other);
          differentiate<T, false, false, others>(
              weights, grads, scores, flags, first + row, other,
              band.whole(first + row, 16, other, others), [&](int r) { return of_rows[r / 8]; });
#pragma unroll
          for (int n = 0; n < others / 8; n++)
#pragma unroll
            for (int e = 0; e < 4; e++) sum[n][e] += grads[n][e];
          __syncthreads();
        }
  }

  constexpr int pitch = others / 32 * 32 + 16;  // so that the lanes of a store meet all banks
  float* table = reinterpret_cast<float*>(shared_memory);  // [rows, others] of pitch
  static_assert(rows * pitch * sizeof(float) <= Tiles::kShared);
  using Own = Runs<false, others>;
#pragma unroll
  for (int run = 0; run < Own::kCount; run++) {
    const auto of = [&](int k) { return sum[Own::n(run, k)][Own::e(run, k)]; };
    ptx::store_shared(table + (row + Own::query(run)) * pitch + Own::key(run), of(0), of(1), of(2),
                      of(3));
  }
  __syncthreads();
  const int share_rows = sizes[2] == 1 ? rows : 1, share_cols = sizes[3] == 1 ? others : 1;
  const int own_rows = sizes[2] == 1 ? 1 : queries.y - queries.x;
  const int own_cols = sizes[3] == 1 ? 1 : keys.y - keys.x;
  for (int at = static_cast<int>(threadIdx.x); at < own_rows * own_cols;
       at += static_cast<int>(blockDim.x)) {
    const int r = at / own_cols, c = at % own_cols;
    float total = 0;
    for (int i = r; i < r + share_rows; i++)
      for (int j = c; j < c + share_cols; j++) total += table[i * pitch + j];
    const int64_t to =
        ((int64_t{sizes[0] == 1 ? 0 : batches.x} * sizes[1] + (sizes[1] == 1 ? 0 : heads.x)) *
             sizes[2] +
         (sizes[2] == 1 ? 0 : queries.x) + r) *
            sizes[3] +
        (sizes[3] == 1 ? 0 : keys.x) + c;
    if (in.wide_bias)
      static_cast<float*>(grad_bias)[to] = total;
    else
      static_cast<T*>(grad_bias)[to] = static_cast<T>(total);
  }
}

}  // namespace
}  // namespace fastattn::cuda

using namespace fastattn::cuda;

#define FASTATTN_BIAS(name, T, Dim)                                                              \
  using Tiles_##name##_##Dim = BackwardTiles<sizeof(T), Dim>;                                    \
  FASTATTN_KERNEL(Tiles_##name##_##Dim, Dim == 64 ? 3 : 1)                                       \
  attention_backward_bias_##name##_##Dim(FASTATTN_INPUTS(T), void* grad_bias,                    \
                                         const __grid_constant__ AttentionBackwardScalars all) { \
    bias_gradient<T, Dim>(FASTATTN_FROM, grad_bias);                                             \
  }

FASTATTN_FOREACH_TILES(FASTATTN_BIAS)
