// Launches of the ffn room's CUDA kernels: which product, on which operands.
#include <algorithm>
#include <initializer_list>
#include <stdexcept>

#include "ffn/ffn.h"
#include "ffn/scalars.h"

namespace fastattn::cuda {
namespace {

// A matrix of `rows` rows without gaps.
struct Plain {
  const void* data;
  int64_t rows, cols;

  Memory memory(Dtype dtype) const { return reads(data, rows * cols * size_of(dtype)); }
  Boxed boxed() const { return {data, rows, cols}; }
  bool aligned(Dtype dtype) const {
    return reinterpret_cast<uintptr_t>(data) % 16 == 0 && cols * size_of(dtype) % 16 == 0;
  }
};

// A size as kernels count it.
int32_t counted(int64_t size) {
  if (size >> 31 != 0)
    throw std::runtime_error(
        "fastattn: the CUDA kernels count up to 2^31 rows, features and blocks");
  return static_cast<int32_t>(size);
}

uint32_t blocks_of(int64_t work, int64_t each) {
  return static_cast<uint32_t>(counted((work + each - 1) / each));
}

// out [rows, cols] and what lies beside it; null where it is not wanted or not there.
struct Result {
  int64_t rows, cols;
  void* out;
  void* pre = nullptr;
  void* gate = nullptr;
  const void* bias = nullptr;       // [cols]
  const void* gate_bias = nullptr;  // [cols]
  const void* add = nullptr;        // [rows, cols]; out itself is added to in place

  // Whether so many neighbours of all of them can be moved at once.
  bool aligned(Dtype dtype, int neighbours) const {
    bool all = cols % neighbours == 0;
    for (const void* data :
         std::initializer_list<const void*>{out, pre, gate, bias, gate_bias, add})
      all = all && reinterpret_cast<uintptr_t>(data) % (neighbours * size_of(dtype)) == 0;
    return all;
  }
};

// What a product is launched with besides its operands.
template <class Operand>
void launch_product(Device& device, const char* room, const std::string& kernel, const Shape& shape,
                    Dtype dtype, const Operand& left, const Operand& right,
                    const Operand& gate_right, const Result& to, const ProductScalars& numbers) {
  const int64_t line = to.cols * size_of(dtype), all = to.rows * line;
  const Memory out = to.add == to.out ? updates(to.out, all) : writes(to.out, all);
  const Memory addend = to.add == to.out ? out : reads(to.add, all);
  launch(device, room, kernel, shape, left, right, gate_right, reads(to.bias, line),
         reads(to.gate_bias, line), addend, out, writes(to.pre, all), writes(to.gate, all),
         numbers);
}

void product(Device& device, const char* kind, Dtype dtype, int64_t depth, const Plain& left,
             const Plain& right, const Plain& gate_right, Activation activation, const Result& to) {
  const bool gated = gate_right.data != nullptr;
  ProductScalars numbers{};
  numbers.rows = counted(to.rows);
  numbers.cols = counted(to.cols);
  numbers.depth = counted(depth);
  numbers.aligned_left = left.aligned(dtype);
  numbers.aligned_right = right.aligned(dtype) && gate_right.aligned(dtype);
  numbers.aligned_out = to.aligned(dtype, 4);
  numbers.activation = static_cast<int32_t>(activation);
  numbers.gated = gated;
  using Tiles = ProductTiles<2>;  // which differ from those of fp32 in their warps alone
  static_assert(Tiles::kShared <= kMostShared && Tiles::kShared == ProductTiles<4>::kShared);
  static_assert(Tiles::kSide == BoxTiles::kSide);
  const int64_t width = gated ? Tiles::kSide / 2 : Tiles::kSide;
  const int32_t squares =
      counted(int64_t{blocks_of(to.rows, Tiles::kSide)} * blocks_of(to.cols, width));
  const std::string kernel = "ffn_" + std::string(kind) + "_" + name_of(dtype);
  if (architecture(device) == 90 && dtype != Dtype::f32 && depth > 0 && numbers.aligned_left &&
      numbers.aligned_right && to.aligned(dtype, 8)) {
    const auto blocks = static_cast<uint32_t>(std::min(squares, multiprocessors(device)));
    return launch_product(device, "ffn_sm90", kernel + "_sm90",
                          {{blocks, 1, 1}, {BoxTiles::kThreads, 1, 1}, BoxTiles::kShared}, dtype,
                          left.boxed(), right.boxed(), (gated ? gate_right : right).boxed(), to,
                          numbers);
  }
  const uint32_t threads = dtype == Dtype::f32 ? ProductTiles<4>::kThreads : Tiles::kThreads;
  launch_product(device, "ffn", kernel,
                 {{static_cast<uint32_t>(squares), 1, 1}, {threads, 1, 1}, Tiles::kShared}, dtype,
                 left.memory(dtype), right.memory(dtype), gate_right.memory(dtype), to, numbers);
}

// In two steps: blocks of rows first, and then their sums.
void sum_columns(Device& device, Dtype dtype, const void* from, void* to, int64_t rows,
                 int64_t cols) {
  constexpr int64_t most = 1024;
  const int64_t each = std::max<int64_t>(kSumRows, (rows + most - 1) / most);
  const int64_t parts = (rows + each - 1) / each;
  void* sums = device.scratch(parts * cols * 4);
  const auto step = [&](const std::string& name, const Memory& source, const Memory& target,
                        int64_t count, int64_t together, int64_t blocks) {
    launch(device, "ffn", "ffn_sum_columns_" + name,
           {{blocks_of(cols, 32), static_cast<uint32_t>(blocks), 1}, {32, kSumWarps, 1}}, source,
           target, counted(count), counted(cols), counted(together));
  };
  const int64_t bytes = parts * cols * 4;
  step(name_of(dtype) + "_to_f32", reads(from, rows * cols * size_of(dtype)), writes(sums, bytes),
       rows, each, parts);
  step("f32_to_" + name_of(dtype), reads(sums, bytes), writes(to, cols * size_of(dtype)), parts,
       parts, 1);
}

}  // namespace

void linear_forward(const LinearForward& args, Device& device) {
  product(device, "forward", args.dtype, args.in_features,
          {args.input, args.rows, args.in_features},
          {args.weight.data, args.out_features, args.in_features}, {}, args.activation,
          {.rows = args.rows,
           .cols = args.out_features,
           .out = args.out,
           .pre = args.pre,
           .bias = args.bias});
}

void gated_forward(const GatedForward& args, Device& device) {
  product(device, "forward", args.dtype, args.in_features,
          {args.input, args.rows, args.in_features},
          {args.up_weight.data, args.hidden_features, args.in_features},
          {args.gate_weight.data, args.hidden_features, args.in_features}, args.activation,
          {.rows = args.rows,
           .cols = args.hidden_features,
           .out = args.hidden,
           .pre = args.up,
           .gate = args.gate,
           .bias = args.up_bias,
           .gate_bias = args.gate_bias});
}

void drop(const Drop& args, Device& device) {
  DropScalars numbers{};
  numbers.rows = args.rows;
  numbers.cols = counted(args.cols);
  numbers.counters = counted((args.cols + 63) / 64 * 16);
  numbers.threshold = dropout_threshold(args.dropout_p);
  numbers.kept = static_cast<float>(args.dropout_p < 1 ? 1 / (1 - args.dropout_p) : 0);
  launch(device, "ffn", "ffn_drop_" + name_of(args.dtype),
         {{blocks_of(args.rows * numbers.counters, kPointwiseThreads), 1, 1},
          {kPointwiseThreads, 1, 1}},
         updates(args.x, args.rows * args.cols * size_of(args.dtype)),
         reads(args.device_seed, sizeof(uint64_t)), numbers);
}

void activation_backward(const ActivationBackward& args, Device& device) {
  const int64_t bytes = args.size * size_of(args.dtype), vector = 4 * size_of(args.dtype);
  PointwiseScalars numbers{args.size, static_cast<int32_t>(args.activation), 1};
  for (const void* data : std::initializer_list<const void*>{
           args.grad_out, args.pre, args.gate, args.grad_pre, args.grad_gate, args.hidden})
    numbers.aligned = numbers.aligned && reinterpret_cast<uintptr_t>(data) % vector == 0;
  const std::initializer_list<const void*> read{args.grad_out, args.pre, args.gate},
      written{args.grad_pre, args.grad_gate, args.hidden};
  const auto among = [](std::initializer_list<const void*> all, const void* data) {
    return data != nullptr && std::find(all.begin(), all.end(), data) != all.end();
  };
  const auto source = [&](const void* data) {
    return Memory{data, bytes, among(written, data), false};
  };
  const auto result = [&](void* data) { return Memory{data, bytes, true, !among(read, data)}; };
  launch(device, "ffn", "ffn_activation_backward_" + name_of(args.dtype),
         {{blocks_of(args.size, 4 * kPointwiseThreads), 1, 1}, {kPointwiseThreads, 1, 1}},
         source(args.grad_out), source(args.pre), source(args.gate), result(args.grad_pre),
         result(args.grad_gate), result(args.hidden), numbers);
}

void linear_backward(const LinearBackward& args, Device& device) {
  const int64_t rows = args.rows, in = args.in_features, out = args.out_features;
  const Plain grad{args.grad_pre, rows, out};
  if (args.grad_input != nullptr)
    product(device, "grad_input", args.dtype, out, grad, {args.weight.data, out, in}, {},
            Activation::identity,
            {.rows = rows, .cols = in, .out = args.grad_input, .add = args.add});
  if (args.grad_weight != nullptr)
    product(device, "grad_weight", args.dtype, rows, grad, {args.input, rows, in}, {},
            Activation::identity, {.rows = out, .cols = in, .out = args.grad_weight});
  if (args.grad_bias != nullptr)
    sum_columns(device, args.dtype, args.grad_pre, args.grad_bias, rows, out);
}

}  // namespace fastattn::cuda
