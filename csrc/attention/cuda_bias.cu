// The gradient of attention's bias on a GPU, whatever dimensions share it.
#include "attention/bias.cuh"

namespace fastattn::cuda {
namespace {

// The bias' gradient at a block of queries and keys, summed over all batches, heads, queries and
// keys that share it.
template <class T, int Dim>
__device__ void bias_gradient(const Inputs<T>& from, void* grad_bias) {
  using Tiles = BackwardTiles<sizeof(T), Dim>;
  constexpr int rows = Tiles::kRows, others = Tiles::kOthers;
  using Part = BiasPart<rows, others>;
  static_assert(Part::kShared <= Tiles::kShared);
  const AttentionScalars& in = from.all.in;
  const Part part = Part::find(from.all);
  const int lane = lane_index(), row = static_cast<int>(threadIdx.x / kWarp) * 16;

  T* memory = reinterpret_cast<T*>(shared_memory);
  const SideTiles<T, Dim, rows> own(memory);
  const SideTiles<T, Dim, others> tiles(memory + 2 * Dim * rows);
  const uint64_t seed = in.threshold == 0 ? 0 : *from.seed;
  Accumulator<others> sum = {};
  for (auto step = part.begin(); part.there(step); step = part.behind(step)) {
    const auto [batch, head, first, other] = step;
    const Sequence sequence = {batch, 0, in.q_len, 0, in.kv_len, in.offset};
    const Band band = Band::queries(in, sequence);
    if (!band.meet(first, rows, other, others)) continue;
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
    const auto flags = [&](const Scores<T>& scores) {
      Flags found;
      if (in.threshold != 0)
        found.kept = kept<others>(in.threshold, seed, from.head_number(sequence, head), i, other);
      if (scores.masks) found.hidden = scores.template hidden<others>(first + row, other);
      return found;
    };
    differentiate<T, false, false, others>(
        weights, grads, in, [&] { return Scores<T>(in, sequence, from.terms, head); }, flags,
        first + row, other, band.whole(first + row, 16, other, others),
        [&](int r) { return of_rows[r / 8]; });
#pragma unroll
    for (int n = 0; n < others / 8; n++)
#pragma unroll
      for (int e = 0; e < 4; e++) sum[n][e] += grads[n][e];
    __syncthreads();
  }
  part.template store<T>(from.all, sum, row, grad_bias);
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
