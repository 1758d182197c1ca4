// What the products of a layer share, whatever multiplies: which part of the result is a block's,
// and what follows the sums.
#pragma once

#include "cuda/tile.cuh"
#include "ffn/activation.h"
#include "ffn/scalars.h"

namespace fastattn::cuda {
namespace {

// The square of out, `width` columns wide, that is the block's. Blocks walk down bands of a few
// rows of squares, so that those which run at one time share what they read.
struct Square {
  static constexpr int kSide = ProductTiles<2>::kSide;
  int row, col;

  __device__ Square(const ProductScalars& in, int width, int block) {
    const int down = (in.rows + kSide - 1) / kSide;
    const int each = kBandRows * ((in.cols + width - 1) / width);
    const int band = block / each * kBandRows;
    const int height = min(down - band, kBandRows);
    row = (band + block % each % height) * kSide;
    col = block % each / height * width;
  }
};

template <class T, int N>
__device__ void add_from(float (&x)[N], const T* from) {
  if (from == nullptr) return;
  float term[N];
  load(term, from);
#pragma unroll
  for (int i = 0; i < N; i++) x[i] += term[i];
}

// 1 / x to within an eps or so, for 16 bits without the steps of a division.
template <class T>
__device__ float reciprocal(float x) {
  return std::is_same_v<T, float> ? 1 / x : ptx::reciprocal(x);
}
// To within an eps or so of 1, or of x.
__device__ float exponential(float x) { return ptx::exp2(x * 1.44269504088896340736f); }
template <class T>
__device__ float sigmoid(float x) {
  return reciprocal<T>(1 + exponential(-x));
}
// Without 1 - sigmoid(x), of which little is left.
template <class T>
__device__ float sigmoid_slope(float x) {
  return sigmoid<T>(x) * sigmoid<T>(-x);
}
// 2 sqrt(2 / pi) (x + 0.044715 x^3)
__device__ float tanh_inner(float x) {
  return x * (1.5957691216057308f + 0.0713548162726f * (x * x));
}

// exp(-x^2 / 2), and the part of a normal distribution that lies beyond |x|. For 16 bits that is
// the former times a polynomial in 1 / (1 + 0.31 |x|), as in Abramowitz and Stegun 7.1.26, whose
// coefficients keep the relative error below 8e-6 up to 20.
struct Normal {
  float bell, tail;
};
template <class T>
__device__ Normal normal(float x) {
  const float bell = ptx::exp2(x * x * -0.72134752044448170368f);
  if constexpr (std::is_same_v<T, float>)
    return {bell, 0.5f * erfcf(fabsf(x) * 0.70710678118654752f)};
  const float u = ptx::reciprocal(1 + 0.31f * fabsf(x));
  float sum = -0.072302002193f;
  sum = sum * u + 0.175918381181f;
  sum = sum * u + 0.020496709096f;
  sum = sum * u + 0.131107358969f;
  sum = sum * u + 0.120965004126f;
  sum = sum * u + 0.123817495168f;
  return {bell, sum * u * bell};
}

// activation(x), and its derivative there.
struct Activated {
  float value, slope;
};
template <class T, Activation Kind>
__device__ Activated activated(float x) {
  if constexpr (Kind == Activation::relu) {
    return {x > 0 ? x : x == x ? 0 : x, x > 0 ? 1.0f : 0.0f};
  } else if constexpr (Kind == Activation::gelu) {
    const auto [bell, tail] = normal<T>(x);
    const float below = x > 0 ? 1 - tail : tail;
    return {fmaxf(x, 0) - fabsf(x) * tail, below + x * 0.39894228040143267794f * bell};
  } else if constexpr (Kind == Activation::gelu_tanh) {
    const float inner = tanh_inner(x), s = sigmoid<T>(inner);
    const float steepness = 1.5957691216057308f + 0.2140644488178f * (x * x);
    return {x * s, s + x * sigmoid_slope<T>(inner) * steepness};
  } else if constexpr (Kind == Activation::silu) {
    const float s = sigmoid<T>(x);
    return {x * s, s + x * sigmoid_slope<T>(x)};
  } else {
    return {x, 1};
  }
}

// Calls f with `activated` of this kind, so that many elements need one branch.
template <class T, class F>
__device__ void with_activation(int kind, F&& f) {
  const auto call = [&]<Activation Kind>() { f([](float x) { return activated<T, Kind>(x); }); };
  switch (static_cast<Activation>(kind)) {
    case Activation::identity:
      return call.template operator()<Activation::identity>();
    case Activation::relu:
      return call.template operator()<Activation::relu>();
    case Activation::gelu:
      return call.template operator()<Activation::gelu>();
    case Activation::gelu_tanh:
      return call.template operator()<Activation::gelu_tanh>();
    case Activation::silu:
      return call.template operator()<Activation::silu>();
  }
}

// What is added to a product, and what comes of it; null where it is not there.
template <class T>
struct Tensors {
  const T* bias;
  const T* gate_bias;
  const T* add;
  T* out;
  T* pre;
  T* gate;
};

// Stores N neighbouring elements of out, and what lies beside them, from place `at` on: x and gate
// have all that is added to them, and are rounded, as backward will see them.
template <class T, int N>
__device__ void conclude(const Tensors<T>& of, const ProductScalars& in, int64_t at, float (&x)[N],
                         const float (&gate)[N]) {
  if (of.pre != nullptr) store(of.pre + at, x);
  if (of.gate != nullptr) store(of.gate + at, gate);
  with_activation<T>(in.activation, [&](auto&& activation) {
    if (in.gated) {
#pragma unroll
      for (int i = 0; i < N; i++) x[i] *= activation(gate[i]).value;
    } else {
#pragma unroll
      for (int i = 0; i < N; i++) x[i] = activation(x[i]).value;
    }
  });
  store(of.out + at, x);
}

}  // namespace
}  // namespace fastattn::cuda
