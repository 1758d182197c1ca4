// What a block of attention's kernels works on: rows of one head of one sequence, and its matrices.
#pragma once

#include "attention/scalars.h"
#include "cuda/matrix.cuh"

namespace fastattn::cuda {
namespace {

__device__ inline int64_t integer(const void* from, const Integers& layout, int row, int col) {
  const int64_t at = row * layout.stride[0] + col * layout.stride[1];
  return layout.wide ? static_cast<const int64_t*>(from)[at]
                     : static_cast<const int32_t*>(from)[at];
}

// The boundaries of packed sequences, of queries and of keys; null where they are not packed.
struct Starts {
  const void *query, *key;
};

// One sequence of a batch. In a packed one, `query` and `key` of its rows lie in front of it.
struct Sequence {
  int index, query, q_len, key, kv_len, offset;

  // The number of its first query among the rows of all heads.
  __device__ int64_t row(const AttentionScalars& in, int head) const {
    return (int64_t{in.sequences > 0 ? 0 : index} * in.heads + head) * in.q_len + query;
  }
};

// What a block works on: rows of one head of one sequence, from `first` on. Without rows it is one
// too many. It is kept in shared memory, for registers are few.
struct Work {
  int head;
  Sequence sequence;
  int first;

  // `rows` of queries or of keys, in the order in which most work comes first under a causal mask,
  // of the heads from `first_head` on.
  __device__ void find(const AttentionScalars& in, const Starts& starts, bool of_keys, int rows,
                       int first_head = 0) {
    const int heads = of_keys ? in.heads / in.group : in.heads;
    const int blocks = of_keys ? in.key_blocks : in.query_blocks;
    const int block = static_cast<int>(blockIdx.x) + first_head * blocks;
    int own = block % blocks;
    const Sequence found =
        in.sequences > 0 ? packed(in, starts, of_keys, rows, own)
                         : Sequence{block / blocks / heads, 0, in.q_len, 0, in.kv_len, in.offset};
    const int own_blocks = ((of_keys ? found.kv_len : found.q_len) + rows - 1) / rows;
    if (threadIdx.x == 0)
      *this = {block / blocks % heads, found, (of_keys ? own : own_blocks - 1 - own) * rows};
    __syncthreads();
  }
  // Of `rows` queries the block `own`, as above, of one of the heads of all sequences, which all
  // lanes of a warp look for.
  __device__ static Work of_queries(const AttentionScalars& in, const Starts& starts, int rows,
                                    int head, int own, int lane) {
    const Sequence found = in.sequences > 0
                               ? packed(in, starts, false, rows, own, lane)
                               : Sequence{head / in.heads, 0, in.q_len, 0, in.kv_len, in.offset};
    return {head % in.heads, found, ((found.q_len + rows - 1) / rows - 1 - own) * rows};
  }
  __device__ bool none(bool of_keys) const {
    return (of_keys ? sequence.kv_len : sequence.q_len) == 0;
  }

 private:
  // Boundaries which are none stop the kernel, for the host has not read them.
  __device__ static int2 rows_of(const void* starts, const Boundaries& boundaries, int n, int count,
                                 int total) {
    const int64_t begin = integer(starts, boundaries.numbers, 0, n);
    const int64_t end = integer(starts, boundaries.numbers, 0, n + 1);
    if (begin < 0 || end < begin || end > total || end - begin > boundaries.longest ||
        (n == 0 && begin != 0) || (n + 1 == count && end != total))
      __trap();
    return {static_cast<int>(begin), static_cast<int>(end - begin)};
  }

  // The sequence that holds block `own` of all packed ones, which becomes the block's number in it.
  // Every warp looks for itself, at 32 sequences at a time.
  __device__ static Sequence packed(const AttentionScalars& in, const Starts& starts, bool of_keys,
                                    int rows, int& own, int lane = lane_index()) {
    for (int n = lane; n - lane < in.sequences; n += static_cast<int>(kWarp)) {
      int2 queries{}, keys{};
      if (n < in.sequences) {
        queries = rows_of(starts.query, in.query_starts, n, in.sequences, in.q_len);
        keys = rows_of(starts.key, in.key_starts, n, in.sequences, in.kv_len);
      }
      const int count = ((of_keys ? keys.y : queries.y) + rows - 1) / rows;
      int behind = count;  // blocks up to this sequence's last
#pragma unroll
      for (int apart = 1; apart < static_cast<int>(kWarp); apart *= 2) {
        const int other = __shfl_up_sync(kAllLanes, behind, apart);
        if (lane >= apart) behind += other;
      }
      const unsigned found = __ballot_sync(kAllLanes, behind > own);
      if (found != 0) {
        const int from = __ffs(static_cast<int>(found)) - 1;
        const auto of_lane = [&](int value) { return __shfl_sync(kAllLanes, value, from); };
        own -= of_lane(behind - count);
        Sequence sequence = {of_lane(n),      of_lane(queries.x), of_lane(queries.y),
                             of_lane(keys.x), of_lane(keys.y),    0};
        if (in.bottom_right) sequence.offset = sequence.kv_len - sequence.q_len;
        return sequence;
      }
      own -= __shfl_sync(kAllLanes, behind, kWarp - 1);
    }
    return {};
  }
};

// A row of one head in a tensor [B, H, rows, cols], and the matrix that begins with one.
template <class T>
__device__ T* row_at(T* tensor, const Layout& layout, int batch, int head, int row) {
  return tensor + batch * layout.stride[0] + head * layout.stride[1] + row * layout.stride[2];
}
template <class T>
__device__ Matrix<T> matrix(T* first, const Layout& layout, int rows, int cols) {
  return {first, layout.stride[2], layout.stride[3], rows, cols, layout.aligned != 0};
}
// The rows of one head of a sequence, behind `before` rows.
template <class T>
__device__ Matrix<T> matrix(T* tensor, const Layout& layout, int batch, int head, int before,
                            int rows, int cols) {
  return matrix(row_at(tensor, layout, batch, head, before), layout, rows, cols);
}

}  // namespace
}  // namespace fastattn::cuda
