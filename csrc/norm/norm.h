// Layer norm (centred) and RMS norm of rows, with dropout and a residual in front.
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "common/isa.h"
#include "cuda/launch.h"

namespace fastattn {

// Normalised is input or, with a residual, its sum with dropout(input), rounded to residual_dtype.
struct Norm {
  Dtype dtype;           // of input, out and their gradients
  Dtype residual_dtype;  // of residual, summed and their gradients: the same, or fp32
  int64_t rows, cols;
  const void* input;     // [rows, cols]
  const void* residual;  // [rows, cols] or null
  const void* weight;    // [cols] or null
  const void* bias;      // [cols] or null
  Dtype weight_dtype, bias_dtype;
  bool centred;
  double dropout_p;             // 0 without a residual
  uint64_t seed;                // on the CPU
  const uint64_t* device_seed;  // on a GPU, whose memory the host does not read
};

struct NormForward {
  Norm in;
  double eps;
  void* out;     // [rows, cols]
  void* summed;  // [rows, cols], or null if not wanted
  void* mean;    // [rows], at least fp32, or null if not centred or, on the CPU, not wanted
  void* rstd;    // [rows], at least fp32, or null likewise
};

struct NormBackward {
  Norm in;
  const void* grad_out;     // [rows, cols] or null
  const void* grad_summed;  // [rows, cols] or null
  const void* summed;       // [rows, cols], or null if it is to be computed again
  const void* mean;         // [rows]
  const void* rstd;         // [rows]
  void* grad_input;         // [rows, cols]
  void* grad_residual;      // [rows, cols], or null where it equals grad_input
  void* grad_weight;        // [cols] or null
  void* grad_bias;          // [cols] or null
};

FASTATTN_KERNEL(norm_forward, NormForward)
FASTATTN_KERNEL(norm_backward, NormBackward)

namespace cuda {
void norm_forward(const NormForward& args, Device& device);
void norm_backward(const NormBackward& args, Device& device);
}  // namespace cuda

}  // namespace fastattn
