// The gradient of attention's bias by products of warp groups, for 16 bits on sm_90a: as
// cuda_bias.cu. Of all that share a part of the bias, both sides of one are copied while another is
// worked on.
#include "attention/bias.cuh"
#include "attention/groups.cuh"

namespace fastattn::cuda {
namespace {

template <class T, int Dim>
__device__ void bias_gradient(const Inputs<T>& from, void* grad_bias) {
  using Tiles = GroupBiasTiles<Dim>;
  constexpr int rows = Tiles::kRows, others = Tiles::kOthers;
  using Part = BiasPart<rows, others>;
  static_assert(Part::kShared <= Tiles::kShared);
  const AttentionScalars& in = from.all.in;
  __shared__ Part part;  // for registers are few
  if (threadIdx.x == 0) part = Part::find(from.all);
  __syncthreads();
  const int row = static_cast<int>(threadIdx.x / kWarp) * 16;

  T* memory = reinterpret_cast<T*>(shared_memory);
  struct Pair {
    Panels<T, rows, Dim> query, grad_out;
    Panels<T, others, Dim> key, value;
  };
  const auto tiles = [&](int parity) {
    T* at = memory + parity * 2 * (rows + others) * Dim;
    return Pair{{at}, {at + rows * Dim}, {at + 2 * rows * Dim}, {at + (2 * rows + others) * Dim}};
  };

  using Step = typename Part::Step;
  const auto sequence_of = [&](const Step& step) {
    return Sequence{step.batch, 0, in.q_len, 0, in.kv_len, in.offset};
  };
  const auto band = [&] { return Band::queries(in, sequence_of({})); };
  // This step or the next of those that have logits.
  const auto next = [&](Step step) {
    while (part.there(step) && !band().meet(step.first, rows, step.other, others))
      step = part.behind(step);
    return step;
  };
  const auto fetch_both = [&](const Step& step, int parity) {
    if (!part.there(step) || threadIdx.x >= Tiles::kCopying) return;
    const Sequence sequence = sequence_of(step);
    const auto queries = Side<T>::queries(from, sequence, step.head);
    const auto keys = Side<T>::keys(from, sequence, step.head / in.group);
    const Pair to = tiles(parity);
    fetch<false, Tiles::kCopying>(to.query, queries.scored, step.first);
    fetch<false, Tiles::kCopying>(to.grad_out, queries.weighed, step.first);
    fetch<true, Tiles::kCopying>(to.key, keys.scored, step.other);
    fetch<true, Tiles::kCopying>(to.value, keys.weighed, step.other);
  };

  Accumulator<others> sum = {};
  Step behind = next(part.begin());
  fetch_both(behind, 0);
  hand_over();
#pragma unroll 1
  for (int parity = 0; part.there(behind); parity ^= 1) {
    const Step step = behind;
    const Pair pair = tiles(parity);
    Accumulator<others> weights, grads;
    ptx::begin_products();
    multiply_rows<others>(weights, pair.query, row / 64 * 64, pair.key);
    multiply_rows<others>(grads, pair.grad_out, row / 64 * 64, pair.value);
    ptx::commit_products();
    behind = next(part.behind(step));
    fetch_both(behind, parity ^ 1);

    const Sequence sequence = sequence_of(step);
    const int first = step.first + row, i = first + lane_index() / 4;
    const float2* statistics = from.statistics_of(sequence, step.head);
    const float2 of_rows[2] = {i < in.q_len ? statistics[i] : float2{},
                               i + 8 < in.q_len ? statistics[i + 8] : float2{}};
    const Scores<T> scores(in, sequence, from.terms, step.head);
    Flags flags;
    if (in.threshold != 0)
      flags.kept = kept<others>(in.threshold, *from.seed, from.head_number(sequence, step.head), i,
                                step.other);
    if (scores.masks) flags.hidden = scores.template hidden<others>(first, step.other);
    ptx::wait_for_products<0>(weights);
    ptx::settle(grads);
    differentiate<T, false, false, others>(
        weights, grads, in, [&] { return scores; }, [&](const Scores<T>&) { return flags; }, first,
        step.other, band().whole(first, 16, step.other, others),
        [&](int r) { return of_rows[r / 8]; });
#pragma unroll
    for (int n = 0; n < others / 8; n++)
#pragma unroll
      for (int e = 0; e < 4; e++) sum[n][e] += grads[n][e];
    hand_over();
  }
  part.template store<T>(from.all, sum, row, grad_bias);
}

}  // namespace
}  // namespace fastattn::cuda

using namespace fastattn::cuda;

#define FASTATTN_BIAS(name, T, Dim)                                                                \
  FASTATTN_KERNEL(GroupBiasTiles<Dim>, 1)                                                          \
  attention_backward_bias_##name##_##Dim##_sm90(                                                   \
      FASTATTN_INPUTS(T), void* grad_bias, const __grid_constant__ AttentionBackwardScalars all) { \
    bias_gradient<T, Dim>(FASTATTN_FROM, grad_bias);                                               \
  }

FASTATTN_BIAS(bf16, __nv_bfloat16, 64)
FASTATTN_BIAS(bf16, __nv_bfloat16, 128)
FASTATTN_BIAS(f16, __half, 64)
FASTATTN_BIAS(f16, __half, 128)
