// Tensor maps for bulk copies, made by the driver. Host code.
#pragma once

#include <cstdint>
#include <cuda.h>
#include <initializer_list>

#include "heddle/tensor.h"

namespace heddle::cuda {

struct TensorAxis {
  std::int64_t size, stride;  // in elements; the first axis is contiguous and its stride is not looked at
  std::int64_t box;           // what one copy brings of it
};

// Boxes are swizzled over their rows, of 128, 64 or 32 bytes. Throws kLayout that names `argument` if bulk copies
// cannot reach such rows: a start or a stride that is no multiple of 16 bytes, or a stride that is negative.
CUtensorMap make_tensor_map(const char* argument, const void* data, DType dtype,
                            std::initializer_list<TensorAxis> axes);

}  // namespace heddle::cuda
