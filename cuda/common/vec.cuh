// Vectors of elements as they lie in memory, moved in accesses of up to 16 bytes, and as floats in registers.
#pragma once

#include <cstdint>
#include <cuda_bf16.h>
#include <cuda_fp16.h>

namespace heddle::cuda {

inline constexpr int kAccessBytes = 16;  // the widest load and store of a thread

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }
__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }

template <class T>
__device__ __forceinline__ T from_float(float x);
template <>
__device__ __forceinline__ float from_float<float>(float x) {
  return x;
}
template <>
__device__ __forceinline__ __half from_float<__half>(float x) {
  return __float2half_rn(x);
}
template <>
__device__ __forceinline__ __nv_bfloat16 from_float<__nv_bfloat16>(float x) {
  return __float2bfloat16_rn(x);
}

// The unsigned type of so many bytes that one access moves.
template <int kBytes>
struct AccessOf;
template <>
struct AccessOf<2> {
  using Type = unsigned short;
};
template <>
struct AccessOf<4> {
  using Type = unsigned int;
};
template <>
struct AccessOf<8> {
  using Type = uint2;
};
template <>
struct AccessOf<16> {
  using Type = uint4;
};

// N elements. Their address must be a multiple of min(16, N * sizeof(T)) bytes.
template <class T, int N>
struct Vec {
  static constexpr int kBytes = N * sizeof(T);
  using Access = typename AccessOf<(kBytes < kAccessBytes ? kBytes : kAccessBytes)>::Type;
  static constexpr int kAccesses = kBytes / sizeof(Access);
  static_assert(kAccesses * sizeof(Access) == kBytes, "whole accesses");

  union {
    Access raw[kAccesses];
    T elements[N];
  };

  __device__ __forceinline__ Vec() {}  // registers are not cleared for a load that follows

  // A read of data that nobody reads again soon: it leaves the caches first.
  __device__ __forceinline__ static Vec load_streaming(const T* from) {
    Vec v;
#pragma unroll
    for (int i = 0; i < kAccesses; ++i) v.raw[i] = __ldcs(reinterpret_cast<const Access*>(from) + i);
    return v;
  }
  __device__ __forceinline__ static Vec zero() {
    Vec v;
#pragma unroll
    for (int i = 0; i < kAccesses; ++i) v.raw[i] = Access{};
    return v;
  }
  __device__ __forceinline__ static Vec from_floats(const float (&x)[N]) {
    Vec v;
#pragma unroll
    for (int i = 0; i < N; ++i) v.elements[i] = from_float<T>(x[i]);
    return v;
  }
  __device__ __forceinline__ void store(T* to) const {
#pragma unroll
    for (int i = 0; i < kAccesses; ++i) __stwb(reinterpret_cast<Access*>(to) + i, raw[i]);
  }
};

}  // namespace heddle::cuda
