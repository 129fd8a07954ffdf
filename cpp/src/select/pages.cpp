// Pages of keys at run time, ranked by a bound on what their tokens can score: reads no keys, two rows a page.
//
// sum_d max(q_d kmin_d, q_d kmax_d) = [max(q, 0) | min(q, 0)] . [kmax | kmin]: a score like any other, of twice the
// dimension. Limit: the bandwidth of reading the bounds, 2 / page_size of K.
#include <algorithm>
#include <cmath>
#include <vector>

#include "core/check.h"
#include "core/front.h"
#include "core/integers.h"
#include "host/tile_kernels.h"
#include "host/workspace.h"
#include "select/lists.h"
#include "select/scores.h"
#include "select/visibility.h"
#include "store/bounds.h"

namespace heddle::select {
namespace {

constexpr std::int64_t kFar = std::int64_t{1} << 40;

// Bounds of every page of every request and KV head: the cache's, where they stand for just what the request holds of
// the page, and computed otherwise.
class Bounds {
 public:
  Bounds(const Problem& problem, const PagesOptions& options, const KVCache* cache, std::int64_t page_size)
      : p_(problem), options_(options), page_size_(page_size) {
    if (cache != nullptr) {
      stored_ = cache->page_bounds();
      stored_norms_ = cache->page_norms();
      value_norms_ = cache->value_norms();
      tokens_ = cache->page_tokens().as<const std::int32_t>();
      dtype_ = stored_.dtype;
      if (p_.k.scale != nullptr && p_.k.partition == 0) factor_ = p_.k.scale[0];
    }
    row_bytes_ = 2 * p_.k.dim * static_cast<std::int64_t>(size_of(dtype_));
    std::int64_t total = 0;
    for (const Request& r : p_.requests) {
      first_.push_back(total);
      total += ceil_div(r.kv_len, page_size) * p_.num_kv_heads;
    }
    rows_.resize(static_cast<std::size_t>(total));
    norms_.resize(static_cast<std::size_t>(total));
    std::vector<Missing> missing;
    for (std::size_t b = 0; b < p_.requests.size(); ++b) locate(static_cast<std::int64_t>(b), missing);
    memory_.resize(missing.size() * static_cast<std::size_t>(row_bytes_));
    for_items(
        static_cast<std::int64_t>(missing.size()),
        static_cast<double>(missing.size()) * static_cast<double>(page_size * p_.k.dim),
        [] { return store::BoundsRow(); },
        [&](store::BoundsRow& row, std::int64_t n) {
          compute(missing[static_cast<std::size_t>(n)], row, memory_.data() + n * row_bytes_);
        });
  }

  DType dtype() const { return dtype_; }
  float factor() const { return factor_; }  // what stored bounds are multiples of
  // [pages of the request] of a KV head.
  const std::byte* const* rows(std::int64_t request, std::int64_t head) const {
    return rows_.data() + at(request, head);
  }
  const float* norms(std::int64_t request, std::int64_t head) const { return norms_.data() + at(request, head); }

 private:
  struct Missing {
    std::int64_t request, head, page;
  };
  std::int64_t at(std::int64_t request, std::int64_t head) const {
    return first_[static_cast<std::size_t>(request)] +
           head * ceil_div(p_.requests[static_cast<std::size_t>(request)].kv_len, page_size_);
  }

  void locate(std::int64_t request, std::vector<Missing>& missing) {
    const Request& r = p_.requests[static_cast<std::size_t>(request)];
    for (std::int64_t head = 0; head < p_.num_kv_heads; ++head) {
      for (std::int64_t page = 0; page * page_size_ < r.kv_len; ++page) {
        const std::int64_t holds = std::min(page_size_, r.kv_len - page * page_size_);
        const auto n = static_cast<std::size_t>(at(request, head) + page);
        if (tokens_ != nullptr && tokens_[r.pages[page]] == holds) {
          const std::int64_t row = r.pages[page] * p_.num_kv_heads + head;
          rows_[n] = stored_.as<const std::byte>() + row * row_bytes_;
          norms_[n] = stored_norms_.as<const float>()[row];
        } else {
          missing.push_back({request, head, page});
        }
      }
    }
  }

  void compute(const Missing& m, store::BoundsRow& row, std::byte* out) {
    const Request& r = p_.requests[static_cast<std::size_t>(m.request)];
    const std::int64_t begin = m.page * page_size_, end = std::min(begin + page_size_, r.kv_len);
    row.start(p_.k.dim);
    for (std::int64_t key = begin; key < end; ++key) {
      const Place at = place_of(p_, r, key);
      // Scales and means of their own go into the bounds; one scale of all stays outside, as it does in the cache.
      const bool outside = tokens_ != nullptr && p_.k.partition == 0;
      const float* mean = p_.k.mean_of(at.page, m.head);
      row.add(p_.k.row(at.page, m.head, at.slot), p_.k.dtype, outside ? 1.0f : p_.k.scale_of(at.page, m.head, at.slot),
              mean);
    }
    row.store(out, dtype_);
    const auto n = static_cast<std::size_t>(this->at(m.request, m.head) + m.page);
    rows_[n] = out;
    if (options_.metric != Metric::kOam) return;
    std::vector<float> norms(static_cast<std::size_t>(end - begin));
    if (tokens_ != nullptr) {
      const float* kept = value_norms_.as<const float>() + r.pages[m.page] * value_norms_.strides[0];
      std::copy_n(kept + m.head * value_norms_.strides[1], end - begin, norms.data());
    } else {
      value_norms(p_, m.request, m.head, begin, end, norms.data());
    }
    float most = 0.0f;
    for (const float x : norms) most = x > most || x != x ? x : most;
    norms_[n] = most;
  }

  const Problem& p_;
  const PagesOptions& options_;
  const std::int64_t page_size_;
  TensorView stored_{}, stored_norms_{}, value_norms_{};
  const std::int32_t* tokens_ = nullptr;
  DType dtype_ = DType::kFloat32;
  float factor_ = 1.0f;
  std::int64_t row_bytes_ = 0;
  std::vector<std::int64_t> first_;
  std::vector<const std::byte*> rows_;
  std::vector<float> norms_;
  std::vector<std::byte> memory_;
};

// Jobs count in pages: [begin, end) are those that a query sees some token of.
class Pages {
 public:
  Pages(const Problem& problem, const TensorView& q, const PagesOptions& options, const KVCache* cache)
      : p_(problem),
        options_(options),
        page_size_(cache != nullptr ? problem.page_size : std::min(options.page_size, kFar)),
        bounds_(problem, options, cache, page_size_),
        stride_(host::stream_dim(2 * problem.q.dim)),
        lists_(q, problem.packed, problem.num_kv_heads) {}

  Selection run();

 private:
  struct Job : ListJob {
    std::int64_t first = 0, last = 0;  // tokens that the query sees
  };
  struct Scratch {
    std::vector<float> queries, factors, biases, row, scores, metric;
    std::vector<std::int32_t> chosen;
  };
  Scratch scratch() const;
  void make_jobs();
  // False if a bound is NaN.
  bool run_job(const Job& job, Scratch& s) const;
  bool score(const Job& job, Scratch& s) const;

  const Problem& p_;
  const PagesOptions& options_;
  const std::int64_t page_size_;
  const Bounds bounds_;
  const std::int64_t stride_;
  TokenLists lists_;
  std::vector<Job> jobs_;
};

void Pages::make_jobs() {
  for (std::size_t b = 0; b < p_.requests.size(); ++b) {
    const Request& r = p_.requests[b];
    const Visibility seen(p_, static_cast<std::int64_t>(b), 0);
    for (std::int64_t i = 0; i < r.q_len; ++i) {
      const auto [first, last] = seen.allowed_keys(i);
      for (std::int64_t h = 0; h < p_.num_kv_heads; ++h) {
        Job job;
        job.request = static_cast<std::int32_t>(b);
        job.query = static_cast<std::int32_t>(i);
        job.kv_head = static_cast<std::int32_t>(h);
        job.row = lists_.row(r, static_cast<std::int64_t>(b), i, h);
        job.first = std::min(first, last);
        job.last = last;
        job.begin = job.first / page_size_;
        job.end = job.first < last ? ceil_div(last, page_size_) : job.begin;
        const std::int64_t recent = std::min(options_.n_recent, job.last - job.first);
        job.middle = job.begin;  // a window may have passed the first tokens by
        if (options_.n_sink > job.first)
          job.middle = std::min(ceil_div(std::min(options_.n_sink, kFar), page_size_), job.end);
        job.recent = recent > 0 ? std::clamp((last - recent) / page_size_, job.middle, job.end) : job.end;
        const std::int64_t wanted = ceil_div(kept_of(options_.budget, job.last - job.first), page_size_);
        job.keep = std::min(job.seen(), std::max(wanted, job.seen() - job.contested()));
        jobs_.push_back(job);
      }
    }
  }
}

Pages::Scratch Pages::scratch() const {
  Scratch s;
  const auto rows = static_cast<std::size_t>((p_.group() + 3) / 4 * 4);
  s.queries.resize(rows * static_cast<std::size_t>(stride_));
  s.factors.assign(rows, std::fabs(static_cast<float>(p_.scale)) * bounds_.factor());
  s.biases.assign(rows, 0.0f);
  s.row.resize(static_cast<std::size_t>(p_.q.dim));
  s.scores.resize(host::kStreamRows * host::kStreamKeys);
  return s;
}

bool Pages::score(const Job& job, Scratch& s) const {
  const std::int64_t group = p_.group(), dim = p_.q.dim;
  const Request& r = p_.requests[static_cast<std::size_t>(job.request)];
  const float sign = p_.scale < 0.0f ? -1.0f : 1.0f;
  for (std::int64_t row = 0; row < group; ++row) {
    read_query(p_, r, job.query, job.kv_head * group + row, s.row.data());
    float* out = s.queries.data() + row * stride_;
    for (std::int64_t i = 0; i < dim; ++i) {
      const float x = s.row[static_cast<std::size_t>(i)] * sign;
      out[i] = x < 0.0f ? 0.0f : x;  // a NaN stays
      out[dim + i] = x > 0.0f ? 0.0f : x;
    }
  }
  const auto& kernels = host::select_kernels();
  s.metric.resize(static_cast<std::size_t>(job.contested()) + 16);
  const std::byte* const* rows = bounds_.rows(job.request, job.kv_head);
  const std::byte* four[host::kStreamKeys + 4];
  bool good = true;
  for (std::int64_t page = job.middle; page < job.recent; page += host::kStreamKeys) {
    const int count = static_cast<int>(std::min<std::int64_t>(host::kStreamKeys, job.recent - page));
    std::copy_n(rows + page, count, four);
    std::fill_n(four + count, 4, four[count - 1]);
    const KeyRows keys{.rows = four, .count = count, .dtype = bounds_.dtype(), .dim = 2 * dim};
    for (std::int64_t row = 0; row < group; row += host::kStreamRows) {
      const QueryRows queries{.queries = s.queries.data() + row * stride_,
                              .rows = std::min<std::int64_t>(group - row, host::kStreamRows)};
      raw_scores(queries, keys, s.scores.data());
      const host::RawScores block{.scores = s.scores.data(),
                                  .rows = queries.rows,
                                  .count = count,
                                  .factor = s.factors.data() + row,
                                  .bias = s.biases.data() + row,
                                  .softcap = static_cast<float>(p_.softcap)};
      good &= kernels.reduce(block, row == 0, s.metric.data() + (page - job.middle));
    }
  }
  if (options_.metric == Metric::kOam) {
    const host::ValueTerm term = value_term(options_.beta, options_.norm, options_.epsilon);
    const float* norms = bounds_.norms(job.request, job.kv_head) + job.middle;
    good &= kernels.add_terms(norms, job.contested(), term, s.metric.data());
  }
  return good;
}

bool Pages::run_job(const Job& job, Scratch& s) const {
  static thread_local host::Workspace workspace;
  s.chosen.resize(static_cast<std::size_t>(job.open()));
  if (job.open() == job.contested()) {
    for (std::int64_t i = 0; i < job.open(); ++i) {
      s.chosen[static_cast<std::size_t>(i)] = static_cast<std::int32_t>(job.middle + i);
    }
  } else if (job.open() > 0) {
    if (!score(job, s)) return false;
    std::byte* scratch = workspace.reserve(host::top_k_bytes(job.contested()));
    if (!host::select_kernels().top_k(s.metric.data(), job.contested(), job.open(),
                                      static_cast<std::int32_t>(job.middle), s.chosen.data(), scratch)) {
      return false;
    }
  }
  std::int32_t* const list = lists_.list(job.row);
  std::int32_t* out = list;
  const auto keep = [&](std::int64_t page) {
    const std::int64_t end = std::min((page + 1) * page_size_, job.last);
    for (std::int64_t j = std::max(page * page_size_, job.first); j < end; ++j) *out++ = static_cast<std::int32_t>(j);
  };
  for (std::int64_t page = job.begin; page < job.middle; ++page) keep(page);
  for (const std::int32_t page : s.chosen) keep(page);
  for (std::int64_t page = job.recent; page < job.end; ++page) keep(page);
  lists_.set_length(job.row, out - list);
  return true;
}

Selection Pages::run() {
  make_jobs();
  std::int64_t capacity = 0;
  double seen = 0.0, work = 0.0;
  for (const Job& job : jobs_) {
    capacity = std::max(capacity, std::min(job.keep * page_size_, job.last - job.first));
    seen += static_cast<double>(job.last - job.first);
    work += static_cast<double>(2 * job.contested() * p_.group() * p_.q.dim);
  }
  lists_.allocate(capacity, seen);
  std::vector<std::uint8_t> bad(jobs_.size(), 0);
  for_items(
      static_cast<std::int64_t>(jobs_.size()), work, [&] { return scratch(); },
      [&](Scratch& s, std::int64_t n) {
        bad[static_cast<std::size_t>(n)] = run_job(jobs_[static_cast<std::size_t>(n)], s) ? 0 : 1;
      });
  for (std::size_t n = 0; n < jobs_.size(); ++n) {
    const Job& job = jobs_[n];
    if (bad[n] != 0) {
      const bool query = query_has_nan(p_, job.request, job.query, job.kv_head);
      check::fail(ErrorCode::kValue, query ? "q" : "k",
                  check::text("a page's bound is NaN for request ", job.request, ", query ", job.query, ", KV head ",
                              job.kv_head, "; allowed are bounds that can be ranked"));
    }
  }
  return lists_.selection();
}

void check_options(const Problem& problem, const PagesOptions& options) {
  check_call(problem);
  check_budget(options.budget);
  check_always(options.budget, options.n_sink, options.n_recent);
  check_value_term(options.beta, options.epsilon);
  check_token_norm(options.norm);
  if (options.metric == Metric::kLoo) {
    check::fail(ErrorCode::kValue, "metric", "loo has no bound by pages; allowed are qk, oam");
  }
}

}  // namespace

Selection pages(const AttentionParams& call, const PagesOptions& options) {
  const Problem problem = problem_of(call, false);
  check_options(problem, options);
  check::at_least("page_size", options.page_size, 1);
  return Pages(problem, call.q, options, nullptr).run();
}

Selection pages(const DecodeParams& call, const PagesOptions& options) {
  Problem problem = problem_of(call, false);
  check_options(problem, options);
  if (!call.cache->config().page_bounds) {
    check::fail(ErrorCode::kValue, "cache", "made without page_bounds; allowed is a cache that keeps them");
  }
  if (options.page_size != 0 && options.page_size != problem.page_size) {
    check::fail(ErrorCode::kValue, "page_size",
                check::text(options.page_size, "; allowed is ", problem.page_size, ", the cache's own"));
  }
  set_query_scale(call, problem);
  return Pages(problem, call.q, options, call.cache).run();
}

}  // namespace heddle::select
