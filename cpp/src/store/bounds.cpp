#include "store/bounds.h"

#include <limits>

#include "host/quantize_kernels.h"
#include "host/tile_kernels.h"

namespace heddle::store {
namespace {

bool is_quantized(DType dtype) { return dtype == DType::kInt8 || dtype == DType::kFloat8E4M3; }

}  // namespace

void BoundsRow::start(std::int64_t dim) {
  const auto n = static_cast<std::size_t>(dim);
  row_.resize(n);
  bounds_.assign(n, -std::numeric_limits<float>::infinity());
  bounds_.resize(2 * n, std::numeric_limits<float>::infinity());
}

void BoundsRow::add(const std::byte* x, DType dtype, float scale, const float* mean) {
  const std::size_t n = row_.size();
  float *row = row_.data(), *high = bounds_.data(), *low = high + n;
  host::tile_kernels().read_row(x, static_cast<std::int64_t>(n), dtype, row);
  for (std::size_t i = 0; scale != 1.0f && i < n; ++i) row[i] *= scale;
  for (std::size_t i = 0; mean != nullptr && i < n; ++i) row[i] += mean[i];
  for (std::size_t i = 0; i < n; ++i) {
    high[i] = row[i] > high[i] || row[i] != row[i] ? row[i] : high[i];
    low[i] = row[i] < low[i] || row[i] != row[i] ? row[i] : low[i];
  }
}

void BoundsRow::load(const std::byte* row, DType dtype) {
  host::tile_kernels().read_row(row, static_cast<std::int64_t>(bounds_.size()), dtype, bounds_.data());
}

void BoundsRow::store(std::byte* row, DType dtype) const {
  const auto& kernels = host::quantize_kernels();
  const auto n = static_cast<std::int64_t>(bounds_.size());
  if (is_quantized(dtype)) {
    kernels.quantize(bounds_.data(), DType::kFloat32, nullptr, n, 1.0f, row, dtype);
  } else {
    kernels.convert(bounds_.data(), DType::kFloat32, n, row, dtype);
  }
}

}  // namespace heddle::store
