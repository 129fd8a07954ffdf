#include "core/readable.h"

#include <atomic>

#include "core/check.h"
#include "cuda/launch.h"
#include "heddle/backend.h"

namespace heddle {
namespace {

std::atomic<bool> validating{false};

// Rows of the last axis, the one that is contiguous, into `to` one after the other.
void copy_rows(const TensorView& from, int axis, std::int64_t offset, Stream stream, std::int32_t*& to) {
  if (axis == from.rank - 1) {
    const std::int64_t n = from.shape[axis];
    if (n == 0) return;
    cuda::copy_to_host(to, from.as<const std::int32_t>() + offset, n * 4, from.device.index, stream.handle);
    to += n;
    return;
  }
  for (std::int64_t i = 0; i < from.shape[axis]; ++i) {
    copy_rows(from, axis + 1, offset + i * from.strides[axis], stream, to);
  }
}

}  // namespace

void set_validation(bool on) { validating = on; }
bool validation() { return validating; }

Readable::Readable(const TensorView& array, Stream stream) : view_(array) {
  if (!array.given() || array.device.type == DeviceType::kCpu) return;
  readable_ = validation();
  if (!readable_) return;
  copy_.resize(static_cast<std::size_t>(array.numel()));
  std::int32_t* to = copy_.data();
  copy_rows(array, 0, 0, stream, to);
  view_.data = copy_.data();
  view_.device = {};
  std::int64_t stride = 1;
  for (int axis = array.rank - 1; axis >= 0; --axis) {
    view_.strides[axis] = stride;
    stride *= array.shape[axis];
  }
}

}  // namespace heddle
