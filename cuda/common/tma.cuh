// Bulk tensor copies (TMA): boxes of a tensor between global and shared memory. Beyond its edges zeros are read, and
// nothing is written.
#pragma once

#include <cstdint>
#include <cuda.h>

#include "cuda/common/mbarrier.cuh"

namespace heddle::cuda {

// What a copy's data is worth to the second-level cache. Encodings of createpolicy, as CUTLASS lists them.
enum class CacheHint : std::uint64_t {
  kEvictFirst = 0x12F0000000000000,
  kEvictLast = 0x14F0000000000000,
};

__device__ __forceinline__ void prefetch_tensor_map(const CUtensorMap& map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(reinterpret_cast<std::uint64_t>(&map)) : "memory");
}

__device__ __forceinline__ void load_box(const CUtensorMap& map, Barrier& barrier, void* to, CacheHint hint, int c0,
                                         int c1, int c2, int c3) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], "
      "[%1, {%3, %4, %5, %6}], [%2], %7;" ::"r"(shared_address(to)),
      "l"(reinterpret_cast<std::uint64_t>(&map)), "r"(shared_address(&barrier)), "r"(c0), "r"(c1), "r"(c2), "r"(c3),
      "l"(static_cast<std::uint64_t>(hint))
      : "memory");
}

__device__ __forceinline__ void load_box(const CUtensorMap& map, Barrier& barrier, void* to, CacheHint hint, int c0,
                                         int c1, int c2, int c3, int c4) {
  asm volatile(
      "cp.async.bulk.tensor.5d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], "
      "[%1, {%3, %4, %5, %6, %7}], [%2], %8;" ::"r"(shared_address(to)),
      "l"(reinterpret_cast<std::uint64_t>(&map)), "r"(shared_address(&barrier)), "r"(c0), "r"(c1), "r"(c2), "r"(c3),
      "r"(c4), "l"(static_cast<std::uint64_t>(hint))
      : "memory");
}

// A box back to global memory. What was written to shared memory has to be made known first, by fence_async_proxy().
__device__ __forceinline__ void store_box(const CUtensorMap& map, const void* from, int c0, int c1, int c2, int c3,
                                          int c4) {
  asm volatile("cp.async.bulk.tensor.5d.global.shared::cta.bulk_group [%0, {%2, %3, %4, %5, %6}], [%1];" ::"l"(
                   reinterpret_cast<std::uint64_t>(&map)),
               "r"(shared_address(from)), "r"(c0), "r"(c1), "r"(c2), "r"(c3), "r"(c4)
               : "memory");
}
__device__ __forceinline__ void commit_stores() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
// Until the boxes that this thread stored are written; or until they are read, and their shared memory is free again.
__device__ __forceinline__ void await_stores() { asm volatile("cp.async.bulk.wait_group 0;" ::: "memory"); }
__device__ __forceinline__ void await_store_reads() { asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory"); }
// This thread's writes to shared memory come before what bulk copies and tensor cores do there from now on.
__device__ __forceinline__ void fence_async_proxy() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

}  // namespace heddle::cuda
