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
  using Values = Tile<T, Dim, sizeof(T) == 2>;   // fp32 reads one row at a time
  constexpr int keys = Tiles::kKeys, more = 15;  // rows of a warp, behind its first
  __shared__ Work work;
  work.find(in, starts, false, Tiles::kQueries);
  const Sequence& sequence = work.sequence;
  if (work.none(false)) return;
  const int own = work.head / in.group;  // head of keys
  const int lane = lane_index(), q = lane % 4;
  // Of this warp, and of this lane among all: counted anew each time, for registers are few.
  const auto row = [] { return ptx::thread_index() / static_cast<int>(kWarp) * 16; };
  const auto first_row = [&] {
    return work.first + row() + ptx::thread_index() % static_cast<int>(kWarp) / 4;
  };

  T* memory = reinterpret_cast<T*>(shared_memory);
  const Tile<T, Dim> query_tile{memory};
  const auto key_tile = [&](int parity) {
    return Tile<T, Dim>{memory + (Tiles::kQueries + parity * 2 * keys) * Dim};
  };
  const auto value_tile = [&](int parity) { return Values{key_tile(parity).memory + keys * Dim}; };
  const auto all_queries = matrix(query, in.query, sequence.index, work.head, sequence.query,
                                  sequence.q_len, in.head_dim);
  __shared__ const T *first_key, *first_value;  // there as Work is, for registers are few
  if (threadIdx.x == 0) {
    first_key = row_at(key, in.key, sequence.index, own, sequence.key);
    first_value = row_at(value, in.value, sequence.index, own, sequence.key);
  }
  __syncthreads();

  const Terms terms = {mask, bias, alibi_slopes};
  const Scores<T> scores =
      Extras ? Scores<T>(in, sequence, terms, work.head) : Scores<T>(in, sequence);
  const uint64_t seed = Extras && in.threshold != 0 ? *seed_at : 0;

  // Keys up to `end` are all that these queries can see. Of this warp's the first sees those from
  // `nearest` up to `last`, its window's and the sequence's end, and each of the others one more.
  const int end =
      min(min(work.first + Tiles::kQueries, sequence.q_len) + sequence.offset + in.right,
          sequence.kv_len);
  const int upper = work.first + row();
  const int last =
      upper < sequence.q_len ? min(upper + sequence.offset + in.right + 1, sequence.kv_len) : -more;

  Accumulator<Dim> sum;
  float highest[2], total[2];  // of the two rows

  // A NaN among the values would spoil the rows that do not see it, too, since nothing times NaN is
  // NaN. Where the result is not finite it is computed again, with care.
  __shared__ int careful;
  if (threadIdx.x == 0) careful = 0;
  const auto fetch = [&](int j) {
    copy<keys, Tiles::kThreads, true>(key_tile(j / keys % 2),
                                      matrix(first_key, in.key, sequence.kv_len, in.head_dim), j);
    copy<keys, Tiles::kThreads, true>(
        value_tile(j / keys % 2), matrix(first_value, in.value, sequence.kv_len, in.value_dim), j);
  };
  // What has been fetched is there, and nobody reads what will be overwritten.
  const auto take_turns = [] {
    ptx::wait_for_copies();
    __syncthreads();
  };
  copy<Tiles::kQueries, Tiles::kThreads, false>(query_tile, all_queries, work.first);
  while (true) {
    const int begin = max(work.first + sequence.offset - in.left, 0) / keys * keys;
    if (begin < end) fetch(begin);
    take_turns();
    const Left<T, Dim, Tiles::kNarrow> queries(query_tile, row());
#pragma unroll
    for (int n = 0; n < Dim / 8; n++)
#pragma unroll
      for (int e = 0; e < 4; e++) sum[n][e] = 0;
    const float sink =
        sinks == nullptr ? -kInfinity : static_cast<float>(sinks[work.head]) * kLog2e;
#pragma unroll
    for (int half = 0; half < 2; half++) {
      highest[half] = sink;
      total[half] = sink > -kInfinity && q == 0 ? 1 : 0;
    }
#pragma unroll 1
    for (int j = begin; j < end; j += keys, take_turns()) {
      if (j + keys < end) fetch(j + keys);
      const Values tile = value_tile(j / keys % 2);
      const int nearest = work.first + row() + sequence.offset - in.left;
      if (!careful && !(j < last + more && j + keys > nearest)) continue;
      const bool whole = in.plain && j >= nearest + more && j + keys <= last;

      Accumulator<keys> weights = {};
      multiply_transposed<keys>(weights, queries, key_tile(j / keys % 2), in.head_dim);
      if (whole) {
#pragma unroll
        for (int n = 0; n < keys / 8; n++)
#pragma unroll
          for (int e = 0; e < 4; e++)  // what is infinite is no number, see Scores
            total[e / 2] = fmaf(weights[n][e], 0, total[e / 2]);
      } else {
        scores.template all<keys, Extras>(weights, upper, j);
      }
      if (careful) {
        find_strange<keys, Dim>(tile, in.value_dim, weights, sum);
        __syncthreads();
        clean(tile.memory, keys * Dim, static_cast<int>(threadIdx.x), static_cast<int>(blockDim.x));
        __syncthreads();
      }
      weigh<keys, Dim>(weights, whole ? in.scale : 1, highest, total, sum);
      if (Extras && in.threshold != 0)
        drop<false, keys>(weights,
                          kept<keys>(in.threshold, seed,
                                     static_cast<uint32_t>(sequence.index * in.heads + work.head),
                                     first_row(), j),
                          in.kept);
      multiply<keys>(sum, weights, tile);
    }
    const bool again = !careful && in.hides;
    __syncthreads();  // all have read that, and their queries
    if (!again) break;
    bool finite = true;
#pragma unroll
    for (int n = 0; n < Dim / 8; n++)
#pragma unroll
      for (int e = 0; e < 4; e++) finite = finite && isfinite(sum[n][e]);
    if (!finite) careful = 1;
    __syncthreads();
    if (!careful) break;
  }

  add_up(total);
#pragma unroll
  for (int half = 0; half < 2; half++) {
    rescale<Dim>(sum, half, total[half] == 0 ? 0 : 1 / total[half]);
    const int i = first_row() + 8 * half;
    if (q == 0 && i < sequence.q_len)
      lse[sequence.row(in, work.head) + i] =
          total[half] == 0 ? -kInfinity : (highest[half] + log2f(total[half])) * kLn2;
  }
  const auto all_outs =
      matrix(out, in.out, sequence.index, work.head, sequence.query, sequence.q_len, in.value_dim);
  store<false>(all_outs, work.first, sum, query_tile, row());
}

}  // namespace
}  // namespace fastattn::cuda

using namespace fastattn::cuda;

#define FASTATTN_ATTENTION(name, T, Dim, Extras)                                               \
  extern "C" __global__ void __launch_bounds__(AttentionTiles<sizeof(T), Dim>::kThreads,       \
                                               (!Extras && Dim == 64) ? 2                      \
                                               : Dim == 32            ? 4                      \
                                                                      : 1)                     \
      attention_forward_##name##_##Dim(                                                        \
          const T* query, const T* key, const T* value, const uint8_t* mask, const void* bias, \
          const float* alibi_slopes, const double* sinks, const uint64_t* seed,                \
          const void* query_starts, const void* key_starts, T* out, float* lse,                \
          const __grid_constant__ AttentionScalars in) {                                       \
    forward<T, Dim, Extras>(query, key, value, mask, bias, alibi_slopes, sinks, seed,          \
                            {query_starts, key_starts}, out, lse, in);                         \
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
