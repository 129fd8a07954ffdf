// What the oracle's definitions share: rows as float64, and the keys that a query sees. Written to be read.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "core/numeric.h"
#include "core/problem.h"
#include "select/visibility.h"

namespace heddle::reference {

inline constexpr double kInf = std::numeric_limits<double>::infinity();

// x = value * scale (+ mean), with scale 1 and no mean for floating types.
inline std::vector<double> read_row(const Rows& rows, std::int64_t page, std::int64_t head, std::int64_t slot) {
  const std::byte* data = rows.row(page, head, slot);
  const float* mean = rows.mean_of(page, head);
  const double scale = rows.scale_of(page, head, slot);
  std::vector<double> x(static_cast<std::size_t>(rows.dim));
  for (std::int64_t d = 0; d < rows.dim; ++d) {
    x[d] = load_as_double(data, rows.dtype, d) * scale + (mean != nullptr ? mean[d] : 0.0);
  }
  return x;
}

inline std::vector<double> read_key_row(const Problem& p, const Rows& rows, const Request& r, std::int64_t kv_head,
                                        std::int64_t key) {
  if (p.page_size > 0) return read_row(rows, r.pages[key / p.page_size], kv_head, key % p.page_size);
  return read_row(rows, r.k_page, kv_head, r.k_first + key);
}

// What INT8 makes of a row: clamp(round-half-even(x / scale), -127, 127) * scale, scale = max|x| / 127 unless static.
// The scale and the quotient are float32, as they are wherever heddle quantizes.
inline void quantize_row(std::vector<double>& x, float static_scale) {
  float max_abs = 0.0f;
  for (const double value : x) max_abs = std::max(max_abs, std::fabs(static_cast<float>(value)));
  const float scale = static_scale > 0.0f ? static_scale : max_abs / kInt8Max;
  for (double& value : x) {
    const float steps = scale > 0.0f ? std::nearbyint(static_cast<float>(value) / scale) : 0.0f;
    value = static_cast<double>(std::clamp(steps, -kInt8Max, kInt8Max)) * scale;
  }
}

inline double dot(const std::vector<double>& a, const std::vector<double>& b) {
  double sum = 0.0;
  for (std::size_t d = 0; d < a.size(); ++d) sum += a[d] * b[d];
  return sum;
}

// The keys that a query reads.
inline std::vector<std::int64_t> visible_keys(const Problem& p, std::int64_t request, std::int64_t q_head,
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

}  // namespace heddle::reference
