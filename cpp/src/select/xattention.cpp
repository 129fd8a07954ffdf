// XAttention: the softmax of anti-diagonal sums says how much of a row's mass a block holds; the fewest blocks that
// hold a given part of it are kept. S^2 / stride * D multiply-adds.
#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <vector>

#include "core/check.h"
#include "core/front.h"
#include "select/blocks.h"
#include "select/scores.h"
#include "select/visibility.h"

namespace heddle::select {
namespace {

class XAttention {
 public:
  XAttention(const Problem& problem, const XAttentionOptions& options)
      : p_(problem),
        options_(options),
        blocks_(problem, options.block, options.n_first, options.n_last),
        dim_(options.stride * problem.q.dim),
        padded_(host::stream_dim(dim_)) {}

  Selection run() {
    for (std::int64_t b = 0; b < static_cast<std::int64_t>(p_.requests.size()); ++b) {
      for (std::int64_t h = 0; h < p_.num_kv_heads; ++h) run_head(b, h);
    }
    return blocks_.selection();
  }

 private:
  struct Scratch {
    std::vector<float> row, queries, scores;
    std::vector<double> mass;
    std::vector<std::int64_t> order;
  };
  void run_head(std::int64_t request, std::int64_t kv_head);
  bool run_row(std::int64_t request, std::int64_t q_head, std::int64_t row, Scratch& s) const;
  void choose(std::int64_t request, std::int64_t q_head, std::int64_t row, Scratch& s) const;

  const Problem& p_;
  const XAttentionOptions& options_;
  const Blocks blocks_;
  const std::int64_t dim_, padded_;
  std::vector<float> keys_;  // of the head in work: [stride-groups][dim]
};

void XAttention::run_head(std::int64_t request, std::int64_t kv_head) {
  const Request& r = p_.requests[static_cast<std::size_t>(request)];
  const std::int64_t rows = blocks_.rows(request), group = p_.group(), stride = options_.stride;
  const std::int64_t groups = (r.kv_len + stride - 1) / stride;
  if (rows == 0 || groups == 0) return;
  keys_.resize(static_cast<std::size_t>(groups * dim_));
  const auto scratch = [&] {
    Scratch s;
    s.row.resize(static_cast<std::size_t>(p_.q.dim));
    s.queries.resize(static_cast<std::size_t>((options_.block / stride + 4) * padded_));
    return s;
  };
  for_items(groups, static_cast<double>(r.kv_len * p_.k.dim), scratch, [&](Scratch& s, std::int64_t g) {
    const auto read = [&](std::int64_t j, float* to) {
      const Place at = place_of(p_, r, j);
      read_row(p_.k, at.page, kv_head, at.slot, to);
    };
    pool(g * stride, std::min(r.kv_len, (g + 1) * stride), stride, p_.k.dim, true, read, s.row.data(),
         keys_.data() + g * dim_);
  });
  std::vector<std::uint8_t> bad(static_cast<std::size_t>(group * rows), 0);
  const double work = static_cast<double>(group * r.q_len * groups * p_.q.dim);
  for_items(group * rows, work, scratch, [&](Scratch& s, std::int64_t n) {
    const std::int64_t row = rows - 1 - n % rows;  // late rows see more
    const std::int64_t head = n / rows;
    bad[static_cast<std::size_t>(head * rows + row)] = run_row(request, kv_head * group + head, row, s) ? 0 : 1;
  });
  for (std::int64_t n = 0; n < group * rows; ++n) {
    if (bad[static_cast<std::size_t>(n)] != 0) {
      fail_block(p_, request, kv_head * group + n / rows, n % rows, blocks_.block());
    }
  }
}

bool XAttention::run_row(std::int64_t request, std::int64_t q_head, std::int64_t row, Scratch& s) const {
  const Request& r = p_.requests[static_cast<std::size_t>(request)];
  const auto [first, last] = blocks_.queries(request, row);
  const ListJob job = blocks_.job(request, row);
  if (job.seen() == 0) return true;
  const std::int64_t stride = options_.stride, per_block = options_.block / stride;
  const std::int64_t rows = (last - first + stride - 1) / stride;
  for (std::int64_t a = 0; a < rows; ++a) {
    float* out = s.queries.data() + a * padded_;
    pool(
        first + a * stride, std::min(last, first + (a + 1) * stride), stride, p_.q.dim, false,
        [&](std::int64_t i, float* to) { read_query(p_, r, i, q_head, to); }, s.row.data(), out);
    std::fill(out + dim_, out + padded_, 0.0f);
  }
  const std::int64_t k0 = job.begin * per_block, k1 = std::min(job.end * per_block, (r.kv_len + stride - 1) / stride);
  s.scores.resize(static_cast<std::size_t>(rows * (k1 - k0)));
  multiply_rows(s.queries.data(), padded_, rows, keys_.data(), dim_, k0, k1,
                static_cast<float>(p_.scale / static_cast<double>(stride)), s.scores.data(), k1 - k0);
  s.mass.assign(static_cast<std::size_t>(job.seen()), 0.0);
  const Visibility seen(p_, request, q_head);
  for (std::int64_t a = 0; a < rows; ++a) {
    float* score = s.scores.data() + a * (k1 - k0);
    const std::int64_t begin = seen.allowed_keys(first + a * stride).first / stride;
    const std::int64_t end =
        (seen.allowed_keys(std::min(last, first + (a + 1) * stride) - 1).second + stride - 1) / stride;
    float top = -std::numeric_limits<float>::infinity();
    for (std::int64_t j = begin; j < end; ++j) {
      if (score[j - k0] != score[j - k0]) return false;
      top = std::max(top, score[j - k0]);
    }
    double sum = 0.0;
    for (std::int64_t j = begin; j < end; ++j) {
      score[j - k0] = std::exp(score[j - k0] - top);
      sum += score[j - k0];
    }
    if (!(sum > 0.0)) continue;
    for (std::int64_t j = begin; j < end; ++j) {
      s.mass[static_cast<std::size_t>(j / per_block - job.begin)] += score[j - k0] / sum;
    }
  }
  choose(request, q_head, row, s);
  return true;
}

// The always-kept first, then the heaviest until the threshold is reached; of equal ones the first.
void XAttention::choose(std::int64_t request, std::int64_t q_head, std::int64_t row, Scratch& s) const {
  const ListJob job = blocks_.job(request, row);
  bool* mask = blocks_.mask_row(request, q_head, row);
  blocks_.keep_always(request, q_head, row, job);
  double total = 0.0, kept = 0.0;
  for (std::int64_t j = job.begin; j < job.end; ++j) {
    total += s.mass[static_cast<std::size_t>(j - job.begin)];
    if (mask[j]) kept += s.mass[static_cast<std::size_t>(j - job.begin)];
  }
  s.order.resize(s.mass.size());
  std::iota(s.order.begin(), s.order.end(), 0);
  std::stable_sort(s.order.begin(), s.order.end(), [&](std::int64_t a, std::int64_t b) {
    return s.mass[static_cast<std::size_t>(a)] > s.mass[static_cast<std::size_t>(b)];
  });
  for (const std::int64_t j : s.order) {
    if (kept >= options_.threshold * total) break;
    if (mask[job.begin + j]) continue;
    mask[job.begin + j] = true;
    kept += s.mass[static_cast<std::size_t>(j)];
  }
}

template <class Params>
Selection run(const Params& call, const XAttentionOptions& options) {
  Problem problem = problem_of(call, false);
  check_call(problem);
  if (options.block >= 1) check_stride(options.stride, options.block);
  if (!(options.threshold > 0.0 && options.threshold <= 1.0)) {
    check::fail(ErrorCode::kValue, "threshold",
                check::text(options.threshold, "; allowed are numbers above 0 up to 1"));
  }
  if constexpr (std::is_same_v<Params, DecodeParams>) set_query_scale(call, problem);
  return XAttention(problem, options).run();
}

}  // namespace

Selection xattention(const AttentionParams& call, const XAttentionOptions& options) { return run(call, options); }
Selection xattention(const DecodeParams& call, const XAttentionOptions& options) { return run(call, options); }

}  // namespace heddle::select
