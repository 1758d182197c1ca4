// Launches of the attention room's CUDA kernels: which kernel, on which tiles.
#include <algorithm>
#include <initializer_list>

#include "attention/attention.h"
#include "attention/scalars.h"

namespace fastattn::cuda {
namespace {

// A tensor [B, H, rows, cols] as an argument: the memory from its first element to its last.
template <class Pointer>
Memory memory(const View<Pointer>& view, std::initializer_list<int64_t> sizes, int64_t bytes,
              bool written = false) {
  if (view.data == nullptr) return reads(nullptr, 0);
  int64_t last = 0, dim = 0;
  for (const int64_t size : sizes) last += (size - 1) * view.stride[dim++];
  return {view.data, (last + 1) * bytes, written, written};
}

// Whether rows can be moved 16 bytes at a time.
template <class Pointer>
bool aligned(const View<Pointer>& view, int64_t bytes) {
  bool whole = reinterpret_cast<uintptr_t>(view.data) % 16 == 0 && view.stride[3] == 1;
  for (int dim = 0; dim < 3; dim++) whole = whole && view.stride[dim] * bytes % 16 == 0;
  return whole;
}

template <class Pointer>
void copy_strides(int64_t (&to)[4], const View<Pointer>& view) {
  std::copy(view.stride, view.stride + 4, to);
}

AttentionScalars scalars(const Attention& in) {
  constexpr double log2e = 1.44269504088896340736;
  AttentionScalars to{};
  const int64_t bytes = size_of(in.dtype);
  to.heads = static_cast<int32_t>(in.heads);
  to.group = static_cast<int32_t>(in.heads / in.kv_heads);
  to.q_len = static_cast<int32_t>(in.q_len);
  to.kv_len = static_cast<int32_t>(in.kv_len);
  to.head_dim = static_cast<int32_t>(in.head_dim);
  to.value_dim = static_cast<int32_t>(in.value_dim);
  copy_strides(to.query, in.query);
  copy_strides(to.key, in.key);
  copy_strides(to.value, in.value);
  copy_strides(to.mask, in.mask);
  copy_strides(to.bias, in.bias);
  to.wide_bias = in.bias_dtype == Dtype::f32;
  to.aligned_query = aligned(in.query, bytes);
  to.aligned_key = aligned(in.key, bytes);
  to.aligned_value = aligned(in.value, bytes);
  to.offset = static_cast<int32_t>(in.offset);
  to.left = static_cast<int32_t>(std::min<int64_t>(in.left, kFar));
  to.right = static_cast<int32_t>(std::min<int64_t>(in.right, kFar));
  to.hides =
      in.mask.data != nullptr || in.bias.data != nullptr || to.left < kFar || to.right < kFar;
  to.scale = static_cast<float>(in.softcap == 0 ? in.scale * log2e : in.scale / in.softcap);
  to.softcap = static_cast<float>(in.softcap * log2e);
  to.threshold = dropout_threshold(in.dropout_p);
  to.kept = static_cast<float>(in.dropout_p < 1 ? 1 / (1 - in.dropout_p) : 0);
  return to;
}

template <int Bytes, int Dim>
void launch_forward(const AttentionForward& args, Device& device) {
  using Tiles = AttentionTiles<Bytes, Dim>;
  static_assert(Tiles::kShared <= kMostShared);
  const Attention& in = args.in;
  AttentionScalars numbers = scalars(in);
  const int64_t blocks = (in.q_len + Tiles::kQueries - 1) / Tiles::kQueries;
  numbers.query_blocks = static_cast<int32_t>(blocks);
  copy_strides(numbers.out, args.out);
  numbers.aligned_out = aligned(args.out, Bytes) && in.value_dim * Bytes % 16 == 0;
  // Kernels of their own for what needs no more than products, bounds and sinks, where it pays.
  const bool extra = Bytes == 4 || Dim == 256 || in.mask.data != nullptr ||
                     in.bias.data != nullptr || in.alibi_slopes != nullptr || in.softcap != 0 ||
                     in.dropout_p > 0;
  const std::string name =
      "attention_forward_" + name_of(in.dtype) + (extra ? "_extra_" : "_") + std::to_string(Dim);
  const auto tensor = [&](const Source& view, int64_t heads, int64_t rows, int64_t cols) {
    return memory(view, {in.batch, heads, rows, cols}, Bytes);
  };
  launch(device, "attention", name,
         {{static_cast<uint32_t>(blocks * in.heads * in.batch), 1, 1},
          {Tiles::kWarps * 32, 1, 1},
          Tiles::kShared},
         tensor(in.query, in.heads, in.q_len, in.head_dim),
         tensor(in.key, in.kv_heads, in.kv_len, in.head_dim),
         tensor(in.value, in.kv_heads, in.kv_len, in.value_dim),
         memory(in.mask, {in.batch, in.heads, in.q_len, in.kv_len}, 1),
         memory(in.bias, {in.batch, in.heads, in.q_len, in.kv_len}, size_of(in.bias_dtype)),
         reads(in.alibi_slopes, in.batch * in.heads * 4), reads(in.sinks, in.heads * 8),
         reads(in.device_seed, 8),
         memory(args.out, {in.batch, in.heads, in.q_len, in.value_dim}, Bytes, true),
         writes(args.lse, in.rows * 4), numbers);
}

}  // namespace

void attention_forward(const AttentionForward& args, Device& device) {
  const int64_t dim = std::max(args.in.head_dim, args.in.value_dim);
  if (args.in.dtype == Dtype::f32) {
    dim <= 32   ? launch_forward<4, 32>(args, device)
    : dim <= 64 ? launch_forward<4, 64>(args, device)
                : launch_forward<4, 128>(args, device);
  } else {
    dim <= 64    ? launch_forward<2, 64>(args, device)
    : dim <= 128 ? launch_forward<2, 128>(args, device)
                 : launch_forward<2, 256>(args, device);
  }
}

}  // namespace fastattn::cuda
