// The cache's checks and calls for device memory.
#pragma once

#include <cstdint>
#include <string_view>

#include "cuda/launch.h"
#include "heddle/tensor.h"

namespace heddle::store {

// The device exists: the CPU, or a CUDA device of this process.
void check_available(std::string_view argument, Device device);
// `view` has the dtype and shape of `like` and is contiguous; not given if `like` is not.
void check_like(std::string_view argument, const TensorView& view, const TensorView& like);
// The memory of `written` is not that of `read`.
void check_apart(std::string_view argument, const TensorView& written, std::string_view owner, const TensorView& read);

cuda::FloatRows device_rows(const TensorView& x);
// The scale for a sample [B, S, H, D] or [total, H, D] on a device, of which the first *token_limit tokens count;
// refuses NaN and infinities. Waits for the stream.
float device_scale(std::string_view argument, const TensorView& x, DType dtype, const std::int32_t* token_limit,
                   Stream stream);

}  // namespace heddle::store
