// Layer norm and RMS norm on a GPU, forward and backward: a team of threads for each row.
#include "norm/team.cuh"

namespace fastattn::cuda {
namespace {

// A thread holds kHeld vectors of a row. What a longer row has beyond is read again in each pass.
// `Plain`: nothing is added to the rows.
template <class T, class R, int V, int N, bool Plain>
__device__ void forward(const T* input, const R* residual, const void* weight, const void* bias,
                        const uint64_t* seed, T* out, R* summed, float* mean_of, float* rstd_of,
                        const NormScalars& in) {
  constexpr bool whole = N == kHeld;
  Team<false> team;
  const int64_t row = int64_t{blockIdx.x} * blockDim.y + threadIdx.y;
  const int vectors = row < in.rows ? in.cols / V : 0, step = team.size * N;
  const Rows<T, R, V> rows{input, residual, nullptr, seed, in};
  Packed<R, V> held[N];
  const auto load_all = [&](int first) {
    if constexpr (Plain) {
      const R* const from = reinterpret_cast<const R*>(input) + row * in.cols;
#pragma unroll
      for (int n = 0; n < N; n++)
        if (first + n * team.size < vectors) held[n].load(from + (first + n * team.size) * V);
    } else {
      const uint32_t bits = rows.template kept<N>(row, first, team.size);
      Packed<T, V> own[N];
#pragma unroll
      for (int n = 0; n < N; n++)
        if (first + n * team.size < vectors)
          rows.begin(row, first + n * team.size, held[n], own[n]);
#pragma unroll
      for (int n = 0; n < N; n++)
        if (first + n * team.size < vectors) rows.finish(bits >> n * V, held[n], own[n]);
      if (summed != nullptr)
#pragma unroll
        for (int n = 0; n < N; n++)
          if (first + n * team.size < vectors)
            held[n].store(summed + row * in.cols + (first + n * team.size) * V);
    }
  };
  // Calls f(v, x) for this thread's vectors.
  const auto each = [&](auto&& f) {
    for (int at = 0; at < (whole ? 1 : vectors); at += step) {
      const int first = at + team.thread;
      if constexpr (!whole) load_all(first);
#pragma unroll
      for (int n = 0; n < N; n++) {
        const int v = first + n * team.size;
        if (v >= vectors) continue;
        f(v, held[n]);
      }
    }
  };
  if constexpr (whole) load_all(team.thread);

  // Divided as if exactly: where a row's values are alike, its mean's rounding is all of the error.
  float mean = 0;
  if (in.centred) {
    float sum[1] = {};
    each([&](int, const Packed<R, V>& own) {
#pragma unroll
      for (int i = 0; i < V; i += kPiece<V>) {
        float x[kPiece<V>];
        own.get(x, i);
#pragma unroll
        for (int j = 0; j < kPiece<V>; j++) sum[0] += x[j];
      }
    });
    if constexpr (!whole) summed = nullptr;  // it is stored
    team.sum(sum);
    mean = sum[0] * in.share;
    mean = fmaf(fmaf(-mean, static_cast<float>(in.cols), sum[0]), in.share, mean);
  }
  float square[1] = {};  // of the distances, since squares of elements cancel
  each([&](int, const Packed<R, V>& own) {
#pragma unroll
    for (int i = 0; i < V; i += kPiece<V>) {
      float x[kPiece<V>];
      own.get(x, i);
#pragma unroll
      for (int j = 0; j < kPiece<V>; j++) square[0] += (x[j] - mean) * (x[j] - mean);
    }
  });
  if constexpr (!whole) summed = nullptr;
  team.sum(square);
  const float rstd = rsqrtf(square[0] * in.share + in.eps);
  T* const to = out + row * in.cols;
  const auto finish = [&](const auto& load_parameters) {
    each([&](int v, const Packed<R, V>& own) {
      float w[V], b[V];
      load_parameters(v, w, b);
      Packed<T, V> result;
#pragma unroll
      for (int i = 0; i < V; i += kPiece<V>) {
        float x[kPiece<V>];
        own.get(x, i);
#pragma unroll
        for (int j = 0; j < kPiece<V>; j++) x[j] = fmaf((x[j] - mean) * rstd, w[i + j], b[i + j]);
        result.put(x, i);
      }
      result.store(to + v * V);
    });
  };
  // Parameters as they mostly are, so that all loads of a vector are on their way at once.
  constexpr bool wide = std::is_same_v<T, float>;
  if (weight != nullptr && (wide || (!in.wide_weight && (bias == nullptr || !in.wide_bias))))
    finish([&](int v, float (&w)[V], float (&b)[V]) {
      load(w, static_cast<const T*>(weight) + v * V);
#pragma unroll
      for (int i = 0; i < V; i++) b[i] = 0;
      if (bias != nullptr) load(b, static_cast<const T*>(bias) + v * V);
    });
  else
    finish([&](int v, float (&w)[V], float (&b)[V]) {
      load_parameter<T>(w, weight, in.wide_weight, v, 1);
      load_parameter<T>(b, bias, in.wide_bias, v, 0);
    });
  if (team.thread == 0 && row < in.rows) {
    if (in.centred) mean_of[row] = mean;
    rstd_of[row] = rstd;
  }
}

template <int V>
__device__ void put_slot(float* to, const float* from) {
  if constexpr (V == 1)
    *to = *from;
  else
    ptx::store_shared(to, from[0], from[1], from[2], from[3]);
}

// Every block adds up its rows' part of the parameters' gradients, [blocks, cols]; `fold` adds the
// blocks. Both orders are fixed by the shape alone.
//
// A row stays in registers, where the next one takes its place, vector by vector, as soon as the
// last pass is through with it. So do the sums for the bias, and those for the weight stay in
// shared memory. Rows that are longer are read in each pass, and their sums are in memory.
template <class T, class R, int V, int N>
__device__ void backward(const T* grad_out, const R* grad_summed, const T* input, const R* residual,
                         const R* summed, const void* weight, const uint64_t* seed,
                         const float* mean_of, const float* rstd_of, T* grad_input,
                         R* grad_residual, float* weight_parts, float* bias_parts,
                         const NormScalars& in) {
  constexpr bool whole = N == kHeld;
  constexpr int piece = kPiece<V>;
  Team<true> team;
  const int size = team.size, step = size * N;
  const Rows<T, R, V> rows{input, residual, summed, seed, in};
  const int most = in.cols / V;
  const auto vectors_of = [&](int64_t row) { return row < in.rows ? most : 0; };
  float* weight_part = weight_parts + int64_t{blockIdx.x} * in.cols;
  float* bias_part = bias_parts + int64_t{blockIdx.x} * in.cols;
  const int threads = size * static_cast<int>(blockDim.y);
  const int self = static_cast<int>(threadIdx.y) * size + team.thread;
  float bias_sum[N][V] = {};
  const auto add = [](float* to, const float (&normal)[piece], const float (&grad)[piece]) {
    float sum[piece];
    load(sum, to);
#pragma unroll
    for (int j = 0; j < piece; j++) sum[j] = fmaf(normal[j], grad[j], sum[j]);
    put_floats(to, sum);
  };
  const float zeros[piece] = {};
  if constexpr (whole) {
#pragma unroll
    for (int n = 0; n < N; n++)
#pragma unroll
      for (int i = 0; i < V; i += piece) put_floats(slot<V, N>(self, n, i), zeros);
  } else {
    for (int v = team.thread; v < most; v += size)
#pragma unroll
      for (int i = 0; i < V; i += piece) {
        if (weight_parts != nullptr) put_floats(weight_part + v * V + i, zeros);
        if (bias_parts != nullptr) put_floats(bias_part + v * V + i, zeros);
      }
  }

  // Without grad_out they stay zero, as do the statistics, and there is no weight.
  Packed<R, V> x[N] = {};
  Packed<T, V> g[N] = {};
  const auto load_all = [&](int64_t row, int first, int vectors, uint32_t bits) {
    if (grad_out == nullptr) return;
#pragma unroll
    for (int n = 0; n < N; n++) {
      const int v = first + n * size;
      if (v >= vectors) continue;
      Packed<T, V> own;
      rows.begin(row, v, x[n], own);
      rows.finish(bits >> n * V, x[n], own);
      g[n].load(grad_out + row * in.cols + v * V);
    }
  };
  // Whether rows are loaded a turn before.
  const bool ahead = whole && rows.known != nullptr && grad_out != nullptr;
  const auto load_statistics = [&](int64_t row, float& mean, float& rstd) {
    if (row >= in.rows || grad_out == nullptr) return;
    mean = in.centred ? mean_of[row] : 0;
    rstd = rstd_of[row];
  };

  int64_t row = int64_t{blockIdx.x} * blockDim.y + threadIdx.y;
  float mean = 0, rstd = 0;
  const int64_t count = int64_t{gridDim.x} * blockDim.y;
  // All teams of a warp take as many turns.
  while (row - threadIdx.y < in.rows) {
    const int vectors = vectors_of(row);
    uint32_t bits = 0;
    if constexpr (whole) bits = rows.template kept<N>(row, team.thread, size);
    if (!ahead || row < count) {
      load_statistics(row, mean, rstd);
      if constexpr (whole) load_all(row, team.thread, vectors, bits);
    }
    const float shift = -mean * rstd;
    float means[2] = {};  // of grad_out * weight, and of its product with the normal row
    for (int at = 0; at < (whole ? 1 : vectors); at += step) {
      const int first = at + team.thread;
      if constexpr (!whole) load_all(row, first, vectors, rows.template kept<N>(row, first, size));
#pragma unroll
      for (int n = 0; n < N; n++) {
        const int v = first + n * size;
        if (v >= vectors) continue;
        float w[V];
        load_parameter<T>(w, weight, in.wide_weight, v, 1);
#pragma unroll
        for (int i = 0; i < V; i += piece) {
          float normal[piece], grad[piece];
          x[n].get(normal, i);
          g[n].get(grad, i);
#pragma unroll
          for (int j = 0; j < piece; j++) {
            normal[j] = fmaf(normal[j], rstd, shift);
            w[i + j] *= grad[j];
            means[0] += w[i + j];
            means[1] = fmaf(w[i + j], normal[j], means[1]);
          }
          if constexpr (whole) {
            add(slot<V, N>(self, n, i), normal, grad);
#pragma unroll
            for (int j = 0; j < piece; j++) bias_sum[n][i + j] += grad[j];
          } else {
            float ones[piece];
#pragma unroll
            for (int j = 0; j < piece; j++) ones[j] = 1;
            if (weight_parts != nullptr) add(weight_part + v * V + i, normal, grad);
            if (bias_parts != nullptr) add(bias_part + v * V + i, ones, grad);
          }
        }
      }
    }
    team.sum(means);
    means[0] *= in.centred ? in.share * rstd : 0;
    means[1] *= in.share;
    const int64_t next = row + count;
    float next_mean = 0, next_rstd = 0;
    if (ahead) load_statistics(next, next_mean, next_rstd);
    for (int at = 0; at < (whole ? 1 : vectors); at += step) {
      const int first = at + team.thread;
      if constexpr (!whole) {
        bits = rows.template kept<N>(row, first, size);
        load_all(row, first, vectors, bits);
      }
#pragma unroll
      for (int n = 0; n < N; n++) {
        const int v = first + n * size;
        if (v >= vectors) continue;
        const int64_t place = row * in.cols + v * V;
        float w[V];
        load_parameter<T>(w, weight, in.wide_weight, v, 1);
        Packed<R, V> other, sum;
        Packed<T, V> dropped;
        if (grad_summed != nullptr) other.load(grad_summed + place);
#pragma unroll
        for (int i = 0; i < V; i += piece) {
          float dx[piece], grad[piece];
          x[n].get(dx, i);
          g[n].get(grad, i);
#pragma unroll
          for (int j = 0; j < piece; j++) {
            const float normal = fmaf(dx[j], rstd, shift);
            dx[j] = fmaf(fmaf(-normal, means[1], grad[j] * w[i + j]), rstd, -means[0]);
          }
          if (grad_summed != nullptr) {
            float more[piece];
            other.get(more, i);
#pragma unroll
            for (int j = 0; j < piece; j++) dx[j] += more[j];
          }
          sum.put(dx, i);
          rows.drop(bits >> (n * V + i), dx);
          dropped.put(dx, i);
        }
        if (ahead && next < in.rows) {
          x[n].load(rows.known + next * in.cols + v * V);
          g[n].load(grad_out + next * in.cols + v * V);
        }
        if (grad_residual != nullptr) sum.store(grad_residual + place);
        dropped.store(grad_input + place);
      }
    }
    row = next;
    mean = next_mean;
    rstd = next_rstd;
  }

  if constexpr (whole) {
    // A block's teams are added up in their order.
    const auto write = [&](float* part) {
      __syncthreads();
      for (int col = self * piece; col < in.cols; col += threads * piece) {
        const int v = col / V;
        float sum[piece] = {}, lost[piece] = {};
        for (int other = v % size; other < threads; other += size) {
          float more[piece];
          load(more, slot<V, N>(other, v / size, col % V));
#pragma unroll
          for (int j = 0; j < piece; j++) add_exactly(sum[j], lost[j], more[j]);
        }
#pragma unroll
        for (int j = 0; j < piece; j++) sum[j] += lost[j];
        put_floats(part + col, sum);
      }
    };
    if (weight_parts != nullptr) write(weight_part);
    if (bias_parts != nullptr) {
      __syncthreads();
#pragma unroll
      for (int n = 0; n < N; n++)
#pragma unroll
        for (int i = 0; i < V; i += piece) put_slot<V>(slot<V, N>(self, n, i), bias_sum[n] + i);
      write(bias_part);
    }
  }
}

// grad[c] = the sum of parts[c] over blocks, of the weight and of the bias. A warp adds up every
// kFolders-th part.
template <class T>
__device__ void fold(const float* weight_parts, const float* bias_parts, void* grad_weight,
                     void* grad_bias, const NormFold& in) {
  constexpr int together = 8;  // loads on their way
  __shared__ float sums[kFolders][kWarp];
  const float* parts = blockIdx.y == 0 ? weight_parts : bias_parts;
  void* grad = blockIdx.y == 0 ? grad_weight : grad_bias;
  if (grad == nullptr) return;
  const int col = static_cast<int>(blockIdx.x * kWarp + threadIdx.x);
  float sum = 0, lost = 0;
#pragma unroll 1
  for (int first = static_cast<int>(threadIdx.y); first < in.parts; first += kFolders * together) {
    float values[together] = {};
#pragma unroll
    for (int i = 0; i < together; i++) {
      const int part = first + i * kFolders;
      if (part < in.parts && col < in.cols) values[i] = parts[int64_t{part} * in.cols + col];
    }
#pragma unroll
    for (int i = 0; i < together; i++) add_exactly(sum, lost, values[i]);
  }
  sum += lost;
  sums[threadIdx.y][threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.y > 0 || col >= in.cols) return;
  lost = 0;
#pragma unroll
  for (int i = 1; i < kFolders; i++) add_exactly(sum, lost, sums[i][threadIdx.x]);
  sum += lost;
  if (blockIdx.y == 0 ? in.wide_weight : in.wide_bias)
    static_cast<float*>(grad)[col] = sum;
  else
    static_cast<T*>(grad)[col] = static_cast<T>(sum);
}

}  // namespace
}  // namespace fastattn::cuda

using namespace fastattn::cuda;

#define FASTATTN_NORM_FORWARD(name, T, R, V, N, Plain)                                             \
  extern "C" __global__ void __launch_bounds__(kNormThreads, (N) == kHeld ? 2 : 1)                 \
      norm_forward_##name(const T* input, const R* residual, const void* weight, const void* bias, \
                          const uint64_t* seed, T* out, R* summed, float* mean, float* rstd,       \
                          NormScalars in) {                                                        \
    forward<T, R, V, N, Plain>(input, residual, weight, bias, seed, out, summed, mean, rstd, in);  \
  }
#define FASTATTN_NORM_OF(name, T, R, V, N)                                                         \
  FASTATTN_NORM_FORWARD(name, T, R, V, N, false)                                                   \
  extern "C" __global__ void __launch_bounds__(kNormThreads, 1) norm_backward_##name(              \
      const T* grad_out, const R* grad_summed, const T* input, const R* residual, const R* summed, \
      const void* weight, const uint64_t* seed, const float* mean, const float* rstd,              \
      T* grad_input, R* grad_residual, float* weight_parts, float* bias_parts, NormScalars in) {   \
    backward<T, R, V, N>(grad_out, grad_summed, input, residual, summed, weight, seed, mean, rstd, \
                         grad_input, grad_residual, weight_parts, bias_parts, in);                 \
  }
#define FASTATTN_NORM(name, T, R, V)            \
  FASTATTN_NORM_OF(name##_x##V, T, R, V, kHeld) \
  FASTATTN_NORM_OF(name##_x##V##_long, T, R, V, 1)

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

FASTATTN_NORM_FORWARD(plain_f32_x4, float, float, 4, kHeld, true)
FASTATTN_NORM_FORWARD(plain_bf16_x8, __nv_bfloat16, __nv_bfloat16, 8, kHeld, true)
FASTATTN_NORM_FORWARD(plain_f16_x8, __half, __half, 8, kHeld, true)

#define FASTATTN_NORM_FOLD(name, T)                                                           \
  extern "C" __global__ void __launch_bounds__(kFolders* kWarp)                               \
      norm_fold_##name(const float* weight_parts, const float* bias_parts, void* grad_weight, \
                       void* grad_bias, NormFold in) {                                        \
    fold<T>(weight_parts, bias_parts, grad_weight, grad_bias, in);                            \
  }

FASTATTN_NORM_FOLD(f32, float)
FASTATTN_NORM_FOLD(bf16, __nv_bfloat16)
FASTATTN_NORM_FOLD(f16, __half)
