// Attention by products of warp groups, for 16 bits on sm_90a (FlashAttention-3: Shah et al. 2024,
// arXiv:2407.08608).
//
// As cuda.cu, but that products run beside the threads, and that warp groups share out the work.
// One copies: tiles of queries, one after the other, and for each the blocks of keys and values.
// The others attend, each with 64 queries of a tile: while weights of one block of keys multiply
// its values, those of the next become weights, and they take turns, so that one group's weights
// are computed while another's products run. Blocks may be fewer than tiles.
#include "attention/groups.cuh"

namespace fastattn::cuda {
namespace {

// What all lanes of a warp have alike, which a compiler does not know of what it reads from memory.
template <class T>
__device__ T common(T value) {
  return __shfl_sync(kAllLanes, value, 0);
}

// The barriers of a block; each group that attends has one for its turns.
enum : unsigned { kAll = 1, kAllAttending, kAllCopying, kTurns };

template <class T, int Dim, bool Extras>
struct Forward {
  using Tiles = GroupTiles<Dim, Extras>;
  static constexpr int kKeys = Tiles::kKeys;
  static constexpr unsigned kStages = Tiles::kStages;
  // Weights are at most 2 to this power, so that sums seldom need another scale. Those that dropout
  // scales would overflow.
  static constexpr int kSlack = Extras ? 0 : 8;

  // A tile of queries, and the blocks of keys that they see. All blocks are numbered, and block n
  // of those from `first` up to `end` begins with key (n + shift) * kKeys.
  struct Task {
    Work work;
    unsigned first, end;
    int shift;

    __device__ int key(unsigned n) const { return (static_cast<int>(n) + shift) * kKeys; }
  };

  // What lies in shared memory beside the tiles.
  struct Shared {
    Task tasks[2];                     // this tile's, and the next one's
    int counts[Tiles::kThreads / 32];  // of each warp, how many tasks it has begun
    int before;  // how many there were when all tiles were first begun, or begun again
    Place queries, keys[kStages], values[kStages];
    int spoilt;  // some row, by a value that is no number: see cuda.cu
  };

  const T *query, *key, *value;
  Terms terms;
  const double* sinks;
  const uint64_t* seed;
  Starts starts;
  T* out;
  float* lse;
  const AttentionScalars& in;

  __device__ static Shared& shared() {
    __shared__ Shared memory;
    return memory;
  }

  __device__ static Panels<T, Tiles::kQueries, Dim> query_tile() {
    return {reinterpret_cast<T*>(shared_memory)};
  }
  __device__ static Panels<T, kKeys, Dim> tile(unsigned n) {
    return {query_tile().memory + (Tiles::kQueries + n * kKeys) * Dim};
  }
  __device__ static Panels<T, kKeys, Dim> key_tile(unsigned n) { return tile(n % kStages); }
  __device__ static Panels<T, kKeys, Dim> value_tile(unsigned n) {
    return tile(kStages + n % kStages);
  }

  __device__ Task task(const Work& work, unsigned first) const {
    const Sequence& sequence = work.sequence;
    const int rows_end = min(work.first + Tiles::kQueries, sequence.q_len) + sequence.offset;
    const int begin = max(work.first + sequence.offset - in.left, 0) / kKeys;
    const int end = (min(rows_end + in.right, sequence.kv_len) + kKeys - 1) / kKeys;
    return {work, first, first + static_cast<unsigned>(max(end - begin, 0)),
            begin - static_cast<int>(first)};
  }

  // The number of the task that this warp begins.
  __device__ static int count_task() {
    const int thread = ptx::thread_index();
    int& count = shared().counts[thread / static_cast<int>(kWarp)];
    const int number = count;
    __syncwarp();
    if (thread % static_cast<int>(kWarp) == 0) count = number + 1;
    __syncwarp();
    return number;
  }

  // The n-th tile, of which most work comes first under a causal mask. Heads whose keys and values
  // fit into a GPU's cache together take turns.
  __device__ Work find(int n) const {
    constexpr int cached = 16 << 20;
    const int rows = cached / (static_cast<int>(sizeof(T)) * (in.head_dim + in.value_dim));
    const int all = in.heads * in.batch;
    const int near = min(max(rows / max(in.kv_len, 1), 1) * in.group, all);
    const int batch = n / (near * in.query_blocks), rest = n % (near * in.query_blocks);
    const int heads = min(near, all - batch * near);
    Work found = Work::of_queries(in, starts, Tiles::kQueries, batch * near + rest % heads,
                                  rest / heads, ptx::thread_index() % static_cast<int>(kWarp));
    found.first = max(found.first, 0);  // of packed sequences there is one tile too many
    return found;
  }

  // What the group that copies does: all tiles, once, and then no work.
  __device__ void copy_all() const {
    // Counted anew each time, for registers are few.
    const auto thread = [] { return ptx::thread_index() - Tiles::kAttending; };
    const int tiles = in.query_blocks * in.heads * in.batch;
    while (true) {
      const int number = count_task();
      const int round = number - shared().before;
      const int n = round * static_cast<int>(gridDim.x) + static_cast<int>(blockIdx.x);
      const bool more = n < tiles;
      const Work found = more ? find(n) : Work{-1, {}, 0};
      shared().queries.wait_empty(number);
      Task& own = shared().tasks[number % 2];
      if (thread() == 0) own = task(found, number == 0 ? 0 : shared().tasks[(number - 1) % 2].end);
      ptx::sync_threads(kAllCopying, Tiles::kCopying);
      if (!more) {
        if (thread() == 0) shared().before = number + 1;
        ptx::mbarrier_arrive(shared().queries.full);
        return;
      }
      const Work& work = own.work;
      const Sequence& sequence = work.sequence;
      const auto queries = matrix(query, in.query, sequence.index, work.head, sequence.query,
                                  sequence.q_len, in.head_dim);
      if (queries.aligned) {
        fetch_in_turn<false, Tiles::kCopying, Tiles::kUnrolled>(query_tile(), queries, work.first,
                                                                thread());
        ptx::mbarrier_arrive_with_copies(shared().queries.full);
      } else {
        copy_elements<Tiles::kQueries, Tiles::kCopying, false>(query_tile(), queries, work.first,
                                                               thread());
        ptx::mbarrier_arrive(shared().queries.full);
      }

      const int head = work.head / in.group;  // of keys
      const auto keys =
          matrix(key, in.key, sequence.index, head, sequence.key, sequence.kv_len, in.head_dim);
      const auto values = matrix(value, in.value, sequence.index, head, sequence.key,
                                 sequence.kv_len, in.value_dim);
      const auto fetch_keys = [&](unsigned n) {
        Place& place = shared().keys[n % kStages];
        place.wait_empty(n / kStages);
        fetch_in_turn<true, Tiles::kCopying, Tiles::kUnrolled>(key_tile(n), keys, own.key(n),
                                                               thread());
        ptx::mbarrier_arrive_with_copies(place.full);
      };
      const auto fetch_values = [&](unsigned n) {
        Place& place = shared().values[n % kStages];
        place.wait_empty(n / kStages);
        fetch_in_turn<true, Tiles::kCopying, Tiles::kUnrolled>(value_tile(n), values, own.key(n),
                                                               thread());
        ptx::mbarrier_arrive_with_copies(place.full);
      };
      if (own.first < own.end) fetch_keys(own.first);
#pragma unroll 1
      for (unsigned step = own.first; step < own.end; step++) {
        if (step + 1 < own.end) fetch_keys(step + 1);
        fetch_values(step);
      }
    }
  }

  // What the other groups do with them. If careful, rows see no number but for what they see, see
  // cuda.cu; otherwise rows that look so are told of.
  template <bool Careful>
  __device__ void attend_all() const {
    constexpr int more = 15;  // rows of a warp, behind its first
    // Of this warp the first row, and of this lane the place among its 32: counted anew each time,
    // for registers are few.
    const auto row = [] {
      return static_cast<int>(static_cast<unsigned>(ptx::thread_index()) / kWarp * 16);
    };
    const auto lane = [] {
      return static_cast<int>(static_cast<unsigned>(ptx::thread_index()) % kWarp);
    };
    const unsigned group = common(threadIdx.x / 128);
    const auto take_turn = [&] { ptx::sync_threads(kTurns + group, 256); };
    const auto pass_turn = [&] {
      ptx::arrive_threads(kTurns + (group + 1 == Tiles::kGroups ? 0 : group + 1), 256);
    };

    while (true) {
      const int number = count_task();
      shared().queries.wait_full(number);
      const Task& own = shared().tasks[number % 2];
      const Work& work = own.work;
      if (work.head < 0) return shared().queries.release();
      const Sequence& sequence = work.sequence;
      const Scores<T> scores =
          Extras ? Scores<T>(in, sequence, terms, work.head) : Scores<T>(in, sequence);
      const uint64_t own_seed = Extras && in.threshold != 0 ? *seed : 0;

      // Whether all of a warp's queries see all of block n of keys: the last of them sees the keys
      // from `nearest` on, and the first of them those up to `last`.
      const int upper = work.first + row(), place = upper + sequence.offset;
      const int nearest = max(place + more - in.left, 0);
      const int last = max(min(place + in.right + 1, sequence.kv_len), 0);
      const int begin = (nearest + kKeys - 1) / kKeys, blocks = last / kKeys - begin;
      const unsigned whole =
          in.plain && upper < sequence.q_len ? static_cast<unsigned>(max(blocks, 0)) : 0;
      const auto all_see = [&, from = static_cast<unsigned>(begin - own.shift)](unsigned n) {
        return !Careful && n - from < whole;
      };

      Accumulator<Dim> sum;
      Accumulator<kKeys> weights;
      uint32_t left[kKeys / 16][4];  // weights, as a product takes them
      float highest[2], total[2];    // of the two rows

      const auto begin_logits = [&](unsigned n) {
        // With care registers are too few for what a compiler would keep of a common row.
        multiply_rows<kKeys>(weights, query_tile(),
                             Careful ? row() / 64 * 64 : static_cast<int>(group) * 64, key_tile(n));
        ptx::commit_products();
      };
      // Makes weights of products with block n of keys; gives the factors of the sums so far. The
      // weights are computed in both branches, for a compiler does not wait for other products in
      // front of one.
      const auto weigh_all = [&](unsigned n, float (&factors)[2]) {
        const int j = own.key(n);
        if (all_see(n)) {
          weigh_rows<kKeys, kSlack, true>(weights, in.scale, highest, total, factors);
        } else {
          scores.template all<kKeys, Extras>(weights, work.first + row(), j);
          if constexpr (Careful) {
            ptx::wait_for_products<0>(sum);
            shared().values[n % kStages].wait_full(n / kStages);
            find_strange<kKeys, Dim>(value_tile(n), in.value_dim, weights, sum);
            ptx::sync_threads(kAllAttending, Tiles::kAttending);
            clean(value_tile(n).memory, kKeys * Dim, ptx::thread_index(), Tiles::kAttending);
            ptx::fence_for_products();
            ptx::sync_threads(kAllAttending, Tiles::kAttending);
          }
          if constexpr (Careful) {  // row by row, for registers are few
#pragma unroll
            for (int half = 0; half < 2; half++)
              factors[half] = weigh<kKeys, kSlack>(weights, half, 1, highest[half], total[half]);
          } else {
            weigh_rows<kKeys, kSlack, false>(weights, 1, highest, total, factors);
          }
        }
        if constexpr (Extras)
          if (in.threshold != 0)
            drop<false, kKeys>(
                weights,
                kept<kKeys>(in.threshold, own_seed,
                            static_cast<uint32_t>(sequence.index * in.heads + work.head),
                            work.first + row() + lane() / 4, j),
                in.kept);
      };
      const auto turn = [&](const float (&factors)[2]) {
        if (__any_sync(kAllLanes, factors[0] != 1 || factors[1] != 1))
#pragma unroll
          for (int half = 0; half < 2; half++) rescale<Dim>(sum, half, factors[half]);
        pack<T, kKeys>(left, weights);
      };

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
      unsigned step = common(own.first);
      const unsigned end = common(own.end);
      if (step < end) {
        float factors[2];
        const auto use_keys = [&](unsigned n) { return &shared().keys[n % kStages]; };
        const auto use_values = [&](unsigned n) { return &shared().values[n % kStages]; };
        use_keys(step)->wait_full(step / kStages);
        ptx::fence_for_products();
        ptx::begin_products();
        begin_logits(step);
        ptx::wait_for_products<0>(weights);
        use_keys(step)->release();
        if (step + 1 == end) shared().queries.release();
        weigh_all(step, factors);
        turn(factors);
#pragma unroll 1
        for (; step + 1 < end; step++) {
          use_keys(step + 1)->wait_full((step + 1) / kStages);
          use_values(step)->wait_full(step / kStages);
          ptx::fence_for_products();
          take_turn();
          ptx::begin_products();
          begin_logits(step + 1);
          multiply<Dim>(sum, left, value_tile(step));
          ptx::commit_products();
          pass_turn();
          ptx::wait_for_products<1>(weights);
          use_keys(step + 1)->release();
          if (step + 2 == end) shared().queries.release();
          weigh_all(step + 1, factors);
          ptx::settle(weights);  // while values are multiplied
          ptx::wait_for_products<0>(sum);
          use_values(step)->release();
          turn(factors);
        }
        use_values(step)->wait_full(step / kStages);
        ptx::fence_for_products();
        ptx::begin_products();
        multiply<Dim>(sum, left, value_tile(step));
        ptx::commit_products();
        ptx::wait_for_products<0>(sum);
        use_values(step)->release();
      } else {
        shared().queries.release();
      }
      if (!Careful && in.hides) {
        bool finite = true;
#pragma unroll
        for (int n = 0; n < Dim / 8; n++)
#pragma unroll
          for (int e = 0; e < 4; e++) finite = finite && isfinite(sum[n][e]);
        if (!finite) shared().spoilt = 1;
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
      store_rows<Dim>(matrix(out, in.out, sequence.index, work.head, sequence.query, sequence.q_len,
                             in.value_dim),
                      work.first + row(), sum);
    }
  }

  __device__ void run() const {
    if (lane_index() == 0) shared().counts[threadIdx.x / kWarp] = 0;
    if (threadIdx.x == 0) {
      constexpr int warps = Tiles::kAttending / static_cast<int>(kWarp);
      shared().queries.init(Tiles::kCopying, warps);
      for (Place& place : shared().keys) place.init(Tiles::kCopying, warps);
      for (Place& place : shared().values) place.init(Tiles::kCopying, warps);
      shared().before = shared().spoilt = 0;
    }
    __syncthreads();
    const auto spoilt = [] {
      ptx::sync_threads(kAll, Tiles::kThreads);
      return shared().spoilt != 0;
    };
    if (threadIdx.x >= Tiles::kAttending) {
      ptx::give_registers<Tiles::kFewer>();
      copy_all();
      if (spoilt()) copy_all();
    } else {
      ptx::take_registers<Tiles::kMore>();
      if (threadIdx.x / 128 == Tiles::kGroups - 1) ptx::arrive_threads(kTurns, 256);
      attend_all<false>();
      if (spoilt()) attend_all<true>();
    }
  }
};

}  // namespace
}  // namespace fastattn::cuda

using namespace fastattn::cuda;

#define FASTATTN_ATTENTION(name, T, Dim, Extras)                                                \
  extern "C" __global__ void __launch_bounds__(GroupTiles<Dim, Extras>::kThreads, 1)            \
      attention_forward_##name##_##Dim##_sm90(                                                  \
          const T* query, const T* key, const T* value, const uint8_t* mask, const void* bias,  \
          const float* alibi_slopes, const double* sinks, const uint64_t* seed,                 \
          const void* query_starts, const void* key_starts, T* out, float* lse,                 \
          const __grid_constant__ AttentionScalars in) {                                        \
    Forward<T, Dim, Extras>{                                                                    \
        query, key, value, {mask, bias, alibi_slopes}, sinks, seed, {query_starts, key_starts}, \
        out,   lse, in}                                                                         \
        .run();                                                                                 \
  }
#define FASTATTN_ATTENTIONS(name, T)            \
  FASTATTN_ATTENTION(name, T, 64, false)        \
  FASTATTN_ATTENTION(name, T, 128, false)       \
  FASTATTN_ATTENTION(name, T, 256, false)       \
  FASTATTN_ATTENTION(name##_extra, T, 64, true) \
  FASTATTN_ATTENTION(name##_extra, T, 128, true)

FASTATTN_ATTENTIONS(bf16, __nv_bfloat16)
FASTATTN_ATTENTIONS(f16, __half)
