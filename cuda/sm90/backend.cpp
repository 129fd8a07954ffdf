// What the dispatch table calls for Backend::kSm90.
#include "core/kernels.h"
#include "cuda/launch.h"

namespace heddle::sm90 {

bool available() {
  for (int device = 0; device < cuda::device_count(); ++device) {
    if (cuda::compute_capability(device) == 90) return true;
  }
  return false;
}

void merge(const MergeProblem& problem) {
  const auto& [outs, lses, out, lse, stream] = problem;
  cuda::launch_merge({
      .outs = outs.data,
      .lses = lses.as<const float>(),
      .out = out.data,
      .lse = lse.given() ? lse.as<float>() : nullptr,
      .dtype = outs.dtype,
      .num_parts = outs.shape[0],
      .batch = outs.shape[1],
      .seq = outs.shape[2],
      .heads = outs.shape[3],
      .dim = outs.shape[4],
      .outs_stride =
          {.part = outs.strides[0], .batch = outs.strides[1], .seq = outs.strides[2], .head = outs.strides[3]},
      .lses_stride =
          {.part = lses.strides[0], .batch = lses.strides[1], .seq = lses.strides[3], .head = lses.strides[2]},
      .out_stride = {.batch = out.strides[0], .seq = out.strides[1], .head = out.strides[2]},
      .lse_stride = {.batch = lse.strides[0], .seq = lse.strides[2], .head = lse.strides[1]},
      .device = outs.device.index,
      .stream = stream.handle,
  });
}

}  // namespace heddle::sm90
