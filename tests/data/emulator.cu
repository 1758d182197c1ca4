// Small kernels for tests/test_emulator.py, each sound one with faulty variants of itself.
// emulator.ptx beside it is made of it by
//   nvcc -arch=compute_80 -std=c++20 -lineinfo -ptx emulator.cu
#include <cstdint>
#include <cuda_bf16.h>

#define KERNEL extern "C" __global__ void

__device__ uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// --- one block: out[block] = sum of its part of x

template <bool kBarrier>
__device__ void block_sum_body(const float* x, float* out, int n) {
  __shared__ float partial[32];
  float sum = 0;
  for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < n; i += gridDim.x * blockDim.x)
    sum += x[i];
  for (int step = 16; step; step /= 2) sum += __shfl_xor_sync(~0u, sum, step);
  if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = sum;
  if (kBarrier) __syncthreads();
  if (threadIdx.x == 0) {
    float total = 0;
    for (int w = 0; w < blockDim.x / 32; w++) total += partial[w];
    out[blockIdx.x] = total;
  }
}
KERNEL block_sum(const float* x, float* out, int n) { block_sum_body<true>(x, out, n); }
KERNEL block_sum_unordered(const float* x, float* out, int n) { block_sum_body<false>(x, out, n); }

// --- one warp: lanes exchange through shared memory

template <bool kSync>
__device__ void rotate_body(const int* x, int* out) {
  __shared__ int place[32];
  place[threadIdx.x] = x[threadIdx.x];
  if (kSync) __syncwarp();
  out[threadIdx.x] = place[(threadIdx.x + 1) % 32];
}
KERNEL rotate(const int* x, int* out) { rotate_body<true>(x, out); }
KERNEL rotate_unordered(const int* x, int* out) { rotate_body<false>(x, out); }

// --- copies on their way: out = 2 x, tile by tile, double buffered

__device__ void copy16(const void* to, const void* from) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(to)), "l"(from)
               : "memory");
}
template <bool kWait, bool kBarrier>
__device__ void pipeline_body(const float* x, float* out, int tiles) {
  __shared__ alignas(16) float tile[2][512];
  int t = threadIdx.x, mirrored = blockDim.x - 1 - t;
  copy16(&tile[0][4 * t], x + 4 * t);
  asm volatile("cp.async.commit_group;");
  for (int i = 0; i < tiles; i++) {
    if (i + 1 < tiles) copy16(&tile[(i + 1) % 2][4 * t], x + 512 * (i + 1) + 4 * t);
    asm volatile("cp.async.commit_group;");
    if (kWait) asm volatile("cp.async.wait_group 1;" ::: "memory");
    if (kBarrier) __syncthreads();
    for (int k = 0; k < 4; k++)
      out[512 * i + 4 * mirrored + k] = 2 * tile[i % 2][4 * mirrored + k];
    __syncthreads();
  }
  asm volatile("cp.async.wait_all;" ::: "memory");
}
KERNEL pipeline(const float* x, float* out, int n) { pipeline_body<true, true>(x, out, n); }
KERNEL pipeline_no_wait(const float* x, float* out, int n) { pipeline_body<false, true>(x, out, n); }
KERNEL pipeline_no_barrier(const float* x, float* out, int n) {
  pipeline_body<true, false>(x, out, n);
}
KERNEL copy_never_waited_for(const float* x) {
  __shared__ alignas(16) float tile[4];
  copy16(tile, x);
}

// --- between blocks: the last block to finish adds up what all have written

template <bool kFence>
__device__ void grid_sum_body(const int* x, int* partial, int* counter, int* out) {
  if (threadIdx.x == 0) {
    partial[blockIdx.x] = x[blockIdx.x];
    if (kFence) __threadfence();
    if (atomicAdd(counter, 1) == gridDim.x - 1) {
      if (kFence) __threadfence();
      int sum = 0;
      for (int b = 0; b < gridDim.x; b++) sum += partial[b];
      *out = sum;
    }
  }
}
KERNEL grid_sum(const int* x, int* partial, int* counter, int* out) {
  grid_sum_body<true>(x, partial, counter, out);
}
KERNEL grid_sum_no_fence(const int* x, int* partial, int* counter, int* out) {
  grid_sum_body<false>(x, partial, counter, out);
}
KERNEL last_block_wins(int* out) { *out = blockIdx.x; }
KERNEL everybody_agrees(int* out) { *out = 7; }
KERNEL reads_what_others_write(int* x) { x[blockIdx.x] = x[(blockIdx.x + 1) % gridDim.x] + 1; }

// --- memory

KERNEL uninitialised(float* out) {
  __shared__ float place[64];
  place[2 * threadIdx.x] = 1;
  __syncthreads();
  out[threadIdx.x] = place[threadIdx.x];
}
KERNEL scale(const float* x, float* out, int n) {  // sound where n is what both hold
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < n) out[i] = 2 * x[i];
}
KERNEL scale4(const float4* x, float4* out) {
  float4 v = x[threadIdx.x];
  out[threadIdx.x] = make_float4(2 * v.x, 2 * v.y, 2 * v.z, 2 * v.w);
}
KERNEL past_shared(float* out) {
  extern __shared__ float dynamic[];
  dynamic[threadIdx.x] = 1;
  out[threadIdx.x] = dynamic[threadIdx.x];
}

// --- barriers

KERNEL divergent_barrier(int* out) {
  if (threadIdx.x < 16) {
    out[threadIdx.x] = 1;
    __syncthreads();
    out[threadIdx.x] = 3;
  } else {
    out[threadIdx.x] = 2;
    __syncthreads();
    out[threadIdx.x] = 4;
  }
}
KERNEL half_a_warp(int* out) {
  if (threadIdx.x < 16) __syncthreads();
  out[threadIdx.x] = 1;
}
KERNEL barrier_after_exit(int* out) {
  if (threadIdx.x >= 32) return;
  __syncthreads();
  out[threadIdx.x] = 1;
}
KERNEL two_barriers(int* out) {
  if (threadIdx.x < 32) {
    out[threadIdx.x] = 1;
    __syncthreads();
  } else {
    out[threadIdx.x] = 2;
    __syncthreads();
  }
}
KERNEL barrier_count(int* out) {
  if (threadIdx.x < 32) asm volatile("bar.sync 1, 64;");
  else asm volatile("bar.sync 1, 96;");
  out[threadIdx.x] = 1;
}
KERNEL deadlock(int* out) {
  if (threadIdx.x < 32) asm volatile("bar.sync 1, 64;");
  out[threadIdx.x] = 1;
}
KERNEL hand_over(const int* x, int* out) {  // one warp produces, the other consumes
  __shared__ int place[32];
  int lane = threadIdx.x % 32;
  if (threadIdx.x < 32) {
    place[lane] = x[lane];
    asm volatile("bar.arrive 1, 64;" ::: "memory");
  } else {
    asm volatile("bar.sync 1, 64;" ::: "memory");
    out[lane] = place[31 - lane];
  }
}
KERNEL wait_for_a_flag(volatile int* flag) {
  while (*flag == 0) {
  }
}
KERNEL shuffle_from_nobody(int* out) {
  if (threadIdx.x < 16) out[threadIdx.x] = __shfl_sync(0xffff, static_cast<int>(threadIdx.x), 20);
}

// --- what it costs

template <int kPad>
__device__ void transpose_body(const float* x, float* out) {
  __shared__ float tile[32][32 + kPad];
  for (int row = threadIdx.y; row < 32; row += blockDim.y)
    tile[row][threadIdx.x] = x[32 * row + threadIdx.x];
  __syncthreads();
  for (int row = threadIdx.y; row < 32; row += blockDim.y)
    out[32 * row + threadIdx.x] = tile[threadIdx.x][row];
}
KERNEL transpose(const float* x, float* out) { transpose_body<1>(x, out); }
KERNEL transpose_conflicts(const float* x, float* out) { transpose_body<0>(x, out); }
KERNEL strided(const float* x, float* out, int stride) {
  out[threadIdx.x] = x[stride * threadIdx.x];
}

// --- tensor cores: C [16, 8] = A [16, 16] B [16, 8], row by row

KERNEL matmul_bf16(const __nv_bfloat16* a, const __nv_bfloat16* b, float* c) {
  __shared__ alignas(16) __nv_bfloat16 a_tile[16][16], b_tile[16][8];
  int lane = threadIdx.x;
  for (int i = lane; i < 256; i += 32) a_tile[i / 16][i % 16] = a[i];
  for (int i = lane; i < 128; i += 32) b_tile[i / 8][i % 8] = b[i];
  __syncwarp();
  uint32_t a_part[4], b_part[2];
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(a_part[0]), "=r"(a_part[1]), "=r"(a_part[2]), "=r"(a_part[3])
               : "r"(shared_address(&a_tile[lane % 16][lane / 16 * 8])));
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
               : "=r"(b_part[0]), "=r"(b_part[1])
               : "r"(shared_address(&b_tile[lane % 16][0])));
  float d[4] = {0, 0, 0, 0};
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a_part[0]), "r"(a_part[1]), "r"(a_part[2]), "r"(a_part[3]), "r"(b_part[0]),
        "r"(b_part[1]));
  for (int e = 0; e < 4; e++) c[(lane / 4 + e / 2 * 8) * 8 + lane % 4 * 2 + e % 2] = d[e];
}
