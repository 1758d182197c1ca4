// The torch ops of the attention room on the CPU.
#include <algorithm>

#include "attention/attention.h"
#include "common/tensor.h"

namespace fastattn {
namespace {

// The inputs and options common to both directions, checked.
struct Inputs {
  Attention in;

  Inputs(const Tensor& query, const Tensor& key, const Tensor& value, const OptionalTensor& mask,
         const OptionalTensor& bias, const OptionalTensor& alibi_slopes,
         const OptionalTensor& sink_scores, const OptionalTensor& seed, int64_t offset,
         std::optional<int64_t> left, std::optional<int64_t> right, double scale, double softcap,
         double dropout_p) {
    FASTATTN_CHECK(query.dim() == 4 && key.dim() == 4 && value.dim() == 4,
                   "query, key and value must have four dimensions");
    in.dtype = dtype_of(query);
    in.batch = query.size(0);
    in.heads = query.size(1);
    in.q_len = query.size(2);
    in.head_dim = query.size(3);
    in.kv_heads = key.size(1);
    in.kv_len = key.size(2);
    in.value_dim = value.size(3);
    FASTATTN_CHECK(query.numel() > 0 && key.numel() > 0 && value.numel() > 0,
                   "query, key and value must not be empty");
    FASTATTN_CHECK(in.heads % in.kv_heads == 0, "key's heads must divide query's");
    for (const Tensor* tensor : {&key, &value}) check_dtype("key or value", *tensor, in.dtype);
    const auto [batch, heads, q_len, kv_len] = std::tuple{in.batch, in.heads, in.q_len, in.kv_len};
    in.query = exact("query", query, {batch, heads, q_len, in.head_dim});
    in.key = exact("key", key, {batch, in.kv_heads, kv_len, in.head_dim});
    in.value = exact("value", value, {batch, in.kv_heads, kv_len, in.value_dim});
    if (mask.has_value()) {
      FASTATTN_CHECK(mask->scalar_type() == torch::headeronly::ScalarType::Bool,
                     "mask must be bool");
      in.mask = view("mask", *mask, {batch, heads, q_len, kv_len});
    }
    in.bias_dtype = wide(in.dtype);
    if (bias.has_value()) {
      in.bias_dtype = dtype_of(*bias);
      FASTATTN_CHECK(in.bias_dtype == in.dtype || in.bias_dtype == Dtype::f32,
                     "bias must be fp32 or of query's dtype");
      in.bias = view("bias", *bias, {batch, heads, q_len, kv_len});
    }
    in.alibi_slopes = nullptr;
    if (alibi_slopes.has_value()) {
      check_sizes("alibi_slopes", *alibi_slopes, {batch, heads});
      check_dtype("alibi_slopes", *alibi_slopes, Dtype::f32);
      in.alibi_slopes = static_cast<const float*>(alibi_slopes->const_data_ptr());
    }
    in.sinks = nullptr;
    if (sink_scores.has_value()) {
      check_sizes("sinks", *sink_scores, {heads});
      check_dtype("sinks", *sink_scores, Dtype::f64);
      in.sinks = static_cast<const double*>(sink_scores->const_data_ptr());
    }
    constexpr int64_t limit = int64_t{1} << 40;  // past any length, so that sums cannot overflow
    FASTATTN_CHECK(offset > -limit && offset < limit, "offset is out of range");
    FASTATTN_CHECK(left.value_or(0) >= 0 && right.value_or(0) >= 0, "bounds must be >= 0");
    in.offset = offset;
    in.left = left.has_value() ? std::min(*left, limit) : kUnbounded;
    in.right = right.has_value() ? std::min(*right, limit) : kUnbounded;
    in.scale = scale;
    in.softcap = softcap;
    in.dropout_p = dropout_p;
    in.seed = 0;
    FASTATTN_CHECK(dropout_p >= 0 && dropout_p <= 1, "dropout_p must be in [0, 1]");
    if (dropout_p > 0) {
      FASTATTN_CHECK(seed.has_value() && seed->numel() == 1 &&
                         seed->scalar_type() == torch::headeronly::ScalarType::Long,
                     "dropout needs a seed of one int64");
      in.seed = static_cast<uint64_t>(*static_cast<const int64_t*>(seed->const_data_ptr()));
    }
  }
};

std::tuple<Tensor, Tensor> attention_fwd(Tensor query, Tensor key, Tensor value,
                                         OptionalTensor mask, OptionalTensor bias,
                                         OptionalTensor alibi_slopes, OptionalTensor sinks,
                                         OptionalTensor seed, int64_t offset,
                                         std::optional<int64_t> left, std::optional<int64_t> right,
                                         double scale, double softcap, double dropout_p) {
  const Inputs inputs(query, key, value, mask, bias, alibi_slopes, sinks, seed, offset, left, right,
                      scale, softcap, dropout_p);
  const Attention& in = inputs.in;
  Tensor out = rows_first(in.batch, in.heads, in.q_len, in.value_dim, in.dtype);
  Tensor lse =
      empty({in.batch, in.heads, in.q_len}, {in.heads * in.q_len, in.q_len, 1}, wide(in.dtype));
  attention_forward({in, target(out), lse.mutable_data_ptr()});
  return {out, lse};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> attention_bwd(
    OptionalTensor grad_out, OptionalTensor grad_lse, Tensor query, Tensor key, Tensor value,
    OptionalTensor mask, OptionalTensor bias, OptionalTensor alibi_slopes, OptionalTensor sinks,
    OptionalTensor seed, Tensor out, Tensor lse, int64_t offset, std::optional<int64_t> left,
    std::optional<int64_t> right, double scale, double softcap, double dropout_p, bool need_bias,
    bool need_sinks) {
  const Inputs inputs(query, key, value, mask, bias, alibi_slopes, sinks, seed, offset, left, right,
                      scale, softcap, dropout_p);
  const Attention& in = inputs.in;
  const Dtype dtype = in.dtype;
  static const double zero = 0;  // reads as zero in any dtype
  AttentionBackward args{};
  args.in = in;
  args.grad_out = {&zero, {0, 0, 0, 0}};
  if (grad_out.has_value()) {
    check_dtype("grad_out", *grad_out, dtype);
    args.grad_out = exact("grad_out", *grad_out, {in.batch, in.heads, in.q_len, in.value_dim});
  }
  if (grad_lse.has_value()) {
    check_sizes("grad_lse", *grad_lse, {in.batch, in.heads, in.q_len});
    check_dtype("grad_lse", *grad_lse, wide(dtype));
    args.grad_lse = grad_lse->const_data_ptr();
  }
  check_dtype("out", out, dtype);
  args.out = exact("out", out, {in.batch, in.heads, in.q_len, in.value_dim});
  check_sizes("lse", lse, {in.batch, in.heads, in.q_len});
  check_dtype("lse", lse, wide(dtype));
  args.lse = lse.const_data_ptr();

  Tensor grad_query = rows_first(in.batch, in.heads, in.q_len, in.head_dim, dtype);
  Tensor grad_key = rows_first(in.batch, in.kv_heads, in.kv_len, in.head_dim, dtype);
  Tensor grad_value = rows_first(in.batch, in.kv_heads, in.kv_len, in.value_dim, dtype);
  args.grad_query = target(grad_query);
  args.grad_key = target(grad_key);
  args.grad_value = target(grad_value);
  Tensor grad_bias = empty(0, dtype), grad_sinks = empty(0, dtype);
  if (need_bias && bias.has_value()) {
    int64_t* sizes = args.bias_sizes;
    for (int dim = 0; dim < 4; dim++) sizes[dim] = bias->size(dim);
    grad_bias =
        empty({sizes[0], sizes[1], sizes[2], sizes[3]},
              {sizes[1] * sizes[2] * sizes[3], sizes[2] * sizes[3], sizes[3], 1}, in.bias_dtype);
    args.grad_bias = grad_bias.mutable_data_ptr();
  }
  if (need_sinks && sinks.has_value()) {
    grad_sinks = empty(in.heads, Dtype::f64);
    args.grad_sinks = static_cast<double*>(grad_sinks.mutable_data_ptr());
  }
  attention_backward(args);
  return {grad_query, grad_key, grad_value, grad_bias, grad_sinks};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastattn, CPU, library) {
  library.impl("attention_fwd", TORCH_BOX(&attention_fwd));
  library.impl("attention_bwd", TORCH_BOX(&attention_bwd));
}

}  // namespace fastattn
