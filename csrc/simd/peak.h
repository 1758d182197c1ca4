// The machine's own limit for comparison: fp32 multiply-adds on registers alone.
#pragma once

#include <cstdint>

#include "common/isa.h"

namespace fastattn {

struct Peak {
  int64_t threads;
  double seconds;
  double* gflops;  // the sum over threads
};

FASTATTN_KERNEL(fma_peak, Peak)

}  // namespace fastattn
