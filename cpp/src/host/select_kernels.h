// What run-time selection computes, beyond the scores of stream_kernels.h: metrics of tokens, and the exact largest k
// of them. Compiled once per instruction set (host/kernels/select.cpp).
#pragma once

#include <cstddef>
#include <cstdint>

#include "heddle/tensor.h"
#include "host/tile_kernels.h"

namespace heddle::host {

// A block of raw scores, rows kStreamKeys apart, and what makes them scores: factor[row] * raw * key_scale[key] +
// bias[row], then softcap.
struct RawScores {
  const float* scores = nullptr;
  std::int64_t rows = 0;
  int count = 0;  // keys
  const float* factor = nullptr;
  const float* bias = nullptr;
  const float* key_scale = nullptr;  // [count], or null
  float softcap = 0.0f;
};

// beta * max(0, log norm), or beta * log(norm + epsilon) with `plain`.
struct ValueTerm {
  float beta = 0.0f;
  bool plain = false;
  float epsilon = 0.0f;
};

// Scratch of top_k for n scores: this many bytes, aligned to 64.
constexpr std::size_t top_k_bytes(std::int64_t n) { return (static_cast<std::size_t>(n) + 64) * 8; }

// The heads of an indexer's query, packed (TileKernels::pack_queries) and padded with zeros to a multiple of
// kIndexRows.
inline constexpr int kIndexRows = 96;  // a multiple of every product's rows
struct IndexQuery {
  const void* queries = nullptr;           // [rows padded][words]
  const std::int32_t* row_sums = nullptr;  // int8: [rows padded]
  const float* weights = nullptr;          // [rows]
  std::int64_t rows = 0, words = 0;
};

struct SelectKernels {
  // out[0 .. kTileKeys) = sum over the rows of weight * max(0, q . k) for a packed tile of keys; a NaN stays. Threads
  // call TileKernels::begin_thread before and end_thread after.
  void (*index_tile)(const IndexQuery& query, Math math, const void* keys, float* out) = nullptr;
  // metric[key] = the maximum over the rows (and over what is there, unless `first`). False if a score is NaN.
  bool (*reduce)(const RawScores& block, bool first, float* metric) = nullptr;
  // out[key] = the sum over the rows of weights[row] * max(0, score), added to what is there unless `first`; a NaN
  // stays.
  void (*index)(const RawScores& block, const float* weights, bool first, float* out) = nullptr;
  // out[row * stride + key] = score. False if one is NaN.
  bool (*finish)(const RawScores& block, float* out, std::int64_t stride) = nullptr;
  // metric[i] += the term of norms[i]. False if a sum is NaN.
  bool (*add_terms)(const float* norms, std::int64_t n, const ValueTerm& term, float* metric) = nullptr;
  // out[r] = |x - o[r]|^2 of float rows o[r * stride].
  void (*squared_distances)(const float* x, std::int64_t dim, const float* o, std::int64_t stride, std::int64_t rows,
                            float* out) = nullptr;
  // sums[r * stride + i] += weights[r] * x[i]
  void (*add_weighted)(const float* x, std::int64_t dim, const float* weights, std::int64_t stride, std::int64_t rows,
                       float* sums) = nullptr;
  // out[0 .. k): `base` + the positions of the k largest of x[0 .. n), ascending; of equal ones the first. Exact; -0 is
  // 0. 0 < k <= n. False, and nothing written, if one is NaN.
  bool (*top_k)(const float* x, std::int64_t n, std::int64_t k, std::int32_t base, std::int32_t* out,
                void* scratch) = nullptr;
};

const SelectKernels& select_kernels();  // of the current ISA

}  // namespace heddle::host
