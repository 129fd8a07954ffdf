// Matrix products of a warpgroup (WGMMA): D[64, N] += A[64, 16 k] B[16 k, N], 16-bit elements, float sums.
//
// Operands in shared memory lie in chunks of 64 elements: a chunk is [rows][64], 128 bytes a row, with the 128-byte
// swizzle that TMA writes; the next 64 elements of the rows follow in the next chunk. The same tile serves as a
// K-major operand (its elements are summed over: Q and K) and as an MN-major one (its rows are summed over: V).
#pragma once

#include <cstdint>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <utility>

#include <cute/arch/mma_sm90_gmma.hpp>
#include <cute/arch/mma_sm90_gmma_ext.hpp>

#include "cuda/common/mbarrier.cuh"

namespace heddle::cuda {

inline constexpr int kChunkElements = 64;  // of 16 bits
inline constexpr int kChunkRowBytes = 128;
inline constexpr int kSwizzleAtomBytes = 8 * kChunkRowBytes;  // chunks begin at a multiple of it

// Where an operand lies. The upper half of a descriptor is the same for all of them, and known to the compiler.
struct Operand {
  std::uint32_t low;

  static constexpr std::uint32_t kHigh = 1u << 30 | kSwizzleAtomBytes >> 4;  // 128-byte swizzle, stride between atoms

  // Moved by so many bytes; address fields count 16 bytes.
  __device__ __forceinline__ Operand operator+(int bytes) const {
    return {low + static_cast<std::uint32_t>(bytes >> 4)};
  }
  __device__ __forceinline__ std::uint64_t descriptor() const {
    std::uint64_t both;
    asm("mov.b64 %0, {%1, %2};" : "=l"(both) : "r"(low), "n"(kHigh));
    return both;
  }
};

// Rows are the M or N of the product. 16 elements further along K: + 32 bytes inside a chunk.
__device__ __forceinline__ Operand k_major(const void* tile) {
  return {(shared_address(tile) & 0x3ffff) >> 4 | 1u << 16};
}
// Elements are the N of the product. 16 rows further along K: + 16 rows of a chunk.
__device__ __forceinline__ Operand mn_major(const void* tile, int chunk_bytes) {
  return {(shared_address(tile) & 0x3ffff) >> 4 | static_cast<std::uint32_t>(chunk_bytes >> 4) << 16};
}

// Registers written before are ready for the products that follow.
__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// Waits until at most `kGroups` committed groups are in flight.
template <int kGroups>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kGroups) : "memory");
}
// Keeps the compiler from moving accesses to registers that products in flight read or write.
template <int N>
__device__ __forceinline__ void pin(float (&x)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) asm volatile("" : "+f"(x[i])::"memory");
}
template <int N>
__device__ __forceinline__ void pin(std::uint32_t (&x)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) asm volatile("" : "+r"(x[i])::"memory");
}

namespace detail {
using cute::SM90::GMMA::Major;
using cute::SM90::GMMA::ScaleOut;

template <class T, int N>
struct Instruction;

#define HEDDLE_WGMMA(N)                                                               \
  template <>                                                                         \
  struct Instruction<__nv_bfloat16, N> {                                              \
    using SS = cute::SM90::GMMA::MMA_64x##N##x16_F32BF16BF16_SS<Major::K, Major::K>;  \
    using RS = cute::SM90::GMMA::MMA_64x##N##x16_F32BF16BF16_RS<Major::K, Major::MN>; \
  };                                                                                  \
  template <>                                                                         \
  struct Instruction<__half, N> {                                                     \
    using SS = cute::SM90::GMMA::MMA_64x##N##x16_F32F16F16_SS<Major::K, Major::K>;    \
    using RS = cute::SM90::GMMA::MMA_64x##N##x16_F32F16F16_RS<Major::K, Major::MN>;   \
  };
HEDDLE_WGMMA(64)
HEDDLE_WGMMA(80)
HEDDLE_WGMMA(96)
HEDDLE_WGMMA(112)
HEDDLE_WGMMA(128)
HEDDLE_WGMMA(192)
HEDDLE_WGMMA(256)
#undef HEDDLE_WGMMA

template <class Mma, std::size_t... I>
__device__ __forceinline__ void ss(std::uint64_t a, std::uint64_t b, float* d, ScaleOut scale,
                                   std::index_sequence<I...>) {
  Mma::fma(a, b, d[I]..., scale);
}
template <class Mma, std::size_t... I>
__device__ __forceinline__ void rs(const std::uint32_t* a, std::uint64_t b, float* d, std::index_sequence<I...>) {
  Mma::fma(a[0], a[1], a[2], a[3], b, d[I]..., ScaleOut::One);
}
}  // namespace detail

// D = A B, or D += A B: both K-major in shared memory; one step of 16 along K.
template <class T, int N>
__device__ __forceinline__ void wgmma_ss(float (&d)[N / 2], Operand a, Operand b, bool add) {
  detail::ss<typename detail::Instruction<T, N>::SS>(a.descriptor(), b.descriptor(), d,
                                                     add ? detail::ScaleOut::One : detail::ScaleOut::Zero,
                                                     std::make_index_sequence<N / 2>{});
}
// D += A B: A in registers, B MN-major in shared memory.
template <class T, int N>
__device__ __forceinline__ void wgmma_rs(float (&d)[N / 2], const std::uint32_t* a, Operand b) {
  detail::rs<typename detail::Instruction<T, N>::RS>(a, b.descriptor(), d, std::make_index_sequence<N / 2>{});
}

// An accumulator D[64, N] of a warpgroup: thread t holds rows row_of(t) and row_of(t) + 8; element 4 j + 2 i + e is in
// row + 8 i, column 8 j + column_of(t) + e.
__device__ __forceinline__ int accumulator_row(int thread) { return thread / 32 * 16 + thread % 32 / 4; }
__device__ __forceinline__ int accumulator_column(int thread) { return thread % 4 * 2; }

}  // namespace heddle::cuda
