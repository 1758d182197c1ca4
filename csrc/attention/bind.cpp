// The torch ops of the attention room: on the CPU, and those of attention on a GPU too.
#include <algorithm>
#include <vector>

#include "attention/attention.h"
#include "common/tensor.h"

namespace fastattn {
namespace {

void check_integers(const char* name, const Tensor& tensor, int64_t dims) {
  const auto type = tensor.scalar_type();
  FASTATTN_CHECK(tensor.dim() == dims && (type == torch::headeronly::ScalarType::Int ||
                                          type == torch::headeronly::ScalarType::Long),
                 name, " must be int32 or int64 of ", dims,
                 dims == 1 ? " dimension" : " dimensions");
}

// The numbers of a tensor of int32 or int64 with `dims` dimensions, row by row.
std::vector<int64_t> integers(const char* name, const Tensor& tensor, int64_t dims = 1) {
  check_integers(name, tensor, dims);
  const bool narrow = tensor.scalar_type() == torch::headeronly::ScalarType::Int;
  const int64_t rows = dims == 1 ? 1 : tensor.size(0), cols = tensor.size(dims - 1);
  const int64_t row_stride = dims == 1 ? 0 : tensor.stride(0), stride = tensor.stride(dims - 1);
  std::vector<int64_t> numbers;
  numbers.reserve(static_cast<size_t>(rows * cols));
  const void* data = tensor.const_data_ptr();
  for (int64_t row = 0; row < rows; row++)
    for (int64_t col = 0; col < cols; col++) {
      const int64_t from = row * row_stride + col * stride;
      numbers.push_back(narrow ? static_cast<const int32_t*>(data)[from]
                               : static_cast<const int64_t*>(data)[from]);
    }
  return numbers;
}

// The same numbers where they are, for a kernel to read and check.
Integers unread(const char* name, const Tensor& tensor, int64_t dims = 1) {
  const auto type = tensor.scalar_type();
  check_integers(name, tensor, dims);
  return {tensor.const_data_ptr(),
          {dims == 1 ? 0 : tensor.stride(0), tensor.stride(dims - 1)},
          type == torch::headeronly::ScalarType::Long};
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

// Longest first, for what is left to do last should be short.
void sort(std::vector<Sequence>& sequences) {
  const auto size = [](const Sequence& one) {
    return static_cast<double>(one.q_len) * static_cast<double>(one.kv_len);
  };
  std::stable_sort(sequences.begin(), sequences.end(),
                   [&](const Sequence& a, const Sequence& b) { return size(a) > size(b); });
}

void set_terms_of_heads(Attention& in, const OptionalTensor& alibi_slopes,
                        const OptionalTensor& sinks) {
  in.alibi_slopes = nullptr;
  if (alibi_slopes.has_value()) {
    check_sizes("alibi_slopes", *alibi_slopes, {in.batch, in.heads});
    check_dtype("alibi_slopes", *alibi_slopes, Dtype::f32);
    in.alibi_slopes = static_cast<const float*>(alibi_slopes->const_data_ptr());
  }
  in.sinks = nullptr;
  if (sinks.has_value()) {
    check_sizes("sinks", *sinks, {in.heads});
    check_dtype("sinks", *sinks, Dtype::f64);
    in.sinks = static_cast<const double*>(sinks->const_data_ptr());
  }
}

void set_bounds(Attention& in, std::optional<int64_t> left, std::optional<int64_t> right) {
  constexpr int64_t limit = int64_t{1} << 40;  // past any length, so that sums cannot overflow
  FASTATTN_CHECK(left.value_or(0) >= 0 && right.value_or(0) >= 0, "bounds must be >= 0");
  in.left = left.has_value() ? std::min(*left, limit) : kUnbounded;
  in.right = right.has_value() ? std::min(*right, limit) : kUnbounded;
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

// Refuses what the CUDA kernels do not know.
void check_place(Place place, Dtype dtype, int64_t widest) {
  FASTATTN_CHECK(
      !on_gpu(place) || (dtype != Dtype::f64 && widest <= (dtype == Dtype::f32 ? 128 : 256)),
      "no CUDA kernel takes fp64, or heads wider than 256, in fp32 than 128");
}

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

// A cache of keys and values, its pages, and the lengths of the sequences in it.
struct Cached {
  int64_t batch, kv_heads, head_dim, value_dim;
  std::vector<int64_t> lengths, pages;
  Paging paging;

  // Sequences of cache_seqlens + appended positions, all of them in the cache. On a GPU the kernel
  // finds out whether they are.
  Cached(const Tensor& key_cache, const Tensor& value_cache, const Tensor& cache_seqlens,
         int64_t appended, const OptionalTensor& block_table) {
    FASTATTN_CHECK(key_cache.dim() == 4 && value_cache.dim() == 4 && key_cache.numel() > 0 &&
                       value_cache.numel() > 0,
                   "key_cache and value_cache must have four dimensions and not be empty");
    check_integers("cache_seqlens", cache_seqlens, 1);
    batch = cache_seqlens.numel();
    FASTATTN_CHECK(batch > 0, "cache_seqlens must not be empty");
    kv_heads = key_cache.size(1);
    head_dim = key_cache.size(3);
    value_dim = value_cache.size(3);
    const int64_t blocks = key_cache.size(0);
    for (int dim = 0; dim < 3; dim++)
      FASTATTN_CHECK(value_cache.size(dim) == key_cache.size(dim),
                     "value_cache has not key_cache's shape");
    check_dtype("value_cache", value_cache, dtype_of(key_cache));
    paging = {nullptr, 1, key_cache.size(2), blocks, {}, {}};
    if (block_table.has_value()) {
      check_integers("block_table", *block_table, 2);
      paging.columns = block_table->size(1);
      FASTATTN_CHECK(block_table->size(0) == batch, "block_table has not cache_seqlens' batch");
    } else {
      FASTATTN_CHECK(blocks == batch, "key_cache has not cache_seqlens' batch");
    }
    FASTATTN_CHECK(appended >= 0 && appended <= room(), "no cache has room for ", appended,
                   " keys");
    if (on_gpu(place_of(key_cache))) {
      paging.lengths = unread("cache_seqlens", cache_seqlens);
      if (block_table.has_value()) paging.table = unread("block_table", *block_table, 2);
      return;
    }
    lengths = integers("cache_seqlens", cache_seqlens);
    if (block_table.has_value()) {
      pages = integers("block_table", *block_table, 2);
    } else {
      for (int64_t b = 0; b < batch; b++) pages.push_back(b);
    }
    paging.pages = pages.data();
    for (int64_t b = 0; b < batch; b++) {
      const int64_t length = lengths[static_cast<size_t>(b)];
      FASTATTN_CHECK(length >= 0 && length <= room() - appended,
                     "cache_seqlens must leave every sequence within its cache");
      for (int64_t page = 0; page * paging.size < length + appended; page++) {
        const int64_t block = pages[static_cast<size_t>(b * paging.columns + page)];
        FASTATTN_CHECK(block >= 0 && block < blocks, "block_table names a page out of range");
      }
    }
  }

  int64_t room() const { return paging.columns * paging.size; }
  // The positions in use once so many are appended, where the host knows them.
  int64_t positions(int64_t appended) const {
    return lengths.empty() ? 0 : *std::max_element(lengths.begin(), lengths.end()) + appended;
  }
};

Rotary rotary_of(const OptionalTensor& cos, const OptionalTensor& sin, bool interleaved,
                 int64_t head_dim, int64_t positions, Dtype dtype) {
  Rotary rotary{};
  rotary.dtype = dtype;
  FASTATTN_CHECK(cos.has_value() == sin.has_value(), "rotary_cos and rotary_sin come together");
  if (!cos.has_value()) return rotary;
  rotary.dtype = dtype_of(*cos);
  FASTATTN_CHECK(rotary.dtype == dtype || rotary.dtype == wide(dtype),
                 "rotary_cos must be of query's dtype or of its statistics'");
  check_dtype("rotary_sin", *sin, rotary.dtype);
  FASTATTN_CHECK(cos->dim() == 2 && sin->dim() == 2 && cos->size(0) == sin->size(0) &&
                     cos->size(1) == sin->size(1) && 2 * cos->size(1) <= head_dim,
                 "rotary_cos and rotary_sin must be [positions, at most half of head_dim]");
  FASTATTN_CHECK(cos->size(0) >= positions, "rotary_cos has not a row for every position");
  rotary.cos = {cos->const_data_ptr(), {0, 0, cos->stride(0), cos->stride(1)}};
  rotary.sin = {sin->const_data_ptr(), {0, 0, sin->stride(0), sin->stride(1)}};
  rotary.positions = cos->size(0);
  rotary.pairs = cos->size(1);
  rotary.interleaved = interleaved;
  return rotary;
}

std::tuple<Tensor, Tensor> attention_cached(
    Tensor query, Tensor key_cache, Tensor value_cache, Tensor cache_seqlens, int64_t appended,
    OptionalTensor block_table, OptionalTensor rotary_cos, OptionalTensor rotary_sin,
    bool rotary_interleaved, OptionalTensor alibi_slopes, OptionalTensor sinks,
    std::optional<int64_t> left, std::optional<int64_t> right, double scale, double softcap) {
  const Cached cached(key_cache, value_cache, cache_seqlens, appended, block_table);
  FASTATTN_CHECK(query.dim() == 4 && query.numel() > 0,
                 "query must have four dimensions and not be empty");
  AttentionDecode args{};
  Attention& in = args.in;
  in.dtype = dtype_of(query);
  in.batch = cached.batch;
  in.heads = query.size(1);
  in.kv_heads = cached.kv_heads;
  in.q_len = query.size(2);
  in.kv_len = cached.room();
  in.head_dim = cached.head_dim;
  in.value_dim = cached.value_dim;
  in.rows = in.batch * in.heads * in.q_len;
  in.row_stride[0] = in.heads * in.q_len;
  in.row_stride[1] = in.q_len;
  FASTATTN_CHECK(in.heads % in.kv_heads == 0, "key_cache's heads must divide query's");
  check_dtype("key_cache", key_cache, in.dtype);
  in.query = exact("query", query, {in.batch, in.heads, in.q_len, in.head_dim});
  const Place place = place_of(query);
  check_place(place, in.dtype, std::max(in.head_dim, in.value_dim));
  set_terms_of_heads(in, alibi_slopes, sinks);
  set_bounds(in, left, right);
  in.scale = scale;
  in.softcap = softcap;
  std::vector<Sequence> sequences;
  for (int64_t b = 0; b < static_cast<int64_t>(cached.lengths.size()); b++) {
    const int64_t length = cached.lengths[static_cast<size_t>(b)] + appended;
    FASTATTN_CHECK(!rotary_cos.has_value() || length >= in.q_len,
                   "cache_seqlens must leave the queries at positions >= 0");
    sequences.push_back({b, 0, in.q_len, 0, length, length - in.q_len});
  }
  sort(sequences);
  in.sequences = sequences.data();
  args.key_cache = source(key_cache);
  args.value_cache = source(value_cache);
  args.paging = cached.paging;
  args.rotary = rotary_of(rotary_cos, rotary_sin, rotary_interleaved, in.head_dim,
                          cached.positions(appended), in.dtype);
  args.appended = appended;
  Tensor out = rows_first(in.batch, in.heads, in.q_len, in.value_dim, in.dtype, place);
  Tensor lse = empty({in.batch, in.heads, in.q_len}, {in.heads * in.q_len, in.q_len, 1},
                     wide(in.dtype), place);
  args.out = target(out);
  args.lse = lse.mutable_data_ptr();
  run(place, args, attention_decode, cuda::attention_decode);
  return {out, lse};
}

void append_to_cache(Tensor key_cache, Tensor value_cache, Tensor key, Tensor value,
                     Tensor cache_seqlens, OptionalTensor block_table, OptionalTensor rotary_cos,
                     OptionalTensor rotary_sin, bool rotary_interleaved) {
  FASTATTN_CHECK(key.dim() == 4 && key.numel() > 0 && value.numel() > 0,
                 "key and value must have four dimensions and not be empty");
  AttentionAppend args{};
  args.dtype = dtype_of(key_cache);
  check_place(place_of(key_cache), args.dtype, 0);
  args.new_len = key.size(2);
  const Cached cached(key_cache, value_cache, cache_seqlens, args.new_len, block_table);
  args.batch = cached.batch;
  args.kv_heads = cached.kv_heads;
  args.head_dim = cached.head_dim;
  args.value_dim = cached.value_dim;
  for (const Tensor* tensor : {&key, &value}) check_dtype("key or value", *tensor, args.dtype);
  args.key = exact("key", key, {args.batch, args.kv_heads, args.new_len, args.head_dim});
  args.value = exact("value", value, {args.batch, args.kv_heads, args.new_len, args.value_dim});
  args.key_cache = target(key_cache);
  args.value_cache = target(value_cache);
  args.paging = cached.paging;
  args.lengths = cached.lengths.data();
  args.rotary = rotary_of(rotary_cos, rotary_sin, rotary_interleaved, args.head_dim,
                          cached.positions(args.new_len), args.dtype);
  run(place_of(key_cache), args, attention_append, cuda::attention_append);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastattn, CUDA, library) {
  library.impl("attention_fwd", TORCH_BOX(&attention_fwd));
  library.impl("attention_bwd", TORCH_BOX(&attention_bwd));
  library.impl("attention_decode", TORCH_BOX(&attention_cached));
  library.impl("attention_append", TORCH_BOX(&append_to_cache));
}

STABLE_TORCH_LIBRARY_IMPL(fastattn, CPU, library) {
  library.impl("attention_fwd", TORCH_BOX(&attention_fwd));
  library.impl("attention_bwd", TORCH_BOX(&attention_bwd));
  library.impl("attention_decode", TORCH_BOX(&attention_cached));
  library.impl("attention_append", TORCH_BOX(&append_to_cache));
}

}  // namespace fastattn
