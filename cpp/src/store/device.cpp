#include "store/device.h"

#include <functional>

#include "core/check.h"
#include "host/quantize_kernels.h"
#include "store/rows.h"

namespace heddle::store {

void check_available(std::string_view argument, Device device) {
  if (device.type == DeviceType::kCpu) return;
  const int count = cuda::device_count();
  if (device.index >= 0 && device.index < count) return;
  check::fail(ErrorCode::kDevice, argument,
              check::text(to_string(device), "; allowed ",
                          count == 0 ? std::string("is cpu: this process sees no CUDA device")
                                     : check::text("are cpu and cuda:0 to cuda:", count - 1)));
}

void check_like(std::string_view argument, const TensorView& view, const TensorView& like) {
  if (!like.given()) {
    if (view.given())
      check::fail(ErrorCode::kValue, argument, "given, but the format has no such part; allowed is none");
    return;
  }
  check::dtype(argument, view, {like.dtype});
  check::rank(argument, view, like.rank);
  for (int i = 0; i < like.rank; ++i) {
    check::axis(argument, view, i, "size", like.shape[i], "as the configuration has it");
  }
  if (!view.is_contiguous()) check::fail(ErrorCode::kLayout, argument, "not contiguous; allowed is contiguous memory");
}

void check_apart(std::string_view argument, const TensorView& written, std::string_view owner, const TensorView& read) {
  const std::less<const std::byte*> before;
  const auto end = [](const TensorView& x) {
    return x.as<const std::byte>() + x.numel() * static_cast<std::int64_t>(size_of(x.dtype));
  };
  if (written.numel() == 0 || !before(written.as<const std::byte>(), end(read)) ||
      !before(read.as<const std::byte>(), end(written))) {
    return;
  }
  check::fail(ErrorCode::kValue, argument, check::text("in the memory of ", owner, "; allowed is memory of its own"));
}

cuda::FloatRows device_rows(const TensorView& x) {
  const int token = x.rank - 3;
  return {.data = x.data,
          .dtype = x.dtype,
          .batch = x.rank == 4 ? x.shape[0] : 1,
          .tokens = x.shape[token],
          .heads = x.shape[token + 1],
          .dim = x.shape[token + 2],
          .batch_stride = x.rank == 4 ? x.strides[0] : 0,
          .token_stride = x.strides[token],
          .head_stride = x.strides[token + 1]};
}

float device_scale(std::string_view argument, const TensorView& x, DType dtype, const std::int32_t* token_limit,
                   Stream stream) {
  const std::uint32_t bits = cuda::max_abs_bits(device_rows(x), token_limit, x.device.index, stream.handle);
  if (host::non_finite_bits(bits)) {
    check::fail(ErrorCode::kValue, argument, "holds NaN or an infinity; allowed are finite float32 numbers");
  }
  return scale_for(bits, dtype);
}

}  // namespace heddle::store
