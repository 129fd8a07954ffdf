// Vertical-slash by blocks: the last queries' probabilities say which block columns and block diagonals all rows read.
#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "core/check.h"
#include "core/front.h"
#include "host/workspace.h"
#include "select/blocks.h"
#include "select/scores.h"
#include "select/visibility.h"

namespace heddle::select {
namespace {

class VerticalSlash {
 public:
  VerticalSlash(const Problem& problem, const VerticalSlashOptions& options)
      : p_(problem), options_(options), blocks_(problem, options.block, options.n_first, options.n_last) {}

  Selection run() {
    const std::int64_t heads = p_.num_kv_heads, jobs = static_cast<std::int64_t>(p_.requests.size()) * heads;
    double work = 0.0;
    for (const Request& r : p_.requests) {
      work += static_cast<double>(options_.n_queries) * static_cast<double>(r.kv_len * p_.q.dim * p_.num_q_heads);
    }
    std::vector<std::int64_t> bad(static_cast<std::size_t>(jobs), -1);
    for_items(
        jobs, work, [&] { return KeyScores(p_); },
        [&](KeyScores& scores, std::int64_t n) {
          bad[static_cast<std::size_t>(n)] = run_head(n / heads, n % heads, scores);
        });
    for (std::int64_t n = 0; n < jobs; ++n) {
      if (const std::int64_t i = bad[static_cast<std::size_t>(n)]; i >= 0) {
        fail_block(p_, n / heads, n % heads * p_.group(), i / blocks_.block(), blocks_.block());
      }
    }
    return blocks_.selection();
  }

 private:
  // A query whose score is NaN, or -1.
  std::int64_t run_head(std::int64_t request, std::int64_t kv_head, KeyScores& scores) const;
  std::vector<std::uint8_t> best(const Budget& budget, const std::vector<double>& mass) const;

  const Problem& p_;
  const VerticalSlashOptions& options_;
  const Blocks blocks_;
};

std::vector<std::uint8_t> VerticalSlash::best(const Budget& budget, const std::vector<double>& mass) const {
  const auto n = static_cast<std::int64_t>(mass.size());
  const std::int64_t keep = kept_of(budget, n);
  std::vector<float> metric(mass.begin(), mass.end());
  std::vector<std::int32_t> chosen(static_cast<std::size_t>(keep));
  host::Workspace scratch;
  host::select_kernels().top_k(metric.data(), n, keep, 0, chosen.data(), scratch.reserve(host::top_k_bytes(n)));
  std::vector<std::uint8_t> on(mass.size(), 0);
  for (const std::int32_t j : chosen) on[static_cast<std::size_t>(j)] = 1;
  return on;
}

std::int64_t VerticalSlash::run_head(std::int64_t request, std::int64_t kv_head, KeyScores& scores) const {
  const Request& r = p_.requests[static_cast<std::size_t>(request)];
  const std::int64_t group = p_.group(), columns = blocks_.columns(request), block = blocks_.block();
  if (columns == 0) return -1;
  const auto size = static_cast<std::size_t>(columns);
  std::vector<std::vector<double>> vertical(static_cast<std::size_t>(group), std::vector<double>(size)),
      slash = vertical;
  const Visibility seen(p_, request, kv_head * group);
  std::vector<float> score;
  for (std::int64_t i = std::max<std::int64_t>(0, r.q_len - options_.n_queries); i < r.q_len; ++i) {
    const auto [begin, end] = seen.allowed_keys(i);
    if (begin >= end) continue;
    const std::int64_t stride = end - begin + 16;
    score.resize(static_cast<std::size_t>(stride * group));
    bool good = true;
    scores.set_query(request, i, kv_head, 1);
    scores.for_blocks(begin, end, [&](std::int64_t, std::int64_t row, const host::RawScores& b, std::int64_t key) {
      good &= host::select_kernels().finish(b, score.data() + row * stride + (key - begin), stride);
    });
    if (!good) return i;
    const std::int64_t position = (i + r.kv_len - r.q_len) / block;
    for (std::int64_t h = 0; h < group; ++h) {
      float* s = score.data() + h * stride;
      const float top = *std::max_element(s, s + (end - begin));
      double sum = 0.0;
      for (std::int64_t j = 0; j < end - begin; ++j) sum += s[j] = std::exp(s[j] - top);
      for (std::int64_t j = begin; j < end; ++j) {
        const double p = s[j - begin] / sum;
        vertical[static_cast<std::size_t>(h)][static_cast<std::size_t>(j / block)] += p;
        if (position >= j / block)
          slash[static_cast<std::size_t>(h)][static_cast<std::size_t>(position - j / block)] += p;
      }
    }
  }
  for (std::int64_t h = 0; h < group; ++h) {
    const auto down = best(options_.vertical, vertical[static_cast<std::size_t>(h)]);
    const auto along = best(options_.slash, slash[static_cast<std::size_t>(h)]);
    for (std::int64_t row = 0; row < blocks_.rows(request); ++row) {
      const ListJob job = blocks_.job(request, row);
      const std::int64_t position = blocks_.position(request, row), head = kv_head * group + h;
      bool* mask = blocks_.mask_row(request, head, row);
      blocks_.keep_always(request, head, row, job);
      for (std::int64_t j = job.begin; j < job.end; ++j) {
        const bool slashed = position >= j && along[static_cast<std::size_t>(position - j)] != 0;
        mask[j] = mask[j] || slashed || down[static_cast<std::size_t>(j)] != 0;
      }
    }
  }
  return -1;
}

template <class Params>
Selection run(const Params& call, const VerticalSlashOptions& options) {
  Problem problem = problem_of(call, false);
  check_call(problem);
  check_budget(options.vertical, "vertical");
  check_budget(options.slash, "slash");
  check::at_least("n_queries", options.n_queries, 1);
  if constexpr (std::is_same_v<Params, DecodeParams>) set_query_scale(call, problem);
  return VerticalSlash(problem, options).run();
}

}  // namespace

Selection vertical_slash(const AttentionParams& call, const VerticalSlashOptions& options) {
  return run(call, options);
}
Selection vertical_slash(const DecodeParams& call, const VerticalSlashOptions& options) { return run(call, options); }

}  // namespace heddle::select
