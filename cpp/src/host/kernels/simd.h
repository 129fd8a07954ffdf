// A vector of floats at the width of the instruction set that this file is compiled for, and the few operations
// attention needs. Everything lies in the ISA's own namespace, so that no function of one ISA can be linked into
// another.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#if HEDDLE_ISA_LEVEL >= 1
#if defined(__GNUC__) && !defined(__clang__)
// GCC 12's AVX-512 headers start their "undefined" vectors from themselves (GCC bug 105593).
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <immintrin.h>
#endif

#include "core/numeric.h"

#define HEDDLE_INLINE inline __attribute__((always_inline))
#define HEDDLE_UNROLL _Pragma("GCC unroll 32")

namespace heddle::host::HEDDLE_ISA {

#if HEDDLE_ISA_LEVEL >= 2
inline constexpr int kWidth = 16;
#elif HEDDLE_ISA_LEVEL == 1
inline constexpr int kWidth = 8;
#else
inline constexpr int kWidth = 4;
#endif

typedef float F __attribute__((vector_size(kWidth * 4)));
typedef std::int32_t I __attribute__((vector_size(kWidth * 4)));
typedef std::uint32_t U __attribute__((vector_size(kWidth * 4)));

HEDDLE_INLINE F load(const void* p) {
  F x;
  std::memcpy(&x, p, sizeof x);
  return x;
}
HEDDLE_INLINE I load_int(const void* p) {
  I x;
  std::memcpy(&x, p, sizeof x);
  return x;
}
HEDDLE_INLINE void store(void* p, F x) { std::memcpy(p, &x, sizeof x); }
HEDDLE_INLINE void store(void* p, I x) { std::memcpy(p, &x, sizeof x); }
HEDDLE_INLINE F set1(float x) { return F{} + x; }
HEDDLE_INLINE I set1_int(std::int32_t x) { return I{} + x; }
HEDDLE_INLINE F as_float(I x) { return (F)x; }
HEDDLE_INLINE I as_int(F x) { return (I)x; }
HEDDLE_INLINE F to_float(I x) { return __builtin_convertvector(x, F); }

HEDDLE_INLINE F fma(F a, F b, F c) {
#if HEDDLE_ISA_LEVEL >= 2
  return (F)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif HEDDLE_ISA_LEVEL == 1
  return (F)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
  return a * b + c;
#endif
}

// max(a, b); if either is NaN, b.
HEDDLE_INLINE F max(F a, F b) {
#if HEDDLE_ISA_LEVEL >= 2
  return (F)_mm512_max_ps((__m512)a, (__m512)b);
#elif HEDDLE_ISA_LEVEL == 1
  return (F)_mm256_max_ps((__m256)a, (__m256)b);
#else
  return a > b ? a : b;
#endif
}

HEDDLE_INLINE float reduce_add(F x) {
  alignas(64) float lanes[kWidth];
  store(lanes, x);
  HEDDLE_UNROLL
  for (int w = kWidth / 2; w > 0; w /= 2) {
    for (int i = 0; i < w; ++i) lanes[i] += lanes[i + w];
  }
  return lanes[0];
}
HEDDLE_INLINE float reduce_max(F x) {
#if HEDDLE_ISA_LEVEL >= 2
  return _mm512_reduce_max_ps((__m512)x);
#else
  alignas(64) float lanes[kWidth];
  store(lanes, x);
  float m = lanes[0];
  for (int i = 1; i < kWidth; ++i) m = lanes[i] > m ? lanes[i] : m;
  return m;
#endif
}

// Lanes where `on` is true (-1) keep x, the others take `otherwise`.
HEDDLE_INLINE F blend(I on, F x, F otherwise) { return as_float((on & as_int(x)) | (~on & as_int(otherwise))); }
// Lanes whose bit is set keep x, the others take `otherwise`.
HEDDLE_INLINE F select(std::uint32_t bits, F x, F otherwise) {
#if HEDDLE_ISA_LEVEL >= 2
  return (F)_mm512_mask_mov_ps((__m512)otherwise, static_cast<__mmask16>(bits), (__m512)x);
#else
  I lane{};
  for (int i = 0; i < kWidth; ++i) lane[i] = 1 << i;
  const I on = (set1_int(static_cast<std::int32_t>(bits)) & lane) != 0;
  return blend(on, x, otherwise);
#endif
}

// 2^x for x <= 0 (any x above -inf works up to 127; -inf and below -126 give 0 or a subnormal). Relative error of the
// minimax polynomials on [0, 1): degree 4 2.6e-6 (for a result that is rounded to bf16), degree 5 7.5e-8.
template <int Degree>
HEDDLE_INLINE F exp2(F x) {
  static_assert(Degree == 4 || Degree == 5);
#if HEDDLE_ISA_LEVEL >= 2
  const F f = (F)_mm512_reduce_ps((__m512)x, 0x09);  // x - floor(x), and 0 for -inf
#else
  // Clamped so that the exponent arithmetic below cannot wrap; what lies under it is 0.
  const F clamped = max(x, set1(-126.0f));
  I n = __builtin_convertvector(clamped, I);  // towards zero
  n = n + (to_float(n) > clamped);            // floor: true is -1
  const F f = clamped - to_float(n);
#endif
  F p;
  if constexpr (Degree == 4) {
    p = fma(set1(0.0135341678484f), f, set1(0.0520114607758f));
    p = fma(p, f, set1(0.241442756796f));
    p = fma(p, f, set1(0.693003834484f));
    p = fma(p, f, set1(1.00000259337f));
  } else {
    p = fma(set1(0.00187757676566f), f, set1(0.0089893398766f));
    p = fma(p, f, set1(0.0558263182317f));
    p = fma(p, f, set1(0.240153616983f));
    p = fma(p, f, set1(0.693153073207f));
    p = fma(p, f, set1(0.999999925064f));
  }
#if HEDDLE_ISA_LEVEL >= 2
  return (F)_mm512_scalef_ps((__m512)p, (__m512)x);  // p * 2^floor(x)
#else
  // Unsigned: a score that a mask is about to drop may be any number, and wraps.
  const F scaled = (F)((U)p + ((U)n << 23));
  const I in_range = x >= set1(-126.0f);
  const I is_nan = x != x;
  return as_float((in_range & as_int(scaled)) | (is_nan & as_int(x)));
#endif
}

// tanh to about 2e-7 relative. |x| < 0.625: x + x^3 P(x^2), Cephes' coefficients; else 1 - 2 / (e^2x + 1).
HEDDLE_INLINE F tanh(F x) {
  const I sign = as_int(x) & set1_int(static_cast<std::int32_t>(0x80000000u));
  const F a = as_float(as_int(x) & set1_int(0x7fffffff));
  const F z = a * a;
  F p = fma(set1(-5.70498872745e-3f), z, set1(2.06390887954e-2f));
  p = fma(p, z, set1(-5.37397155531e-2f));
  p = fma(p, z, set1(1.33314422036e-1f));
  p = fma(p, z, set1(-3.33332819422e-1f));
  const F small = fma(p * z, a, a);
  const F e = exp2<5>(a * set1(-2.88539008177793f));  // e^-2a
  const F large = (set1(1.0f) - e) / (set1(1.0f) + e);
  const I is_small = a < set1(0.625f);
  return as_float(((is_small & as_int(small)) | (~is_small & as_int(large))) | sign);
}

}  // namespace heddle::host::HEDDLE_ISA
