// Programmatic dependent launch, host side.
#pragma once

#include <cuda_runtime.h>

#include "cuda/common/check.h"

namespace heddle::cuda {

// Enqueues a kernel that may be started before the one ahead of it in the stream has finished, for which it waits.
template <class... Args>
void launch_early(void (*kernel)(Args...), unsigned blocks, unsigned threads, std::size_t shared_bytes, void* stream,
                  const char* what, const Args&... args) {
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = {blocks, 1, 1};
  config.blockDim = {threads, 1, 1};
  config.dynamicSmemBytes = shared_bytes;
  config.stream = static_cast<cudaStream_t>(stream);
  config.attrs = &attribute;
  config.numAttrs = 1;
  check(cudaLaunchKernelEx(&config, kernel, args...), what);
}

}  // namespace heddle::cuda
