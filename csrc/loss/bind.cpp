// The torch ops of the loss room on the CPU: linear_cross_entropy, forward and backward.
#include "common/tensor.h"
#include "loss/loss.h"

namespace fastattn {
namespace {

// The rows whose target is a class.
std::vector<int64_t> live_rows(const Tensor& target, int64_t rows, int64_t classes,
                               int64_t ignore_index) {
  FASTATTN_CHECK(target.scalar_type() == torch::headeronly::ScalarType::Long &&
                     target.is_contiguous() && target.numel() == rows,
                 "target must be contiguous int64, one for each row of input");
  const auto* data = static_cast<const int64_t*>(target.const_data_ptr());
  std::vector<int64_t> live;
  for (int64_t row = 0; row < rows; row++) {
    if (data[row] == ignore_index) continue;
    FASTATTN_CHECK(data[row] >= 0 && data[row] < classes, "target must be in [0, ", classes,
                   ") or ignore_index = ", ignore_index, ", got ", data[row]);
    live.push_back(row);
  }
  return live;
}

// A call, complete but for what it writes and the memory that it works in; `live` is to outlast it.
LinearCrossEntropy checked(const Tensor& input, const Tensor& weight, const OptionalTensor& bias,
                           const Tensor& target, int64_t ignore_index, double label_smoothing,
                           double softcap, std::vector<int64_t>& live) {
  check_matrix("linear_weight", weight);
  live = live_rows(target, rows_of("input", input), weight.size(0), ignore_index);
  LinearCrossEntropy args{};
  args.dtype = dtype_of(input);
  args.rows = rows_of("input", input);
  args.features = input.size(input.dim() - 1), args.classes = weight.size(0);
  check_sizes("linear_weight", weight, {args.classes, args.features});
  check_dtype("linear_weight", weight, args.dtype);
  if (bias.has_value()) {
    check_sizes("linear_bias", *bias, {args.classes});
    check_dtype("linear_bias", *bias, args.dtype);
  }
  FASTATTN_CHECK(label_smoothing >= 0 && label_smoothing <= 1, "label_smoothing must be in [0, 1]");
  FASTATTN_CHECK(softcap >= 0 && softcap < 1e30, "softcap must be positive, or 0 for none");
  args.input = input.const_data_ptr(), args.weight = weight.const_data_ptr();
  args.bias = read(bias);
  args.target = static_cast<const int64_t*>(target.const_data_ptr());
  args.live = live.data(), args.count = static_cast<int64_t>(live.size());
  args.label_smoothing = label_smoothing, args.softcap = softcap;
  args.scale = args.loss_scale = 1;
  return args;
}

void* write(const Tensor& tensor) { return tensor.numel() ? tensor.mutable_data_ptr() : nullptr; }

void compute(LinearCrossEntropy args) {
  // Rows enough that reading the weight for each chunk costs little beside its products, and else
  // as many logits as the cache may hold.
  constexpr int64_t most_bytes = 4 << 20, fewest_rows = 256;
  const Dtype kept = wide(args.dtype);
  args.logits_row = (args.classes + 15) / 16 * 16;
  const int64_t row_bytes = std::max<int64_t>(1, args.logits_row) * (kept == Dtype::f64 ? 8 : 4);
  const int64_t most = std::max(fewest_rows, most_bytes / row_bytes);
  const int64_t chunks = std::max<int64_t>(1, (args.count + most - 1) / most);
  args.chunk = std::max<int64_t>(1, (args.count + chunks - 1) / chunks);
  const bool computes = args.count > 0;
  Tensor logits = empty(computes ? args.chunk * args.logits_row : 0, kept);
  const bool gathers = computes && args.count < args.rows;
  Tensor gathered = empty(gathers ? args.chunk * args.features : 0, args.dtype);
  args.logits = logits.mutable_data_ptr(), args.gathered = gathered.mutable_data_ptr();
  linear_cross_entropy(args);
}

// How losses of rows become one, if they do.
struct Reduction {
  bool reduced, mean;

  explicit Reduction(StringHandle argument) {
    const std::string name = taken(argument);
    reduced = name != "none", mean = name == "mean";
    FASTATTN_CHECK(!reduced || mean || name == "sum", "reduction '", name, "' is unknown");
  }
};

// Tensors for the gradients by input, weight and bias, which the call then writes, in at least
// fp32; empty where not wanted.
std::array<Tensor, 3> gradients(LinearCrossEntropy& args, const Tensor& input, const Tensor& weight,
                                const OptionalTensor& bias, std::array<bool, 3> wanted) {
  const Dtype kept = wide(args.dtype);
  const auto like = [&](bool needed, const OptionalTensor& tensor) {
    return needed && tensor.has_value() ? empty_like(*tensor, kept) : empty(0, kept);
  };
  std::array<Tensor, 3> found{like(wanted[0], input), like(wanted[1], weight),
                              like(wanted[2], bias)};
  args.grad_input = write(found[0]), args.grad_weight = write(found[1]);
  args.grad_bias = write(found[2]);
  return found;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> linear_cross_entropy_fwd(
    Tensor input, Tensor weight, OptionalTensor bias, Tensor target, StringHandle reduction,
    int64_t ignore_index, double label_smoothing, double softcap, bool save_input, bool save_weight,
    bool save_bias) {
  const auto [reduced, mean] = Reduction(reduction);
  std::vector<int64_t> live;
  LinearCrossEntropy args =
      checked(input, weight, bias, target, ignore_index, label_smoothing, softcap, live);
  const Dtype kept = wide(args.dtype);
  if (mean) args.scale = args.loss_scale = 1.0 / static_cast<double>(args.count);
  const auto found = gradients(args, input, weight, bias, {save_input, save_weight, save_bias});
  Tensor losses = reduced ? empty(args.rows, kept) : empty_like(target, kept);
  Tensor loss = reduced ? empty(std::vector<int64_t>{}, kept) : losses;
  args.losses = losses.mutable_data_ptr();
  args.loss = reduced ? loss.mutable_data_ptr() : nullptr;
  compute(args);
  return {loss, found[0], found[1], found[2]};
}

std::tuple<Tensor, Tensor, Tensor> linear_cross_entropy_bwd(
    Tensor grad_loss, Tensor input, Tensor weight, OptionalTensor bias, Tensor target,
    StringHandle reduction, int64_t ignore_index, double label_smoothing, double softcap,
    bool need_input, bool need_weight, bool need_bias) {
  const auto [reduced, mean] = Reduction(reduction);
  std::vector<int64_t> live;
  LinearCrossEntropy args =
      checked(input, weight, bias, target, ignore_index, label_smoothing, softcap, live);
  const Dtype kept = wide(args.dtype);
  check_dtype("grad_loss", grad_loss, kept);
  FASTATTN_CHECK(grad_loss.is_contiguous() && grad_loss.numel() == (reduced ? 1 : args.rows),
                 "grad_loss has not the shape of the loss");
  if (mean) args.scale = 1.0 / static_cast<double>(args.count);
  if (reduced) {
    const void* data = grad_loss.const_data_ptr();
    args.scale *= kept == Dtype::f64 ? *static_cast<const double*>(data)
                                     : static_cast<double>(*static_cast<const float*>(data));
  } else {
    args.grad_losses = grad_loss.const_data_ptr();
  }
  const auto found = gradients(args, input, weight, bias, {need_input, need_weight, need_bias});
  Tensor losses = empty(args.rows, kept);
  args.losses = losses.mutable_data_ptr();
  compute(args);
  return {found[0], found[1], found[2]};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastattn, CPU, library) {
  library.impl("linear_cross_entropy_fwd", TORCH_BOX(&linear_cross_entropy_fwd));
  library.impl("linear_cross_entropy_bwd", TORCH_BOX(&linear_cross_entropy_bwd));
}

}  // namespace fastattn
