// Launches of attention's CUDA kernels, forward and backward: which kernel, on which tiles.
#include <algorithm>
#include <initializer_list>
#include <limits>
#include <utility>

#include "attention/launch.h"

namespace fastattn::cuda {
namespace {

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

}  // namespace fastattn::cuda
