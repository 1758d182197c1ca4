// Additive attention, softmax(w . tanh(query + key)) value, without a tensor of pairs.
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "common/isa.h"
#include "common/view.h"

namespace fastattn {

struct AdditiveAttention {
  Dtype dtype;
  int64_t batch, heads, q_len, kv_len, head_dim, value_dim;
  Source query;        // [B, H, Sq, D]
  Source key;          // [B, H, Sk, D]
  Source value;        // [B, H, Sk, Dv]
  const void* weight;  // [H, D]
  Source mask;         // bool, true = attend
  int64_t right;       // query i sees the keys up to i + right
};

struct AdditiveForward {
  AdditiveAttention in;
  Target out;  // [B, H, Sq, Dv]
  // [B, H, Sq], at least fp32: the highest score, and the sum of exp(score - highest); 0 of
  // nothing.
  void *highest, *total;
};

struct AdditiveBackward {
  AdditiveAttention in;
  Source grad_out, out;  // [B, H, Sq, Dv]
  const void *highest, *total;
  Target grad_query, grad_key, grad_value;
  void* grad_weight;  // [H, D]
};

FASTATTN_KERNEL(additive_forward, AdditiveForward)
FASTATTN_KERNEL(additive_backward, AdditiveBackward)

}  // namespace fastattn
