// Attention over blocks of keys with an online softmax, forward and backward.
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "common/isa.h"

namespace fastattn {

// A tensor of four dimensions [batch, head, row, column]; a stride of 0 broadcasts.
template <class Pointer>
struct View {
  Pointer data = nullptr;
  int64_t stride[4] = {0, 0, 0, 0};
  int64_t first = 0;  // elements in front of the first
};
using Source = View<const void*>;
using Target = View<void*>;

constexpr int64_t kUnbounded = int64_t{1} << 60;

// One sequence of a batch: its number there, where its queries and keys begin, and its `offset`.
struct Sequence {
  int64_t index, query, q_len, key, kv_len, offset;
};

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
  // The sequences of a packed batch, longest first, for tensors with a batch stride of 0; null
  // where all are of length q_len and kv_len.
  const Sequence* packed = nullptr;
  // There is one number a row of `rows` in lse and its like; that of query i, head h and sequence b
  // is at b * row_stride[0] + h * row_stride[1] + i.
  int64_t rows, row_stride[2];
  int64_t index = 0, first_query = 0, first_key = 0, first_row = 0;  // of the sequence in hand
};

struct AttentionForward {
  Attention in;
  Target out;  // [B, H, Sq, Dv]
  void* lse;   // [rows], at least fp32, natural logarithm
};

struct AttentionBackward {
  Attention in;
  Source grad_out;       // [B, H, Sq, Dv]; null: zero
  const void* grad_lse;  // [rows], at least fp32; null: zero
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
