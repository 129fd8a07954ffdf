// Block masks as run-time selectors make them: what a block row sees, what of it competes, and the mask's memory.
#pragma once

#include <cstdint>
#include <memory>
#include <utility>
#include <vector>

#include "core/integers.h"
#include "core/problem.h"
#include "heddle/select.h"
#include "select/lists.h"

namespace heddle::select {

class Blocks {
 public:
  // Checks the numbers.
  Blocks(const Problem& problem, std::int64_t block, std::int64_t n_first, std::int64_t n_last);

  std::int64_t block() const { return block_; }
  std::int64_t rows(std::int64_t request) const { return ceil_div(p_.requests[at(request)].q_len); }
  std::int64_t columns(std::int64_t request) const { return ceil_div(p_.requests[at(request)].kv_len); }
  std::int64_t ceil_div(std::int64_t n) const { return heddle::ceil_div(n, block_); }
  // Tokens of a block: [first, last).
  std::pair<std::int64_t, std::int64_t> queries(std::int64_t request, std::int64_t row) const;
  std::pair<std::int64_t, std::int64_t> keys(std::int64_t request, std::int64_t column) const;
  // The block of positions in which the row's first query stands, counted from the request's first key.
  std::int64_t position(std::int64_t request, std::int64_t row) const;

  // [begin, end) that the row sees; middle and recent are set, keep is what is always kept.
  ListJob job(std::int64_t request, std::int64_t row) const;
  // The columns [first, last) of the job's middle that hold the row's own positions: always kept too.
  std::pair<std::int64_t, std::int64_t> own(std::int64_t request, std::int64_t row, const ListJob& job) const;

  bool* mask_row(std::int64_t request, std::int64_t q_head, std::int64_t row) const;
  // Marks the ends and the row's own, and the best of the middle: `keep` blocks in all, or all. metric[column - middle]
  // is overwritten. False if one is NaN.
  bool choose(std::int64_t request, std::int64_t q_head, std::int64_t row, const ListJob& job, float* metric) const;
  void keep_always(std::int64_t request, std::int64_t q_head, std::int64_t row, const ListJob& job) const;

  Selection selection() const;  // with its density

 private:
  static std::size_t at(std::int64_t i) { return static_cast<std::size_t>(i); }

  const Problem& p_;
  const std::int64_t block_, n_first_, n_last_;
  std::int64_t max_rows_ = 0, max_columns_ = 0;
  std::shared_ptr<bool[]> mask_;
};

// out [stride][dim]: the mean over the stride-groups of rows [first, last) of their rows one after the other, in each
// group backwards if `reversed`; rows that a group lacks are 0. read(i, row) reads row i.
template <class Read>
void pool(std::int64_t first, std::int64_t last, std::int64_t stride, std::int64_t dim, bool reversed, Read&& read,
          float* row, float* out) {
  std::fill_n(out, stride * dim, 0.0f);
  for (std::int64_t i = first; i < last; ++i) {
    const std::int64_t slot = (i - first) % stride;
    float* to = out + (reversed ? stride - 1 - slot : slot) * dim;
    read(i, row);
    for (std::int64_t d = 0; d < dim; ++d) to[d] += row[d];
  }
  const float groups = static_cast<float>((last - first + stride - 1) / stride);
  for (std::int64_t i = 0; i < stride * dim; ++i) out[i] /= groups;
}

// Rows of floats times rows of floats: out[r][key - first] of rows [0, rows) and keys [first, last), `factor` times.
void multiply_rows(const float* queries, std::int64_t stride, std::int64_t rows, const float* keys, std::int64_t dim,
                   std::int64_t first, std::int64_t last, float factor, float* out, std::int64_t out_stride);

[[noreturn]] void fail_block(const Problem& problem, std::int64_t request, std::int64_t q_head, std::int64_t row,
                             std::int64_t block);
void check_stride(std::int64_t stride, std::int64_t block);

}  // namespace heddle::select
