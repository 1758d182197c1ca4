// What a norm's CUDA kernels work with: teams of threads, vectors, and the rows that are
// normalised.
#pragma once

#include "cuda/tile.cuh"
#include "norm/scalars.h"

namespace fastattn::cuda {
namespace {

extern __shared__ float4 shared_memory[];

// Threads that work on one row together: some lanes of a warp, or whole warps of a block. `Apart`:
// a block's teams do not wait for each other. That takes all 16 barriers of a block, of the 64 that
// a multiprocessor has, so that no more than four such blocks live there.
template <bool Apart>
struct Team {
  const int thread = static_cast<int>(threadIdx.x), size = static_cast<int>(blockDim.x);
  int turn = 0;

  // Sums over the team, for all of its threads.
  template <int N>
  __device__ void sum(float (&values)[N]) {
    constexpr int most = kNormThreads / kWarp;
    __shared__ float parts[2][N][most];
    add_lanes(values, size);
    if (size <= int{kWarp}) return;
    auto& own = parts[turn];  // not the one that slower warps may still read
    turn ^= 1;
    const int warps = size / int{kWarp}, first = static_cast<int>(threadIdx.y) * warps;
    if (lane_index() == 0)
#pragma unroll
      for (int i = 0; i < N; i++) own[i][first + thread / int{kWarp}] = values[i];
    if constexpr (Apart)
      ptx::sync_threads(threadIdx.y + 1, size);
    else
      __syncthreads();
    const int other = lane_index() % most;  // both halves of a warp add up all parts
#pragma unroll
    for (int i = 0; i < N; i++) values[i] = other < warps ? own[i][first + other] : 0;
    add_lanes(values, most);
  }

  // Sums over `lanes` neighbouring lanes, a power of two.
  template <int N>
  __device__ static void add_lanes(float (&values)[N], int lanes) {
#pragma unroll
    for (int apart = kWarp / 2; apart > 0; apart /= 2)
      if (apart < lanes)
#pragma unroll
        for (int i = 0; i < N; i++) values[i] += __shfl_xor_sync(kAllLanes, values[i], apart);
  }
};

// V neighbouring elements as they are in memory, so that they take few registers; one as fp32.
template <class T, int V>
struct Packed {
  static constexpr int kEach = V == 1 ? 1 : 4 / sizeof(T), kWords = V / kEach;
  uint32_t words[kWords];

  __device__ void load(const T* from) {
    if constexpr (V == 1) {
      words[0] = __float_as_uint(static_cast<float>(*from));
    } else if constexpr (kWords == 2) {
      reinterpret_cast<uint2&>(words) = *reinterpret_cast<const uint2*>(from);
    } else {
      static_assert(kWords == 4);
      reinterpret_cast<uint4&>(words) = *reinterpret_cast<const uint4*>(from);
    }
  }
  __device__ void store(T* to) const {
    if constexpr (V == 1)
      *to = static_cast<T>(__uint_as_float(words[0]));
    else if constexpr (kWords == 2)
      ptx::store_global(to, reinterpret_cast<const uint2&>(words));
    else
      ptx::store_global(to, reinterpret_cast<const uint4&>(words));
  }

  // Elements first ... first + P - 1.
  template <int P>
  __device__ void get(float (&to)[P], int first = 0) const {
    if constexpr (V == 1)
      to[0] = __uint_as_float(words[0]);
    else
#pragma unroll
      for (int i = 0; i < P; i += kEach) unpack<T>(to + i, ptx::anew(words[(first + i) / kEach]));
  }
  template <int P>
  __device__ void put(const float (&from)[P], int first = 0) {
    if constexpr (V == 1)
      words[0] = __float_as_uint(static_cast<float>(static_cast<T>(from[0])));
    else
#pragma unroll
      for (int i = 0; i < P; i += kEach) words[(first + i) / kEach] = packed<T>(from + i);
  }
};

// Elements at a time, which saves registers.
template <int V>
constexpr int kPiece = V < 4 ? V : 4;

template <int P>
__device__ void put_floats(float* to, const float (&from)[P]) {
  if constexpr (P == 1)
    *to = from[0];
  else
    *reinterpret_cast<float4*>(to) = make_float4(from[0], from[1], from[2], from[3]);
}

// N vectors of V floats for each thread of a block, in its memory. What a warp touches at a time
// are neighbouring 16 bytes, and so are the halves of four vectors of 8.
template <int V, int N>
__device__ float* slot(int thread, int n, int i) {
  constexpr int planes = V / kPiece<V>, lanes = kWarp;
  const int plane = i / kPiece<V>, place = (thread / lanes * N + n) * planes + plane;
  return reinterpret_cast<float*>(shared_memory) +
         (place * lanes + (thread % lanes ^ plane * 4)) * kPiece<V>;
}

// sum += value, where `lost` takes up what rounding takes off the sum (Knuth's two-sum).
__device__ void add_exactly(float& sum, float& lost, float value) {
  const float next = sum + value, added = next - sum;
  lost += (sum - (next - added)) + (value - added);
  sum = next;
}

// A vector of weight or bias, which may be fp32 or missing.
template <class T, int V>
__device__ void load_parameter(float (&to)[V], const void* from, int wide, int v, float missing) {
  if (from == nullptr) {
#pragma unroll
    for (int i = 0; i < V; i++) to[i] = missing;
  } else if (wide) {
    load(to, static_cast<const float*>(from) + v * V);
  } else {
    load(to, static_cast<const T*>(from) + v * V);
  }
}

// The rows that are normalised: input, or its sum with a residual, rounded to R, and with dropout.
template <class T, class R, int V>
struct Rows {
  const T* input;
  const R* residual;
  const R* known;  // the rows themselves, where nothing is to be added
  Dropout dropout;
  const uint64_t* seed;
  int cols;

  __device__ Rows(const T* input, const R* residual, const R* summed, const uint64_t* seed,
                  const NormScalars& in)
      : input(input),
        residual(residual),
        known(summed == nullptr && residual == nullptr ? reinterpret_cast<const R*>(input)
                                                       : summed),
        dropout{in.threshold, in.kept},
        seed(seed),
        cols(in.cols) {}

  // Which columns of N vectors v, v + size, ... are kept, V bits each. Of all lanes of a warp.
  template <int N>
  __device__ uint32_t kept(int64_t row, int v, int size) const {
    if (dropout.threshold == 0) return ~0u;
    const uint64_t own = *seed;
    uint32_t bits = 0;
#pragma unroll 1
    for (int n = 0; n < N && n * size * V < cols; n++)
      bits |= dropout.bits<V>(own, static_cast<uint32_t>(row), 0, v + n * size) << n * V;
    return bits;
  }

  template <int P>
  __device__ void drop(uint32_t bits, float (&x)[P]) const {
    if (dropout.threshold == 0) return;
#pragma unroll
    for (int i = 0; i < P; i++)
      x[i] = (bits >> i & 1) && dropout.kept != 0 ? x[i] * dropout.kept : 0;
  }

  // Vector v of a row, in two steps so that several may be on their way.
  __device__ void begin(int64_t row, int v, Packed<R, V>& x, Packed<T, V>& own) const {
    const int64_t at = row * cols + v * V;
    if (known != nullptr) return x.load(known + at);
    own.load(input + at);
    x.load(residual + at);
  }
  __device__ void finish(uint32_t bits, Packed<R, V>& x, const Packed<T, V>& own) const {
    if (known != nullptr) return;
#pragma unroll
    for (int i = 0; i < V; i += kPiece<V>) {
      float sum[kPiece<V>], other[kPiece<V>];
      own.get(sum, i);
      x.get(other, i);
      drop(bits >> i, sum);
#pragma unroll
      for (int j = 0; j < kPiece<V>; j++) sum[j] += other[j];
      x.put(sum, i);
    }
  }
};

}  // namespace
}  // namespace fastattn::cuda
