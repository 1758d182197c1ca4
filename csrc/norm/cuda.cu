// Layer norm and RMS norm on a GPU, forward and backward: a team of threads for each row.
#include "cuda/tile.cuh"
#include "norm/scalars.h"

namespace fastattn::cuda {
namespace {

extern __shared__ float4 shared_memory[];

// A row of floats which every thread reads only where it wrote, by vectors of V. Those of 8 lie in
// two planes, so that the lanes of a warp always touch neighbouring 16 bytes.
template <int V>
struct Line {
  float* at;
  int vectors;

  __device__ void get(int v, float (&to)[V]) const {
    if constexpr (V == 1) {
      to[0] = at[v];
    } else {
#pragma unroll
      for (int i = 0; i < V; i += 4) {
        const float4 part = *plane(v, i);
        to[i] = part.x, to[i + 1] = part.y, to[i + 2] = part.z, to[i + 3] = part.w;
      }
    }
  }
  __device__ void put(int v, const float (&from)[V]) const {
    if constexpr (V == 1) {
      at[v] = from[0];
    } else {
#pragma unroll
      for (int i = 0; i < V; i += 4)
        *plane(v, i) = make_float4(from[i], from[i + 1], from[i + 2], from[i + 3]);
    }
  }
  __device__ float4* plane(int v, int i) const {
    return reinterpret_cast<float4*>(at) + i / 4 * vectors + v;
  }
};

template <class T, int V>
__device__ void load_parameter(float (&to)[V], const void* from, int wide, int v, float missing) {
  if (from == nullptr) {
#pragma unroll
    for (int i = 0; i < V; i++) to[i] = missing;
  } else if (wide) {
    load(to, static_cast<const float*>(from) + v * V);
  } else {
    load(to, static_cast<const T*>(from) + v * V);
  }
}

// The rows that are normalised: input, or its sum with a residual, rounded to R, and with dropout.
template <class T, class R, int V>
struct Rows {
  const T* input;
  const R* residual;
  const R* summed;  // where it is known already
  Dropout dropout;
  uint64_t seed;
  int cols;

  // Of all lanes of a warp together.
  __device__ uint32_t kept(int64_t row, int v) const {
    if (dropout.threshold == 0) return ~0u;
    return dropout.bits<V>(seed, static_cast<uint32_t>(row), 0, v);
  }

  __device__ void drop(uint32_t bits, float (&x)[V]) const {
    if (dropout.threshold == 0) return;
#pragma unroll
    for (int i = 0; i < V; i++)
      x[i] = (bits >> i & 1) && dropout.kept != 0 ? x[i] * dropout.kept : 0;
  }

  __device__ void load(int64_t row, int v, bool inside, float (&x)[V]) const {
    const int64_t at = row * cols + v * V;
    if (summed != nullptr || residual == nullptr) {
      if (!inside) return;
      if (summed != nullptr)
        cuda::load(x, summed + at);
      else
        cuda::load(x, input + at);
      return;
    }
    const uint32_t bits = kept(row, v);
    if (!inside) return;
    float other[V];
    cuda::load(x, input + at);
    cuda::load(other, residual + at);
    drop(bits, x);
#pragma unroll
    for (int i = 0; i < V; i++) x[i] = static_cast<float>(static_cast<R>(x[i] + other[i]));
  }
};

template <class T, class R, int V>
__device__ void forward(const T* input, const R* residual, const void* weight, const void* bias,
                        const uint64_t* seed, T* out, R* summed, float* mean_of, float* rstd_of,
                        const NormScalars& in) {
  const Team team;
  const int vectors = in.cols / V;
  const Rows<T, R, V> rows{
      input, residual, nullptr, {in.threshold, in.kept}, in.threshold == 0 ? 0 : *seed, in.cols};
  const Line<V> cache{reinterpret_cast<float*>(shared_memory) + threadIdx.y * in.cols, vectors};

  for (int64_t row = team.index; row < in.rows; row += team.count) {
    const auto again = [&](int v, bool inside, float (&x)[V]) {
      if (!in.cached) return rows.load(row, v, inside, x);
      if (inside) cache.get(v, x);
    };
    float sums[2] = {};  // of elements and of squares
    team.each(vectors, [&](int v, bool inside) {
      float x[V];
      rows.load(row, v, inside, x);
      if (!inside) return;
      if (summed != nullptr) store(summed + row * in.cols + v * V, x);
      if (in.cached) cache.put(v, x);
#pragma unroll
      for (int i = 0; i < V; i++) {
        sums[0] += x[i];
        sums[1] += x[i] * x[i];
      }
    });
    team.sum(sums);
    const float mean = in.centred ? sums[0] / in.cols : 0;
    float square[1] = {sums[1]};
    if (in.centred) {  // from the distances, since squares cancel
      square[0] = 0;
      team.each(vectors, [&](int v, bool inside) {
        float x[V];
        again(v, inside, x);
        if (!inside) return;
#pragma unroll
        for (int i = 0; i < V; i++) square[0] += (x[i] - mean) * (x[i] - mean);
      });
      team.sum(square);
    }
    const float rstd = 1 / sqrtf(square[0] / in.cols + in.eps);
    team.each(vectors, [&](int v, bool inside) {
      float x[V], w[V], b[V];
      again(v, inside, x);
      if (!inside) return;
      load_parameter<T>(w, weight, in.wide_weight, v, 1);
      load_parameter<T>(b, bias, in.wide_bias, v, 0);
#pragma unroll
      for (int i = 0; i < V; i++) x[i] = (x[i] - mean) * rstd * w[i] + b[i];
      store(out + row * in.cols + v * V, x);
    });
    if (team.thread == 0) {
      if (in.centred) mean_of[row] = mean;
      rstd_of[row] = rstd;
    }
  }
}

// Every team adds up its rows' part of the parameters' gradients, [teams, cols] in the order of
// Line; `fold` adds the teams. Both orders are fixed by the shape alone.
template <class T, class R, int V>
__device__ void backward(const T* grad_out, const R* grad_summed, const T* input, const R* residual,
                         const R* summed, const void* weight, const uint64_t* seed,
                         const float* mean_of, const float* rstd_of, T* grad_input,
                         R* grad_residual, float* weight_parts, float* bias_parts,
                         const NormScalars& in) {
  const Team team;
  const int vectors = in.cols / V;
  const Rows<T, R, V> rows{
      input, residual, summed, {in.threshold, in.kept}, in.threshold == 0 ? 0 : *seed, in.cols};
  const int lines =
      (in.cached ? 2 : 0) + (in.sums ? (weight_parts != nullptr) + (bias_parts != nullptr) : 0);
  float* shared = reinterpret_cast<float*>(shared_memory) + threadIdx.y * lines * in.cols;
  const auto line = [&](bool in_shared, float* elsewhere) {
    float* at = in_shared ? shared : elsewhere;
    if (in_shared) shared += in.cols;
    return Line<V>{at, vectors};
  };
  const Line<V> normal_cache = line(in.cached, nullptr), grad_cache = line(in.cached, nullptr);
  const auto parts_of = [&](float* parts) {
    return line(parts != nullptr && in.sums,
                parts == nullptr ? nullptr : parts + team.index * in.cols);
  };
  const Line<V> weight_sum = parts_of(weight_parts), bias_sum = parts_of(bias_parts);
  const float nothing[V] = {};
  team.each(vectors, [&](int v, bool inside) {
    if (inside && weight_parts != nullptr) weight_sum.put(v, nothing);
    if (inside && bias_parts != nullptr) bias_sum.put(v, nothing);
  });

  for (int64_t row = team.index; row < in.rows; row += team.count) {
    const float mean = in.centred ? mean_of[row] : 0, rstd = rstd_of[row];
    const auto load_both = [&](int v, bool inside, float (&normal)[V], float (&grad)[V]) {
      rows.load(row, v, inside, normal);
      if (!inside) return;
#pragma unroll
      for (int i = 0; i < V; i++) normal[i] = (normal[i] - mean) * rstd;
      load(grad, grad_out + row * in.cols + v * V);
    };
    float means[2] = {};  // of grad_out * weight, and of its product with the normal row
    if (grad_out != nullptr) {
      team.each(vectors, [&](int v, bool inside) {
        float normal[V], grad[V], w[V], sum[V];
        load_both(v, inside, normal, grad);
        if (!inside) return;
        load_parameter<T>(w, weight, in.wide_weight, v, 1);
#pragma unroll
        for (int i = 0; i < V; i++) {
          means[0] += grad[i] * w[i];
          means[1] += grad[i] * w[i] * normal[i];
        }
        if (in.cached) {
          normal_cache.put(v, normal);
          grad_cache.put(v, grad);
        }
        if (weight_parts != nullptr) {
          weight_sum.get(v, sum);
#pragma unroll
          for (int i = 0; i < V; i++) sum[i] += grad[i] * normal[i];
          weight_sum.put(v, sum);
        }
        if (bias_parts != nullptr) {
          bias_sum.get(v, sum);
#pragma unroll
          for (int i = 0; i < V; i++) sum[i] += grad[i];
          bias_sum.put(v, sum);
        }
      });
      team.sum(means);
      means[0] = in.centred ? means[0] / in.cols : 0;
      means[1] /= in.cols;
    }
    team.each(vectors, [&](int v, bool inside) {
      const int64_t at = row * in.cols + v * V;
      float dx[V] = {};
      if (grad_out != nullptr) {
        float normal[V], grad[V], w[V];
        if (!in.cached) load_both(v, inside, normal, grad);
        if (inside) {
          if (in.cached) {
            normal_cache.get(v, normal);
            grad_cache.get(v, grad);
          }
          load_parameter<T>(w, weight, in.wide_weight, v, 1);
#pragma unroll
          for (int i = 0; i < V; i++)
            dx[i] = (grad[i] * w[i] - means[0] - normal[i] * means[1]) * rstd;
        }
      }
      const uint32_t bits = rows.kept(row, v);
      if (!inside) return;
      if (grad_summed != nullptr) {
        float other[V];
        load(other, grad_summed + at);
#pragma unroll
        for (int i = 0; i < V; i++) dx[i] += other[i];
      }
      if (grad_residual != nullptr) store(grad_residual + at, dx);
      rows.drop(bits, dx);
      store(grad_input + at, dx);
    });
  }

  const auto write = [&](float* parts, const Line<V>& sum) {
    if (parts == nullptr || !in.sums) return;
    const Line<V> to{parts + team.index * in.cols, vectors};
    team.each(vectors, [&](int v, bool inside) {
      float values[V];
      if (!inside) return;
      sum.get(v, values);
      to.put(v, values);
    });
  };
  write(weight_parts, weight_sum);
  write(bias_parts, bias_sum);
}

// grad[c] = the sum of parts[c] over teams. A thread of a column adds every eighth.

template <class W>
__device__ void fold(const float* parts, W* grad, int teams, int cols, int width) {
  __shared__ float sums[kFolders][kWarp];
  const int place = static_cast<int>(blockIdx.x * kWarp + threadIdx.x);
  float sum = 0;
  if (place < cols)
    for (int team = static_cast<int>(threadIdx.y); team < teams; team += kFolders)
      sum += parts[int64_t{team} * cols + place];
  sums[threadIdx.y][threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.y > 0 || place >= cols) return;
  for (int i = 1; i < kFolders; i++) sum += sums[i][threadIdx.x];
  // From the order of Line.
  const int plane = width < 4 ? width : 4, stride = cols / width * plane;
  const int v = place % stride / plane;
  grad[v * width + place / stride * plane + place % plane] = static_cast<W>(sum);
}

}  // namespace
}  // namespace fastattn::cuda

using namespace fastattn::cuda;

#define FASTATTN_NORM(name, T, R, V)                                                               \
  extern "C" __global__ void __launch_bounds__(kNormThreads, 1) norm_forward_##name##_x##V(        \
      const T* input, const R* residual, const void* weight, const void* bias,                     \
      const uint64_t* seed, T* out, R* summed, float* mean, float* rstd, NormScalars in) {         \
    forward<T, R, V>(input, residual, weight, bias, seed, out, summed, mean, rstd, in);            \
  }                                                                                                \
  extern "C" __global__ void __launch_bounds__(kNormThreads, 1) norm_backward_##name##_x##V(       \
      const T* grad_out, const R* grad_summed, const T* input, const R* residual, const R* summed, \
      const void* weight, const uint64_t* seed, const float* mean, const float* rstd,              \
      T* grad_input, R* grad_residual, float* weight_parts, float* bias_parts, NormScalars in) {   \
    backward<T, R, V>(grad_out, grad_summed, input, residual, summed, weight, seed, mean, rstd,    \
                      grad_input, grad_residual, weight_parts, bias_parts, in);                    \
  }

FASTATTN_NORM(f32, float, float, 1)
FASTATTN_NORM(f32, float, float, 4)
FASTATTN_NORM(bf16, __nv_bfloat16, __nv_bfloat16, 1)
FASTATTN_NORM(bf16, __nv_bfloat16, __nv_bfloat16, 8)
FASTATTN_NORM(bf16_f32, __nv_bfloat16, float, 1)
FASTATTN_NORM(bf16_f32, __nv_bfloat16, float, 4)
FASTATTN_NORM(f16, __half, __half, 1)
FASTATTN_NORM(f16, __half, __half, 8)
FASTATTN_NORM(f16_f32, __half, float, 1)
FASTATTN_NORM(f16_f32, __half, float, 4)

#define FASTATTN_NORM_FOLD(name, W)                                                   \
  extern "C" __global__ void __launch_bounds__(kFolders* kWarp)                       \
      norm_fold_##name(const float* parts, W* grad, int teams, int cols, int width) { \
    fold<W>(parts, grad, teams, cols, width);                                         \
  }

FASTATTN_NORM_FOLD(f32, float)
FASTATTN_NORM_FOLD(bf16, __nv_bfloat16)
FASTATTN_NORM_FOLD(f16, __half)
