// Launches of the norm room's CUDA kernels: which kernel, how many threads, how much memory.
#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <initializer_list>

#include "norm/norm.h"
#include "norm/scalars.h"

namespace fastattn::cuda {
namespace {

// Blocks of a backward, few enough that adding up their sums costs little next to the rows.
constexpr int64_t kMostParts = 264;
constexpr int64_t kFloat = sizeof(float);

// The teams of a launch, a row each: a warp, or all threads of a block where rows are long.
struct Teams {
  int64_t vector;  // neighbouring columns that a thread moves together
  int64_t threads, each_block;

  Teams(const Norm& in, std::initializer_list<const void*> memory) {
    vector = 16 / std::max(size_of(in.dtype), size_of(in.residual_dtype));
    bool aligned = in.cols % vector == 0;
    for (const void* data : memory)
      aligned = aligned && reinterpret_cast<uintptr_t>(data) % 16 == 0;
    if (!aligned) vector = 1;
    const int64_t vectors = in.cols / vector;
    threads = vectors <= 128 ? 32 : vectors <= 512 ? 128 : vectors <= 2048 ? 256 : kNormThreads;
    each_block = threads == 32 ? 4 : 1;
  }

  // As many lines of floats as fit into shared memory go there.
  int64_t bytes(const Norm& in, int64_t lines) const {
    return lines * in.cols * kFloat * each_block;
  }
  bool fit(const Norm& in, int64_t lines) const { return bytes(in, lines) <= kMostShared; }

  Shape shape(const Norm& in, int64_t blocks, int64_t lines) const {
    return {{static_cast<uint32_t>(blocks), 1, 1},
            {static_cast<uint32_t>(threads), static_cast<uint32_t>(each_block), 1},
            static_cast<uint32_t>(bytes(in, lines))};
  }
};

std::string name(const char* direction, const Norm& in, const Teams& teams) {
  const bool apart = in.residual_dtype != in.dtype;
  return "norm_" + std::string(direction) + "_" + name_of(in.dtype) + (apart ? "_f32" : "") + "_x" +
         std::to_string(teams.vector);
}

NormScalars scalars(const Norm& in) {
  NormScalars to{};
  to.rows = in.rows;
  to.cols = static_cast<int32_t>(in.cols);
  to.centred = in.centred;
  to.wide_weight = in.weight_dtype == Dtype::f32;
  to.wide_bias = in.bias_dtype == Dtype::f32;
  to.threshold = dropout_threshold(in.dropout_p);
  to.kept = static_cast<float>(in.dropout_p < 1 ? 1 / (1 - in.dropout_p) : 0);
  return to;
}

// The tensors of a norm as arguments.
struct Tensors {
  const Norm& in;
  int64_t size = in.rows * in.cols;

  int64_t wide() const { return size * size_of(in.residual_dtype); }
  int64_t narrow() const { return size * size_of(in.dtype); }
  int64_t statistics() const { return in.rows * kFloat; }
  Memory input() const { return reads(in.input, narrow()); }
  Memory residual() const { return reads(in.residual, wide()); }
  Memory weight() const { return reads(in.weight, in.cols * size_of(in.weight_dtype)); }
  Memory bias() const { return reads(in.bias, in.cols * size_of(in.bias_dtype)); }
  Memory seed() const { return reads(in.device_seed, sizeof(uint64_t)); }
};

}  // namespace

void norm_forward(const NormForward& args, Device& device) {
  const Norm& in = args.in;
  const Teams teams(in, {in.input, in.residual, in.weight, in.bias, args.out, args.summed});
  const Tensors of{in};
  NormScalars numbers = scalars(in);
  numbers.eps = static_cast<float>(args.eps);
  numbers.cached = teams.fit(in, 1);
  const int64_t blocks = (in.rows + teams.each_block - 1) / teams.each_block;
  launch(device, "norm", name("forward", in, teams), teams.shape(in, blocks, numbers.cached),
         of.input(), of.residual(), of.weight(), of.bias(), of.seed(),
         writes(args.out, of.narrow()), writes(args.summed, of.wide()),
         writes(in.centred ? args.mean : nullptr, of.statistics()),
         writes(args.rstd, of.statistics()), numbers);
}

void norm_backward(const NormBackward& args, Device& device) {
  const Norm& in = args.in;
  const Teams teams(in, {args.grad_out, args.grad_summed, in.input, in.residual, args.summed,
                         in.weight, args.grad_input, args.grad_residual});
  const Tensors of{in};
  const int64_t blocks = std::min((in.rows + teams.each_block - 1) / teams.each_block, kMostParts);
  const int64_t parts = blocks * teams.each_block, part_bytes = parts * in.cols * kFloat;
  void* weight_parts = args.grad_weight == nullptr ? nullptr : device.scratch(part_bytes);
  void* bias_parts = args.grad_bias == nullptr ? nullptr : device.scratch(part_bytes);
  const int64_t sums = (weight_parts != nullptr) + (bias_parts != nullptr);
  NormScalars numbers = scalars(in);
  numbers.sums = sums > 0 && teams.fit(in, sums);
  const int64_t lines = numbers.sums ? sums : 0;
  numbers.cached = teams.fit(in, lines + 2);
  launch(device, "norm", name("backward", in, teams),
         teams.shape(in, blocks, lines + (numbers.cached ? 2 : 0)),
         reads(args.grad_out, of.narrow()), reads(args.grad_summed, of.wide()), of.input(),
         of.residual(), reads(args.summed, of.wide()), of.weight(), of.seed(),
         reads(args.mean, of.statistics()), reads(args.rstd, of.statistics()),
         writes(args.grad_input, of.narrow()), writes(args.grad_residual, of.wide()),
         writes(weight_parts, part_bytes), writes(bias_parts, part_bytes), numbers);

  const auto fold = [&](void* parts_of, void* grad, Dtype dtype) {
    if (grad == nullptr) return;
    const Shape shape{{static_cast<uint32_t>((in.cols + 31) / 32), 1, 1}, {32, kFolders, 1}};
    launch(device, "norm", "norm_fold_" + name_of(dtype), shape, reads(parts_of, part_bytes),
           writes(grad, in.cols * size_of(dtype)), static_cast<int32_t>(parts),
           static_cast<int32_t>(in.cols), static_cast<int32_t>(teams.vector));
  };
  fold(weight_parts, args.grad_weight, in.weight_dtype);
  fold(bias_parts, args.grad_bias, in.bias_dtype);
}

}  // namespace fastattn::cuda
