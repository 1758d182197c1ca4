// Attention backward by products of warp groups, for 16 bits on sm_90a: as cuda_backward.cu, of
// calls without extras. Sums over the other side take weights and gradients from registers, so that
// nothing but rows lies in shared memory.
#include "attention/backward.cuh"
#include "attention/groups.cuh"

namespace fastattn::cuda {
namespace {

template <class T, int Dim, bool OfKeys>
__device__ void rows_gradient(const Inputs<T>& from, const Starts& starts, T* grad_scored,
                              T* grad_weighed) {
  using Tiles = GroupBackwardTiles<Dim>;
  constexpr int rows = Tiles::kRows, others = Tiles::kOthers, sums = OfKeys ? 2 : 1;
  const AttentionBackwardScalars& all = from.all;
  const AttentionScalars& in = all.in;
  __shared__ Work work;
  __shared__ int strange;
  if (threadIdx.x == 0) strange = 0;
  work.find(in, starts, OfKeys, rows);
  const Sequence& sequence = work.sequence;
  if (work.none(OfKeys)) return;
  const int head = work.head, first = work.first;
  // This warp's first row: counted anew each time, for registers are few.
  const auto row = [] { return ptx::thread_index() / static_cast<int>(kWarp) * 16; };

  T* memory = reinterpret_cast<T*>(shared_memory);
  const Panels<T, rows, Dim> own_scored{memory}, own_weighed{memory + rows * Dim};
  const auto scored = [&](int parity) {
    return Panels<T, others, Dim>{memory + 2 * (rows + parity * others) * Dim};
  };
  const auto weighed = [&](int parity) {
    return Panels<T, others, Dim>{scored(parity).memory + others * Dim};
  };
  __shared__ float2 others_statistics[2][OfKeys ? others : 1];

  const auto own_side =
      OfKeys ? Side<T>::keys(from, sequence, head) : Side<T>::queries(from, sequence, head);
  const Band band = OfKeys ? Band::keys(in, sequence) : Band::queries(in, sequence);
  const int begin = band.begin(first) / others * others, end = band.end(first, rows);

  // The other side's heads, one after the other, and their blocks.
  struct Step {
    int head, first;
  };
  const Step start = {OfKeys ? head * in.group : head / in.group, begin};
  const int last_head = start.head + (OfKeys ? in.group : 1);
  const auto behind = [&](const Step& step) {
    return step.first + others < end ? Step{step.head, step.first + others}
                                     : Step{step.head + 1, begin};
  };
  const auto fetch_others = [&](const Step& step, int parity) {
    if (threadIdx.x >= Tiles::kCopying) return;
    const auto side = OfKeys ? Side<T>::queries(from, sequence, step.head)
                             : Side<T>::keys(from, sequence, step.head);
    fetch<!OfKeys, Tiles::kCopying>(scored(parity), side.scored, step.first);
    fetch<!OfKeys, Tiles::kCopying>(weighed(parity), side.weighed, step.first);
    if constexpr (OfKeys) {
      const int i = step.first + static_cast<int>(threadIdx.x);
      const float2* statistics = from.statistics_of(sequence, step.head);
      if (threadIdx.x < others)
        ptx::copy_pair_async(&others_statistics[parity][threadIdx.x],
                             i < sequence.q_len ? statistics + i : from.statistics,
                             i < sequence.q_len ? 8 : 0);
    }
  };
  float2 own_statistics[2] = {};
  if constexpr (!OfKeys)
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const int i = first + row() + lane_index() / 4 + 8 * half;
      if (i < sequence.q_len) own_statistics[half] = from.statistics_of(sequence, head)[i];
    }

  Accumulator<Dim> sum[sums];
  // Takes what is not finite for 0 if careful: see cuda_backward.cu.
  const auto clean_rows = [](T* tiles, int count) {
    clean(tiles, 2 * count * Dim, static_cast<int>(threadIdx.x), Tiles::kThreads);
    hand_over();
  };
  const auto sum_up = [&](auto careful) {
#pragma unroll
    for (int s = 0; s < sums; s++)
#pragma unroll
      for (int n = 0; n < Dim / 8; n++)
#pragma unroll
        for (int e = 0; e < 4; e++) sum[s][n][e] = 0;
    if (begin >= end) return;
    fetch_others(start, 0);
    hand_over();
    if constexpr (decltype(careful)::value) clean_rows(own_scored.memory, rows);
    int parity = 0;
#pragma unroll 1
    for (Step now = start; now.head < last_head; parity ^= 1) {
      const Step step = now;
      now = behind(now);
      if constexpr (decltype(careful)::value) clean_rows(scored(parity).memory, others);
      Accumulator<others> weights, grads;
      ptx::begin_products();
      multiply_rows<others>(weights, own_scored, row() / 64 * 64, scored(parity));
      multiply_rows<others>(grads, own_weighed, row() / 64 * 64, weighed(parity));
      ptx::commit_products();
      if (now.head < last_head) fetch_others(now, parity ^ 1);
      ptx::wait_for_products<0>(weights);
      ptx::settle(grads);
      differentiate<T, OfKeys, true, false, others>(
          weights, grads, from, sequence, OfKeys ? step.head : head, first + row(), step.first, 0,
          band.whole(first + row(), 16, step.first, others), [](const Scores<T>&) { return 0u; },
          [&](int i) { return OfKeys ? others_statistics[parity][i] : own_statistics[i / 8]; });
      uint32_t left[sums][others / 16][4];
      pack<T, others>(left[0], grads);
      if constexpr (OfKeys) pack<T, others>(left[1], weights);
      ptx::begin_products();
      multiply<Dim>(sum[0], left[0], scored(parity));
      if constexpr (OfKeys) multiply<Dim>(sum[1], left[1], weighed(parity));
      ptx::commit_products();
      ptx::wait_for_products<0>(sum[0]);
      if constexpr (OfKeys) ptx::settle(sum[1]);
      hand_over();
    }
  };
  if (threadIdx.x < Tiles::kCopying) {
    fetch<OfKeys, Tiles::kCopying>(own_scored, own_side.scored, first);
    fetch<OfKeys, Tiles::kCopying>(own_weighed, own_side.weighed, first);
  }
  sum_up(std::false_type());
  ptx::wait_for_copies();  // of rows that meet none
  __syncthreads();         // all have read theirs
  if (in.hides) {
    bool finite = true;
#pragma unroll
    for (int s = 0; s < sums; s++)
#pragma unroll
      for (int n = 0; n < Dim / 8; n++)
#pragma unroll
        for (int e = 0; e < 4; e++) finite = finite && isfinite(sum[s][n][e]);
    if (!finite) strange = 1;
    __syncthreads();
    if (strange) sum_up(std::true_type());
  }

#pragma unroll
  for (int n = 0; n < Dim / 8; n++)
#pragma unroll
    for (int e = 0; e < 4; e++) sum[0][n][e] *= all.scale;
  const auto leave = [&](T* grad, const Layout& layout, int cols, const Accumulator<Dim>& of,
                         const Panels<T, rows, Dim>& tile) {
    store<OfKeys>(matrix(grad, layout, sequence.index, head, OfKeys ? sequence.key : sequence.query,
                         band.rows, cols),
                  first, of, tile, row());
  };
  leave(grad_scored, OfKeys ? all.grad_key : all.grad_query, in.head_dim, sum[0], own_scored);
  if constexpr (OfKeys) leave(grad_weighed, all.grad_value, in.value_dim, sum[1], own_weighed);
}

}  // namespace
}  // namespace fastattn::cuda

using namespace fastattn::cuda;

#define FASTATTN_BACKWARD(name, T, Dim)                                                           \
  FASTATTN_KERNEL(GroupBackwardTiles<Dim>, 1)                                                     \
  attention_backward_queries_##name##_##Dim##_sm90(                                               \
      FASTATTN_INPUTS(T), const void* query_starts, const void* key_starts, T* grad_query,        \
      const __grid_constant__ AttentionBackwardScalars all) {                                     \
    rows_gradient<T, Dim, false>(FASTATTN_FROM, {query_starts, key_starts}, grad_query, nullptr); \
  }                                                                                               \
  FASTATTN_KERNEL(GroupBackwardTiles<Dim>, 1)                                                     \
  attention_backward_keys_##name##_##Dim##_sm90(                                                  \
      FASTATTN_INPUTS(T), const void* query_starts, const void* key_starts, T* grad_key,          \
      T* grad_value, const __grid_constant__ AttentionBackwardScalars all) {                      \
    rows_gradient<T, Dim, true>(FASTATTN_FROM, {query_starts, key_starts}, grad_key, grad_value); \
  }

FASTATTN_BACKWARD(bf16, __nv_bfloat16, 64)
FASTATTN_BACKWARD(bf16, __nv_bfloat16, 128)
FASTATTN_BACKWARD(f16, __half, 64)
FASTATTN_BACKWARD(f16, __half, 128)
