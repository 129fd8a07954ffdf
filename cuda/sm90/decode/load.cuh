// The loading warps of the decode kernel: they walk the CTA's chunks and keep the ring of KV tiles full, across items.
#pragma once

#include "cuda/common/async.cuh"
#include "cuda/common/online_softmax.cuh"
#include "cuda/sm90/decode/shared.cuh"

namespace heddle::cuda::decode {

// The keys of an entry, as the plan counted them.
__device__ __forceinline__ int keys_of(const Params& p, std::int64_t entry, int kv_len) {
  return p.tokens != nullptr ? __ldcg(p.counts + entry) : p.mask.visible(kv_len).count;
}

__device__ __forceinline__ int kv_len_of(const Params& p, std::int64_t request) {
  return min(max(__ldg(p.seq_lens + request), 0), p.max_kv_len);
}

// Which chunks this CTA works on: those of its own queue, then what others left in theirs. One loading warp asks.
class Queues {
 public:
  __device__ explicit Queues(const Params& p) : p_(p), cta_(static_cast<int>(blockIdx.x)) {
    if (p.shape.chunks_per_cta > 1) taken_ = __ldcg(p.queue + p.shape.ctas + 1);
  }

  // The next chunk, or -1; the same for all lanes.
  __device__ int take() {
    const auto count = static_cast<unsigned>(p_.shape.chunks_per_cta);
    if (first_) {
      first_ = false;
      return cta_ * p_.shape.chunks_per_cta;  // its first chunk nobody else may take
    }
    if (!p_.stealing) return taken_ < count ? cta_ * p_.shape.chunks_per_cta + static_cast<int>(taken_++) : -1;
    if (taken_ >= count) return -1;  // no queue has more than one chunk
    const int lane = static_cast<int>(threadIdx.x) % 32;
    while (cta_ >= 0) {
      unsigned n = 0;
      if (lane == 0) n = atomicAdd(p_.queue + cta_, 1u);
      n = __shfl_sync(kFullWarp, n, 0);
      if (n < count) return cta_ * p_.shape.chunks_per_cta + static_cast<int>(n);
      cta_ = find(count, lane);
    }
    return -1;
  }

 private:
  // A CTA with chunks left, looked for from this one on, a warp's worth at a time.
  __device__ int find(unsigned count, int lane) const {
    for (int first = 1; first < p_.shape.ctas; first += 32) {
      const int cta = (static_cast<int>(blockIdx.x) + first + lane) % p_.shape.ctas;
      const bool left = first + lane < p_.shape.ctas && __ldcg(p_.queue + cta) < count;
      const unsigned who = __ballot_sync(kFullWarp, left);
      if (who != 0) return __shfl_sync(kFullWarp, cta, __ffs(static_cast<int>(who)) - 1);
    }
    return -1;
  }

  const Params& p_;
  int cta_;
  bool first_ = true;
  unsigned taken_ = 1;
};

// What a loading warp does: slice `warp` of every tile.
template <class Config>
class Loader {
 public:
  using Shared = typename Config::Shared;

  __device__ Loader(const Params& p, Shared& shared, int warp)
      : p_(p), shared_(shared), warp_(warp), lane_(static_cast<int>(threadIdx.x) % 32), policy_(evict_first_policy()) {}

  __device__ void run() {
    Queues queues(p_);
    for (int index = next_chunk(queues); index >= 0; index = next_chunk(queues)) {
      const Chunk chunk = load_chunk(p_.chunks + index);
      for (Walk walk{chunk.begin}; walk.more(chunk);) {
        open(walk.at.unit);
        const Item item = walk.next(p_.shape, chunk, index, keys_, p_.max_splits);
        int begin = item.begin;
        do {
          push({item, begin, row_tile_, head_, request_, kv_len_, all_see_from_, all_see_to_});
          begin += kTileKeys;
        } while (begin < item.end);
      }
      push({});  // what is pending does not wait for the next chunk
    }
    finish();
    if (p_.stealing && warp_ == 0 && lane_ == 0) leave();
  }

 private:
  struct Tile {
    Item item{kNoUnit};
    int begin = 0, row_tile = 0, head = 0, request = 0, kv_len = 0, all_see_from = 0, all_see_to = 0;
  };

  __device__ static Chunk load_chunk(const Chunk* from) {
    Chunk chunk;
    const int4* words = reinterpret_cast<const int4*>(from);
    reinterpret_cast<int4*>(&chunk)[0] = __ldcg(words);
    reinterpret_cast<int4*>(&chunk)[1] = __ldcg(words + 1);
    return chunk;
  }

  // All loading warps get the same chunks in the same order.
  __device__ int next_chunk(Queues& queues) {
    if (!p_.stealing) return queues.take();
    if (warp_ == 0) {
      const int index = queues.take();
      if (lane_ == 0) shared_.next_chunk[parity_] = index;
    }
    named_barrier(kLoadBarrier, 32 * kLoadWarps);
    const int index = shared_.next_chunk[parity_];
    parity_ ^= 1;  // so the next answer may be written before all have read this one
    return index;
  }

  // Looks up the request and head of a unit and its number of keys.
  __device__ void open(unsigned unit) {
    if (unit == unit_) return;
    unit_ = unit;
    const auto per_entry = static_cast<unsigned>(p_.shape.units_per_entry);
    const unsigned entry = unit / per_entry;
    const int unit_in_entry = static_cast<int>(unit % per_entry);
    row_tile_ = unit_in_entry % p_.row_tiles;
    if (p_.tokens != nullptr) {
      request_ = static_cast<int>(entry / static_cast<unsigned>(p_.num_kv_heads));
      head_ = static_cast<int>(entry % static_cast<unsigned>(p_.num_kv_heads));
    } else {
      request_ = static_cast<int>(entry);
      head_ = unit_in_entry / p_.row_tiles;
    }
    if (entry == entry_) return;
    entry_ = entry;
    kv_len_ = kv_len_of(p_, request_);
    keys_ = keys_of(p_, entry, kv_len_);
    visible_ = p_.mask.visible(kv_len_);
    // The keys that every query sees, among the visible ones; those of a list are tested one by one.
    const int left = min(p_.mask.left, p_.mask.select_left), right = min(p_.mask.right, p_.mask.select_right);
    const int shift = visible_.globals - visible_.first;
    all_see_from_ = max(visible_.globals, kv_len_ - 1 - left + shift);
    all_see_to_ = p_.tokens != nullptr ? 0 : kv_len_ - p_.mask.num_queries + right + 1 + shift;
  }

  // Tiles are issued one behind: the places of a tile's keys are on their way while the one before is issued.
  __device__ void push(const Tile& tile) {
    const int row = lane_ % kSliceKeys, i = tile.begin + warp_ * kSliceKeys + row;
    int key = kNoKey, page = -1;
    unsigned slot = 0;
    if (tile.item.unit != kNoUnit && i < tile.item.end) {
      key = p_.tokens != nullptr
                ? __ldg(p_.tokens + tile.request * p_.tokens_batch_stride + tile.head * p_.tokens_head_stride + i)
                : visible_.key(i);
      if (static_cast<unsigned>(key) < static_cast<unsigned>(tile.kv_len)) {
        const unsigned index = static_cast<unsigned>(key) / p_.page_size;
        slot = static_cast<unsigned>(key) - index * p_.page_size;
        page = __ldg(p_.block_table + tile.request * p_.table_stride + index);
      } else {
        key = kNoKey;
      }
    }
    if (pending_.item.unit != kNoUnit) issue();
    pending_ = tile;
    key_ = key;
    page_ = page;
    slot_ = slot;
  }

  __device__ void issue() {
    auto& stage = shared_.stages[stage_];
    const Tile& tile = pending_;
    const bool inside = static_cast<unsigned>(page_) < p_.num_pages;
    std::uint32_t k_at = kNowhere, v_at = kNowhere;
    if (inside) {
      const auto page = static_cast<std::uint32_t>(page_), head = static_cast<std::uint32_t>(tile.head);
      k_at = page * p_.k_page_stride + head * p_.k_head_stride + slot_ * p_.k_slot_stride;
      v_at = page * p_.v_page_stride + head * p_.v_head_stride + slot_ * p_.v_slot_stride;
    }
    shared_.empty[stage_].wait(phase_ ^ 1);
    if (tile.begin + warp_ * kSliceKeys < tile.item.end) {  // slices beyond the end are not computed
      copy_rows(stage.k, p_.k, k_at);
      copy_rows(stage.v, p_.v, v_at);
      if (lane_ < kSliceKeys) {
        const int row = warp_ * kSliceKeys + lane_;
        stage.keys[row] = inside ? key_ : kNoKey;
        if (Config::Format::kScaled && p_.partition > 0) {
          const float* scale = p_.k_scale;
          if (inside) {
            scale += page_ * p_.k_scale_page_stride + tile.head * p_.k_scale_head_stride +
                     slot_ / static_cast<unsigned>(p_.partition) * p_.k_scale_group_stride;
          }
          copy4_async(shared_address(stage.k_scale + row), scale, inside ? 4 : 0);
        }
      }
    }
    if (warp_ == 0 && lane_ == 0) {
      stage.item = tile.item;
      stage.begin = tile.begin;
      stage.row_tile = tile.row_tile;
      stage.head = tile.head;
      stage.request = tile.request;
      stage.kv_len = tile.kv_len;
      stage.all_see_from = tile.all_see_from;
      stage.all_see_to = tile.all_see_to;
    }
    shared_.full[stage_].arrive_when_copied();
    __syncwarp();
    if (lane_ == 0) shared_.full[stage_].arrive();
    advance();
  }

  // The rows of this warp's slice, whose offsets lie in lanes 0 to 15.
  __device__ void copy_rows(char* to, const char* from, std::uint32_t at) {
    constexpr int kUnits = Config::kRowBytes / 16;  // 16-byte pieces of a row
    const std::uint32_t base = shared_address(to) + warp_ * kSliceKeys * Config::kPitch;
#pragma unroll 4
    for (int i = 0; i < kSliceKeys * kUnits / 32; ++i) {
      const int piece = i * 32 + lane_, row = piece / kUnits, column = piece % kUnits;
      const std::uint32_t offset = __shfl_sync(kFullWarp, at, row);
      const bool inside = offset != kNowhere;
      const char* source = from + (inside ? std::uint64_t{offset} * 16 + column * 16 : 0);
      copy16_async(base + row * Config::kPitch + column * 16, source, inside ? 16 : 0, policy_);
    }
  }

  __device__ void advance() {
    if (++stage_ == Config::kStages) {
      stage_ = 0;
      phase_ ^= 1;
    }
  }

  __device__ void finish() {
    shared_.empty[stage_].wait(phase_ ^ 1);
    if (warp_ == 0 && lane_ == 0) shared_.stages[stage_].item.unit = kNoUnit;
    shared_.full[stage_].arrive_when_copied();
    __syncwarp();
    if (lane_ == 0) shared_.full[stage_].arrive();
  }

  // The last CTA to find all queues empty fills them again, for the next launch with this plan.
  __device__ void leave() {
    unsigned* gone = p_.queue + p_.shape.ctas;
    if (atomicAdd(gone, 1u) + 1 != gridDim.x) return;
    for (int i = 0; i < p_.shape.ctas; ++i) p_.queue[i] = gone[1];
    *gone = 0;
  }

  static constexpr std::uint32_t kNowhere = 0xffffffffu;

  const Params& p_;
  Shared& shared_;
  int warp_, lane_;
  std::uint64_t policy_;
  int stage_ = 0, phase_ = 0, parity_ = 0;

  unsigned unit_ = kNoUnit, entry_ = kNoUnit;
  int row_tile_ = 0, head_ = 0, request_ = 0, kv_len_ = 0, keys_ = 0, all_see_from_ = 0, all_see_to_ = 0;
  VisibleKeys visible_;

  Tile pending_;
  int key_ = 0, page_ = 0;
  unsigned slot_ = 0;
};

}  // namespace heddle::cuda::decode
