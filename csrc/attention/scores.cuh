// What attention's kernels share: logits, weights, and which of them dropout keeps.
#pragma once

#include "attention/work.cuh"

namespace fastattn::cuda {
namespace {

constexpr float kLog2e = 1.44269504088896340736f, kLn2 = 0.69314718055994530942f;
constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

extern __shared__ __align__(1024) uint4 shared_memory[];  // see Panels

// The optional terms of the logits, for all heads.
struct Terms {
  const uint8_t* mask;
  const void* bias;
  const float* alibi_slopes;
};

// To within an eps or so of 1, which is what matters for a logit of that size.
__device__ float hyperbolic_tangent(float x) {
  return 1 - __fdividef(2, 1 + ptx::exp2(2 * kLog2e * x));
}

// The elements that a lane has of an Accumulator whose rows are queries and whose columns are dealt
// keys or, if OfKeys, the other way round: runs of neighbouring keys of one query. Flags of all of
// them fit into 32 bits.
template <bool OfKeys, int N>
struct Runs {
  static constexpr int kLength = OfKeys ? 2 : 4, kCount = N / 2 / kLength;

  // Where the element k of a run is: [n][e].
  __device__ static constexpr int n(int run, int k) {
    return OfKeys ? run / 2 : run / 2 * 2 + k % 2;
  }
  __device__ static constexpr int e(int run, int k) {
    return OfKeys ? k * 2 + run % 2 : run % 2 * 2 + k / 2;
  }
  // Its bit among the flags.
  __device__ static constexpr int bit(int run, int k) {
    return OfKeys ? run / 8 * 16 + run / 2 % 2 * 8 + run / 4 % 2 * 4 + run % 2 * 2 + k
                  : run / 2 % 2 * 16 + run % 2 * 8 + run / 4 * 4 + k;
  }
  // The query of a run and the first of its keys, from the accumulator's first on.
  __device__ static int query(int run) {
    const int lane = lane_index();
    return OfKeys ? run / 2 * 8 + lane % 4 * 2 + run % 2 : lane / 4 + run % 2 * 8;
  }
  __device__ static int key(int run) {
    const int lane = lane_index();
    return OfKeys ? lane / 4 * 2 : run / 2 * 16 + lane % 4 * 4;
  }
  // Calls change(run, k, element) for all of them.
  template <class Change>
  __device__ static void each(Accumulator<N>& values, const Change& change) {
#pragma unroll
    for (int run = 0; run < kCount; run++)
#pragma unroll
      for (int k = 0; k < kLength; k++) change(run, k, values[n(run, k)][e(run, k)]);
  }
};

// Products of queries and keys of one head of a sequence become logits in base 2, -inf where a key
// is invisible.
template <class T>
struct Scores {
  const AttentionScalars& in;
  const Sequence& sequence;
  const uint8_t* mask = nullptr;
  const void* bias = nullptr;
  float slope = 0;  // of ALiBi, in base 2
  bool masks = false, biases = false;

  __device__ Scores(const AttentionScalars& in, const Sequence& sequence)
      : in(in), sequence(sequence) {}
  __device__ Scores(const AttentionScalars& in, const Sequence& sequence, const Terms& terms,
                    int head)
      : in(in), sequence(sequence), masks(terms.mask != nullptr), biases(terms.bias != nullptr) {
    const int batch = sequence.index;
    if (masks) mask = terms.mask + batch * in.mask[0] + head * in.mask[1];
    if (biases)
      bias = static_cast<const char*>(terms.bias) +
             (batch * in.bias[0] + head * in.bias[1]) * (in.wide_bias ? 4 : sizeof(T));
    if (terms.alibi_slopes != nullptr) slope = terms.alibi_slopes[batch * in.heads + head] * kLog2e;
  }

  // A query and the keys from j on: it sees the k-th if `before` + k, unsigned, is below `count`,
  // and is apart - k keys away from it.
  struct Sight {
    unsigned before, count;
    float apart;
  };
  __device__ Sight sight(int i, int j) const {
    const int place = i + sequence.offset, begin = place - in.left;
    const int end = i < sequence.q_len ? min(place + in.right + 1, sequence.kv_len) : begin;
    return {static_cast<unsigned>(j - begin), static_cast<unsigned>(max(end, begin) - begin),
            static_cast<float>(place - j)};
  }

  // Of the k-th key, to which the bias adds `term`, unless the mask hides it.
  template <bool Extras>
  __device__ float operator()(float product, const Sight& sight, int k, float term = 0,
                              bool hidden = false) const {
    if (sight.before + static_cast<unsigned>(k) >= sight.count) return -kInfinity;
    // What is infinite is visible all the same, and no number.
    float logit = (product - product + product) * in.scale;
    if constexpr (Extras) {
      if (hidden || term == -kInfinity) return -kInfinity;
      if (in.softcap != 0) logit = hyperbolic_tangent(logit) * in.softcap;
      logit += term * kLog2e - slope * fabsf(sight.apart - static_cast<float>(k));
    }
    return logit;
  }

  // Of a warp's 16 queries from `first` on and the keys from j on, in place.
  template <int Keys, bool Extras>
  __device__ void all(Accumulator<Keys>& weights, int first, int j) const {
    using Own = Runs<false, Keys>;
    uint32_t invisible = 0;
    if constexpr (Extras)
      if (masks) invisible = hidden<Keys>(first, j);
    // What is infinite is visible all the same, and no number.
    Own::each(weights,
              [&](int, int, float& weight) { weight = fmaf(weight, 0, weight * in.scale); });
    if constexpr (Extras) {
      if (in.softcap != 0)
        Own::each(weights, [&](int, int, float& weight) {
          weight = hyperbolic_tangent(weight) * in.softcap;
        });
      add_terms<false, true, Keys>(weights, first, j, bias_here<false, Keys>(first, j));
    }
    hide_outside<false, Keys>(
        first, j, [&](int run, int k) { weights[Own::n(run, k)][Own::e(run, k)] = -kInfinity; });
    if (Extras && masks)
      Own::each(weights, [&](int run, int k, float& weight) {
        if (invisible >> Own::bit(run, k) & 1) weight = -kInfinity;
      });
  }

  // The bias of the Runs from query i and key j on: it calls its argument with the number and the
  // terms of each.
  template <bool OfKeys, int N>
  __device__ auto bias_here(int i, int j) const {
    using Own = Runs<OfKeys, N>;
    return [=, this](const auto& add) {
#pragma unroll
      for (int run = 0; run < Own::kCount; run++) {
        float terms[Own::kLength];
        bias_of(terms, i + Own::query(run), j + Own::key(run));
        add(run, terms);
      }
    };
  }
  // Adds a bias and ALiBi to logits in base 2 of the Runs from query i and key j on. Only if
  // Strict, a bias of -inf hides products that are no numbers.
  template <bool OfKeys, bool Strict, int N, class Bias>
  __device__ void add_terms(Accumulator<N>& logits, int i, int j, const Bias& bias) const {
    using Own = Runs<OfKeys, N>;
    if (biases)
      bias([&](int run, const float (&terms)[Own::kLength]) {
#pragma unroll
        for (int k = 0; k < Own::kLength; k++) {
          float& logit = logits[Own::n(run, k)][Own::e(run, k)];
          logit = fmaf(terms[k], kLog2e, logit);
          if (Strict && terms[k] == -kInfinity) logit = -kInfinity;
        }
      });
    if (slope != 0) {
      const int query = i + sequence.offset + Own::query(0), key = j + Own::key(0);
      const float apart = static_cast<float>(query - key);
      Own::each(logits, [&](int run, int k, float& logit) {
        const int behind = Own::query(run) - Own::query(0) - (Own::key(run) - Own::key(0)) - k;
        logit = fmaf(-slope, fabsf(apart + static_cast<float>(behind)), logit);
      });
    }
  }

  // Calls hide(run, k) for what is outside of the bounds, of the Runs from query i and key j on.
  template <bool OfKeys, int N, class Hide>
  __device__ void hide_outside(int i, int j, const Hide& hide) const {
    using Own = Runs<OfKeys, N>;
#pragma unroll
    for (int run = 0; run < Own::kCount; run++) {
      const auto seen = sight(i + Own::query(run), j + Own::key(run));
#pragma unroll
      for (int k = 0; k < Own::kLength; k++)
        if (seen.before + static_cast<unsigned>(k) >= seen.count) hide(run, k);
    }
  }

  // The bias of query i at keys from j on, and 0 past the ends.
  template <int N>
  __device__ void bias_of(float (&to)[N], int i, int j) const {
    const auto read = [&](const auto* from) {
      from += i * in.bias[2] + j * in.bias[3];
      if (in.aligned_bias && i < sequence.q_len && j + N <= sequence.kv_len) return load(to, from);
#pragma unroll
      for (int k = 0; k < N; k++)
        to[k] = i < sequence.q_len && j + k < sequence.kv_len
                    ? static_cast<float>(from[k * in.bias[3]])
                    : 0;
    };
    if (!biases)
      for (float& term : to) term = 0;
    else if (in.wide_bias)
      read(static_cast<const float*>(bias));
    else
      read(static_cast<const T*>(bias));
  }

  // Where the mask has a query, and a key of its row; past the ends, the last.
  __device__ const uint8_t* mask_row(int i, int last) const {
    return mask + min(i, last) * in.mask[2];
  }
  __device__ int64_t mask_col(int j) const { return min(j, sequence.kv_len - 1) * in.mask[3]; }
  // Whether the mask hides keys j + lane from query i, a bit each.
  __device__ uint32_t hidden_keys(int i, int j) const {
    return __ballot_sync(kAllLanes, !mask_row(i, sequence.q_len - 1)[mask_col(j + lane_index())]);
  }
  // Which of the Runs from query i and key j on the mask hides, where rows are keys.
  template <int N>
  __device__ uint32_t hidden_rows(int i, int j) const {
    using Own = Runs<true, N>;
    const int64_t cols[2] = {mask_col(j + Own::key(0)), mask_col(j + Own::key(0) + 1)};
    uint32_t bits = 0;
#pragma unroll
    for (int run = 0; run < Own::kCount; run++) {
      const uint8_t* row = mask_row(i + Own::query(run), sequence.q_len - 1);
#pragma unroll
      for (int k = 0; k < 2; k++) bits |= static_cast<uint32_t>(!row[cols[k]]) << Own::bit(run, k);
    }
    return bits;
  }
  // Which of 16 rows of queries and so many keys, as this lane has them, the mask hides: see Runs.
  template <int Keys>
  __device__ uint32_t hidden(int first, int other) const {
    constexpr int words = (Keys + 31) / 32;  // of a row
    const int lane = lane_index(), last = sequence.q_len - 1;
    int64_t cols[words];
#pragma unroll
    for (int w = 0; w < words; w++) cols[w] = mask_col(other + 32 * w + lane);
    uint32_t bits = 0;
#pragma unroll
    for (int half = 0; half < 2; half++) {
      uint32_t own[words] = {};
#pragma unroll
      for (int r = 0; r < 8; r++) {
        const uint8_t* row = mask_row(first + r + 8 * half, last);
#pragma unroll
        for (int w = 0; w < words; w++) {
          const uint32_t votes = __ballot_sync(kAllLanes, !row[cols[w]]);
          if (lane / 4 == r) own[w] = votes;
        }
      }
#pragma unroll
      for (int w = 0; w < words; w++)
        bits |= (own[w] >> lane % 4 * 4 & 0x000f000f) << (w * 4 + half * 8);
    }
    return bits;
  }
};

// Logits of a row, which are `scale` times what `weights` holds, become weights relative to the
// highest of the row so far, or to one before that is no more than Slack below. Gives the factor of
// the sums of what came before (Milakov & Gimelshein 2018, arXiv:1805.02867).
template <int Keys, int Slack = 0>
__device__ float weigh(Accumulator<Keys>& weights, int half, float scale, float& highest,
                       float& total) {
  float now = -kInfinity;
#pragma unroll
  for (int n = 0; n < Keys / 8; n++)
    now = fmaxf(now, fmaxf(weights[n][2 * half], weights[n][2 * half + 1]));
  now = fmaxf(now, __shfl_xor_sync(kAllLanes, now, 1));
  now = fmaxf(now, __shfl_xor_sync(kAllLanes, now, 2));
  now = fmaxf(now * scale, highest);
  if (Slack > 0 && now - highest <= Slack) now = highest;
  const float base = now == -kInfinity ? 0 : now;  // nothing is visible so far
  const float rescale = ptx::exp2(highest - base);
  highest = now;
  total *= rescale;
#pragma unroll
  for (int n = 0; n < Keys / 8; n++)
#pragma unroll
    for (int e = 2 * half; e < 2 * half + 2; e++) {
      weights[n][e] = ptx::exp2(fmaf(weights[n][e], scale, -base));
      total += weights[n][e];
    }
  return rescale;
}

// Multiplies one of a lane's two rows.
template <int Dim>
__device__ void rescale(Accumulator<Dim>& sum, int half, float factor) {
#pragma unroll
  for (int n = 0; n < Dim / 8; n++) sum[n][2 * half] *= factor, sum[n][2 * half + 1] *= factor;
}

// Weighs both rows, and scales anew the sums of what came before.
template <int Keys, int Dim>
__device__ void weigh(Accumulator<Keys>& weights, float scale, float (&highest)[2],
                      float (&total)[2], Accumulator<Dim>& sum) {
#pragma unroll
  for (int half = 0; half < 2; half++)
    rescale<Dim>(sum, half, weigh<Keys>(weights, half, scale, highest[half], total[half]));
}

// The parts that the four lanes of a row have of its total become this.
__device__ void add_up(float (&total)[2]) {
#pragma unroll
  for (int half = 0; half < 2; half++)
#pragma unroll
    for (int apart = 1; apart < 4; apart *= 2)
      total[half] += __shfl_xor_sync(kAllLanes, total[half], apart);
}

// The sums of rows which see a value that is not finite, by their logits, become NaN. All lanes
// look.
template <int Keys, int Dim, class Values>
__device__ void find_strange(const Values& tile, int cols, const Accumulator<Keys>& logits,
                             Accumulator<Dim>& sum) {
  const int lane = lane_index(), q = lane % 4;
  bool spoilt[2] = {};
#pragma unroll 1
  for (int k = 0; k < Keys; k++) {
    bool bad = false;
    for (int c = lane; c < cols; c += static_cast<int>(kWarp))
      bad = bad || !isfinite(static_cast<float>(*tile.at(k, c)));
    if (__ballot_sync(kAllLanes, bad) == 0) continue;
#pragma unroll
    for (int n = 0; n < Keys / 8; n++)
#pragma unroll
      for (int e = 0; e < 4; e++)
        if (n * 8 + 2 * q + e % 2 == k && logits[n][e] != -kInfinity) spoilt[e / 2] = true;
  }
#pragma unroll
  for (int half = 0; half < 2; half++)
    if (__ballot_sync(kAllLanes, spoilt[half]) >> lane / 4 * 4 & 15)
#pragma unroll
      for (int n = 0; n < Dim / 8; n++) sum[n][2 * half] = sum[n][2 * half + 1] = kNan;
}

// Takes what is not finite for 0, of elements that so many threads share out among them.
template <class T>
__device__ void clean(T* memory, int count, int thread, int threads) {
#pragma unroll 1
  for (int i = thread; i < count; i += threads)
    if (!isfinite(static_cast<float>(memory[i]))) memory[i] = T(0.0f);
}

// The weights that dropout keeps of queries i and i + 8 and the keys from j on, as this lane has
// them: see Runs.
template <int Keys>
__device__ uint32_t kept(uint32_t threshold, uint64_t seed, uint32_t head, int i, int j) {
  static_assert(Keys % 16 == 0 && Keys <= 64);
  const int q = lane_index() % 4, first_word = Keys == 64 ? 0 : j % 64 / 16;
  uint32_t bits = 0;
#pragma unroll 2  // four chains of rounds are enough side by side; both rows share some products
  for (int own = 0; own < 4; own++)
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const uint4 words =
          philox(seed, j / 64 * 16 + 4 * q + own, static_cast<uint32_t>(i + 8 * half), head);
#pragma unroll
      for (int n = 0; n < Keys / 16; n++)
        bits |= static_cast<uint32_t>(word(words, first_word + n) >= threshold)
                << (Runs<false, Keys>::bit(2 * n + half, 0) + own);
    }
  return bits;
}

// Multiplies by the factor what is kept, and makes the rest 0.
template <bool OfKeys, int N>
__device__ void drop(Accumulator<N>& values, uint32_t bits, float factor) {
  using Own = Runs<OfKeys, N>;
  if (factor == 0) bits = 0;
  Own::each(values, [&](int run, int k, float& value) {
    value = bits >> Own::bit(run, k) & 1 ? value * factor : 0;
  });
}

}  // namespace
}  // namespace fastattn::cuda
