// The torch ops of the norm room on the CPU: layer_norm and rms_norm, forward and backward.
#include "common/tensor.h"
#include "norm/norm.h"

namespace fastattn {
namespace {

struct Parameter {
  const void* data = nullptr;
  Dtype dtype = Dtype::f32;
};

Parameter parameter(const char* name, const OptionalTensor& tensor, int64_t cols, Dtype dtype) {
  if (!tensor.has_value()) return {nullptr, wide(dtype)};
  check_sizes(name, *tensor, {cols});
  const Dtype own = dtype_of(*tensor);
  FASTATTN_CHECK(own == dtype || own == Dtype::f32, name, " must be fp32 or of input's dtype");
  return {tensor->const_data_ptr(), own};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> forward(const Tensor& input,
                                                   const OptionalTensor& residual,
                                                   const OptionalTensor& weight,
                                                   const OptionalTensor& bias, double eps,
                                                   bool centred) {
  check_matrix("input", input);
  const Dtype dtype = dtype_of(input);
  const int64_t rows = input.size(0), cols = input.size(1);
  if (residual.has_value()) {
    check_sizes("residual", *residual, {rows, cols});
    check_dtype("residual", *residual, dtype);
  }
  const Parameter scale = parameter("weight", weight, cols, dtype);
  const Parameter shift = parameter("bias", bias, cols, dtype);
  Tensor out = empty(rows, cols, dtype);
  Tensor summed = residual.has_value() ? empty(rows, cols, dtype) : empty(0, dtype);
  Tensor mean = empty(centred ? rows : 0, wide(dtype)), rstd = empty(rows, wide(dtype));
  norm_forward({dtype, rows, cols, input.const_data_ptr(), read(residual), scale.data, shift.data,
                scale.dtype, shift.dtype, centred, eps, out.mutable_data_ptr(),
                residual.has_value() ? summed.mutable_data_ptr() : nullptr, mean.mutable_data_ptr(),
                rstd.mutable_data_ptr()});
  return {out, summed, mean, rstd};
}

std::tuple<Tensor, Tensor, Tensor> backward(const OptionalTensor& grad_out,
                                            const OptionalTensor& grad_summed, const Tensor& summed,
                                            const OptionalTensor& weight,
                                            const OptionalTensor& bias, const OptionalTensor& mean,
                                            const Tensor& rstd) {
  check_matrix("summed", summed);
  const Dtype dtype = dtype_of(summed);
  const int64_t rows = summed.size(0), cols = summed.size(1);
  for (const auto* grad : {&grad_out, &grad_summed})
    if (grad->has_value()) {
      check_sizes("grad", **grad, {rows, cols});
      check_dtype("grad", **grad, dtype);
    }
  if (mean.has_value()) {
    check_sizes("mean", *mean, {rows});
    check_dtype("mean", *mean, wide(dtype));
  }
  check_sizes("rstd", rstd, {rows});
  check_dtype("rstd", rstd, wide(dtype));
  const Parameter scale = parameter("weight", weight, cols, dtype);
  const Parameter shift = parameter("bias", bias, cols, dtype);
  Tensor grad_input = empty(rows, cols, dtype);
  Tensor grad_weight =
      empty(weight.has_value() ? cols : 0, weight.has_value() ? scale.dtype : dtype);
  Tensor grad_bias = empty(bias.has_value() ? cols : 0, bias.has_value() ? shift.dtype : dtype);
  norm_backward({dtype, rows, cols, read(grad_out), read(grad_summed), summed.const_data_ptr(),
                 scale.data, scale.dtype, shift.dtype, mean.has_value(), read(mean),
                 rstd.const_data_ptr(), grad_input.mutable_data_ptr(),
                 weight.has_value() ? grad_weight.mutable_data_ptr() : nullptr,
                 bias.has_value() ? grad_bias.mutable_data_ptr() : nullptr});
  return {grad_input, grad_weight, grad_bias};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> layer_norm_fwd(Tensor input, OptionalTensor residual,
                                                          OptionalTensor weight,
                                                          OptionalTensor bias, double eps) {
  return forward(input, residual, weight, bias, eps, true);
}

std::tuple<Tensor, Tensor, Tensor> layer_norm_bwd(OptionalTensor grad_out,
                                                  OptionalTensor grad_summed, Tensor summed,
                                                  OptionalTensor weight, OptionalTensor bias,
                                                  Tensor mean, Tensor rstd, double) {
  return backward(grad_out, grad_summed, summed, weight, bias, mean, rstd);
}

std::tuple<Tensor, Tensor, Tensor> rms_norm_fwd(Tensor input, OptionalTensor residual,
                                                OptionalTensor weight, double eps) {
  auto [out, summed, mean, rstd] = forward(input, residual, weight, std::nullopt, eps, false);
  return {out, summed, rstd};
}

std::tuple<Tensor, Tensor> rms_norm_bwd(OptionalTensor grad_out, OptionalTensor grad_summed,
                                        Tensor summed, OptionalTensor weight, Tensor rstd, double) {
  auto [grad_input, grad_weight, grad_bias] =
      backward(grad_out, grad_summed, summed, weight, std::nullopt, std::nullopt, rstd);
  return {grad_input, grad_weight};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastattn, CPU, library) {
  library.impl("layer_norm_fwd", TORCH_BOX(&layer_norm_fwd));
  library.impl("layer_norm_bwd", TORCH_BOX(&layer_norm_bwd));
  library.impl("rms_norm_fwd", TORCH_BOX(&rms_norm_fwd));
  library.impl("rms_norm_bwd", TORCH_BOX(&rms_norm_bwd));
}

}  // namespace fastattn
