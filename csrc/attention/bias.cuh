// What the kernels of the bias' gradient share: which part of it is a block's, and how it leaves.
#pragma once

#include "attention/backward.cuh"

namespace fastattn::cuda {
namespace {

// A block of queries and keys, with all batches, heads, queries and keys that share it: a dimension
// of size 1 is one block, which goes through all of them.
template <int Rows, int Cols>
struct BiasPart {
  int2 batches, heads, queries, keys;

  __device__ static BiasPart find(const AttentionBackwardScalars& all) {
    const AttentionScalars& in = all.in;
    int block = static_cast<int>(blockIdx.x);
    const auto range = [&](int size, int length, int each) {
      if (size == 1) return int2{0, length};
      const int blocks = (length + each - 1) / each, own = block % blocks * each;
      block /= blocks;
      return int2{own, min(own + each, length)};
    };
    BiasPart part;
    part.keys = range(all.bias_sizes[3], in.kv_len, Cols);
    part.queries = range(all.bias_sizes[2], in.q_len, Rows);
    part.heads = range(all.bias_sizes[1], in.heads, 1);
    part.batches = range(all.bias_sizes[0], in.batch, 1);
    return part;
  }

  // One query and key, or rows and columns of them, of one head of one batch.
  struct Step {
    int batch, head, first, other;
  };
  __device__ Step begin() const { return {batches.x, heads.x, queries.x, keys.x}; }
  __device__ bool there(const Step& step) const { return step.batch < batches.y; }
  __device__ Step behind(Step step) const {
    if ((step.other += Cols) < keys.y) return step;
    step.other = keys.x;
    if ((step.first += Rows) < queries.y) return step;
    step.first = queries.x;
    if (++step.head < heads.y) return step;
    return {step.batch + 1, heads.x, step.first, step.other};
  }

  // Stores the sums of a warp's 16 rows from `row` on, and so all others of the block theirs, by
  // way of shared memory.
  static constexpr int kPitch = Cols / 32 * 32 + 16;  // so that the lanes of a store meet all banks
  static constexpr int kShared = Rows * kPitch * 4;
  template <class T>
  __device__ void store(const AttentionBackwardScalars& all, const Accumulator<Cols>& sum, int row,
                        void* grad_bias) const {
    const int (&sizes)[4] = all.bias_sizes;
    float* table = reinterpret_cast<float*>(shared_memory);  // [Rows, Cols]
    using Own = Runs<false, Cols>;
#pragma unroll
    for (int run = 0; run < Own::kCount; run++) {
      const auto of = [&](int k) { return sum[Own::n(run, k)][Own::e(run, k)]; };
      ptx::store_shared(table + (row + Own::query(run)) * kPitch + Own::key(run), of(0), of(1),
                        of(2), of(3));
    }
    __syncthreads();
    const int share_rows = sizes[2] == 1 ? Rows : 1, share_cols = sizes[3] == 1 ? Cols : 1;
    const int own_rows = sizes[2] == 1 ? 1 : queries.y - queries.x;
    const int own_cols = sizes[3] == 1 ? 1 : keys.y - keys.x;
    for (int at = static_cast<int>(threadIdx.x); at < own_rows * own_cols;
         at += static_cast<int>(blockDim.x)) {
      const int r = at / own_cols, c = at % own_cols;
      float total = 0;
      for (int i = r; i < r + share_rows; i++)
        for (int j = c; j < c + share_cols; j++) total += table[i * kPitch + j];
      const int64_t to =
          ((int64_t{sizes[0] == 1 ? 0 : batches.x} * sizes[1] + (sizes[1] == 1 ? 0 : heads.x)) *
               sizes[2] +
           (sizes[2] == 1 ? 0 : queries.x) + r) *
              sizes[3] +
          (sizes[3] == 1 ? 0 : keys.x) + c;
      if (all.in.wide_bias)
        static_cast<float*>(grad_bias)[to] = total;
      else
        static_cast<T*>(grad_bias)[to] = static_cast<T>(total);
    }
  }
};

}  // namespace
}  // namespace fastattn::cuda
