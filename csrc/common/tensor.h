// Torch tensors at the boundary: checks in words, allocation, and plain pointers for the kernels.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <initializer_list>
#include <optional>
#include <string>
#include <vector>

#include "common/dtype.h"
#include "common/parallel.h"
#include "common/view.h"
#include "cuda/launch.h"

namespace fastattn {

using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

#define FASTATTN_CHECK(condition, ...) STD_TORCH_CHECK(condition, "fastattn: ", __VA_ARGS__)

inline Dtype dtype_of(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case torch::headeronly::ScalarType::Float:
      return Dtype::f32;
    case torch::headeronly::ScalarType::BFloat16:
      return Dtype::bf16;
    case torch::headeronly::ScalarType::Half:
      return Dtype::f16;
    case torch::headeronly::ScalarType::Double:
      return Dtype::f64;
    default:
      FASTATTN_CHECK(false, "the kernels take fp32, bf16, fp16 and fp64");
  }
}

// The dtype of statistics of a tensor: fp64 for fp64, else fp32.
inline Dtype wide(Dtype dtype) { return dtype == Dtype::f64 ? Dtype::f64 : Dtype::f32; }

// Torch's current stream on a GPU. Throws without a CUDA torch.
void* current_cuda_stream(int32_t device);

// A device of torch's: the CPU unless another is named.
struct Place {
  int32_t type = aoti_torch_device_type_cpu(), index = 0;

  bool is_cpu() const { return type == aoti_torch_device_type_cpu(); }
};

inline Place place_of(const Tensor& tensor) {
  Place place;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(tensor.get(), &place.type));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(tensor.get(), &place.index));
  return place;
}

// Whether the CUDA kernels are to work on tensors of this place.
inline bool on_gpu(Place place) { return !place.is_cpu() || cuda::emulating(); }

inline Tensor empty(int64_t dims, const int64_t* sizes, const int64_t* strides, Dtype dtype,
                    Place place = {}) {
  static const int32_t codes[] = {aoti_torch_dtype_float32(), aoti_torch_dtype_bfloat16(),
                                  aoti_torch_dtype_float16(), aoti_torch_dtype_float64()};
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      dims, sizes, strides, codes[static_cast<int>(dtype)], place.type, place.index, &handle));
  Tensor tensor(handle);
  if (!place.is_cpu()) return tensor;
  const int64_t width = dtype == Dtype::f64 ? 8 : dtype == Dtype::f32 ? 4 : 2;
  prefer_huge_pages(tensor.mutable_data_ptr(), static_cast<size_t>(tensor.numel() * width));
  return tensor;
}
inline Tensor empty(std::initializer_list<int64_t> sizes, std::initializer_list<int64_t> strides,
                    Dtype dtype, Place place = {}) {
  return empty(static_cast<int64_t>(sizes.size()), sizes.begin(), strides.begin(), dtype, place);
}
inline Tensor empty(const std::vector<int64_t>& sizes, Dtype dtype, Place place = {}) {
  std::vector<int64_t> strides(sizes.size(), 1);
  for (size_t dim = sizes.size(); dim-- > 1;)
    strides[dim - 1] = strides[dim] * std::max<int64_t>(1, sizes[dim]);
  return empty(static_cast<int64_t>(sizes.size()), sizes.data(), strides.data(), dtype, place);
}
inline Tensor empty(int64_t size, Dtype dtype, Place place = {}) {
  return empty({size}, {1}, dtype, place);
}
inline Tensor empty(int64_t rows, int64_t cols, Dtype dtype, Place place = {}) {
  return empty({rows, cols}, {cols, 1}, dtype, place);
}

// A contiguous tensor of the sizes of `other`, where that is.
inline Tensor empty_like(const Tensor& other, Dtype dtype) {
  return empty({other.sizes().begin(), other.sizes().end()}, dtype, place_of(other));
}

// The same but for the last dimension.
inline Tensor empty_rows(const Tensor& other, int64_t columns, Dtype dtype) {
  std::vector<int64_t> sizes(other.sizes().begin(), other.sizes().end());
  sizes.back() = columns;
  return empty(sizes, dtype, place_of(other));
}

// The tensor as the CPU's kernels of plain calls take it, copied only if it must be.
inline Tensor contiguous_on_cpu(const char* name, const Tensor& tensor) {
  FASTATTN_CHECK(!on_gpu(place_of(tensor)), name, " must be on the CPU");
  return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
}

// The number of rows of a contiguous tensor [..., columns], all leading dimensions taken as one.
inline int64_t rows_of(const char* name, const Tensor& tensor) {
  FASTATTN_CHECK(tensor.dim() > 0 && tensor.is_contiguous(), name,
                 " must be contiguous, of one dimension or more");
  int64_t rows = 1;
  for (int64_t i = 0; i + 1 < tensor.dim(); i++) rows *= tensor.size(i);
  return rows;
}

inline void check_rows(const char* name, const Tensor& tensor, int64_t rows, int64_t columns) {
  FASTATTN_CHECK(rows_of(name, tensor) == rows && tensor.size(tensor.dim() - 1) == columns, name,
                 " has not the shape that the others ask for");
}

inline void check_matrix(const char* name, const Tensor& tensor) {
  FASTATTN_CHECK(tensor.dim() == 2 && tensor.is_contiguous(), name,
                 " must be a contiguous matrix of two dimensions");
}

inline void check_sizes(const char* name, const Tensor& tensor,
                        std::initializer_list<int64_t> sizes) {
  bool same = tensor.dim() == static_cast<int64_t>(sizes.size());
  int64_t dim = 0;
  for (int64_t size : sizes) same = same && tensor.size(dim++) == size;
  FASTATTN_CHECK(same && tensor.is_contiguous(), name,
                 " has not the shape that the others ask for");
}

inline void check_dtype(const char* name, const Tensor& tensor, Dtype dtype) {
  FASTATTN_CHECK(dtype_of(tensor) == dtype, name, " has not the dtype that the others ask for");
}

// A view of four dimensions, each of the size given or 1, which broadcasts; dimensions in front may
// be missing.
inline Source view(const char* name, const Tensor& tensor, std::initializer_list<int64_t> sizes) {
  const int64_t missing = 4 - tensor.dim();
  FASTATTN_CHECK(missing >= 0, name, " must have at most four dimensions");
  Source source{tensor.const_data_ptr(), {}};
  int64_t dim = 0;
  for (const int64_t size : sizes) {
    const int64_t own = dim < missing ? 1 : tensor.size(dim - missing);
    FASTATTN_CHECK(own == size || own == 1, name, " does not broadcast to the sizes of the others");
    source.stride[dim] = own == 1 ? 0 : tensor.stride(dim - missing);
    dim++;
  }
  return source;
}

// A batch of one has a stride of 0: its rows may be those of packed sequences.
template <class Pointer>
View<Pointer> strided(Pointer data, const Tensor& tensor) {
  View<Pointer> to{data, {}};
  for (int dim = 0; dim < 4; dim++) to.stride[dim] = tensor.stride(dim);
  if (tensor.size(0) == 1) to.stride[0] = 0;
  return to;
}
inline Source source(const Tensor& tensor) { return strided(tensor.const_data_ptr(), tensor); }
inline Target target(const Tensor& tensor) { return strided(tensor.mutable_data_ptr(), tensor); }

// A view of four dimensions, each of the size given.
inline Source exact(const char* name, const Tensor& tensor, std::initializer_list<int64_t> sizes) {
  int dim = 0;
  for (const int64_t size : sizes)
    FASTATTN_CHECK(tensor.dim() == 4 && tensor.size(dim++) == size, name,
                   " has not the shape that the others ask for");
  return source(tensor);
}

// A tensor [B, H, S, D] that lies in memory as [B, S, H, D].
inline Tensor rows_first(int64_t batch, int64_t heads, int64_t rows, int64_t cols, Dtype dtype,
                         Place place = {}) {
  return empty({batch, heads, rows, cols}, {rows * heads * cols, cols, heads * cols, 1}, dtype,
               place);
}

// The GPU that a tensor is on, or the CPU for the emulator, with torch's current stream.
class TorchDevice : public cuda::Device {
 public:
  explicit TorchDevice(Place place)
      : Device(place.index, place.is_cpu() ? nullptr : current_cuda_stream(place.index)),
        place_(place) {}

  void* scratch(int64_t bytes) override {
    return kept_.emplace_back(empty((bytes + 3) / 4, Dtype::f32, place_)).mutable_data_ptr();
  }

 private:
  Place place_;
  std::vector<Tensor> kept_;  // torch's allocator gives memory back in the order of the stream
};

// Runs an op on the kernel of its place.
template <class Args>
void run(Place place, const Args& args, void (*on_cpu)(const Args&),
         void (*on_cuda)(const Args&, cuda::Device&)) {
  if (!on_gpu(place)) return on_cpu(args);
  TorchDevice device(place);
  on_cuda(args, device);
}

// The seed of dropout: its value on the CPU, and where it lies, for a GPU's memory the host does
// not read. Nothing where p is 0.
struct Seed {
  uint64_t value = 0;
  const uint64_t* address = nullptr;
};
inline Seed checked_seed(double dropout_p, const OptionalTensor& seed, Place place) {
  FASTATTN_CHECK(dropout_p >= 0 && dropout_p <= 1, "dropout_p must be in [0, 1]");
  if (dropout_p == 0) return {};
  FASTATTN_CHECK(seed.has_value() && seed->numel() == 1 &&
                     seed->scalar_type() == torch::headeronly::ScalarType::Long &&
                     place_of(*seed).is_cpu() == place.is_cpu(),
                 "dropout needs a seed of one int64 on the device of the others");
  const auto* address = static_cast<const uint64_t*>(seed->const_data_ptr());
  return {place.is_cpu() ? *address : 0, address};
}

// A str argument, which is the op's to delete. Torch's own conversion to std::string leaks one in
// each call, up to 2.13 at least (pytorch/pytorch#191340).
inline std::string taken(StringHandle argument) {
  size_t length = 0;
  const char* text = nullptr;
  TORCH_ERROR_CODE_CHECK(torch_string_length(argument, &length));
  TORCH_ERROR_CODE_CHECK(torch_string_c_str(argument, &text));
  const std::string value(text, length);
  TORCH_ERROR_CODE_CHECK(torch_delete_string(argument));
  return value;
}

inline const void* read(const OptionalTensor& tensor) {
  return tensor.has_value() ? tensor->const_data_ptr() : nullptr;
}

}  // namespace fastattn
