// What a matrix product is of, and into how many tasks it is worth cutting.
#pragma once

#include "gemm/gemm.h"

namespace fastattn::FASTATTN_ISA {
namespace {

template <class A, class T>
struct Product {
  int64_t rows, cols, depth;
  Operand<T> a;
  Operand<T> weights[2];
  int64_t count;  // of weights
  Finish<A> finish;
  A* packed = nullptr;  // `a` as panels, where it lies like that

  // Tasks that are worth their start when `work` would be, and enough of them to even out threads
  // of unequal speed.
  static int64_t tasks(int64_t work, int64_t most) {
    return larger(1, smaller(smaller(most, work), int64_t{32} * thread_count()));
  }
};

}  // namespace
}  // namespace fastattn::FASTATTN_ISA
