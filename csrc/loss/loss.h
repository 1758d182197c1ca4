// The cross-entropy of a linear layer's logits and its gradients, a few rows of logits at a time.
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "common/isa.h"

namespace fastattn {

// The losses of rows that belong to a class; where gradients are asked for, theirs too. "Wide" is
// fp64 for fp64 and fp32 for all else.
struct LinearCrossEntropy {
  Dtype dtype;
  int64_t rows, features, classes;
  const void* input;   // [rows, features]
  const void* weight;  // [classes, features]
  const void* bias;    // [classes] or null
  const int64_t* target;
  const int64_t* live;  // the rows that belong to a class, in order; the others have no loss
  int64_t count;        // of them
  double label_smoothing, softcap;  // 0: none
  const void* grad_losses;          // wide [rows]; null: 1 each
  double scale;                     // of all gradients
  int64_t chunk;                    // rows of logits at a time
  int64_t logits_row;               // elements from one row of logits to the next, whole vectors
  void* logits;                     // wide [chunk, logits_row], to work in
  void* gathered;                   // [chunk, features], likewise
  void* losses;                     // wide [rows]
  double loss_scale;                // of the sum of the losses
  void* loss;                       // wide, this sum, or null
  void* grad_input;                 // wide, like input, weight and bias; null where not asked
  void* grad_weight;
  void* grad_bias;
};

FASTATTN_KERNEL(linear_cross_entropy, LinearCrossEntropy)

}  // namespace fastattn
