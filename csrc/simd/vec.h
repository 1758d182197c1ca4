// The vector vocabulary: FASTATTN_LANES fp32 lanes in compiler vector types, so that one body
// serves every ISA; the flags of the object file decide what instructions it becomes.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>
#include <utility>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "common/dtype.h"
#include "common/isa.h"
#include "common/parallel.h"
#include "common/view.h"

#define FASTATTN_INLINE inline __attribute__((always_inline))

// Internal linkage: nothing compiled with wide flags may be linked into an object of another ISA.
namespace fastattn::FASTATTN_ISA {
namespace {

constexpr Isa kIsa = Isa::FASTATTN_ISA;

template <class A>
constexpr int lanes = sizeof(A) == 8 && FASTATTN_LANES > 1 ? FASTATTN_LANES / 2 : FASTATTN_LANES;

template <class E, int N>
struct VectorOf {
  typedef E type __attribute__((vector_size(sizeof(E) * N)));
};
template <class E, int N>
using Vector = typename VectorOf<E, N>::type;

template <class A>
using Vec = Vector<A, lanes<A>>;  // A is float or double
using VecU = Vector<uint32_t, lanes<float>>;
using VecI = Vector<int32_t, lanes<float>>;
using VecH = Vector<uint16_t, lanes<float>>;

constexpr double kLog2e = 1.44269504088896340736, kLn2 = 0.69314718055994530942;

template <class A>
constexpr A minus_infinity = -std::numeric_limits<A>::infinity();

constexpr int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }
constexpr int64_t ceil_div(int64_t n, int64_t by) { return (n + by - 1) / by; }
constexpr int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
constexpr int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

template <class To, class From>
FASTATTN_INLINE To bits(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

template <class A>
FASTATTN_INLINE Vec<A> set(A value) {
  return value - Vec<A>{};  // which is `value`, a zero's sign too
}

// The elements of two vectors, in the order that a pattern of indices gives.
template <class V, size_t... I, class Pattern>
FASTATTN_INLINE V shuffle(V a, V b, std::index_sequence<I...>, Pattern pattern) {
#if defined(__clang__) || __GNUC__ >= 12
  return __builtin_shufflevector(a, b, pattern(static_cast<int>(I))...);
#else
  return __builtin_shuffle(a, b, decltype(a == b){pattern(static_cast<int>(I))...});
#endif
}

// fp16 <-> fp32 in integers (IEEE 754 binary16), for ISAs without an instruction for it.
FASTATTN_INLINE Vec<float> widen_f16(VecH half) {
#if defined(__AVX512F__) && FASTATTN_LANES == 16
  return bits<Vec<float>>(_mm512_maskz_cvtph_ps(0xffff, bits<__m256i>(half)));
#elif defined(__F16C__) && FASTATTN_LANES == 8
  return bits<Vec<float>>(_mm256_cvtph_ps(bits<__m128i>(half)));
#else
  const VecU wide = __builtin_convertvector(half, VecU);
  const VecU sign = (wide & 0x8000u) << 16;
  const VecU magnitude = (wide & 0x7fffu) << 13;
  // Scaling by 2^112 moves the exponent's bias and normalises subnormals at once.
  Vec<float> value = bits<Vec<float>>(magnitude) * 0x1p112f;
  const VecU special = bits<VecU>((wide & 0x7c00u) == 0x7c00u);
  const VecU infinite = magnitude | 0x7f800000u;
  return bits<Vec<float>>(sign | (infinite & special) | (bits<VecU>(value) & ~special));
#endif
}

FASTATTN_INLINE VecH narrow_f16(Vec<float> value) {
#if defined(__AVX512F__) && FASTATTN_LANES == 16
  return bits<VecH>(_mm512_maskz_cvtps_ph(0xffff, bits<__m512>(value), _MM_FROUND_TO_NEAREST_INT));
#elif defined(__F16C__) && FASTATTN_LANES == 8
  return bits<VecH>(_mm256_cvtps_ph(bits<__m256>(value), _MM_FROUND_TO_NEAREST_INT));
#else
  const VecU all = bits<VecU>(value);
  const VecU sign = (all >> 16) & 0x8000u;
  const VecU magnitude = all & 0x7fffffffu;
  const VecU rounded =
      (magnitude - (112u << 23) + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;  // to nearest even
  // Below 2^-14 the result is subnormal: adding 0.5 leaves its rounded bits in the low end.
  const VecU small = bits<VecU>(bits<Vec<float>>(magnitude) + 0.5f) - 0x3f000000u;
  const VecU is_small = bits<VecU>(magnitude < 0x38800000u);
  const VecU is_large = bits<VecU>(magnitude >= 0x477ff000u);
  const VecU is_nan = bits<VecU>(magnitude > 0x7f800000u);
  VecU half = (small & is_small) | (rounded & ~is_small);
  half = (half & ~is_large) | (is_large & 0x7c00u) | (is_nan & 0x200u);
  return __builtin_convertvector(half | sign, VecH);
#endif
}

template <class A>
FASTATTN_INLINE Vec<A> load(const A* from) {
  Vec<A> to;
  std::memcpy(&to, from, sizeof(to));
  return to;
}
template <class A>
FASTATTN_INLINE Vec<float> load(const bf16* from) {
  VecH half;
  std::memcpy(&half, from, sizeof(half));
  // GCC 12 converts in two halves.
#if defined(__AVX512F__) && FASTATTN_LANES == 16
  return bits<Vec<float>>(bits<VecU>(_mm512_maskz_cvtepu16_epi32(0xffff, bits<__m256i>(half)))
                          << 16);
#elif defined(__AVX2__) && FASTATTN_LANES == 8
  return bits<Vec<float>>(bits<VecU>(_mm256_cvtepu16_epi32(bits<__m128i>(half))) << 16);
#else
  return bits<Vec<float>>(__builtin_convertvector(half, VecU) << 16);
#endif
}
template <class A>
FASTATTN_INLINE Vec<float> load(const f16* from) {
  VecH half;
  std::memcpy(&half, from, sizeof(half));
  return widen_f16(half);
}

FASTATTN_INLINE void store(float* to, Vec<float> from) { std::memcpy(to, &from, sizeof(from)); }
FASTATTN_INLINE void store(double* to, Vec<double> from) { std::memcpy(to, &from, sizeof(from)); }
FASTATTN_INLINE void store(bf16* to, Vec<float> from) {
  const VecU all = bits<VecU>(from);
  const VecU rounded = (all + 0x7fffu + ((all >> 16) & 1u)) >> 16;  // to nearest even
  const VecU number = bits<VecU>(from == from);
  const VecH half = __builtin_convertvector((rounded & number) | (~number & 0x7fc0u), VecH);
  std::memcpy(to, &half, sizeof(half));
}
FASTATTN_INLINE void store(f16* to, Vec<float> from) {
  const VecH half = narrow_f16(from);
  std::memcpy(to, &half, sizeof(half));
}

// Stores past the caches what no one will find there anyhow, so that memory is not read before it
// is written. `to` is aligned to what is stored; `end_stream` comes before another thread may look.
template <class A, class T>
FASTATTN_INLINE void stream(T* to, Vec<A> from) {
  T part[lanes<A>];
  store(part, from);
#if defined(__AVX512F__) && FASTATTN_LANES == 16
  if constexpr (sizeof(part) == 64) {
    __m512i whole;
    std::memcpy(&whole, part, sizeof(part));
    return _mm512_stream_si512(reinterpret_cast<__m512i*>(to), whole);
  }
#endif
#if defined(__AVX2__) && FASTATTN_LANES >= 8
  if constexpr (sizeof(part) == 32) {
    __m256i whole;
    std::memcpy(&whole, part, sizeof(part));
    return _mm256_stream_si256(reinterpret_cast<__m256i*>(to), whole);
  }
#endif
  std::memcpy(to, part, sizeof(part));
}
FASTATTN_INLINE void end_stream() {
#if defined(__AVX2__) && FASTATTN_LANES >= 8
  _mm_sfence();
#endif
}

// The first `count` elements, 0 < count < lanes; the others load as 0.
template <class A, class T>
FASTATTN_INLINE Vec<A> load_part(const T* from, int64_t count) {
  T padded[lanes<A>] = {};
  std::memcpy(padded, from, static_cast<size_t>(count) * sizeof(T));
  return load<A>(padded);
}
template <class A, class T>
FASTATTN_INLINE void store_part(T* to, Vec<A> from, int64_t count) {
  T padded[lanes<A>];
  store(padded, from);
  std::memcpy(to, padded, static_cast<size_t>(count) * sizeof(T));
}

template <class A, class T>
FASTATTN_INLINE A load_one(const T* from) {
  return load_part<A>(from, 1)[0];
}
template <>
FASTATTN_INLINE float load_one<float, float>(const float* from) {
  return *from;
}
template <>
FASTATTN_INLINE double load_one<double, double>(const double* from) {
  return *from;
}

// Calls f(offset, count) over [0, size) in whole vectors and one last part; f is inlined twice.
template <class A, class F>
FASTATTN_INLINE void each_vector(int64_t size, F&& f) {
  int64_t i = 0;
  for (; i + lanes<A> <= size; i += lanes<A>) f(i, std::integral_constant<int64_t, lanes<A>>{});
  if (i < size) f(i, size - i);
}
template <class A, class T, class Count>
FASTATTN_INLINE Vec<A> load_count(const T* from, Count count) {
  if constexpr (std::is_same_v<Count, int64_t>) {
    return load_part<A>(from, count);
  } else {
    return load<A>(from);
  }
}
template <class A, class T, class Count>
FASTATTN_INLINE void store_count(T* to, Vec<A> from, Count count) {
  if constexpr (std::is_same_v<Count, int64_t>) {
    store_part<A>(to, from, count);
  } else {
    store(to, from);
  }
}

template <class A, class T>
void load_row(A* to, const T* from, int64_t stride, int64_t count) {
  if (stride == 1) {
    each_vector<A>(
        count, [&](int64_t c, auto n) { store_count<A>(to + c, load_count<A>(from + c, n), n); });
  } else {
    for (int64_t c = 0; c < count; c++) to[c] = load_one<A>(from + c * stride);
  }
}

// Where one is NaN, b.
template <class V>
FASTATTN_INLINE V max(V a, V b) {
  return a > b ? a : b;
}
template <class V>
FASTATTN_INLINE V min(V a, V b) {
  return a < b ? a : b;
}
#if defined(__AVX2__) && FASTATTN_LANES == 8  // one instruction, which g++ does not find by itself
template <>
FASTATTN_INLINE Vec<float> max(Vec<float> a, Vec<float> b) {
  return bits<Vec<float>>(_mm256_max_ps(bits<__m256>(a), bits<__m256>(b)));
}
template <>
FASTATTN_INLINE Vec<float> min(Vec<float> a, Vec<float> b) {
  return bits<Vec<float>>(_mm256_min_ps(bits<__m256>(a), bits<__m256>(b)));
}
#endif

// Folds the upper half of a vector onto the lower with f until one lane is left.
template <class E, int N, class F>
FASTATTN_INLINE E fold(Vector<E, N> v, const F& f) {
  if constexpr (N == 1) {
    return v[0];
  } else {
    Vector<E, N / 2> half[2];
    std::memcpy(half, &v, sizeof(v));
    return fold<E, N / 2>(f(half[0], half[1]), f);
  }
}
template <class A>
FASTATTN_INLINE A sum(Vec<A> v) {
  return fold<A, lanes<A>>(v, [](auto a, auto b) { return a + b; });
}
template <class A>
FASTATTN_INLINE A highest(Vec<A> v) {
  return fold<A, lanes<A>>(v, [](auto a, auto b) { return a > b ? a : b; });
}

template <class F>
FASTATTN_INLINE Vec<double> each_lane(Vec<double> x, F f) {
  for (int i = 0; i < lanes<double>; i++) x[i] = f(x[i]);
  return x;
}

// A polynomial by its coefficients from the highest power down. The odd and the even powers above 0
// are summed side by side, for a chain of dependent steps keeps a core waiting.
template <class V, class... C>
FASTATTN_INLINE V polynomial(V x, C... powers) {
  constexpr int degree = sizeof...(C) - 1;
  const float power[] = {powers...};
  const V square = x * x;
  V sums[2] = {V{} + power[0], V{} + power[1]};
#pragma GCC unroll 16
  for (int i = 2; i < degree; i++) sums[i % 2] = sums[i % 2] * square + power[i];
  return (sums[degree % 2] * x + sums[1 - degree % 2]) * x + power[degree];
}

// Splits x into a whole number and a rest in [-0.5, 0.5]; returns 2^whole, 0 for -127. |x| <= 127.
FASTATTN_INLINE Vec<float> split(Vec<float> x, Vec<float>& whole) {
  const float magic = 0x1.8p23f;  // its addition rounds to a whole number, held in the low bits
  const Vec<float> shifted = x + magic;
  whole = shifted - magic;
  return bits<Vec<float>>((bits<VecU>(shifted) << 23) + 0x3f800000u);
}

FASTATTN_INLINE Vec<float> exp2_of_rest(Vec<float> rest) {  // |rest| <= 0.5, relative error 2e-9
  return polynomial(rest, 1.534580747e-04f, 1.339993118e-03f, 9.618488974e-03f, 5.550328777e-02f,
                    2.402264689e-01f, 6.931472057e-01f, 1.f);
}

// 2^x for x <= 0, exactly 0 below -126.5; relative error 1 ulp. NaN stays NaN.
FASTATTN_INLINE Vec<float> exp2_nonpositive(Vec<float> x) {
#if defined(__AVX512F__) && FASTATTN_LANES == 16
  const __m512 v = bits<__m512>(x);
  const Vec<float> whole = bits<Vec<float>>(
      _mm512_maskz_roundscale_ps(0xffff, v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  const Vec<float> power = exp2_of_rest(x == -__builtin_inff() ? Vec<float>{} : x - whole);
  return bits<Vec<float>>(_mm512_maskz_scalef_ps(0xffff, bits<__m512>(power), bits<__m512>(whole)));
#else
  const Vec<float> clipped = max(set(-127.f), x);  // there the scale is 0
  Vec<float> whole;
  const Vec<float> scale = split(clipped, whole);
  return exp2_of_rest(clipped - whole) * scale;
#endif
}
FASTATTN_INLINE Vec<double> exp2_nonpositive(Vec<double> x) {
  return each_lane(x, [](double v) { return std::exp2(v); });
}

// e^x, saturating at e^+-87; relative error 1.5 ulp. NaN stays NaN.
FASTATTN_INLINE Vec<float> exp(Vec<float> x) {
  x = min(set(87.f), max(set(-87.f), x));
  Vec<float> whole;
  const Vec<float> scale = split(x * 1.44269504f, whole);
  const Vec<float> rest = (x - whole * 0.693359375f) + whole * 2.12194440e-4f;  // ln 2 in two parts
  return polynomial(rest, 1.383683404e-03f, 8.374822070e-03f, 4.166822612e-02f, 1.666642010e-01f,
                    4.999999208e-01f, 1.f, 1.f) *
         scale;
}
FASTATTN_INLINE Vec<double> exp(Vec<double> x) {
  return each_lane(x, [](double v) { return std::exp(v); });
}

// a / b where b and 1 / b are normal numbers; relative error 1 ulp.
FASTATTN_INLINE Vec<float> divide(Vec<float> a, Vec<float> b) {
#if defined(__AVX512F__) && FASTATTN_LANES == 16  // where division is slowest; a step of Newton's
  const Vec<float> guess = bits<Vec<float>>(_mm512_maskz_rcp14_ps(0xffff, bits<__m512>(b)));
  const Vec<float> quotient = a * guess;
  return quotient + guess * (a - quotient * b);
#else
  return a / b;
#endif
}
FASTATTN_INLINE Vec<double> divide(Vec<double> a, Vec<double> b) { return a / b; }

FASTATTN_INLINE Vec<float> tanh(Vec<float> x) {
  const Vec<float> magnitude = x < 0.f ? -x : x;
  const Vec<float> square = x * x;
  const Vec<float> inner =
      x + x * square *
              polynomial(square, -5.923977746e-03f, 2.087367428e-02f, -5.382381573e-02f,
                         1.333258419e-01f, -3.333332703e-01f);
  const Vec<float> outer = 1.f - 2.f / (exp(2.f * magnitude) + 1.f);
  return magnitude < 0.65f ? inner : (x < 0.f ? -outer : outer);
}
FASTATTN_INLINE Vec<double> tanh(Vec<double> x) {
  return each_lane(x, [](double v) { return std::tanh(v); });
}

template <class V>
FASTATTN_INLINE V sigmoid(V x) {
  return 1 / (1 + exp(-x));
}

// The normal distribution function, (1 + erf(x / sqrt 2)) / 2, by its tail 2^p(|x|); p is a minimax
// fit on [0, 6] that leaves an absolute error of 2e-8, below the rounding of a value near 1.
FASTATTN_INLINE Vec<float> normal_cdf(Vec<float> x) {
  const Vec<float> magnitude = x < 0.f ? -x : x;
  const Vec<float> exponent =
      polynomial(magnitude, 2.665668320e-07f, -5.879646966e-06f, 5.258143371e-05f,
                 -2.126680524e-04f, -1.152831478e-04f, 7.066388674e-03f, -5.251138325e-02f,
                 -4.592003596e-01f, -1.151106440e+00f, -9.999999631e-01f);
  const Vec<float> tail = magnitude > 6.f ? Vec<float>{} : exp2_nonpositive(exponent);
  return x < 0.f ? tail : 1.f - tail;
}
FASTATTN_INLINE Vec<double> normal_cdf(Vec<double> x) {
  return each_lane(x, [](double v) { return 0.5 * std::erfc(-v * 0.70710678118654752440); });
}

// Where element [h, i, j] of the first sequence of a batch lies.
template <class T>
const T* at(const Source& view, int64_t h, int64_t i, int64_t j) {
  return static_cast<const T*>(view.data) + view.first + h * view.stride[1] + i * view.stride[2] +
         j * view.stride[3];
}
template <class T>
T* at(const Target& view, int64_t h, int64_t i, int64_t j) {
  return static_cast<T*>(view.data) + view.first + h * view.stride[1] + i * view.stride[2] +
         j * view.stride[3];
}

// A sequence of a batch, from one of its rows on, as a batch of its own.
template <class Pointer>
View<Pointer> sequence(View<Pointer> view, int64_t index, int64_t row = 0) {
  view.first += index * view.stride[0] + row * view.stride[2];
  return view;
}

// Runs f(queue) on torch's threads, as many as there are tasks for: each takes tasks until none is
// left, and keeps between them what they share.
template <class F>
void workers(int64_t tasks, const F& f) {
  run_workers(
      tasks, [](TaskQueue& queue, const void* body) { (*static_cast<const F*>(body))(queue); }, &f);
}

// Runs f(task) for every task in [0, tasks) on torch's threads, those next to each other on one.
template <class F>
void parallel(int64_t tasks, const F& f) {
  run_shares(
      tasks, [](int64_t task, const void* body) { (*static_cast<const F*>(body))(task); }, &f);
}

// The same in order, each on the thread that is free: for tasks of unequal length.
template <class F>
void parallel_in_order(int64_t tasks, const F& f) {
  workers(tasks, [&](TaskQueue& queue) {
    for (int64_t task; queue.next(task);) f(task);
  });
}

}  // namespace
}  // namespace fastattn::FASTATTN_ISA
