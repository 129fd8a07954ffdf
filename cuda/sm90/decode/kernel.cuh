// Decode: attention of a few new tokens over a paged KV cache, one read of K and V.
//
// Each CTA stays on its SM and works through the chunks that the plan gave it (plan.h). Four warps load: they walk the
// chunks, look up pages, and fill a ring of KV tiles by bulk copies of 16 keys, running ahead across the ends of items
// and requests, so that memory never waits for arithmetic. Eight warps compute: keys are the rows of the matrix
// products and queries their columns, so few queries waste little; each warp keeps a softmax of its own over the slices
// of 16 keys that it takes, and the warps meet only at the end of an item. Splits of a unit are merged, in their order,
// by the CTA that finishes the last of them.
//
// Limit: K, V and their scales, read once, over the bandwidth of memory. See docs/kernels/sm90_decode.md.
#pragma once

#include "cuda/common/launch_early.h"
#include "cuda/sm90/decode/compute.cuh"
#include "cuda/sm90/decode/load.cuh"

namespace heddle::cuda::decode {

template <class Config>
__global__ void __launch_bounds__(kThreads, 1) decode_kernel(const __grid_constant__ Params params) {
  extern __shared__ __align__(1024) char memory[];
  auto& shared = *reinterpret_cast<typename Config::Shared*>(memory);
  const int warp = __shfl_sync(kFullWarp, static_cast<int>(threadIdx.x) / 32, 0);
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < Config::kStages; ++stage) {
      shared.full[stage].init(full_arrivals(params));
      shared.empty[stage].init(kMathWarps);
    }
    for (int work = 0; work < kWorks; ++work) {
      shared.work_full[work].init(1);
      shared.work_empty[work].init(kMathWarps);
    }
    fence_barrier_init();
    if (params.whole_slices) {
      prefetch_tensor_map(params.k_map);
      prefetch_tensor_map(params.v_map);
    }
  }
  __syncthreads();
  wait_for_predecessors();
  if (warp < kLoadWarps) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kLoadRegisters));
    Loader<Config>(params, shared, warp).run();
  } else {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kMathRegisters));
    Math<Config>(params, shared, warp - kLoadWarps).run();
  }
}

// One instantiation: what the files of the formats define.
template <class Format, int kDim, int kColumns>
void launch(const Params& params, void* stream) {
  using Instance = Config<Format, kDim, kColumns>;
  constexpr std::size_t kBytes = sizeof(typename Instance::Shared);
  check(cudaFuncSetAttribute(decode_kernel<Instance>, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes), "decode");
  launch_early(decode_kernel<Instance>, static_cast<unsigned>(params.shape.ctas), kThreads, kBytes, stream, "decode",
               params);
}

}  // namespace heddle::cuda::decode
