// Scores of a KV head's query rows for runs of keys, as attention itself computes them: what run-time selection ranks.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "core/problem.h"
#include "host/select_kernels.h"
#include "host/stream_kernels.h"

namespace heddle::select {

// Rows of floats, stream_dim(dim) apart: at most kStreamRows, padded to a multiple of 4 (1 and 2 aside).
struct QueryRows {
  const float* queries = nullptr;
  std::int64_t rows = 0;
};

// Rows of keys, at most kStreamKeys; 4 more pointers repeat the last one.
struct KeyRows {
  const std::byte* const* rows = nullptr;
  int count = 0;
  DType dtype = DType::kFloat32;
  std::int64_t dim = 0;
};

// out[row * kStreamKeys + key] = q . k as stored, without any factor. kStreamRows x kStreamKeys.
void raw_scores(const QueryRows& queries, const KeyRows& keys, float* out);

// Scores of one query: the heads of a group for each of some KV heads, whose keys are read together in the order in
// which they lie. Each thread has its own.
class KeyScores {
 public:
  explicit KeyScores(const Problem& problem);

  // The rows of (request, query) for the KV heads [first, first + count); nothing to do if they are set already.
  void set_query(std::int64_t request, std::int64_t query, std::int64_t first, std::int64_t count);

  // Calls fn(KV head, row, block, key) for blocks of up to kStreamRows rows from `row` on of the head's group, and up
  // to kStreamKeys keys of [begin, end) from `key` on: raw scores, and what makes them scores.
  template <class Fn>
  void for_blocks(std::int64_t begin, std::int64_t end, Fn&& fn) {
    for (std::int64_t first = begin; first < end; first += kKeys) {
      const int left = static_cast<int>(end - first < kPlaces ? end - first : kPlaces),
                keys = left < kKeys ? left : kKeys;
      locate(first, keys, left);
      for (int at = 0; at < keys; at += host::kStreamKeys) {
        for (std::int64_t head = 0; head < num_heads_; head += heads_at_once_) {
          const std::int64_t last = head + heads_at_once_ < num_heads_ ? head + heads_at_once_ : num_heads_;
          for (std::int64_t row = 0; row < group_; row += host::kStreamRows) {
            multiply(head, last, row, at, left);
            const int to = keys - at < host::kStreamKeys ? keys : at + host::kStreamKeys;
            for (std::int64_t h = head; h < last; ++h)
              fn(first_head_ + h, row, block(head, h - head, row, at, to), first + at);
          }
        }
      }
    }
  }

 private:
  static constexpr int kKeys = 1024;                         // that are scored with one look at where they lie
  static constexpr int kPlaces = kKeys + host::kStreamKeys;  // looked up at a time: the next ones are fetched ahead
  static constexpr int kSegmentKeys = 16;                    // of a segment, where rows do not follow one another
  static constexpr int kMaxSegments = host::kStreamKeys / kSegmentKeys + 1;

  void locate(std::int64_t first, int keys, int places);
  int cut(int at, int count, host::StreamSegment* segments) const;
  void multiply(std::int64_t head, std::int64_t last, std::int64_t row, int at, int places);
  host::RawScores block(std::int64_t head, std::int64_t nth, std::int64_t row, int from, int to) const;
  std::int64_t row_of(std::int64_t head, std::int64_t row) const { return head * padded_group_ + row; }

  const Problem& p_;
  const std::int64_t group_, padded_group_, stride_, block_rows_, heads_at_once_;
  const host::Math math_;
  const bool scattered_;
  float factor_ = 1.0f;
  std::int64_t request_ = 0, query_ = 0, first_head_ = 0, num_heads_ = 0;  // no heads: none set
  std::vector<std::byte> queries_;                                         // [heads][padded group][stride]
  std::vector<float> factors_, biases_, row_;
  std::vector<std::int8_t> quantized_;
  std::vector<std::int32_t> row_sums_;
  std::vector<const std::byte*> rows_;  // of the first head
  std::vector<float> key_scale_;        // [heads][kKeys]
  std::vector<float> scores_;           // [heads at once][block rows][kStreamKeys]
  std::int64_t slot_ = 0;               // of the first of them, in its page
};

// Where key j of a request lies.
struct Place {
  std::int64_t page, slot;
};
inline Place place_of(const Problem& p, const Request& r, std::int64_t key) {
  if (p.page_size == 0) return {r.k_page, r.k_first + key};
  return {r.pages[key / p.page_size], key % p.page_size};
}

// Fetches a row: those of one head lie apart, where no processor looks ahead.
inline void fetch_row(const Rows& rows, std::int64_t page, std::int64_t head, std::int64_t slot) {
  const std::byte* row = rows.row(page, head, slot);
  const std::int64_t bytes = rows.dim * static_cast<std::int64_t>(size_of(rows.dtype));
  for (std::int64_t b = 0; b < bytes; b += 64) __builtin_prefetch(row + b);
}
inline constexpr std::int64_t kRowsAhead = 16;

// One row as floats, as it is meant: scaled, mean added. `out` has the row's dim.
void read_row(const Rows& rows, std::int64_t page, std::int64_t head, std::int64_t slot, float* out);
// The scale of a query row that the call quantizes.
float query_scale(const Problem& p, const std::byte* row);
// A query row as the call uses it: int8 caches quantize it on the way.
void read_query(const Problem& p, const Request& r, std::int64_t query, std::int64_t head, float* out);

// |v| of every key, float32 [KV head][keys of the request]: from the values themselves.
void value_norms(const Problem& p, std::int64_t request, std::int64_t kv_head, std::int64_t begin, std::int64_t end,
                 float* out);

inline host::ValueTerm value_term(double beta, Norm norm, double epsilon) {
  return {.beta = static_cast<float>(beta), .plain = norm == Norm::kLog, .epsilon = static_cast<float>(epsilon)};
}

// Whether the query row holds a NaN: whose fault a NaN score is.
bool query_has_nan(const Problem& p, std::int64_t request, std::int64_t query, std::int64_t kv_head);

}  // namespace heddle::select
