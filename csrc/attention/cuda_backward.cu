// Attention backward on a GPU: queries and keys have a kernel each, which computes the scores
// again, so that nothing is summed in an order that time decides.
#include "attention/backward.cuh"

namespace fastattn::cuda {
namespace {

// The gradients of 64 queries or, if OfKeys, of 64 keys and values: `grad_scored` and
// `grad_weighed`, of which one is null where a block has one of them only.
template <class T, int Dim, bool OfKeys>
__device__ void rows_gradient(const Inputs<T>& from, const Starts& starts, T* grad_scored,
                              T* grad_weighed) {
  using Tiles = BackwardTiles<sizeof(T), Dim>;
  constexpr int rows = Tiles::kRows, others = Tiles::kOthers;
  constexpr int sums = OfKeys && !Tiles::kApart ? 2 : 1;
  using Rows = Left<T, Dim, sizeof(T) == 2 && sums * Dim <= 128>;  // beside the sums
  const AttentionBackwardScalars& all = from.all;
  const AttentionScalars& in = all.in;
  __shared__ alignas(8) Work work;  // so that a sequence's keys come in one load
  work.find(in, starts, OfKeys, rows);
  const Sequence& sequence = work.sequence;
  if (work.none(OfKeys)) return;
  const int head = work.head, first = work.first;
  const int lane = lane_index(), warp = static_cast<int>(threadIdx.x / kWarp);
  const int row = warp * 16;
  // If apart, every other block has the values' gradient.
  const bool of_values = OfKeys && Tiles::kApart && blockIdx.y == 1;

  T* memory = reinterpret_cast<T*>(shared_memory);
  const SideTiles<T, Dim, rows> own(memory);
  const auto other_tiles = [&](int parity) {
    return SideTiles<T, Dim, others>(memory + 2 * Dim * (rows + parity * others));
  };
  __shared__ float2 others_statistics[2][OfKeys ? others : 1];
  // What dropout keeps of 16 keys of each warp, and what the mask hides of 32.
  __shared__ uint16_t kept_keys[OfKeys ? others : 1][Tiles::kWarps];
  __shared__ uint32_t hidden_keys[OfKeys ? others : 1][Tiles::kWarps / 2];

  const auto own_side =
      OfKeys ? Side<T>::keys(from, sequence, head) : Side<T>::queries(from, sequence, head);
  const Band band = OfKeys ? Band::keys(in, sequence) : Band::queries(in, sequence);
  const int begin = band.begin(first) / others * others, end = band.end(first, rows);
  const int nearest = band.begin(first + row), last = band.end(first + row, 16);

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
  const auto fetch = [&](const Step& step, int parity) {
    const auto side = OfKeys ? Side<T>::queries(from, sequence, step.head)
                             : Side<T>::keys(from, sequence, step.head);
    other_tiles(parity).template fetch<!OfKeys>(side, step.first);
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
      const int i = first + row + lane / 4 + 8 * half;
      if (i < sequence.q_len) own_statistics[half] = from.statistics_of(sequence, head)[i];
    }
  const uint64_t seed = in.threshold == 0 ? 0 : *from.seed;

  // A NaN on the other side would spoil rows that do not meet it, since nothing times NaN is NaN.
  // Where a sum is not finite it is computed again, and such elements are taken for 0: a query that
  // meets one has statistics that are no number.
  Accumulator<Dim> sum[sums];
  __shared__ int strange;
  if (threadIdx.x == 0) strange = 0;
  bool careful = false;
  // What has been fetched is there, and nobody reads what will be overwritten.
  const auto take_turns = [] {
    ptx::wait_for_copies();
    __syncthreads();
  };
  own.template fetch<OfKeys>(own_side, first);
  while (true) {
    if (begin < end) fetch(start, 0);
    take_turns();
    if (careful) {
      own.clean();
      __syncthreads();
    }
    const Rows scored(own.scored, row), weighed(own.weighed, row);
#pragma unroll
    for (int s = 0; s < sums; s++)
#pragma unroll
      for (int n = 0; n < Dim / 8; n++)
#pragma unroll
        for (int e = 0; e < 4; e++) sum[s][n][e] = 0;
    int parity = 0;
#pragma unroll 1
    for (Step now = start; begin < end && now.head < last_head; parity ^= 1, take_turns()) {
      const Step step = now;
      now = behind(now);
      if (now.head < last_head) fetch(now, parity ^ 1);
      const auto tiles = other_tiles(parity);
      if (careful) {
        tiles.clean();
        __syncthreads();
      }
      // Made where they are asked for, which tiles inside do not.
      const auto scores = [&] {
        return Scores<T>(in, sequence, from.terms, OfKeys ? step.head : head);
      };
      if (OfKeys && from.terms.mask != nullptr) {
#pragma unroll 1
        for (int i = warp; i < others; i += Tiles::kWarps)
#pragma unroll
          for (int w = 0; w < Tiles::kWarps / 2; w++)
            hidden_keys[i][w] = scores().hidden_keys(step.first + i, first + 32 * w);
        __syncthreads();
      }
      if (OfKeys && in.threshold != 0) {
        // Warps draw the words of two queries at a time, which serve the keys of all warps.
#pragma unroll 2
        for (int i = 2 * warp + lane / 16; i < others; i += 2 * Tiles::kWarps) {
          const uint4 words =
              philox(seed, first / 4 + lane % 16, static_cast<uint32_t>(step.first + i),
                     from.head_number(sequence, step.head));
          for (int w = 0; w < 4; w++) {
            const uint32_t votes = __ballot_sync(kAllLanes, word(words, w) >= in.threshold);
            if (lane % 16 == w) kept_keys[i][w] = static_cast<uint16_t>(votes >> (lane / 16 * 16));
          }
        }
        __syncthreads();
      }
      if (!(step.first < last && step.first + others > nearest)) continue;

      Accumulator<others> weights = {}, grads = {};
      multiply_transposed<others>(weights, scored, tiles.scored, in.head_dim);
      if (!of_values) multiply_transposed<others>(grads, weighed, tiles.weighed, in.value_dim);
      using Own = Runs<OfKeys, others>;
      const auto flags = [&](const Scores<T>& own) {
        Flags found;
        if constexpr (OfKeys) {
#pragma unroll
          for (int run = 0; run < Own::kCount; run++) {
            const int query = Own::query(run), key = Own::key(run), bit = Own::bit(run, 0);
            if (in.threshold != 0) found.kept |= (kept_keys[query][warp] >> key & 3) << bit;
            if (own.masks)
              found.hidden |= (hidden_keys[query][warp / 2] >> (warp % 2 * 16 + key) & 3) << bit;
          }
        } else {
          if (in.threshold != 0)
            found.kept = kept<others>(in.threshold, seed, from.head_number(sequence, head),
                                      first + row + lane / 4, step.first);
          if (own.masks) found.hidden = own.template hidden<others>(first + row, step.first);
        }
        return found;
      };
      differentiate<T, OfKeys, true, others>(
          weights, grads, in, scores, flags, first + row, step.first,
          band.whole(first + row, 16, step.first, others),
          [&](int i) { return OfKeys ? others_statistics[parity][i] : own_statistics[i / 8]; });
      if constexpr (sums == 2) {
        multiply<others>(sum[0], grads, tiles.scored);
        multiply<others>(sum[1], weights, tiles.weighed);
      } else {
        if (of_values)
          multiply<others>(sum[0], weights, tiles.weighed);
        else
          multiply<others>(sum[0], grads, tiles.scored);
      }
    }
    __syncthreads();  // all have read their rows
    if (careful || !in.hides) break;
    bool finite = true;
#pragma unroll
    for (int s = 0; s < sums; s++)
#pragma unroll
      for (int n = 0; n < Dim / 8; n++)
#pragma unroll
        for (int e = 0; e < 4; e++) finite = finite && isfinite(sum[s][n][e]);
    if (!finite) strange = 1;
    __syncthreads();
    careful = strange != 0;
    if (!careful) break;
  }

#pragma unroll
  for (int n = 0; n < Dim / 8; n++)
#pragma unroll
    for (int e = 0; e < 4; e++) {
      sum[0][n][e] *= of_values ? in.kept : all.scale;
      if constexpr (sums == 2) sum[1][n][e] *= in.kept;
    }
  const auto leave = [&](T* grad, const Layout& layout, int cols, const Accumulator<Dim>& of,
                         const Tile<T, Dim>& tile) {
    store<OfKeys>(matrix(grad, layout, sequence.index, head, OfKeys ? sequence.key : sequence.query,
                         band.rows, cols),
                  first, of, tile, row);
  };
  if (of_values) {
    leave(grad_weighed, all.grad_value, in.value_dim, sum[0], own.weighed);
  } else {
    leave(grad_scored, OfKeys ? all.grad_key : all.grad_query, in.head_dim, sum[0], own.scored);
    if constexpr (sums == 2) leave(grad_weighed, all.grad_value, in.value_dim, sum[1], own.weighed);
  }
}

// A few threads for each row: its lse in base 2, which is inf instead of -inf so that weights of a
// row that sees nothing are 0, and grad_out . out - grad_lse. A row that met something that is not
// finite where keys may hide gets no number at all.
template <class T>
__device__ void row_statistics(const T* grad_out, const T* out, const float* lse,
                               const float* grad_lse, float2* statistics,
                               const AttentionBackwardScalars& all) {
  constexpr int team = kStatisticsTeam, each = 16 / sizeof(T);
  const AttentionScalars& in = all.in;
  const int64_t row = (int64_t{blockIdx.x} * blockDim.x + threadIdx.x) / team;
  const int64_t count = int64_t{in.batch} * in.heads * in.q_len;
  const int own = static_cast<int>(threadIdx.x) % team;
  const int i = static_cast<int>(row % in.q_len),
            head = static_cast<int>(row / in.q_len % in.heads);
  const int batch = static_cast<int>(row / in.q_len / in.heads);
  float total = 0;
  if (row < count && grad_out != nullptr) {
    const auto grads = matrix(grad_out, all.grad_out, batch, head, 0, in.q_len, in.value_dim);
    const auto outs = matrix(out, in.out, batch, head, 0, in.q_len, in.value_dim);
    const T* grad = grads.data + i * grads.row_stride;
    const T* from = outs.data + i * outs.row_stride;
    const int whole = grads.aligned && outs.aligned ? in.value_dim / each * each : 0;
    for (int c = own * each; c < whole; c += team * each) {
      float a[each], b[each];
      load(a, grad + c);
      load(b, from + c);
#pragma unroll
      for (int k = 0; k < each; k++) total += a[k] * b[k];
    }
    for (int c = whole + own; c < in.value_dim; c += team)
      total += static_cast<float>(grad[c * grads.col_stride]) *
               static_cast<float>(from[c * outs.col_stride]);
  }
#pragma unroll
  for (int apart = 1; apart < team; apart *= 2) total += __shfl_xor_sync(kAllLanes, total, apart);
  if (row >= count || own != 0) return;
  const float delta = total - (grad_lse == nullptr ? 0 : grad_lse[row]);
  const float base = lse[row] == -kInfinity ? kInfinity : lse[row] * kLog2e;
  statistics[row] = {in.hides && !isfinite(delta) ? kNan : base, delta};
}

}  // namespace
}  // namespace fastattn::cuda

using namespace fastattn::cuda;

#define FASTATTN_STATISTICS(name, T)                                                               \
  extern "C" __global__ void __launch_bounds__(kStatisticsThreads, 1) attention_statistics_##name( \
      const T* grad_out, const T* out, const float* lse, const float* grad_lse,                    \
      float2* statistics, const __grid_constant__ AttentionBackwardScalars all) {                  \
    row_statistics(grad_out, out, lse, grad_lse, statistics, all);                                 \
  }

FASTATTN_STATISTICS(f32, float)
FASTATTN_STATISTICS(bf16, __nv_bfloat16)
FASTATTN_STATISTICS(f16, __half)

// A head's sink draws weight from every row of the head.
extern "C" __global__ void __launch_bounds__(kStatisticsThreads, 1)
    attention_backward_sinks(const double* sinks, const float2* statistics, double* grad_sinks,
                             const __grid_constant__ AttentionBackwardScalars all) {
  __shared__ double parts[kStatisticsThreads];
  const int head = static_cast<int>(blockIdx.x), own = static_cast<int>(threadIdx.x);
  const float sink = static_cast<float>(sinks[head]) * kLog2e;
  double total = 0;
  for (int batch = 0; batch < all.in.batch; batch++)
    for (int i = own; i < all.in.q_len; i += kStatisticsThreads) {
      const float2 of_row = statistics[(int64_t{batch} * all.in.heads + head) * all.in.q_len + i];
      if (of_row.x != kInfinity) total -= ptx::exp2(sink - of_row.x) * of_row.y;
    }
  parts[own] = total;
  for (int apart = kStatisticsThreads / 2; apart > 0; apart /= 2) {
    __syncthreads();
    if (own < apart) parts[own] += parts[own + apart];
  }
  if (own == 0) grad_sinks[head] = parts[0];
}

#define FASTATTN_BACKWARD(name, T, Dim)                                                           \
  using Tiles_##name##_##Dim = BackwardTiles<sizeof(T), Dim>;                                     \
  FASTATTN_KERNEL(Tiles_##name##_##Dim, Tiles_##name##_##Dim::kWidth == 128 ? 3 : 1)              \
  attention_backward_queries_##name##_##Dim(                                                      \
      FASTATTN_INPUTS(T), const void* query_starts, const void* key_starts, T* grad_query,        \
      const __grid_constant__ AttentionBackwardScalars all) {                                     \
    rows_gradient<T, Dim, false>(FASTATTN_FROM, {query_starts, key_starts}, grad_query, nullptr); \
  }                                                                                               \
  FASTATTN_KERNEL(Tiles_##name##_##Dim, 1)                                                        \
  attention_backward_keys_##name##_##Dim(FASTATTN_INPUTS(T), const void* query_starts,            \
                                         const void* key_starts, T* grad_key, T* grad_value,      \
                                         const __grid_constant__ AttentionBackwardScalars all) {  \
    rows_gradient<T, Dim, true>(FASTATTN_FROM, {query_starts, key_starts}, grad_key, grad_value); \
  }

FASTATTN_FOREACH_TILES(FASTATTN_BACKWARD)
