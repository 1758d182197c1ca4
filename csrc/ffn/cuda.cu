// Linear layers and feed-forward blocks on a GPU: tiled products with the rest in the epilogue.
//
// One body serves the three products of a layer, which differ in how their operands lie:
//   forward      out         = input weight^T        both along the depth
//   grad_input   grad_input  = grad_pre weight       weight across it
//   grad_weight  grad_weight = grad_pre^T input      both across it
#include "cuda/matrix.cuh"
#include "ffn/product.cuh"

namespace fastattn::cuda {
namespace {

extern __shared__ uint4 shared_memory[];

// An operand's part for one step of the depth: 128 lines (rows of the left one, columns of the
// right one) of 64 bytes, or, where the operand lies across, so many rows of the depth of 128.
template <class T, bool Across>
struct Operand {
  using Tiles = ProductTiles<sizeof(T)>;
  static constexpr int kSide = Tiles::kSide, kDepth = Tiles::kDepth;
  using Lines = Tile<T, Across ? kSide : kDepth>;
  static constexpr int kEach = Lines::kEach, kChunks = Lines::kChunks;
  static constexpr int kStep = Tiles::kThreads / kChunks;
  static constexpr int kCopies = (Across ? kDepth : kSide) / kStep;

  const T* data;
  int64_t stride;
  int lines, depth;
  bool aligned;

  // Begins to copy the part behind depth `k`, with zeros where the matrix ends. `line` gives the
  // number of a line of the tile in the matrix, and which matrix that is.
  template <class Line>
  __device__ void fetch(const Lines& to, int k, Line&& line) const {
    const int chunk = static_cast<int>(threadIdx.x) % kChunks;
    const int first = static_cast<int>(threadIdx.x) / kChunks;
    const auto copy = [&](int row, auto&& move) {
      const T* from = data;
      const int number = line(Across ? chunk * kEach : row, from);
      const int at_depth = k + (Across ? row : chunk * kEach);
      // What is left from here on, along the row and down the rows.
      const int along = Across ? lines - number : depth - at_depth;
      const bool inside = Across ? at_depth < depth : number < lines;
      const int count = inside ? min(max(along, 0), kEach) : 0;
      const T* at = Across ? from + at_depth * stride + number : from + number * stride + at_depth;
      move(to.chunk(row, chunk), count > 0 ? at : from, count);
    };
    if (aligned) {
#pragma unroll
      for (int i = 0; i < kCopies; i++)
        copy(first + i * kStep, [](T* into, const T* at, int count) {
          ptx::copy_async(into, at, count * static_cast<int>(sizeof(T)));
        });
    } else {
#pragma unroll 1
      for (int i = 0; i < kCopies; i++)
        copy(first + i * kStep, [](T* into, const T* at, int count) {
#pragma unroll 1
          for (int e = 0; e < kEach; e++) into[e] = e < count ? at[e] : T(0.0f);
        });
    }
  }
};

template <class T>
using Sums = Accumulator<ProductTiles<sizeof(T)>::kCols>[ProductTiles<sizeof(T)>::kRows / 16];

// sum += left right for one step, of a warp's part of the square from `row` and `col` on.
template <class T, bool LeftAcross, bool RightAcross>
__device__ void multiply_step(Sums<T>& sum, const typename Operand<T, LeftAcross>::Lines& left,
                              const typename Operand<T, RightAcross>::Lines& right, int row,
                              int col) {
  using Tiles = ProductTiles<sizeof(T)>;
  constexpr int depth = Tiles::kDepth, rows = Tiles::kRows, cols = Tiles::kCols;
  const int lane = lane_index();
  if constexpr (std::is_same_v<T, float>) {
    const int r = row + lane / 4, q = lane % 4;
    constexpr int each = LeftAcross && RightAcross ? 1 : 4;  // of the depth, as one load has them
    // Of this step alone: the rounding errors of one long chain would grow with the depth.
    Sums<T> part;
#pragma unroll
    for (int k = 0; k < depth; k += each) {
      float a[rows / 8][each];
#pragma unroll
      for (int i = 0; i < rows / 8; i++) {
        if constexpr (LeftAcross) {
#pragma unroll
          for (int d = 0; d < each; d++) a[i][d] = *left.at(k + d, r + 8 * i);
        } else {
          load(a[i], left.at(r + 8 * i, k));
        }
      }
#pragma unroll
      for (int n = 0; n < cols / 8; n++) {
        float b[2][each];
        if constexpr (RightAcross) {
#pragma unroll
          for (int d = 0; d < each; d++) {
            const float2 both =
                *reinterpret_cast<const float2*>(right.at(k + d, col + 8 * n + 2 * q));
            b[0][d] = both.x, b[1][d] = both.y;
          }
        } else {
          load(b[0], right.at(col + 8 * n + 2 * q, k));
          load(b[1], right.at(col + 8 * n + 2 * q + 1, k));
        }
#pragma unroll
        for (int i = 0; i < rows / 8; i++)
#pragma unroll
          for (int e = 0; e < 2; e++) {
            float& own = part[i / 2][n][i % 2 * 2 + e];
            if (k == 0) own = a[i][0] * b[e][0];
#pragma unroll
            for (int d = k == 0 ? 1 : 0; d < each; d++) own += a[i][d] * b[e][d];
          }
      }
    }
#pragma unroll
    for (int i = 0; i < rows / 16; i++)
#pragma unroll
      for (int n = 0; n < cols / 8; n++)
#pragma unroll
        for (int e = 0; e < 4; e++) sum[i][n][e] += part[i][n][e];
  } else {
#pragma unroll
    for (int k = 0; k < depth / 16; k++) {
      uint32_t a[rows / 16][4];
#pragma unroll
      for (int i = 0; i < rows / 16; i++) {
        if constexpr (LeftAcross)
          ptx::load_transposed(a[i], left.chunk(k * 16 + lane / 16 * 8 + lane % 8,
                                                (row + i * 16) / 8 + lane / 8 % 2));
        else
          ptx::load_matrices(a[i], left.chunk(row + i * 16 + lane % 16, 2 * k + lane / 16));
      }
#pragma unroll
      for (int n = 0; n < cols / 16; n++) {
        uint32_t b[4];
        if constexpr (RightAcross)
          ptx::load_transposed(
              b, right.chunk(k * 16 + lane / 8 % 2 * 8 + lane % 8, (col + n * 16) / 8 + lane / 16));
        else
          ptx::load_matrices(
              b, right.chunk(col + n * 16 + lane / 16 * 8 + lane % 8, 2 * k + lane / 8 % 2));
#pragma unroll
        for (int i = 0; i < rows / 16; i++) {
          ptx::multiply<T>(sum[i][2 * n], a[i], b[0], b[1]);
          ptx::multiply<T>(sum[i][2 * n + 1], a[i], b[2], b[3]);
        }
      }
    }
  }
}

// Half of a warp's rows of sums, through which they leave in whole rows. 16 lanes write four rows
// at two chunks of 16 bytes, and 8 read one row or, of gates in fp32, halves of two neighbours.
template <class T>
struct Rows {
  static constexpr int kRows = ProductTiles<sizeof(T)>::kRows / 2;
  static constexpr int kCols = ProductTiles<sizeof(T)>::kCols;
  static_assert(kRows * kCols * 4 * ProductTiles<sizeof(T)>::kWarps <=
                ProductTiles<sizeof(T)>::kShared);
  float* memory;

  __device__ float* at(int row, int col) const {
    const int permutation = row % 2 * 4 + row / 2 % 2 * 2;
    return memory + row * kCols + ((col / 4) ^ permutation) * 4 + col % 4;
  }
};

template <class T, int N>
__device__ void round_to(float (&x)[N]) {
#pragma unroll
  for (int i = 0; i < N; i++) x[i] = static_cast<float>(static_cast<T>(x[i]));
}

// Finishes N neighbouring elements of out.
template <bool Forward, class T, int N>
__device__ void finish(const Tensors<T>& of, const ProductScalars& in, int64_t row, int col,
                       float (&x)[N], float (&gate)[N]) {
  const int64_t at = row * in.cols + col;
  add_from(x, !Forward && of.add != nullptr ? of.add + at : nullptr);
  add_from(x, Forward && of.bias != nullptr ? of.bias + col : nullptr);
  if constexpr (!Forward) return store(of.out + at, x);
  round_to<T>(x);
  if (in.gated) {
    add_from(gate, of.gate_bias == nullptr ? nullptr : of.gate_bias + col);
    round_to<T>(gate);
  }
  conclude(of, in, at, x, gate);
}

// out = left right, and what follows it. With a gate, half of every warp's columns are
// the gate's, and the others those of the other matrix which they open.
template <class T, bool LeftAcross, bool RightAcross>
__device__ void product(const T* left_data, const T* right_data, const T* gate_right,
                        const Tensors<T>& of, const ProductScalars& in) {
  using Left = Operand<T, LeftAcross>;
  using Right = Operand<T, RightAcross>;
  using Tiles = ProductTiles<sizeof(T)>;
  constexpr int cols = Tiles::kCols, stages = Tiles::kStages;
  constexpr bool forward = !LeftAcross && !RightAcross;
  const Square square(in, in.gated ? Tiles::kSide / 2 : Tiles::kSide, static_cast<int>(blockIdx.x));
  const int lane = lane_index(), warp = static_cast<int>(threadIdx.x / kWarp);
  const int across = Tiles::kSide / cols;
  const int row = warp / across * Tiles::kRows, col = warp % across * cols;
  const Left left{left_data, LeftAcross ? in.rows : in.depth, in.rows, in.depth,
                  in.aligned_left != 0};
  const Right right{right_data, RightAcross ? in.cols : in.depth, in.cols, in.depth,
                    in.aligned_right != 0};

  char* memory = reinterpret_cast<char*>(shared_memory);
  const auto left_lines = [&](int stage) {
    return typename Left::Lines{reinterpret_cast<T*>(memory + stage * 2 * Tiles::kOperand)};
  };
  const auto right_lines = [&](int stage) {
    return typename Right::Lines{reinterpret_cast<T*>(memory + (stage * 2 + 1) * Tiles::kOperand)};
  };
  const auto fetch = [&](int step, int stage) {
    left.fetch(left_lines(stage), step * Tiles::kDepth,
               [&](int line, const T*&) { return square.row + line; });
    right.fetch(right_lines(stage), step * Tiles::kDepth, [&](int line, const T*& from) {
      if (RightAcross || !in.gated) return square.col + line;
      if (line % cols < cols / 2) from = gate_right;
      return square.col + line / cols * (cols / 2) + line % (cols / 2);
    });
  };

  const int first_row = square.row + row, first_col = square.col + (in.gated ? col / 2 : col);
  const bool inside = first_row < in.rows && first_col < in.cols;
  Sums<T> sum = {};
  const int steps = (in.depth + Tiles::kDepth - 1) / Tiles::kDepth;
#pragma unroll 1
  for (int step = 0; step < stages - 1; step++) {
    if (step < steps) fetch(step, step);
    ptx::commit_copies();
  }
  int stage = 0;
#pragma unroll 1
  for (int step = 0; step < steps; step++) {
    ptx::wait_for_groups<stages - 2>();
    __syncthreads();  // for the copies of the others, too, and until nobody reads the oldest stage
    if (step + stages - 1 < steps) fetch(step + stages - 1, stage == 0 ? stages - 1 : stage - 1);
    ptx::commit_copies();
    if (inside)
      multiply_step<T, LeftAcross, RightAcross>(sum, left_lines(stage), right_lines(stage), row,
                                                col);
    stage = stage == stages - 1 ? 0 : stage + 1;
  }
  __syncthreads();

  using Half = Rows<T>;
  const Half rows{reinterpret_cast<float*>(memory) + warp * Half::kRows * Half::kCols};
  const int chunks = in.gated ? cols / 8 : cols / 4;
#pragma unroll 1
  for (int half = 0; half < 2; half++) {
#pragma unroll
    for (int i = 0; i < Tiles::kRows / 16; i++) {
      if (i / 2 != half) continue;
#pragma unroll
      for (int n = 0; n < cols / 8; n++)
#pragma unroll
        for (int e = 0; e < 2; e++)
          ptx::store_shared(rows.at(i % 2 * 16 + e * 8 + lane / 4, n * 8 + lane % 4 * 2),
                            sum[i][n][2 * e], sum[i][n][2 * e + 1]);
    }
    __syncwarp();
#pragma unroll 1
    for (int i = lane; i < Half::kRows * chunks; i += static_cast<int>(kWarp)) {
      const int own = i / chunks, from = i % chunks * 4;
      const int r = first_row + half * Half::kRows + own, c = first_col + from;
      if (r >= in.rows || c >= in.cols) continue;
      const float* gates = rows.at(own, from);
      const float* values = rows.at(own, in.gated ? from + cols / 2 : from);
      if (in.aligned_out) {
        float x[4], gate[4];
        load(x, values);
        load(gate, gates);
        finish<forward>(of, in, r, c, x, gate);
      } else {
#pragma unroll 1
        for (int e = 0; e < min(4, in.cols - c); e++) {
          float x[1] = {values[e]}, gate[1] = {gates[e]};
          finish<forward>(of, in, r, c + e, x, gate);
        }
      }
    }
    __syncwarp();
  }
}

// Dropout in place: a thread has the four columns whose random words one counter gives.
template <class T>
__device__ void drop(T* x, const uint64_t* seed, const DropScalars& in) {
  const int64_t index = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  const int64_t row = index / in.counters;
  const int counter = static_cast<int>(index % in.counters);
  if (row >= in.rows) return;
  const uint4 words = philox(*seed, counter, static_cast<uint32_t>(row), 0);
#pragma unroll
  for (int i = 0; i < 4; i++) {
    const int col = counter / 16 * 64 + counter % 16 + 16 * i;
    if (col >= in.cols) return;
    T* at = x + row * in.cols + col;
    const bool keeps = word(words, i) >= in.threshold && in.kept != 0;
    *at = static_cast<T>(keeps ? static_cast<float>(*at) * in.kept : 0.0f);
  }
}

// The gradient in front of an activation, or of a gate and what it opens, and what came behind.
template <class T, int N>
__device__ void pass_back(const T* grad_out, const T* pre, const T* gate, T* grad_pre, T* grad_gate,
                          T* hidden, int kind, int64_t at) {
  float grad[N], x[N], open[N] = {};
  load(grad, grad_out + at);
  load(x, pre + at);
  if (gate != nullptr) load(open, gate + at);
  with_activation<T>(kind, [&](auto&& activation) {
#pragma unroll
    for (int i = 0; i < N; i++) {
      const Activated of = activation(gate == nullptr ? x[i] : open[i]);
      const float factor = gate == nullptr ? 1 : x[i];
      open[i] = grad[i] * factor * of.slope;
      x[i] = factor * of.value;
      grad[i] *= of.value;
    }
  });
  store(gate == nullptr ? grad_pre + at : grad_gate + at, open);
  if (gate != nullptr) store(grad_pre + at, grad);
  if (hidden != nullptr) store(hidden + at, x);
}

template <class T>
__device__ void activation_backward(const T* grad_out, const T* pre, const T* gate, T* grad_pre,
                                    T* grad_gate, T* hidden, const PointwiseScalars& in) {
  const int64_t at = (int64_t{blockIdx.x} * blockDim.x + threadIdx.x) * 4;
  if (in.aligned && at + 4 <= in.size)
    return pass_back<T, 4>(grad_out, pre, gate, grad_pre, grad_gate, hidden, in.activation, at);
#pragma unroll 1
  for (int64_t i = at; i < min(at + 4, in.size); i++)
    pass_back<T, 1>(grad_out, pre, gate, grad_pre, grad_gate, hidden, in.activation, i);
}

// to[b] = the sum of the rows b each ... (b + 1) each - 1, in an order that the shape alone
// decides.
template <class From, class To>
__device__ void sum_columns(const From* from, To* to, int rows, int cols, int each) {
  __shared__ float sums[kSumWarps][kWarp];
  const int col = static_cast<int>(blockIdx.x * kWarp + threadIdx.x);
  const int first = static_cast<int>(blockIdx.y) * each, end = min(first + each, rows);
  float sum = 0;
  if (col < cols)
    for (int row = first + static_cast<int>(threadIdx.y); row < end; row += kSumWarps)
      sum += static_cast<float>(from[int64_t{row} * cols + col]);
  sums[threadIdx.y][threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.y > 0 || col >= cols) return;
  for (int i = 1; i < kSumWarps; i++) sum += sums[i][threadIdx.x];
  to[int64_t{blockIdx.y} * cols + col] = static_cast<To>(sum);
}

}  // namespace
}  // namespace fastattn::cuda

using namespace fastattn::cuda;

#define FASTATTN_PRODUCT(kind, name, T, LeftAcross, RightAcross)                             \
  extern "C" __global__ void __launch_bounds__(ProductTiles<sizeof(T)>::kThreads,            \
                                               ProductTiles<sizeof(T)>::kBlocks)             \
      ffn_##kind##_##name(const T* left, const T* right, const T* gate_right, const T* bias, \
                          const T* gate_bias, const T* add, T* out, T* pre, T* gate,         \
                          const __grid_constant__ ProductScalars in) {                       \
    product<T, LeftAcross, RightAcross>(left, right, gate_right,                             \
                                        {bias, gate_bias, add, out, pre, gate}, in);         \
  }
#define FASTATTN_FFN(name, T)                                                                     \
  FASTATTN_PRODUCT(forward, name, T, false, false)                                                \
  FASTATTN_PRODUCT(grad_input, name, T, false, true)                                              \
  FASTATTN_PRODUCT(grad_weight, name, T, true, true)                                              \
  extern "C" __global__ void __launch_bounds__(kPointwiseThreads)                                 \
      ffn_drop_##name(T* x, const uint64_t* seed, DropScalars in) {                               \
    drop<T>(x, seed, in);                                                                         \
  }                                                                                               \
  extern "C" __global__ void __launch_bounds__(kPointwiseThreads)                                 \
      ffn_activation_backward_##name(const T* grad_out, const T* pre, const T* gate, T* grad_pre, \
                                     T* grad_gate, T* hidden, PointwiseScalars in) {              \
    activation_backward<T>(grad_out, pre, gate, grad_pre, grad_gate, hidden, in);                 \
  }

FASTATTN_FFN(f32, float)
FASTATTN_FFN(bf16, __nv_bfloat16)
FASTATTN_FFN(f16, __half)

#define FASTATTN_SUM_COLUMNS(name, From, To)                                           \
  extern "C" __global__ void __launch_bounds__(kSumWarps* kWarp)                       \
      ffn_sum_columns_##name(const From* from, To* to, int rows, int cols, int each) { \
    sum_columns(from, to, rows, cols, each);                                           \
  }

FASTATTN_SUM_COLUMNS(f32_to_f32, float, float)
FASTATTN_SUM_COLUMNS(bf16_to_f32, __nv_bfloat16, float)
FASTATTN_SUM_COLUMNS(f16_to_f32, __half, float)
FASTATTN_SUM_COLUMNS(f32_to_bf16, float, __nv_bfloat16)
FASTATTN_SUM_COLUMNS(f32_to_f16, float, __half)
