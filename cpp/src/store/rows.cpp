#include "store/rows.h"

#include <algorithm>
#include <string>

#include "core/check.h"
#include "core/numeric.h"
#include "core/threads.h"
#include "host/quantize_kernels.h"

namespace heddle::store {

void check_float_rows(std::string_view argument, const TensorView& x) {
  check::given(argument, x);
  check::dtype(argument, x, {DType::kFloat32, DType::kBFloat16, DType::kFloat16, DType::kFloat64});
  check::rank(argument, x, {3, 4});
  check::contiguous_rows(argument, x);
}

void check_cpu(std::string_view argument, const TensorView& view, std::string_view feature) {
  if (view.device.type == DeviceType::kCpu) return;
  check::fail(ErrorCode::kUnsupported, argument,
              check::text("on ", to_string(view.device), "; ", feature, " is offered on cpu only"));
}

std::uint32_t max_abs_bits(const TokenRows& x, const float* mean) {
  const auto& kernels = host::quantize_kernels();
  std::atomic<std::uint32_t> best{0};
  for_ranges(x.batch * x.tokens, x.numel(), [&](std::int64_t first, std::int64_t last) {
    std::uint32_t mine = 0;
    for (std::int64_t i = first; i < last; ++i) {
      const std::int64_t b = i / x.tokens, t = i % x.tokens;
      for (std::int64_t h = 0; h < x.heads; ++h) {
        const float* m = mean == nullptr ? nullptr : mean + (b * x.heads + h) * x.dim;
        mine = std::max(mine, kernels.max_abs_bits(x.row(b, t, h), x.dtype, m, x.dim));
      }
    }
    raise_to(best, mine);
  });
  return best.load();
}

void fail_non_finite(std::string_view argument, const TensorView& x) {
  const TokenRows rows(x);
  for (std::int64_t b = 0; b < rows.batch; ++b) {
    for (std::int64_t t = 0; t < rows.tokens; ++t) {
      for (std::int64_t h = 0; h < rows.heads; ++h) {
        for (std::int64_t d = 0; d < rows.dim; ++d) {
          const float value = load_as_float(rows.row(b, t, h), rows.dtype, d);
          if (is_finite(value)) continue;
          const std::string at =
              x.rank == 4 ? check::text(b, ", ", t, ", ", h, ", ", d) : check::text(t, ", ", h, ", ", d);
          check::fail(ErrorCode::kValue, argument,
                      check::text("element [", at, "] is ", value, "; allowed are finite float32 numbers"));
        }
      }
    }
  }
  check::fail(ErrorCode::kValue, argument,
              "a difference from the mean overflows float32; allowed are numbers at most half as large");
}

float scale_for(std::uint32_t max_abs_bits, DType dtype) {
  return float_from_bits(max_abs_bits) / (dtype == DType::kInt8 ? kInt8Max : kE4M3Max);
}

}  // namespace heddle::store
