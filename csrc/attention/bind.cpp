// The torch ops of attention, forward and backward, on the CPU and on a GPU.
#include "attention/bind.h"

namespace fastattn {
namespace {

// Where the sequences of a packed batch begin, and where the last ends.
std::vector<int64_t> boundaries(const char* name, const Tensor& tensor, int64_t total,
                                std::optional<int64_t> longest) {
  const std::vector<int64_t> found = integers(name, tensor);
  FASTATTN_CHECK(found.size() > 1 && found.front() == 0 && found.back() == total, name,
                 " must begin with 0 and end with the number of rows, ", total);
  for (size_t n = 1; n < found.size(); n++) {
    FASTATTN_CHECK(found[n] >= found[n - 1], name, " must not decrease");
    FASTATTN_CHECK(found[n] - found[n - 1] <= longest.value_or(total), name,
                   " holds a sequence that is longer than its max_seqlen");
  }
  return found;
}

// The matrix [B, H, Sq, Sk] of a relative bias [B, H, Sq + Sk - 1], of which each row begins one
// element before the one above it.
Source relative(const Tensor& bias, const Attention& in) {
  const int64_t sizes[3] = {in.batch, in.heads, in.q_len + in.kv_len - 1}, step = bias.stride(2);
  Source matrix{bias.const_data_ptr(), {0, 0, -step, step}, (in.q_len - 1) * step};
  for (int dim = 0; dim < 3; dim++) {
    const int64_t own = bias.size(dim);
    FASTATTN_CHECK(own == sizes[dim] || (own == 1 && dim < 2),
                   "a relative bias must be [B or 1, H or 1, Sq + Sk - 1]");
    if (dim < 2 && own > 1) matrix.stride[dim] = bias.stride(dim);
  }
  return matrix;
}

// The inputs and options common to both directions, checked.
struct Inputs {
  Attention in;
  std::vector<Sequence> sequences;  // of a packed batch

  // Packed sequences, which are the rows of a batch of one, become a batch.
  void unpack(const Tensor& cu_seqlens_q, const Tensor& cu_seqlens_k, bool bottom_right,
              std::optional<int64_t> longest_query, std::optional<int64_t> longest_key,
              bool unread) {
    FASTATTN_CHECK(in.batch == 1 && in.mask.data == nullptr && in.bias.data == nullptr,
                   "packed sequences have a batch of one and neither mask nor bias");
    in.row_stride[0] = 0;
    if (unread) {
      in.query_starts = {fastattn::unread("cu_seqlens_q", cu_seqlens_q),
                         longest_query.value_or(in.q_len)};
      in.key_starts = {fastattn::unread("cu_seqlens_k", cu_seqlens_k),
                       longest_key.value_or(in.kv_len)};
      FASTATTN_CHECK(cu_seqlens_q.numel() > 1, "cu_seqlens_q must have two numbers or more");
      FASTATTN_CHECK(cu_seqlens_q.numel() == cu_seqlens_k.numel(),
                     "cu_seqlens_k has not cu_seqlens_q's batch");
      in.batch = cu_seqlens_q.numel() - 1;
      in.bottom_right = bottom_right;
      return;
    }
    const auto query = boundaries("cu_seqlens_q", cu_seqlens_q, in.q_len, longest_query);
    const auto key = boundaries("cu_seqlens_k", cu_seqlens_k, in.kv_len, longest_key);
    FASTATTN_CHECK(query.size() == key.size(), "cu_seqlens_k has not cu_seqlens_q's batch");
    in.batch = static_cast<int64_t>(query.size()) - 1;
    for (size_t n = 0; n + 1 < query.size(); n++) {
      const int64_t q_len = query[n + 1] - query[n], kv_len = key[n + 1] - key[n];
      sequences.push_back({static_cast<int64_t>(n), query[n], q_len, key[n], kv_len,
                           bottom_right ? kv_len - q_len : 0});
    }
    sort(sequences);
    in.sequences = sequences.data();
  }

  Inputs(const Tensor& query, const Tensor& key, const Tensor& value, const OptionalTensor& mask,
         const OptionalTensor& bias, const OptionalTensor& alibi_slopes,
         const OptionalTensor& sinks, const OptionalTensor& seed,
         const OptionalTensor& cu_seqlens_q, const OptionalTensor& cu_seqlens_k, bool bottom_right,
         std::optional<int64_t> left, std::optional<int64_t> right, double scale, double softcap,
         double dropout_p, std::optional<int64_t> max_seqlen_q,
         std::optional<int64_t> max_seqlen_k) {
    FASTATTN_CHECK(query.dim() == 4 && key.dim() == 4 && value.dim() == 4,
                   "query, key and value must have four dimensions");
    in.dtype = dtype_of(query);
    in.batch = query.size(0);
    in.heads = query.size(1);
    in.q_len = query.size(2);
    in.rows = in.batch * in.heads * in.q_len;
    in.row_stride[0] = in.heads * in.q_len;
    in.row_stride[1] = in.q_len;
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
      FASTATTN_CHECK(bias->dim() != 3 || !on_gpu(place_of(query)),
                     "no CUDA kernel takes a relative bias");
      in.bias = bias->dim() == 3 ? relative(*bias, in)
                                 : view("bias", *bias, {batch, heads, q_len, kv_len});
    }
    FASTATTN_CHECK(cu_seqlens_q.has_value() == cu_seqlens_k.has_value(),
                   "cu_seqlens_q and cu_seqlens_k come together");
    in.offset = bottom_right ? kv_len - q_len : 0;
    if (cu_seqlens_q.has_value())
      unpack(*cu_seqlens_q, *cu_seqlens_k, bottom_right, max_seqlen_q, max_seqlen_k,
             on_gpu(place_of(query)));
    set_terms_of_heads(in, alibi_slopes, sinks);
    set_bounds(in, left, right);
    in.scale = scale;
    in.softcap = softcap;
    in.dropout_p = dropout_p;
    const Seed own = checked_seed(dropout_p, seed, place_of(query));
    in.seed = own.value;
    in.device_seed = own.address;
  }
};

std::tuple<Tensor, Tensor> attention_fwd(
    Tensor query, Tensor key, Tensor value, OptionalTensor mask, OptionalTensor bias,
    OptionalTensor alibi_slopes, OptionalTensor sinks, OptionalTensor seed,
    OptionalTensor cu_seqlens_q, OptionalTensor cu_seqlens_k, bool bottom_right,
    std::optional<int64_t> left, std::optional<int64_t> right, double scale, double softcap,
    double dropout_p, std::optional<int64_t> max_seqlen_q, std::optional<int64_t> max_seqlen_k) {
  const Inputs inputs(query, key, value, mask, bias, alibi_slopes, sinks, seed, cu_seqlens_q,
                      cu_seqlens_k, bottom_right, left, right, scale, softcap, dropout_p,
                      max_seqlen_q, max_seqlen_k);
  const Attention& in = inputs.in;
  const int64_t batch = query.size(0);
  const Place place = place_of(query);
  check_place(place, in.dtype, std::max(in.head_dim, in.value_dim));
  Tensor out = rows_first(batch, in.heads, in.q_len, in.value_dim, in.dtype, place);
  Tensor lse =
      empty({batch, in.heads, in.q_len}, {in.heads * in.q_len, in.q_len, 1}, wide(in.dtype), place);
  const AttentionForward args{in, target(out), lse.mutable_data_ptr()};
  run(place, args, attention_forward, cuda::attention_forward);
  return {out, lse};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> attention_bwd(
    OptionalTensor grad_out, OptionalTensor grad_lse, Tensor query, Tensor key, Tensor value,
    OptionalTensor mask, OptionalTensor bias, OptionalTensor alibi_slopes, OptionalTensor sinks,
    OptionalTensor seed, OptionalTensor cu_seqlens_q, OptionalTensor cu_seqlens_k, Tensor out,
    Tensor lse, bool bottom_right, std::optional<int64_t> left, std::optional<int64_t> right,
    double scale, double softcap, double dropout_p, std::optional<int64_t> max_seqlen_q,
    std::optional<int64_t> max_seqlen_k, bool need_bias, bool need_sinks) {
  const Inputs inputs(query, key, value, mask, bias, alibi_slopes, sinks, seed, cu_seqlens_q,
                      cu_seqlens_k, bottom_right, left, right, scale, softcap, dropout_p,
                      max_seqlen_q, max_seqlen_k);
  const Attention& in = inputs.in;
  const int64_t batch = query.size(0);
  const Dtype dtype = in.dtype;
  const Place place = place_of(query);
  check_place(place, in.dtype, std::max(in.head_dim, in.value_dim));
  static const double zero = 0;  // reads as zero in any dtype, on the CPU
  AttentionBackward args{};
  args.in = in;
  args.grad_out = {on_gpu(place) ? nullptr : &zero, {0, 0, 0, 0}};
  if (grad_out.has_value()) {
    check_dtype("grad_out", *grad_out, dtype);
    args.grad_out = exact("grad_out", *grad_out, {batch, in.heads, in.q_len, in.value_dim});
  }
  if (grad_lse.has_value()) {
    check_sizes("grad_lse", *grad_lse, {batch, in.heads, in.q_len});
    check_dtype("grad_lse", *grad_lse, wide(dtype));
    args.grad_lse = grad_lse->const_data_ptr();
  }
  check_dtype("out", out, dtype);
  args.out = exact("out", out, {batch, in.heads, in.q_len, in.value_dim});
  check_sizes("lse", lse, {batch, in.heads, in.q_len});
  check_dtype("lse", lse, wide(dtype));
  args.lse = lse.const_data_ptr();

  Tensor grad_query = rows_first(batch, in.heads, in.q_len, in.head_dim, dtype, place);
  Tensor grad_key = rows_first(batch, in.kv_heads, in.kv_len, in.head_dim, dtype, place);
  Tensor grad_value = rows_first(batch, in.kv_heads, in.kv_len, in.value_dim, dtype, place);
  args.grad_query = target(grad_query);
  args.grad_key = target(grad_key);
  args.grad_value = target(grad_value);
  Tensor grad_bias = empty(0, dtype, place), grad_sinks = empty(0, dtype, place);
  if (need_bias && bias.has_value()) {
    FASTATTN_CHECK(bias->dim() >= 3, "a bias with a gradient must have all dimensions");
    int64_t* sizes = args.bias_sizes;
    args.relative_bias = bias->dim() == 3;
    const int64_t lines = args.relative_bias ? 1 : bias->size(2);
    const int64_t line = bias->size(bias->dim() - 1);
    for (const int64_t size : {bias->size(0), bias->size(1), lines, line}) *sizes++ = size;
    grad_bias = empty_like(*bias, in.bias_dtype);
    args.grad_bias = grad_bias.mutable_data_ptr();
  }
  if (need_sinks && sinks.has_value()) {
    grad_sinks = empty(in.heads, Dtype::f64, place);
    args.grad_sinks = static_cast<double*>(grad_sinks.mutable_data_ptr());
  }
  run(place, args, attention_backward, cuda::attention_backward);
  return {grad_query, grad_key, grad_value, grad_bias, grad_sinks};
}

// What a plain call asks for.
Tensor attention(Tensor query, Tensor key, Tensor value, OptionalTensor mask, OptionalTensor bias,
                 bool causal, bool bottom_right, std::optional<double> scale, bool grouped) {
  FASTATTN_CHECK(!on_gpu(place_of(query)), "query must be on the CPU");
  FASTATTN_CHECK(!bias.has_value() || bias->dim() != 3,
                 "a bias of three dimensions is a relative one");
  const std::optional<int64_t> right = causal ? std::optional<int64_t>(0) : std::nullopt;
  const Inputs inputs(query, key, value, mask, bias, std::nullopt, std::nullopt, std::nullopt,
                      std::nullopt, std::nullopt, bottom_right, std::nullopt, right,
                      scale_of(scale, query), 0, 0, std::nullopt, std::nullopt);
  const Attention& in = inputs.in;
  FASTATTN_CHECK(grouped || in.heads == in.kv_heads, "key has not query's heads");
  Tensor out = rows_first(in.batch, in.heads, in.q_len, in.value_dim, in.dtype);
  attention_forward({in, target(out), nullptr});
  return out;
}

template <class Library>
void implement(Library& library) {
  library.impl("attention_fwd", TORCH_BOX(&attention_fwd));
  library.impl("attention_bwd", TORCH_BOX(&attention_bwd));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastattn, CPU, library) {
  implement(library);
  library.impl("attention.plain", TORCH_BOX(&attention));
}
STABLE_TORCH_LIBRARY_IMPL(fastattn, CUDA, library) { implement(library); }

}  // namespace fastattn
