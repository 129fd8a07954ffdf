// Selections: which keys a query reads, beyond what `causal` and `window` say.
#pragma once

#include <cstdint>
#include <limits>
#include <memory>
#include <optional>
#include <string_view>
#include <variant>

#include "heddle/export.h"
#include "heddle/tensor.h"

namespace heddle {

// Positions are aligned at the bottom right: query i of a request with Sq queries and Sk keys stands at
// p = i + Sk - Sq. A key j is read if `causal`, `window` and the selection all allow it.

// Keys p - left <= j <= p + right; std::nullopt is unbounded.
struct Window {
  std::optional<std::int64_t> left{};
  std::optional<std::int64_t> right{};
};

namespace select {

// The window, and also the first `n_global` keys.
struct WindowGlobal {
  Window window{};
  std::int64_t n_global = 0;
};

// Keys with p - j < width or (p - j) mod stride = 0.
struct Strided {
  std::int64_t width = 0;
  std::int64_t stride = 1;
};

// mask: bool [nQ, nK], [H, nQ, nK] or [B, H, nQ, nK] with H = 1, Hkv or Hq and B = 1 or the batch; block (I, J) holds
// the queries I*block_q.. and the keys J*block_k.. (counted from the first of each request, not bottom-right). nQ and
// nK are ceilings over the longest request.
struct BlockMask {
  TensorView mask{};
  std::int64_t block_q = 128;
  std::int64_t block_k = 128;
};

// indices: int32 [B, Hkv, n] for all queries of a request, or [B, Sq, Hkv, n] ([total_q, Hkv, n] in a packed batch,
// where a first axis of B entries means requests unless per_query says otherwise); 1 in place of Hkv: one list for all
// heads. Ascending, without repeats, -1 pads at the end. lengths: int32, the shape of indices without its last axis;
// optional.
struct Tokens {
  TensorView indices{};
  TensorView lengths{};
  bool per_query = false;
};

// indices: int32 [B, Hkv, n], or [B, 1, n] for all heads: logical pages of each request, page p holding its tokens
// p * page_size and on, of which those it has are read. Ascending, without repeats, -1 pads at the end. lengths: int32
// [B, Hkv], optional. For decode(), with a cache on the CPU.
struct PageList {
  TensorView indices{};
  TensorView lengths{};
};

}  // namespace select

class HEDDLE_API Selection {
 public:
  using Kind = std::variant<std::monostate, select::WindowGlobal, select::Strided, select::BlockMask, select::Tokens,
                            select::PageList>;

  Selection() = default;  // every key
  static Selection window(std::optional<std::int64_t> left, std::optional<std::int64_t> right = 0,
                          std::int64_t n_global = 0);
  static Selection strided(std::int64_t width, std::int64_t stride);
  // `owner` keeps the memory behind the views alive for as long as the selection lives.
  static Selection block_mask(TensorView mask, std::int64_t block_q = 128, std::int64_t block_k = 128,
                              std::shared_ptr<const void> owner = {});
  static Selection tokens(TensorView indices, TensorView lengths = {}, std::shared_ptr<const void> owner = {},
                          bool per_query = false);
  static Selection page_list(TensorView indices, TensorView lengths = {}, std::shared_ptr<const void> owner = {});

  const Kind& kind() const noexcept { return kind_; }

  // The kept part of the (query, key) pairs that the call it was made for sees without it, over all heads; NaN if it
  // was not made for a call.
  double density() const noexcept { return density_; }
  Selection with_density(double density) const;

 private:
  Kind kind_;
  std::shared_ptr<const void> owner_;
  double density_ = std::numeric_limits<double>::quiet_NaN();
};

// --- selections made at run time, for one call ---

struct AttentionParams;
struct DecodeParams;

namespace select {

// How much is kept: a count, or a fraction of what a query sees, rounded up. Exactly one is above 0.
struct Budget {
  std::int64_t count = 0;
  double fraction = 0.0;
};

// What makes a token worth reading. s is its score (scale, softcap and K smoothing included), v its value, p its
// probability (sinks included) and o the output.
enum class Metric : std::uint8_t {
  kQk,   // s
  kOam,  // s + beta * max(0, log |v|): output-aware
  kLoo,  // p / (1 - p) * |v - o|: how far dropping this token alone moves the output; +inf for an only token
};
enum class Norm : std::uint8_t {
  kClipped,  // max(0, log |v|)
  kLog,      // log(|v| + epsilon)
  kZScore,   // blocks only: max(0, z) of log(max |v| + epsilon) over the stride-groups of a head, averaged by block
};

HEDDLE_API Metric metric_from_string(std::string_view name);  // "qk", "oam", "loo"
HEDDLE_API Norm norm_from_string(std::string_view name);      // "clipped", "log", "zscore"

// The first n_sink keys of the request and the last n_recent that a query sees are always kept, as part of the budget.
// A fraction that is less than these keeps just these.
struct TopkOptions {
  Budget budget{};
  Metric metric = Metric::kQk;
  std::int64_t n_sink = 0, n_recent = 0;
  double beta = 0.2;
  Norm norm = Norm::kClipped;
  double epsilon = 1e-6;
  // oam without a cache: |v|, float32 [B, Sk, Hkv] ([total_k, Hkv]); computed if not given.
  TensorView value_norms{};
  // loo: o, the shape and kind of dtype of the call's output (last step's, for one); computed if not given.
  TensorView output{};
};

// The tokens that the queries of a call should read: the budget's largest by the metric, which is the maximum over the
// query heads of a KV head; of equal ones the first. Exact. Token lists [B, Hkv, n] if every request has one query,
// else one for each query. `call` is the attention or decode that the selection is for, its out, lse and selection
// aside: causality and window say which keys compete. On the CPU. Throws before any memory is touched, and kValue for a
// score that is NaN.
HEDDLE_API Selection topk(const AttentionParams& call, const TopkOptions& options);
HEDDLE_API Selection topk(const DecodeParams& call, const TopkOptions& options);

// Pages instead of tokens: whole pages of keys, ranked by what none of their tokens can exceed,
// scale * sum_d max(q_d kmin_d, q_d kmax_d) (softcapped), plus beta * the norm's term of the largest |v| with
// Metric::kOam. kmin and kmax are the element-wise minimum and maximum of the page's keys: a cache keeps them
// (CacheConfig::page_bounds), over arrays they are computed. The budget is in tokens and rounds up to pages, as do the
// always-kept tokens. Token lists. Quest (arXiv 2406.10774), with the value's term.
struct PagesOptions {
  Budget budget{};
  Metric metric = Metric::kQk;  // or kOam
  std::int64_t page_size = 0;   // arrays: tokens of a page; a cache has its own
  std::int64_t n_sink = 0, n_recent = 0;
  double beta = 0.2;
  Norm norm = Norm::kClipped;
  double epsilon = 1e-6;
};
HEDDLE_API Selection pages(const AttentionParams& call, const PagesOptions& options);
HEDDLE_API Selection pages(const DecodeParams& call, const PagesOptions& options);

// The tokens with the largest index scores I(t, s) = sum_h w_th max(0, scale * q_th . k_s) of each query, exactly: the
// indexer of DeepSeek's sparse attention (DSA). `call` has the index queries, [B, Sq, Hi, Di], and the index keys, one
// a token, [B, Sk, 1, Di], bf16 or others, or INT8 and FP8 with scales; or a cache with one KV head. Its values are not
// looked at, its scale is 1 unless given, and softcap and sinks have no place here. weights: [B, Sq, Hi] ([total_q,
// Hi]), floats. Token lists with one head, for all KV heads: [B, 1, n] or [B, Sq, 1, n] ([total_q, 1, n]).
struct IndexerOptions {
  Budget budget{};
  TensorView weights{};
  std::int64_t n_sink = 0, n_recent = 0;
};
HEDDLE_API Selection indexer(const AttentionParams& call, const IndexerOptions& options);
HEDDLE_API Selection indexer(const DecodeParams& call, const IndexerOptions& options);

// The same of scores from elsewhere: float32 [B, Hkv, n], or [B, Sq, Hkv, n]; lengths int32, without the last axis:
// how many count. Optional.
struct ScoreOptions {
  Budget budget{};
  std::int64_t n_sink = 0, n_recent = 0;
  TensorView lengths{};
};
HEDDLE_API Selection top_scores(const TensorView& scores, const ScoreOptions& options);

// --- block masks, for prefill ---
//
// bool [B, Hq, nQ, nK] over blocks of `block` queries x `block` keys: a choice for every query head. A block row sees
// the key blocks that causality and window leave its queries some key of; the first n_first of the request and the last
// n_last that it sees are always kept, as are those that hold its own positions. Softcap and sinks play no part in
// block scores. On the CPU; kValue for a score that is NaN.

// Stem (arXiv 2603.06274). The score of block (I, J) is the mean over its stride x stride sub-blocks of their
// anti-diagonal sums of q . k, times scale / stride (absent tokens count as zero), plus beta times the V term of J: the
// largest norm's (clipped, log), or the mean z-score of the stride-groups (zscore). Of what it sees, block row I of a
// prompt of N block rows keeps the k(I) best, k(I) = ceil(k_s - k_s (1 - decay) I / N), the always-kept ones among
// them. k_s, with n key blocks in the prompt: n if n < 56, 0.2 n + 30 if n < 160, else 0.1 n + 30; or the budget, a
// count or a fraction of n. A chunk whose first query stands at a multiple of `block` selects what a single pass does
// (zscore does not, since it looks at all keys there are).
struct StemOptions {
  Budget budget{};  // neither: the schedule's own
  std::int64_t block = 128, stride = 8;
  double decay = 0.7;
  std::int64_t prompt_len = 0;  // tokens of the whole prompt; 0: the keys of each request
  std::int64_t n_first = 4, n_last = 4;
  double beta = 0.2;
  Norm norm = Norm::kClipped;
  double epsilon = 1e-6;
  TensorView value_norms{};  // as in TopkOptions
};
HEDDLE_API Selection stem(const AttentionParams& call, const StemOptions& options);
HEDDLE_API Selection stem(const DecodeParams& call, const StemOptions& options);

// The best by mean-pooled queries times mean-pooled keys; a fraction is of the blocks that a row sees.
struct BlockTopkOptions {
  Budget budget{};
  std::int64_t block = 128;
  std::int64_t n_first = 0, n_last = 1;
};
HEDDLE_API Selection block_topk(const AttentionParams& call, const BlockTopkOptions& options);
HEDDLE_API Selection block_topk(const DecodeParams& call, const BlockTopkOptions& options);

// XAttention (arXiv 2503.16428): softmax of the anti-diagonal sums times scale / stride, over the sub-blocks that a
// stride-group of queries sees; of the block sums' means, the fewest that hold `threshold` of the mass.
struct XAttentionOptions {
  double threshold = 0.9;
  std::int64_t block = 128, stride = 8;
  std::int64_t n_first = 0, n_last = 1;
};
HEDDLE_API Selection xattention(const AttentionParams& call, const XAttentionOptions& options);
HEDDLE_API Selection xattention(const DecodeParams& call, const XAttentionOptions& options);

// Vertical-slash (MInference, arXiv 2407.02490) by blocks: the probabilities of the last n_queries, summed by key block
// and by distance in blocks (of positions), choose block columns and block diagonals for every row. Budgets are counts,
// or fractions of the key blocks.
struct VerticalSlashOptions {
  Budget vertical{}, slash{};
  std::int64_t n_queries = 64;
  std::int64_t block = 128;
  std::int64_t n_first = 0, n_last = 1;
};
HEDDLE_API Selection vertical_slash(const AttentionParams& call, const VerticalSlashOptions& options);
HEDDLE_API Selection vertical_slash(const DecodeParams& call, const VerticalSlashOptions& options);

}  // namespace select

}  // namespace heddle
