// The instructions of sm_90 by which one thread has boxes of a matrix copied, and by which warps
// hand such copies to one another: mbarriers in shared memory, each of which is 8 bytes at an
// address.
#pragma once

#include "cuda/ptx.cuh"

namespace fastattn::cuda {

// What the copy engine has to know of a matrix: see Boxed in launch.h.
struct alignas(64) TensorMap {
  char bytes[128];
};

namespace ptx {

// Phases of a barrier end when so many have arrived, and all bytes that they expect.
__device__ inline void begin_barrier(uint32_t barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}
// Lets the copy engine see barriers that this thread has begun.
__device__ inline void fence_for_barriers() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
__device__ inline void arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}
__device__ inline void arrive_expecting(uint32_t barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes)
               : "memory");
}
// Waits for the end of the phase of this parity; that before the first has parity 1.
__device__ inline void wait_for_phase(uint32_t barrier, int parity) {
  asm volatile(
      "{ .reg .pred ended;\n"
      "again: mbarrier.try_wait.parity.shared::cta.b64 ended, [%0], %1;\n"
      "@!ended bra again; }" ::"r"(barrier),
      "r"(parity)
      : "memory");
}

// Copies the box of a matrix that begins at `row` and `col` to shared memory, later, with zeros
// where the matrix ends; the barrier gets its bytes.
__device__ inline void copy_box(uint32_t to, const TensorMap& from, int row, int col,
                                uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%2, %3}], [%4];" ::"r"(to),
      "l"(&from), "r"(col), "r"(row), "r"(barrier)
      : "memory");
}

// Makes so many registers a thread this warp group's, where a block's sum is what it began with.
template <int Registers>
__device__ void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(Registers));
}
template <int Registers>
__device__ void leave_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(Registers));
}

}  // namespace ptx
}  // namespace fastattn::cuda
