// Scores of a KV head's query rows for runs of keys, as attention itself computes them: what run-time selection ranks.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "core/problem.h"
#include "host/select_kernels.h"
#include "host/stream_kernels.h"

namespace heddle::select {

// Query rows (floats, bf16 for bf16 keys, or int8 with the sum of each row), `stride` elements apart and in number
// padded to a multiple of 4, 1 and 2 aside.
struct QueryRows {
  const void* queries = nullptr;
  std::int64_t rows = 0, stride = 0;  // rows: at most kStreamRows; stride: the dimension, padded to 64
  host::Math math = host::Math::kFloat32;
  const std::int32_t* row_sums = nullptr;
};

// Rows of keys, at most kStreamKeys; 4 more pointers repeat the last one, or name keys that come next.
struct KeyRows {
  const std::byte* const* rows = nullptr;
  int count = 0, readable = 0;  // readable: of the pointers, to fetch ahead
  DType dtype = DType::kFloat32;
  std::int64_t dim = 0;
};

// out[row * kStreamKeys + key] = q . k as stored, without any factor. kStreamRows x kStreamKeys.
void raw_scores(const QueryRows& queries, const KeyRows& keys, float* out);

// Rows of one query for one KV head: its group's heads, by kStreamRows. Each thread has its own.
class KeyScores {
 public:
  static constexpr int kKeys = 1024;  // whose places are looked up at a time

  explicit KeyScores(const Problem& problem);

  // The query rows of (request, query, KV head); its heads are known as rows 0 .. group.
  void set_query(std::int64_t request, std::int64_t query, std::int64_t kv_head);

  // Calls fn(first row, block, key) for blocks of up to kStreamRows rows and kStreamKeys keys of [begin, end): raw
  // scores of the keys from `key` on, and what makes them scores.
  template <class Fn>
  void for_blocks(std::int64_t begin, std::int64_t end, Fn&& fn) {
    for (std::int64_t first = begin; first < end; first += kKeys) {
      const int keys = static_cast<int>(end - first < kKeys ? end - first : kKeys);
      locate(first, keys);
      for (int at = 0; at < keys; at += host::kStreamKeys) {
        for (std::int64_t row = 0; row < group_; row += host::kStreamRows) {
          fn(row, multiply(row, at, keys), first + at);
        }
      }
    }
  }

 private:
  void locate(std::int64_t first, int keys);
  host::RawScores multiply(std::int64_t row, int at, int keys);

  const Problem& p_;
  const std::int64_t group_, stride_;
  const host::Math math_;
  float factor_ = 1.0f;
  std::int64_t request_ = 0, kv_head_ = 0;
  std::vector<std::byte> queries_;  // [rows padded to 4][stride]
  std::vector<float> factors_, biases_, row_;
  std::vector<std::int8_t> quantized_;
  std::vector<std::int32_t> row_sums_;
  std::vector<const std::byte*> rows_;
  std::vector<float> key_scale_, scores_;
};

// Where key j of a request lies.
struct Place {
  std::int64_t page, slot;
};
inline Place place_of(const Problem& p, const Request& r, std::int64_t key) {
  if (p.page_size == 0) return {r.k_page, r.k_first + key};
  return {r.pages[key / p.page_size], key % p.page_size};
}

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
