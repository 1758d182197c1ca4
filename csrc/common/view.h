// How kernels see a tensor of four dimensions in place, whatever its strides.
#pragma once

#include <cstdint>

namespace fastattn {

// A tensor [batch, head, row, column]; a stride of 0 broadcasts.
template <class Pointer>
struct View {
  Pointer data = nullptr;
  int64_t stride[4] = {0, 0, 0, 0};
  int64_t first = 0;  // elements in front of the first
};
using Source = View<const void*>;
using Target = View<void*>;

}  // namespace fastattn
