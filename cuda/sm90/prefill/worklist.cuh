// The KV tiles that a row tile visits, last first: intervals where the pattern has them, else bits that were made
// before. Asked by the planner; the others are told tile by tile. A row tile that sees nothing visits tile 0, masked.
// kClearFirst: where the first is masked and the second is not, the second comes first, so that all rows see enough of
// it to choose their reference by.
#pragma once

#include "cuda/common/online_softmax.cuh"
#include "cuda/common/visibility.cuh"
#include "cuda/sm90/prefill/params.h"

namespace heddle::cuda {

// A KV tile as consumers are told of it.
struct TileNote {
  int value;

  // kCutBegin, kCutEnd: what some rows see begins behind its first key, or ends before its last; kCutGlobal: they may
  // see global keys of it beside that. kRagged: it reaches beyond the keys. kMapped: its scores go through a ScoreMap.
  // kSeen << w: rows of warpgroup w see some of it; kSeenBehind << w: some of its second half.
  static constexpr int kWarpgroups = 3;  // at most
  static constexpr int kLast = 1, kCutBegin = 2, kCutEnd = 4, kCutGlobal = 8, kRagged = 16, kMapped = 32, kSeen = 64;
  static constexpr int kMasked = kCutBegin | kCutEnd | kCutGlobal, kSeenBehind = kSeen << kWarpgroups;
  static constexpr int kShift = 6 + 2 * kWarpgroups, kSeenByAll = (1 << kShift) - kSeen;
  static constexpr std::int64_t kMaxTiles = std::int64_t{1} << (31 - kShift);
  __device__ __forceinline__ int tile() const { return value >> kShift; }
  __device__ __forceinline__ bool last() const { return (value & kLast) != 0; }
  __device__ __forceinline__ bool masked() const { return (value & kMasked) != 0; }
  __device__ __forceinline__ bool cut_begin() const { return (value & kCutBegin) != 0; }
  __device__ __forceinline__ bool cut_end() const { return (value & kCutEnd) != 0; }
  __device__ __forceinline__ bool cut_global() const { return (value & kCutGlobal) != 0; }
  __device__ __forceinline__ bool ragged() const { return (value & kRagged) != 0; }
  __device__ __forceinline__ bool seen_by(int warpgroup) const { return (value & kSeen << warpgroup) != 0; }
  __device__ __forceinline__ bool seen_behind_by(int warpgroup) const {
    return (value & kSeenBehind << warpgroup) != 0;
  }
  __device__ __forceinline__ bool special() const { return (value & (kMasked | kMapped)) != 0; }
};

template <int kKeys, int kWarpgroups, bool kClearFirst>
class TileWalk {
 public:
  __device__ __forceinline__ TileWalk(const PrefillParams& params, const PrefillItem& item)
      : params_(params), item_(item) {
    const int queries = params.schedule.queries_per_tile;
    const Visibility visibility(params.pattern, item.q_len, item.kv_len);
    const int last_query = min(item.first_query + queries, item.q_len) - 1;
    const Span first = visibility.allowed(item.first_query), last = visibility.allowed(last_query);
    const Span hull{first.begin, max(last.end, first.begin)};
    unmasked_ = {last.begin, first.end};
    if (params.worklist.bits != nullptr) {
      const PrefillWorklist& list = params.worklist;
      const int head = list.heads == 1 ? 0 : item.q_head / params.packed_heads;
      const int request = list.requests == 1 ? 0 : item.request;
      bits_ = list.bits +
              (std::int64_t{request * list.heads + head} * list.row_tiles + item.first_query / queries) * list.words;
    }
    if (params.pattern.kind == PatternKind::kWindowGlobal) {
      const Span s0 = visibility.selected(item.first_query), s1 = visibility.selected(last_query);
      const int num_global = params.pattern.num_global;
      set(max(hull.begin, s0.begin), min(hull.end, s1.end), next_, stop_);
      set(hull.begin, min(hull.end, num_global), more_next_, more_stop_);
      if (next_ > stop_ && more_next_ >= stop_) {  // they meet: one interval
        next_ = max(next_, more_next_);
        stop_ = min(stop_, more_stop_);
        more_next_ = more_stop_;
      }
      unmasked_global_ = min(unmasked_.end, num_global);
      unmasked_ = {max(unmasked_.begin, s1.begin), min(unmasked_.end, s0.end)};
      // Global keys are unmasked where the window argument leaves them to every row.
      if (last.begin > 0) unmasked_global_ = 0;
    } else {
      set(hull.begin, hull.end, next_, stop_);
    }
    // A lane for each of the bits of seen_by and seen_behind_by. The last row of a warpgroup sees most.
    const int lane = static_cast<int>(threadIdx.x) % 32;
    const int row = 64 * min(lane % TileNote::kWarpgroups, kWarpgroups - 1) + 63;
    const int query = item.first_query + (row * params.packed_heads_reciprocal >> 16);
    sees_until_ = visibility.allowed(min(query, last_query)).end - (lane < TileNote::kWarpgroups ? 0 : kKeys / 2);
    step();
    if constexpr (kClearFirst) {
      next_note_ = in_order();
      if (next_note_.masked() && !next_note_.last()) {
        const TileNote second = in_order();
        if (second.masked()) {
          after_next_ = second;
        } else {
          after_next_ = {next_note_.value | (second.value & TileNote::kLast)};
          next_note_ = {second.value & ~TileNote::kLast};
        }
      }
    }
  }

  // The next of them, to all lanes. Not after the last, which always is for all.
  __device__ __forceinline__ TileNote take() {
    if constexpr (!kClearFirst) return in_order();
    const TileNote note = next_note_;
    if (!note.last()) {
      next_note_ = after_next_.value != 0 ? after_next_ : in_order();
      after_next_ = {0};
    }
    return note;
  }

 private:
  static constexpr int kForAll = TileNote::kLast | TileNote::kSeenByAll;

  // The same, from the last tile to the first.
  __device__ __forceinline__ TileNote in_order() {
    if (upcoming_ < 0) return {flags() | TileNote::kMasked | TileNote::kRagged | kForAll};
    const int tile = upcoming_, begin = tile * kKeys, end = begin + kKeys;
    int cuts = 0;
    if (bits_ != nullptr) {
      cuts = masked_ != 0 ? TileNote::kMasked : 0;
    } else if (end > unmasked_global_) {
      cuts = (begin < unmasked_.begin ? TileNote::kCutBegin : 0) | (end > unmasked_.end ? TileNote::kCutEnd : 0);
      if (cuts != 0 && begin < params_.pattern.num_global) cuts |= TileNote::kCutGlobal;
    }
    if (end > item_.kv_len) cuts |= TileNote::kRagged;
    step();
    const unsigned seen = __ballot_sync(kFullWarp, begin < sees_until_) * TileNote::kSeen & TileNote::kSeenByAll;
    return {tile << TileNote::kShift | flags() | cuts | (upcoming_ < 0 ? kForAll : static_cast<int>(seen))};
  }

  // Of every note.
  __device__ __forceinline__ int flags() const { return params_.score_map == ScoreMap::kNone ? 0 : TileNote::kMapped; }
  // Tiles [stop, next) of the keys [begin, end).
  __device__ __forceinline__ static void set(int begin, int end, int& next, int& stop) {
    if (begin >= end) return;
    next = (end + kKeys - 1) / kKeys;
    stop = begin / kKeys;
  }
  __device__ __forceinline__ void step() {
    if (next_ <= stop_ && more_next_ > more_stop_) {
      next_ = more_next_;
      stop_ = more_stop_;
      more_next_ = more_stop_;
    }
    if (bits_ == nullptr) {
      upcoming_ = next_ > stop_ ? --next_ : -1;
      return;
    }
    upcoming_ = -1;
    while (next_ > stop_) {
      const int word = (next_ - 1) / 32;
      const uint2 bits = __ldg(bits_ + word);
      const unsigned below = bits.x & (0xffffffffu >> (31 - (next_ - 1) % 32));
      next_ = word * 32;
      if (below == 0) continue;
      const int bit = 31 - __clz(static_cast<int>(below));
      next_ += bit;
      if (next_ >= stop_) {
        upcoming_ = next_;
        masked_ = static_cast<int>(bits.y >> bit & 1);
      }
      return;
    }
  }

  const PrefillParams& params_;
  const PrefillItem& item_;
  int next_ = 0, stop_ = 0, more_next_ = 0, more_stop_ = 0;  // tiles [stop, next), then [more_stop, more_next)
  Span unmasked_;                                            // keys that every row sees, if there are no bits; and
  int unmasked_global_ = 0;                                  // those below this
  const uint2* bits_ = nullptr;
  int sees_until_;
  TileNote next_note_{0}, after_next_{0};  // with kClearFirst: taken in order already; 0 for none
  int upcoming_ = -1, masked_ = 0;
};

// Makes the bits: a warp for 32 KV tiles of a row tile. Grid: words x row tiles / warps, heads, requests.
template <int kKeys, int kWarps>
__global__ void __launch_bounds__(32 * kWarps) prefill_worklist_kernel(const __grid_constant__ PrefillParams params) {
  const PrefillWorklist& list = params.worklist;
  const int lane = static_cast<int>(threadIdx.x) % 32, queries = params.schedule.queries_per_tile;
  const std::int64_t index = std::int64_t{blockIdx.x} * kWarps + threadIdx.x / 32;
  if (index >= std::int64_t{list.row_tiles} * list.words) return;
  const int row_tile = static_cast<int>(index / list.words), word = static_cast<int>(index % list.words);
  const int head = static_cast<int>(blockIdx.y), request = static_cast<int>(blockIdx.z);
  int q_len = params.q_len, kv_len = params.kv_len;
  if (params.cu_seqlens_q != nullptr) {
    q_len = __ldg(params.cu_seqlens_q + request + 1) - __ldg(params.cu_seqlens_q + request);
    kv_len = __ldg(params.cu_seqlens_k + request + 1) - __ldg(params.cu_seqlens_k + request);
  } else if (params.seq_lens != nullptr) {
    kv_len = __ldg(params.seq_lens + request);
  }
  Visibility visibility(params.pattern, q_len, kv_len);
  visibility.set_mask(request, head * params.packed_heads);
  const int first = row_tile * queries, tile = word * 32 + lane;
  const TileKind kind = visibility.classify(first, min(first + queries, q_len), tile * kKeys, (tile + 1) * kKeys);
  const unsigned visited = __ballot_sync(kFullWarp, kind != TileKind::kNone);
  const unsigned masked = __ballot_sync(kFullWarp, kind == TileKind::kPartial);
  if (lane == 0) {
    list.bits[((std::int64_t{request} * list.heads + head) * list.row_tiles + row_tile) * list.words + word] =
        uint2{visited, masked};
  }
}

}  // namespace heddle::cuda
