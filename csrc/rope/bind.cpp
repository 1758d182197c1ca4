// The torch ops of the rope room on the CPU: forward, backward and in place.
#include "common/tensor.h"
#include "rope/rope.h"

namespace fastattn {
namespace {

void strides_of(const Tensor& tensor, int64_t* to) {
  for (int dim = 0; dim < 4; dim++) to[dim] = tensor.stride(dim);
}

// The rotation of x, complete but for `out`.
Rope checked(const Tensor& x, const Tensor& cos, const Tensor& sin, const OptionalTensor& positions,
             bool interleaved, bool inverse) {
  Rope args{};
  FASTATTN_CHECK(x.dim() == 4, "x must have four dimensions");
  args.dtype = dtype_of(x);
  args.batch = x.size(0), args.heads = x.size(1), args.rows = x.size(2), args.head_dim = x.size(3);
  args.interleaved = interleaved, args.inverse = inverse;
  args.x = x.const_data_ptr();
  strides_of(x, args.x_stride);
  const auto table = [&](const char* name, const Tensor& tensor, int64_t* stride) {
    check_dtype(name, tensor, wide(args.dtype));
    const int64_t dim = tensor.dim();
    FASTATTN_CHECK(dim == 2 || dim == 3, name, " must have two or three dimensions");
    FASTATTN_CHECK(tensor.sizes() == cos.sizes(), "sin must have the shape of cos");
    args.angles = tensor.size(dim - 1);
    FASTATTN_CHECK(2 * args.angles <= args.head_dim, name, " has more angles than x has pairs");
    FASTATTN_CHECK(tensor.stride(dim - 1) == 1 || args.angles == 1 || tensor.numel() == 0, name,
                   " must hold the angles of a row side by side");
    stride[0] = dim == 3 && tensor.size(0) > 1 ? tensor.stride(0) : 0;
    stride[1] = tensor.stride(dim - 2);
    if (positions.has_value()) {
      FASTATTN_CHECK(dim == 2, name, " must be a table with positions");
      return;
    }
    FASTATTN_CHECK(dim == 2 || tensor.size(0) == 1 || tensor.size(0) == args.batch, name,
                   " has not the batch of x");
    FASTATTN_CHECK(tensor.size(dim - 2) == args.rows, name, " has not the rows of x");
  };
  table("cos", cos, args.cos_stride);
  table("sin", sin, args.sin_stride);
  args.cos = cos.const_data_ptr();
  args.sin = sin.const_data_ptr();
  if (!positions.has_value()) return args;
  FASTATTN_CHECK(positions->scalar_type() == torch::headeronly::ScalarType::Long &&
                     positions->dim() == 2 && positions->size(0) == args.batch &&
                     positions->size(1) == args.rows,
                 "positions must be int64 [B, S]");
  args.positions = static_cast<const int64_t*>(positions->const_data_ptr());
  for (int dim = 0; dim < 2; dim++) args.positions_stride[dim] = positions->stride(dim);
  for (int64_t b = 0; b < args.batch; b++)
    for (int64_t s = 0; s < args.rows; s++) {
      const int64_t position =
          args.positions[b * args.positions_stride[0] + s * args.positions_stride[1]];
      FASTATTN_CHECK(position >= 0 && position < cos.size(0), "positions must be in [0, ",
                     cos.size(0), "), got ", position);
    }
  return args;
}

Tensor rotated(const Tensor& x, const Tensor& cos, const Tensor& sin,
               const OptionalTensor& positions, bool interleaved, bool heads_inside, bool inverse) {
  Rope args = checked(x, cos, sin, positions, interleaved, inverse);
  const auto [B, H, S, D] = std::tuple{args.batch, args.heads, args.rows, args.head_dim};
  Tensor out = heads_inside ? empty({B, H, S, D}, {S * H * D, D, H * D, 1}, args.dtype)
                            : empty({B, H, S, D}, {H * S * D, S * D, D, 1}, args.dtype);
  args.out = out.mutable_data_ptr();
  strides_of(out, args.out_stride);
  rope(args);
  return out;
}

std::tuple<Tensor, Tensor> rope_fwd(Tensor query, OptionalTensor key, Tensor cos, Tensor sin,
                                    OptionalTensor positions, bool interleaved, bool query_inside,
                                    bool key_inside) {
  Tensor out = rotated(query, cos, sin, positions, interleaved, query_inside, false);
  if (!key.has_value()) return {out, empty(0, dtype_of(query))};
  return {out, rotated(*key, cos, sin, positions, interleaved, key_inside, false)};
}

std::tuple<Tensor, Tensor> rope_bwd(OptionalTensor grad_query, OptionalTensor grad_key, Tensor cos,
                                    Tensor sin, OptionalTensor positions, bool interleaved,
                                    bool query_inside, bool key_inside) {
  const auto found = [&](const OptionalTensor& grad, bool inside) {
    return grad.has_value() ? rotated(*grad, cos, sin, positions, interleaved, inside, true)
                            : empty(0, dtype_of(cos));
  };
  return {found(grad_query, query_inside), found(grad_key, key_inside)};
}

void rope_in_place(Tensor query, OptionalTensor key, Tensor cos, Tensor sin,
                   OptionalTensor positions, bool interleaved) {
  for (const OptionalTensor& x : {OptionalTensor(query), key}) {
    if (!x.has_value()) continue;
    Rope args = checked(*x, cos, sin, positions, interleaved, false);
    args.out = x->mutable_data_ptr();
    strides_of(*x, args.out_stride);
    rope(args);
  }
}

// What a plain call asks for, each laid out as it came.
std::tuple<Tensor, OptionalTensor> apply_rope(Tensor query, Tensor cos, Tensor sin,
                                              OptionalTensor key, bool interleaved) {
  FASTATTN_CHECK(!on_gpu(place_of(query)), "query must be on the CPU");
  const auto laid_out = [&](const Tensor& x) {
    const bool inside = x.dim() == 4 && x.stride(1) < x.stride(2);
    return rotated(x, cos, sin, std::nullopt, interleaved, inside, false);
  };
  if (!key.has_value()) return {laid_out(query), std::nullopt};
  FASTATTN_CHECK(key->dim() == 4 && query.dim() == 4, "key must have four dimensions");
  check_dtype("key", *key, dtype_of(query));
  for (const int dim : {0, 2, 3})
    FASTATTN_CHECK(key->size(dim) == query.size(dim), "key has not query's batch, rows or width");
  return {laid_out(query), laid_out(*key)};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastattn, CPU, library) {
  library.impl("rope_fwd", TORCH_BOX(&rope_fwd));
  library.impl("rope_bwd", TORCH_BOX(&rope_bwd));
  library.impl("rope_", TORCH_BOX(&rope_in_place));
  library.impl("apply_rope.plain", TORCH_BOX(&apply_rope));
}

}  // namespace fastattn
