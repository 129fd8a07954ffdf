// The running state of a softmax: the largest logit seen and the sum of exponentials relative to it.
#pragma once

namespace heddle::cuda {

inline constexpr unsigned kFullWarp = 0xffffffffu;

// Stands for the set of logits x with max = m and sum exp(x - m) = l; the empty set is (-inf, 0).
struct SoftmaxState {
  float m = -INFINITY;
  float l = 0.0f;

  // The maximum as a finite reference point: with nothing seen, exp(x - reference) is 0 for x = -inf, not NaN.
  __device__ __forceinline__ float reference() const { return m == -INFINITY ? 0.0f : m; }
  __device__ __forceinline__ float lse() const { return reference() + logf(l); }

  // The union of two disjoint sets.
  __device__ __forceinline__ void merge(const SoftmaxState& other) {
    const SoftmaxState joined{fmaxf(m, other.m), 0.0f};
    const float at = joined.reference();
    l = l * expf(m - at) + other.l * expf(other.m - at);
    m = joined.m;
  }

  // The union over `width` neighbouring lanes (a power of two), given to all of them. The whole warp takes part.
  __device__ __forceinline__ void merge_lanes(int width) {
    for (int offset = width / 2; offset > 0; offset /= 2) {
      merge({__shfl_xor_sync(kFullWarp, m, offset), __shfl_xor_sync(kFullWarp, l, offset)});
    }
  }
};

}  // namespace heddle::cuda
