// The online softmax of a warpgroup's scores S[64, kKeys], in the registers that WGMMA leaves them in: a thread holds
// every fourth pair of columns of two rows.
#pragma once

#include "cuda/common/visibility.cuh"
#include "cuda/common/wgmma.cuh"
#include "cuda/sm90/prefill/params.h"

namespace heddle::cuda {

inline constexpr float kLog2E = 1.4426950408889634f, kLn2 = 0.6931471805599453f;

__device__ __forceinline__ float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
// 1 - 2 / (1 + e^2x): right at both ends, and exact enough for scores (tanh.approx has 11 bits).
__device__ __forceinline__ float tanh_from_exp2(float x) {
  return 1.0f - __fdividef(2.0f, 1.0f + exp2_approx(2.0f * kLog2E * x));
}

// The four lanes that share a row.
template <class Combine>
__device__ __forceinline__ float quad_reduce(float x, Combine combine) {
  x = combine(x, __shfl_xor_sync(0xffffffffu, x, 1));
  return combine(x, __shfl_xor_sync(0xffffffffu, x, 2));
}

template <int N>
__device__ __forceinline__ void map_scores(float (&s)[N], ScoreMap map, float factor) {
  if (map == ScoreMap::kNone) return;
#pragma unroll
  for (int i = 0; i < N; ++i) s[i] = map == ScoreMap::kSoftcap ? tanh_from_exp2(factor * s[i]) : factor * s[i];
}

// Scores that are not seen become -inf. `queries` are those of the thread's two rows; `key` is its first column's.
template <int N>
__device__ __forceinline__ void mask_scores(float (&s)[N], const Visibility& visibility, const int (&queries)[2],
                                            int key) {
  const PatternKind kind = visibility.pattern.kind;
#pragma unroll
  for (int row = 0; row < 2; ++row) {
    const Span allowed = visibility.allowed(queries[row]);
    const int begin = allowed.begin - key, end = allowed.end - key;
    if (kind == PatternKind::kNone) {
#pragma unroll
      for (int i = 0; i < N / 2; ++i) {
        const int column = i / 2 * 8 + i % 2;
        if (column < begin || column >= end) s[i / 2 * 4 + 2 * row + i % 2] = -INFINITY;
      }
      continue;
    }
    // Whatever else, a column at a time; rolled up, since the tests are long and the scores in registers.
    std::uint64_t seen = 0;
#pragma unroll 1
    for (int i = 0; i < N / 2; ++i) {
      const int column = i / 2 * 8 + i % 2;
      if (column >= begin && column < end && visibility.chosen(queries[row], key + column)) seen |= std::uint64_t{1} << i;
    }
#pragma unroll
    for (int i = 0; i < N / 2; ++i) {
      if ((seen >> i & 1) == 0) s[i / 2 * 4 + 2 * row + i % 2] = -INFINITY;
    }
  }
}

// The state of the thread's two rows. `sum` is the thread's own share until the end.
struct RowState {
  float max[2] = {-INFINITY, -INFINITY};
  float sum[2] = {0.0f, 0.0f};

  // With nothing seen, exp2(x - reference) is 0 for x = -inf, not NaN.
  __device__ __forceinline__ float reference(int row) const { return max[row] == -INFINITY ? 0.0f : max[row]; }

  // Turns scores into probabilities relative to the new maxima; what was summed before has to be multiplied by `decay`.
  template <int N>
  __device__ __forceinline__ void update(float (&s)[N], float scale_log2, float (&decay)[2]) {
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      float most = max[row];
#pragma unroll
      for (int i = 2 * row; i < N; i += 4) most = fmaxf(most, fmaxf(s[i], s[i + 1]));
      most = quad_reduce(most, [](float a, float b) { return fmaxf(a, b); });
      const float before = max[row];
      max[row] = most;
      const float at = reference(row) * scale_log2;
      decay[row] = exp2_approx(before * scale_log2 - at);
      float sum_here = 0.0f;
#pragma unroll
      for (int i = 2 * row; i < N; i += 4) {
        s[i] = exp2_approx(s[i] * scale_log2 - at);
        s[i + 1] = exp2_approx(s[i + 1] * scale_log2 - at);
        sum_here += s[i] + s[i + 1];
      }
      sum[row] = sum[row] * decay[row] + sum_here;
    }
  }
};

template <class T>
__device__ __forceinline__ std::uint32_t pack(float low, float high);
template <>
__device__ __forceinline__ std::uint32_t pack<__nv_bfloat16>(float low, float high) {
  const __nv_bfloat162 both = __floats2bfloat162_rn(low, high);
  return *reinterpret_cast<const std::uint32_t*>(&both);
}
template <>
__device__ __forceinline__ std::uint32_t pack<__half>(float low, float high) {
  const __half2 both = __floats2half2_rn(low, high);
  return *reinterpret_cast<const std::uint32_t*>(&both);
}

// Probabilities as the A operand of the product with V: four words for every 16 keys.
template <class T, int N>
__device__ __forceinline__ void to_operand(const float (&p)[N], std::uint32_t (&a)[N / 2]) {
#pragma unroll
  for (int i = 0; i < N; i += 2) a[i / 2] = pack<T>(p[i], p[i + 1]);
}

}  // namespace heddle::cuda
