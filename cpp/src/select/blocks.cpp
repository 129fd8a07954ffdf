#include "select/blocks.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "core/check.h"
#include "host/select_kernels.h"
#include "host/stream_kernels.h"
#include "host/workspace.h"
#include "select/scores.h"
#include "select/visibility.h"

namespace heddle::select {

Blocks::Blocks(const Problem& problem, std::int64_t block, std::int64_t n_first, std::int64_t n_last)
    : p_(problem), block_(block), n_first_(n_first), n_last_(n_last) {
  constexpr std::int64_t kMost = std::int64_t{1} << 30;
  if (block < 1 || block > kMost) {
    check::fail(ErrorCode::kValue, "block", check::text(block, "; allowed are 1 to ", kMost));
  }
  check::at_least("n_first", n_first, 0);
  check::at_least("n_last", n_last, 0);
  for (const Request& r : p_.requests) {
    max_rows_ = std::max(max_rows_, ceil_div(r.q_len));
    max_columns_ = std::max(max_columns_, ceil_div(r.kv_len));
  }
  const auto batch = static_cast<std::int64_t>(p_.requests.size());
  mask_ = std::make_shared<bool[]>(at(std::max<std::int64_t>(batch * p_.num_q_heads * max_rows_ * max_columns_, 1)));
}

std::pair<std::int64_t, std::int64_t> Blocks::queries(std::int64_t request, std::int64_t row) const {
  return {row * block_, std::min((row + 1) * block_, p_.requests[at(request)].q_len)};
}

std::pair<std::int64_t, std::int64_t> Blocks::keys(std::int64_t request, std::int64_t column) const {
  return {column * block_, std::min((column + 1) * block_, p_.requests[at(request)].kv_len)};
}

std::int64_t Blocks::position(std::int64_t request, std::int64_t row) const {
  const Request& r = p_.requests[at(request)];
  return std::max<std::int64_t>(0, row * block_ + r.kv_len - r.q_len) / block_;
}

ListJob Blocks::job(std::int64_t request, std::int64_t row) const {
  const auto [first, last] = queries(request, row);
  const Visibility seen(p_, request, 0);
  const auto [begin, unused] = seen.allowed_keys(first);
  const auto [unused_too, end] = seen.allowed_keys(last - 1);
  ListJob job;
  job.request = static_cast<std::int32_t>(request);
  if (begin < end) {
    job.begin = begin / block_;
    job.end = ceil_div(end);
  }
  job.middle = std::clamp(n_first_, job.begin, job.end);
  job.recent = std::clamp(job.end - std::min(n_last_, job.seen()), job.middle, job.end);
  const auto [own_first, own_last] = own(request, row, job);
  job.keep = job.seen() - job.contested() + (own_last - own_first);
  return job;
}

std::pair<std::int64_t, std::int64_t> Blocks::own(std::int64_t request, std::int64_t row, const ListJob& job) const {
  const Request& r = p_.requests[at(request)];
  const auto [first, last] = queries(request, row);
  const std::int64_t offset = r.kv_len - r.q_len;
  if (last - 1 + offset < 0) return {job.middle, job.middle};
  const std::int64_t begin = std::max<std::int64_t>(0, first + offset) / block_, end = (last - 1 + offset) / block_ + 1;
  const std::int64_t from = std::clamp(begin, job.middle, job.recent);
  return {from, std::clamp(end, from, job.recent)};
}

bool* Blocks::mask_row(std::int64_t request, std::int64_t q_head, std::int64_t row) const {
  return mask_.get() + ((request * p_.num_q_heads + q_head) * max_rows_ + row) * max_columns_;
}

void Blocks::keep_always(std::int64_t request, std::int64_t q_head, std::int64_t row, const ListJob& job) const {
  bool* mask = mask_row(request, q_head, row);
  const auto [first, last] = own(request, row, job);
  std::fill(mask + job.begin, mask + job.middle, true);
  std::fill(mask + first, mask + last, true);
  std::fill(mask + job.recent, mask + job.end, true);
}

bool Blocks::choose(std::int64_t request, std::int64_t q_head, std::int64_t row, const ListJob& job,
                    float* metric) const {
  static thread_local host::Workspace workspace;
  static thread_local std::vector<std::int32_t> chosen;
  bool* mask = mask_row(request, q_head, row);
  keep_always(request, q_head, row, job);
  if (job.open() >= job.contested()) {
    std::fill(mask + job.begin, mask + job.end, true);
    return true;
  }
  if (job.open() == 0) return true;
  const auto [first, last] = own(request, row, job);
  for (std::int64_t j = first; j < last; ++j) {
    if (metric[j - job.middle] != metric[j - job.middle]) return false;
    metric[j - job.middle] = std::numeric_limits<float>::infinity();
  }
  chosen.resize(at(job.open()));
  std::byte* scratch = workspace.reserve(host::top_k_bytes(job.contested()));
  if (!host::select_kernels().top_k(metric, job.contested(), job.open(), static_cast<std::int32_t>(job.middle),
                                    chosen.data(), scratch)) {
    return false;
  }
  for (const std::int32_t j : chosen) mask[j] = true;
  return true;
}

Selection Blocks::selection() const {
  double kept = 0.0, seen = 0.0;
  for (std::int64_t b = 0; b < static_cast<std::int64_t>(p_.requests.size()); ++b) {
    const Visibility visibility(p_, b, 0);
    for (std::int64_t row = 0; row < rows(b); ++row) {
      const auto [q0, q1] = queries(b, row);
      for (std::int64_t column = 0; column < columns(b); ++column) {
        const auto [k0, k1] = keys(b, column);
        std::int64_t pairs = 0;
        switch (visibility.classify(q0, q1, k0, k1)) {
          case TileKind::kNone: continue;
          case TileKind::kFull: pairs = (q1 - q0) * (k1 - k0); break;
          case TileKind::kPartial:
            for (std::int64_t i = q0; i < q1; ++i) {
              const auto [begin, end] = visibility.allowed_keys(i);
              pairs += std::max<std::int64_t>(0, std::min(end, k1) - std::max(begin, k0));
            }
        }
        for (std::int64_t h = 0; h < p_.num_q_heads; ++h) {
          kept += mask_row(b, h, row)[column] ? static_cast<double>(pairs) : 0.0;
        }
        seen += static_cast<double>(pairs * p_.num_q_heads);
      }
    }
  }
  const TensorView mask(mask_.get(), DType::kBool,
                        {static_cast<std::int64_t>(p_.requests.size()), p_.num_q_heads, max_rows_, max_columns_});
  return Selection::block_mask(mask, block_, block_, mask_).with_density(seen > 0.0 ? kept / seen : 1.0);
}

void multiply_rows(const float* queries, std::int64_t stride, std::int64_t rows, const float* keys, std::int64_t dim,
                   std::int64_t first, std::int64_t last, float factor, float* out, std::int64_t out_stride) {
  alignas(64) float scores[host::kStreamRows * host::kStreamKeys];
  const std::byte* at[host::kStreamKeys + 4];
  for (std::int64_t key = first; key < last; key += host::kStreamKeys) {
    const int count = static_cast<int>(std::min<std::int64_t>(host::kStreamKeys, last - key));
    for (int i = 0; i < count; ++i) at[i] = reinterpret_cast<const std::byte*>(keys + (key + i) * dim);
    std::fill_n(at + count, 4, at[count - 1]);
    const KeyRows rows_of_keys{.rows = at, .count = count, .dtype = DType::kFloat32, .dim = dim};
    for (std::int64_t row = 0; row < rows; row += host::kStreamRows) {
      const QueryRows part{.queries = queries + row * stride,
                           .rows = std::min<std::int64_t>(host::kStreamRows, rows - row)};
      raw_scores(part, rows_of_keys, scores);
      for (std::int64_t r = 0; r < part.rows; ++r) {
        for (int i = 0; i < count; ++i) {
          out[(row + r) * out_stride + key - first + i] = scores[r * host::kStreamKeys + i] * factor;
        }
      }
    }
  }
}

constexpr float kLargest = std::numeric_limits<float>::max();

// Finds out whose fault it is.
void fail_block(const Problem& problem, std::int64_t request, std::int64_t q_head, std::int64_t row,
                std::int64_t block) {
  const std::int64_t last = std::min((row + 1) * block, problem.requests[static_cast<std::size_t>(request)].q_len);
  bool query = false;
  for (std::int64_t i = row * block; i < last && !query; ++i) {
    query = query_has_nan(problem, request, i, q_head / problem.group());
  }
  bool key = false;
  std::vector<float> buffer(static_cast<std::size_t>(problem.k.dim));
  const Request& r = problem.requests[static_cast<std::size_t>(request)];
  for (std::int64_t j = 0; j < r.kv_len && !query && !key; ++j) {
    const Place at = place_of(problem, r, j);
    read_row(problem.k, at.page, q_head / problem.group(), at.slot, buffer.data());
    key = std::any_of(buffer.begin(), buffer.end(), [](float x) { return !(std::fabs(x) <= kLargest); });
  }
  check::fail(ErrorCode::kValue,
              query ? "q"
              : key ? "k"
                    : "v",
              check::text("a score is NaN in block row ", row, " of request ", request, ", query head ", q_head,
                          "; allowed are scores that can be ranked"));
}

void check_stride(std::int64_t stride, std::int64_t block) {
  if (stride < 1 || block % stride != 0) {
    check::fail(ErrorCode::kValue, "stride", check::text(stride, "; allowed are the divisors of block, ", block));
  }
}

}  // namespace heddle::select
