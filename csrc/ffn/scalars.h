// What the CUDA kernels of the ffn room take by value, and the tiles that they work in.
#pragma once

#include <cstdint>

namespace fastattn::cuda {

// A block computes a square of the product, its four warps a quarter each. It sums over steps of
// 64 bytes of a row, and while it works on one, the next two are being copied: 48 KB of shared
// memory, of which every GPU has room for two blocks.
struct ProductTiles {
  static constexpr int kSide = 128, kWarpSide = 64, kWarps = 4, kStages = 3;
  static constexpr int kDepthBytes = 64, kOperand = kSide * kDepthBytes;
  static constexpr int kShared = kStages * 2 * kOperand;
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

struct PointwiseScalars {
  int64_t size;
  int32_t activation, aligned;
};

constexpr int kSumWarps = 8, kSumRows = 256;  // of a block that adds up columns

}  // namespace fastattn::cuda
