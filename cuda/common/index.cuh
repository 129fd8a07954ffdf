// Index arithmetic.
#pragma once

#include <cstdint>

namespace heddle::cuda {

// Division by a number that the host knows: for 0 <= n < 2^31, n / d = (mulhi(n, multiplier) + n) >> shift with
// shift = ceil(log2 d), multiplier = floor(2^32 (2^shift - d) / d) + 1 (Granlund and Montgomery, 1994).
struct Divisor {
  std::uint32_t divisor = 1, multiplier = 1, shift = 0;

  Divisor() = default;
  explicit Divisor(std::int64_t d) : divisor(static_cast<std::uint32_t>(d)) {
    while ((std::int64_t{1} << shift) < d) ++shift;
    multiplier =
        static_cast<std::uint32_t>((std::uint64_t{1} << 32) * ((std::uint64_t{1} << shift) - divisor) / divisor + 1);
  }
  __device__ __forceinline__ std::uint32_t quotient(std::uint32_t n) const {
    return (__umulhi(n, multiplier) + n) >> shift;
  }
  // n / d, and what is left in n.
  __device__ __forceinline__ std::uint32_t divide(std::uint32_t& n) const {
    const std::uint32_t q = quotient(n);
    n -= q * divisor;
    return q;
  }
};

// a / b of numbers that are not negative: 64-bit division takes as long as the loads of a short row.
__device__ __forceinline__ std::int64_t quotient(std::int64_t a, std::int64_t b) {
  if (((a | b) >> 32) == 0) return static_cast<std::uint32_t>(a) / static_cast<std::uint32_t>(b);
  return a / b;
}

}  // namespace heddle::cuda
