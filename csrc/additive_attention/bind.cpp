// The torch ops of additive attention on the CPU.
#include <algorithm>

#include "additive_attention/additive_attention.h"
#include "common/tensor.h"

namespace fastattn {
namespace {

AdditiveAttention checked(const Tensor& query, const Tensor& key, const Tensor& value,
                          const Tensor& weight, const OptionalTensor& mask,
                          std::optional<int64_t> right) {
  FASTATTN_CHECK(query.dim() == 4 && key.dim() == 4 && value.dim() == 4,
                 "query, key and value must have four dimensions");
  FASTATTN_CHECK(query.numel() > 0 && key.numel() > 0 && value.numel() > 0,
                 "query, key and value must not be empty");
  AdditiveAttention in;
  in.dtype = dtype_of(query);
  in.batch = query.size(0);
  in.heads = query.size(1);
  in.q_len = query.size(2);
  in.kv_len = key.size(2);
  in.head_dim = query.size(3);
  in.value_dim = value.size(3);
  for (const Tensor* tensor : {&key, &value, &weight})
    check_dtype("key, value or weight", *tensor, in.dtype);
  in.query = exact("query", query, {in.batch, in.heads, in.q_len, in.head_dim});
  in.key = exact("key", key, {in.batch, in.heads, in.kv_len, in.head_dim});
  in.value = exact("value", value, {in.batch, in.heads, in.kv_len, in.value_dim});
  check_sizes("weight", weight, {in.heads, in.head_dim});
  in.weight = weight.const_data_ptr();
  if (mask.has_value()) {
    FASTATTN_CHECK(mask->scalar_type() == torch::headeronly::ScalarType::Bool, "mask must be bool");
    in.mask = view("mask", *mask, {in.batch, in.heads, in.q_len, in.kv_len});
  }
  in.right = in.kv_len;
  if (right.has_value()) in.right = std::min(std::max(*right, -in.q_len), in.kv_len);
  return in;
}

Tensor statistics(const AdditiveAttention& in) {
  return empty({in.batch, in.heads, in.q_len}, {in.heads * in.q_len, in.q_len, 1}, wide(in.dtype));
}

std::tuple<Tensor, Tensor, Tensor> additive_attention_fwd(Tensor query, Tensor key, Tensor value,
                                                          Tensor weight, OptionalTensor mask,
                                                          std::optional<int64_t> right) {
  const AdditiveAttention in = checked(query, key, value, weight, mask, right);
  Tensor out = rows_first(in.batch, in.heads, in.q_len, in.value_dim, in.dtype);
  Tensor highest = statistics(in), total = statistics(in);
  additive_forward({in, target(out), highest.mutable_data_ptr(), total.mutable_data_ptr()});
  return {out, highest, total};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> additive_attention_bwd(
    Tensor grad_out, Tensor query, Tensor key, Tensor value, Tensor weight, OptionalTensor mask,
    Tensor out, Tensor highest, Tensor total, std::optional<int64_t> right) {
  AdditiveBackward args{};
  args.in = checked(query, key, value, weight, mask, right);
  const AdditiveAttention& in = args.in;
  for (const Tensor* tensor : {&grad_out, &out}) check_dtype("grad_out or out", *tensor, in.dtype);
  args.grad_out = exact("grad_out", grad_out, {in.batch, in.heads, in.q_len, in.value_dim});
  args.out = exact("out", out, {in.batch, in.heads, in.q_len, in.value_dim});
  for (const Tensor* tensor : {&highest, &total}) {
    check_sizes("highest or total", *tensor, {in.batch, in.heads, in.q_len});
    check_dtype("highest or total", *tensor, wide(in.dtype));
  }
  args.highest = highest.const_data_ptr();
  args.total = total.const_data_ptr();

  Tensor grad_query = rows_first(in.batch, in.heads, in.q_len, in.head_dim, in.dtype);
  Tensor grad_key = rows_first(in.batch, in.heads, in.kv_len, in.head_dim, in.dtype);
  Tensor grad_value = rows_first(in.batch, in.heads, in.kv_len, in.value_dim, in.dtype);
  Tensor grad_weight = empty(in.heads, in.head_dim, in.dtype);
  args.grad_query = target(grad_query);
  args.grad_key = target(grad_key);
  args.grad_value = target(grad_value);
  args.grad_weight = grad_weight.mutable_data_ptr();
  additive_backward(args);
  return {grad_query, grad_key, grad_value, grad_weight};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastattn, CPU, library) {
  library.impl("additive_attention_fwd", TORCH_BOX(&additive_attention_fwd));
  library.impl("additive_attention_bwd", TORCH_BOX(&additive_attention_bwd));
}

}  // namespace fastattn
