// Barriers in shared memory that count arrivals and the bytes of bulk copies, and named barriers among warps.
#pragma once

#include <cstdint>

namespace heddle::cuda {

__device__ __forceinline__ std::uint32_t shared_address(const void* pointer) {
  return static_cast<std::uint32_t>(__cvta_generic_to_shared(pointer));
}

// A phase ends when `count` threads have arrived and all bytes that were announced have come. Waiters name the parity
// of the phase they wait for: 0 for the first.
struct alignas(8) Barrier {
  std::uint64_t state;

  __device__ __forceinline__ void init(int count) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(&state)), "r"(count) : "memory");
  }
  __device__ __forceinline__ void arrive() {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(&state)) : "memory");
  }
  __device__ __forceinline__ void arrive_expecting(std::uint32_t bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(&state)), "r"(bytes)
                 : "memory");
  }
  // One of the expected arrivals, when this thread's cp.async copies so far have landed.
  __device__ __forceinline__ void arrive_when_copied() {
    asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(shared_address(&state)) : "memory");
  }
  // Returns when the phase of this parity has ended.
  __device__ __forceinline__ void wait(int parity) {
    asm volatile(
        "{\n"
        ".reg .pred done;\n"
        "again:\n"
        "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
        "@done bra.uni finished;\n"
        "bra.uni again;\n"
        "finished:\n"
        "}\n" ::"r"(shared_address(&state)),
        "r"(parity)
        : "memory");
  }
};

// True in one lane of a warp that is together.
__device__ __forceinline__ bool elect_one() {
  std::uint32_t elected;
  asm volatile("{\n.reg .pred p;\nelect.sync _|p, 0xffffffff;\nselp.u32 %0, 1, 0, p;\n}\n" : "=r"(elected));
  return elected != 0;
}

// Makes initialized barriers visible to the copy engine; a barrier among the threads has to follow.
__device__ __forceinline__ void fence_barrier_init() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

// Where a ring of stages stands: the stage, and the parity of the phase that it is in. One register.
template <int kStages>
struct RingPosition {
  int at = 0;  // stages 0 .. kStages - 1 in an even phase, then in an odd one

  __device__ __forceinline__ int stage() const { return at < kStages ? at : at - kStages; }
  __device__ __forceinline__ std::uint32_t parity() const { return at < kStages ? 0 : 1; }
  __device__ __forceinline__ int previous() const {  // stage
    const int here = stage();
    return here == 0 ? kStages - 1 : here - 1;
  }
  __device__ __forceinline__ void advance() { at = at + 1 == 2 * kStages ? 0 : at + 1; }
};

// Named barriers: `threads` is the number of threads that sync or arrive.
__device__ __forceinline__ void named_sync(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
__device__ __forceinline__ void named_arrive(int id, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

}  // namespace heddle::cuda
