// Index arithmetic.
#pragma once

#include <cstdint>

namespace heddle::cuda {

// a / b of numbers that are not negative: 64-bit division takes as long as the loads of a short row.
__device__ __forceinline__ std::int64_t quotient(std::int64_t a, std::int64_t b) {
  if (((a | b) >> 32) == 0) return static_cast<std::uint32_t>(a) / static_cast<std::uint32_t>(b);
  return a / b;
}

}  // namespace heddle::cuda
