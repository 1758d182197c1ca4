// Attention over blocks of keys with an online softmax, forward and backward.
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "common/isa.h"
#include "common/view.h"

namespace fastattn {

constexpr int64_t kUnbounded = int64_t{1} << 60;

struct Attention {
  Dtype dtype;
  int64_t batch, heads, kv_heads, q_len, kv_len, head_dim, value_dim;
  Source query;  // [B, H, Sq, D]
  Source key;    // [B, Hkv, Sk, D]
  Source value;  // [B, Hkv, Sk, Dv]
  Source mask;   // bool, true = attend
  Source bias;
  Dtype bias_dtype;
  const float* alibi_slopes;  // [B, H] or null
  const double* sinks;        // [H] or null
  // Query i sees the keys i + offset - left ... i + offset + right; kUnbounded is no bound.
  int64_t offset, left, right;
  double scale, softcap, dropout_p;
  uint64_t seed;
};

struct AttentionForward {
  Attention in;
  Target out;  // [B, H, Sq, Dv]
  void* lse;   // [B, H, Sq], at least fp32, natural logarithm
};

struct AttentionBackward {
  Attention in;
  Source grad_out;       // [B, H, Sq, Dv]; null: zero
  const void* grad_lse;  // [B, H, Sq], at least fp32; null: zero
  Source out;
  const void* lse;
  Target grad_query, grad_key, grad_value;
  // The gradient of bias, contiguous with sizes bias_sizes (1 where bias broadcasts), or null.
  void* grad_bias;
  int64_t bias_sizes[4];
  double* grad_sinks;  // [H] or null
};

FASTATTN_KERNEL(attention_forward, AttentionForward)
FASTATTN_KERNEL(attention_backward, AttentionBackward)

}  // namespace fastattn
