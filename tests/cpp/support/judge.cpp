#include "support/judge.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <sstream>
#include <utility>

namespace heddle::testing {
namespace {

// The largest relative error of a rounding to nearest.
double unit_roundoff(DType dtype) {
  return dtype == DType::kBFloat16  ? 0x1p-8
         : dtype == DType::kFloat16 ? 0x1p-11
         : dtype == DType::kFloat32 ? 0x1p-24
                                    : 0x1p-53;
}

// Largest |a - b| where b is finite.
double max_error(const std::vector<double>& a, const std::vector<double>& b) {
  double error = 0.0;
  for (std::size_t n = 0; n < b.size(); ++n) {
    if (std::isfinite(b[n])) error = std::max(error, std::fabs(a[n] - b[n]));
  }
  return error;
}

// The first difference above `tolerance(n)` as text, or nothing.
template <class Tolerance>
std::string difference(const std::string& what, const std::vector<double>& got, const std::vector<double>& expected,
                       Tolerance&& tolerance) {
  for (std::size_t n = 0; n < expected.size(); ++n) {
    if (std::isnan(expected[n])) continue;
    const bool right =
        std::isinf(expected[n]) ? got[n] == expected[n] : std::fabs(got[n] - expected[n]) <= tolerance(n);
    if (right) continue;
    std::ostringstream text;
    text << what << " element " << n << ": " << got[n] << ", the oracle has " << expected[n] << " (allowed error "
         << tolerance(n) << ")";
    return std::move(text).str();
  }
  return {};
}

}  // namespace

std::uint64_t environment(const char* name, std::uint64_t otherwise) {
  const char* text = std::getenv(name);
  return text == nullptr ? otherwise : std::strtoull(text, nullptr, 10);
}

Values read(const Sample& sample, const Output& output, std::int64_t b) {
  const Case& c = sample.spec();
  Values values;
  const std::int64_t q_len = sample.requests()[static_cast<std::size_t>(b)].q_len;
  for (std::int64_t i = 0; i < q_len; ++i) {
    for (std::int64_t h = 0; h < c.q_heads; ++h) {
      for (std::int64_t d = 0; d < c.dim_v; ++d) values.out.push_back(output.out_at(sample, b, i, h, d));
    }
  }
  for (std::int64_t h = 0; c.lse && h < c.q_heads; ++h) {
    for (std::int64_t i = 0; i < q_len; ++i) values.lse.push_back(output.lse_at(sample, b, h, i));
  }
  return values;
}

Judge::Judge(const Sample& sample, DType probability, DType out)
    : sample_(sample), probability_(probability), out_dtype_(out) {
  const Case& c = sample.spec();
  Output output(sample, DType::kFloat64, DType::kFloat64);
  output.run(sample, Backend::kReference, c.schedule);
  oracle_wrote_beside_ = !output.rest_untouched(sample);
  for (std::int64_t b = 0; b < c.batch; ++b) {
    const Values& exact = oracle_.emplace_back(read(sample, output, b));
    Values& expected = expected_.emplace_back(exact);
    const Result rounded = naive_attention<float>(sample, b, probability, out);
    // An infinite value whose probability the dtype rounds to 0 is NaN in the plain formula too: 0 times infinity.
    for (std::size_t n = 0; n < exact.out.size(); ++n) {
      if (std::isinf(exact.out[n]) && std::isnan(rounded.out[n])) expected.out[n] = std::nan("");
    }
    out_error_ = std::max(out_error_, max_error(rounded.out, exact.out));
    if (c.lse) lse_error_ = std::max(lse_error_, max_error(rounded.lse, exact.lse));
    size_.push_back(rounded.size);
  }
}

std::string Judge::failure(const std::string& who, const Output& output) const {
  if (!output.rest_untouched(sample_)) return who + ": wrote outside its output";
  for (std::size_t b = 0; b < expected_.size(); ++b) {
    const Values got = read(sample_, output, static_cast<std::int64_t>(b)), &exact = expected_[b];
    std::string why = difference(who + ": out", got.out, exact.out, [&](std::size_t n) {
      const double roundings =
          unit_roundoff(probability_) * size_[b][n] + unit_roundoff(out_dtype_) * std::fabs(exact.out[n]);
      return std::max(2.0 * out_error_, roundings) + 1e-5;
    });
    if (why.empty()) {
      why = difference(who + ": lse", got.lse, exact.lse, [&](std::size_t n) {
        return 2.0 * lse_error_ + 1e-5 + 4.0 * unit_roundoff(DType::kFloat32) * std::fabs(exact.lse[n]);
      });
    }
    if (!why.empty()) return why + " in request " + std::to_string(b);
  }
  return {};
}

std::string Judge::oracle_failure() const {
  if (oracle_wrote_beside_) return "reference: wrote outside its output";
  for (std::size_t b = 0; b < oracle_.size(); ++b) {
    const Values& exact = oracle_[b];
    const Result plain =
        naive_attention<double>(sample_, static_cast<std::int64_t>(b), DType::kFloat64, DType::kFloat64);
    std::string why = difference("reference: out", exact.out, plain.out,
                                 [&](std::size_t n) { return 1e-12 * (1.0 + plain.size[n]); });
    if (why.empty() && !exact.lse.empty()) {
      why = difference("reference: lse", exact.lse, plain.lse,
                       [&](std::size_t n) { return 1e-12 * (1.0 + std::fabs(plain.lse[n])); });
    }
    if (!why.empty()) return why + " in request " + std::to_string(b);
  }
  return {};
}

}  // namespace heddle::testing
