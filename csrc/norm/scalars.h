// What the CUDA kernels of the norm room take by value, and the shape of their blocks.
#pragma once

#include <cstdint>

namespace fastattn::cuda {

constexpr int kNormThreads = 512;  // of a block, at most
constexpr int kFolders = 8;        // warps of a block that folds

struct NormScalars {
  int64_t rows;
  int32_t cols, centred;
  int32_t wide_weight, wide_bias;  // whether they are fp32, whatever input is
  int32_t cached;                  // whether shared memory holds a row, which is then read once
  int32_t sums;                    // whether it holds the sums of the parameters' gradients
  float eps;
  uint32_t threshold;  // of dropout, 0 without
  float kept;
};

}  // namespace fastattn::cuda
