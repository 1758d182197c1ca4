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

  bool aligned(Dtype dtype) const {
    bool all = cols % 4 == 0;
    for (const void* data :
         std::initializer_list<const void*>{out, pre, gate, bias, gate_bias, add})
      all = all && reinterpret_cast<uintptr_t>(data) % (4 * size_of(dtype)) == 0;
    return all;
  }
};

void product(Device& device, const char* kind, Dtype dtype, int64_t depth, const Plain& left,
             const Plain& right, const Plain& gate_right, Activation activation, const Result& to) {
  using Tiles = ProductTiles<2>;  // which differ from those of fp32 in their warps alone
  static_assert(Tiles::kShared <= kMostShared && Tiles::kShared == ProductTiles<4>::kShared);
  const bool gated = gate_right.data != nullptr;
  ProductScalars numbers{};
  numbers.rows = counted(to.rows);
  numbers.cols = counted(to.cols);
  numbers.depth = counted(depth);
  numbers.aligned_left = left.aligned(dtype);
  numbers.aligned_right = right.aligned(dtype) && gate_right.aligned(dtype);
  numbers.aligned_out = to.aligned(dtype);
  numbers.activation = static_cast<int32_t>(activation);
  numbers.gated = gated;
  const int64_t width = gated ? Tiles::kSide / 2 : Tiles::kSide;
  const int64_t size = size_of(dtype), line = to.cols * size, all = to.rows * line;
  const uint32_t threads = dtype == Dtype::f32 ? ProductTiles<4>::kThreads : Tiles::kThreads;
  const bool in_place = to.add == to.out;
  const Memory out = in_place ? updates(to.out, all) : writes(to.out, all);
  const Memory addend = in_place ? out : reads(to.add, all);
  launch(
      device, "ffn", "ffn_" + std::string(kind) + "_" + name_of(dtype),
      {{blocks_of(int64_t{blocks_of(to.rows, Tiles::kSide)} * blocks_of(to.cols, width), 1), 1, 1},
       {threads, 1, 1},
       Tiles::kShared},
      left.memory(dtype), right.memory(dtype), gate_right.memory(dtype), reads(to.bias, line),
      reads(to.gate_bias, line), addend, out, writes(to.pre, all), writes(to.gate, all), numbers);
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
          {args.weight, args.out_features, args.in_features}, {}, args.activation,
          {.rows = args.rows,
           .cols = args.out_features,
           .out = args.out,
           .pre = args.pre,
           .bias = args.bias});
}

void gated_forward(const GatedForward& args, Device& device) {
  product(device, "forward", args.dtype, args.in_features,
          {args.input, args.rows, args.in_features},
          {args.up_weight, args.hidden_features, args.in_features},
          {args.gate_weight, args.hidden_features, args.in_features}, args.activation,
          {.rows = args.rows,
           .cols = args.hidden_features,
           .out = args.hidden,
           .pre = args.up,
           .gate = args.gate,
           .bias = args.up_bias,
           .gate_bias = args.gate_bias});
}

void activation_backward(const ActivationBackward& args, Device& device) {
  const int64_t bytes = args.size * size_of(args.dtype), vector = 4 * size_of(args.dtype);
  PointwiseScalars numbers{args.size, static_cast<int32_t>(args.activation), 1};
  for (const void* data : std::initializer_list<const void*>{
           args.grad_out, args.pre, args.gate, args.grad_pre, args.grad_gate, args.hidden})
    numbers.aligned = numbers.aligned && reinterpret_cast<uintptr_t>(data) % vector == 0;
  launch(device, "ffn", "ffn_activation_backward_" + name_of(args.dtype),
         {{blocks_of(args.size, 4 * kPointwiseThreads), 1, 1}, {kPointwiseThreads, 1, 1}},
         reads(args.grad_out, bytes), reads(args.pre, bytes), reads(args.gate, bytes),
         writes(args.grad_pre, bytes), writes(args.grad_gate, bytes), writes(args.hidden, bytes),
         numbers);
}

void linear_backward(const LinearBackward& args, Device& device) {
  const int64_t rows = args.rows, in = args.in_features, out = args.out_features;
  const Plain grad{args.grad_pre, rows, out};
  if (args.grad_input != nullptr)
    product(device, "grad_input", args.dtype, out, grad, {args.weight, out, in}, {},
            Activation::identity,
            {.rows = rows, .cols = in, .out = args.grad_input, .add = args.add});
  if (args.grad_weight != nullptr)
    product(device, "grad_weight", args.dtype, rows, grad, {args.input, rows, in}, {},
            Activation::identity, {.rows = out, .cols = in, .out = args.grad_weight});
  if (args.grad_bias != nullptr)
    sum_columns(device, args.dtype, args.grad_pre, args.grad_bias, rows, out);
}

}  // namespace fastattn::cuda
