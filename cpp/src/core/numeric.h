// Scalar conversions between float and the 8- and 16-bit formats, exact in every bit: round to nearest even,
// subnormals, signed zeros and NaN included. Each is a handful of integer operations and selects, so loops over them
// vectorise.
//
// Host kernels are compiled once per instruction set, and an inline function that the linker merges could carry one
// copy's instructions into another. So everything here is `static` or forced inline and uses no standard-library
// function. No result depends on whether denormals are enabled: another library in the process may flush them.
#pragma once

#include <cstdint>
#include <cstring>

#include "heddle/tensor.h"

#define HEDDLE_ALWAYS_INLINE [[gnu::always_inline]] static inline

namespace heddle {

inline constexpr float kInt8Max = 127.0f;
inline constexpr float kE4M3Max = 448.0f;

HEDDLE_ALWAYS_INLINE std::uint32_t float_bits(float x) { return __builtin_bit_cast(std::uint32_t, x); }
HEDDLE_ALWAYS_INLINE float float_from_bits(std::uint32_t u) { return __builtin_bit_cast(float, u); }

// Finite: neither NaN nor infinite, whatever -ffast-math flags a caller was compiled with.
HEDDLE_ALWAYS_INLINE bool is_finite(float x) { return (float_bits(x) & 0x7fffffffu) < 0x7f800000u; }

// bfloat16: the upper half of a float.
HEDDLE_ALWAYS_INLINE float bf16_to_float(std::uint16_t h) { return float_from_bits(std::uint32_t{h} << 16); }

HEDDLE_ALWAYS_INLINE std::uint16_t float_to_bf16(float x) {
  const std::uint32_t u = float_bits(x);
  const std::uint32_t rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  const std::uint32_t quiet = (u >> 16) | 0x40u;  // a NaN whose payload lies below would otherwise round to infinity
  return static_cast<std::uint16_t>((u & 0x7fffffffu) > 0x7f800000u ? quiet : rounded);
}

// IEEE binary16: 5 exponent bits (bias 15), 10 of mantissa.
HEDDLE_ALWAYS_INLINE float fp16_to_float(std::uint16_t h) {
  const std::uint32_t magnitude = h & 0x7fffu;
  const std::uint32_t sign = (h & 0x8000u) << 16;
  const std::uint32_t normal = (magnitude << 13) + (112u << 23);
  const std::uint32_t special = (magnitude << 13) | 0x7f800000u;  // infinities and NaN keep their payload
  // m * 2^-24 = (2^-14 + m * 2^-24) - 2^-14
  const std::uint32_t subnormal = float_bits(float_from_bits((113u << 23) | (magnitude << 13)) - 0x1p-14f);
  return float_from_bits(sign | (magnitude >= 0x7c00u ? special : magnitude >= 0x0400u ? normal : subnormal));
}

HEDDLE_ALWAYS_INLINE std::uint16_t float_to_fp16(float x) {
  const std::uint32_t magnitude = float_bits(x) & 0x7fffffffu;
  const std::uint32_t sign = (float_bits(x) >> 16) & 0x8000u;
  // Rounding carries into the exponent, up to infinity (65520 and above).
  const std::uint32_t normal = (magnitude - (112u << 23) + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  const std::uint32_t nan = 0x7e00u | ((magnitude >> 13) & 0x3ffu);
  const std::uint32_t overflow = magnitude > 0x7f800000u ? nan : 0x7c00u;
  // The unit in the last place of 0.5 is 2^-24, that of a subnormal half, so that this addition rounds as it should.
  const std::uint32_t subnormal = float_bits(float_from_bits(magnitude) + 0.5f) - float_bits(0.5f);
  return static_cast<std::uint16_t>(sign | (magnitude >= 0x47800000u   ? overflow
                                            : magnitude >= 0x38800000u ? normal
                                                                       : subnormal));
}

// OCP FP8 E4M3 ("fn"): 4 exponent bits (bias 7), 3 of mantissa, no infinities, largest 448, NaN 0x7f and 0xff.
HEDDLE_ALWAYS_INLINE float e4m3_to_float(std::uint8_t c) {
  const std::uint32_t magnitude = c & 0x7fu;
  const std::uint32_t sign = (c & 0x80u) << 24;
  const std::uint32_t normal = (magnitude << 20) + (120u << 23);
  // m * 2^-9 = (2^-6 + m * 2^-9) - 2^-6
  const std::uint32_t subnormal = float_bits(float_from_bits((121u << 23) | (magnitude << 20)) - 0x1p-6f);
  return float_from_bits(sign | (magnitude == 0x7fu ? 0x7fc00000u : magnitude >= 0x08u ? normal : subnormal));
}

// Whatever exceeds 448 in magnitude, infinities included, becomes +-448; exceeds_e4m3() tells. NaN stays NaN.
HEDDLE_ALWAYS_INLINE std::uint8_t float_to_e4m3_saturating(float x) {
  const std::uint32_t magnitude = float_bits(x) & 0x7fffffffu;
  const std::uint32_t sign = (float_bits(x) >> 24) & 0x80u;
  const std::uint32_t normal = (magnitude - (120u << 23) + 0x7ffffu + ((magnitude >> 20) & 1u)) >> 20;
  const std::uint32_t overflow = magnitude > 0x7f800000u ? 0x7fu : 0x7eu;
  // The unit in the last place of 2^14 is 2^-9, that of a subnormal code.
  const std::uint32_t subnormal = float_bits(float_from_bits(magnitude) + 0x1p14f) - float_bits(0x1p14f);
  return static_cast<std::uint8_t>(sign | (magnitude > 0x43e00000u    ? overflow
                                           : magnitude >= 0x3c800000u ? normal
                                                                      : subnormal));
}

HEDDLE_ALWAYS_INLINE bool exceeds_e4m3(float x) { return x > kE4M3Max || x < -kE4M3Max; }

// A double rounded to float "to odd" (toward zero, the last bit set if anything was lost). Rounding that to nearest
// even in a format at least two bits narrower equals rounding the double there directly (Boldo and Melquiond, 2008).
HEDDLE_ALWAYS_INLINE float double_to_float_odd(double x) {
  const float nearest = static_cast<float>(x);
  const double back = nearest;
  std::uint32_t u = float_bits(nearest);
  if (back == x || x != x) return nearest;
  const bool away = (back < 0 ? -back : back) > (x < 0 ? -x : x);
  u -= away ? 1u : 0u;
  return float_from_bits(u | 1u);
}

// Element i of an array of any dtype. 64-bit integers beyond 2^53 round.
static inline double load_as_double(const void* data, DType dtype, std::int64_t i) {
  switch (dtype) {
    case DType::kFloat64: return static_cast<const double*>(data)[i];
    case DType::kFloat32: return static_cast<const float*>(data)[i];
    case DType::kFloat16: return fp16_to_float(static_cast<const std::uint16_t*>(data)[i]);
    case DType::kBFloat16: return bf16_to_float(static_cast<const std::uint16_t*>(data)[i]);
    case DType::kFloat8E4M3: return e4m3_to_float(static_cast<const std::uint8_t*>(data)[i]);
    case DType::kInt8: return static_cast<const std::int8_t*>(data)[i];
    case DType::kInt32: return static_cast<const std::int32_t*>(data)[i];
    case DType::kInt64: return static_cast<double>(static_cast<const std::int64_t*>(data)[i]);
    case DType::kBool: return static_cast<const std::uint8_t*>(data)[i] != 0 ? 1.0 : 0.0;
  }
  __builtin_unreachable();
}

static inline float load_as_float(const void* data, DType dtype, std::int64_t i) {
  return static_cast<float>(load_as_double(data, dtype, i));
}

// Floating dtypes only; one rounding to nearest even. E4M3 saturates.
static inline void store_from_double(void* data, DType dtype, std::int64_t i, double x) {
  switch (dtype) {
    case DType::kFloat64: static_cast<double*>(data)[i] = x; return;
    case DType::kFloat32: static_cast<float*>(data)[i] = static_cast<float>(x); return;
    case DType::kFloat16: static_cast<std::uint16_t*>(data)[i] = float_to_fp16(double_to_float_odd(x)); return;
    case DType::kBFloat16: static_cast<std::uint16_t*>(data)[i] = float_to_bf16(double_to_float_odd(x)); return;
    case DType::kFloat8E4M3:
      static_cast<std::uint8_t*>(data)[i] = float_to_e4m3_saturating(double_to_float_odd(x));
      return;
    default: __builtin_unreachable();
  }
}

static inline void store_from_float(void* data, DType dtype, std::int64_t i, float x) {
  store_from_double(data, dtype, i, x);
}

}  // namespace heddle
