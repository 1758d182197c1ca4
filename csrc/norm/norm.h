// Layer norm (centred) and RMS norm of the rows of a matrix, with a residual added in front.
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "common/isa.h"

namespace fastattn {

struct NormForward {
  Dtype dtype;
  int64_t rows, cols;
  const void* input;     // [rows, cols]
  const void* residual;  // [rows, cols] or null
  const void* weight;    // [cols] or null
  const void* bias;      // [cols] or null
  Dtype weight_dtype, bias_dtype;
  bool centred;
  double eps;
  void* out;     // [rows, cols]
  void* summed;  // [rows, cols], input + residual, or null
  void* mean;    // [rows], at least fp32, or null if not centred
  void* rstd;    // [rows], at least fp32
};

struct NormBackward {
  Dtype dtype;
  int64_t rows, cols;
  const void* grad_out;     // [rows, cols] or null
  const void* grad_summed;  // [rows, cols] or null
  const void* summed;       // [rows, cols], what was normalised
  const void* weight;       // [cols] or null
  Dtype weight_dtype, bias_dtype;
  bool centred;
  const void* mean;   // [rows]
  const void* rstd;   // [rows]
  void* grad_input;   // [rows, cols]
  void* grad_weight;  // [cols] or null
  void* grad_bias;    // [cols] or null
};

FASTATTN_KERNEL(norm_forward, NormForward)
FASTATTN_KERNEL(norm_backward, NormBackward)

}  // namespace fastattn
