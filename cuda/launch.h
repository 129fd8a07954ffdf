// What the core may ask of the CUDA part. Plain pointers, element strides and a cudaStream_t as void*: whoever includes
// this needs neither CUDA's headers nor its compiler. Nothing here synchronizes or allocates.
#pragma once

#include <cstdint>

#include "heddle/tensor.h"

namespace heddle::cuda {

// CUDA devices that this process can use; 0 without a driver.
int device_count() noexcept;

// major * 10 + minor of the device's compute capability, e.g. 90 for Hopper. Throws kDevice if there is no such device.
int compute_capability(int device);

// Merge of partial results over disjoint key sets. Partial p of row (b, s, h) is `dim` contiguous elements of `outs`;
// its lse is one element of `lses`. Sizes are counts, strides count elements.
struct MergeArgs {
  const void* outs = nullptr;
  const float* lses = nullptr;
  void* out = nullptr;
  float* lse = nullptr;           // null: not wanted
  DType dtype = DType::kFloat32;  // of outs and out: float32, bfloat16 or float16

  std::int64_t num_parts = 0, batch = 0, seq = 0, heads = 0, dim = 0;
  struct Strides {
    std::int64_t part = 0, batch = 0, seq = 0, head = 0;
  };
  Strides outs_stride, lses_stride, out_stride, lse_stride;  // `part` is unused for the two results

  int device = 0;
  void* stream = nullptr;
};

// Enqueues the merge. The bits of a row depend on its partials alone, not on the rows beside it.
// Throws kDType for other element types and kRuntime if the launch fails.
void launch_merge(const MergeArgs& args);

}  // namespace heddle::cuda
