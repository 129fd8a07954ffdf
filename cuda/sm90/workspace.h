// Device memory that kernels of one stream use one after the other.
#pragma once

#include <cstdint>
#include <functional>

namespace heddle::cuda {

// Calls `enqueue` with at least `bytes` of the stream's workspace. Calls for one stream exclude each other, so that
// what they enqueue stays together. Memory is allocated when a call needs more than any before; the old one stays,
// since captured graphs may use it. Throws kValue if it would have to allocate while the stream is being captured.
void with_workspace(int device, void* stream, std::int64_t bytes, const std::function<void(void*)>& enqueue);

}  // namespace heddle::cuda
