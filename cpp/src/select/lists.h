// Token lists as run-time selectors make them: which (request, query, KV head) get one, and the memory behind them.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <memory>
#include <span>
#include <string_view>
#include <vector>

#include "core/problem.h"
#include "core/threads.h"
#include "heddle/select.h"

namespace heddle::select {

// One list to make: `keep` of the keys [begin, end) that the query sees, of which [middle, recent) compete and the
// others are kept.
struct ListJob {
  std::int32_t request = 0, query = 0, kv_head = 0;
  std::int64_t row = 0;  // of the lists' memory
  std::int64_t begin = 0, end = 0, middle = 0, recent = 0, keep = 0;

  std::int64_t seen() const { return end - begin; }
  std::int64_t contested() const { return recent - middle; }
  std::int64_t open() const { return keep - (seen() - contested()); }  // places that they compete for
};

class TokenLists {
 public:
  // The shape of the lists of a call, from its q: [B, heads, n] for one query a request, [B, Sq, heads, n],
  // [total_q, heads, n].
  TokenLists(const TensorView& q, bool packed, std::int64_t heads);

  std::int64_t row(const Request& request, std::int64_t b, std::int64_t query, std::int64_t head) const {
    return (packed_ ? request.q_first + query : b * queries_ + query) * heads_ + head;
  }
  // All lists empty, with room for the longest of the jobs'.
  void allocate(std::span<const ListJob> jobs);
  void allocate(std::int64_t capacity, double seen);  // `seen`: keys that the queries of all lists see
  std::int32_t* list(std::int64_t row) const { return indices_ + row * capacity_; }
  std::int64_t length(std::int64_t row) const { return lengths_[row]; }
  // After its entries are written: the rest becomes -1.
  void set_length(std::int64_t row, std::int64_t length) const;
  // The job's list, given the metric of the keys that compete. False if one of them is NaN.
  bool write(const ListJob& job, const float* metric) const;
  Selection selection() const;

 private:
  bool packed_, per_query_;
  std::int64_t rows_ = 0, batch_ = 0, queries_ = 0, heads_ = 0, capacity_ = 0;
  double seen_ = 0.0;
  std::shared_ptr<std::int32_t[]> memory_;
  std::int32_t *indices_ = nullptr, *lengths_ = nullptr;
};

void check_budget(const Budget& budget, std::string_view argument = "budget");
// The always-kept counts fit the budget.
void check_always(const Budget& budget, std::int64_t n_sink, std::int64_t n_recent);
std::int64_t kept_of(const Budget& budget, std::int64_t seen);
// Fills middle, recent and keep of a job from what it sees.
void set_budget(const Budget& budget, std::int64_t n_sink, std::int64_t n_recent, ListJob& job);

void check_value_term(double beta, double epsilon);
void check_token_norm(Norm norm);  // one that a token has by itself

// What selectors do not run: tensors of other devices, a call that has a selection already.
void check_call(const Problem& problem);

inline constexpr std::int64_t kBatchFloats = std::int64_t{16} << 20;  // metrics that are kept at a time

// Calls run(first, last, floats) for batches of consecutive jobs, `together` of them indivisible, whose floats(job)
// fit in kBatchFloats (or a single one's do not). A batch also ends before a job of which ends(job) is true.
template <class Floats, class Ends, class Run>
void for_batches(std::size_t jobs, std::size_t together, Floats&& floats, Ends&& ends, Run&& run) {
  std::size_t first = 0;
  std::int64_t total = 0;
  for (std::size_t n = 0; n < jobs; n += together) {
    const std::int64_t need = floats(n) * static_cast<std::int64_t>(together);
    if (n > first && (ends(n) || total + need > kBatchFloats)) {
      run(first, n, total);
      first = n;
      total = 0;
    }
    total += need;
  }
  if (first < jobs) run(first, jobs, total);
}

inline constexpr auto stateless = [] { return 0; };

// Calls fn(state, i) for i in [0, n), each worker with a state of its own from make(). `work` in multiply-adds.
template <class Make, class Fn>
void for_items(std::int64_t n, double work, Make&& make, Fn&& fn) {
  constexpr double kWorkPerThread = 1 << 18;
  if (n == 0) return;
  const double most = static_cast<double>(std::min<std::int64_t>(n, num_threads()));
  const int threads = static_cast<int>(std::clamp(work / kWorkPerThread, 1.0, std::max(1.0, most)));
  std::atomic<std::int64_t> next{0};
  parallel(threads, [&](int) {
    auto state = make();
    for (std::int64_t i = next.fetch_add(1, std::memory_order_relaxed); i < n;
         i = next.fetch_add(1, std::memory_order_relaxed)) {
      fn(state, i);
    }
  });
}

}  // namespace heddle::select
