#include "select/scores.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "host/quantize_kernels.h"
#include "host/tile_kernels.h"

namespace heddle::select {
namespace {

std::int64_t padded(std::int64_t dim) { return (dim + 63) / 64 * 64; }

// What the stream kernels multiply natively, exactly.
host::Math math_of(const Problem& p) {
  if (!host::tile_kernels().native_words) return host::Math::kFloat32;
  const bool integers = p.quantize_q || p.q.dtype == DType::kInt8;
  if (integers && p.k.dtype == DType::kInt8) return host::Math::kInt8;
  const bool halves = p.q.dtype == DType::kBFloat16 && p.k.dtype == DType::kBFloat16;
  return halves ? host::Math::kBFloat16 : host::Math::kFloat32;
}

}  // namespace

float query_scale(const Problem& p, const std::byte* row) {
  if (p.q_static_scale > 0.0f) return p.q_static_scale;
  const std::uint32_t bits = host::quantize_kernels().max_abs_bits(row, p.q.dtype, nullptr, p.q.dim);
  float largest;
  std::memcpy(&largest, &bits, 4);
  return largest / 127.0f;
}

KeyScores::KeyScores(const Problem& problem)
    : p_(problem), group_(problem.group()), stride_(padded(problem.q.dim)), math_(math_of(problem)) {
  if (p_.k.scale != nullptr && p_.k.partition == 0) factor_ = p_.k.scale[0];
  const auto rows = static_cast<std::size_t>((group_ + 3) / 4 * 4);
  queries_.resize(rows * static_cast<std::size_t>(stride_) * 4);
  factors_.resize(rows);
  biases_.resize(rows);
  row_sums_.resize(rows);
  row_.resize(static_cast<std::size_t>(stride_));
  quantized_.resize(static_cast<std::size_t>(stride_));
  rows_.resize(kKeys + 4);
  key_scale_.resize(kKeys);
  scores_.resize(host::kStreamRows * host::kStreamKeys);
}

void KeyScores::set_query(std::int64_t request, std::int64_t query, std::int64_t kv_head) {
  const auto& tile = host::tile_kernels();
  const Request& r = p_.requests[static_cast<std::size_t>(request)];
  request_ = request;
  kv_head_ = kv_head;
  const std::int64_t dim = p_.q.dim, slot = r.q_first + query;
  const float* mean = r.kv_len > 0 ? p_.k.mean_of(place_of(p_, r, 0).page, kv_head) : nullptr;
  std::fill(queries_.begin(), queries_.end(), std::byte{0});
  std::fill(row_sums_.begin(), row_sums_.end(), 0);
  for (std::int64_t row = 0; row < group_; ++row) {
    const std::int64_t head = kv_head * group_ + row;
    const std::byte* source = p_.q.row(r.q_page, head, slot);
    DType dtype = p_.q.dtype;
    float scale = p_.q.scale_of(r.q_page, head, slot);
    if (p_.quantize_q) {
      scale = query_scale(p_, source);
      host::quantize_kernels().quantize(source, p_.q.dtype, nullptr, dim, scale, quantized_.data(), DType::kInt8);
      source = reinterpret_cast<const std::byte*>(quantized_.data());
      dtype = DType::kInt8;
    }
    const auto at = static_cast<std::size_t>(row);
    tile.read_row(source, dim, dtype, row_.data());
    factors_[at] = static_cast<float>(p_.scale) * scale * factor_;
    double bias = 0.0;
    for (std::int64_t i = 0; mean != nullptr && i < dim; ++i) bias += static_cast<double>(row_[i]) * mean[i];
    biases_[at] = static_cast<float>(bias * scale * p_.scale);
    if (math_ == host::Math::kBFloat16) {
      std::memcpy(queries_.data() + row * stride_ * 2, source, static_cast<std::size_t>(dim) * 2);
    } else if (math_ == host::Math::kInt8) {
      std::byte* out = queries_.data() + row * stride_;
      std::memcpy(out, source, static_cast<std::size_t>(dim));
      for (std::int64_t i = 0; i < dim; ++i) row_sums_[at] += reinterpret_cast<const std::int8_t*>(out)[i];
    } else {
      std::memcpy(queries_.data() + row * stride_ * 4, row_.data(), static_cast<std::size_t>(dim) * 4);
    }
  }
}

void KeyScores::locate(std::int64_t first, int keys) {
  const Request& r = p_.requests[static_cast<std::size_t>(request_)];
  for (int at = 0; at < keys;) {
    const Place place = place_of(p_, r, first + at);
    int run = keys - at;
    if (p_.page_size > 0) run = static_cast<int>(std::min<std::int64_t>(run, p_.page_size - place.slot));
    const std::byte* key = p_.k.row(place.page, kv_head_, place.slot);
    for (int i = 0; i < run; ++i) rows_[static_cast<std::size_t>(at + i)] = key + i * p_.k.slot_stride;
    for (int i = 0; p_.k.partition > 0 && i < run; ++i) {
      key_scale_[static_cast<std::size_t>(at + i)] = p_.k.scale_of(place.page, kv_head_, place.slot + i);
    }
    at += run;
  }
  for (int i = 0; i < 4; ++i) rows_[static_cast<std::size_t>(keys + i)] = rows_[static_cast<std::size_t>(keys - 1)];
}

host::RawScores KeyScores::multiply(std::int64_t row, int at, int keys) {
  const std::int64_t bytes = 4 / host::elements_per_word(math_);
  const QueryRows queries{.queries = queries_.data() + row * stride_ * bytes,
                          .rows = std::min<std::int64_t>(group_ - row, host::kStreamRows),
                          .stride = stride_,
                          .math = math_,
                          .row_sums = row_sums_.data() + row};
  const KeyRows rows{.rows = rows_.data() + at,
                     .count = std::min(keys - at, host::kStreamKeys),
                     .readable = keys - at,
                     .dtype = p_.k.dtype,
                     .dim = p_.k.dim};
  raw_scores(queries, rows, scores_.data());
  return {.scores = scores_.data(),
          .rows = queries.rows,
          .count = rows.count,
          .factor = factors_.data() + row,
          .bias = biases_.data() + row,
          .key_scale = p_.k.partition > 0 ? key_scale_.data() + at : nullptr,
          .softcap = static_cast<float>(p_.softcap)};
}

void raw_scores(const QueryRows& queries, const KeyRows& keys, float* out) {
  const host::StreamTile head{
      .rows = queries.rows, .queries = queries.queries, .row_sums = queries.row_sums, .scores = out};
  const host::StreamSegment whole{0, keys.count};
  const host::StreamStep step{.keys = keys.rows,
                              .count = keys.count,
                              .segments = &whole,
                              .num_segments = 1,
                              .next = std::min(keys.readable - keys.count, host::kStreamKeys),
                              .key_dtype = keys.dtype,
                              .dim = keys.dim,
                              .qk = queries.math};
  host::stream_kernels().scores(head, step);
}

void read_row(const Rows& rows, std::int64_t page, std::int64_t head, std::int64_t slot, float* out) {
  host::tile_kernels().read_row(rows.row(page, head, slot), rows.dim, rows.dtype, out);
  const float scale = rows.scale_of(page, head, slot);
  const float* mean = rows.mean_of(page, head);
  if (rows.scale == nullptr && mean == nullptr) return;
  for (std::int64_t i = 0; i < rows.dim; ++i) out[i] = out[i] * scale + (mean == nullptr ? 0.0f : mean[i]);
}

void read_query(const Problem& p, const Request& r, std::int64_t query, std::int64_t head, float* out) {
  const std::int64_t slot = r.q_first + query;
  if (!p.quantize_q) return read_row(p.q, r.q_page, head, slot, out);
  static thread_local std::vector<std::int8_t> quantized;
  quantized.resize(static_cast<std::size_t>(p.q.dim));
  const std::byte* row = p.q.row(r.q_page, head, slot);
  const float scale = query_scale(p, row);
  host::quantize_kernels().quantize(row, p.q.dtype, nullptr, p.q.dim, scale, quantized.data(), DType::kInt8);
  for (std::int64_t i = 0; i < p.q.dim; ++i)
    out[i] = static_cast<float>(quantized[static_cast<std::size_t>(i)]) * scale;
}

void value_norms(const Problem& p, std::int64_t request, std::int64_t kv_head, std::int64_t begin, std::int64_t end,
                 float* out) {
  static thread_local std::vector<float> row;
  row.resize(static_cast<std::size_t>(p.v.dim));
  const auto& kernels = host::quantize_kernels();
  const Request& r = p.requests[static_cast<std::size_t>(request)];
  const bool plain = p.v.scale == nullptr && p.v.mean == nullptr;
  for (std::int64_t key = begin; key < end; ++key) {
    const Place at = place_of(p, r, key);
    if (plain) {
      const std::byte* x = p.v.row(at.page, kv_head, at.slot);
      out[key - begin] = static_cast<float>(std::sqrt(kernels.sum_squares(x, p.v.dtype, p.v.dim)));
    } else {
      read_row(p.v, at.page, kv_head, at.slot, row.data());
      out[key - begin] = static_cast<float>(std::sqrt(kernels.sum_squares(row.data(), DType::kFloat32, p.v.dim)));
    }
  }
}

bool query_has_nan(const Problem& p, std::int64_t request, std::int64_t query, std::int64_t kv_head) {
  std::vector<float> row(static_cast<std::size_t>(p.q.dim));
  const Request& r = p.requests[static_cast<std::size_t>(request)];
  for (std::int64_t head = kv_head * p.group(); head < (kv_head + 1) * p.group(); ++head) {
    host::tile_kernels().read_row(p.q.row(r.q_page, head, r.q_first + query), p.q.dim, p.q.dtype, row.data());
    for (const float x : row) {
      if (x != x) return true;
    }
  }
  return false;
}

}  // namespace heddle::select
