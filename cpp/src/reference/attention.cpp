// The oracle: attention as it is defined, one query at a time, in float64. Written to be read; every other backend is
// tested against it.
#include <cmath>
#include <vector>

#include "core/kernels.h"
#include "core/threads.h"
#include "heddle/backend.h"
#include "reference/rows.h"

namespace heddle::reference {
namespace {

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
