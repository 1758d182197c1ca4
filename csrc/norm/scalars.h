// What the CUDA kernels of the norm room take by value, and the shape of their blocks.
#pragma once

#include <cstdint>

namespace fastattn::cuda {

constexpr int kHeld = 4;               // vectors of a row that a thread keeps in registers
constexpr int kNormThreads = 512;      // of a block, at most
constexpr int kForwardThreads = 128;   // of a block with several rows, at most
constexpr int kBackwardThreads = 256;  // the same
constexpr int kFolders = 32;           // warps of a block that folds

struct NormScalars {
  int64_t rows;
  int32_t cols, centred;
  int32_t wide_weight, wide_bias;  // whether they are fp32, whatever input is
  float share;                     // of a column in a mean
  float eps;
  uint32_t threshold;  // of dropout, 0 without
  float kept;
};

struct NormFold {
  int32_t parts, cols;
  int32_t wide_weight, wide_bias;
};

}  // namespace fastattn::cuda
