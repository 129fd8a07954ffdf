// The oracle: attention as it is defined, one query at a time, in float64. Written to be read; every other backend is
// tested against it.
#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "core/kernels.h"
#include "core/numeric.h"
#include "core/threads.h"
#include "heddle/backend.h"
#include "select/visibility.h"

namespace heddle::reference {
namespace {

constexpr double kInf = std::numeric_limits<double>::infinity();

// x = value * scale (+ mean), with scale 1 and no mean for floating types.
std::vector<double> read_row(const Rows& rows, std::int64_t page, std::int64_t head, std::int64_t slot) {
  const std::byte* data = rows.row(page, head, slot);
  const float* mean = rows.mean_of(page, head);
  const double scale = rows.scale_of(page, head, slot);
  std::vector<double> x(static_cast<std::size_t>(rows.dim));
  for (std::int64_t d = 0; d < rows.dim; ++d) {
    x[d] = load_as_double(data, rows.dtype, d) * scale + (mean != nullptr ? mean[d] : 0.0);
  }
  return x;
}

std::vector<double> read_key_row(const Problem& p, const Rows& rows, const Request& r, std::int64_t kv_head,
                                 std::int64_t key) {
  if (p.page_size > 0) return read_row(rows, r.pages[key / p.page_size], kv_head, key % p.page_size);
  return read_row(rows, r.k_page, kv_head, r.k_first + key);
}

// What INT8 makes of a row: clamp(round-half-even(x / scale), -127, 127) * scale, scale = max|x| / 127 unless static.
// The scale and the quotient are float32, as they are wherever heddle quantizes.
void quantize_row(std::vector<double>& x, float static_scale) {
  float max_abs = 0.0f;
  for (const double value : x) max_abs = std::max(max_abs, std::fabs(static_cast<float>(value)));
  const float scale = static_scale > 0.0f ? static_scale : max_abs / kInt8Max;
  for (double& value : x) {
    const float steps = scale > 0.0f ? std::nearbyint(static_cast<float>(value) / scale) : 0.0f;
    value = static_cast<double>(std::clamp(steps, -kInt8Max, kInt8Max)) * scale;
  }
}

double dot(const std::vector<double>& a, const std::vector<double>& b) {
  double sum = 0.0;
  for (std::size_t d = 0; d < a.size(); ++d) sum += a[d] * b[d];
  return sum;
}

// The keys that a query reads.
std::vector<std::int64_t> visible_keys(const Problem& p, std::int64_t request, std::int64_t q_head,
                                       std::int64_t query) {
  const Visibility visibility(p, request, q_head);
  std::vector<std::int64_t> keys;
  if (has_token_lists(p)) {
    for (const std::int32_t key : token_list(p, request, query, q_head / p.group())) {
      if (visibility.visible(query, key)) keys.push_back(key);
    }
  } else {
    for (std::int64_t key = 0; key < p.requests[request].kv_len; ++key) {
      if (visibility.visible(query, key)) keys.push_back(key);
    }
  }
  return keys;
}

void attend(const Problem& p, std::int64_t request, std::int64_t q_head, std::int64_t query) {
  const Request& r = p.requests[request];
  const std::int64_t kv_head = q_head / p.group(), slot = r.q_first + query;
  const std::vector<std::int64_t> keys = visible_keys(p, request, q_head, query);
  std::vector<double> q = read_row(p.q, r.q_page, q_head, slot);
  if (p.quantize_q) quantize_row(q, p.q_static_scale);

  const double sink = p.sinks != nullptr ? p.sinks[q_head] : -kInf;
  double max = sink;
  std::vector<double> scores;
  for (const std::int64_t key : keys) {
    double s = p.scale * dot(q, read_key_row(p, p.k, r, kv_head, key));
    if (p.softcap > 0.0) s = p.softcap * std::tanh(s / p.softcap);
    scores.push_back(s);
    if (!(s <= max)) max = s;  // a NaN that is seen must show
  }

  std::vector<double> out(static_cast<std::size_t>(p.v.dim), 0.0);
  double lse = -kInf;
  if (max != -kInf) {
    double denominator = std::exp(sink - max);
    for (std::size_t n = 0; n < keys.size(); ++n) {
      const double weight = std::exp(scores[n] - max);
      denominator += weight;
      const std::vector<double> v = read_key_row(p, p.v, r, kv_head, keys[n]);
      for (std::size_t d = 0; d < out.size(); ++d) out[d] += weight * v[d];
    }
    for (double& value : out) value /= denominator;
    lse = max + std::log(denominator);
  }

  std::byte* row = p.out.row(r.q_page, q_head, slot);
  for (std::size_t d = 0; d < out.size(); ++d)
    store_from_double(row, p.out.dtype, static_cast<std::int64_t>(d), out[d]);
  if (p.lse != nullptr) {
    store_from_double(p.lse, p.lse_dtype,
                      r.q_page * p.lse_page_stride + q_head * p.lse_head_stride + slot * p.lse_slot_stride, lse);
  }
}

}  // namespace

void attention(const Problem& problem) {
  for (std::size_t request = 0; request < problem.requests.size(); ++request) {
    const std::int64_t queries = problem.requests[request].q_len;
    parallel_for(queries * problem.num_q_heads, num_threads(), [&](std::int64_t i) {
      attend(problem, static_cast<std::int64_t>(request), i / queries, i % queries);
    });
  }
}

}  // namespace heddle::reference
