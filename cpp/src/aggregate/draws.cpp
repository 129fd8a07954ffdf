#include "aggregate/draws.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <string>

#include "core/check.h"

namespace heddle {
namespace {

struct MethodName {
  SamplingMethod method;
  std::string_view name;
};
constexpr std::array<MethodName, 5> kMethods = {{
    {SamplingMethod::kExact, "exact"},
    {SamplingMethod::kIid, "iid"},
    {SamplingMethod::kStratified, "stratified"},
    {SamplingMethod::kSystematic, "systematic"},
    {SamplingMethod::kSystematicTile, "systematic_tile"},
}};

}  // namespace

std::string_view to_string(SamplingMethod method) {
  for (const MethodName& m : kMethods) {
    if (m.method == method) return m.name;
  }
  return "unknown";
}

SamplingMethod sampling_method_from_string(std::string_view name) {
  std::string allowed;
  for (const MethodName& m : kMethods) {
    if (m.name == name) return m.method;
    allowed += check::text(allowed.empty() ? "" : ", ", m.name);
  }
  check::fail(ErrorCode::kValue, "method", check::text("'", name, "' does not exist; allowed are ", allowed));
}

namespace aggregate {

double ternary_queries(const double* q, std::int64_t dim, const Sampling& sampling, const Draws& draws,
                       std::int8_t* counts) {
  const std::int64_t queries = sampling.bernoulli;
  double largest = 0.0;
  for (std::int64_t i = 0; i < dim; ++i) {
    if (!(std::fabs(q[i]) <= largest)) largest = std::fabs(q[i]);  // takes a NaN, which then spreads: it must show
    if (std::isnan(largest)) break;
  }
  std::fill_n(counts, dim, std::int8_t{0});
  if (!std::isfinite(largest)) return std::numeric_limits<double>::quiet_NaN();
  if (largest == 0.0) return 0.0;

  std::array<double, 4> u{};
  std::int64_t drawn = 0;
  const auto uniform = [&] {
    if (drawn % 4 == 0) u = draws.features(drawn / 4);
    return u[static_cast<std::size_t>(drawn++ % 4)];
  };
  for (std::int64_t i = 0; i < dim; ++i) {
    const double p = std::fabs(q[i]) / largest;
    std::int64_t count = 0;
    if (sampling.bernoulli_stratified) {
      const double expected = static_cast<double>(queries) * p, sure = std::floor(expected);
      count = static_cast<std::int64_t>(sure) + (uniform() < expected - sure ? 1 : 0);
    } else {
      for (std::int64_t b = 0; b < queries; ++b) count += uniform() < p ? 1 : 0;
    }
    counts[i] = static_cast<std::int8_t>(q[i] < 0.0 ? -count : count);
  }
  return largest / static_cast<double>(queries);
}

}  // namespace aggregate
}  // namespace heddle
