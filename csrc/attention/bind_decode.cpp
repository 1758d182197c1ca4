// The torch ops of attention to a cache, and of what is appended to it, on the CPU and on a GPU.
#include "attention/bind.h"

namespace fastattn {
namespace {

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

// Attention of queries to a cache, complete but for where its results go.
struct Decoding {
  Cached cached;
  std::vector<Sequence> sequences;
  AttentionDecode args{};

  Decoding(const Tensor& query, const Tensor& key_cache, const Tensor& value_cache,
           const Tensor& cache_seqlens, int64_t appended, const OptionalTensor& block_table,
           const OptionalTensor& rotary_cos, const OptionalTensor& rotary_sin,
           bool rotary_interleaved, const OptionalTensor& alibi_slopes, const OptionalTensor& sinks,
           std::optional<int64_t> left, std::optional<int64_t> right, double scale, double softcap)
      : cached(key_cache, value_cache, cache_seqlens, appended, block_table) {
    FASTATTN_CHECK(query.dim() == 4 && query.numel() > 0,
                   "query must have four dimensions and not be empty");
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
    check_place(place_of(query), in.dtype, std::max(in.head_dim, in.value_dim));
    set_terms_of_heads(in, alibi_slopes, sinks);
    set_bounds(in, left, right);
    in.scale = scale;
    in.softcap = softcap;
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
  }
  Decoding(const Decoding&) = delete;

  Tensor run(Place place, void* lse) {
    const Attention& in = args.in;
    Tensor out = rows_first(in.batch, in.heads, in.q_len, in.value_dim, in.dtype, place);
    args.out = target(out);
    args.lse = lse;
    fastattn::run(place, args, attention_decode, cuda::attention_decode);
    return out;
  }
};

std::tuple<Tensor, Tensor> attention_cached(
    Tensor query, Tensor key_cache, Tensor value_cache, Tensor cache_seqlens, int64_t appended,
    OptionalTensor block_table, OptionalTensor rotary_cos, OptionalTensor rotary_sin,
    bool rotary_interleaved, OptionalTensor alibi_slopes, OptionalTensor sinks,
    std::optional<int64_t> left, std::optional<int64_t> right, double scale, double softcap) {
  Decoding decoding(query, key_cache, value_cache, cache_seqlens, appended, block_table, rotary_cos,
                    rotary_sin, rotary_interleaved, alibi_slopes, sinks, left, right, scale,
                    softcap);
  const Attention& in = decoding.args.in;
  const Place place = place_of(query);
  Tensor lse = empty({in.batch, in.heads, in.q_len}, {in.heads * in.q_len, in.q_len, 1},
                     wide(in.dtype), place);
  Tensor out = decoding.run(place, lse.mutable_data_ptr());
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

// What a plain call asks for. Nothing is written unless all of it is to be done.
Tensor decode(Tensor query, Tensor key_cache, Tensor value_cache, Tensor cache_seqlens,
              OptionalTensor key, OptionalTensor value, OptionalTensor block_table,
              OptionalTensor rotary_cos, OptionalTensor rotary_sin, bool rotary_interleaved,
              bool causal, std::optional<double> scale) {
  FASTATTN_CHECK(!on_gpu(place_of(query)), "query must be on the CPU");
  FASTATTN_CHECK(key.has_value() == value.has_value(), "key and value come together");
  const int64_t appended = key.has_value() && key->dim() == 4 ? key->size(2) : 0;
  const std::optional<int64_t> right = causal ? std::optional<int64_t>(0) : std::nullopt;
  Decoding decoding(query, key_cache, value_cache, cache_seqlens, appended, block_table, rotary_cos,
                    rotary_sin, rotary_interleaved, std::nullopt, std::nullopt, std::nullopt, right,
                    scale_of(scale, query), 0);
  if (key.has_value()) {
    for (const Tensor* cache : {&key_cache, &value_cache})
      for (int dim = 0; dim < 4; dim++)
        FASTATTN_CHECK(cache->size(dim) < 2 || cache->stride(dim) != 0,
                       "a cache must not be expanded to be appended to");
    append_to_cache(key_cache, value_cache, *key, *value, cache_seqlens, block_table, rotary_cos,
                    rotary_sin, rotary_interleaved);
  }
  return decoding.run({}, nullptr);
}

template <class Library>
void implement(Library& library) {
  library.impl("attention_decode", TORCH_BOX(&attention_cached));
  library.impl("attention_append", TORCH_BOX(&append_to_cache));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastattn, CPU, library) {
  implement(library);
  library.impl("attention_decode.plain", TORCH_BOX(&decode));
}
STABLE_TORCH_LIBRARY_IMPL(fastattn, CUDA, library) { implement(library); }

}  // namespace fastattn
