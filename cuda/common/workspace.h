// Device memory that kernels keep between calls, for each device and stream. Host code.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cuda_runtime_api.h>

namespace heddle::cuda {

// Memory of at least `bytes` for work on this stream of the current device, which stays the caller's until the next
// call for the same (purpose, stream). Its first `kZeroedBytes` are zeros when it is new; kernels leave them as zeros.
// Grows, never shrinks. A stream that is being captured gets memory of its own for each call, kept for good, since its
// graph may run beside later work of that stream.
inline constexpr std::size_t kZeroedBytes = 16 << 10;
std::byte* workspace(const char* purpose, cudaStream_t stream, std::size_t bytes);

}  // namespace heddle::cuda
