// Tiles of matrices in shared memory, and products of 16 rows per warp with them.
//
// A warp holds 16 rows of a matrix of floats as an `Accumulator`: a lane has, of each 8 columns,
// the columns 2 q and 2 q + 1 of the rows r and r + 8, where r = lane / 4 and q = lane % 4. Tensor
// cores leave their products so, and fp32, which they would round, is multiplied into the same
// places.
#pragma once

#include "cuda/tile.cuh"

namespace fastattn::cuda {

template <int Cols>
using Accumulator = float[Cols / 8][4];

// Rows of Cols elements in chunks of 16 bytes. Where eight rows are read at one column, the chunks
// of a row are permuted by its number, so that they lie in different banks. Two rows of 64 bytes
// share all banks, and are permuted together.
template <class T, int Cols, bool Permuted = true>
struct Tile {
  static constexpr int kCols = Cols, kEach = 16 / sizeof(T), kChunks = Cols / kEach;
  static constexpr bool kPermuted = Permuted;
  static_assert(kChunks % 8 == 0 || kChunks == 4);

  T* memory;

  __device__ T* chunk(int row, int chunk) const {
    const int permutation = kChunks == 4 ? row / 2 % 4 : row % 8;
    return memory + (row * kChunks + (Permuted ? chunk ^ permutation : chunk)) * kEach;
  }
  __device__ T* at(int row, int col) const { return chunk(row, col / kEach) + col % kEach; }

  // From the address of chunk(row, 0 or 1) that of the one `down` and `right` of it, by constants
  // where these are, in a tile that begins at a multiple of 128 bytes.
  __device__ static uint32_t moved(uint32_t address, int down, int right) {
    static_assert(Permuted && kChunks % 8 == 0);
    return (address ^ right % 8 * 16) + (down * kChunks + right / 8 * 8) * 16;  // by 8 n and 2 n
  }
};

// Rows of elements of 16 bits as products of warp groups take them: in panels of 64 columns, each a
// Tile of all Rows, the first of which begins at a multiple of 1024 bytes.
template <class T, int Rows, int Cols>
struct Panels {
  static constexpr int kCols = Cols, kEach = 8, kChunks = Cols / kEach, kPanel = Rows * 128;
  static_assert(sizeof(T) == 2 && Cols % 64 == 0 && Rows % 8 == 0);

  T* memory;

  __device__ T* chunk(int row, int chunk) const {
    return memory + ((chunk / 8 * Rows + row) * 8 + (chunk % 8 ^ row % 8)) * kEach;
  }
  __device__ T* at(int row, int col) const { return chunk(row, col / kEach) + col % kEach; }
};

// A matrix in global memory. `aligned` says that 16 bytes of a row can be moved at once.
template <class T>
struct Matrix {
  T* data;
  int64_t row_stride, col_stride;
  int rows, cols;
  bool aligned;
};

// Which row of a matrix is a tile's where rows are dealt: of each 16 the even ones come first, so
// that a lane of an Accumulator has neighbours, two as rows, and four as columns.
__device__ constexpr int dealt(int row) { return row / 16 * 16 + row % 8 * 2 + row / 8 % 2; }

// Copies the rows first ... first + Rows to a tile, dealt or in their order, with zeros where the
// matrix ends, element by element. So many threads take part.
template <int Rows, int Threads, bool Dealt, class Place, class T>
__device__ void copy_elements(const Place& to, const Matrix<const T>& from, int first, int thread) {
#pragma unroll 1
  for (int i = thread; i < Rows * Place::kCols; i += Threads) {
    const int row = i / Place::kCols, col = i % Place::kCols;
    const int at = first + (Dealt ? dealt(row) : row);
    *to.at(row, col) = at < from.rows && col < from.cols
                           ? from.data[at * from.row_stride + col * from.col_stride]
                           : T(0.0f);
  }
}

// Begins to do so. All Threads of the block take part, each in a column of chunks or, where these
// are not aligned, of elements.
template <int Rows, int Threads, bool Dealt, class Place, class T>
__device__ void copy(const Place& to, const Matrix<const T>& from, int first) {
  constexpr int each = Place::kEach, chunks = Place::kChunks;
  constexpr int step = Threads / chunks;
  static_assert(Threads % chunks == 0 && Rows % step == 0);
  const int thread = ptx::thread_index();
  const auto source = [](int row) { return Dealt ? dealt(row) : row; };
  if (from.aligned) {
    const int row = thread / chunks, chunk = thread % chunks, begin = first + source(row);
    const int cols = min(max(from.cols - chunk * each, 0), each);
    const T* at = from.data + begin * from.row_stride + chunk * each;
    // No bit is in both row and r, so that source(row + r) is source(row) + source(r).
#pragma unroll
    for (int r = 0; r < Rows; at += (source(r + step) - source(r)) * from.row_stride, r += step)
      ptx::copy_async(to.chunk(row + r, chunk), at,
                      begin + source(r) < from.rows ? cols * static_cast<int>(sizeof(T)) : 0);
  } else {
    copy_elements<Rows, Threads, Dealt>(to, from, first, thread);
  }
}

// 16 rows of a tile, which begin at `row`, as the left side of products. If Held, what tensor cores
// take of them is read once, and stays in registers.
template <class T, int Cols, bool Held>
struct Left {
  Tile<T, Cols> tile;
  int row;
  uint32_t held[Held ? Cols / 16 : 1][4];

  __device__ Left(const Tile<T, Cols>& tile, int row) : tile(tile), row(row) {
    if constexpr (Held)
#pragma unroll
      for (int k = 0; k < Cols / 16; k++) read(held[k], k);
  }
  __device__ void read(uint32_t (&to)[4], int k) const {
    const int lane = lane_index();
    const uint32_t own = ptx::shared_address(tile.chunk(row + lane % 16, lane / 16));
    ptx::load_matrices(to, tile.moved(own, 0, 2 * k));
  }
  // 16 columns, from 16 k on.
  __device__ void step(uint32_t (&to)[4], int k) const {
    if constexpr (Held)
      for (int i = 0; i < 4; i++) to[i] = held[k][i];
    else
      read(to, k);
  }
};

// sum += a b^T, with all rows of b. All columns past `cols` are zeros.
template <int N, class T, int Cols, bool Held>
__device__ void multiply_transposed(Accumulator<N>& sum, const Left<T, Cols, Held>& a,
                                    const Tile<T, Cols>& b, int cols) {
  const int lane = lane_index();
  if constexpr (std::is_same_v<T, float>) {
    const int r = a.row + lane / 4, q = lane % 4;
#pragma unroll 1
    for (int c = 0; c < cols; c += 4) {
      float left[2][4];
      load(left[0], a.tile.at(r, c));
      load(left[1], a.tile.at(r + 8, c));
#pragma unroll
      for (int n = 0; n < N / 8; n++)
#pragma unroll
        for (int e = 0; e < 2; e++) {
          float right[4];
          load(right, b.at(n * 8 + 2 * q + e, c));
#pragma unroll
          for (int k = 0; k < 4; k++) {
            sum[n][e] += left[0][k] * right[k];
            sum[n][2 + e] += left[1][k] * right[k];
          }
        }
    }
  } else {
    const uint32_t own = ptx::shared_address(b.chunk(lane / 16 * 8 + lane % 8, lane / 8 % 2));
#pragma unroll
    for (int k = 0; k < Cols / 16; k++) {
      uint32_t left[4];
      a.step(left, k);
#pragma unroll
      for (int n = 0; n < N / 16; n++) {
        uint32_t right[4];
        ptx::load_matrices(right, b.moved(own, n * 16, 2 * k));
        ptx::multiply<T>(sum[2 * n], left, right[0], right[1]);
        ptx::multiply<T>(sum[2 * n + 1], left, right[2], right[3]);
      }
    }
  }
}

// sum += a b, where a is rounded to T as b is.
template <int K, class T, int Cols, bool Permuted>
__device__ void multiply(Accumulator<Cols>& sum, const Accumulator<K>& a,
                         const Tile<T, Cols, Permuted>& b) {
  const int lane = lane_index();
  if constexpr (std::is_same_v<T, float>) {
    const int q = lane % 4;
#pragma unroll
    for (int k = 0; k < K; k++) {  // the column of a is with the lane k % 8 / 2 of every four
      const float upper = __shfl_sync(kAllLanes, a[k / 8][k % 2], k % 8 / 2, 4);
      const float lower = __shfl_sync(kAllLanes, a[k / 8][2 + k % 2], k % 8 / 2, 4);
#pragma unroll
      for (int n = 0; n < Cols / 8; n++) {
        const float2 right = *reinterpret_cast<const float2*>(b.at(k, n * 8 + 2 * q));
        sum[n][0] += upper * right.x, sum[n][1] += upper * right.y;
        sum[n][2] += lower * right.x, sum[n][3] += lower * right.y;
      }
    }
  } else {
    const uint32_t own = ptx::shared_address(b.chunk(lane / 8 % 2 * 8 + lane % 8, lane / 16));
#pragma unroll
    for (int k = 0; k < K / 16; k++) {
      const uint32_t left[4] = {packed<T>(a[2 * k]), packed<T>(a[2 * k] + 2),
                                packed<T>(a[2 * k + 1]), packed<T>(a[2 * k + 1] + 2)};
#pragma unroll
      for (int n = 0; n < Cols / 16; n++) {
        uint32_t right[4];
        ptx::load_transposed(right, b.moved(own, k * 16, 2 * n));
        ptx::multiply<T>(sum[2 * n], left, right[0], right[1]);
        ptx::multiply<T>(sum[2 * n + 1], left, right[2], right[3]);
      }
    }
  }
}

// Stores 16 rows, which begin at `row` of the tile and of the matrix behind `first`, and may be
// dealt. The tile's rows are this warp's own to write to, since a barrier: through them, rows leave
// whole.
template <bool Dealt, class T, class Place>
__device__ void store(const Matrix<T>& to, int first, const Accumulator<Place::kCols>& from,
                      const Place& tile, int row) {
  constexpr int cols = Place::kCols, each = Place::kEach, chunks = Place::kChunks;
  const int lane = ptx::thread_index() % static_cast<int>(kWarp), r = row + lane / 4, q = lane % 4;
#pragma unroll
  for (int n = 0; n < cols / 8; n++)
#pragma unroll
    for (int half = 0; half < 2; half++) {
      if constexpr (std::is_same_v<T, float>) {
        // A row and the next have these two chunks in the same banks, so that these take turns.
        const bool odd = r % 2 != 0;
        const float* pair = from[n] + 2 * half;
        const float* other = from[n ^ 2] + 2 * half;
        ptx::store_shared(tile.at(r + 8 * half, (odd ? n ^ 2 : n) * 8 + 2 * q),
                          odd ? other[0] : pair[0], odd ? other[1] : pair[1]);
      } else {
        *reinterpret_cast<uint32_t*>(tile.at(r + 8 * half, n * 8 + 2 * q)) =
            packed<T>(from[n] + 2 * half);
      }
    }
  __syncwarp();
  const auto target = [&](int own) { return first + row + (Dealt ? dealt(own) : own); };
  if (to.aligned) {
#pragma unroll 1
    for (int i = lane; i < 16 * chunks; i += static_cast<int>(kWarp)) {
      const int own = i / chunks, chunk = i % chunks, at = target(own);
      if (at >= to.rows || chunk * each >= to.cols) continue;
      const uint4 words = *reinterpret_cast<const uint4*>(tile.chunk(row + own, chunk));
      ptx::store_global(to.data + at * to.row_stride + chunk * each, words);
    }
  } else {
#pragma unroll 1
    for (int i = lane; i < 16 * cols; i += static_cast<int>(kWarp)) {
      const int own = i / cols, col = i % cols, at = target(own);
      if (at < to.rows && col < to.cols)
        to.data[at * to.row_stride + col * to.col_stride] = *tile.at(row + own, col);
    }
  }
}

}  // namespace fastattn::cuda
