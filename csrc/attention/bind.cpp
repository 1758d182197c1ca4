// The torch ops of the attention room on the CPU.
#include <algorithm>
#include <vector>

#include "attention/attention.h"
#include "common/tensor.h"

namespace fastattn {
namespace {

// A view of four dimensions, each of the size given or 1, which broadcasts.
Source view(const char* name, const Tensor& tensor, std::initializer_list<int64_t> sizes) {
  FASTATTN_CHECK(tensor.dim() == 4, name, " must have four dimensions");
  Source source{tensor.const_data_ptr(), {}};
  int dim = 0;
  for (const int64_t size : sizes) {
    const int64_t own = tensor.size(dim);
    FASTATTN_CHECK(own == size || own == 1, name, " does not broadcast to the sizes of the others");
    source.stride[dim] = own == 1 ? 0 : tensor.stride(dim);
    dim++;
  }
  return source;
}

// The same without broadcasting. A batch of one keeps a stride of 0: its rows may be those of
// packed sequences.
Source exact(const char* name, const Tensor& tensor, std::initializer_list<int64_t> sizes) {
  int dim = 0;
  for (const int64_t size : sizes)
    FASTATTN_CHECK(tensor.dim() == 4 && tensor.size(dim++) == size, name,
                   " has not the shape that the others ask for");
  Source source = view(name, tensor, sizes);
  for (dim = 1; dim < 4; dim++) source.stride[dim] = tensor.stride(dim);
  return source;
}

// A tensor [B, H, S, D] that lies in memory as [B, S, H, D].
Tensor rows_first(int64_t batch, int64_t heads, int64_t rows, int64_t cols, Dtype dtype) {
  return empty({batch, heads, rows, cols}, {rows * heads * cols, cols, heads * cols, 1}, dtype);
}

Target target(const Tensor& tensor) {
  Target to{tensor.mutable_data_ptr(), {}};
  for (int dim = 0; dim < 4; dim++) to.stride[dim] = tensor.stride(dim);
  if (tensor.size(0) == 1) to.stride[0] = 0;  // as above
  return to;
}

// The numbers of a tensor of one dimension, int32 or int64.
std::vector<int64_t> integers(const char* name, const Tensor& tensor) {
  const auto type = tensor.scalar_type();
  const bool narrow = type == torch::headeronly::ScalarType::Int;
  FASTATTN_CHECK(tensor.dim() == 1 && (narrow || type == torch::headeronly::ScalarType::Long), name,
                 " must be int32 or int64 of one dimension");
  std::vector<int64_t> numbers(static_cast<size_t>(tensor.size(0)));
  const void* data = tensor.const_data_ptr();
  int64_t from = 0;
  for (int64_t& number : numbers) {
    number =
        narrow ? static_cast<const int32_t*>(data)[from] : static_cast<const int64_t*>(data)[from];
    from += tensor.stride(0);
  }
  return numbers;
}

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

// The inputs and options common to both directions, checked.
struct Inputs {
  Attention in;
  std::vector<Sequence> sequences;  // of a packed batch

  // Packed sequences, which are the rows of a batch of one, become a batch.
  void unpack(const Tensor& cu_seqlens_q, const Tensor& cu_seqlens_k, bool bottom_right,
              std::optional<int64_t> longest_query, std::optional<int64_t> longest_key) {
    const auto query = boundaries("cu_seqlens_q", cu_seqlens_q, in.q_len, longest_query);
    const auto key = boundaries("cu_seqlens_k", cu_seqlens_k, in.kv_len, longest_key);
    FASTATTN_CHECK(query.size() == key.size(), "cu_seqlens_k has not cu_seqlens_q's batch");
    FASTATTN_CHECK(in.batch == 1 && in.mask.data == nullptr && in.bias.data == nullptr,
                   "packed sequences have a batch of one and neither mask nor bias");
    in.batch = static_cast<int64_t>(query.size()) - 1;
    for (size_t n = 0; n + 1 < query.size(); n++) {
      const int64_t q_len = query[n + 1] - query[n], kv_len = key[n + 1] - key[n];
      sequences.push_back({static_cast<int64_t>(n), query[n], q_len, key[n], kv_len,
                           bottom_right ? kv_len - q_len : 0});
    }
    std::stable_sort(sequences.begin(), sequences.end(), [](const auto& a, const auto& b) {
      return static_cast<double>(a.q_len) * static_cast<double>(a.kv_len) >
             static_cast<double>(b.q_len) * static_cast<double>(b.kv_len);
    });
    in.packed = sequences.data();
    in.row_stride[0] = 0;
  }

  Inputs(const Tensor& query, const Tensor& key, const Tensor& value, const OptionalTensor& mask,
         const OptionalTensor& bias, const OptionalTensor& alibi_slopes,
         const OptionalTensor& sink_scores, const OptionalTensor& seed,
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
      in.bias = view("bias", *bias, {batch, heads, q_len, kv_len});
    }
    FASTATTN_CHECK(cu_seqlens_q.has_value() == cu_seqlens_k.has_value(),
                   "cu_seqlens_q and cu_seqlens_k come together");
    in.offset = bottom_right ? kv_len - q_len : 0;
    if (cu_seqlens_q.has_value())
      unpack(*cu_seqlens_q, *cu_seqlens_k, bottom_right, max_seqlen_q, max_seqlen_k);
    in.alibi_slopes = nullptr;
    if (alibi_slopes.has_value()) {
      check_sizes("alibi_slopes", *alibi_slopes, {in.batch, heads});
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
    FASTATTN_CHECK(left.value_or(0) >= 0 && right.value_or(0) >= 0, "bounds must be >= 0");
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
  Tensor out = rows_first(batch, in.heads, in.q_len, in.value_dim, in.dtype);
  Tensor lse =
      empty({batch, in.heads, in.q_len}, {in.heads * in.q_len, in.q_len, 1}, wide(in.dtype));
  attention_forward({in, target(out), lse.mutable_data_ptr()});
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
  static const double zero = 0;  // reads as zero in any dtype
  AttentionBackward args{};
  args.in = in;
  args.grad_out = {&zero, {0, 0, 0, 0}};
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

  Tensor grad_query = rows_first(batch, in.heads, in.q_len, in.head_dim, dtype);
  Tensor grad_key = rows_first(batch, in.kv_heads, in.kv_len, in.head_dim, dtype);
  Tensor grad_value = rows_first(batch, in.kv_heads, in.kv_len, in.value_dim, dtype);
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
