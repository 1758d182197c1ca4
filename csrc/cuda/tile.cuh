// The vocabulary of the CUDA kernels: vectors of memory and dropout.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

#include "cuda/ptx.cuh"

namespace fastattn::cuda {

constexpr unsigned kWarp = 32, kAllLanes = 0xffffffffu;

__device__ inline int lane_index() { return static_cast<int>(threadIdx.x % kWarp); }

// As many floats from `from` on as fit into 32 bits when rounded to T.
template <class T>
__device__ uint32_t packed(const float* from) {
  if constexpr (std::is_same_v<T, float>) {
    return __float_as_uint(from[0]);
  } else if constexpr (std::is_same_v<T, __half>) {
    const __half2 both = __floats2half2_rn(from[0], from[1]);
    return reinterpret_cast<const uint32_t&>(both);
  } else {
    const __nv_bfloat162 both = __floats2bfloat162_rn(from[0], from[1]);
    return reinterpret_cast<const uint32_t&>(both);
  }
}

// The elements of 32 bits.
template <class T>
__device__ void unpack(float* to, const uint32_t& word) {
  if constexpr (std::is_same_v<T, float>) {
    to[0] = __uint_as_float(word);
  } else if constexpr (std::is_same_v<T, __half>) {
    const float2 both = __half22float2(reinterpret_cast<const __half2&>(word));
    to[0] = both.x, to[1] = both.y;
  } else {
    to[0] = __uint_as_float(word << 16), to[1] = __uint_as_float(word & 0xffff0000u);
  }
}

// N neighbouring elements from memory or to global memory, at most 16 bytes at a time. In words,
// because a struct of elements would be moved element by element.
template <int N, class T>
__device__ void load(float (&to)[N], const T* from) {
  constexpr int each = 4 / sizeof(T), words = N / each;
  const auto* at = reinterpret_cast<const uint32_t*>(from);
  if constexpr (N == 1) {
    to[0] = static_cast<float>(*from);
  } else if constexpr (words == 1) {
    unpack<T>(to, *at);
  } else if constexpr (words == 2) {
    const auto word = *reinterpret_cast<const uint2*>(at);
    unpack<T>(to, word.x);
    unpack<T>(to + each, word.y);
  } else {
    static_assert(words % 4 == 0);
#pragma unroll
    for (int i = 0; i < words; i += 4) {
      const auto word = *reinterpret_cast<const uint4*>(at + i);
      unpack<T>(to + i * each, word.x);
      unpack<T>(to + (i + 1) * each, word.y);
      unpack<T>(to + (i + 2) * each, word.z);
      unpack<T>(to + (i + 3) * each, word.w);
    }
  }
}

template <int N, class T>
__device__ void store(T* to, const float (&from)[N]) {
  constexpr int each = 4 / sizeof(T), words = N / each;
  if constexpr (N == 1) {
    *to = static_cast<T>(from[0]);
  } else if constexpr (words == 2) {
    ptx::store_global(to, uint2{packed<T>(from), packed<T>(from + each)});
  } else {
    static_assert(words % 4 == 0);
#pragma unroll
    for (int i = 0; i < words; i += 4)
      ptx::store_global(to + i * each,
                        uint4{packed<T>(from + i * each), packed<T>(from + (i + 1) * each),
                              packed<T>(from + (i + 2) * each), packed<T>(from + (i + 3) * each)});
  }
}

// The random words of one counter: Philox 4x32-10 (Salmon et al. 2011), counted by position as
// on the CPU.
__device__ inline uint4 philox(uint64_t seed, uint32_t counter, uint32_t row, uint32_t head) {
  uint4 c{counter, row, head, 0};
  uint32_t key0 = static_cast<uint32_t>(seed), key1 = static_cast<uint32_t>(seed >> 32);
#pragma unroll
  for (int round = 0; round < 10; round++) {
    const uint64_t product0 = uint64_t{c.x} * 0xD2511F53u, product1 = uint64_t{c.z} * 0xCD9E8D57u;
    c = {static_cast<uint32_t>(product1 >> 32) ^ c.y ^ key0, static_cast<uint32_t>(product1),
         static_cast<uint32_t>(product0 >> 32) ^ c.w ^ key1, static_cast<uint32_t>(product0)};
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
  return c;
}

// The word for key lane + 16 * index of 64.
__device__ inline uint32_t word(const uint4& words, int index) {
  return index < 2 ? (index == 0 ? words.x : words.y) : (index == 2 ? words.z : words.w);
}

struct Dropout {
  uint32_t threshold;  // a position is dropped when its random word is below this
  float kept;          // the factor of the others

  // Which of the columns V * v ... V * v + V - 1 of a row are kept, a bit each; v is the lane plus
  // a multiple of 32. The lanes that hold 64 columns share the work: each draws the words of V / 4
  // counters, of which it needs a few only, and a ballot carries the outcome to the lanes that do.
  template <int V>
  __device__ uint32_t bits(uint64_t seed, uint32_t row, uint32_t head, int v) const {
    static_assert(V == 1 || V == 4 || V == 8);
    if constexpr (V == 1) {
      const uint4 words = philox(seed, v / 64 * 16 + v % 16, row, head);
      return word(words, v % 64 / 16) >= threshold;
    } else {
      constexpr int together = 64 / V;
      const int lane = lane_index(), own = lane % together, group = lane / together;
      uint32_t found = 0;
#pragma unroll
      for (int half = 0; half < V / 4; half++) {
        const uint4 words = philox(seed, v / together * 16 + half * together + own, row, head);
        const uint4 votes{__ballot_sync(kAllLanes, words.x >= threshold),
                          __ballot_sync(kAllLanes, words.y >= threshold),
                          __ballot_sync(kAllLanes, words.z >= threshold),
                          __ballot_sync(kAllLanes, words.w >= threshold)};
        // The first own column's lane among the 16 counters, whose votes stand by `half`.
        const int first = own * V % 16;
        if (first / together == half)
          found = word(votes, own * V / 16) >> (group * together + first % together);
      }
      return found & ((1u << V) - 1);
    }
  }
};

}  // namespace fastattn::cuda
