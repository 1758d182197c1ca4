// Launches of the attention room's CUDA kernels: which kernel, on which tiles.
#include <algorithm>
#include <initializer_list>
#include <limits>
#include <utility>

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

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

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
Layout written(const Target& view, int64_t bytes, int64_t cols) {
  Layout to = layout(view, bytes);
  to.aligned = to.aligned && cols * bytes % 16 == 0;
  return to;
}

Integers layout(const fastattn::Integers& numbers) {
  return {{numbers.stride[0], numbers.stride[1]}, numbers.wide};
}

// [rows, cols] as an argument.
Memory memory(const fastattn::Integers& numbers, int64_t rows, int64_t cols) {
  const int64_t last = (rows - 1) * numbers.stride[0] + (cols - 1) * numbers.stride[1];
  return reads(numbers.data, (last + 1) * (numbers.wide ? 8 : 4));
}

Boundaries boundaries(const Starts& starts, int64_t total) {
  return {layout(starts.numbers), static_cast<int32_t>(std::min(starts.longest, total))};
}

// With blocks of so many queries or keys.
AttentionScalars scalars(const Attention& in, int64_t rows) {
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

uint32_t blocks(int64_t count) { return static_cast<uint32_t>(count); }

// The name of the kernel for heads of up to `dim` elements.
std::string name(const char* kernel, const Attention& in, int dim, const char* variant = "") {
  return std::string("attention_") + kernel + "_" + name_of(in.dtype) + variant + "_" +
         std::to_string(dim);
}

constexpr int64_t kMostBlocks = std::numeric_limits<int32_t>::max();  // of a launch

// With a block for each tile of queries, or with so many that share these out.
template <class Tiles>
void launch_forward(const AttentionForward& args, Device& device, const char* room,
                    const std::string& kernel, int64_t most = kMostBlocks) {
  const Attention& in = args.in;
  const Tensors of{in};
  AttentionScalars numbers = scalars(in, Tiles::kQueries);
  numbers.out = written(args.out, of.bytes, in.value_dim);
  // Rows further apart are read element by element, see `fetch_in_turn`.
  numbers.query.aligned = numbers.query.aligned && in.query.stride[2] >> 30 == 0;
  const int64_t tiles = int64_t{numbers.query_blocks} * in.heads * numbers.batch;
  launch(device, room, kernel,
         {{blocks(std::min(tiles, most)), 1, 1}, {Tiles::kThreads, 1, 1}, Tiles::kShared},
         of.query(), of.key(), of.value(), of.mask(), of.bias(), of.alibi_slopes(), of.sinks(),
         of.seed(), of.query_starts(), of.key_starts(), of.queries(args.out, in.value_dim),
         writes(args.lse, in.rows * 4), numbers);
}

// Whether a call needs a kernel that knows more than products, bounds and sinks.
bool has_extras(const Attention& in) { return !scalars(in, 1).plain || in.dropout_p > 0; }

template <int Bytes, int Dim>
void launch_warps(const AttentionForward& args, Device& device) {
  using Tiles = AttentionTiles<Bytes, Dim>;
  static_assert(Tiles::kShared <= kMostShared);
  // Kernels of their own for what needs no extras, where it pays.
  const bool extra = Bytes == 4 || Dim == 256 || has_extras(args.in);
  launch_forward<Tiles>(args, device, "attention",
                        name("forward", args.in, Dim, extra ? "_extra" : ""));
}

// Whether warp groups' kernels can serve: on sm_90 alone, where these rows are whole 16 bytes, not
// too far apart.
bool grouped(const Attention& in, const Device& device,
             std::initializer_list<std::pair<const Source*, int64_t>> rows) {
  bool serves = architecture(device) == 90 && in.dtype != Dtype::f32;
  for (const auto& [view, cols] : rows)
    serves = serves && aligned(*view, 2) && cols % 8 == 0 && view->stride[2] >> 30 == 0;
  return serves;
}

// Where all tiles are as much work, as many blocks as there is room for take them in turn, and copy
// the next one's queries and keys while they end another. Others the GPU deals out to who is done.
template <int Dim, bool Extras>
void launch_grouped(const AttentionForward& args, Device& device) {
  using Tiles = GroupTiles<Dim, Extras>;
  const AttentionScalars numbers = scalars(args.in, Tiles::kQueries);
  const bool alike = !numbers.hides && numbers.sequences == 0;
  launch_forward<Tiles>(args, device, "attention_sm90",
                        name("forward", args.in, Dim, Extras ? "_extra" : "") + "_sm90",
                        alike ? multiprocessors(device) : kMostBlocks);
}

template <int Dim>
void launch_grouped(const AttentionForward& args, Device& device) {
  if constexpr (Dim <= 128)
    if (has_extras(args.in)) return launch_grouped<Dim, true>(args, device);
  launch_grouped<Dim, false>(args, device);
}

// What all kernels of a backward take: `statistics` are of every row, see the kernels.
struct Backward {
  const AttentionBackward& args;
  float* statistics;
  const Attention& in = args.in;
  const Tensors of{in};
  int64_t statistics_bytes = in.rows * 8;

  AttentionBackwardScalars scalars(int64_t rows) const {
    const int64_t bytes = size_of(in.dtype);
    AttentionBackwardScalars to{};
    to.in = cuda::scalars(in, rows);
    to.in.out = layout(args.out, bytes);
    to.grad_out = layout(args.grad_out, bytes);
    to.grad_query = written(args.grad_query, bytes, in.head_dim);
    to.grad_key = written(args.grad_key, bytes, in.head_dim);
    to.grad_value = written(args.grad_value, bytes, in.value_dim);
    std::copy(args.bias_sizes, args.bias_sizes + 4, to.bias_sizes);
    to.scale = static_cast<float>(in.scale);
    return to;
  }
  Memory grad_out() const { return of.queries(args.grad_out, in.value_dim); }
  // Launches one kernel, which takes `more` besides.
  template <class... Memories>
  void run(Device& device, const char* file, const std::string& kernel, const Shape& shape,
           const AttentionBackwardScalars& numbers, const Memories&... more) const {
    launch(device, file, kernel, shape, of.query(), of.key(), of.value(), grad_out(), of.mask(),
           of.bias(), of.alibi_slopes(), of.seed(), reads(statistics, statistics_bytes), more...,
           numbers);
  }
};

// What dropout keeps of a head's weights, as the queries' gradients leave it for the keys': tiles,
// see KeptWords. Heads are worked on together whose tiles take no more than a bound; those that
// share a head of keys have to be.
struct KeptTiles {
  int64_t rows, cols, heads;  // tiles of a head; heads together
  bool fit;

  static KeptTiles of(const Attention& in) {
    constexpr int64_t most = int64_t{256} << 20;
    const AttentionScalars numbers = scalars(in, 1);
    const bool packed = numbers.sequences > 0;
    KeptTiles to{};
    to.rows = packed ? in.q_len / 16 + in.batch : ceil_div(in.q_len, 16);
    to.cols = ceil_div(packed ? numbers.key_starts.longest : in.kv_len, 64);
    to.heads = in.heads * numbers.batch;
    to.fit = true;
    if (in.dropout_p > 0) {
      const int64_t groups = most / std::max<int64_t>(to.bytes() * numbers.group, 1);
      to.heads = std::min(groups * numbers.group, to.heads);
      to.fit = groups > 0;
    }
    return to;
  }
  int64_t bytes() const { return rows * cols * 32 * 4; }  // of a head
};

// The gradients of queries, and of keys and values.
template <int Dim, bool Extras>
void launch_grouped_rows(const Backward& of, Device& device) {
  using Queries = GroupBackwardTiles<Dim, false, Extras>;
  using Keys = GroupBackwardTiles<Dim, true, Extras>;
  const Attention& in = of.in;
  AttentionBackwardScalars of_queries = of.scalars(Queries::kRows),
                           of_keys = of.scalars(Keys::kRows);
  const KeptTiles kept = KeptTiles::of(in);
  const int64_t heads = in.heads * of_queries.in.batch, group = of_queries.in.group;
  const int64_t bytes = in.dropout_p > 0 ? kept.heads * kept.bytes() : 0;
  void* words = bytes > 0 ? device.scratch(bytes) : nullptr;
  const auto run = [&]<class Tiles>(Tiles, const char* kernel, AttentionBackwardScalars& numbers,
                                    int64_t first_head, int64_t count, const auto&... more) {
    static_assert(Tiles::kShared + Tiles::template kBias<4> <= kMostGroupShared);
    numbers.first_head = static_cast<int32_t>(first_head);
    numbers.kept_rows = static_cast<int32_t>(kept.rows);
    numbers.kept_cols = static_cast<int32_t>(kept.cols);
    const int bias = in.bias.data == nullptr       ? 0
                     : size_of(in.bias_dtype) == 4 ? Tiles::template kBias<4>
                                                   : Tiles::template kBias<2>;
    of.run(device, "attention_backward_sm90",
           name(kernel, in, Dim, Extras ? "_extra" : "") + "_sm90",
           {{blocks(count), 1, 1},
            {Tiles::kThreads, 1, 1},
            static_cast<uint32_t>(Tiles::kShared + bias)},
           numbers, of.of.query_starts(), of.of.key_starts(), more...);
  };
  for (int64_t first = 0; first < heads; first += kept.heads) {
    const int64_t count = std::min(kept.heads, heads - first);
    run(Queries(), "backward_queries", of_queries, first, count * of_queries.in.query_blocks,
        writes(words, bytes), of.of.queries(of.args.grad_query, in.head_dim));
    run(Keys(), "backward_keys", of_keys, first, count / group * of_keys.in.key_blocks,
        reads(words, bytes), of.of.keys(of.args.grad_key, in.head_dim),
        of.of.keys(of.args.grad_value, in.value_dim));
  }
}

template <class Tiles>
void launch_bias(const Backward& of, Device& device, const char* room, const std::string& kernel) {
  const int64_t (&sizes)[4] = of.args.bias_sizes;
  const int64_t count =
      sizes[0] * sizes[1] * ceil_div(sizes[2], Tiles::kRows) * ceil_div(sizes[3], Tiles::kOthers);
  const int64_t bytes = sizes[0] * sizes[1] * sizes[2] * sizes[3] * size_of(of.in.bias_dtype);
  of.run(device, room, kernel, {{blocks(count), 1, 1}, {Tiles::kThreads, 1, 1}, Tiles::kShared},
         of.scalars(Tiles::kRows), writes(of.args.grad_bias, bytes));
}

template <int Bytes, int Dim>
void launch_backward(const AttentionBackward& args, Device& device) {
  using Tiles = BackwardTiles<Bytes, Dim>;
  static_assert(Tiles::kShared <= kMostShared);
  const Attention& in = args.in;
  const Backward of{args, static_cast<float*>(device.scratch(in.rows * 8))};
  const AttentionBackwardScalars numbers = of.scalars(Tiles::kRows);
  const int64_t head_bytes = in.heads * 8;
  const Memory statistics = writes(of.statistics, of.statistics_bytes);
  launch(device, "attention_backward", "attention_statistics_" + name_of(in.dtype),
         {{blocks(ceil_div(in.rows * kStatisticsTeam, kStatisticsThreads)), 1, 1},
          {kStatisticsThreads, 1, 1}},
         of.grad_out(), of.of.queries(args.out, in.value_dim), reads(args.lse, in.rows * 4),
         reads(args.grad_lse, in.rows * 4), statistics, numbers);
  if (args.grad_sinks != nullptr)
    launch(device, "attention_backward", "attention_backward_sinks",
           {{blocks(in.heads), 1, 1}, {kStatisticsThreads, 1, 1}}, of.of.sinks(),
           reads(of.statistics, of.statistics_bytes), writes(args.grad_sinks, head_bytes), numbers);

  if constexpr (Bytes == 2 && Dim <= 128)
    if (args.grad_out.data != nullptr && KeptTiles::of(in).fit &&
        grouped(in, device,
                {{&in.query, in.head_dim},
                 {&in.key, in.head_dim},
                 {&in.value, in.value_dim},
                 {&args.grad_out, in.value_dim}})) {
      has_extras(in) ? launch_grouped_rows<Dim, true>(of, device)
                     : launch_grouped_rows<Dim, false>(of, device);
      if (args.grad_bias != nullptr)
        launch_bias<GroupBiasTiles<Dim>>(of, device, "attention_bias_sm90",
                                         name("backward_bias", in, Dim) + "_sm90");
      return;
    }

  const auto shape = [](int64_t count, uint32_t apart = 1) {
    return Shape{{blocks(count), apart, 1}, {Tiles::kThreads, 1, 1}, Tiles::kShared};
  };
  of.run(device, "attention_backward", name("backward_queries", in, Dim),
         shape(int64_t{numbers.in.query_blocks} * in.heads * numbers.in.batch), numbers,
         of.of.query_starts(), of.of.key_starts(), of.of.queries(args.grad_query, in.head_dim));
  of.run(
      device, "attention_backward", name("backward_keys", in, Dim),
      shape(int64_t{numbers.in.key_blocks} * in.kv_heads * numbers.in.batch, Tiles::kApart ? 2 : 1),
      numbers, of.of.query_starts(), of.of.key_starts(), of.of.keys(args.grad_key, in.head_dim),
      of.of.keys(args.grad_value, in.value_dim));
  if (args.grad_bias != nullptr)
    launch_bias<Tiles>(of, device, "attention_bias", name("backward_bias", in, Dim));
}

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

RotaryScalars scalars(const Rotary& rotary) {
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
  numbers.rotary = scalars(args.rotary);
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

void attention_forward(const AttentionForward& args, Device& device) {
  const Attention& in = args.in;
  const int64_t dim = std::max(in.head_dim, in.value_dim);
  if (in.dtype == Dtype::f32) {
    dim <= 32   ? launch_warps<4, 32>(args, device)
    : dim <= 64 ? launch_warps<4, 64>(args, device)
                : launch_warps<4, 128>(args, device);
  } else if (!(dim > 128 && has_extras(in)) &&
             grouped(in, device, {{&in.key, in.head_dim}, {&in.value, in.value_dim}})) {
    dim <= 64    ? launch_grouped<64>(args, device)
    : dim <= 128 ? launch_grouped<128>(args, device)
                 : launch_grouped<256>(args, device);
  } else {
    dim <= 64    ? launch_warps<2, 64>(args, device)
    : dim <= 128 ? launch_warps<2, 128>(args, device)
                 : launch_warps<2, 256>(args, device);
  }
}

void attention_backward(const AttentionBackward& args, Device& device) {
  const int64_t dim = std::max(args.in.head_dim, args.in.value_dim);
  if (args.in.dtype == Dtype::f32) {
    dim <= 64 ? launch_backward<4, 64>(args, device) : launch_backward<4, 128>(args, device);
  } else {
    dim <= 64    ? launch_backward<2, 64>(args, device)
    : dim <= 128 ? launch_backward<2, 128>(args, device)
                 : launch_backward<2, 256>(args, device);
  }
}

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
  numbers.rotary = scalars(args.rotary);
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
