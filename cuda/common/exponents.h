// Between natural and binary exponents: kernels take powers of 2. Host and device.
#pragma once

#include <numbers>

namespace heddle::cuda {

inline constexpr float kLog2E = std::numbers::log2e_v<float>, kLn2 = std::numbers::ln2_v<float>;

}  // namespace heddle::cuda
