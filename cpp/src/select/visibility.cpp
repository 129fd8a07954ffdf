#include "select/visibility.h"

#include <algorithm>
#include <limits>

namespace heddle {
namespace {

constexpr std::int64_t kFar = std::numeric_limits<std::int64_t>::max() / 4;

// Bits [begin, end) of a word whose bit 0 stands for key 0.
std::uint64_t bit_range(std::int64_t begin, std::int64_t end) {
  begin = std::clamp<std::int64_t>(begin, 0, 64);
  end = std::clamp<std::int64_t>(end, 0, 64);
  if (begin >= end) return 0;
  return (~std::uint64_t{0} >> (64 - (end - begin))) << begin;
}

std::int64_t floor_div(std::int64_t a, std::int64_t b) { return a / b - (a % b != 0 && (a < 0) != (b < 0)); }

std::int64_t index_at(const TensorView& t, std::int64_t i0, std::int64_t i1) {
  return i0 * t.strides[0] + i1 * t.strides[1];
}

}  // namespace

Visibility::Visibility(const Problem& problem, std::int64_t request, std::int64_t q_head)
    : q_len_(problem.requests[request].q_len),
      kv_len_(problem.requests[request].kv_len),
      offset_(kv_len_ - q_len_),
      left_(problem.window.left.value_or(kFar)),
      right_(std::min(problem.window.right.value_or(kFar), problem.causal ? 0 : kFar)),
      kind_(&problem.selection->kind()) {
  if (const auto* sel = std::get_if<select::BlockMask>(kind_)) {
    const TensorView& mask = sel->mask;
    const int r = mask.rank;
    blocks_ = mask.as<const bool>();
    if (r == 4 && mask.shape[0] > 1) blocks_ += request * mask.strides[0];
    if (r >= 3 && mask.shape[r - 3] > 1) {
      const bool per_q_head = mask.shape[r - 3] == problem.num_q_heads;
      blocks_ += (per_q_head ? q_head : q_head / problem.group()) * mask.strides[r - 3];
    }
    block_row_stride_ = mask.strides[r - 2];
    block_col_stride_ = mask.strides[r - 1];
  }
}

bool Visibility::shared_by_group(const Problem& problem) {
  const auto* sel = std::get_if<select::BlockMask>(&problem.selection->kind());
  if (sel == nullptr || problem.group() == 1 || sel->mask.rank < 3) return true;
  return sel->mask.shape[sel->mask.rank - 3] != problem.num_q_heads;
}

bool Visibility::shared_by_all(const Problem& problem) {
  const auto* sel = std::get_if<select::BlockMask>(&problem.selection->kind());
  return sel == nullptr || sel->mask.rank < 3 || sel->mask.shape[sel->mask.rank - 3] == 1;
}

bool Visibility::block(std::int64_t i, std::int64_t j) const {
  return blocks_[i * block_row_stride_ + j * block_col_stride_];
}

Visibility::Span Visibility::allowed(std::int64_t query) const {
  const std::int64_t p = query + offset_;
  return {std::max<std::int64_t>(0, p - left_), std::min(kv_len_, p + right_ + 1)};
}

Visibility::Span Visibility::selected(std::int64_t query) const {
  const auto* sel = std::get_if<select::WindowGlobal>(kind_);
  if (sel == nullptr) return {-kFar, kFar};
  const std::int64_t p = query + offset_;
  return {sel->window.left ? p - *sel->window.left : -kFar, sel->window.right ? p + *sel->window.right + 1 : kFar};
}

bool Visibility::visible(std::int64_t query, std::int64_t key) const {
  const Span a = allowed(query);
  if (key < a.begin || key >= a.end) return false;
  if (const auto* sel = std::get_if<select::WindowGlobal>(kind_)) {
    const Span s = selected(query);
    return (key >= s.begin && key < s.end) || key < sel->n_global;
  }
  if (const auto* sel = std::get_if<select::Strided>(kind_)) {
    const std::int64_t distance = query + offset_ - key;
    return distance < sel->width || distance % sel->stride == 0;
  }
  if (const auto* sel = std::get_if<select::BlockMask>(kind_)) return block(query / sel->block_q, key / sel->block_k);
  return true;
}

TileKind Visibility::classify(std::int64_t q0, std::int64_t q1, std::int64_t k0, std::int64_t k1) const {
  k1 = std::min(k1, kv_len_);
  if (q0 >= q1 || k0 >= k1) return TileKind::kNone;
  // The spans move to the right with the query: their intersection and hull come from the first and the last one.
  const Span first = allowed(q0), last = allowed(q1 - 1);
  if (k1 <= first.begin || k0 >= last.end || last.end <= first.begin) return TileKind::kNone;
  bool full = k0 >= last.begin && k1 <= first.end;

  if (const auto* sel = std::get_if<select::WindowGlobal>(kind_)) {
    const Span s0 = selected(q0), s1 = selected(q1 - 1);
    const bool in_window = k1 > s0.begin && k0 < s1.end;
    if (!in_window && k0 >= sel->n_global) return TileKind::kNone;
    full = full && ((k0 >= s1.begin && k1 <= s0.end) || k1 <= sel->n_global);
  } else if (const auto* strided = std::get_if<select::Strided>(kind_)) {
    const std::int64_t nearest = q0 + offset_ - (k1 - 1), farthest = q1 - 1 + offset_ - k0;
    const bool some_near = nearest < strided->width;
    const bool some_multiple = floor_div(farthest, strided->stride) * strided->stride >= nearest;
    if (!some_near && !some_multiple) return TileKind::kNone;
    full = full && (farthest < strided->width || strided->stride == 1);
  } else if (const auto* mask = std::get_if<select::BlockMask>(kind_)) {
    bool any = false, all = true;
    for (std::int64_t i = q0 / mask->block_q; i <= (q1 - 1) / mask->block_q; ++i) {
      for (std::int64_t j = k0 / mask->block_k; j <= (k1 - 1) / mask->block_k; ++j) {
        const bool on = block(i, j);
        any |= on;
        all &= on;
      }
    }
    if (!any) return TileKind::kNone;
    full = full && all;
  }
  return full ? TileKind::kFull : TileKind::kPartial;
}

void Visibility::tiles(std::int64_t q0, std::int64_t q1, std::int64_t k0, std::int64_t k1, std::int64_t tile,
                       std::vector<Tile>& out) const {
  out.clear();
  if (q0 >= q1) return;
  const Span hull{std::max(allowed(q0).begin, k0), std::min(allowed(q1 - 1).end, k1)};
  auto visit = [&](std::int64_t begin, std::int64_t end) {  // keys
    begin = std::max(begin, hull.begin);
    end = std::min(end, hull.end);
    if (begin >= end) return;
    std::int64_t t = begin / tile;
    if (!out.empty()) t = std::max<std::int64_t>(t, out.back().index + 1);
    for (; t * tile < end; ++t) {
      const TileKind kind = classify(q0, q1, t * tile, (t + 1) * tile);
      if (kind == TileKind::kNone) continue;
      const bool ragged = (t + 1) * tile > kv_len_;
      out.push_back({static_cast<std::int32_t>(t), kind == TileKind::kPartial || ragged});
    }
  };
  if (const auto* sel = std::get_if<select::WindowGlobal>(kind_)) {
    visit(0, sel->n_global);
    visit(selected(q0).begin, selected(q1 - 1).end);
  } else {
    visit(hull.begin, hull.end);
  }
}

std::uint64_t Visibility::bits64(std::int64_t query, std::int64_t k0) const {
  const Span a = allowed(query);
  std::uint64_t bits = bit_range(a.begin - k0, a.end - k0);
  if (bits == 0) return 0;
  if (const auto* sel = std::get_if<select::WindowGlobal>(kind_)) {
    const Span s = selected(query);
    bits &= bit_range(s.begin - k0, s.end - k0) | bit_range(0, sel->n_global - k0);
  } else if (const auto* strided = std::get_if<select::Strided>(kind_)) {
    const std::int64_t p = query + offset_;
    std::uint64_t chosen = bit_range(p - strided->width + 1 - k0, 64);
    // The first n >= 0 with (p - k0 - n) mod stride = 0.
    const std::int64_t d = p - k0;
    for (std::int64_t n = d - floor_div(d, strided->stride) * strided->stride; n < 64; n += strided->stride) {
      chosen |= std::uint64_t{1} << n;
    }
    bits &= chosen;
  } else if (const auto* mask = std::get_if<select::BlockMask>(kind_)) {
    const std::int64_t i = query / mask->block_q;
    std::uint64_t chosen = 0;
    for (std::int64_t j = k0 / mask->block_k; j * mask->block_k < std::min(k0 + 64, kv_len_); ++j) {
      if (block(i, j)) chosen |= bit_range(j * mask->block_k - k0, (j + 1) * mask->block_k - k0);
    }
    bits &= chosen;
  }
  return bits;
}

std::pair<std::int64_t, std::int64_t> Visibility::allowed_keys(std::int64_t query) const {
  const Span a = allowed(query);
  return {a.begin, std::max(a.begin, a.end)};
}

bool has_token_lists(const Problem& problem) {
  return std::holds_alternative<select::Tokens>(problem.selection->kind());
}

bool token_lists_per_query(const Problem& problem) {
  const auto* sel = std::get_if<select::Tokens>(&problem.selection->kind());
  if (sel == nullptr) return false;
  if (sel->indices.rank == 4) return true;
  return problem.packed &&
         (sel->per_query || sel->indices.shape[0] != static_cast<std::int64_t>(problem.requests.size()));
}

std::span<const std::int32_t> token_list(const Problem& problem, std::int64_t request, std::int64_t query,
                                         std::int64_t kv_head) {
  const auto& sel = std::get<select::Tokens>(problem.selection->kind());
  const TensorView& indices = sel.indices;
  const bool per_query = token_lists_per_query(problem);
  if (indices.shape[indices.rank - 2] == 1) kv_head = 0;  // one list for all heads
  auto offset = [&](const TensorView& t) {
    if (!per_query) return index_at(t, request, kv_head);
    if (indices.rank == 3) return index_at(t, problem.requests[request].q_first + query, kv_head);
    return request * t.strides[0] + query * t.strides[1] + kv_head * t.strides[2];
  };
  const std::int32_t* begin = indices.as<const std::int32_t>() + offset(indices);
  const std::int64_t capacity = indices.shape[indices.rank - 1];
  if (sel.lengths.given()) {
    return {begin, static_cast<std::size_t>(sel.lengths.as<const std::int32_t>()[offset(sel.lengths)])};
  }
  const auto* end = std::partition_point(begin, begin + capacity, [](std::int32_t j) { return j >= 0; });
  return {begin, end};
}

}  // namespace heddle
