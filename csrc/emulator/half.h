// Narrow floating-point types as the GPU converts them: to nearest even unless said otherwise.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>

#include "common/dtype.h"

namespace fastattn::emulator {

inline float to_float(float x) { return x; }
inline double to_float(double x) { return x; }
inline float to_float(bf16 x) { return std::bit_cast<float>(uint32_t{x.bits} << 16); }

inline float to_float(f16 x) {
  uint32_t sign = (x.bits & 0x8000u) << 16, rest = x.bits & 0x7fffu;
  if (rest >= 0x7c00u) return std::bit_cast<float>(sign | 0x7f800000u | (rest & 0x3ffu) << 13);
  if (rest < 0x400u) {
    float value = static_cast<float>(rest) * 0x1p-24f;
    return sign ? -value : value;
  }
  return std::bit_cast<float>(sign | ((rest << 13) + (112u << 23)));
}

enum class Round { nearest, zero, away };

// Drops the low `bits` bits of a magnitude.
inline uint32_t drop(uint32_t magnitude, int bits, Round round) {
  uint32_t half = 1u << (bits - 1);
  if (round == Round::nearest) magnitude += half - 1 + (magnitude >> bits & 1);
  if (round == Round::away) magnitude += half;
  return magnitude >> bits;
}

inline bf16 to_bf16(float x, Round round = Round::nearest) {
  if (std::isnan(x)) return {0x7fff};
  uint32_t bits = std::bit_cast<uint32_t>(x), magnitude = bits & 0x7fffffffu;
  uint32_t kept = magnitude >= 0x7f800000u ? 0x7f80u : drop(magnitude, 16, round);
  return {static_cast<uint16_t>((bits >> 16 & 0x8000u) | kept)};
}

inline f16 to_f16(float x, Round round = Round::nearest) {
  if (std::isnan(x)) return {0x7fff};
  uint32_t bits = std::bit_cast<uint32_t>(x), magnitude = bits & 0x7fffffffu;
  uint32_t sign = bits >> 16 & 0x8000u, kept;
  if (magnitude >= 0x7f800000u) {
    kept = 0x7c00u;
  } else if (magnitude < 113u << 23) {  // subnormal: units of 2^-24
    float units = std::bit_cast<float>(magnitude) * 0x1p24f;
    kept = static_cast<uint32_t>(round == Round::zero ? std::trunc(units) : std::nearbyint(units));
  } else {
    kept = drop(magnitude - (112u << 23), 13, round);
    if (kept >= 0x7c00u) kept = round == Round::zero ? 0x7bffu : 0x7c00u;
  }
  return {static_cast<uint16_t>(sign | kept)};
}

template <class T>
T from_float(float x) {
  if constexpr (std::is_same_v<T, f16>)
    return to_f16(x);
  else if constexpr (std::is_same_v<T, bf16>)
    return to_bf16(x);
  else
    return x;
}

// To fp16 from fp64 in one rounding: fp32 rounded to odd keeps what the second rounding needs.
inline float to_odd(double x) {
  float f = static_cast<float>(x);
  if (static_cast<double>(f) == x || std::isnan(x) || std::isinf(f)) return f;
  uint32_t bits = std::bit_cast<uint32_t>(f);
  if (std::fabs(static_cast<double>(f)) > std::fabs(x)) bits--;
  return std::bit_cast<float>(bits | 1);
}

// TF32 keeps ten bits of the mantissa; tensor cores ignore the rest.
inline float tf32_operand(uint32_t bits) { return std::bit_cast<float>(bits & ~0x1fffu); }

inline float flush(float x) { return std::fabs(x) < 0x1p-126f ? std::copysign(0.0f, x) : x; }

// fp8 with `exponent` bits of exponent; E4M3 has no infinity, 0x7f is NaN.
inline float from_fp8(uint8_t bits, bool e4m3) {
  int mantissa_bits = e4m3 ? 3 : 2, bias = e4m3 ? 7 : 15;
  int exponent = (bits & 0x7f) >> mantissa_bits, mantissa = bits & ((1 << mantissa_bits) - 1);
  float value;
  if (e4m3 && (bits & 0x7f) == 0x7f)
    value = NAN;
  else if (!e4m3 && exponent == 31)
    value = mantissa ? NAN : INFINITY;
  else if (exponent == 0)
    value = std::ldexp(float(mantissa), 1 - bias - mantissa_bits);
  else
    value = std::ldexp(float(mantissa | 1 << mantissa_bits), exponent - bias - mantissa_bits);
  return bits & 0x80 ? -value : value;
}

}  // namespace fastattn::emulator
