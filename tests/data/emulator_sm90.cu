// Small kernels of sm_90a for tests/test_emulator_sm90.py, each sound one with faulty variants.
// emulator_sm90.ptx beside it is made of it by
//   nvcc -arch=compute_90a -std=c++20 -lineinfo -ptx emulator_sm90.cu
//   sed -Ei 's|(\.file.*")[^"]*/|\1|' emulator_sm90.ptx    # names of files without their folders
#include <cstdint>
#include <cuda_bf16.h>

#define KERNEL extern "C" __global__ void

__device__ uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}
__device__ void init(uint64_t* barrier, int count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(count)
               : "memory");
}
__device__ void expect(uint64_t* barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(
                   shared_address(barrier)), "r"(bytes) : "memory");
}
__device__ void arrive(uint64_t* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier))
               : "memory");
}
__device__ void wait(uint64_t* barrier, int parity) {
  asm volatile(
      "{ .reg .pred done;\n"
      "again: mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra again; }" ::"r"(shared_address(barrier)), "r"(parity)
      : "memory");
}
__device__ void fence_proxy() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// --- plain bytes in and out: out = 2 x for 128 floats

enum Fault { kNone, kNoWait, kNoInit, kTooFewBytes, kNoFence, kNoRegisterFence, kNoStoreWait };

template <Fault kFault>
__device__ void double_body(const float* x, float* out) {
  __shared__ alignas(128) float tile[128];
  __shared__ alignas(8) uint64_t barrier;
  int t = threadIdx.x;
  if (t == 0 && kFault != kNoInit) init(&barrier, 1);
  __syncthreads();
  if (t == 0) {
    expect(&barrier, kFault == kTooFewBytes ? 256 : 512);
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], 512, [%2];"
        ::"r"(shared_address(tile)), "l"(x), "r"(shared_address(&barrier)) : "memory");
  }
  if (kFault != kNoWait && kFault != kNoInit) wait(&barrier, 0);
  tile[t] *= 2;
  if (kFault != kNoFence) fence_proxy();
  __syncthreads();
  if (t == 0) {
    asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], 512;" ::"l"(out),
                 "r"(shared_address(tile)) : "memory");
    asm volatile("cp.async.bulk.commit_group;");
    if (kFault != kNoStoreWait) asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory");
  }
  __syncthreads();
  tile[t] = 0;
}
KERNEL bulk(const float* x, float* out) { double_body<kNone>(x, out); }
KERNEL bulk_no_wait(const float* x, float* out) { double_body<kNoWait>(x, out); }
KERNEL bulk_no_init(const float* x, float* out) { double_body<kNoInit>(x, out); }
KERNEL bulk_too_few_bytes(const float* x, float* out) { double_body<kTooFewBytes>(x, out); }
KERNEL bulk_no_fence(const float* x, float* out) { double_body<kNoFence>(x, out); }
KERNEL bulk_no_store_wait(const float* x, float* out) { double_body<kNoStoreWait>(x, out); }

// --- warps that hand over through mbarriers: out = mirrored x

template <bool kWait>
__device__ void hand_over_body(const int* x, int* out, int rounds) {
  __shared__ int place[32];
  __shared__ alignas(8) uint64_t full, empty;
  int lane = threadIdx.x % 32;
  if (threadIdx.x == 0) {
    init(&full, 32);
    init(&empty, 32);
  }
  __syncthreads();
  for (int i = 0; i < rounds; i++) {
    if (threadIdx.x < 32) {
      if (kWait) wait(&empty, (i & 1) ^ 1);
      place[lane] = x[32 * i + lane];
      arrive(&full);
    } else {
      wait(&full, i & 1);
      out[32 * i + lane] = place[31 - lane];
      arrive(&empty);
    }
  }
}
KERNEL hand_over(const int* x, int* out, int rounds) { hand_over_body<true>(x, out, rounds); }
KERNEL hand_over_no_wait(const int* x, int* out, int rounds) {
  hand_over_body<false>(x, out, rounds);
}

// --- a box of a tensor, copied from one tensor map to another

struct alignas(64) TensorMap {
  char bytes[128];
};
KERNEL copy_box(const __grid_constant__ TensorMap from, const __grid_constant__ TensorMap to, int x,
                int y, int bytes) {
  extern __shared__ __align__(1024) char box[];
  __shared__ alignas(8) uint64_t barrier;
  if (threadIdx.x == 0) {
    init(&barrier, 1);
    expect(&barrier, bytes);
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
        "[%0], [%1, {%2, %3}], [%4];" ::"r"(shared_address(box)), "l"(&from), "r"(x), "r"(y),
        "r"(shared_address(&barrier)) : "memory");
    wait(&barrier, 0);
    asm volatile(
        "cp.async.bulk.tensor.2d.global.shared::cta.tile.bulk_group [%0, {%1, %2}], [%3];" ::"l"(
            &to), "r"(x), "r"(y), "r"(shared_address(box)) : "memory");
    asm volatile("cp.async.bulk.commit_group;");
    asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
  }
}

// --- products: C [64, 8] = A [64, 16] B [8, 16]^T, without swizzle

template <Fault kFault>
__device__ void wgmma_body(const __nv_bfloat16* a, const __nv_bfloat16* b, float* c) {
  __shared__ alignas(128) __nv_bfloat16 a_tile[2][64][8], b_tile[2][8][8];
  int t = threadIdx.x;
  for (int i = t; i < 1024; i += 128) a_tile[i % 16 / 8][i / 16][i % 8] = a[i];
  b_tile[t % 16 / 8][t / 16][t % 8] = b[t];
  if (kFault != kNoFence) fence_proxy();
  __syncthreads();
  // Eight rows of 16 bytes lie together: 1024 bytes to the next k of A and 128 of B, 128 to the
  // next eight rows.
  uint64_t a_matrix = shared_address(a_tile) >> 4 | 1024ull >> 4 << 16 | 128ull >> 4 << 32;
  uint64_t b_matrix = shared_address(b_tile) >> 4 | 128ull >> 4 << 16 | 128ull >> 4 << 32;
  float d[4] = {0, 0, 0, 0};
  if (kFault != kNoRegisterFence) asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
  asm volatile(
      "wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {%0, %1, %2, %3}, %4, %5, 1, 1, 1, 0, "
      "0;"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "l"(a_matrix), "l"(b_matrix));
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
  if (kFault != kNoWait) asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
  __syncthreads();
  a_tile[0][t / 2][t % 2] = __float2bfloat16(0);
  for (int e = 0; e < 4; e++)
    c[(t / 32 * 16 + t % 32 / 4 + e / 2 * 8) * 8 + t % 4 * 2 + e % 2] = d[e];
}
KERNEL wgmma(const __nv_bfloat16* a, const __nv_bfloat16* b, float* c) {
  wgmma_body<kNone>(a, b, c);
}
KERNEL wgmma_no_fence(const __nv_bfloat16* a, const __nv_bfloat16* b, float* c) {
  wgmma_body<kNoFence>(a, b, c);
}
KERNEL wgmma_no_register_fence(const __nv_bfloat16* a, const __nv_bfloat16* b, float* c) {
  wgmma_body<kNoRegisterFence>(a, b, c);
}
KERNEL wgmma_no_wait(const __nv_bfloat16* a, const __nv_bfloat16* b, float* c) {
  wgmma_body<kNoWait>(a, b, c);
}

// --- clusters of two: out [2 n] = each block's x, mirrored by the other; then a tile for both

__device__ uint32_t of_block(uint32_t address, int rank) {
  uint32_t there;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(address), "r"(rank));
  return there;
}
__device__ int rank_in_cluster() {
  int rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}
__device__ void meet_cluster() {
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}

enum ClusterFault { kSound, kNoMeeting, kNoSecondMeeting };

template <ClusterFault kFault>
__device__ void swap_body(const int* x, int* out) {
  __shared__ int tile[32];
  int t = threadIdx.x, other = rank_in_cluster() ^ 1;
  tile[t] = x[32 * blockIdx.x + t];
  if (kFault != kNoMeeting) meet_cluster();
  int value;
  asm volatile("ld.shared::cluster.u32 %0, [%1];"
               : "=r"(value) : "r"(of_block(shared_address(&tile[31 - t]), other)));
  out[32 * blockIdx.x + t] = value;
  if (kFault != kNoSecondMeeting) meet_cluster();  // until nobody reads here
}
#define CLUSTER extern "C" __global__ void __cluster_dims__(2, 1, 1)
CLUSTER swap(const int* x, int* out) { swap_body<kSound>(x, out); }
CLUSTER swap_no_meeting(const int* x, int* out) { swap_body<kNoMeeting>(x, out); }
CLUSTER swap_no_second_meeting(const int* x, int* out) { swap_body<kNoSecondMeeting>(x, out); }

// The first block of each cluster has a box copied to both, in rounds; each says when it has read.
enum ShareFault { kShares, kSharesTooEarly, kSharesWithOneOnly };

template <ShareFault kFault>
__device__ void share_body(const TensorMap& from, int* out, int rounds) {
  __shared__ alignas(1024) int box[8][32];
  __shared__ alignas(8) uint64_t full, empty;
  int t = threadIdx.x, rank = rank_in_cluster();
  if (t == 0) {
    init(&full, 1);
    init(&empty, 2);
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  meet_cluster();
  for (int i = 0; i < rounds; i++) {
    if (t == 0) {
      expect(&full, sizeof box);
      if (rank == 0) {
        if (kFault != kSharesTooEarly) wait(&empty, (i & 1) ^ 1);
        unsigned short both = kFault == kSharesWithOneOnly ? 1 : 3;
        asm volatile(
            "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
            ".multicast::cluster [%0], [%1, {%2, %3}], [%4], %5;" ::"r"(shared_address(box)),
            "l"(&from), "r"(0), "r"(8 * i), "r"(shared_address(&full)), "h"(both) : "memory");
      }
    }
    wait(&full, i & 1);
    int sum = 0;
    for (int row = 0; row < 8; row++) sum += box[row][t];
    out[(blockIdx.x * rounds + i) * 32 + t] = sum;
    __syncwarp();
    if (t == 0)
      asm volatile("mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%0];" ::"r"(
                       of_block(shared_address(&empty), 0)) : "memory");
  }
  meet_cluster();
}
CLUSTER share(const __grid_constant__ TensorMap from, int* out, int rounds) {
  share_body<kShares>(from, out, rounds);
}
CLUSTER share_too_early(const __grid_constant__ TensorMap from, int* out, int rounds) {
  share_body<kSharesTooEarly>(from, out, rounds);
}
CLUSTER share_with_one_only(const __grid_constant__ TensorMap from, int* out, int rounds) {
  share_body<kSharesWithOneOnly>(from, out, rounds);
}

// --- copies by threads of one warp, which the others wait for: out = x for 128 floats

enum Arrival { kWithCopies, kBeforeCopies, kNobodyWaits };

template <Arrival kArrival>
__device__ void copy_for_others_body(const float* x, float* out) {
  __shared__ alignas(16) float tile[128];
  __shared__ alignas(8) uint64_t full;
  int t = threadIdx.x;
  if (t == 0) init(&full, 32);
  __syncthreads();
  if (t < 32) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(tile + 4 * t)),
                 "l"(__cvta_generic_to_global(x + 4 * t)) : "memory");
    if (kArrival == kBeforeCopies)
      arrive(&full);
    else
      asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(
                       shared_address(&full)) : "memory");
  }
  if (kArrival != kNobodyWaits) wait(&full, 0);
  out[t] = tile[t];
}
KERNEL copy_for_others(const float* x, float* out) { copy_for_others_body<kWithCopies>(x, out); }
KERNEL copy_for_others_early(const float* x, float* out) {
  copy_for_others_body<kBeforeCopies>(x, out);
}
KERNEL copy_for_others_no_wait(const float* x, float* out) {
  copy_for_others_body<kNobodyWaits>(x, out);
}
