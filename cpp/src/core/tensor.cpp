#include "heddle/tensor.h"

#include <algorithm>

#include "core/check.h"

namespace heddle {

std::string_view to_string(DType dtype) {
  switch (dtype) {
    case DType::kFloat64: return "float64";
    case DType::kFloat32: return "float32";
    case DType::kFloat16: return "float16";
    case DType::kBFloat16: return "bfloat16";
    case DType::kFloat8E4M3: return "float8_e4m3";
    case DType::kInt8: return "int8";
    case DType::kInt32: return "int32";
    case DType::kInt64: return "int64";
    case DType::kBool: return "bool";
  }
  return "unknown";
}

std::size_t size_of(DType dtype) {
  switch (dtype) {
    case DType::kFloat64:
    case DType::kInt64: return 8;
    case DType::kFloat32:
    case DType::kInt32: return 4;
    case DType::kFloat16:
    case DType::kBFloat16: return 2;
    case DType::kFloat8E4M3:
    case DType::kInt8:
    case DType::kBool: return 1;
  }
  return 0;
}

std::string to_string(Device device) {
  return device.type == DeviceType::kCpu ? "cpu" : "cuda:" + std::to_string(device.index);
}

TensorView::TensorView(const void* data_, DType dtype_, std::initializer_list<std::int64_t> shape_, Device device_)
    : data(const_cast<void*>(data_)), dtype(dtype_), device(device_), rank(static_cast<int>(shape_.size())) {
  if (rank > kMaxRank) {
    check::fail(ErrorCode::kShape, "shape", check::text("rank ", rank, "; allowed are 0 to ", kMaxRank));
  }
  std::copy(shape_.begin(), shape_.end(), shape.begin());
  std::int64_t stride = 1;
  for (int axis = rank - 1; axis >= 0; --axis) {
    strides[axis] = stride;
    stride *= shape[axis];
  }
}

std::int64_t TensorView::numel() const noexcept {
  if (!given()) return 0;
  std::int64_t n = 1;
  for (int axis = 0; axis < rank; ++axis) n *= shape[axis];
  return n;
}

bool TensorView::is_contiguous() const noexcept {
  if (numel() == 0) return true;
  std::int64_t expected = 1;
  for (int axis = rank - 1; axis >= 0; --axis) {
    if (shape[axis] != 1 && strides[axis] != expected) return false;
    expected *= shape[axis];
  }
  return true;
}

std::string TensorView::shape_string() const {
  std::string text = "[";
  for (int axis = 0; axis < rank; ++axis) text += (axis > 0 ? ", " : "") + std::to_string(shape[axis]);
  return text + "]";
}

}  // namespace heddle
