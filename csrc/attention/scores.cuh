// What attention's kernels share: matrices of a head, logits, and which weights dropout keeps.
#pragma once

#include "attention/scalars.h"
#include "cuda/matrix.cuh"

namespace fastattn::cuda {
namespace {

constexpr float kLog2e = 1.44269504088896340736f, kLn2 = 0.69314718055994530942f;
constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

extern __shared__ uint4 shared_memory[];

// The rows of one head of a tensor [B, H, rows, cols].
template <class T>
__device__ Matrix<T> matrix(T* tensor, const Layout& layout, int batch, int head, int rows,
                            int cols) {
  const int64_t* stride = layout.stride;
  return {tensor + batch * stride[0] + head * stride[1],
          stride[2],
          stride[3],
          rows,
          cols,
          layout.aligned != 0};
}

// The optional terms of the logits, for all heads.
struct Terms {
  const uint8_t* mask;
  const void* bias;
  const float* alibi_slopes;
};

// To within an eps or so of 1, which is what matters for a logit of that size.
__device__ float hyperbolic_tangent(float x) { return 1 - 2 / (1 + ptx::exp2(2 * kLog2e * x)); }

// Products of queries and keys of one head become logits in base 2, -inf where a key is invisible.
template <class T>
struct Scores {
  const AttentionScalars& in;
  const uint8_t* mask = nullptr;
  const void* bias = nullptr;
  float slope = 0;  // of ALiBi, in base 2

  __device__ explicit Scores(const AttentionScalars& in) : in(in) {}
  __device__ Scores(const AttentionScalars& in, const Terms& terms, int batch, int head) : in(in) {
    if (terms.mask != nullptr) mask = terms.mask + batch * in.mask[0] + head * in.mask[1];
    if (terms.bias != nullptr)
      bias = static_cast<const char*>(terms.bias) +
             (batch * in.bias[0] + head * in.bias[1]) * (in.wide_bias ? 4 : sizeof(T));
    if (terms.alibi_slopes != nullptr) slope = terms.alibi_slopes[batch * in.heads + head] * kLog2e;
  }

  // Of query i and key j. `steepness` receives the derivative of softcap, where there is one.
  template <bool Extras>
  __device__ float operator()(float product, int i, int j, float* steepness = nullptr) const {
    const int apart = i + in.offset - j;
    if (j >= in.kv_len || i >= in.q_len || apart > in.left || -apart > in.right) return -kInfinity;
    // What is infinite is visible all the same, and no number.
    float logit = (product - product + product) * in.scale;
    if constexpr (Extras) {
      if (mask != nullptr && !mask[i * in.mask[2] + j * in.mask[3]]) return -kInfinity;
      if (in.softcap != 0) {
        const float tangent = hyperbolic_tangent(logit);
        logit = tangent * in.softcap;
        if (steepness != nullptr) *steepness = 1 - tangent * tangent;
      }
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

// The weights that dropout keeps of queries i and i + 8 and the keys from j on, as this lane holds
// them in an Accumulator: bit 4 n + e for its element [n][e].
template <int Keys>
__device__ uint32_t kept(uint32_t threshold, uint64_t seed, uint32_t head, int i, int j) {
  static_assert(Keys % 16 == 0 && Keys <= 64);
  const int q = lane_index() % 4;
  uint32_t bits = 0;
#pragma unroll 1  // four chains of rounds are enough side by side
  for (int half = 0; half < 2; half++)
#pragma unroll
    for (int own = 0; own < 4; own++) {  // counters 2 q, 2 q + 1 and 8 behind them
      const uint4 words = philox(seed, j / 64 * 16 + own / 2 * 8 + 2 * q + own % 2,
                                 static_cast<uint32_t>(i + 8 * half), head);
#pragma unroll
      for (int n = own / 2; n < Keys / 8; n += 2)
        bits |= static_cast<uint32_t>(word(words, j % 64 / 16 + n / 2) >= threshold)
                << (4 * n + 2 * half + own % 2);
    }
  return bits;
}

// Multiplies by the factor what is kept, and makes the rest 0.
template <int N>
__device__ void drop(Accumulator<N>& values, uint32_t bits, float factor) {
#pragma unroll
  for (int n = 0; n < N / 8; n++)
#pragma unroll
    for (int e = 0; e < 4; e++)
      values[n][e] = (bits >> (4 * n + e) & 1) && factor != 0 ? values[n][e] * factor : 0;
}

}  // namespace
}  // namespace fastattn::cuda
