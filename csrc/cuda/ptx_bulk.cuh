// The instructions of sm_90 by which some threads copy for others: mbarriers, boxes of a matrix
// that one thread has copied, and registers that warp groups hand to each other.
#pragma once

#include "cuda/ptx.cuh"

namespace fastattn::cuda {

// What the copy engine has to know of a matrix: see Boxed in launch.h.
struct alignas(64) TensorMap {
  char bytes[128];
};

namespace ptx {

// Barriers in shared memory, each of whose phases ends when so many have arrived, and all bytes
// that they expect. Waiting for the phase of a parity returns where that is the latest to have
// ended; the one before the first has parity 1.
__device__ inline void mbarrier_init(uint64_t& barrier, int count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(&barrier)), "r"(count)
               : "memory");
}
// Lets the copy engine see barriers that this thread has made.
__device__ inline void mbarrier_fence() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
__device__ inline void mbarrier_arrive(uint64_t& barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(&barrier))
               : "memory");
}
__device__ inline void mbarrier_arrive_expecting(uint64_t& barrier, int bytes) {
  asm volatile(
      "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(&barrier)),
      "r"(bytes)
      : "memory");
}
// Arrives later, when all is there that this thread has begun to copy.
__device__ inline void mbarrier_arrive_with_copies(uint64_t& barrier) {
  asm volatile(
      "cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(shared_address(&barrier))
      : "memory");
}
__device__ inline void mbarrier_wait(uint64_t& barrier, int parity) {
  asm volatile(
      "{ .reg .pred ended;\n"
      "again: mbarrier.try_wait.parity.shared::cta.b64 ended, [%0], %1;\n"
      "@!ended bra again; }" ::"r"(shared_address(&barrier)),
      "r"(parity)
      : "memory");
}

// Copies the box of a matrix that begins at `row` and `col` to shared memory, later, with zeros
// where the matrix ends; the barrier gets its bytes.
__device__ inline void copy_box(uint32_t to, const TensorMap& from, int row, int col,
                                uint64_t& barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%2, %3}], [%4];" ::"r"(to),
      "l"(&from), "r"(col), "r"(row), "r"(shared_address(&barrier))
      : "memory");
}

// From here on threads of this warp group have so many registers, which others gave back or take.
template <int Count>
__device__ void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(Count));
}
template <int Count>
__device__ void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(Count));
}

}  // namespace ptx
}  // namespace fastattn::cuda
