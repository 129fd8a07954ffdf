// Token selection at run time: scores of all keys that compete, a metric from them, and the exact largest k.
//
// Keys are read once, where they lie, for all query heads of a KV head; the metric of a token is one float, so what is
// ranked is small beside what was read. Limit: the bandwidth of reading K (and V for leave-one-out).
#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <string>
#include <vector>

#include "core/check.h"
#include "core/front.h"
#include "core/numeric.h"
#include "host/workspace.h"
#include "select/lists.h"
#include "select/norms.h"
#include "select/scores.h"
#include "select/visibility.h"

namespace heddle::select {
namespace {

constexpr std::int64_t kChunk = 1024;  // keys that are scored at a time

constexpr double kInfinity = std::numeric_limits<double>::infinity();

// One row of leave-one-out: the weights exp(s - top) of its tokens. p / (1 - p) of a token is its weight over that of
// all the others, and v - o is (1 - p) times v - (o without the token): for the largest both are summed without it, or
// they would be all rounding where it has nearly everything.
struct Softmax {
  double top = 0.0;
  double rest = 0.0;  // the weight of all but the largest, the sink's included
  double most = 0.0;  // of the largest
  std::int64_t largest = -1;

  double weight(float s) const { return std::exp(static_cast<double>(s) - top); }
};

Softmax softmax_of(const float* s, std::int64_t n, const float* sink) {
  Softmax x;
  x.largest = std::max_element(s, s + n) - s;
  x.top = std::max(static_cast<double>(s[x.largest]), sink == nullptr ? -kInfinity : *sink);
  x.most = x.weight(s[x.largest]);
  for (std::int64_t j = 0; j < n; ++j) {
    if (j != x.largest) x.rest += x.weight(s[j]);
  }
  if (sink != nullptr) x.rest += x.weight(*sink);
  return x;
}

// What leave-one-out knows of a list before it looks at its tokens.
struct Whole {
  std::vector<Softmax> rows;         // [group]
  std::vector<float> output, other;  // [group][Dv]: o, and o without the row's largest (not with a given o)
};

class Topk {
 public:
  Topk(const Problem& problem, const TensorView& q, const TopkOptions& options, const KVCache* cache)
      : p_(problem),
        options_(options),
        kernels_(host::select_kernels()),
        lists_(q, problem.packed, problem.num_kv_heads) {
    if (options.metric == Metric::kOam) norms_ = std::make_unique<Norms>(problem, options.value_norms, cache);
    make_jobs();
  }

  Selection run();

 private:
  void make_jobs();
  void run_batch(std::size_t first, std::size_t last, std::int64_t floats);
  // Keys of a query, for all its KV heads: `job` is the first one's, the others follow.
  struct Item {
    std::size_t job;
    std::int64_t begin, end;
  };
  // Metrics of the item's keys (leave-one-out: scores of every head of the groups) into the rows of its jobs.
  void score(KeyScores& scores, const Item& item, float* const* at, std::atomic<bool>* bad) const;
  // loo: the metric in place of the first head's scores.
  Whole whole(const ListJob& job, const float* all) const;
  bool leave_one_out(const ListJob& job, std::int64_t begin, std::int64_t end, const Whole& whole, float* all) const;
  [[noreturn]] void fail(const ListJob& job) const;

  bool loo() const { return options_.metric == Metric::kLoo; }
  // What is scored of a job: leave-one-out needs every probability.
  std::int64_t scored_begin(const ListJob& job) const { return loo() ? job.begin : job.middle; }
  std::int64_t scored_end(const ListJob& job) const { return loo() ? job.end : job.recent; }
  std::int64_t floats(const ListJob& job) const {
    return (scored_end(job) - scored_begin(job) + 16) * (loo() ? p_.group() : 1);
  }

  const Problem& p_;
  const TopkOptions& options_;
  const host::SelectKernels& kernels_;
  TokenLists lists_;
  std::unique_ptr<Norms> norms_;
  std::vector<ListJob> jobs_;
};

void Topk::make_jobs() {
  for (std::size_t b = 0; b < p_.requests.size(); ++b) {
    const Request& r = p_.requests[b];
    const Visibility seen(p_, static_cast<std::int64_t>(b), 0);
    for (std::int64_t i = 0; i < r.q_len; ++i) {
      const auto [begin, end] = seen.allowed_keys(i);
      for (std::int64_t h = 0; h < p_.num_kv_heads; ++h) {
        ListJob job{.request = static_cast<std::int32_t>(b),
                    .query = static_cast<std::int32_t>(i),
                    .kv_head = static_cast<std::int32_t>(h),
                    .row = lists_.row(r, static_cast<std::int64_t>(b), i, h),
                    .begin = std::min(begin, end),
                    .end = end};
        set_budget(options_.budget, options_.n_sink, options_.n_recent, job);
        jobs_.push_back(job);
      }
    }
  }
}

Selection Topk::run() {
  lists_.allocate(jobs_);
  const auto heads = static_cast<std::size_t>(p_.num_kv_heads);  // of a query, which are scored together
  for_batches(
      jobs_.size(), heads, [&](std::size_t n) { return floats(jobs_[n]); }, [](std::size_t) { return false; },
      [&](std::size_t first, std::size_t last, std::int64_t total) { run_batch(first, last, total); });
  return lists_.selection();
}

void Topk::run_batch(std::size_t first, std::size_t last, std::int64_t total) {
  static thread_local host::Workspace workspace;
  float* metrics = reinterpret_cast<float*>(workspace.reserve(static_cast<std::size_t>(total) * 4));
  std::vector<Item> items;
  std::vector<float*> at(last - first);
  std::vector<std::atomic<bool>> bad(last - first);
  double work = 0.0;
  for (std::size_t n = first; n < last; ++n) {
    const ListJob& job = jobs_[n];
    at[n - first] = metrics;
    metrics += floats(job);
    if (job.open() == job.contested()) continue;                      // keeps all: nothing to rank
    const std::int64_t end = job.kv_head == 0 ? scored_end(job) : 0;  // the other heads see the same keys
    for (std::int64_t k = scored_begin(job); k < end; k += kChunk) items.push_back({n, k, std::min(end, k + kChunk)});
    work += static_cast<double>(job.seen() * p_.group() * p_.k.dim);
  }
  const auto scorer = [&] { return KeyScores(p_); };
  const auto count = static_cast<std::int64_t>(items.size());
  for_items(count, work, scorer, [&](KeyScores& scores, std::int64_t i) {
    const Item& item = items[static_cast<std::size_t>(i)];
    score(scores, item, at.data() + (item.job - first), bad.data() + (item.job - first));
  });
  if (loo()) {
    std::vector<Whole> wholes(last - first);
    for_items(static_cast<std::int64_t>(last - first), work, stateless, [&](int, std::int64_t n) {
      const ListJob& job = jobs_[first + static_cast<std::size_t>(n)];
      if (job.open() < job.contested())
        wholes[static_cast<std::size_t>(n)] = whole(job, at[static_cast<std::size_t>(n)]);
    });
    for_items(count * p_.num_kv_heads, work, stateless, [&](int, std::int64_t i) {
      const Item& item = items[static_cast<std::size_t>(i / p_.num_kv_heads)];
      const std::size_t job = item.job + static_cast<std::size_t>(i % p_.num_kv_heads), n = job - first;
      if (!leave_one_out(jobs_[job], item.begin, item.end, wholes[n], at[n])) {
        bad[n].store(true, std::memory_order_relaxed);
      }
    });
  }
  for (std::size_t n = first; n < last; ++n) {
    if (bad[n - first].load(std::memory_order_relaxed)) fail(jobs_[n]);
  }
  for_items(static_cast<std::int64_t>(last - first), work, stateless, [&](int, std::int64_t n) {
    const ListJob& job = jobs_[first + static_cast<std::size_t>(n)];
    lists_.write(job, at[static_cast<std::size_t>(n)] + (job.middle - scored_begin(job)));
  });
  workspace.trim(static_cast<std::size_t>(kBatchFloats) * 4);
}

void Topk::score(KeyScores& scores, const Item& item, float* const* at, std::atomic<bool>* bad) const {
  const ListJob& job = jobs_[item.job];
  const std::int64_t begin = scored_begin(job), stride = job.seen() + 16;
  scores.set_query(job.request, job.query, 0, p_.num_kv_heads);
  const host::ValueTerm term = value_term(options_.beta, options_.norm, options_.epsilon);
  float buffer[host::kStreamKeys];
  scores.for_blocks(
      item.begin, item.end, [&](std::int64_t head, std::int64_t row, const host::RawScores& block, std::int64_t key) {
        float* out = at[head] + (key - begin);
        const std::int64_t end = key + block.count;
        bool good;
        if (loo()) {
          good = kernels_.finish(block, out + row * stride, stride);
        } else {
          // Where the head's next metrics will be written: a store that waits for its line holds up those of scores.
          for (int i = 0; i < block.count; i += 16) __builtin_prefetch(out + block.count + i, 1);
          good = kernels_.reduce(block, row == 0, out);
        }
        if (norms_ != nullptr && row + block.rows == p_.group()) {
          norms_->fetch(job.request, head, end, std::min(end + block.count, item.end));
          good &= kernels_.add_terms(norms_->get(job.request, head, key, end, buffer), block.count, term, out);
        }
        if (!good) bad[head].store(true, std::memory_order_relaxed);
      });
}

Whole Topk::whole(const ListJob& job, const float* all) const {
  const Request& r = p_.requests[static_cast<std::size_t>(job.request)];
  const std::int64_t group = p_.group(), dim = p_.v.dim, stride = job.seen() + 16;
  const auto rows = static_cast<std::size_t>(group), size = static_cast<std::size_t>(group * dim);
  Whole w;
  for (std::int64_t h = 0; h < group; ++h) {
    const float* sink = p_.sinks == nullptr ? nullptr : p_.sinks + job.kv_head * group + h;
    w.rows.push_back(softmax_of(all + h * stride, job.seen(), sink));
  }
  w.output.resize(size);
  if (const TensorView& o = options_.output; o.given()) {
    const std::int64_t slot = r.q_first + job.query, axis = o.rank - 3;
    for (std::int64_t h = 0; h < group; ++h) {
      const std::int64_t at = (o.rank == 4 ? r.q_page * o.strides[0] : 0) + slot * o.strides[axis] +
                              (job.kv_head * group + h) * o.strides[axis + 1];
      for (std::int64_t d = 0; d < dim; ++d) {
        w.output[static_cast<std::size_t>(h * dim + d)] = load_as_float(o.data, o.dtype, at + d);
      }
    }
    return w;
  }
  // Sums of 64 tokens in float32, of those in float64; the largest of each row left out.
  std::vector<double> sums(size);
  std::vector<float> part(size), value(static_cast<std::size_t>(dim)), weights(rows);
  for (std::int64_t first = 0; first < job.seen(); first += 64) {
    std::fill(part.begin(), part.end(), 0.0f);
    for (std::int64_t j = first; j < std::min(first + 64, job.seen()); ++j) {
      const Place at = place_of(p_, r, job.begin + j);
      read_row(p_.v, at.page, job.kv_head, at.slot, value.data());
      for (std::size_t h = 0; h < rows; ++h) {
        const float score = all[static_cast<std::int64_t>(h) * stride + j];
        weights[h] = j == w.rows[h].largest ? 0.0f : static_cast<float>(w.rows[h].weight(score));
      }
      kernels_.add_weighted(value.data(), dim, weights.data(), dim, group, part.data());
    }
    for (std::size_t i = 0; i < size; ++i) sums[i] += part[i];
  }
  w.other.resize(size);
  for (std::size_t h = 0; h < rows; ++h) {
    const Softmax& row = w.rows[h];
    const Place at = place_of(p_, r, job.begin + row.largest);
    read_row(p_.v, at.page, job.kv_head, at.slot, value.data());
    for (std::size_t d = 0; d < value.size(); ++d) {
      const std::size_t i = h * value.size() + d;
      w.other[i] = row.rest > 0.0 ? static_cast<float>(sums[i] / row.rest) : 0.0f;
      w.output[i] = static_cast<float>((sums[i] + row.most * value[d]) / (row.rest + row.most));
    }
  }
  return w;
}

bool Topk::leave_one_out(const ListJob& job, std::int64_t begin, std::int64_t end, const Whole& whole,
                         float* all) const {
  const Request& r = p_.requests[static_cast<std::size_t>(job.request)];
  const std::int64_t group = p_.group(), dim = p_.v.dim, stride = job.seen() + 16;
  std::vector<float> value(static_cast<std::size_t>(dim)), squares(static_cast<std::size_t>(group));
  bool good = true;
  for (std::int64_t key = begin; key < end; ++key) {
    const Place at = place_of(p_, r, key);
    read_row(p_.v, at.page, job.kv_head, at.slot, value.data());
    kernels_.squared_distances(value.data(), dim, whole.output.data(), dim, group, squares.data());
    double best = 0.0;
    for (std::int64_t h = 0; h < group; ++h) {
      const Softmax& row = whole.rows[static_cast<std::size_t>(h)];
      const double weight = row.weight(all[h * stride + key - job.begin]);
      float square = squares[static_cast<std::size_t>(h)];
      double factor = weight / (row.rest + (row.most - weight));  // p / (1 - p)
      if (key - job.begin == row.largest) {
        factor = row.most / row.rest;
        if (!whole.other.empty() && row.rest > 0.0) {
          factor = row.most / (row.rest + row.most);  // p, of v - (o without it)
          kernels_.squared_distances(value.data(), dim, whole.other.data() + h * dim, dim, 1, &square);
        }
      }
      const double distance = std::sqrt(static_cast<double>(square));
      // All there is: without it there is no output.
      const double moved = std::isinf(factor) ? factor : factor * distance;
      good &= distance == distance && moved == moved;
      best = std::max(best, moved);
    }
    all[key - job.begin] = static_cast<float>(best);
  }
  return good;
}

// Finds out whose fault it is.
void Topk::fail(const ListJob& job) const {
  const auto where = check::text("request ", job.request, ", query ", job.query, ", KV head ", job.kv_head);
  if (query_has_nan(p_, job.request, job.query, job.kv_head)) {
    check::fail(ErrorCode::kValue, "q", check::text("NaN in ", where, "; allowed are scores that can be ranked"));
  }
  KeyScores scores(p_);
  scores.set_query(job.request, job.query, job.kv_head, 1);
  std::int64_t bad = -1;
  float row[host::kStreamKeys * host::kStreamRows];
  scores.for_blocks(job.begin, job.end,
                    [&](std::int64_t, std::int64_t, const host::RawScores& block, std::int64_t key) {
                      if (bad >= 0 || kernels_.finish(block, row, host::kStreamKeys)) return;
                      for (int j = 0; j < block.count && bad < 0; ++j) {
                        for (std::int64_t r = 0; r < block.rows; ++r) {
                          if (row[r * host::kStreamKeys + j] != row[r * host::kStreamKeys + j]) bad = key + j;
                        }
                      }
                    });
  if (bad >= 0) {
    check::fail(
        ErrorCode::kValue, "k",
        check::text("the score of key ", bad, " is NaN for ", where, "; allowed are scores that can be ranked"));
  }
  check::fail(ErrorCode::kValue, options_.output.given() ? "output" : "v",
              check::text("NaN in ", loo() ? "the distances of values" : "the norms of values", " for ", where,
                          "; allowed are metrics that can be ranked"));
}

void check_options(const Problem& problem, const TensorView& q, const TopkOptions& options, bool cache) {
  check_call(problem);
  check_budget(options.budget);
  check_always(options.budget, options.n_sink, options.n_recent);
  check_value_term(options.beta, options.epsilon);
  check_token_norm(options.norm);
  if (const TensorView& norms = options.value_norms; norms.given()) {
    if (options.metric != Metric::kOam || cache) {
      check::fail(ErrorCode::kValue, "value_norms",
                  cache ? "given with a cache, which keeps its own" : "given; allowed with metric oam only");
    }
    check_value_norms(problem, norms);
  }
  if (const TensorView& o = options.output; o.given()) {
    if (options.metric != Metric::kLoo) {
      check::fail(ErrorCode::kValue, "output", "given; allowed with metric loo only");
    }
    check::given("output", o);
    check::dtype("output", o, {DType::kFloat32, DType::kFloat16, DType::kBFloat16});
    check::device("output", o, problem.device, "q");
    if (q.rank == 4) {
      check::shape("output", o, {q.shape[0], q.shape[1], q.shape[2], problem.v.dim});
    } else {
      check::shape("output", o, {q.shape[0], q.shape[1], problem.v.dim});
    }
    check::contiguous_rows("output", o);
  }
}

}  // namespace

Selection topk(const AttentionParams& call, const TopkOptions& options) {
  const Problem problem = problem_of(call, false);
  check_options(problem, call.q, options, false);
  return Topk(problem, call.q, options, nullptr).run();
}

Selection topk(const DecodeParams& call, const TopkOptions& options) {
  Problem problem = problem_of(call, false);
  check_options(problem, call.q, options, true);
  set_query_scale(call, problem);
  return Topk(problem, call.q, options, call.cache).run();
}

Selection top_scores(const TensorView& scores, const ScoreOptions& options) {
  check::given("scores", scores);
  check::rank("scores", scores, {3, 4});
  check::dtype("scores", scores, {DType::kFloat32});
  check::device("scores", scores, {}, "the host's selectors");
  check::contiguous_rows("scores", scores);
  check_budget(options.budget);
  check_always(options.budget, options.n_sink, options.n_recent);
  const int axis = scores.rank - 1;
  const std::int64_t n = scores.shape[axis], heads = scores.shape[axis - 1];
  check::axis_not_empty("scores", scores, axis - 1, "heads");
  if (n > std::numeric_limits<std::int32_t>::max()) {
    check::fail(ErrorCode::kShape, "scores", check::text("axis ", axis, " is ", n, "; allowed are int32 positions"));
  }
  const TensorView& lengths = options.lengths;
  if (lengths.given()) {
    check::given("lengths", lengths);
    check::dtype("lengths", lengths, {DType::kInt32});
    check::device("lengths", lengths, {}, "scores");
    if (axis == 2) {
      check::shape("lengths", lengths, {scores.shape[0], scores.shape[1]});
    } else {
      check::shape("lengths", lengths, {scores.shape[0], scores.shape[1], scores.shape[2]});
    }
  }
  // As of a call with these queries.
  TensorView q(nullptr, DType::kFloat32, {scores.shape[0], axis == 3 ? scores.shape[1] : 1, heads, 1});
  const std::int64_t queries = q.shape[1], rows = scores.shape[0] * queries * heads;
  TokenLists lists(q, false, heads);
  std::vector<ListJob> jobs;
  std::vector<const float*> at;
  double seen = 0.0;
  for (std::int64_t row = 0; row < rows; ++row) {
    const std::int64_t b = row / heads / queries, i = row / heads % queries, h = row % heads;
    const auto offset = [&](const TensorView& t) {
      return b * t.strides[0] + (axis == 3 ? i * t.strides[1] : 0) + h * t.strides[axis - 1];
    };
    ListJob job{.request = static_cast<std::int32_t>(b),
                .query = static_cast<std::int32_t>(i),
                .kv_head = static_cast<std::int32_t>(h),
                .row = row,
                .end = n};
    if (lengths.given()) job.end = lengths.as<const std::int32_t>()[offset(lengths)];
    if (job.end < 0 || job.end > n) {
      check::fail(ErrorCode::kValue, "lengths",
                  check::text(job.end, "; allowed are 0 to ", n, ", the last axis of scores"));
    }
    set_budget(options.budget, options.n_sink, options.n_recent, job);
    jobs.push_back(job);
    at.push_back(scores.as<const float>() + offset(scores));
    seen += static_cast<double>(job.seen());
  }
  lists.allocate(jobs);
  std::vector<std::uint8_t> bad(jobs.size(), 0);
  for_items(rows, seen, stateless, [&](int, std::int64_t i) {
    const auto row = static_cast<std::size_t>(i);
    bad[row] = lists.write(jobs[row], at[row] + jobs[row].middle) ? 0 : 1;
  });
  for (std::size_t row = 0; row < bad.size(); ++row) {
    if (bad[row] == 0) continue;
    std::int64_t j = jobs[row].middle;
    while (at[row][j] == at[row][j]) ++j;
    check::fail(ErrorCode::kValue, "scores",
                check::text("NaN at ", j, " of list ", row, "; allowed are scores that can be ranked"));
  }
  return lists.selection();
}

}  // namespace heddle::select
