// Launches of the norm room's CUDA kernels: which kernel, how many threads, how much memory.
#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdlib>
#include <initializer_list>

#include "norm/norm.h"
#include "norm/scalars.h"

namespace fastattn::cuda {
namespace {

constexpr int64_t kFloat = sizeof(float);
// Of an H200. A backward fills them once, by its registers, and gives each block a part of the
// sums; the constants stand for every GPU, so that the order of the sums is the same on all.
constexpr int64_t kMultiprocessors = 132, kResident = 512;

// The teams of a launch, a row each, and how many of them share a block of `most` threads.
struct Teams {
  int64_t vector;  // neighbouring columns that a thread moves together
  int64_t threads, each_block;
  bool whole;  // whether their registers hold a row

  Teams(const Norm& in, int64_t most, std::initializer_list<const void*> memory) {
    vector = 16 / std::max(size_of(in.dtype), size_of(in.residual_dtype));
    bool aligned = in.cols % vector == 0;
    for (const void* data : memory)
      aligned = aligned && reinterpret_cast<uintptr_t>(data) % 16 == 0;
    if (!aligned) vector = 1;
    const uint64_t wanted = (in.cols / vector + kHeld - 1) / kHeld;
    // Dropout draws for whole warps.
    const uint64_t least = in.dropout_p > 0 ? 32 : 4;
    threads = std::min<uint64_t>(
        wanted <= 32 ? std::bit_ceil(std::max(wanted, least)) : (wanted + 31) / 32 * 32,
        kNormThreads);
    whole = in.cols <= threads * kHeld * vector;
    each_block = std::bit_floor<uint64_t>(std::max<int64_t>(most / threads, 1));
  }

  int64_t blocks(const Norm& in) const { return (in.rows + each_block - 1) / each_block; }

  Shape shape(int64_t blocks, int64_t shared = 0) const {
    return {{static_cast<uint32_t>(blocks), 1, 1},
            {static_cast<uint32_t>(threads), static_cast<uint32_t>(each_block), 1},
            static_cast<uint32_t>(shared)};
  }
};

std::string name(const char* direction, const Norm& in, const Teams& teams) {
  const bool apart = in.residual_dtype != in.dtype;
  return "norm_" + std::string(direction) + "_" + name_of(in.dtype) + (apart ? "_f32" : "") + "_x" +
         std::to_string(teams.vector) + (teams.whole ? "" : "_long");
}

NormScalars scalars(const Norm& in) {
  NormScalars to{};
  to.rows = in.rows;
  to.cols = static_cast<int32_t>(in.cols);
  to.centred = in.centred;
  to.wide_weight = in.weight_dtype == Dtype::f32;
  to.wide_bias = in.bias_dtype == Dtype::f32;
  to.share = 1 / static_cast<float>(in.cols);
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
  const Teams teams(in, kForwardThreads,
                    {in.input, in.residual, in.weight, in.bias, args.out, args.summed});
  const Tensors of{in};
  NormScalars numbers = scalars(in);
  numbers.eps = static_cast<float>(args.eps);
  const bool plain = in.residual == nullptr && teams.vector > 1 && teams.whole;
  launch(device, "norm", name(plain ? "forward_plain" : "forward", in, teams),
         teams.shape(teams.blocks(in)), of.input(), of.residual(), of.weight(), of.bias(),
         of.seed(), writes(args.out, of.narrow()), writes(args.summed, of.wide()),
         writes(in.centred ? args.mean : nullptr, of.statistics()),
         writes(args.rstd, of.statistics()), numbers);
}

void norm_backward(const NormBackward& args, Device& device) {
  const Norm& in = args.in;
  const Teams teams(in, kBackwardThreads,
                    {args.grad_out, args.grad_summed, in.input, in.residual, args.summed, in.weight,
                     args.grad_input, args.grad_residual});
  const Tensors of{in};
  const int64_t threads = teams.threads * teams.each_block;
  const int64_t at_once = kMultiprocessors * (kResident / threads);
  // At least one, which sums nothing up where there are no rows.
  const int64_t parts = std::clamp<int64_t>(teams.blocks(in), 1, at_once);
  const int64_t part_bytes = parts * in.cols * kFloat;
  const bool of_weight = args.grad_weight != nullptr, of_bias = args.grad_bias != nullptr;
  const bool sums = of_weight || of_bias;
  char* const all_parts =  // at once, for torch takes two microseconds to find memory
      sums ? static_cast<char*>(device.scratch((of_weight + of_bias) * part_bytes)) : nullptr;
  char* const weight_parts = of_weight ? all_parts : nullptr;
  char* const bias_parts = of_bias ? all_parts + of_weight * part_bytes : nullptr;
  // Registers hold one of a thread's sums, shared memory the other.
  const int64_t shared = teams.whole ? threads * kHeld * teams.vector * kFloat : 0;
  launch(device, "norm", name("backward", in, teams), teams.shape(parts, shared),
         reads(args.grad_out, of.narrow()), reads(args.grad_summed, of.wide()), of.input(),
         of.residual(), reads(args.summed, of.wide()),
         args.grad_out == nullptr ? Memory{} : of.weight(), of.seed(),
         reads(args.mean, of.statistics()), reads(args.rstd, of.statistics()),
         writes(args.grad_input, of.narrow()), writes(args.grad_residual, of.wide()),
         writes(weight_parts, part_bytes), writes(bias_parts, part_bytes), scalars(in));
  if (!sums) return;

  const NormFold fold{static_cast<int32_t>(parts), static_cast<int32_t>(in.cols),
                      in.weight_dtype == Dtype::f32, in.bias_dtype == Dtype::f32};
  const Shape shape{{static_cast<uint32_t>((in.cols + 31) / 32), 2, 1}, {32, kFolders, 1}};
  launch(device, "norm", "norm_fold_" + name_of(in.dtype), shape, reads(weight_parts, part_bytes),
         reads(bias_parts, part_bytes),
         writes(args.grad_weight, in.cols * size_of(in.weight_dtype)),
         writes(args.grad_bias, in.cols * size_of(in.bias_dtype)), fold);
}

}  // namespace fastattn::cuda
