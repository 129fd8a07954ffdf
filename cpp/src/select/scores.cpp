#include "select/scores.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "host/quantize_kernels.h"
#include "host/tile_kernels.h"

namespace heddle::select {
namespace {

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
    : p_(problem),
      group_(problem.group()),
      padded_group_((group_ + 3) / 4 * 4),
      stride_(host::stream_dim(problem.q.dim)),
      block_rows_(host::stream_rows(std::min<std::int64_t>(group_, host::kStreamRows))),
      // As many as keep their scores near.
      heads_at_once_(std::clamp<std::int64_t>(64 / block_rows_, 1, host::kStreamHeads)),
      math_(math_of(problem)),
      scattered_((problem.page_size > 0 && problem.page_size < kSegmentKeys) ||
                 problem.k.slot_stride != problem.k.dim * static_cast<std::int64_t>(size_of(problem.k.dtype))) {
  if (p_.k.scale != nullptr && p_.k.partition == 0) factor_ = p_.k.scale[0];
  row_.resize(static_cast<std::size_t>(stride_));
  quantized_.resize(static_cast<std::size_t>(stride_));
  rows_.resize(kPlaces + 4);
  scores_.resize(static_cast<std::size_t>(heads_at_once_ * block_rows_ * host::kStreamKeys));
}

void KeyScores::set_query(std::int64_t request, std::int64_t query, std::int64_t first, std::int64_t count) {
  if (request == request_ && query == query_ && first == first_head_ && count == num_heads_) return;
  const auto& tile = host::tile_kernels();
  const Request& r = p_.requests[static_cast<std::size_t>(request)];
  const auto rows = static_cast<std::size_t>(count * padded_group_);
  request_ = request;
  query_ = query;
  first_head_ = first;
  num_heads_ = count;
  const std::int64_t dim = p_.q.dim, slot = r.q_first + query;
  queries_.assign(rows * static_cast<std::size_t>(stride_) * 4, std::byte{0});
  factors_.assign(rows, 0.0f);
  biases_.assign(rows, 0.0f);
  row_sums_.assign(rows, 0);
  if (p_.k.partition > 0) key_scale_.resize(static_cast<std::size_t>(count * kKeys));
  for (std::int64_t n = 0; n < count * group_; ++n) {
    const std::int64_t kv_head = first + n / group_, head = first * group_ + n;
    const std::byte* source = p_.q.row(r.q_page, head, slot);
    DType dtype = p_.q.dtype;
    float scale = p_.q.scale_of(r.q_page, head, slot);
    if (p_.quantize_q) {
      scale = query_scale(p_, source);
      host::quantize_kernels().quantize(source, p_.q.dtype, nullptr, dim, scale, quantized_.data(), DType::kInt8);
      source = reinterpret_cast<const std::byte*>(quantized_.data());
      dtype = DType::kInt8;
    }
    const std::int64_t row = row_of(n / group_, n % group_);
    const auto at = static_cast<std::size_t>(row);
    tile.read_row(source, dim, dtype, row_.data());
    factors_[at] = static_cast<float>(p_.scale) * scale * factor_;
    const float* mean = r.kv_len > 0 ? p_.k.mean_of(place_of(p_, r, 0).page, kv_head) : nullptr;
    double bias = 0.0;
    for (std::int64_t i = 0; mean != nullptr && i < dim; ++i) bias += static_cast<double>(row_[i]) * mean[i];
    biases_[at] = static_cast<float>(bias * scale * p_.scale);
    std::byte* out = queries_.data() + row * stride_ * 4 / host::elements_per_word(math_);
    if (math_ == host::Math::kFloat32) {
      std::memcpy(out, row_.data(), static_cast<std::size_t>(dim) * 4);
    } else {
      std::memcpy(out, source, static_cast<std::size_t>(dim) * size_of(dtype));
    }
    for (std::int64_t i = 0; math_ == host::Math::kInt8 && i < dim; ++i) {
      row_sums_[at] += reinterpret_cast<const std::int8_t*>(out)[i];
    }
  }
}

// Places of `places` keys from `first` on; scales of `keys` of them.
void KeyScores::locate(std::int64_t first, int keys, int places) {
  const Request& r = p_.requests[static_cast<std::size_t>(request_)];
  for (int at = 0; at < places;) {
    const Place place = place_of(p_, r, first + at);
    if (at == 0) slot_ = place.slot;
    int run = places - at;
    if (p_.page_size > 0) run = static_cast<int>(std::min<std::int64_t>(run, p_.page_size - place.slot));
    const std::byte* key = p_.k.row(place.page, first_head_, place.slot);
    for (int i = 0; i < run; ++i) rows_[static_cast<std::size_t>(at + i)] = key + i * p_.k.slot_stride;
    for (std::int64_t h = 0; p_.k.partition > 0 && at < keys && h < num_heads_; ++h) {
      p_.k.copy_scales(place.page, first_head_ + h, place.slot, std::min(run, keys - at),
                       key_scale_.data() + h * kKeys + at);
    }
    at += run;
  }
  for (int i = 0; i < 4; ++i) rows_[static_cast<std::size_t>(places + i)] = rows_[static_cast<std::size_t>(places - 1)];
}

// Segments of the keys [at, at + count): they end with a page, or by kSegmentKeys, always at a multiple of 4.
int KeyScores::cut(int at, int count, host::StreamSegment* segments) const {
  int n = 0, start = 0;
  while (scattered_ || p_.page_size > 0) {
    int end = start + kSegmentKeys;
    if (!scattered_) {  // the first end of a page from there on
      const std::int64_t past = (slot_ + at + end) % p_.page_size;
      end += static_cast<int>(past == 0 ? 0 : p_.page_size - past);
      end -= end % 4;
    }
    if (end >= count) break;
    segments[n++] = {start, end - start};
    start = end;
  }
  segments[n++] = {start, count - start};
  return n;
}

void KeyScores::multiply(std::int64_t head, std::int64_t last, std::int64_t row, int at, int places) {
  host::StreamTile tiles[host::kStreamHeads];
  for (std::int64_t h = head; h < last; ++h) {
    const std::int64_t first = row_of(h, row);
    tiles[h - head] = {.rows = std::min<std::int64_t>(group_ - row, host::kStreamRows),
                       .queries = queries_.data() + first * stride_ * 4 / host::elements_per_word(math_),
                       .row_sums = row_sums_.data() + first,
                       .scores = scores_.data() + (h - head) * block_rows_ * host::kStreamKeys};
  }
  const int count = std::min(std::min(places, kKeys) - at, host::kStreamKeys);
  const int left = std::min(places - at - count, host::kStreamKeys);
  host::StreamSegment segments[kMaxSegments], next[kMaxSegments];
  if (left > 0) cut(at + count, left, next);
  host::StreamStep step{.keys = rows_.data() + at,
                        .key_head_stride = p_.k.head_stride,
                        .count = count,
                        .segments = segments,
                        .num_segments = cut(at, count, segments),
                        .next = left > 0 ? next[0].count : 0,
                        .key_dtype = p_.k.dtype,
                        .dim = p_.k.dim,
                        .qk = math_};
  const std::byte* rows[2 * host::kStreamKeys + 4];
  if (head > 0) {
    for (int i = 0; i < count + step.next + 4; ++i) rows[i] = step.keys[i] + head * p_.k.head_stride;
    step.keys = rows;
  }
  host::stream_kernels().scores(tiles, static_cast<int>(last - head), step);
}

// Of the `nth` head from `head` on, the keys [from, to) of those that were located.
host::RawScores KeyScores::block(std::int64_t head, std::int64_t nth, std::int64_t row, int from, int to) const {
  const std::int64_t first = row_of(head + nth, row);
  return {.scores = scores_.data() + nth * block_rows_ * host::kStreamKeys + from % host::kStreamKeys,
          .rows = std::min<std::int64_t>(group_ - row, host::kStreamRows),
          .count = to - from,
          .factor = factors_.data() + first,
          .bias = biases_.data() + first,
          .key_scale = p_.k.partition > 0 ? key_scale_.data() + (head + nth) * kKeys + from : nullptr,
          .softcap = static_cast<float>(p_.softcap)};
}

void raw_scores(const QueryRows& queries, const KeyRows& keys, float* out) {
  const host::StreamTile rows{.rows = queries.rows, .queries = queries.queries, .scores = out};
  const host::StreamSegment whole{0, keys.count};
  const host::StreamStep step{.keys = keys.rows,
                              .count = keys.count,
                              .segments = &whole,
                              .num_segments = 1,
                              .key_dtype = keys.dtype,
                              .dim = keys.dim};
  host::stream_kernels().scores(&rows, 1, step);
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
    const Place at = place_of(p, r, key), next = place_of(p, r, std::min(key + kRowsAhead, r.kv_len - 1));
    fetch_row(p.v, next.page, kv_head, next.slot);
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
