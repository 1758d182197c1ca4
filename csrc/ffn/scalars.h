// What the CUDA kernels of the ffn room take by value, and the tiles that they work in.
#pragma once

#include <cstdint>

namespace fastattn::cuda {

// For elements of `Bytes`: a block computes a square of the product, its warps 64 rows each of so
// many columns as their registers hold sums. It adds up steps of 64 bytes of a row, and while it
// works on one, the next two are being copied: 48 KB of shared memory, which every GPU has twice.
template <int Bytes>
struct ProductTiles {
  static constexpr int kSide = 128, kRows = 64, kCols = Bytes == 4 ? 32 : 64;
  static constexpr int kWarps = kSide * kSide / (kRows * kCols), kThreads = kWarps * 32;
  static constexpr int kBlocks = 8 / kWarps;  // of a multiprocessor, at least
  static constexpr int kDepth = 64 / Bytes, kOperand = kSide * 64;
  static constexpr int kStages = 3, kShared = kStages * 2 * kOperand;
};

// For 16 bits on sm_90a: of two warp groups, each computes a square of its own. The operands of a
// step are boxes of 64 x 64 elements, two for each side; while one step is multiplied, the next are
// being copied. A warp has 4 KB of its own besides, through which 16 rows leave.
struct BoxTiles {
  static constexpr int kSide = 128, kDepth = 64, kBox = 64 * 64 * 2, kBoxes = kSide / 64;
  static constexpr int kStage = 2 * kBoxes * kBox, kStages = 6;
  static constexpr int kGroups = 2, kWarps = kGroups * 4, kThreads = (kGroups + 1) * 128;
  static constexpr int kOutRows = 16, kOut = kOutRows * kSide * 2;
  static constexpr int kBarriers = (2 * kStages + kGroups) * 8;
  static constexpr int kShared = kStages * kStage + kWarps * kOut + kBarriers;
};

constexpr int kBandRows = 8;  // of squares, whose blocks come one after the other: see Square

struct ProductScalars {
  int32_t rows, cols, depth;            // of out, and what is summed over
  int32_t aligned_left, aligned_right;  // whether 16 bytes can be moved at once
  int32_t aligned_out;                  // whether 4 elements can, of all that is as out
  int32_t activation;                   // an Activation
  int32_t gated;                        // whether there is a second right operand
};

constexpr int kPointwiseThreads = 256;

struct DropScalars {
  int64_t rows;
  int32_t cols, counters;  // of a row, each for four columns
  uint32_t threshold;
  float kept;
};

struct PointwiseScalars {
  int64_t size;
  int32_t activation, aligned;
};

constexpr int kSumWarps = 8, kSumRows = 256;  // of a block that adds up columns

}  // namespace fastattn::cuda
