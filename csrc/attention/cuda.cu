// Attention on a GPU (Dao 2023, arXiv:2307.08691): a block of queries against blocks of keys.
#include "attention/scores.cuh"

namespace fastattn::cuda {
namespace {

template <class T, int Dim, bool Extras>
__device__ void forward(const T* query, const T* key, const T* value, const uint8_t* mask,
                        const void* bias, const float* alibi_slopes, const double* sinks,
                        const uint64_t* seed_at, const Starts& starts, T* out, float* lse,
                        const AttentionScalars& in) {
  using Tiles = AttentionTiles<sizeof(T), Dim>;
  using Values = Tile<T, Dim, sizeof(T) == 2>;  // fp32 reads one row at a time
  constexpr int keys = Tiles::kKeys;
  __shared__ Sequence sequence;
  const Work work(sequence, in, starts, false, Tiles::kQueries);
  if (work.none(false)) return;
  const int own = work.head / in.group;  // head of keys
  const int lane = lane_index(), q = lane % 4;
  const int row = static_cast<int>(threadIdx.x / kWarp) * 16,
            first_row = work.first + row + lane / 4;

  T* memory = reinterpret_cast<T*>(shared_memory);
  const Tile<T, Dim> queries{memory};
  const auto key_tile = [&](int parity) {
    return Tile<T, Dim>{memory + (Tiles::kQueries + parity * 2 * keys) * Dim};
  };
  const auto value_tile = [&](int parity) { return Values{key_tile(parity).memory + keys * Dim}; };
  const auto all_queries = matrix(query, in.query, sequence.index, work.head, sequence.query,
                                  sequence.q_len, in.head_dim);
  const auto all_keys =
      matrix(key, in.key, sequence.index, own, sequence.key, sequence.kv_len, in.head_dim);
  const auto all_values =
      matrix(value, in.value, sequence.index, own, sequence.key, sequence.kv_len, in.value_dim);

  const Terms terms = {mask, bias, alibi_slopes};
  const Scores<T> scores =
      Extras ? Scores<T>(in, sequence, terms, work.head) : Scores<T>(in, sequence);
  const uint64_t seed = Extras && in.threshold != 0 ? *seed_at : 0;

  // Keys [begin, end) are all that these queries can see, from a whole block on.
  const int begin = max(work.first + sequence.offset - in.left, 0) / keys * keys;
  const int end =
      min(min(work.first + Tiles::kQueries, sequence.q_len) + sequence.offset + in.right,
          sequence.kv_len);

  // And [nearest, last) are all that this warp's can.
  const int upper = work.first + row, lower = min(upper + 16, sequence.q_len);
  const int nearest = upper + sequence.offset - in.left;
  const int last =
      upper < sequence.q_len ? min(lower + sequence.offset + in.right, sequence.kv_len) : 0;

  Accumulator<Dim> sum;
  float highest[2], total[2];  // of the two rows
  const float sink = sinks == nullptr ? -kInfinity : static_cast<float>(sinks[work.head]) * kLog2e;
  bool spoilt[2];

  // A NaN among the values would spoil the rows that do not see it, too, since nothing times NaN is
  // NaN. Where the result is not finite it is computed again, with care.
  __shared__ int strange;
  if (threadIdx.x == 0) strange = 0;
  bool careful = false;
  while (true) {
#pragma unroll
    for (int n = 0; n < Dim / 8; n++)
#pragma unroll
      for (int e = 0; e < 4; e++) sum[n][e] = 0;
#pragma unroll
    for (int half = 0; half < 2; half++) {
      highest[half] = sink;
      total[half] = sink > -kInfinity && q == 0 ? 1 : 0;
      spoilt[half] = false;
    }
    copy<Tiles::kQueries>(queries, all_queries, work.first);
    const auto fetch = [&](int j) {
      copy<keys>(key_tile(j / keys % 2), all_keys, j);
      copy<keys>(value_tile(j / keys % 2), all_values, j);
    };
    if (begin < end) fetch(begin);
#pragma unroll 1
    for (int j = begin; j < end; j += keys) {
      ptx::wait_for_copies();
      __syncthreads();
      if (j + keys < end) fetch(j + keys);
      const Values tile = value_tile(j / keys % 2);
      if (!careful && !(j < last && j + keys > nearest)) continue;

      Accumulator<keys> weights = {};
      multiply_transposed<keys>(weights, queries, row, key_tile(j / keys % 2), in.head_dim);
#pragma unroll
      for (int n = 0; n < keys / 8; n++)
#pragma unroll
        for (int e = 0; e < 4; e++)
          weights[n][e] = scores.template operator()<Extras>(weights[n][e], first_row + e / 2 * 8,
                                                             j + n * 8 + 2 * q + e % 2);
      if (careful) {
        find_strange<keys>(tile, in.value_dim, weights, spoilt);
        __syncthreads();
        clean(tile.memory, keys * Dim, static_cast<int>(threadIdx.x), static_cast<int>(blockDim.x));
        __syncthreads();
      }
      weigh<keys, Dim>(weights, highest, total, sum);
      if (Extras && in.threshold != 0)
        drop<keys>(
            weights,
            kept<keys>(in.threshold, seed,
                       static_cast<uint32_t>(sequence.index * in.heads + work.head), first_row, j),
            in.kept);
      multiply<keys>(sum, weights, tile);
    }
    ptx::wait_for_copies();
    __syncthreads();
    if (careful || !in.hides) break;
    bool finite = true;
#pragma unroll
    for (int n = 0; n < Dim / 8; n++)
#pragma unroll
      for (int e = 0; e < 4; e++) finite = finite && isfinite(sum[n][e]);
    if (!finite) strange = 1;
    __syncthreads();
    careful = strange != 0;
    if (!careful) break;
  }

#pragma unroll
  for (int half = 0; half < 2; half++) {
    for (int apart = 1; apart < 4; apart *= 2) {
      total[half] += __shfl_xor_sync(kAllLanes, total[half], apart);
      spoilt[half] =
          __shfl_xor_sync(kAllLanes, static_cast<int>(spoilt[half]), apart) || spoilt[half];
    }
    const float factor = spoilt[half] ? kNan : total[half] == 0 ? 0 : 1 / total[half];
#pragma unroll
    for (int n = 0; n < Dim / 8; n++) sum[n][2 * half] *= factor, sum[n][2 * half + 1] *= factor;
    const int i = first_row + 8 * half;
    if (q == 0 && i < sequence.q_len)
      lse[sequence.row(in, work.head) + i] =
          total[half] == 0 ? -kInfinity : (highest[half] + log2f(total[half])) * kLn2;
  }
  const auto to =
      matrix(out, in.out, sequence.index, work.head, sequence.query, sequence.q_len, in.value_dim);
  store(to, work.first, sum, queries, row);
}

}  // namespace
}  // namespace fastattn::cuda

using namespace fastattn::cuda;

#define FASTATTN_ATTENTION(name, T, Dim, Extras)                                                 \
  extern "C" __global__ void __launch_bounds__(AttentionTiles<sizeof(T), Dim>::kWarps* kWarp, 1) \
      attention_forward_##name##_##Dim(                                                          \
          const T* query, const T* key, const T* value, const uint8_t* mask, const void* bias,   \
          const float* alibi_slopes, const double* sinks, const uint64_t* seed,                  \
          const void* query_starts, const void* key_starts, T* out, float* lse,                  \
          const __grid_constant__ AttentionScalars in) {                                         \
    forward<T, Dim, Extras>(query, key, value, mask, bias, alibi_slopes, sinks, seed,            \
                            {query_starts, key_starts}, out, lse, in);                           \
  }

FASTATTN_ATTENTION(f32_extra, float, 32, true)
FASTATTN_ATTENTION(f32_extra, float, 64, true)
FASTATTN_ATTENTION(f32_extra, float, 128, true)
FASTATTN_ATTENTION(bf16, __nv_bfloat16, 64, false)
FASTATTN_ATTENTION(bf16, __nv_bfloat16, 128, false)
FASTATTN_ATTENTION(bf16_extra, __nv_bfloat16, 64, true)
FASTATTN_ATTENTION(bf16_extra, __nv_bfloat16, 128, true)
FASTATTN_ATTENTION(bf16_extra, __nv_bfloat16, 256, true)
FASTATTN_ATTENTION(f16, __half, 64, false)
FASTATTN_ATTENTION(f16, __half, 128, false)
FASTATTN_ATTENTION(f16_extra, __half, 64, true)
FASTATTN_ATTENTION(f16_extra, __half, 128, true)
FASTATTN_ATTENTION(f16_extra, __half, 256, true)
