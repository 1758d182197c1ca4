// Attention by products of warp groups, for 16 bits on sm_90a (Shah et al. 2024, arXiv:2407.08608).
//
// As cuda.cu, but that both products run beside the threads: while weights of one block of keys
// multiply its values, those of the next become weights. Keys are therefore one block ahead of
// values, and both lie in shared memory twice.
#include "attention/groups.cuh"

namespace fastattn::cuda {
namespace {

template <class T, int Dim, bool Extras>
__device__ void forward(const T* query, const T* key, const T* value, const uint8_t* mask,
                        const void* bias, const float* alibi_slopes, const double* sinks,
                        const uint64_t* seed_at, const Starts& starts, T* out, float* lse,
                        const AttentionScalars& in) {
  using Tiles = GroupTiles<Dim, Extras>;
  constexpr int keys = Tiles::kKeys, more = 15;  // rows of a warp, behind its first
  __shared__ Work work;
  __shared__ int spoilt;  // some row, by a value that is no number: see cuda.cu
  if (threadIdx.x == 0) spoilt = 0;
  work.find(in, starts, false, Tiles::kQueries);
  const Sequence& sequence = work.sequence;
  if (work.none(false)) return;
  const int own = work.head / in.group;  // head of keys
  // Of this warp the first row, and of this lane the place among its 32: counted anew each time,
  // for registers are few.
  const auto row = [] { return ptx::thread_index() / static_cast<int>(kWarp) * 16; };
  const auto lane = [] { return ptx::thread_index() % static_cast<int>(kWarp); };

  T* memory = reinterpret_cast<T*>(shared_memory);
  const Panels<T, Tiles::kQueries, Dim> queries{memory};
  const auto tile = [&](int which, int j) {
    const int place = Tiles::kQueries + (which + j / keys % 2) * keys;
    return Panels<T, keys, Dim>{memory + place * Dim};
  };
  const auto key_tile = [&](int j) { return tile(0, j); };
  const auto value_tile = [&](int j) { return tile(2, j); };
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

  // Keys from `begin` up to `end` are all that these queries can see.
  const int begin = max(work.first + sequence.offset - in.left, 0) / keys * keys;
  const int end =
      min(min(work.first + Tiles::kQueries, sequence.q_len) + sequence.offset + in.right,
          sequence.kv_len);
  // Whether all of a warp's queries see the keys from j on. The first sees those from `nearest` up
  // to `last`, and each of the others one more.
  const auto all_see = [&](int j) {
    const int upper = work.first + row(), place = upper + sequence.offset;
    const int nearest = place - in.left, last = min(place + in.right + 1, sequence.kv_len);
    return in.plain && upper < sequence.q_len && j >= nearest + more && j + keys <= last;
  };

  Accumulator<Dim> sum;
  Accumulator<keys> weights;
  uint32_t left[keys / 16][4];  // weights, as a product takes them
  float highest[2], total[2];   // of the two rows

  const auto fetch_keys = [&](int j) {
    if (j < end && threadIdx.x < Tiles::kCopying)
      fetch<true, Tiles::kCopying>(key_tile(j),
                                   matrix(first_key, in.key, sequence.kv_len, in.head_dim), j);
  };
  const auto fetch_values = [&](int j) {
    if (j < end && threadIdx.x < Tiles::kCopying)
      fetch<true, Tiles::kCopying>(value_tile(j),
                                   matrix(first_value, in.value, sequence.kv_len, in.value_dim), j);
  };
  const auto begin_logits = [&](int j) {
    multiply_rows<keys>(weights, queries, row() / 64 * 64, key_tile(j));
    ptx::commit_products();
  };
  // Makes weights of products with keys from j on; gives the factors of the sums so far. The
  // weights are computed in both branches, for a compiler does not wait for other products in front
  // of one.
  const auto weigh_all = [&](int j, float (&factors)[2], auto careful) {
    const auto weigh_rows = [&](float scale) {
#pragma unroll
      for (int half = 0; half < 2; half++)
        factors[half] = weigh<keys>(weights, half, scale, highest[half], total[half]);
    };
    if (!decltype(careful)::value && all_see(j)) {
#pragma unroll
      for (int n = 0; n < keys / 8; n++)
#pragma unroll
        for (int e = 0; e < 4; e++)  // what is infinite is no number, see Scores
          total[e / 2] = fmaf(weights[n][e], 0, total[e / 2]);
      weigh_rows(in.scale);
    } else {
      scores.template all<keys, Extras>(weights, work.first + row(), j);
      if constexpr (decltype(careful)::value) {
        ptx::wait_for_products<0>(sum);
        hand_over();
        find_strange<keys, Dim>(value_tile(j), in.value_dim, weights, sum);
        __syncthreads();
        clean(value_tile(j).memory, keys * Dim, static_cast<int>(threadIdx.x), Tiles::kThreads);
        hand_over();
      }
      weigh_rows(1);
    }
    if constexpr (Extras)
      if (in.threshold != 0)
        drop<false, keys>(weights,
                          kept<keys>(in.threshold, seed,
                                     static_cast<uint32_t>(sequence.index * in.heads + work.head),
                                     work.first + row() + lane() / 4, j),
                          in.kept);
  };
  const auto turn = [&](const float (&factors)[2]) {
#pragma unroll
    for (int half = 0; half < 2; half++) rescale<Dim>(sum, half, factors[half]);
    pack<T, keys>(left, weights);
  };

  copy<Tiles::kQueries, Tiles::kThreads, false>(queries,
                                                matrix(query, in.query, sequence.index, work.head,
                                                       sequence.query, sequence.q_len, in.head_dim),
                                                work.first);
  const auto sum_up = [&](auto careful) {
    const float sink =
        sinks == nullptr ? -kInfinity : static_cast<float>(sinks[work.head]) * kLog2e;
#pragma unroll
    for (int half = 0; half < 2; half++) {
      highest[half] = sink;
      total[half] = sink > -kInfinity && lane() % 4 == 0 ? 1 : 0;
    }
#pragma unroll
    for (int n = 0; n < Dim / 8; n++)
#pragma unroll
      for (int e = 0; e < 4; e++) sum[n][e] = 0;
    if (begin >= end) return;
    float factors[2];
    fetch_keys(begin);
    hand_over();
    ptx::begin_products();
    begin_logits(begin);
    fetch_values(begin);
    fetch_keys(begin + keys);
    ptx::wait_for_products<0>(weights);
    weigh_all(begin, factors, careful);
    turn(factors);
    int j = begin;
#pragma unroll 1
    for (; j + keys < end; j += keys) {
      hand_over();
      ptx::begin_products();
      begin_logits(j + keys);
      multiply<Dim>(sum, left, value_tile(j));
      ptx::commit_products();
      fetch_values(j + keys);
      fetch_keys(j + 2 * keys);
      ptx::wait_for_products<1>(weights);
      weigh_all(j + keys, factors, careful);
      ptx::settle(weights);  // while values are multiplied
      ptx::wait_for_products<0>(sum);
      turn(factors);
    }
    hand_over();
    ptx::begin_products();
    multiply<Dim>(sum, left, value_tile(j));
    ptx::commit_products();
    ptx::wait_for_products<0>(sum);
  };
  sum_up(std::false_type());
  ptx::wait_for_copies();  // of queries that see no keys
  __syncthreads();         // all have read theirs
  if (in.hides) {
    bool finite = true;
#pragma unroll
    for (int n = 0; n < Dim / 8; n++)
#pragma unroll
      for (int e = 0; e < 4; e++) finite = finite && isfinite(sum[n][e]);
    if (!finite) spoilt = 1;
    __syncthreads();
    if (spoilt) {
      sum_up(std::true_type());
      __syncthreads();
    }
  }

  add_up(total);
#pragma unroll
  for (int half = 0; half < 2; half++) {
    rescale<Dim>(sum, half, total[half] == 0 ? 0 : 1 / total[half]);
    const int i = work.first + row() + lane() / 4 + 8 * half;
    if (lane() % 4 == 0 && i < sequence.q_len)
      lse[sequence.row(in, work.head) + i] =
          total[half] == 0 ? -kInfinity : (highest[half] + log2f(total[half])) * kLn2;
  }
  const auto all_outs =
      matrix(out, in.out, sequence.index, work.head, sequence.query, sequence.q_len, in.value_dim);
  store<false>(all_outs, work.first, sum, queries, row());
}

}  // namespace
}  // namespace fastattn::cuda

using namespace fastattn::cuda;

#define FASTATTN_ATTENTION(name, T, Dim, Extras)                                               \
  extern "C" __global__ void __launch_bounds__(GroupTiles<Dim, Extras>::kThreads, 1)           \
      attention_forward_##name##_##Dim##_sm90(                                                 \
          const T* query, const T* key, const T* value, const uint8_t* mask, const void* bias, \
          const float* alibi_slopes, const double* sinks, const uint64_t* seed,                \
          const void* query_starts, const void* key_starts, T* out, float* lse,                \
          const __grid_constant__ AttentionScalars in) {                                       \
    forward<T, Dim, Extras>(query, key, value, mask, bias, alibi_slopes, sinks, seed,          \
                            {query_starts, key_starts}, out, lse, in);                         \
  }
#define FASTATTN_ATTENTIONS(name, T)            \
  FASTATTN_ATTENTION(name, T, 64, false)        \
  FASTATTN_ATTENTION(name, T, 128, false)       \
  FASTATTN_ATTENTION(name, T, 256, false)       \
  FASTATTN_ATTENTION(name##_extra, T, 64, true) \
  FASTATTN_ATTENTION(name##_extra, T, 128, true)

FASTATTN_ATTENTIONS(bf16, __nv_bfloat16)
FASTATTN_ATTENTIONS(f16, __half)
