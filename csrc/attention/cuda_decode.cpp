// Launches of the CUDA kernels that read and write a cache of keys and values.
#include <algorithm>
#include <utility>

#include "attention/launch.h"

namespace fastattn::cuda {
namespace {

// What the host knows of a cache of keys and values, which the kernels may write to.
template <class Pointer>
struct Caches {
  const View<Pointer>&key, &value;
  const Paging& paging;
  int64_t batch, kv_heads, head_dim, value_dim, bytes;

  CacheScalars scalars() const {
    CacheScalars to{};
    to.lengths = layout(paging.lengths);
    to.table = layout(paging.table);
    to.pages = static_cast<int32_t>(paging.count);
    to.size = static_cast<int32_t>(paging.size);
    to.most = static_cast<int32_t>(std::min<int64_t>(paging.columns * paging.size, kFar));
    to.key = layout(key, bytes);
    to.value = layout(value, bytes);
    return to;
  }
  Memory keys() const { return all(key, head_dim); }
  Memory values() const { return all(value, value_dim); }
  Memory lengths() const { return memory(paging.lengths, 1, batch); }
  Memory table() const { return memory(paging.table, batch, paging.columns); }

 private:
  Memory all(const View<Pointer>& view, int64_t cols) const {
    Memory to = memory(view, {paging.count, kv_heads, paging.size, cols}, bytes);
    to.written = std::is_same_v<Pointer, void*>;
    return to;
  }
};

RotaryScalars rotary_scalars(const Rotary& rotary) {
  RotaryScalars to{};
  for (int dim = 0; dim < 2; dim++) {
    to.cos[dim] = rotary.cos.stride[2 + dim];
    to.sin[dim] = rotary.sin.stride[2 + dim];
  }
  to.positions = static_cast<int32_t>(rotary.positions);
  to.pairs = static_cast<int32_t>(rotary.pairs);
  to.interleaved = rotary.interleaved;
  to.wide = rotary.dtype == Dtype::f32;
  return to;
}

Memory angles(const Rotary& rotary, const Source& table) {
  return memory(table, {1, 1, rotary.positions, rotary.pairs}, size_of(rotary.dtype));
}

// Splits of the keys. Blocks of which an H200 runs so many at a time, heads of 128, should leave
// few of its places empty in their last round; but none has few keys, and adding splits up does not
// take long. The same rule serves every GPU, so that results do not depend on it.
int64_t splits(int64_t blocks, int64_t room) {
  constexpr int64_t places = 3 * 132, least = 128, most = 128, tried = 3;
  const int64_t last = std::min(ceil_div(room, least), most);
  const auto filled = [&](int64_t split) {
    const int64_t all = blocks * split;
    return static_cast<double>(all) / static_cast<double>(ceil_div(all, places) * places);
  };
  const int64_t first = std::clamp<int64_t>(places / blocks, 1, last);
  int64_t best = first;
  for (int64_t split = first + 1; split <= std::min(first + tried, last); split++)
    if (filled(split) > filled(best) + 0.1) best = split;
  return best;
}

template <int Bytes, int Dim>
void launch_decode(const AttentionDecode& args, Device& device) {
  using Tiles = DecodeTiles<Bytes, Dim>;
  static_assert(Tiles::kShared <= kMostShared);
  const Attention& in = args.in;
  const Tensors of{in};
  const Caches<const void*> caches{args.key_cache, args.value_cache, args.paging,  in.batch,
                                   in.kv_heads,    in.head_dim,      in.value_dim, Bytes};
  AttentionDecodeScalars numbers{};
  numbers.in = scalars(in, Tiles::kRows);
  numbers.in.out = written(args.out, Bytes, in.value_dim);
  numbers.cache = caches.scalars();
  numbers.rotary = rotary_scalars(args.rotary);
  numbers.appended = static_cast<int32_t>(args.appended);
  const int64_t row_blocks = ceil_div(in.heads / in.kv_heads * in.q_len, Tiles::kRows);
  const int64_t count = in.batch * in.kv_heads * row_blocks, split = splits(count, in.kv_len);
  const int64_t width = ceil_div(in.value_dim, 4) * 4;
  numbers.row_blocks = static_cast<int32_t>(row_blocks);
  numbers.splits = static_cast<int32_t>(split);
  numbers.width = static_cast<int32_t>(width);
  const int64_t part_bytes = in.rows * split * width * 4, statistics_bytes = in.rows * split * 8;
  char* const parts = static_cast<char*>(device.scratch(part_bytes + statistics_bytes));
  char* const statistics = parts + part_bytes;
  launch(device, "attention_decode", name("decode", in, Dim),
         {{blocks(count * split), 1, 1}, {Tiles::kWarps * 32, 1, 1}, Tiles::kShared}, of.query(),
         caches.keys(), caches.values(), caches.lengths(), caches.table(),
         angles(args.rotary, args.rotary.cos), angles(args.rotary, args.rotary.sin),
         of.alibi_slopes(), writes(parts, part_bytes), writes(statistics, statistics_bytes),
         numbers);
  // A warp can have a row where it has the columns and the splits are few.
  const uint32_t rows = split <= kFewSplits && width <= 4 * 32 ? kRowWarps : 1;
  launch(device, "attention_decode", "attention_combine_" + name_of(in.dtype),
         {{blocks(ceil_div(in.rows, rows)), 1, 1}, {kRowWarps * 32 / rows, rows, 1}},
         reads(parts, part_bytes), reads(statistics, statistics_bytes), of.sinks(),
         of.queries(args.out, in.value_dim), writes(args.lse, in.rows * 4), numbers);
}

}  // namespace

void attention_decode(const AttentionDecode& args, Device& device) {
  const int64_t dim = std::max(args.in.head_dim, args.in.value_dim);
  if (args.in.dtype == Dtype::f32) {
    dim <= 64 ? launch_decode<4, 64>(args, device) : launch_decode<4, 128>(args, device);
  } else {
    dim <= 64    ? launch_decode<2, 64>(args, device)
    : dim <= 128 ? launch_decode<2, 128>(args, device)
                 : launch_decode<2, 256>(args, device);
  }
}

void attention_append(const AttentionAppend& args, Device& device) {
  const int64_t bytes = size_of(args.dtype);
  const Caches<void*> caches{args.key_cache, args.value_cache, args.paging,    args.batch,
                             args.kv_heads,  args.head_dim,    args.value_dim, bytes};
  AttentionAppendScalars numbers{};
  numbers.cache = caches.scalars();
  numbers.rotary = rotary_scalars(args.rotary);
  numbers.key = layout(args.key, bytes);
  numbers.value = layout(args.value, bytes);
  numbers.batch = static_cast<int32_t>(args.batch);
  numbers.kv_heads = static_cast<int32_t>(args.kv_heads);
  numbers.new_len = static_cast<int32_t>(args.new_len);
  numbers.head_dim = static_cast<int32_t>(args.head_dim);
  numbers.value_dim = static_cast<int32_t>(args.value_dim);
  const int64_t rows = args.batch * args.kv_heads * args.new_len;
  const auto all = [&](const Source& view, int64_t cols) {
    return memory(view, {args.batch, args.kv_heads, args.new_len, cols}, bytes);
  };
  launch(device, "attention_decode", "attention_append_" + name_of(args.dtype),
         {{blocks(ceil_div(rows, kRowWarps)), 1, 1}, {kRowWarps * 32, 1, 1}},
         all(args.key, args.head_dim), all(args.value, args.value_dim), caches.keys(),
         caches.values(), caches.lengths(), caches.table(), angles(args.rotary, args.rotary.cos),
         angles(args.rotary, args.rotary.sin), numbers);
}

}  // namespace fastattn::cuda
