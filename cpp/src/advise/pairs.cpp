// How many (query, key) pairs a pattern multiplies, in closed form.
#include <algorithm>
#include <cmath>
#include <cstdint>

#include "core/check.h"
#include "heddle/advise.h"

namespace heddle {
namespace {

// Sum over x = first .. last of clamp(x, 0, limit).
std::int64_t sum_clamped(std::int64_t first, std::int64_t last, std::int64_t limit) {
  const auto up_to = [limit](std::int64_t n) -> std::int64_t {
    if (n <= 0) return 0;
    return n <= limit ? n * (n + 1) / 2 : limit * (limit + 1) / 2 + (n - limit) * limit;
  };
  return last < first ? 0 : up_to(last) - up_to(first - 1);
}

// Sum over p = 0 .. last of how many multiples of `stride` lie in [0, p].
std::int64_t sum_multiples(std::int64_t last, std::int64_t stride) {
  if (last < 0) return 0;
  const std::int64_t whole = (last + 1) / stride, rest = (last + 1) % stride;
  return stride * (whole * (whole + 1) / 2) + rest * (whole + 1);
}

// Queries stand at p = first .. last; keys at 0 .. keys - 1.
struct Span {
  std::int64_t first, last, keys;
  bool causal;

  std::int64_t rows() const { return last - first + 1; }
  // Keys below p + shift, of the first `limit`, summed over the queries.
  std::int64_t below(std::int64_t shift, std::int64_t limit) const {
    return sum_clamped(first + shift, last + shift, limit);
  }
  std::int64_t all() const { return causal ? below(1, keys) : rows() * keys; }
};

std::int64_t window_pairs(const Span& s, const select::WindowGlobal& w) {
  const std::int64_t globals = std::min(w.n_global, s.keys);
  const std::optional<std::int64_t> right = s.causal ? std::optional<std::int64_t>(0) : w.window.right;
  // Wider than this is as good as unbounded.
  const std::int64_t widest = s.keys + s.rows();
  const auto shift = [widest](std::int64_t x) { return std::min(x, widest); };
  // The window holds the keys below p + right + 1, less those below p - left; the global tokens are those of the latter
  // among the first, and (without causality) those of the first that lie beyond the window.
  std::int64_t pairs = right ? s.below(shift(*right) + 1, s.keys) : s.rows() * s.keys;
  if (w.window.left) pairs += s.below(-shift(*w.window.left), globals) - s.below(-shift(*w.window.left), s.keys);
  if (!s.causal && right) pairs += s.rows() * globals - s.below(shift(*right) + 1, globals);
  return pairs;
}

std::int64_t strided_pairs(const Span& s, const select::Strided& pattern) {
  const std::int64_t width = std::min(pattern.width, s.keys), stride = pattern.stride;
  // Distances 0 .. width - 1, then the multiples of the stride from there to p.
  const std::int64_t first = std::max(s.first, width);
  std::int64_t pairs = s.below(1, width);
  if (first <= s.last) {
    const std::int64_t near = width / stride + (width % stride != 0 ? 1 : 0);  // multiples below the width
    pairs += sum_multiples(s.last, stride) - sum_multiples(first - 1, stride) - (s.last - first + 1) * near;
  }
  // Keys after the query stand at negative distances, below any width.
  if (!s.causal) pairs += s.rows() * s.keys - s.below(1, s.keys);
  return pairs;
}

}  // namespace

std::int64_t count_pairs(const Pattern& pattern, std::int64_t q_len, std::int64_t kv_len, bool causal) {
  check::at_least("q_len", q_len, 0);
  check::at_least("kv_len", kv_len, 0);
  const Span span{kv_len - q_len, kv_len - 1, kv_len, causal};
  switch (pattern.kind) {
    case Pattern::Kind::kWindow: return window_pairs(span, pattern.window);
    case Pattern::Kind::kStrided: return strided_pairs(span, pattern.strided);
    case Pattern::Kind::kBlocks: return std::llround(pattern.density * static_cast<double>(span.all()));
    case Pattern::Kind::kTopK:
    case Pattern::Kind::kTokens:
      return causal ? span.below(1, std::min(pattern.budget, kv_len)) : q_len * std::min(pattern.budget, kv_len);
    default: return span.all();
  }
}

}  // namespace heddle
