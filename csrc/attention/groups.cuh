// What attention's kernels for warp groups of sm_90a share: copies to Panels, and products with
// them.
#pragma once

#include "attention/scores.cuh"
#include "cuda/ptx_bulk.cuh"
#include "cuda/ptx_sm90.cuh"

namespace fastattn::cuda {
namespace {

// A place in shared memory for what some threads copy and warps read, time after time.
struct Place {
  uint64_t full, empty;  // mbarriers: all of it is there, all have read it

  __device__ void init(int copying, int reading) {
    ptx::mbarrier_init(full, copying);
    ptx::mbarrier_init(empty, reading);
  }
  // For the n-th time: waits until it is empty, or full.
  __device__ void wait_empty(unsigned n) { ptx::mbarrier_wait(empty, static_cast<int>(n % 2 ^ 1)); }
  __device__ void wait_full(unsigned n) { ptx::mbarrier_wait(full, static_cast<int>(n % 2)); }
  // Once a warp, which waits for its products together, has read it.
  __device__ void release() {
    if (static_cast<unsigned>(ptx::thread_index()) % kWarp == 0) ptx::mbarrier_arrive(empty);
  }
};

// sum = left right^T, for the 64 rows of a warp group, from `row` on. It is under way.
template <int N, class T, int Rows, int Dim>
__device__ void multiply_rows(Accumulator<N>& sum, const Panels<T, Rows, Dim>& left, int row,
                              const Panels<T, N, Dim>& right) {
  const uint64_t a = ptx::matrix(ptx::shared_address(left.memory) + row * 128);
  const uint64_t b = ptx::matrix(ptx::shared_address(right.memory));
#pragma unroll
  for (int k = 0; k < Dim / 16; k++) {
    const auto part = [&](uint64_t matrix, int panel) {
      return ptx::behind(matrix, k / 4 * panel + k % 4 * 32);
    };
    ptx::multiply_transposed(sum, T(), part(a, left.kPanel), part(b, right.kPanel), k > 0);
  }
}

// sum += left right, of which a warp has 16 rows of the left. It is under way.
template <int Dim, class T, int K>
__device__ void multiply(Accumulator<Dim>& sum, const uint32_t (&left)[K / 16][4],
                         const Panels<T, K, Dim>& right) {
  const uint64_t b = ptx::matrix(ptx::shared_address(right.memory), right.kPanel);
#pragma unroll
  for (int k = 0; k < K / 16; k++) ptx::multiply(sum, T(), left[k], ptx::behind(b, k * 16 * 128));
}

// Makes weights of both rows' logits, and gives the factors of the sums so far, as `weigh` does.
// Neither row waits for what it has under way without the other. If Plain, logits are products that
// hide nothing: the totals of rows of which one is infinite become NaN, for that is no number, see
// Scores. A sum of products says whether one may be.
template <int Keys, int Slack, bool Plain>
__device__ void weigh_rows(Accumulator<Keys>& weights, float scale, float (&highest)[2],
                           float (&total)[2], float (&factors)[2]) {
  float most[2][2], products[2][2] = {};
#pragma unroll
  for (int n = 0; n < Keys / 8; n++)
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const float first = weights[n][2 * half], second = weights[n][2 * half + 1];
      float& own = most[half][n % 2];
      own = n < 2 ? fmaxf(first, second) : fmaxf(own, fmaxf(first, second));
      if (Plain) products[half][n % 2] = fmaf(first, second, products[half][n % 2]);
    }
  float now[2];
#pragma unroll
  for (int half = 0; half < 2; half++) now[half] = fmaxf(most[half][0], most[half][1]);
#pragma unroll
  for (int apart = 1; apart < 4; apart *= 2)
#pragma unroll
    for (int half = 0; half < 2; half++)
      now[half] = fmaxf(now[half], __shfl_xor_sync(kAllLanes, now[half], apart));
  if (Plain && !isfinite((products[0][0] + products[0][1]) + (products[1][0] + products[1][1])))
#pragma unroll
    for (int n = 0; n < Keys / 8; n++)
#pragma unroll
      for (int e = 0; e < 4; e++) total[e / 2] = fmaf(weights[n][e], 0, total[e / 2]);
  float base[2];
#pragma unroll
  for (int half = 0; half < 2; half++) {
    now[half] = fmaxf(now[half] * scale, highest[half]);
    if (Slack > 0 && now[half] - highest[half] <= Slack) now[half] = highest[half];
    base[half] = now[half] == -kInfinity ? 0 : now[half];  // nothing is visible so far
    factors[half] = ptx::exp2(highest[half] - base[half]);
    highest[half] = now[half];
    total[half] *= factors[half];
  }
#pragma unroll
  for (int n = 0; n < Keys / 8; n++)
#pragma unroll
    for (int e = 0; e < 4; e++) {
      weights[n][e] = ptx::exp2(fmaf(weights[n][e], scale, -base[e / 2]));
      total[e / 2] += weights[n][e];
    }
}

// What a warp's lanes have of 16 rows, as the left side of products.
template <class T, int K>
__device__ void pack(uint32_t (&to)[K / 16][4], const Accumulator<K>& from) {
#pragma unroll
  for (int k = 0; k < K / 16; k++)
#pragma unroll
    for (int i = 0; i < 4; i++) to[k][i] = packed<T>(from[2 * k + i / 2] + i % 2 * 2);
}

// Begins to copy a block of rows, from row `first` on and with zeros behind the last, of each of so
// many threads a column of chunks. It is `copy` for rows of whole chunks not too far apart.
template <bool Dealt, int Threads, class T, int Rows, int Dim>
__device__ void fetch(const Panels<T, Rows, Dim>& to, const Matrix<const T>& from, int first,
                      int thread = static_cast<int>(threadIdx.x)) {
  constexpr int chunks = Dim / 8, step = Threads / chunks;
  static_assert(Threads % chunks == 0 && Rows % step == 0 && step % 8 == 0);
  static_assert((step & (step - 1)) == 0);  // no bit is in both a thread's row and r
  const auto source = [](int row) { return Dealt ? dealt(row) : row; };
  const int chunk = thread % chunks, own = thread / chunks;
  const int row = first + source(own), stride = static_cast<int>(from.row_stride);
  const int left = chunk * 8 < from.cols ? from.rows - row : 0;
  const T* at = from.data + int64_t{row} * stride + chunk * 8;
  const uint32_t target = ptx::shared_address(to.chunk(own, chunk));
#pragma unroll
  for (int r = 0; r < Rows; r += step)
    ptx::copy_async(target + r * 128, at + int64_t{source(r)} * stride, source(r) < left);
}

// A block of a bias in shared memory, in its own type, for lanes that have keys, or queries, as
// rows.
template <class T, bool OfKeys, int Queries, int Keys>
struct BiasTile {
  char* memory;
  bool wide;  // fp32

  __device__ static BiasTile of(void* memory, int parity, bool wide) {
    const int pitch = wide ? kBiasPitch<OfKeys, Keys, 4> : kBiasPitch<OfKeys, Keys, sizeof(T)>;
    return {static_cast<char*>(memory) + parity * Queries * pitch, wide};
  }

  // Begins to copy what Scores have of it from query i and key j on, with zeros behind the last.
  template <int Threads>
  __device__ void fetch(const Scores<T>& scores, int i, int j) const {
    if (wide)
      fetch<Threads>(scores, static_cast<const float*>(scores.bias), i, j);
    else
      fetch<Threads>(scores, static_cast<const T*>(scores.bias), i, j);
  }
  // Calls add(run, terms) for the Runs from a query and a key on, see Scores.
  template <class Add>
  __device__ void read(int query, int key, const Add& add) const {
    if (wide)
      read<float>(query, key, add);
    else
      read<T>(query, key, add);
  }

 private:
  template <class E>
  __device__ E* at(int query, int key) const {
    return reinterpret_cast<E*>(memory + query * kBiasPitch<OfKeys, Keys, sizeof(E)>) + key;
  }
  template <class E, class Add>
  __device__ void read(int query, int key, const Add& add) const {
    using Own = Runs<OfKeys, OfKeys ? Queries : Keys>;
    const char* from =
        reinterpret_cast<const char*>(at<E>(query + Own::query(0), key + Own::key(0)));
#pragma unroll
    for (int run = 0; run < Own::kCount; run++) {
      constexpr int pitch = kBiasPitch<OfKeys, Keys, sizeof(E)>;
      const int down = Own::query(run) - Own::query(0), right = Own::key(run) - Own::key(0);
      float terms[Own::kLength];
      load(terms, reinterpret_cast<const E*>(from + down * pitch + right * int{sizeof(E)}));
      add(run, terms);
    }
  }
  template <int Threads, class E>
  __device__ void fetch(const Scores<T>& scores, const E* from, int i, int j) const {
    const AttentionScalars& in = scores.in;
    const int queries = scores.sequence.q_len - i, keys = scores.sequence.kv_len - j;
    from += i * in.bias[2] + j * in.bias[3];
    if (in.chunked_bias) {
      constexpr int each = 16 / sizeof(E), chunks = Keys / each;
#pragma unroll 1
      for (int c = ptx::thread_index(); c < Queries * chunks; c += Threads) {
        const int query = c / chunks, key = c % chunks * each;
        const int there = query < queries ? min(max(keys - key, 0), each) : 0;
        ptx::copy_async(at<E>(query, key), there > 0 ? from + query * in.bias[2] + key : from,
                        there * static_cast<int>(sizeof(E)));
      }
    } else {
#pragma unroll 1
      for (int c = ptx::thread_index(); c < Queries * Keys; c += Threads) {
        const int query = c / Keys, key = c % Keys;
        *at<E>(query, key) =
            query < queries && key < keys ? from[query * in.bias[2] + key * in.bias[3]] : E(0.0f);
      }
    }
  }
};

// As `fetch`, for threads with few registers: each address follows from the one before.
template <bool Dealt, int Threads, int Unrolled, class T, int Rows, int Dim>
__device__ void fetch_in_turn(const Panels<T, Rows, Dim>& to, const Matrix<const T>& from,
                              int first, int thread) {
  constexpr int chunks = Dim / 8, step = Threads / chunks, block = 16;
  static_assert(Threads % chunks == 0 && block % step == 0 && Rows % block == 0);
  const auto source = [](int row) { return Dealt ? dealt(row) : row; };
  const int chunk = thread % chunks, own = thread / chunks;
  const int row = first + source(own), stride = static_cast<int>(from.row_stride);
  const int left = chunk * 8 < from.cols ? from.rows - row : 0;
  const T* at = from.data + int64_t{row} * stride + chunk * 8;
  const uint32_t target = ptx::shared_address(to.chunk(own, chunk));
#pragma unroll Unrolled
  for (int b = 0; b < Rows; b += block, at += int64_t{block} * stride)
#pragma unroll
    for (int r = 0; r < block; r += step)  // r % 8 permutes chunks anew
      ptx::copy_async((target ^ r % 8 * 16) + (b + r) * 128, at + int64_t{source(r)} * stride,
                      b + source(r) < left);
}

// What this thread has copied or changed is there for the products of all.
__device__ void hand_over() {
  ptx::wait_for_copies();
  ptx::fence_for_products();
  __syncthreads();
}

// Stores a warp's 16 rows from row `first` of the matrix on, of which four lanes have one: they
// exchange what they have of each 32 columns, so that rows leave in runs of 64 bytes.
template <int Dim, class T>
__device__ void store_rows(const Matrix<T>& to, int first, const Accumulator<Dim>& from) {
  const int lane = ptx::thread_index() % static_cast<int>(kWarp), q = lane % 4;
#pragma unroll
  for (int half = 0; half < 2; half++) {
    const int row = first + lane / 4 + 8 * half;
    T* at = to.data + row * to.row_stride;
#pragma unroll
    for (int n = 0; n < Dim / 8; n += 4) {
      if (to.aligned) {
        uint32_t words[4];
#pragma unroll
        for (int i = 0; i < 4; i++) words[i] = packed<T>(from[n + i] + 2 * half);
#pragma unroll
        for (int apart = 1; apart < 4; apart *= 2)
#pragma unroll
          for (int i = 0; i < 4; i++)
            if ((i & apart) == 0) {
              uint32_t &low = words[i], &high = words[i + apart];
              const bool upper = (q & apart) != 0;
              const uint32_t other = __shfl_xor_sync(kAllLanes, upper ? low : high, apart);
              (upper ? low : high) = other;
            }
        const int col = (n + q) * 8;
        if (row < to.rows && col < to.cols)
          ptx::store_global(at + col, uint4{words[0], words[1], words[2], words[3]});
      } else {
#pragma unroll
        for (int i = 0; i < 4; i++)
#pragma unroll
          for (int e = 0; e < 2; e++) {
            const int col = (n + i) * 8 + 2 * q + e;
            if (row < to.rows && col < to.cols)
              at[col * to.col_stride] = T(from[n + i][2 * half + e]);
          }
      }
    }
  }
}

}  // namespace
}  // namespace fastattn::cuda
