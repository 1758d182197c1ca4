// How launches of attention's CUDA kernels describe tensors to them.
#pragma once

#include <algorithm>
#include <initializer_list>
#include <string>

#include "attention/attention.h"
#include "attention/scalars.h"

namespace fastattn::cuda {

// A tensor [B, H, rows, cols] as an argument: the memory from its first element to its last.
template <class Pointer>
Memory memory(const View<Pointer>& view, std::initializer_list<int64_t> sizes, int64_t bytes,
              bool written = false) {
  if (view.data == nullptr) return reads(nullptr, 0);
  int64_t last = 0, dim = 0;
  for (const int64_t size : sizes) last += (size - 1) * view.stride[dim++];
  return {view.data, (last + 1) * bytes, written, written};
}

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Whether rows of elements of `bytes` can be moved `each` at a time.
template <class Pointer>
bool aligned(const View<Pointer>& view, int64_t bytes, int64_t each = 16) {
  bool whole = reinterpret_cast<uintptr_t>(view.data) % each == 0 && view.stride[3] == 1;
  for (int dim = 0; dim < 3; dim++) whole = whole && view.stride[dim] * bytes % each == 0;
  return whole;
}

template <class Pointer>
Layout layout(const View<Pointer>& view, int64_t bytes) {
  Layout to{};
  std::copy(view.stride, view.stride + 4, to.stride);
  to.aligned = aligned(view, bytes);
  return to;
}

// Rows that are written have no room behind them for the rest of 16 bytes.
inline Layout written(const Target& view, int64_t bytes, int64_t cols) {
  Layout to = layout(view, bytes);
  to.aligned = to.aligned && cols * bytes % 16 == 0;
  return to;
}

inline Integers layout(const fastattn::Integers& numbers) {
  return {{numbers.stride[0], numbers.stride[1]}, numbers.wide};
}

// [rows, cols] as an argument.
inline Memory memory(const fastattn::Integers& numbers, int64_t rows, int64_t cols) {
  const int64_t last = (rows - 1) * numbers.stride[0] + (cols - 1) * numbers.stride[1];
  return reads(numbers.data, (last + 1) * (numbers.wide ? 8 : 4));
}

inline Boundaries boundaries(const Starts& starts, int64_t total) {
  return {layout(starts.numbers), static_cast<int32_t>(std::min(starts.longest, total))};
}

// With blocks of so many queries or keys.
inline AttentionScalars scalars(const Attention& in, int64_t rows) {
  constexpr double log2e = 1.44269504088896340736;
  AttentionScalars to{};
  const int64_t bytes = size_of(in.dtype);
  to.heads = static_cast<int32_t>(in.heads);
  to.group = static_cast<int32_t>(in.heads / in.kv_heads);
  to.q_len = static_cast<int32_t>(in.q_len);
  to.kv_len = static_cast<int32_t>(in.kv_len);
  const bool packed = in.query_starts.numbers.data != nullptr;
  to.batch = packed ? 1 : static_cast<int32_t>(in.batch);
  to.sequences = packed ? static_cast<int32_t>(in.batch) : 0;
  to.bottom_right = in.bottom_right;
  to.query_starts = boundaries(in.query_starts, in.q_len);
  to.key_starts = boundaries(in.key_starts, in.kv_len);
  // Every packed sequence may have a block that is not full.
  const auto blocks_of = [&](int64_t length) {
    return static_cast<int32_t>(packed ? length / rows + in.batch : ceil_div(length, rows));
  };
  to.query_blocks = blocks_of(in.q_len);
  to.key_blocks = blocks_of(in.kv_len);
  to.head_dim = static_cast<int32_t>(in.head_dim);
  to.value_dim = static_cast<int32_t>(in.value_dim);
  to.query = layout(in.query, bytes);
  to.key = layout(in.key, bytes);
  to.value = layout(in.value, bytes);
  std::copy(in.mask.stride, in.mask.stride + 4, to.mask);
  std::copy(in.bias.stride, in.bias.stride + 4, to.bias);
  to.wide_bias = in.bias_dtype == Dtype::f32;
  to.aligned_bias = aligned(in.bias, size_of(in.bias_dtype), 4 * size_of(in.bias_dtype));
  to.chunked_bias = aligned(in.bias, size_of(in.bias_dtype));
  to.offset = static_cast<int32_t>(in.offset);
  to.left = static_cast<int32_t>(std::min<int64_t>(in.left, kFar));
  to.right = static_cast<int32_t>(std::min<int64_t>(in.right, kFar));
  to.hides =
      in.mask.data != nullptr || in.bias.data != nullptr || to.left < kFar || to.right < kFar;
  to.plain = in.mask.data == nullptr && in.bias.data == nullptr && in.alibi_slopes == nullptr &&
             in.softcap == 0 && in.scale > 0;
  to.scale = static_cast<float>(in.softcap == 0 ? in.scale * log2e : in.scale / in.softcap);
  to.softcap = static_cast<float>(in.softcap * log2e);
  to.threshold = dropout_threshold(in.dropout_p);
  to.kept = static_cast<float>(in.dropout_p < 1 ? 1 / (1 - in.dropout_p) : 0);
  return to;
}

// The tensors of an attention as arguments.
struct Tensors {
  const Attention& in;
  int64_t bytes = size_of(in.dtype);

  Memory queries(const Source& view, int64_t cols) const {
    return memory(view, {in.batch, in.heads, in.q_len, cols}, bytes);
  }
  Memory queries(const Target& view, int64_t cols) const {
    return memory(view, {in.batch, in.heads, in.q_len, cols}, bytes, true);
  }
  Memory keys(const Source& view, int64_t cols) const {
    return memory(view, {in.batch, in.kv_heads, in.kv_len, cols}, bytes);
  }
  Memory keys(const Target& view, int64_t cols) const {
    return memory(view, {in.batch, in.kv_heads, in.kv_len, cols}, bytes, true);
  }
  Memory query() const { return queries(in.query, in.head_dim); }
  Memory key() const { return keys(in.key, in.head_dim); }
  Memory value() const { return keys(in.value, in.value_dim); }
  Memory mask() const { return memory(in.mask, {in.batch, in.heads, in.q_len, in.kv_len}, 1); }
  Memory bias() const {
    return memory(in.bias, {in.batch, in.heads, in.q_len, in.kv_len}, size_of(in.bias_dtype));
  }
  Memory alibi_slopes() const { return reads(in.alibi_slopes, in.batch * in.heads * 4); }
  Memory sinks() const { return reads(in.sinks, in.heads * 8); }
  Memory seed() const { return reads(in.device_seed, 8); }
  Memory query_starts() const { return memory(in.query_starts.numbers, 1, in.batch + 1); }
  Memory key_starts() const { return memory(in.key_starts.numbers, 1, in.batch + 1); }
};

inline uint32_t blocks(int64_t count) { return static_cast<uint32_t>(count); }

// The name of the kernel for heads of up to `dim` elements.
inline std::string name(const char* kernel, const Attention& in, int dim,
                        const char* variant = "") {
  return std::string("attention_") + kernel + "_" + name_of(in.dtype) + variant + "_" +
         std::to_string(dim);
}

}  // namespace fastattn::cuda
