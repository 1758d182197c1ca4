// The products of a layer by warp groups, for 16 bits on sm_90a: as cuda.cu, but that the copy
// engine brings the operands, as one thread of a third group tells it. A block computes one square
// after the other, and its two groups take turns, so that one multiplies while the other's results
// leave (Thakkar et al., CUTLASS 3, call that ping-pong).
#include "cuda/matrix.cuh"
#include "cuda/ptx_bulk.cuh"
#include "cuda/ptx_sm90.cuh"
#include "ffn/product.cuh"

namespace fastattn::cuda {
namespace {

using Tiles = BoxTiles;

extern __shared__ uint4 __align__(1024) shared_memory[];

__device__ uint64_t& barrier(int number) {
  constexpr int first = (Tiles::kShared - Tiles::kBarriers) / 8;
  return reinterpret_cast<uint64_t*>(shared_memory)[first + number];
}
// Ends a phase when a group has begun all products of a square.
__device__ uint64_t& begun(int group) { return barrier(2 * Tiles::kStages + group); }

// The place of a step's operands. The steps of a block's squares take the places one after the
// other.
struct Stage {
  int index = 0, parity = 0;

  __device__ uint32_t left(int box) const {
    return ptx::shared_address(shared_memory) + index * Tiles::kStage + box * Tiles::kBox;
  }
  __device__ uint32_t right(int box) const { return left(Tiles::kBoxes + box); }
  // Ends a phase when the operands are there, and when they have been read.
  __device__ uint64_t& full() const { return barrier(2 * index); }
  __device__ uint64_t& empty() const { return barrier(2 * index + 1); }
  __device__ void advance(int steps = 1) {
    const int all = index + steps;
    index = all % Tiles::kStages, parity ^= all / Tiles::kStages & 1;
  }
};

// Every `each`-th of a block's squares, from its number `first` on; and the steps of the depth.
template <class Each>
__device__ void for_squares(const ProductScalars& in, int first, int each, Each&& visit) {
  const int width = in.gated ? Tiles::kSide / 2 : Tiles::kSide;
  const int squares = (in.rows + Tiles::kSide - 1) / Tiles::kSide * ((in.cols + width - 1) / width);
  const int blocks = static_cast<int>(gridDim.x), own = static_cast<int>(blockIdx.x);
#pragma unroll 1
  for (int i = own + first * blocks; i < squares; i += each * blocks)
    visit(Square(in, width, i), (in.depth + Tiles::kDepth - 1) / Tiles::kDepth);
}

// Tells the copy engine what to bring. With a gate, the first box of the right side is the gate's.
template <bool LeftAcross, bool RightAcross>
__device__ void bring(const TensorMap& left, const TensorMap& right, const TensorMap& gate_right,
                      const ProductScalars& in) {
  Stage stage;
  for_squares(in, 0, 1, [&](const Square& square, int steps) {
#pragma unroll 1
    for (int step = 0; step < steps; step++, stage.advance()) {
      const auto copy = [&](uint32_t to, const TensorMap& from, bool across, int line) {
        const int depth = step * Tiles::kDepth;
        ptx::copy_box(to, from, across ? depth : line, across ? line : depth, stage.full());
      };
      ptx::mbarrier_wait(stage.empty(), stage.parity ^ 1);
      ptx::mbarrier_arrive_expecting(stage.full(), Tiles::kStage);
#pragma unroll
      for (int box = 0; box < Tiles::kBoxes; box++) {
        copy(stage.left(box), left, LeftAcross, square.row + box * 64);
        copy(stage.right(box), in.gated && box == 0 ? gate_right : right, RightAcross,
             square.col + (in.gated ? 0 : box * 64));
      }
    }
  });
}

using Sums = Accumulator<Tiles::kSide>[Tiles::kSide / 64];

// Sums begin with the biases, whose loads are out of the way in front of the products.
template <class T>
__device__ void begin_sums(Sums& sum, const Tensors<T>& of, const ProductScalars& in,
                           const Square& square) {
#pragma unroll
  for (int n = 0; n < Tiles::kSide / 8; n++) {
    const int col = square.col + (in.gated ? n % 8 : n) * 8 + lane_index() % 4 * 2;
    const T* bias = in.gated && n < 8 ? of.gate_bias : of.bias;
    float term[2] = {};
    if (bias != nullptr && col < in.cols) load(term, bias + col);
#pragma unroll
    for (int box = 0; box < Tiles::kBoxes; box++)
#pragma unroll
      for (int e = 0; e < 4; e++) sum[box][n][e] = term[e % 2];
  }
}

// sum = left right, and what sum was if More, of a warp group. The products of a step are under way
// while those of the next begin, and behind the last step those of the other group do.
template <class T, bool LeftAcross, bool RightAcross, bool More>
__device__ void multiply_all(Sums& sum, Stage& stage, int steps, int group) {
  const auto arrive = [](uint64_t& barrier) {
    if (lane_index() == 0) ptx::mbarrier_arrive(barrier);
  };
  Stage last;
#pragma unroll 1
  for (int step = 0; step < steps; step++, stage.advance()) {
    ptx::mbarrier_wait(stage.full(), stage.parity);
    const uint64_t right = ptx::matrix(stage.right(0), RightAcross ? Tiles::kBox : 0);
    ptx::begin_products();
#pragma unroll
    for (int k = 0; k < Tiles::kDepth / 16; k++)
#pragma unroll
      for (int box = 0; box < Tiles::kBoxes; box++) {
        const auto part = [&](uint64_t matrix, bool across) {
          return ptx::behind(matrix, across ? k * 16 * 128 : k * 32);
        };
        ptx::multiply_transposed<LeftAcross, RightAcross>(
            sum[box], T(), part(ptx::matrix(stage.left(box)), LeftAcross), part(right, RightAcross),
            More || step > 0 || k > 0);
      }
    ptx::commit_products();
    ptx::wait_for_products<1>();
    if (step > 0) arrive(last.empty());
    last = stage;
  }
  arrive(begun(group));
  ptx::wait_for_products<0>();
#pragma unroll
  for (int box = 0; box < Tiles::kBoxes; box++) ptx::settle(sum[box]);
  arrive(last.empty());
}

// Stores a warp's rows, 16 at a time through its memory.
template <class T, bool Forward>
__device__ void finish(const Tensors<T>& of, const ProductScalars& in, const Square& square,
                       const Sums& sum) {
  const int lane = lane_index(), warp = static_cast<int>(threadIdx.x / kWarp);
  const Tile<T, Tiles::kSide> rows{reinterpret_cast<T*>(shared_memory) +
                                   (Tiles::kStages * Tiles::kStage + warp * Tiles::kOut) / 2};
  // A lane has one chunk of every so many rows.
  const int chunks = rows.kChunks >> (in.gated ? 1 : 0), chunk = lane % chunks;
  const int apart = static_cast<int>(kWarp) / chunks, col = square.col + chunk * 8;
#pragma unroll
  for (int box = 0; box < Tiles::kBoxes; box++) {
    const int first = square.row + box * 64 + warp % 4 * Tiles::kOutRows;
#pragma unroll
    for (int n = 0; n < Tiles::kSide / 8; n++)
#pragma unroll
      for (int e = 0; e < 2; e++) {
        const int own = lane / 4 + 8 * e, at = n * 8 + lane % 4 * 2;
        const int row = first + own, col = square.col + at;
        float x[2] = {sum[box][n][2 * e], sum[box][n][2 * e + 1]};
        if (!Forward && of.add != nullptr && row < in.rows && col < in.cols)
          add_from(x, of.add + int64_t{row} * in.cols + col);
        *reinterpret_cast<uint32_t*>(rows.at(own, at)) = packed<T>(x);
      }
    __syncwarp();
    const int count = col < in.cols ? min(in.rows - first, Tiles::kOutRows) : 0;
#pragma unroll 1
    for (int own = lane / chunks; own < count; own += apart) {
      const int64_t at = int64_t{first + own} * in.cols + col;
      float x[8], gate[8];
      load(x, rows.chunk(own, in.gated ? 8 + chunk : chunk));
      if constexpr (Forward) {
        if (in.gated) load(gate, rows.chunk(own, chunk));
        conclude(of, in, at, x, gate);
      } else {
        store(of.out + at, x);
      }
    }
    __syncwarp();
  }
}

template <class T, bool LeftAcross, bool RightAcross>
__device__ void product(const TensorMap& left, const TensorMap& right, const TensorMap& gate_right,
                        const Tensors<T>& of, const ProductScalars& in) {
  constexpr bool forward = !LeftAcross && !RightAcross;
  if (threadIdx.x == 0) {
    for (int i = 0; i < Tiles::kStages; i++) {
      ptx::mbarrier_init(Stage{i}.full(), 1);
      ptx::mbarrier_init(Stage{i}.empty(), 4);
    }
    for (int group = 0; group < Tiles::kGroups; group++) ptx::mbarrier_init(begun(group), 4);
    ptx::mbarrier_fence();
  }
  __syncthreads();
  // By a shuffle, from which the compiler knows that a warp has one group.
  const int group = __shfl_sync(kAllLanes, static_cast<int>(threadIdx.x / 128), 0);
  if (group == Tiles::kGroups) {
    ptx::give_registers<40>();
    if (threadIdx.x % 128 == 0) bring<LeftAcross, RightAcross>(left, right, gate_right, in);
  } else {
    ptx::take_registers<232>();
    Stage stage;
    int parity = group ^ 1;  // the first group need not wait for the other at first
    for_squares(in, group, Tiles::kGroups, [&](const Square& square, int steps) {
      Sums sum;
      if constexpr (forward) begin_sums(sum, of, in, square);
      stage.advance(group * steps);
      ptx::mbarrier_wait(begun(group ^ 1), parity);
      parity ^= 1;
      multiply_all<T, LeftAcross, RightAcross, forward>(sum, stage, steps, group);
      stage.advance((group ^ 1) * steps);
      finish<T, forward>(of, in, square, sum);
    });
  }
}

}  // namespace
}  // namespace fastattn::cuda

using namespace fastattn::cuda;

#define FASTATTN_PRODUCT(kind, name, T, LeftAcross, RightAcross)                                  \
  extern "C" __global__ void __launch_bounds__(BoxTiles::kThreads, 1) ffn_##kind##_##name##_sm90( \
      const __grid_constant__ TensorMap left, const __grid_constant__ TensorMap right,            \
      const __grid_constant__ TensorMap gate_right, const T* bias, const T* gate_bias,            \
      const T* add, T* out, T* pre, T* gate, const __grid_constant__ ProductScalars in) {         \
    product<T, LeftAcross, RightAcross>(left, right, gate_right,                                  \
                                        {bias, gate_bias, add, out, pre, gate}, in);              \
  }
#define FASTATTN_PRODUCTS_OF_TYPE(name, T)           \
  FASTATTN_PRODUCT(forward, name, T, false, false)   \
  FASTATTN_PRODUCT(grad_input, name, T, false, true) \
  FASTATTN_PRODUCT(grad_weight, name, T, true, true)

FASTATTN_PRODUCTS_OF_TYPE(bf16, __nv_bfloat16)
FASTATTN_PRODUCTS_OF_TYPE(f16, __half)
