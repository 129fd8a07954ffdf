// The log-sum-exp merge of partial results on the host.
//
// m = max lse_p; out = sum exp(lse_p - m) out_p / sum exp(lse_p - m); lse = m + log sum exp(lse_p - m). The weights are
// normalised before they meet the parts, so that a row with a single part comes through bit for bit. Parts are added in
// their order: the bits do not depend on the number of threads.
#include <cmath>
#include <cstddef>
#include <limits>
#include <vector>

#include "core/kernels.h"
#include "core/threads.h"
#include "host/quantize_kernels.h"

namespace heddle::host {
namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();

// Turns the lses of a row's parts into weights that add up to 1 (all 0 if no part contributes) and returns the merged
// lse. A part at +inf outweighs every finite one, and shares with its like.
float weights_of(const float* lses, std::int64_t parts, float* weights) {
  float max = -kInf;
  for (std::int64_t p = 0; p < parts && !std::isnan(max); ++p) {
    if (!(lses[p] <= max)) max = lses[p];  // takes a NaN too, which then spreads over the row: it must show
  }
  float sum = 0.0f;
  for (std::int64_t p = 0; p < parts; ++p) {
    weights[p] = lses[p] == -kInf ? 0.0f : lses[p] == max ? 1.0f : std::exp(lses[p] - max);
    sum += weights[p];
  }
  if (sum == 0.0f) return -kInf;
  for (std::int64_t p = 0; p < parts; ++p) weights[p] /= sum;
  return max + std::log(sum);
}

}  // namespace

void merge(const MergeProblem& problem) {
  const TensorView &outs = problem.outs, &lses = problem.lses, &out = problem.out, &lse = problem.lse;
  const std::int64_t parts = outs.shape[0], tokens = outs.shape[2], heads = outs.shape[3], dim = outs.shape[4];
  const std::int64_t rows = outs.shape[1] * tokens * heads;
  const auto in_size = static_cast<std::int64_t>(size_of(outs.dtype));
  const auto out_size = static_cast<std::int64_t>(size_of(out.dtype));
  const QuantizeKernels& kernels = quantize_kernels();

  for_ranges(rows, rows * parts * dim, [&](std::int64_t first, std::int64_t last) {
    std::vector<float> part_lses(static_cast<std::size_t>(parts)), weights(part_lses.size());
    std::vector<const void*> part_rows(part_lses.size());
    for (std::int64_t row = first; row < last; ++row) {
      const std::int64_t h = row % heads, s = row / heads % tokens, b = row / heads / tokens;
      const std::int64_t at = b * outs.strides[1] + s * outs.strides[2] + h * outs.strides[3];
      const std::int64_t lse_at = b * lses.strides[1] + h * lses.strides[2] + s * lses.strides[3];
      for (std::int64_t p = 0; p < parts; ++p) {
        part_lses[p] = lses.as<const float>()[lse_at + p * lses.strides[0]];
        part_rows[p] = outs.as<const std::byte>() + (at + p * outs.strides[0]) * in_size;
      }
      const float merged = weights_of(part_lses.data(), parts, weights.data());
      kernels.merge_row(part_rows.data(), weights.data(), parts, outs.dtype, dim,
                        out.as<std::byte>() + (b * out.strides[0] + s * out.strides[1] + h * out.strides[2]) * out_size,
                        out.dtype);
      if (lse.given()) lse.as<float>()[b * lse.strides[0] + h * lse.strides[1] + s * lse.strides[2]] = merged;
    }
  });
}

}  // namespace heddle::host
