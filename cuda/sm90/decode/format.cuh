// The element formats: how operands of the two products come from what lies in the cache.
//
// S^T = K Q^T with keys as rows of the product, O^T = V^T P^T with features as rows. K is loaded as it lies, V
// transposed, both as matrices of 16-bit words. Of 8-bit elements a word holds two, so that a register of four holds,
// per lane, the even and the odd elements of two words: which element counts as which of a product's columns (K) or
// rows (V) is free as long as Q, or the writer of O, agrees.
#pragma once

#include <type_traits>

#include "cuda/common/mma.cuh"

namespace heddle::cuda::decode {

// What 16-bit elements need: nothing. T is the type of q, out, k and v.
template <class T>
struct Native {
  using Query = T;
  using Product = T;  // of P and V
  static constexpr int kBytes = 2;
  static constexpr bool kInt8 = false, kFp8 = false, kScaled = false;
  static constexpr float kValueFactor = 1.0f;
};

// INT8: scores in whole numbers (m16n8k32), values as fp16, in which they are exact.
template <class T>
struct Int8 {
  using Query = T;
  using Product = __half;
  static constexpr int kBytes = 1;
  static constexpr bool kInt8 = true, kFp8 = false, kScaled = true;
  static constexpr float kValueFactor = 1.0f;

  // Bytes 0 and 2, or 1 and 3, as two halves: 0x64xx is 1024 + xx.
  template <bool kOdd>
  __device__ __forceinline__ static std::uint32_t halves(std::uint32_t x) {
    const std::uint32_t biased = __byte_perm(x ^ 0x80808080u, 0x64646464u, kOdd ? 0x4341 : 0x4240);
    const __half2 y =
        __hsub2(reinterpret_cast<const __half2&>(biased), __half2(__float2half_rn(1152.0f), __float2half_rn(1152.0f)));
    return reinterpret_cast<const std::uint32_t&>(y);
  }
};

// E4M3 as fp16 times 2^-8: four exponent bits and three of mantissa, moved to the places where fp16 has them, leave the
// difference of the exponents' biases. Subnormals come out right too; a NaN becomes 480.
template <class T>
struct Fp8 {
  using Query = T;
  using Product = __half;
  static constexpr int kBytes = 1;
  static constexpr bool kInt8 = false, kFp8 = true, kScaled = true;
  static constexpr float kValueFactor = 256.0f;

  template <bool kOdd>
  __device__ __forceinline__ static std::uint32_t halves(std::uint32_t x) {
    const std::uint32_t y = kOdd ? x : x << 8;
    return (y & 0x80008000u) | ((y >> 1) & 0x3f803f80u);
  }
};

}  // namespace heddle::cuda::decode
