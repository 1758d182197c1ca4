// Attention on a GPU (Dao 2023, arXiv:2307.08691): a block of queries against blocks of keys.
#include "attention/scalars.h"
#include "cuda/matrix.cuh"

namespace fastattn::cuda {
namespace {

constexpr float kLog2e = 1.44269504088896340736f, kLn2 = 0.69314718055994530942f;
constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

extern __shared__ uint4 shared_memory[];

// The head of a batch that a block works on, and the first of its queries.
struct Work {
  int batch, head, first;

  __device__ Work(const AttentionScalars& in, int queries) {
    // Blocks with the most keys under a causal mask come first.
    const int block = static_cast<int>(blockIdx.x);
    first = (in.query_blocks - 1 - block % in.query_blocks) * queries;
    head = block / in.query_blocks % in.heads;
    batch = block / in.query_blocks / in.heads;
  }
  __device__ int64_t start(const int64_t (&stride)[4], int head_of) const {
    return batch * stride[0] + head_of * stride[1];
  }
};

// To within an eps or so of 1, which is what matters for a logit of that size.
__device__ float hyperbolic_tangent(float x) { return 1 - 2 / (1 + ptx::exp2(2 * kLog2e * x)); }

// Products of queries and keys become logits in base 2, -inf where a key is invisible.
template <class T>
struct Scores {
  const AttentionScalars& in;
  const uint8_t* mask;
  const void* bias;
  float slope;  // of ALiBi, in base 2

  // Of query i and key j.
  template <bool Extras>
  __device__ float operator()(float product, int i, int j) const {
    const int apart = i + in.offset - j;
    if (j >= in.kv_len || i >= in.q_len || apart > in.left || -apart > in.right) return -kInfinity;
    // What is infinite is visible all the same, and no number.
    float logit = (product - product + product) * in.scale;
    if constexpr (Extras) {
      if (mask != nullptr && !mask[i * in.mask[2] + j * in.mask[3]]) return -kInfinity;
      if (in.softcap != 0) logit = hyperbolic_tangent(logit) * in.softcap;
      if (bias != nullptr) {
        const int64_t at = i * in.bias[2] + j * in.bias[3];
        const float term = in.wide_bias ? static_cast<const float*>(bias)[at]
                                        : static_cast<float>(static_cast<const T*>(bias)[at]);
        if (term == -kInfinity) return term;
        logit += term * kLog2e;
      }
      logit -= slope * static_cast<float>(abs(apart));
    }
    return logit;
  }
};

// Multiplies the weights of query i and keys j + 8 n + 2 q and the next by 0 or 1 / (1 - p).
template <int Keys>
__device__ void drop(const Dropout& dropout, uint64_t seed, uint32_t head, int i, int half, int j,
                     Accumulator<Keys>& weights) {
  const int q = lane_index() % 4;
#pragma unroll
  for (int own = 0; own < 4; own++) {  // counters 2 q, 2 q + 1 and 8 behind them
    const uint4 words =
        philox(seed, j / 64 * 16 + own / 2 * 8 + 2 * q + own % 2, static_cast<uint32_t>(i), head);
#pragma unroll
    for (int n = own / 2; n < Keys / 8; n += 2) {
      const bool kept = word(words, j % 64 / 16 + n / 2) >= dropout.threshold;
      float& weight = weights[n][2 * half + own % 2];
      weight = kept && dropout.kept != 0 ? weight * dropout.kept : 0;
    }
  }
}

template <class T, int Dim, bool Extras>
__device__ void forward(const T* query, const T* key, const T* value, const uint8_t* mask,
                        const void* bias, const float* alibi_slopes, const double* sinks,
                        const uint64_t* seed_at, T* out, float* lse, const AttentionScalars& in) {
  using Tiles = AttentionTiles<sizeof(T), Dim>;
  using Values = Tile<T, Dim, sizeof(T) == 2>;  // fp32 reads one row at a time
  constexpr int keys = Tiles::kKeys;
  const Work work(in, Tiles::kQueries);
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
  const Matrix<const T> all_queries{query + work.start(in.query, work.head),
                                    in.query[2],
                                    in.query[3],
                                    in.q_len,
                                    in.head_dim,
                                    in.aligned_query != 0};
  const Matrix<const T> all_keys{key + work.start(in.key, own),
                                 in.key[2],
                                 in.key[3],
                                 in.kv_len,
                                 in.head_dim,
                                 in.aligned_key != 0};
  const Matrix<const T> all_values{value + work.start(in.value, own),
                                   in.value[2],
                                   in.value[3],
                                   in.kv_len,
                                   in.value_dim,
                                   in.aligned_value != 0};

  Scores<T> scores{in, nullptr, nullptr, 0};
  Dropout dropout{0, 0};
  uint64_t seed = 0;
  if constexpr (Extras) {
    if (mask != nullptr) scores.mask = mask + work.start(in.mask, work.head);
    if (bias != nullptr)
      scores.bias = static_cast<const char*>(bias) +
                    work.start(in.bias, work.head) * (in.wide_bias ? 4 : sizeof(T));
    if (alibi_slopes != nullptr)
      scores.slope = alibi_slopes[work.batch * in.heads + work.head] * kLog2e;
    dropout = {in.threshold, in.kept};
    if (in.threshold != 0) seed = *seed_at;
  }

  // Keys [begin, end) are all that these queries can see, from a whole block on.
  const int begin = max(work.first + in.offset - in.left, 0) / keys * keys;
  const int end =
      min(min(work.first + Tiles::kQueries, in.q_len) + in.offset + in.right, in.kv_len);

  // And [nearest, last) are all that this warp's can.
  const int upper = work.first + row, lower = min(upper + 16, in.q_len);
  const int nearest = upper + in.offset - in.left;
  const int last = upper < in.q_len ? min(lower + in.offset + in.right, in.kv_len) : 0;

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
        // Every warp looks at the values that it reads, and takes NaN for 0 from here on.
#pragma unroll 1
        for (int k = 0; k < keys; k++) {
          bool bad = false;
          for (int c = lane; c < in.value_dim; c += static_cast<int>(kWarp))
            bad = bad || !isfinite(static_cast<float>(*tile.at(k, c)));
          if (__ballot_sync(kAllLanes, bad) == 0) continue;
#pragma unroll
          for (int n = 0; n < keys / 8; n++)
#pragma unroll
            for (int e = 0; e < 4; e++)
              if (n * 8 + 2 * q + e % 2 == k && weights[n][e] != -kInfinity) spoilt[e / 2] = true;
        }
        __syncthreads();
        for (int i = static_cast<int>(threadIdx.x); i < keys * Dim;
             i += static_cast<int>(blockDim.x)) {
          T* at = tile.at(i / Dim, i % Dim);
          if (!isfinite(static_cast<float>(*at))) *at = T(0.0f);
        }
        __syncthreads();
      }
#pragma unroll
      for (int half = 0; half < 2; half++) {
        float now = highest[half];
#pragma unroll
        for (int n = 0; n < keys / 8; n++)
          now = fmaxf(now, fmaxf(weights[n][2 * half], weights[n][2 * half + 1]));
        now = fmaxf(now, __shfl_xor_sync(kAllLanes, now, 1));
        now = fmaxf(now, __shfl_xor_sync(kAllLanes, now, 2));
        const float base = now == -kInfinity ? 0 : now;  // nothing is visible so far
        const float rescale = ptx::exp2(highest[half] - base);
        highest[half] = now;
        total[half] *= rescale;
#pragma unroll
        for (int n = 0; n < Dim / 8; n++)
          sum[n][2 * half] *= rescale, sum[n][2 * half + 1] *= rescale;
#pragma unroll
        for (int n = 0; n < keys / 8; n++)
#pragma unroll
          for (int e = 2 * half; e < 2 * half + 2; e++) {
            weights[n][e] = ptx::exp2(weights[n][e] - base);
            total[half] += weights[n][e];
          }
        if (Extras && dropout.threshold != 0)
          drop<keys>(dropout, seed, static_cast<uint32_t>(work.batch * in.heads + work.head),
                     first_row + 8 * half, half, j, weights);
      }
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
    if (q == 0 && i < in.q_len)
      lse[(int64_t{work.batch} * in.heads + work.head) * in.q_len + i] =
          total[half] == 0 ? -kInfinity : (highest[half] + log2f(total[half])) * kLn2;
  }
  const Matrix<T> to{out + work.start(in.out, work.head),
                     in.out[2],
                     in.out[3],
                     in.q_len,
                     in.value_dim,
                     in.aligned_out != 0};
  store(to, work.first, sum, queries, row);
}

}  // namespace
}  // namespace fastattn::cuda

using namespace fastattn::cuda;

#define FASTATTN_ATTENTION(name, T, Dim, Extras)                                                 \
  extern "C" __global__ void __launch_bounds__(AttentionTiles<sizeof(T), Dim>::kWarps* kWarp, 1) \
      attention_forward_##name##_##Dim(                                                          \
          const T* query, const T* key, const T* value, const uint8_t* mask, const void* bias,   \
          const float* alibi_slopes, const double* sinks, const uint64_t* seed, T* out,          \
          float* lse, const __grid_constant__ AttentionScalars in) {                             \
    forward<T, Dim, Extras>(query, key, value, mask, bias, alibi_slopes, sinks, seed, out, lse,  \
                            in);                                                                 \
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
