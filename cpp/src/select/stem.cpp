// Stem, and block top-k by mean pooling, which is Stem of stride 1 without its V term and schedule.
//
// The mean over the sub-blocks of a block of q . k sums is linear in both: mean(Q) . mean(K) with the rows of a
// stride-group one after the other, keys backwards. So a block is one vector of stride * D numbers, and all scores of a
// head are one small product: S^2 / block^2 * stride * D multiply-adds beside reading Q, K and V once.
#include <algorithm>
#include <cmath>
#include <vector>

#include "core/check.h"
#include "core/front.h"
#include "select/blocks.h"
#include "select/norms.h"
#include "select/scores.h"

namespace heddle::select {
namespace {

struct Plan {
  std::int64_t stride = 1;
  bool value_term = false;
  bool scheduled = false;  // Stem's budget by position; else the same everywhere
};

// k_s of a prompt of n key blocks.
double start_budget(const Budget& budget, std::int64_t n) {
  const auto blocks = static_cast<double>(n);
  if (budget.count > 0) return std::min(static_cast<double>(budget.count), blocks);
  if (budget.fraction > 0.0) return budget.fraction * blocks;
  if (n < 56) return blocks;
  return n < 160 ? 0.2 * blocks + 30.0 : 0.1 * blocks + 30.0;
}

class Stem {
 public:
  Stem(const Problem& problem, const StemOptions& options, const Plan& plan, const KVCache* cache)
      : p_(problem),
        options_(options),
        plan_(plan),
        cache_(cache),
        blocks_(problem, options.block, options.n_first, options.n_last),
        dim_(plan.stride * problem.q.dim),
        padded_(host::stream_dim(dim_)) {}

  Selection run();

 private:
  void run_head(std::int64_t request, std::int64_t kv_head);
  void set_keep(std::int64_t row, ListJob& job) const;
  void add_value_terms(std::int64_t request, std::int64_t kv_head, const Norms& norms);
  void add_z_scores(std::int64_t keys, const float* norms);

  const Problem& p_;
  const StemOptions& options_;
  const Plan plan_;
  const KVCache* cache_;
  const Blocks blocks_;
  const std::int64_t dim_, padded_;
  std::unique_ptr<Norms> norms_;
  std::vector<float> queries_, keys_, terms_;  // of the head in work: [group][rows][padded], [columns][dim], [columns]
};

Selection Stem::run() {
  if (plan_.value_term) norms_ = std::make_unique<Norms>(p_, options_.value_norms, cache_);
  for (std::int64_t b = 0; b < static_cast<std::int64_t>(p_.requests.size()); ++b) {
    for (std::int64_t h = 0; h < p_.num_kv_heads; ++h) run_head(b, h);
  }
  return blocks_.selection();
}

void Stem::set_keep(std::int64_t row, ListJob& job) const {
  std::int64_t wanted = 0;
  if (plan_.scheduled) {
    const std::int64_t prompt =
        options_.prompt_len > 0 ? options_.prompt_len : p_.requests[static_cast<std::size_t>(job.request)].kv_len;
    const std::int64_t n = blocks_.ceil_div(prompt);
    const double start = start_budget(options_.budget, n);
    const auto position = static_cast<double>(blocks_.position(job.request, row));
    wanted = static_cast<std::int64_t>(
        std::ceil(start - start * (1.0 - options_.decay) * position / static_cast<double>(n)));
  } else {
    wanted = kept_of(options_.budget, job.seen());
  }
  job.keep = std::min(job.seen(), std::max(job.keep, wanted));
}

void Stem::run_head(std::int64_t request, std::int64_t kv_head) {
  const Request& r = p_.requests[static_cast<std::size_t>(request)];
  const std::int64_t rows = blocks_.rows(request), columns = blocks_.columns(request), group = p_.group();
  if (rows == 0 || columns == 0) return;
  queries_.resize(static_cast<std::size_t>((group * rows + 4) * padded_));
  keys_.resize(static_cast<std::size_t>(columns * dim_));
  const auto row_buffer = [&] { return std::vector<float>(static_cast<std::size_t>(p_.q.dim)); };
  const double reads = static_cast<double>(r.kv_len * p_.q.dim);
  for_items(group * rows, reads * static_cast<double>(group), row_buffer, [&](auto& row, std::int64_t n) {
    const auto [first, last] = blocks_.queries(request, n % rows);
    float* out = queries_.data() + n * padded_;
    pool(
        first, last, plan_.stride, p_.q.dim, false,
        [&](std::int64_t i, float* to) {
          const std::int64_t head = kv_head * group + n / rows;
          fetch_row(p_.q, r.q_page, head, r.q_first + std::min(i + kRowsAhead, r.q_len - 1));
          read_query(p_, r, i, head, to);
        },
        row.data(), out);
    std::fill(out + dim_, out + padded_, 0.0f);
  });
  for_items(columns, reads, row_buffer, [&](auto& row, std::int64_t n) {
    const auto [first, last] = blocks_.keys(request, n);
    const auto read = [&](std::int64_t j, float* to) {
      const Place at = place_of(p_, r, j), next = place_of(p_, r, std::min(j + kRowsAhead, r.kv_len - 1));
      fetch_row(p_.k, next.page, kv_head, next.slot);
      read_row(p_.k, at.page, kv_head, at.slot, to);
    };
    pool(first, last, plan_.stride, p_.k.dim, true, read, row.data(), keys_.data() + n * dim_);
  });
  if (plan_.value_term) add_value_terms(request, kv_head, *norms_);

  // Rows by as many as the product takes at once.
  constexpr std::int64_t kRows = host::kStreamRows;
  const std::int64_t chunks = (rows + kRows - 1) / kRows;
  const float factor = static_cast<float>(p_.scale / static_cast<double>(plan_.stride));
  std::vector<std::uint8_t> bad(static_cast<std::size_t>(group * rows), 0);
  const double work = static_cast<double>(group * rows * columns * dim_);
  for_items(
      group * chunks, work, [&] { return std::vector<float>(static_cast<std::size_t>(kRows * columns)); },
      [&](auto& metric, std::int64_t n) {
        const std::int64_t head = n / chunks, first = n % chunks * kRows, last = std::min(rows, first + kRows);
        std::int64_t end = 0;
        for (std::int64_t row = first; row < last; ++row) end = std::max(end, blocks_.job(request, row).recent);
        multiply_rows(queries_.data() + (head * rows + first) * padded_, padded_, last - first, keys_.data(), dim_, 0,
                      end, factor, metric.data(), columns);
        for (std::int64_t row = first; row < last; ++row) {
          float* at = metric.data() + (row - first) * columns;
          ListJob job = blocks_.job(request, row);
          set_keep(row, job);
          for (std::int64_t j = job.middle; plan_.value_term && j < job.recent; ++j) {
            at[j] += terms_[static_cast<std::size_t>(j)];
          }
          if (!blocks_.choose(request, kv_head * group + head, row, job, at + job.middle)) {
            bad[static_cast<std::size_t>(head * rows + row)] = 1;
          }
        }
      });
  for (std::int64_t n = 0; n < group * rows; ++n) {
    if (bad[static_cast<std::size_t>(n)] != 0) {
      fail_block(p_, request, kv_head * group + n / rows, n % rows, blocks_.block());
    }
  }
}

void Stem::add_value_terms(std::int64_t request, std::int64_t kv_head, const Norms& norms) {
  const std::int64_t keys = p_.requests[static_cast<std::size_t>(request)].kv_len, columns = blocks_.columns(request);
  std::vector<float> buffer(static_cast<std::size_t>(keys));
  const float* length = norms.get(request, kv_head, 0, keys, buffer.data());
  terms_.assign(static_cast<std::size_t>(columns), 0.0f);
  if (options_.norm == Norm::kZScore) return add_z_scores(keys, length);
  for (std::int64_t j = 0; j < columns; ++j) {
    const auto [first, last] = blocks_.keys(request, j);
    float most = 0.0f;
    for (std::int64_t i = first; i < last; ++i) most = length[i] > most || length[i] != length[i] ? length[i] : most;
    const double term = options_.norm == Norm::kLog ? std::log(static_cast<double>(most) + options_.epsilon)
                                                    : std::log(most < 1.0f ? 1.0 : static_cast<double>(most));
    terms_[static_cast<std::size_t>(j)] = static_cast<float>(options_.beta * term);
  }
}

// The z-scores are over the whole stride-groups; deviations are those of a sample (n - 1).
void Stem::add_z_scores(std::int64_t keys, const float* norms) {
  const std::int64_t stride = plan_.stride, groups = (keys + stride - 1) / stride, whole = keys / stride;
  std::vector<double> logs(static_cast<std::size_t>(groups));
  double sum = 0.0, squares = 0.0;
  for (std::int64_t g = 0; g < groups; ++g) {
    float most = 0.0f;
    for (std::int64_t i = g * stride; i < std::min(keys, (g + 1) * stride); ++i) {
      most = norms[i] > most || norms[i] != norms[i] ? norms[i] : most;
    }
    logs[static_cast<std::size_t>(g)] = std::log(static_cast<double>(most) + options_.epsilon);
    if (g < whole || whole == 0) sum += logs[static_cast<std::size_t>(g)];
  }
  const auto counted = static_cast<double>(whole == 0 ? groups : whole);
  const double mean = sum / counted;
  for (std::int64_t g = 0; g < (whole == 0 ? groups : whole); ++g) {
    squares += (logs[static_cast<std::size_t>(g)] - mean) * (logs[static_cast<std::size_t>(g)] - mean);
  }
  const double deviation = counted > 1.0 ? std::sqrt(squares / (counted - 1.0)) : 0.0;
  const std::int64_t per_block = blocks_.block() / stride;
  for (std::size_t j = 0; j < terms_.size(); ++j) {
    const std::int64_t first = static_cast<std::int64_t>(j) * per_block, last = std::min(groups, first + per_block);
    double total = 0.0;
    for (std::int64_t g = first; g < last; ++g) {
      const double z = (logs[static_cast<std::size_t>(g)] - mean) / (deviation + 1e-6);
      total += z < 0.0 ? 0.0 : z;
    }
    terms_[j] = static_cast<float>(options_.beta * total / static_cast<double>(last - first));
  }
}

template <class Params>
Selection run_stem(const Params& call, Problem& problem, const StemOptions& options, const Plan& plan,
                   const KVCache* cache) {
  check_call(problem);
  if constexpr (std::is_same_v<Params, DecodeParams>) set_query_scale(call, problem);
  return Stem(problem, options, plan, cache).run();
}

void check_stem(const Problem& problem, const StemOptions& options, bool cache) {
  if (options.budget.count != 0 || options.budget.fraction != 0.0) check_budget(options.budget);
  if (options.block >= 1) check_stride(options.stride, options.block);
  if (!(options.decay >= 0.0 && options.decay <= 1.0)) {
    check::fail(ErrorCode::kValue, "decay", check::text(options.decay, "; allowed are 0 to 1"));
  }
  check_value_term(options.beta, options.epsilon);
  std::int64_t longest = 0;
  for (const Request& r : problem.requests) longest = std::max(longest, r.kv_len);
  if (options.prompt_len != 0 && options.prompt_len < longest) {
    check::fail(ErrorCode::kValue, "prompt_len",
                check::text(options.prompt_len, "; allowed are ", longest, ", the keys there are, and above"));
  }
  if (options.value_norms.given()) {
    if (cache) check::fail(ErrorCode::kValue, "value_norms", "given with a cache, which keeps its own");
    check_value_norms(problem, options.value_norms);
  }
}

template <class Params>
Selection stem_of(const Params& call, const StemOptions& options, const KVCache* cache) {
  Problem problem = problem_of(call, false);
  check_stem(problem, options, cache != nullptr);
  const Plan plan{.stride = options.stride, .value_term = options.beta != 0.0, .scheduled = true};
  return run_stem(call, problem, options, plan, cache);
}

template <class Params>
Selection block_topk_of(const Params& call, const BlockTopkOptions& options, const KVCache* cache) {
  Problem problem = problem_of(call, false);
  check_budget(options.budget);
  const StemOptions as_stem{
      .budget = options.budget, .block = options.block, .n_first = options.n_first, .n_last = options.n_last};
  return run_stem(call, problem, as_stem, Plan{}, cache);
}

}  // namespace

Selection stem(const AttentionParams& call, const StemOptions& options) { return stem_of(call, options, nullptr); }
Selection stem(const DecodeParams& call, const StemOptions& options) { return stem_of(call, options, call.cache); }
Selection block_topk(const AttentionParams& call, const BlockTopkOptions& options) {
  return block_topk_of(call, options, nullptr);
}
Selection block_topk(const DecodeParams& call, const BlockTopkOptions& options) {
  return block_topk_of(call, options, call.cache);
}

}  // namespace heddle::select
