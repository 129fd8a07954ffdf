// Asynchronous copies into shared memory, and kernels that begin before their predecessors end (PTX ISA 8.0, sm_80 and
// sm_90).
#pragma once

#include <cstdint>

#include "cuda/common/mbarrier.cuh"

namespace heddle::cuda {

// An L2 policy for data that nobody reads again soon: it is evicted first.
__device__ __forceinline__ std::uint64_t evict_first_policy() {
  std::uint64_t policy;
  asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}

// Copies 16 bytes past L1; of these `bytes` (0 or 16) are read and the rest becomes zero. kAhead: L2 fetches the 256
// aligned bytes around them.
template <bool kAhead>
__device__ __forceinline__ void copy16_async(std::uint32_t to, const void* from, int bytes, std::uint64_t policy) {
  if constexpr (kAhead) {
    asm volatile("cp.async.cg.shared.global.L2::cache_hint.L2::256B [%0], [%1], 16, %2, %3;" ::"r"(to), "l"(from),
                 "r"(bytes), "l"(policy)
                 : "memory");
  } else {
    asm volatile("cp.async.cg.shared.global.L2::cache_hint [%0], [%1], 16, %2, %3;" ::"r"(to), "l"(from), "r"(bytes),
                 "l"(policy)
                 : "memory");
  }
}

__device__ __forceinline__ void copy4_async(std::uint32_t to, const void* from, int bytes) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(to), "l"(from), "r"(bytes) : "memory");
}

// Programmatic dependent launch: the next kernel of the stream may start; the one before has finished.
__device__ __forceinline__ void launch_dependents() { asm volatile("griddepcontrol.launch_dependents;" ::: "memory"); }
__device__ __forceinline__ void wait_for_predecessors() { asm volatile("griddepcontrol.wait;" ::: "memory"); }

}  // namespace heddle::cuda
