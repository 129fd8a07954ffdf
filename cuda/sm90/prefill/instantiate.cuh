// Defines the PrefillVariant of a Config.
#pragma once

#include "cuda/common/check.h"
#include "cuda/sm90/prefill/kernel.cuh"
#include "cuda/sm90/prefill/launch.cuh"

namespace heddle::cuda {

template <class Config>
void launch_kernel(const PrefillParams& params, int grid, cudaStream_t stream) {
  constexpr int kBytes = sizeof(PrefillShared<Config>);
  constexpr int kMaxBytes = 227 << 10;
  static_assert(kBytes <= kMaxBytes, "shared memory of an SM");
  check(cudaFuncSetAttribute(prefill_kernel<Config>, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes), "attention");
  prefill_kernel<Config><<<static_cast<unsigned>(grid), Config::kThreads, kBytes, stream>>>(params);
  check(cudaGetLastError(), "attention");
}

template <class Config>
void launch_prefill(const PrefillParams& params, int grid, cudaStream_t stream) {
  const PatternKind kind = params.pattern.kind;
  const bool intervals = kind == PatternKind::kNone || kind == PatternKind::kWindowGlobal;
  if (intervals && params.score_map == ScoreMap::kNone) {
    launch_kernel<Config>(params, grid, stream);
  } else {
    launch_kernel<General<Config>>(params, grid, stream);
  }
}

template <class Config>
void make_prefill_worklist(const PrefillParams& params, cudaStream_t stream) {
  constexpr int kWarps = 8;
  const PrefillWorklist& list = params.worklist;
  const std::int64_t warps = std::int64_t{list.row_tiles} * list.words;
  if (warps == 0) return;  // no keys
  const dim3 grid(static_cast<unsigned>((warps + kWarps - 1) / kWarps), static_cast<unsigned>(list.heads),
                  static_cast<unsigned>(list.requests));
  prefill_worklist_kernel<Config::kKeys, kWarps><<<grid, 32 * kWarps, 0, stream>>>(params);
  check(cudaGetLastError(), "attention");
}

template <class Config>
constexpr PrefillVariant prefill_variant() {
  return {.dim = Config::kDim,
          .dim_v = Config::kDimV,
          .rows = Config::kRows,
          .keys = Config::kKeys,
          .launch = launch_prefill<Config>,
          .make_worklist = make_prefill_worklist<Config>};
}

}  // namespace heddle::cuda
