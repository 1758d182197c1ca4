// Attention over blocks of keys with an online softmax, forward and backward, and to a cache.
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "common/isa.h"
#include "common/view.h"
#include "cuda/launch.h"

namespace fastattn {

constexpr int64_t kUnbounded = int64_t{1} << 60;

// One sequence of a batch: its number there, where its queries and keys begin, and its `offset`.
struct Sequence {
  int64_t index, query, q_len, key, kv_len, offset;
};

// A vector or matrix of a GPU's numbers, in int64 if `wide`, else int32; null where there is none.
struct Integers {
  const void* data = nullptr;
  int64_t stride[2] = {0, 0};  // of a vector, the second
  bool wide = false;
};

// Where the sequences of a packed batch begin, and where the last ends: B + 1 numbers. No sequence
// is longer than `longest`.
struct Starts {
  Integers numbers;
  int64_t longest = 0;
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
  uint64_t seed;                          // on the CPU
  const uint64_t* device_seed = nullptr;  // on a GPU, whose memory the host does not read
  // The sequences of a batch of unequal lengths, longest first; null where all have q_len queries
  // and kv_len keys. Packed ones lie in tensors with a batch stride of 0.
  const Sequence* sequences = nullptr;
  // On a GPU, whose memory the host does not read, packed ones are these.
  Starts query_starts, key_starts;
  bool bottom_right = false;  // what their offsets follow
  // There is one number a row of `rows` in lse and its like; that of query i, head h and sequence b
  // is at b * row_stride[0] + h * row_stride[1] + i.
  int64_t rows, row_stride[2];
  int64_t index = 0, first_query = 0, first_key = 0, first_row = 0;  // of the sequence in hand
};

struct AttentionForward {
  Attention in;
  Target out;  // [B, H, Sq, Dv]
  void* lse;   // [rows], at least fp32, natural logarithm, or null if not wanted, on the CPU
};

struct AttentionBackward {
  Attention in;
  Source grad_out;       // [B, H, Sq, Dv]; on a GPU null is zero
  const void* grad_lse;  // [rows], at least fp32; null: zero
  Source out;
  const void* lse;
  Target grad_query, grad_key, grad_value;
  // The gradient of bias, contiguous with sizes bias_sizes (1 where bias broadcasts), or null. Of a
  // relative bias these are [B, H, 1, Sq + Sk - 1]: key j meets query i at j - i + Sq - 1.
  void* grad_bias;
  int64_t bias_sizes[4];
  bool relative_bias;
  double* grad_sinks;  // [H] or null
};

// Position p of sequence b lies at slot p % size of page pages[b * columns + p / size] of a cache
// [pages, Hkv, size, D]. A cache of whole sequences has one page for each.
struct Paging {
  const int64_t* pages;
  int64_t columns, size;
  int64_t count;  // of all pages
  // On a GPU, whose memory the host does not read: the lengths of the sequences so far, and their
  // pages [B, columns] or, where each has one, null.
  Integers lengths, table;
};

// Rotary embedding of the first 2 * pairs elements of a row, by the row of its position in two
// tables [positions, pairs].
struct Rotary {
  Source cos, sin;
  Dtype dtype;
  int64_t positions = 0, pairs = 0;
  bool interleaved;  // pairs are neighbours, not half of the elements apart
};

struct AttentionDecode {
  Attention in;  // key and value are in the caches; kv_len is the room for them
  int64_t appended;
  Source key_cache, value_cache;
  Paging paging;
  Rotary rotary;  // of the queries
  Target out;     // [B, H, Sq, Dv]
  void* lse;      // the same
};

struct AttentionAppend {
  Dtype dtype;
  int64_t batch, kv_heads, new_len, head_dim, value_dim;
  Source key, value;  // [B, Hkv, new_len, D]
  Target key_cache, value_cache;
  Paging paging;
  const int64_t* lengths;  // [B], of the sequences so far, on the CPU
  Rotary rotary;           // of the keys
};

FASTATTN_KERNEL(attention_forward, AttentionForward)
FASTATTN_KERNEL(attention_backward, AttentionBackward)
FASTATTN_KERNEL(attention_decode, AttentionDecode)
FASTATTN_KERNEL(attention_append, AttentionAppend)

namespace cuda {
void attention_forward(const AttentionForward& args, Device& device);
void attention_backward(const AttentionBackward& args, Device& device);
void attention_decode(const AttentionDecode& args, Device& device);
void attention_append(const AttentionAppend& args, Device& device);
}  // namespace cuda

}  // namespace fastattn
