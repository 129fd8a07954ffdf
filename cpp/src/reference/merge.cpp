// The merge of partial results as it is defined, in float64.
#include <cmath>
#include <limits>
#include <vector>

#include "core/kernels.h"
#include "core/numeric.h"

namespace heddle::reference {
namespace {

constexpr double kInf = std::numeric_limits<double>::infinity();

// Of the element at these indices; axes that are not named are at 0.
template <class... Index>
std::int64_t offset(const TensorView& view, Index... index) {
  std::int64_t at = 0;
  int axis = 0;
  ((at += index * view.strides[axis++]), ...);
  return at;
}

void merge_row(const MergeProblem& p, std::int64_t b, std::int64_t s, std::int64_t h) {
  const std::int64_t parts = p.outs.shape[0], dim = p.outs.shape[4];
  std::vector<double> lses;
  double max = -kInf;
  for (std::int64_t part = 0; part < parts; ++part) {
    lses.push_back(load_as_double(p.lses.data, p.lses.dtype, offset(p.lses, part, b, h, s)));
    if (!(lses[part] <= max)) max = lses[part];  // a NaN must show
  }

  std::vector<double> out(static_cast<std::size_t>(dim), 0.0);
  double lse = -kInf;
  if (max != -kInf) {
    double denominator = 0.0;
    for (std::int64_t part = 0; part < parts; ++part) {
      if (lses[part] == -kInf) continue;  // whatever its out holds
      const double weight = std::exp(lses[part] - max);
      denominator += weight;
      const std::int64_t row = offset(p.outs, part, b, s, h);
      for (std::int64_t d = 0; d < dim; ++d) out[d] += weight * load_as_double(p.outs.data, p.outs.dtype, row + d);
    }
    for (double& value : out) value /= denominator;
    lse = max + std::log(denominator);
  }

  const std::int64_t row = offset(p.out, b, s, h);
  for (std::int64_t d = 0; d < dim; ++d) store_from_double(p.out.data, p.out.dtype, row + d, out[d]);
  if (p.lse.given()) store_from_double(p.lse.data, p.lse.dtype, offset(p.lse, b, h, s), lse);
}

}  // namespace

void merge(const MergeProblem& problem) {
  for (std::int64_t b = 0; b < problem.outs.shape[1]; ++b) {
    for (std::int64_t s = 0; s < problem.outs.shape[2]; ++s) {
      for (std::int64_t h = 0; h < problem.outs.shape[3]; ++h) merge_row(problem, b, s, h);
    }
  }
}

}  // namespace heddle::reference
