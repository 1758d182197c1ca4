// The instructions of sm_90a: products of a warp group, whose right side lies in shared memory.
//
// A warp group is four warps, of which the first is a multiple of four. Its products run on their
// own until they are waited for, and see what threads have written to shared memory after a fence
// and a barrier. A warp has 16 of the 64 rows of a result, as an Accumulator.
#pragma once

#include <cuda_bf16.h>

#include "cuda/ptx.cuh"

namespace fastattn::cuda::ptx {

// Lets products see what this thread has written, or copied, to shared memory.
__device__ inline void fence_for_products() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}
// Between what threads do to registers and products that take them.
__device__ inline void begin_products() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
// Makes a group of the products that have begun since the last one.
__device__ inline void commit_products() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
// What the compiler has computed of these by here, it neither puts off nor takes earlier.
template <int N>
__device__ void settle(float (&values)[N][4]) {
#pragma unroll
  for (int n = 0; n < N; n++)
#pragma unroll
    for (int e = 0; e < 4; e++) asm volatile("" : "+f"(values[n][e])::"memory");
}
// Waits for all groups but the latest Pending.
template <int Pending>
__device__ void wait_for_products() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(Pending) : "memory");
}
// The same, of which these are the sums.
template <int Pending, int N>
__device__ void wait_for_products(float (&sum)[N][4]) {
  wait_for_products<Pending>();
  settle(sum);
}

// A matrix of Panels that begins at `address`. Where the depth runs along its rows a product takes
// one panel, and `apart` is nothing; where it runs across them, so many bytes lie between panels.
__device__ inline uint64_t matrix(uint32_t address, uint32_t apart = 0) {
  constexpr uint64_t atom = 1024 >> 4, permuted = uint64_t{1} << 62;  // eight rows are an atom
  return uint64_t{address >> 4} | uint64_t{apart >> 4} << 16 | atom << 32 | permuted;
}
// The matrix so many bytes further on: the lower word alone counts them.
__device__ inline uint64_t behind(uint64_t matrix, uint32_t bytes) {
  constexpr uint64_t upper = ~uint64_t{0} << 32;
  return (matrix & upper) | (static_cast<uint32_t>(matrix) + (bytes >> 4));
}

#define FASTATTN_SUMS_4(d, n) "+f"(d[n][0]), "+f"(d[n][1]), "+f"(d[n][2]), "+f"(d[n][3])
#define FASTATTN_SUMS_8(d, n) FASTATTN_SUMS_4(d, n), FASTATTN_SUMS_4(d, n + 1)
#define FASTATTN_SUMS_16(d, n) FASTATTN_SUMS_8(d, n), FASTATTN_SUMS_8(d, n + 2)
#define FASTATTN_SUMS_32(d, n) FASTATTN_SUMS_16(d, n), FASTATTN_SUMS_16(d, n + 4)
#define FASTATTN_SUMS_56(d, n) \
  FASTATTN_SUMS_32(d, n), FASTATTN_SUMS_16(d, n + 8), FASTATTN_SUMS_8(d, n + 12)
#define FASTATTN_SUMS_64(d, n) FASTATTN_SUMS_32(d, n), FASTATTN_SUMS_32(d, n + 8)
#define FASTATTN_SUMS_128(d, n) FASTATTN_SUMS_64(d, n), FASTATTN_SUMS_64(d, n + 16)

// The names of so many registers in an instruction.
#define FASTATTN_NAMES_32                                                                      \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, " \
  "%20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define FASTATTN_NAMES_56                                                                      \
  FASTATTN_NAMES_32                                                                            \
  ", "                                                                                         \
  "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, " \
  "%50, %51, %52, %53, %54, %55"
#define FASTATTN_NAMES_64 FASTATTN_NAMES_56 ", %56, %57, %58, %59, %60, %61, %62, %63"
#define FASTATTN_NAMES_128                                                                     \
  FASTATTN_NAMES_64                                                                            \
  ", "                                                                                         \
  "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, %80, %81, " \
  "%82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, %96, %97, %98, %99, " \
  "%100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, %112, %113, %114, " \
  "%115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"

// Products by 16 of the depth, with Cols columns, whose sums are Count registers; those that follow
// have the names N0 ... N4.
//   multiply_transposed   sum = left right^T, and what sum was if `more`, of two matrices. The
//                         depth runs along the rows of both, or down those of one that lies Across
//   multiply              sum += left right: left is the part of a warp's lane, as mma.sync takes
//                         it, and the depth runs across the rows of right
#define FASTATTN_PRODUCTS(Type, type, Cols, Count, N0, N1, N2, N3, N4)                          \
  template <bool LeftAcross = false, bool RightAcross = false>                                  \
  __device__ void multiply_transposed(float (&sum)[Cols / 8][4], Type, uint64_t left,           \
                                      uint64_t right, int more) {                               \
    asm volatile("{ .reg .pred more; setp.ne.b32 more, " N2                                     \
                 ", 0; wgmma.mma_async.sync.aligned.m64n" #Cols "k16.f32." type "." type        \
                 " {" FASTATTN_NAMES_##Count "}, " N0 ", " N1 ", more, 1, 1, " N3 ", " N4 "; }" \
                 : FASTATTN_SUMS_##Count(sum, 0)                                                \
                 : "l"(left), "l"(right), "r"(more), "n"(LeftAcross), "n"(RightAcross)          \
                 : "memory");                                                                   \
  }                                                                                             \
  __device__ inline void multiply(float (&sum)[Cols / 8][4], Type, const uint32_t (&left)[4],   \
                                  uint64_t right) {                                             \
    asm volatile("wgmma.mma_async.sync.aligned.m64n" #Cols "k16.f32." type "." type             \
                 " {" FASTATTN_NAMES_##Count "}, {" N0 ", " N1 ", " N2 ", " N3 "}, " N4         \
                                             ", 1, 1, 1, 1;"                                    \
                 : FASTATTN_SUMS_##Count(sum, 0)                                                \
                 : "r"(left[0]), "r"(left[1]), "r"(left[2]), "r"(left[3]), "l"(right)           \
                 : "memory");                                                                   \
  }
#define FASTATTN_PRODUCTS_OF(Type, type)                                    \
  FASTATTN_PRODUCTS(Type, type, 64, 32, "%32", "%33", "%34", "%35", "%36")  \
  FASTATTN_PRODUCTS(Type, type, 112, 56, "%56", "%57", "%58", "%59", "%60") \
  FASTATTN_PRODUCTS(Type, type, 128, 64, "%64", "%65", "%66", "%67", "%68") \
  FASTATTN_PRODUCTS(Type, type, 256, 128, "%128", "%129", "%130", "%131", "%132")

FASTATTN_PRODUCTS_OF(__half, "f16")
FASTATTN_PRODUCTS_OF(__nv_bfloat16, "bf16")

}  // namespace fastattn::cuda::ptx
