// Measures the peak of fp32 multiply-adds of each ISA, with the accumulators of the register tile.
#include <ctime>

#include "simd/peak.h"
#include "simd/tile.h"

namespace fastattn::FASTATTN_ISA {
namespace {

double seconds_now() {  // std::chrono's templates could be shared with code for other ISAs
  timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return static_cast<double>(now.tv_sec) + 1e-9 * static_cast<double>(now.tv_nsec);
}

}  // namespace

void fma_peak(const Peak& args) {
  note_run(kIsa);
  double rates[256] = {};
  const int64_t threads = smaller(args.threads, 256);
  parallel(threads, [&](int64_t task) {
    constexpr int chains = Tile<float>::rows * Tile<float>::vecs;
    Vec<float> sums[chains];
    for (int i = 0; i < chains; i++) sums[i] = set(static_cast<float>(i));
    const double start = seconds_now();
    double elapsed = 0;
    int64_t rounds = 0;
    while (elapsed < args.seconds) {
      for (int repeat = 0; repeat < 10000; repeat++) {
#pragma GCC unroll 32
        for (int i = 0; i < chains; i++) sums[i] = sums[i] * 0.999f + 0.001f;
      }
      rounds++;
      elapsed = seconds_now() - start;
    }
    Vec<float> total{};
    for (int i = 0; i < chains; i++) total += sums[i];
    const double flops = 2.0 * 10000 * chains * lanes<float> * static_cast<double>(rounds);
    rates[task] = sum<float>(total) >= 0 ? flops / elapsed / 1e9 : 0;  // the sums are used
  });
  *args.gflops = 0;
  for (int64_t i = 0; i < threads; i++) *args.gflops += rates[i];
}

}  // namespace fastattn::FASTATTN_ISA
