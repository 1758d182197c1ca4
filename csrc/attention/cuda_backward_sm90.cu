// Attention backward by products of warp groups, for 16 bits on sm_90a: as cuda_backward.cu. Sums
// over the other side take weights and gradients from registers, so that nothing but rows lies in
// shared memory. What dropout keeps, the queries' kernel draws, while products run, and leaves for
// the keys', which would have to draw it all again.
#include "attention/backward.cuh"
#include "attention/groups.cuh"

namespace fastattn::cuda {
namespace {

// What dropout keeps, in tiles of 16 queries and 64 keys of a head: a word for each lane that has
// the queries as rows, see Runs. Tiles of packed sequences begin anew with each.
struct KeptWords {
  static constexpr int kKeys = 64;

  uint32_t* words;
  const AttentionBackwardScalars& all;
  const Sequence& sequence;

  // Where the words of lanes lie: side by side those whose queries are neighbours.
  __device__ static int place(int lane) { return lane % 4 * 8 + lane / 4; }
  // The tile that query i and key j begin.
  __device__ uint32_t* at(int head, int i, int j) const {
    const bool packed = all.in.sequences > 0;
    const int own = (packed ? 0 : sequence.index * all.in.heads) + head - all.first_head;
    const int row = (packed ? sequence.query / 16 + sequence.index : 0) + i / 16;
    const int tile = (own * all.kept_rows + row) * all.kept_cols + j / kKeys;
    return words + static_cast<uint32_t>(tile) * uint64_t{kWarp};
  }

  // The flags of the Runs of 16 rows of keys, the first of which is `row` of those in `tiles`, and
  // N queries. A lane has two queries of every eight, and two keys.
  template <int N, int Words>
  __device__ static uint32_t of_keys(const uint32_t (&tiles)[N / 16][Words], int row) {
    const int lane = ptx::thread_index() % static_cast<int>(kWarp),
              shift = row / 16 % 2 * 16 + row / 32 % 2 * 4 + lane / 4 % 2 * 2;
    uint32_t bits = 0;
#pragma unroll
    for (int tile = 0; tile < N / 16; tile++) {
      const uint32_t* at = tiles[tile] + row / kKeys * 32 + lane / 8 * 8 + lane % 4 * 2;
      const uint2 words = *reinterpret_cast<const uint2*>(at);
      const uint32_t found = words.x >> shift & 0x303 | (words.y >> shift & 0x303) << 2;
      bits |= found << (tile / 2 * 16 + tile % 2 * 4);
    }
    return bits;
  }
};

template <class T, int Dim, bool OfKeys, bool Extras>
__device__ void rows_gradient(const Inputs<T>& from, const Starts& starts, uint32_t* kept_words,
                              T* grad_scored, T* grad_weighed) {
  using Tiles = GroupBackwardTiles<Dim, OfKeys, Extras>;
  constexpr int rows = Tiles::kRows, others = Tiles::kOthers, sums = OfKeys ? 2 : 1;
  const AttentionBackwardScalars& all = from.all;
  const AttentionScalars& in = all.in;
  __shared__ Work work;
  __shared__ int strange;
  __shared__ Place places[2];  // of the other side
  if (threadIdx.x == 0) {
    strange = 0;
    // What is not copied by cp.async is told of by an arrival of its own.
    for (Place& place : places)
      place.init((Extras ? 2 : 1) * Tiles::kThreads, Tiles::kThreads / static_cast<int>(kWarp));
  }
  work.find(in, starts, OfKeys, rows, OfKeys ? all.first_head / in.group : all.first_head);
  const Sequence& sequence = work.sequence;
  if (work.none(OfKeys)) return;
  // Read, and this warp's first row counted, anew each time, for registers are few.
  const int &head = work.head, &first = work.first;
  const auto band = [&] { return OfKeys ? Band::keys(in, sequence) : Band::queries(in, sequence); };
  const auto row = [] {
    return static_cast<int>(static_cast<unsigned>(ptx::thread_index()) / kWarp * 16);
  };

  T* memory = reinterpret_cast<T*>(shared_memory);
  const Panels<T, rows, Dim> own_scored{memory}, own_weighed{memory + rows * Dim};
  const auto scored = [&](int parity) {
    return Panels<T, others, Dim>{memory + 2 * (rows + parity * others) * Dim};
  };
  const auto weighed = [&](int parity) {
    return Panels<T, others, Dim>{scored(parity).memory + others * Dim};
  };
  __shared__ float2 others_statistics[2][OfKeys ? others : 1];
  const KeptWords kept_by = {kept_words, all, sequence};
  constexpr int key_blocks = rows / KeptWords::kKeys;
  const auto bias_tile = [&](int parity) {
    return BiasTile<T, OfKeys, Tiles::kQueries, Tiles::kKeys>::of(memory + Tiles::kShared / 2,
                                                                  parity, in.wide_bias != 0);
  };
  __shared__ __align__(16) uint32_t kept_keys[2][OfKeys ? others / 16 : 1][key_blocks * 32];

  const auto own_side =
      OfKeys ? Side<T>::keys(from, sequence, head) : Side<T>::queries(from, sequence, head);
  const auto begin = [&] { return band().begin(first) / others * others; };
  const auto end = [&] { return band().end(first, rows); };

  // The other side's heads, one after the other, and their blocks.
  struct Step {
    int head, first;
  };
  const auto start = [&] { return Step{OfKeys ? head * in.group : head / in.group, begin()}; };
  const auto any_left = [&](const Step& step) {
    return step.head < (OfKeys ? (head + 1) * in.group : head / in.group + 1);
  };
  const auto behind = [&](const Step& step) {
    return step.first + others < end() ? Step{step.head, step.first + others}
                                       : Step{step.head + 1, begin()};
  };
  const auto scores_of = [&](const Step& step) {
    return Scores<T>(in, sequence, Extras ? from.terms : Terms(), OfKeys ? step.head : head);
  };
  const auto fetch_all = [&](const Step& step, int parity) {
    if (Extras && from.terms.bias != nullptr)
      bias_tile(parity).template fetch<Tiles::kThreads>(
          scores_of(step), OfKeys ? step.first : first, OfKeys ? first : step.first);
    const int thread = ptx::thread_index();
    if (thread >= Tiles::kCopying) return;
    const auto side = OfKeys ? Side<T>::queries(from, sequence, step.head)
                             : Side<T>::keys(from, sequence, step.head);
    fetch<!OfKeys, Tiles::kCopying>(scored(parity), side.scored, step.first, thread);
    fetch<!OfKeys, Tiles::kCopying>(weighed(parity), side.weighed, step.first, thread);
    if constexpr (OfKeys) {
      const int query = step.first + thread;
      const float2* statistics = from.statistics_of(sequence, step.head);
      if (thread < others)
        ptx::copy_pair_async(&others_statistics[parity][thread],
                             query < sequence.q_len ? statistics + query : from.statistics,
                             query < sequence.q_len ? 8 : 0);
      if (Extras && in.threshold != 0) {
        constexpr int chunks = key_blocks * 8;
        const int tile = thread / chunks, chunk = thread % chunks;
        const int i = step.first + 16 * tile, j = first + chunk / 8 * KeptWords::kKeys;
        if (tile < others / 16)
          ptx::copy_async(ptx::shared_address(kept_keys[parity][tile]) + chunk * 16,
                          kept_by.at(step.head, i, first) + chunk * 4,
                          i < sequence.q_len && j < sequence.kv_len);
      }
    }
  };
  const auto fetch_others = [&](const Step& step, int parity) {
    fetch_all(step, parity);
    if (Extras) ptx::mbarrier_arrive(places[parity].full);
    ptx::mbarrier_arrive_with_copies(places[parity].full);
  };
  __shared__ float2 own_statistics[OfKeys ? 1 : rows];  // of each warp its rows'
  if constexpr (!OfKeys) {
    if (const int lane = lane_index(), i = first + row() + lane; lane < 16)
      own_statistics[row() + lane] =
          i < sequence.q_len ? from.statistics_of(sequence, head)[i] : float2();
    __syncwarp();
  }

  const auto flags_of = [&](const Scores<T>& scores, const Step& step, int parity) {
    Flags flags;
    if constexpr (!Extras) return flags;
    const int own = first + row();
    if (in.threshold != 0) {
      if constexpr (OfKeys) {
        flags.kept = KeptWords::of_keys<others>(kept_keys[parity], row());
      } else {
        flags.kept = kept<others>(in.threshold, *from.seed, from.head_number(sequence, head),
                                  own + lane_index() / 4, step.first);
        if (own < sequence.q_len)
          kept_by.at(head, own, step.first)[KeptWords::place(lane_index())] = flags.kept;
      }
    }
    if (scores.masks)
      flags.hidden = OfKeys ? scores.template hidden_rows<others>(step.first, own)
                            : scores.template hidden<others>(own, step.first);
    return flags;
  };

  Accumulator<Dim> sum[sums];
  // Takes what is not finite for 0 if careful: see cuda_backward.cu.
  const auto clean_rows = [](T* tiles, int count) {
    clean(tiles, 2 * count * Dim, static_cast<int>(threadIdx.x), Tiles::kThreads);
  };
  unsigned steps = 0;  // so far
  // Of the step; with extras found anew each time.
  const auto parity = [&] { return static_cast<int>((Extras ? ptx::anew(steps) : steps) % 2); };
  const auto sum_up = [&](auto careful) {
#pragma unroll
    for (int s = 0; s < sums; s++)
#pragma unroll
      for (int n = 0; n < Dim / 8; n++)
#pragma unroll
        for (int e = 0; e < 4; e++) sum[s][n][e] = 0;
    if (begin() >= end()) return;
    fetch_others(start(), parity());
    if constexpr (decltype(careful)::value) clean_rows(own_scored.memory, rows);
#pragma unroll 1
    for (Step step = start(); any_left(step); step = behind(step), steps++) {
      places[parity()].wait_full(steps / 2);
      if constexpr (decltype(careful)::value) clean_rows(scored(parity()).memory, others);
      ptx::fence_for_products();
      if constexpr (decltype(careful)::value) __syncthreads();
      Accumulator<others> weights, grads;
      ptx::begin_products();
      multiply_rows<others>(weights, own_scored, row() / 64 * 64, scored(parity()));
      multiply_rows<others>(grads, own_weighed, row() / 64 * 64, weighed(parity()));
      ptx::commit_products();
      if (const Step next = behind(step); any_left(next)) {
        // With care all have met since they read it.
        if constexpr (!decltype(careful)::value) places[parity() ^ 1].wait_empty((steps + 1) / 2);
        fetch_others(next, parity() ^ 1);
      }
      const Scores<T> scores = scores_of(step);
      const Flags flags = flags_of(scores, step, parity());
      ptx::wait_for_products<0>(weights);
      ptx::settle(grads);
      const int now = parity();
      differentiate<T, OfKeys, true, Extras, others>(
          weights, grads, scores, flags, first + row(), step.first,
          band().whole(first + row(), 16, step.first, others),
          [&](int i) { return OfKeys ? others_statistics[now][i] : own_statistics[row() + i]; },
          [&](const auto& add) {
            bias_tile(parity()).read(OfKeys ? 0 : row(), OfKeys ? row() : 0, add);
          });
      uint32_t left[sums][others / 16][4];
      pack<T, others>(left[0], grads);
      if constexpr (OfKeys) pack<T, others>(left[1], weights);
      ptx::begin_products();
      multiply<Dim>(sum[0], left[0], scored(parity()));
      if constexpr (OfKeys) multiply<Dim>(sum[1], left[1], weighed(parity()));
      ptx::commit_products();
      ptx::wait_for_products<0>(sum[0]);
      if constexpr (OfKeys) ptx::settle(sum[1]);
      if constexpr (!decltype(careful)::value) {
        __syncwarp();  // all lanes have read what does not lie in Panels
        places[parity()].release();
      }
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
    for (int e = 0; e < 4; e++) {
      sum[0][n][e] *= all.scale;
      if constexpr (OfKeys && Extras) sum[1][n][e] *= in.kept;
    }
  const auto leave = [&](T* grad, const Layout& layout, int cols, const Accumulator<Dim>& of,
                         const Panels<T, rows, Dim>& tile) {
    store<OfKeys>(matrix(grad, layout, sequence.index, head, OfKeys ? sequence.key : sequence.query,
                         band().rows, cols),
                  first, of, tile, row());
  };
  leave(grad_scored, OfKeys ? all.grad_key : all.grad_query, in.head_dim, sum[0], own_scored);
  if constexpr (OfKeys) leave(grad_weighed, all.grad_value, in.value_dim, sum[1], own_weighed);
}

}  // namespace
}  // namespace fastattn::cuda

using namespace fastattn::cuda;

#define FASTATTN_BACKWARD(name, T, Dim, Extras)                                                    \
  using Queries_##name##_##Dim = GroupBackwardTiles<Dim, false, Extras>;                           \
  using Keys_##name##_##Dim = GroupBackwardTiles<Dim, true, Extras>;                               \
  FASTATTN_KERNEL(Queries_##name##_##Dim, 1)                                                       \
  attention_backward_queries_##name##_##Dim##_sm90(                                                \
      FASTATTN_INPUTS(T), const void* query_starts, const void* key_starts, uint32_t* kept,        \
      T* grad_query, const __grid_constant__ AttentionBackwardScalars all) {                       \
    rows_gradient<T, Dim, false, Extras>(FASTATTN_FROM, {query_starts, key_starts}, kept,          \
                                         grad_query, nullptr);                                     \
  }                                                                                                \
  FASTATTN_KERNEL(Keys_##name##_##Dim, 1)                                                          \
  attention_backward_keys_##name##_##Dim##_sm90(                                                   \
      FASTATTN_INPUTS(T), const void* query_starts, const void* key_starts, uint32_t* kept,        \
      T* grad_key, T* grad_value, const __grid_constant__ AttentionBackwardScalars all) {          \
    rows_gradient<T, Dim, true, Extras>(FASTATTN_FROM, {query_starts, key_starts}, kept, grad_key, \
                                        grad_value);                                               \
  }
#define FASTATTN_BACKWARDS(name, T)            \
  FASTATTN_BACKWARD(name, T, 64, false)        \
  FASTATTN_BACKWARD(name, T, 128, false)       \
  FASTATTN_BACKWARD(name##_extra, T, 64, true) \
  FASTATTN_BACKWARD(name##_extra, T, 128, true)

FASTATTN_BACKWARDS(bf16, __nv_bfloat16)
FASTATTN_BACKWARDS(f16, __half)
