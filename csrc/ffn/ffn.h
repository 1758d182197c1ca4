// Linear layers with a fused activation, and feed-forward blocks, plain and gated.
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "common/isa.h"
#include "cuda/launch.h"
#include "ffn/activation.h"

namespace fastattn {

// A weight [out_features, in_features], or in memory its transpose.
struct Weight {
  const void* data;
  bool transposed;  // on the CPU only
};

// out = activation(input weight^T + bias).
struct LinearForward {
  Dtype dtype;
  int64_t rows, in_features, out_features;
  const void* input;  // [rows, in_features]
  Weight weight;
  const void* bias;  // [out_features] or null
  Activation activation;
  void* out;  // [rows, out_features]
  void* pre;  // what came before the activation, or null
};

// hidden = activation(gate) * up, where up = input up_weight^T + up_bias and gate likewise.
struct GatedForward {
  Dtype dtype;
  int64_t rows, in_features, hidden_features;
  const void* input;
  Weight up_weight;     // [hidden_features, in_features]
  const void* up_bias;  // [hidden_features] or null
  Weight gate_weight;   // as up_weight
  const void* gate_bias;
  Activation activation;
  void* hidden;  // [rows, hidden_features]
  void* up;      // or null
  void* gate;    // or null
};

// out = hidden down_weight^T + down_bias, where hidden = activation(input up_weight^T + up_bias),
// or what GatedForward makes of a gate: on the CPU, without a tensor of what is hidden.
struct FeedForward {
  Dtype dtype;
  int64_t rows, in_features, hidden_features, out_features;
  const void* input;
  Weight up_weight;  // [hidden_features, in_features]
  const void* up_bias;
  Weight gate_weight;  // as up_weight, or null
  const void* gate_bias;
  Activation activation;
  Weight down_weight;  // [out_features, hidden_features]
  const void* down_bias;
  void* out;  // [rows, out_features]
};

// x = dropout(x): 0, or x / (1 - p), by random bits that are counted by row and column.
struct Drop {
  Dtype dtype;
  int64_t rows, cols;
  void* x;  // [rows, cols]
  double dropout_p;
  uint64_t seed;                // on the CPU
  const uint64_t* device_seed;  // on a GPU, whose memory the host does not read
};

// grad_pre = grad_out * activation'(pre), element by element; also activation(pre) where asked.
// Results may lie where an argument lies.
struct ActivationBackward {
  Dtype dtype;
  int64_t size;
  const void* grad_out;
  const void* pre;
  const void* gate;  // null: activation(pre). Else activation(gate) * pre, pre being `up`.
  Activation activation;
  void* grad_pre;
  void* grad_gate;  // with a gate
  void* hidden;     // activation(pre) or activation(gate) * pre; null if not asked
};

// The gradients of a linear layer; null where not asked.
struct LinearBackward {
  Dtype dtype;
  int64_t rows, in_features, out_features;
  const void* grad_pre;  // [rows, out_features]
  const void* input;
  Weight weight;
  const void* add;    // [rows, in_features], added to grad_input, or null
  void* grad_input;   // [rows, in_features]
  void* grad_weight;  // [out_features, in_features], or its transpose where weight is
  void* grad_bias;    // [out_features]
};

FASTATTN_KERNEL(linear_forward, LinearForward)
FASTATTN_KERNEL(gated_forward, GatedForward)
FASTATTN_KERNEL(feed_forward, FeedForward)
FASTATTN_KERNEL(drop, Drop)
FASTATTN_KERNEL(activation_backward, ActivationBackward)
FASTATTN_KERNEL(linear_backward, LinearBackward)

namespace cuda {
void linear_forward(const LinearForward& args, Device& device);
void gated_forward(const GatedForward& args, Device& device);
void drop(const Drop& args, Device& device);
void activation_backward(const ActivationBackward& args, Device& device);
void linear_backward(const LinearBackward& args, Device& device);
}  // namespace cuda

}  // namespace fastattn
