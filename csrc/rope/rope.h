// Rotary position embedding: pairs of elements of a row turned by the angles of its position.
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "common/isa.h"

namespace fastattn {

struct Rope {
  Dtype dtype;
  int64_t batch, heads, rows, head_dim;
  int64_t angles;  // the first 2 * angles elements of a row are rotated
  bool interleaved;
  bool inverse;  // by the negative angles
  const void* x;
  void* out;                             // may be x
  int64_t x_stride[4], out_stride[4];    // of [B, H, S, D]
  const void *cos, *sin;                 // fp32 (fp64 for fp64), a row's elements side by side
  int64_t cos_stride[2], sin_stride[2];  // of [B, S], or with positions 0 and that of a table's row
  const int64_t* positions;              // null: the row's number
  int64_t positions_stride[2];           // of [B, S]
};

FASTATTN_KERNEL(rope, Rope)

}  // namespace fastattn
