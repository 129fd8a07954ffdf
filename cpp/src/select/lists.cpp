#include "select/lists.h"

#include <algorithm>
#include <cmath>
#include <utility>

#include "core/check.h"
#include "host/select_kernels.h"
#include "host/workspace.h"

namespace heddle::select {

TokenLists::TokenLists(const TensorView& q, bool packed, std::int64_t heads)
    : packed_(packed), per_query_(packed || q.shape[1] != 1), heads_(heads) {
  batch_ = q.shape[0];
  queries_ = packed ? 1 : q.shape[1];
  rows_ = batch_ * queries_ * heads;
}

void TokenLists::allocate(std::span<const ListJob> jobs) {
  std::int64_t capacity = 0;
  double seen = 0.0;
  for (const ListJob& job : jobs) {
    capacity = std::max(capacity, job.keep);
    seen += static_cast<double>(job.seen());
  }
  allocate(capacity, seen);
}

void TokenLists::allocate(std::int64_t capacity, double seen) {
  capacity_ = capacity;
  seen_ = seen;
  memory_ = std::make_shared_for_overwrite<std::int32_t[]>(static_cast<std::size_t>(rows_ * (capacity + 1) + 1));
  lengths_ = memory_.get();
  indices_ = lengths_ + rows_;
  std::fill_n(lengths_, rows_, -1);  // not made yet
}

void TokenLists::set_length(std::int64_t row, std::int64_t length) const {
  lengths_[row] = static_cast<std::int32_t>(length);
  std::fill(list(row) + length, list(row) + capacity_, -1);
}

bool TokenLists::write(const ListJob& job, const float* metric) const {
  static thread_local host::Workspace workspace;
  std::int32_t* out = list(job.row);
  const auto keep = [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t j = begin; j < end; ++j) *out++ = static_cast<std::int32_t>(j);
  };
  keep(job.begin, job.middle);
  if (job.open() == job.contested()) {
    keep(job.middle, job.recent);
  } else if (job.open() > 0) {
    std::byte* scratch = workspace.reserve(host::top_k_bytes(job.contested()));
    const auto first = static_cast<std::int32_t>(job.middle);
    if (!host::select_kernels().top_k(metric, job.contested(), job.open(), first, out, scratch)) return false;
    out += job.open();
  }
  keep(job.recent, job.end);
  set_length(job.row, job.keep);
  return true;
}

Selection TokenLists::selection() const {
  double kept = 0.0;
  for (std::int64_t row = 0; row < rows_; ++row) {
    if (lengths_[row] < 0) set_length(row, 0);  // queries of no request
    kept += static_cast<double>(lengths_[row]);
  }
  TensorView indices, lengths;
  if (!packed_ && per_query_) {
    indices = TensorView(indices_, DType::kInt32, {batch_, queries_, heads_, capacity_});
    lengths = TensorView(lengths_, DType::kInt32, {batch_, queries_, heads_});
  } else {
    indices = TensorView(indices_, DType::kInt32, {batch_, heads_, capacity_});
    lengths = TensorView(lengths_, DType::kInt32, {batch_, heads_});
  }
  return Selection::tokens(indices, lengths, memory_, packed_).with_density(seen_ > 0.0 ? kept / seen_ : 1.0);
}

Metric metric_from_string(std::string_view name) {
  if (name == "qk") return Metric::kQk;
  if (name == "oam") return Metric::kOam;
  if (name == "loo") return Metric::kLoo;
  check::fail(ErrorCode::kValue, "metric", check::text("'", name, "' does not exist; allowed are qk, oam, loo"));
}

Norm norm_from_string(std::string_view name) {
  if (name == "clipped") return Norm::kClipped;
  if (name == "log") return Norm::kLog;
  if (name == "zscore") return Norm::kZScore;
  check::fail(ErrorCode::kValue, "norm", check::text("'", name, "' does not exist; allowed are clipped, log, zscore"));
}

void check_budget(const Budget& budget, std::string_view argument) {
  if (budget.count != 0 && budget.fraction != 0.0) {
    check::fail(ErrorCode::kValue, argument, "a count and a fraction; allowed is one of them");
  }
  if (budget.fraction != 0.0) {
    if (!(budget.fraction > 0.0 && budget.fraction <= 1.0)) {
      check::fail(ErrorCode::kValue, argument,
                  check::text(budget.fraction, "; allowed are counts of 1 and above, and fractions above 0 up to 1"));
    }
  } else if (budget.count < 1) {
    check::fail(ErrorCode::kValue, argument,
                check::text(budget.count, "; allowed are counts of 1 and above, and fractions above 0 up to 1"));
  }
}

void check_always(const Budget& budget, std::int64_t n_sink, std::int64_t n_recent) {
  check::at_least("n_sink", n_sink, 0);
  check::at_least("n_recent", n_recent, 0);
  if (budget.count > 0 && (n_sink > budget.count || n_recent > budget.count - n_sink)) {
    check::fail(ErrorCode::kValue, "budget",
                check::text(budget.count, "; allowed are ", n_sink, " + ", n_recent,
                            ", the first and last that are always kept, and above"));
  }
}

void check_value_term(double beta, double epsilon) {
  check::finite("beta", beta);
  check::finite("epsilon", epsilon);
  if (!(epsilon > 0.0))
    check::fail(ErrorCode::kValue, "epsilon", check::text(epsilon, "; allowed are numbers above 0"));
}

void check_token_norm(Norm norm) {
  if (norm != Norm::kZScore) return;
  check::fail(ErrorCode::kValue, "norm", "zscore compares blocks; allowed for tokens and pages are clipped, log");
}

std::int64_t kept_of(const Budget& budget, std::int64_t seen) {
  if (budget.count > 0) return std::min(budget.count, seen);
  return std::min(seen, static_cast<std::int64_t>(std::ceil(budget.fraction * static_cast<double>(seen))));
}

void set_budget(const Budget& budget, std::int64_t n_sink, std::int64_t n_recent, ListJob& job) {
  job.middle = std::clamp(n_sink, job.begin, job.end);
  job.recent = std::clamp(job.end - std::min(n_recent, job.seen()), job.middle, job.end);
  job.keep = std::max(kept_of(budget, job.seen()), job.seen() - job.contested());
}

void check_call(const Problem& problem) {
  if (problem.device.type != DeviceType::kCpu) {
    check::fail(ErrorCode::kUnsupported, "q",
                check::text("on ", to_string(problem.device), "; selection at run time is offered on cpu only"));
  }
  if (!std::holds_alternative<std::monostate>(problem.selection->kind())) {
    check::fail(ErrorCode::kValue, "selection", "given; allowed is none in a call that a selection is made for");
  }
  for (const auto& [argument, rows] :
       {std::pair("q", &problem.q), std::pair("k", &problem.k), std::pair("v", &problem.v)}) {
    if (rows->dtype != DType::kFloat64) continue;
    check::fail(
        ErrorCode::kDType, argument,
        "dtype float64; allowed for selection at run time are float32, float16, bfloat16 and quantized tensors");
  }
  if (problem.q.mean != nullptr) {
    check::fail(ErrorCode::kUnsupported, "q", "smoothed queries; selection at run time takes those without a mean");
  }
}

}  // namespace heddle::select
