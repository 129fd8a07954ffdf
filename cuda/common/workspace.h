// Device memory that kernels use between themselves.
#pragma once

#include <cstdint>
#include <functional>

namespace heddle::cuda {

// Calls `enqueue` with at least `bytes` of memory, 256-byte aligned, that is the stream's: launches of one stream use
// it one after the other, those of other streams have their own. Calls for one stream exclude each other, so that what
// `enqueue` enqueues stays together. Zeroed when it is new; after that it holds what the last launch left, perhaps one
// of other shapes. It grows when a call needs more than any before, in the order of the stream.
//
// A stream that is being captured works on memory that belongs to its graph, so that graphs may be replayed side by
// side, on any stream. It is reused when the graph and all that were instantiated from it are destroyed.
void with_workspace(int device, void* stream, std::int64_t bytes, const std::function<void(void*)>& enqueue);

}  // namespace heddle::cuda
