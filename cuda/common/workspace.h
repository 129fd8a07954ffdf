// Device memory that kernels use between themselves.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cuda_runtime_api.h>

namespace heddle::cuda {

// At least `bytes` of memory for work on this stream of the current device, 256-byte aligned, which stays the caller's
// until the next call for the same (purpose, stream): launches of one stream use it one after the other, other streams
// and purposes have their own. Zeroed when it is new; after that it holds what the purpose's last launch left. It grows
// when a call needs more than any before, in the order of the stream.
//
// A stream that is being captured works on memory that belongs to its graph, so that graphs may be replayed side by
// side, on any stream. The purpose has it again when the graph and all that were instantiated from it are destroyed.
std::byte* workspace(const char* purpose, cudaStream_t stream, std::size_t bytes);

// Kernels may count on so many zeros of new memory, and leave them as zeros.
inline constexpr std::size_t kZeroedBytes = 16 << 10;

}  // namespace heddle::cuda
