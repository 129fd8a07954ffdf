// The KV tiles that a row tile visits, last first: intervals where the pattern has them, else bits that were made
// before. Asked by the planner; the others are told tile by tile. A row tile that sees nothing visits tile 0, masked.
#pragma once

#include "cuda/common/online_softmax.cuh"
#include "cuda/common/visibility.cuh"
#include "cuda/sm90/prefill/params.h"

namespace heddle::cuda {

// A KV tile as consumers are told of it.
struct TileNote {
  int value;

  // kMapped: its scores go through a ScoreMap. kSeen << w: rows of warpgroup w see some of it; kSeenBehind << w: some
  // of its second half.
  static constexpr int kWarpgroups = 3;  // at most
  static constexpr int kLast = 1, kMasked = 2, kMapped = 4, kSeen = 8, kSeenBehind = kSeen << kWarpgroups;
  static constexpr int kShift = 3 + 2 * kWarpgroups, kSeenByAll = (1 << kShift) - kSeen;
  __device__ __forceinline__ int tile() const { return value >> kShift; }
  __device__ __forceinline__ bool last() const { return (value & kLast) != 0; }
  __device__ __forceinline__ bool masked() const { return (value & kMasked) != 0; }
  __device__ __forceinline__ bool seen_by(int warpgroup) const { return (value & kSeen << warpgroup) != 0; }
  __device__ __forceinline__ bool seen_behind_by(int warpgroup) const {
    return (value & kSeenBehind << warpgroup) != 0;
  }
  __device__ __forceinline__ bool special() const { return (value & (kMasked | kMapped)) != 0; }
};

template <int kKeys, int kWarpgroups>
class TileWalk {
 public:
  __device__ __forceinline__ TileWalk(const PrefillParams& params, const PrefillItem& item) {
    flags_ = params.score_map == ScoreMap::kNone ? 0 : TileNote::kMapped;
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
  }

  // The next of them, to all lanes. Not after the last, which always is for all.
  __device__ __forceinline__ TileNote take() {
    if (upcoming_ < 0) return {flags_ | TileNote::kMasked | kForAll};
    const int begin = upcoming_ * kKeys, end = begin + kKeys, masked_bit = masked_;
    const bool unmasked = bits_ != nullptr
                              ? masked_bit == 0
                              : (begin >= unmasked_.begin && end <= unmasked_.end) || end <= unmasked_global_;
    const int tile = upcoming_;
    step();
    const unsigned seen = __ballot_sync(kFullWarp, begin < sees_until_) * TileNote::kSeen & TileNote::kSeenByAll;
    return {tile << TileNote::kShift | flags_ | (unmasked ? 0 : TileNote::kMasked) |
            (upcoming_ < 0 ? kForAll : static_cast<int>(seen))};
  }

 private:
  static constexpr int kForAll = TileNote::kLast | TileNote::kSeenByAll;

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

  int next_ = 0, stop_ = 0, more_next_ = 0, more_stop_ = 0;  // tiles [stop, next), then [more_stop, more_next)
  Span unmasked_;                                            // keys that every row sees, if there are no bits; and
  int unmasked_global_ = 0;                                  // those below this
  const uint2* bits_ = nullptr;
  int sees_until_;
  int upcoming_ = -1, masked_ = 0;
  int flags_;  // of every note
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
