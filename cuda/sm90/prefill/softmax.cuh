// The online softmax of a warpgroup's scores S[64, kKeys], in the registers that WGMMA leaves them in: a thread holds
// every fourth pair of columns of two rows.
#pragma once

#include "cuda/common/exponents.h"
#include "cuda/common/mma.cuh"
#include "cuda/common/online_softmax.cuh"
#include "cuda/common/visibility.cuh"
#include "cuda/common/wgmma.cuh"
#include "cuda/sm90/prefill/params.h"

namespace heddle::cuda {

// 1 - 2 / (1 + e^2x): right at both ends, and exact enough for scores (tanh.approx has 11 bits).
__device__ __forceinline__ float tanh_from_exp2(float x) {
  return 1.0f - __fdividef(2.0f, 1.0f + exp2_approx(2.0f * kLog2E * x));
}

// The four lanes that share a row.
template <class Combine>
__device__ __forceinline__ float quad_reduce(float x, Combine combine) {
  x = combine(x, __shfl_xor_sync(kFullWarp, x, 1));
  return combine(x, __shfl_xor_sync(kFullWarp, x, 2));
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
      if (column >= begin && column < end && visibility.chosen(queries[row], key + column))
        seen |= std::uint64_t{1} << i;
    }
#pragma unroll
    for (int i = 0; i < N / 2; ++i) {
      if ((seen >> i & 1) == 0) s[i / 2 * 4 + 2 * row + i % 2] = -INFINITY;
    }
  }
}

template <class T>
__device__ __forceinline__ float2 unpack(std::uint32_t both);
template <>
__device__ __forceinline__ float2 unpack<__nv_bfloat16>(std::uint32_t both) {
  return {__uint_as_float(both << 16), __uint_as_float(both & 0xffff0000u)};
}
template <>
__device__ __forceinline__ float2 unpack<__half>(std::uint32_t both) {
  return __half22float2(*reinterpret_cast<const __half2*>(&both));
}

// The running softmax of the thread's two rows, in binary exponents: a probability is 2^(scale_log2 s - at). `at` is
// the largest exponent seen when it was last set, and later ones may exceed it somewhat; `sum` is the thread's own
// share.
struct RowState {
  float at[2] = {-INFINITY, -INFINITY};
  float sum[2] = {0.0f, 0.0f};
  // The same of the probabilities as they are multiplied, rounded to 16 bits. Divided by it, an output that one key
  // dominates is exact, whatever the reference. (Relative to the maximum that key has 1, and the sum does.)
  float rounded[2] = {0.0f, 0.0f};

  // Probabilities of one tile as the A operand of the product with V, four words for every 16 keys. True: `at` had to
  // be moved, and what was summed before has to be multiplied by `decay`.
  //
  // kSpeculative: no maximum is taken. As long as no probability is large, any reference is as good as the largest
  // score, and one that is large shows in the sum. That saves a third of the instructions and the wait for a maximum,
  // but the scores have to be kept until it is clear that they need not be taken again.
  template <class T, bool kSpeculative, int N>
  __device__ __forceinline__ bool update(const float (&s)[N], float scale_log2, std::uint32_t (&p)[N / 2],
                                         float (&decay)[2]) {
    float here[2], rounded_here[2];
    bool moves;
    if constexpr (kSpeculative) {
      // Half precision ends at 65504; a thread's sum bounds its probabilities. NaN and infinity are large too.
      constexpr float kLargestSum = 4096.0f;
      exponentials<T>(s, scale_log2, at, p, here, rounded_here);
      moves = __any_sync(kFullWarp, !(here[0] <= kLargestSum && here[1] <= kLargestSum));
      if (moves) {
        move(s, scale_log2, decay);
        exponentials<T>(s, scale_log2, at_or_zero(), p, here, rounded_here);
      }
    } else {
      const bool exceeds = most<0>(s) * scale_log2 > at[0] || most<1>(s) * scale_log2 > at[1];
      moves = __any_sync(kFullWarp, exceeds);
      if (moves) move(s, scale_log2, decay);
      exponentials<T>(s, scale_log2, at_or_zero(), p, here, rounded_here);
    }
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      sum[row] += here[row];
      rounded[row] += rounded_here[row];
    }
    return moves;
  }
  // The same for the first tile.
  template <class T, int N>
  __device__ __forceinline__ void start(const float (&s)[N], float scale_log2, std::uint32_t (&p)[N / 2]) {
    float decay[2];
    move(s, scale_log2, decay);
    exponentials<T>(s, scale_log2, at_or_zero(), p, sum, rounded);
  }

 private:
  struct Pair {
    float x[2];
    __device__ __forceinline__ float operator[](int row) const { return x[row]; }
  };
  // With nothing seen, 2^(-inf - 0) is 0, not NaN.
  __device__ __forceinline__ Pair at_or_zero() const {
    return {{at[0] == -INFINITY ? 0.0f : at[0], at[1] == -INFINITY ? 0.0f : at[1]}};
  }
  template <int kRow, int N>
  __device__ __forceinline__ static float most(const float (&s)[N]) {
    float most[2] = {fmaxf(s[2 * kRow], s[2 * kRow + 1]), fmaxf(s[4 + 2 * kRow], s[5 + 2 * kRow])};
#pragma unroll
    for (int i = 8 + 2 * kRow; i < N; i += 4) most[i / 4 % 2] = fmaxf(most[i / 4 % 2], fmaxf(s[i], s[i + 1]));
    return fmaxf(most[0], most[1]);
  }
  // Moves `at` to the largest exponent of the row.
  template <int N>
  __device__ __forceinline__ void move(const float (&s)[N], float scale_log2, float (&decay)[2]) {
    const float largest[2] = {most<0>(s), most<1>(s)};
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      const float now =
          fmaxf(quad_reduce(largest[row], [](float a, float b) { return fmaxf(a, b); }) * scale_log2, at[row]);
      decay[row] = now == -INFINITY ? 1.0f : exp2_approx(at[row] - now);
      sum[row] *= decay[row];
      rounded[row] *= decay[row];
      at[row] = now;
    }
  }
  template <class T, int N, class Reference>
  __device__ __forceinline__ static void exponentials(const float (&s)[N], float scale_log2, const Reference& reference,
                                                      std::uint32_t (&p)[N / 2], float (&total)[2],
                                                      float (&rounded_total)[2]) {
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      total[row] = rounded_total[row] = 0.0f;
#pragma unroll
      for (int i = 2 * row; i < N; i += 4) {
        const float low = exp2_approx(s[i] * scale_log2 - reference[row]);
        const float high = exp2_approx(s[i + 1] * scale_log2 - reference[row]);
        p[i / 2] = pack<T>(low, high);
        const float2 both = unpack<T>(p[i / 2]);
        total[row] += low + high;
        rounded_total[row] += both.x + both.y;
      }
    }
  }
};

}  // namespace heddle::cuda
