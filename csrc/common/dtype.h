// The element types of tensors, and the type that each is accumulated in.
#pragma once

#include <cstdint>

namespace fastattn {

enum class Dtype : int { f32, bf16, f16, f64 };

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

template <class T>
struct Accumulator {
  using type = float;
};
template <>
struct Accumulator<double> {
  using type = double;
};
template <class T>
using Acc = typename Accumulator<T>::type;

// Calls f with a null pointer of the element type that `dtype` names.
template <class F>
inline void with_type(Dtype dtype, F&& f) {
  switch (dtype) {
    case Dtype::f32:
      return f(static_cast<float*>(nullptr));
    case Dtype::bf16:
      return f(static_cast<bf16*>(nullptr));
    case Dtype::f16:
      return f(static_cast<f16*>(nullptr));
    case Dtype::f64:
      return f(static_cast<double*>(nullptr));
  }
}

}  // namespace fastattn
