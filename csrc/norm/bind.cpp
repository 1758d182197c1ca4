// The torch ops of the norm room: layer_norm and rms_norm, forward and backward.
#include <algorithm>
#include <cmath>
#include <limits>

#include "common/tensor.h"
#include "norm/norm.h"

namespace fastattn {
namespace {

// A contiguous tensor of `dtype` with as many elements as the others ask for, or null.
const void* read(const char* name, const OptionalTensor& tensor, int64_t count, Dtype dtype) {
  if (!tensor.has_value()) return nullptr;
  FASTATTN_CHECK(tensor->is_contiguous() && tensor->numel() == count, name,
                 " has not the shape that the others ask for");
  check_dtype(name, *tensor, dtype);
  return tensor->const_data_ptr();
}

// The same of the last `dims` sizes of `input`.
const void* read_like(const char* name, const OptionalTensor& tensor, const Tensor& input,
                      int64_t dims, int64_t count, Dtype dtype) {
  if (!tensor.has_value()) return nullptr;
  const int64_t lead = input.dim() - dims;
  bool same = tensor->dim() == dims;
  for (int64_t dim = 0; same && dim < dims; dim++)
    same = tensor->size(dim) == input.size(lead + dim);
  FASTATTN_CHECK(same, name, " has not the shape that input asks for");
  return read(name, tensor, count, dtype);
}

// The dtype of a tensor that may be fp32 where input is not; `missing` without one.
Dtype own_dtype(const char* name, const OptionalTensor& tensor, Dtype dtype, Dtype missing) {
  if (!tensor.has_value()) return missing;
  const Dtype own = dtype_of(*tensor);
  FASTATTN_CHECK(own == dtype || own == Dtype::f32, name, " must be fp32 or of input's dtype");
  return own;
}

// What both directions take, checked; `dims` trailing dimensions are normalised together.
Norm checked(const Tensor& input, const OptionalTensor& residual, const OptionalTensor& weight,
             const OptionalTensor& bias, const OptionalTensor& seed, int64_t dims, double dropout_p,
             bool centred) {
  Norm norm{};
  FASTATTN_CHECK(input.is_contiguous(), "input must be contiguous");
  FASTATTN_CHECK(dims > 0 && dims <= input.dim(), "dims must be in [1, input.dim()]");
  norm.dtype = dtype_of(input);
  FASTATTN_CHECK(norm.dtype != Dtype::f64 || !on_gpu(place_of(input)), "no CUDA kernel takes fp64");
  norm.rows = norm.cols = 1;
  for (int64_t dim = 0; dim < input.dim(); dim++)
    (dim < input.dim() - dims ? norm.rows : norm.cols) *= input.size(dim);
  norm.input = input.const_data_ptr();
  norm.residual_dtype = own_dtype("residual", residual, norm.dtype, norm.dtype);
  FASTATTN_CHECK(norm.dtype != Dtype::f64 || norm.residual_dtype == Dtype::f64,
                 "residual must be fp64 as input is");
  norm.residual = read_like("residual", residual, input, input.dim(), norm.rows * norm.cols,
                            norm.residual_dtype);
  norm.weight_dtype = own_dtype("weight", weight, norm.dtype, wide(norm.dtype));
  norm.weight = read_like("weight", weight, input, dims, norm.cols, norm.weight_dtype);
  norm.bias_dtype = own_dtype("bias", bias, norm.dtype, wide(norm.dtype));
  norm.bias = read_like("bias", bias, input, dims, norm.cols, norm.bias_dtype);
  norm.centred = centred;
  norm.dropout_p = dropout_p;
  const Seed own = checked_seed(dropout_p, seed, place_of(input));
  norm.seed = own.value;
  norm.device_seed = own.address;
  if (dropout_p == 0) return norm;
  FASTATTN_CHECK(residual.has_value(), "dropout needs a residual");
  FASTATTN_CHECK(norm.rows >> 32 == 0, "dropout counts up to 2^32 rows");
  return norm;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> forward(
    const Tensor& input, const OptionalTensor& residual, const OptionalTensor& weight,
    const OptionalTensor& bias, const OptionalTensor& seed, int64_t dims, double eps,
    double dropout_p, bool keep_sum, bool centred) {
  const Norm norm = checked(input, residual, weight, bias, seed, dims, dropout_p, centred);
  FASTATTN_CHECK(std::isfinite(eps), "eps must be finite");
  const bool sums = keep_sum && residual.has_value();
  const Place place = place_of(input);
  Tensor out = empty_like(input, norm.dtype);
  Tensor summed =
      sums ? empty_like(input, norm.residual_dtype) : empty(0, norm.residual_dtype, place);
  Tensor rstd = empty(norm.rows, wide(norm.dtype), place);
  Tensor mean = empty(centred ? norm.rows : 0, wide(norm.dtype), place);
  const NormForward args{norm,
                         eps,
                         out.mutable_data_ptr(),
                         sums ? summed.mutable_data_ptr() : nullptr,
                         centred ? mean.mutable_data_ptr() : nullptr,
                         rstd.mutable_data_ptr()};
  run(place, args, norm_forward, cuda::norm_forward);
  return {out, summed, mean, rstd};
}

// What a plain call asks for: the output and, if wanted, the sum.
std::tuple<Tensor, OptionalTensor> plain(const Tensor& any, const OptionalTensor& residual,
                                         const OptionalTensor& weight, const OptionalTensor& bias,
                                         const std::vector<int64_t>& shape,
                                         std::optional<double> given, bool keep_sum, bool centred) {
  const Tensor input = contiguous_on_cpu("input", any);
  const auto dims = static_cast<int64_t>(shape.size());
  const Norm norm = checked(input, residual, weight, bias, std::nullopt, dims, 0, centred);
  FASTATTN_CHECK(std::equal(shape.begin(), shape.end(), input.sizes().end() - dims),
                 "normalized_shape must be the last dimensions of input");
  const double eps =
      given.value_or(wide(norm.dtype) == Dtype::f64 ? std::numeric_limits<double>::epsilon()
                                                    : std::numeric_limits<float>::epsilon());
  FASTATTN_CHECK(std::isfinite(eps), "eps must be finite");
  Tensor out = empty_like(input, norm.dtype);
  OptionalTensor summed;
  if (keep_sum) summed = empty_like(input, norm.residual_dtype);
  norm_forward({norm, eps, out.mutable_data_ptr(), keep_sum ? summed->mutable_data_ptr() : nullptr,
                nullptr, nullptr});
  return {out, summed};
}

Tensor layer_norm(Tensor input, OptionalTensor weight, OptionalTensor bias,
                  std::vector<int64_t> shape, double eps) {
  return std::get<0>(plain(input, std::nullopt, weight, bias, shape, eps, false, true));
}

Tensor rms_norm(Tensor input, OptionalTensor weight, std::vector<int64_t> shape,
                std::optional<double> eps) {
  return std::get<0>(plain(input, std::nullopt, weight, std::nullopt, shape, eps, false, false));
}

std::tuple<Tensor, OptionalTensor> add_layer_norm(Tensor input, Tensor residual,
                                                  OptionalTensor weight, OptionalTensor bias,
                                                  std::vector<int64_t> shape, double eps,
                                                  bool return_sum) {
  return plain(input, residual, weight, bias, shape, eps, return_sum, true);
}

std::tuple<Tensor, OptionalTensor> add_rms_norm(Tensor input, Tensor residual,
                                                OptionalTensor weight, std::vector<int64_t> shape,
                                                std::optional<double> eps, bool return_sum) {
  return plain(input, residual, weight, std::nullopt, shape, eps, return_sum, false);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> backward(
    const OptionalTensor& grad_out, const OptionalTensor& grad_summed, const Tensor& input,
    const OptionalTensor& residual, const OptionalTensor& summed, const OptionalTensor& weight,
    const OptionalTensor& bias, const OptionalTensor& seed, const OptionalTensor& mean,
    const Tensor& rstd, int64_t dims, double dropout_p) {
  const bool centred = mean.has_value();
  const Norm norm = checked(input, residual, weight, bias, seed, dims, dropout_p, centred);
  const int64_t size = norm.rows * norm.cols;
  const Place place = place_of(input);
  const bool apart = residual.has_value() && (dropout_p > 0 || norm.residual_dtype != norm.dtype);
  FASTATTN_CHECK(residual.has_value() || !(summed.has_value() || grad_summed.has_value()),
                 "there is no sum without a residual");
  const auto like = [&](const OptionalTensor& tensor, Dtype dtype) {
    return tensor.has_value() ? empty_like(*tensor, dtype) : empty(0, norm.dtype, place);
  };
  Tensor grad_input = empty_like(input, norm.dtype);
  Tensor grad_residual = like(apart ? residual : std::nullopt, norm.residual_dtype);
  Tensor grad_weight = like(weight, norm.weight_dtype), grad_bias = like(bias, norm.bias_dtype);
  const NormBackward args{norm,
                          read("grad_out", grad_out, size, norm.dtype),
                          read("grad_summed", grad_summed, size, norm.residual_dtype),
                          read("summed", summed, size, norm.residual_dtype),
                          read("mean", mean, norm.rows, wide(norm.dtype)),
                          read("rstd", rstd, norm.rows, wide(norm.dtype)),
                          grad_input.mutable_data_ptr(),
                          apart ? grad_residual.mutable_data_ptr() : nullptr,
                          weight.has_value() ? grad_weight.mutable_data_ptr() : nullptr,
                          bias.has_value() ? grad_bias.mutable_data_ptr() : nullptr};
  run(place, args, norm_backward, cuda::norm_backward);
  return {grad_input, grad_residual, grad_weight, grad_bias};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> layer_norm_fwd(Tensor input, OptionalTensor residual,
                                                          OptionalTensor weight,
                                                          OptionalTensor bias, OptionalTensor seed,
                                                          int64_t dims, double eps,
                                                          double dropout_p, bool keep_sum) {
  return forward(input, residual, weight, bias, seed, dims, eps, dropout_p, keep_sum, true);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> layer_norm_bwd(
    OptionalTensor grad_out, OptionalTensor grad_summed, Tensor input, OptionalTensor residual,
    OptionalTensor summed, OptionalTensor weight, OptionalTensor bias, OptionalTensor seed,
    Tensor mean, Tensor rstd, int64_t dims, double, double dropout_p) {
  return backward(grad_out, grad_summed, input, residual, summed, weight, bias, seed, mean, rstd,
                  dims, dropout_p);
}

std::tuple<Tensor, Tensor, Tensor> rms_norm_fwd(Tensor input, OptionalTensor residual,
                                                OptionalTensor weight, OptionalTensor seed,
                                                int64_t dims, double eps, double dropout_p,
                                                bool keep_sum) {
  auto [out, summed, mean, rstd] =
      forward(input, residual, weight, std::nullopt, seed, dims, eps, dropout_p, keep_sum, false);
  return {out, summed, rstd};
}

std::tuple<Tensor, Tensor, Tensor> rms_norm_bwd(OptionalTensor grad_out, OptionalTensor grad_summed,
                                                Tensor input, OptionalTensor residual,
                                                OptionalTensor summed, OptionalTensor weight,
                                                OptionalTensor seed, Tensor rstd, int64_t dims,
                                                double, double dropout_p) {
  auto [grad_input, grad_residual, grad_weight, grad_bias] =
      backward(grad_out, grad_summed, input, residual, summed, weight, std::nullopt, seed,
               std::nullopt, rstd, dims, dropout_p);
  return {grad_input, grad_residual, grad_weight};
}

template <class Library>
void implement(Library& library) {
  library.impl("layer_norm_fwd", TORCH_BOX(&layer_norm_fwd));
  library.impl("layer_norm_bwd", TORCH_BOX(&layer_norm_bwd));
  library.impl("rms_norm_fwd", TORCH_BOX(&rms_norm_fwd));
  library.impl("rms_norm_bwd", TORCH_BOX(&rms_norm_bwd));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastattn, CPU, library) {
  implement(library);
  library.impl("layer_norm.plain", TORCH_BOX(&layer_norm));
  library.impl("add_layer_norm.plain", TORCH_BOX(&add_layer_norm));
  library.impl("rms_norm.plain", TORCH_BOX(&rms_norm));
  library.impl("add_rms_norm.plain", TORCH_BOX(&add_rms_norm));
}
STABLE_TORCH_LIBRARY_IMPL(fastattn, CUDA, library) { implement(library); }

}  // namespace fastattn
