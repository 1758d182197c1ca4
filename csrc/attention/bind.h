// What the ops of the attention room check alike.
#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

#include "attention/attention.h"
#include "common/tensor.h"

namespace fastattn {

inline void check_integers(const char* name, const Tensor& tensor, int64_t dims) {
  const auto type = tensor.scalar_type();
  FASTATTN_CHECK(tensor.dim() == dims && (type == torch::headeronly::ScalarType::Int ||
                                          type == torch::headeronly::ScalarType::Long),
                 name, " must be int32 or int64 of ", dims,
                 dims == 1 ? " dimension" : " dimensions");
}

// The numbers of a tensor of int32 or int64 with `dims` dimensions, row by row.
inline std::vector<int64_t> integers(const char* name, const Tensor& tensor, int64_t dims = 1) {
  check_integers(name, tensor, dims);
  const bool narrow = tensor.scalar_type() == torch::headeronly::ScalarType::Int;
  const int64_t rows = dims == 1 ? 1 : tensor.size(0), cols = tensor.size(dims - 1);
  const int64_t row_stride = dims == 1 ? 0 : tensor.stride(0), stride = tensor.stride(dims - 1);
  std::vector<int64_t> numbers;
  numbers.reserve(static_cast<size_t>(rows * cols));
  const void* data = tensor.const_data_ptr();
  for (int64_t row = 0; row < rows; row++)
    for (int64_t col = 0; col < cols; col++) {
      const int64_t from = row * row_stride + col * stride;
      numbers.push_back(narrow ? static_cast<const int32_t*>(data)[from]
                               : static_cast<const int64_t*>(data)[from]);
    }
  return numbers;
}

// The same numbers where they are, for a kernel to read and check.
inline Integers unread(const char* name, const Tensor& tensor, int64_t dims = 1) {
  const auto type = tensor.scalar_type();
  check_integers(name, tensor, dims);
  return {tensor.const_data_ptr(),
          {dims == 1 ? 0 : tensor.stride(0), tensor.stride(dims - 1)},
          type == torch::headeronly::ScalarType::Long};
}

// Longest first, for what is left to do last should be short.
inline void sort(std::vector<Sequence>& sequences) {
  const auto size = [](const Sequence& one) {
    return static_cast<double>(one.q_len) * static_cast<double>(one.kv_len);
  };
  std::stable_sort(sequences.begin(), sequences.end(),
                   [&](const Sequence& a, const Sequence& b) { return size(a) > size(b); });
}

inline void set_terms_of_heads(Attention& in, const OptionalTensor& alibi_slopes,
                               const OptionalTensor& sinks) {
  in.alibi_slopes = nullptr;
  if (alibi_slopes.has_value()) {
    check_sizes("alibi_slopes", *alibi_slopes, {in.batch, in.heads});
    check_dtype("alibi_slopes", *alibi_slopes, Dtype::f32);
    in.alibi_slopes = static_cast<const float*>(alibi_slopes->const_data_ptr());
  }
  in.sinks = nullptr;
  if (sinks.has_value()) {
    check_sizes("sinks", *sinks, {in.heads});
    check_dtype("sinks", *sinks, Dtype::f64);
    in.sinks = static_cast<const double*>(sinks->const_data_ptr());
  }
}

inline void set_bounds(Attention& in, std::optional<int64_t> left, std::optional<int64_t> right) {
  constexpr int64_t limit = int64_t{1} << 40;  // past any length, so that sums cannot overflow
  FASTATTN_CHECK(left.value_or(0) >= 0 && right.value_or(0) >= 0, "bounds must be >= 0");
  in.left = left.has_value() ? std::min(*left, limit) : kUnbounded;
  in.right = right.has_value() ? std::min(*right, limit) : kUnbounded;
}

// Refuses what the CUDA kernels do not know.
inline void check_place(Place place, Dtype dtype, int64_t widest) {
  FASTATTN_CHECK(
      !on_gpu(place) || (dtype != Dtype::f64 && widest <= (dtype == Dtype::f32 ? 128 : 256)),
      "no CUDA kernel takes fp64, or heads wider than 256, in fp32 than 128");
}

// The scale of a plain call's scores.
inline double scale_of(std::optional<double> scale, const Tensor& query) {
  FASTATTN_CHECK(query.dim() == 4, "query must have four dimensions");
  const auto width = static_cast<double>(std::max<int64_t>(query.size(3), 1));
  FASTATTN_CHECK(std::isfinite(scale.value_or(1)), "scale must be finite");
  return scale.value_or(std::pow(width, -0.5));
}

}  // namespace fastattn
