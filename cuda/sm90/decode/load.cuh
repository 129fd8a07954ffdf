// The loading warps of the decode kernel: they walk the CTA's chunks and keep the ring of KV tiles full, across items.
#pragma once

#include "cuda/common/async.cuh"
#include "cuda/common/online_softmax.cuh"
#include "cuda/common/tma.cuh"
#include "cuda/sm90/decode/shared.cuh"

namespace heddle::cuda::decode {

// Which chunks this CTA works on: those of its own queue, then what others left in theirs. One loading warp asks.
class Queues {
 public:
  __device__ explicit Queues(const Params& p) : p_(p), cta_(static_cast<int>(blockIdx.x)) {}

  // The chunk after the first, or -1; the same for all lanes. per_cta: chunks of every queue.
  __device__ int take(int per_cta) {
    if (per_cta == 1) return -1;
    if (!p_.stealing) return taken_ < per_cta ? cta_ * per_cta + taken_++ : -1;
    const int lane = static_cast<int>(threadIdx.x) % 32;
    while (cta_ >= 0) {
      int n = 0;
      if (lane == 0) n = static_cast<int>(atomicAdd(p_.queue + cta_, 1u));
      n = __shfl_sync(kFullWarp, n, 0);
      if (n < per_cta) return cta_ * per_cta + n;
      cta_ = find(per_cta, lane);
    }
    return -1;
  }

 private:
  // A CTA with chunks left, looked for from this one on, a warp's worth at a time.
  __device__ int find(int per_cta, int lane) const {
#pragma unroll 1
    for (int first = 1; first < p_.shape.ctas; first += 32) {
      const int cta = (static_cast<int>(blockIdx.x) + first + lane) % p_.shape.ctas;
      const bool left = first + lane < p_.shape.ctas && static_cast<int>(__ldcg(p_.queue + cta)) < per_cta;
      const unsigned who = __ballot_sync(kFullWarp, left);
      if (who != 0) return __shfl_sync(kFullWarp, cta, __ffs(static_cast<int>(who)) - 1);
    }
    return -1;
  }

  const Params& p_;
  int cta_, taken_ = 1;
};

// Slices that are not copied whole, and scales by token, are written by copies of every thread.
__device__ inline bool copies_by_thread(const Params& p) { return !p.whole_slices || p.partition > 0; }
// What fills a stage: one arrival of each warp, for its bulk copies and other writes, beside the copies of its threads.
__device__ inline int full_arrivals(const Params& p) { return (copies_by_thread(p) ? 33 : 1) * kLoadWarps; }

// What a loading warp does: one or two slices of every tile, of one of the unit's heads.
template <class Config>
class Loader {
 public:
  using Shared = typename Config::Shared;
  static constexpr int kWarpKeys = kSliceKeys * Config::kWarpSlices;

  __device__ Loader(const Params& p, Shared& shared, int warp)
      : p_(p),
        shared_(shared),
        warp_(warp),
        tile_keys_(Config::kTileKeys / p.unit_heads),
        head_in_unit_(warp * p.unit_heads / kLoadWarps),
        first_row_(warp * kWarpKeys % tile_keys_),
        lane_(static_cast<int>(threadIdx.x) % 32),
        policy_(evict_first_policy()),
        queues_(p) {}

  // Tiles are issued one behind, so that the places of a tile's keys are on their way while the one before is issued.
  __device__ void run() {
    chunk_ = load_chunk(p_.own + blockIdx.x);
    most_in_flight_ = min(Config::kInFlight + (chunk_.per_cta > 1), Config::kStages);
    walk_.at = chunk_.begin;
    Tile pending;
    Row pending_row;
#pragma unroll 1
    for (bool more = true; more;) {
      Tile tile;
      more = next(tile);
      const Row row = look_up(tile);
      if (pending.keys >= 0) issue(pending, pending_row);
      pending = tile;
      pending_row = row;
    }
    announce({});
    if (p_.stealing && warp_ == 0 && lane_ == 0) leave();
  }

 private:
  // A tile of an item, from `begin` on; `keys` of the item are left (0 for an empty one). keys < 0: no tile.
  struct Tile {
    int begin = 0, keys = -1, head = 0, request = 0;
  };

  // Where the key of one of the warp's rows lies. With one slice a warp, lanes l and l + 16 know the same row.
  struct Row {
    int key = kNoKey, page = -1;
    unsigned slot = 0;
  };

  __device__ static Chunk load_chunk(const Chunk* from) {
    Chunk chunk;
    const int4* words = reinterpret_cast<const int4*>(from);
    reinterpret_cast<int4*>(&chunk)[0] = __ldcg(words);
    reinterpret_cast<int4*>(&chunk)[1] = __ldcg(words + 1);
    return chunk;
  }

  // The next tile. At the end of a chunk comes one that is none, so that what is pending does not wait for the next
  // chunk. False after the last one.
  __device__ bool next(Tile& tile) {
    if (begin_ + tile_keys_ < item_.end) {
      begin_ += tile_keys_;
    } else if (walk_.more(chunk_)) {
      open(walk_.at.unit);
      item_ = walk_.next(p_.shape, chunk_, keys_, p_.max_splits);
      begin_ = item_.begin;
      flushed_ = false;
      announce({item_, row_tile_, head_, request_, kv_len_, all_see_from_, all_see_to_});
    } else if (!flushed_) {
      flushed_ = true;
      item_.end = begin_ = 0;
      return true;
    } else {
      const int index = next_chunk();
      if (index < 0) return false;
      chunk_ = load_chunk(p_.chunks + index);
      walk_.at = chunk_.begin;
      return true;
    }
    tile = {begin_, item_.end - begin_, head_, request_};
    return true;
  }

  // Tells the computing warps what comes.
  __device__ void announce(const Work& work) {
    if (warp_ != 0) return;
    shared_.work_empty[work_].wait(work_phase_ ^ 1);
    if (lane_ == 0) {
      shared_.works[work_] = work;
      shared_.work_full[work_].arrive();
    }
    if (++work_ == kWorks) {
      work_ = 0;
      work_phase_ ^= 1;
    }
  }

  // All loading warps get the same chunks in the same order.
  __device__ int next_chunk() {
    if (!p_.stealing) return queues_.take(chunk_.per_cta);
    if (warp_ == 0) {
      const int index = queues_.take(chunk_.per_cta);
      if (lane_ == 0) shared_.next_chunk[parity_] = index;
    }
    named_sync(kLoadBarrier, 32 * kLoadWarps);
    const int index = shared_.next_chunk[parity_];
    parity_ ^= 1;  // so the next answer may be written before all have read this one
    return index;
  }

  // Looks up the request and head of a unit and its number of keys.
  __device__ void open(unsigned unit) {
    if (unit == unit_) return;
    unit_ = unit;
    unsigned row_tile = unit;
    const unsigned entry = p_.by.units_per_entry.divide(row_tile), pair = p_.by.row_tiles.divide(row_tile);
    row_tile_ = static_cast<int>(row_tile);
    if (p_.list != nullptr) {
      unsigned head = entry;
      request_ = static_cast<int>(p_.by.num_kv_heads.divide(head));
      head_ = static_cast<int>(head);
    } else {
      request_ = static_cast<int>(entry);
      head_ = static_cast<int>(pair) * p_.unit_heads;
    }
    if (entry == entry_) return;
    entry_ = entry;
    const bool known = unit == chunk_.begin.unit;  // the plan left them with the chunk
    kv_len_ = known ? chunk_.kv_len : kv_len_of(p_, request_);
    visible_ = p_.mask.visible(kv_len_);
    keys_ = known ? chunk_.keys : p_.list != nullptr ? __ldcg(p_.counts + entry) : visible_.count;
    // The keys that every query sees, among the visible ones; those of a list are tested one by one.
    const int left = min(p_.mask.left, p_.mask.select_left), right = min(p_.mask.right, p_.mask.select_right);
    const int shift = visible_.globals - visible_.first;
    all_see_from_ = max(visible_.globals, kv_len_ - 1 - left + shift);
    all_see_to_ = p_.list != nullptr ? 0 : kv_len_ - p_.mask.num_queries + right + 1 + shift;
  }

  __device__ const std::int32_t* list_of(int request, int head) const {
    return p_.list + request * p_.list_batch_stride + head * p_.list_head_stride;
  }

  // Entry i of the tile's list. The one that the same row of the item's next tile needs is on its way since the tile
  // before, so that finding a page is one trip to memory a tile, not two.
  __device__ int listed(const Tile& tile, int at, int i) {
    const std::int32_t* list = list_of(tile.request, tile.head);
    const auto entry = [&](int key) { return __ldg(list + p_.by.list_keys.quotient(static_cast<unsigned>(key))); };
    const int here = tile.begin == item_.begin ? entry(i) : next_entry_;
    if (at + tile_keys_ < tile.keys) next_entry_ = entry(i + tile_keys_);
    return here;
  }

  __device__ Row look_up(const Tile& tile) {
    Row row;
    const int at = first_row_ + lane_ % kWarpKeys, i = tile.begin + at;
    if (at >= tile.keys) return row;
    int key;
    if (p_.list == nullptr) {
      key = visible_.key(i);
    } else if (p_.list_keys == 1) {
      key = listed(tile, at, i);
    } else {
      const unsigned entry = p_.by.list_keys.quotient(static_cast<unsigned>(i));
      const auto page = static_cast<unsigned>(listed(tile, at, i));
      if (page > p_.by.list_keys.quotient(static_cast<unsigned>(kv_len_))) return row;  // it may be any number
      key = static_cast<int>((page - entry) * p_.list_keys) + i;
    }
    if (static_cast<unsigned>(key) >= static_cast<unsigned>(kv_len_)) return row;
    row.key = key;
    row.slot = static_cast<unsigned>(key);
    const unsigned index = p_.by.page_size.divide(row.slot);
    row.page = __ldg(p_.block_table + tile.request * p_.table_stride + index);
    return row;
  }

  // Fills the next stage.
  __device__ void issue(const Tile& tile, const Row& row) {
    auto& stage = shared_.stages[stage_];
    Barrier& full = shared_.full[stage_];
    const bool inside = static_cast<unsigned>(row.page) < p_.num_pages;
    // Slices beyond the end are not computed.
    const int slices = min((tile.keys - first_row_ + kSliceKeys - 1) / kSliceKeys, Config::kWarpSlices);
    const bool wanted = lane_ < slices * kSliceKeys;
    if (in_flight_ == most_in_flight_) {
      shared_.full[landing_].wait(landing_phase_);
      if (++landing_ == Config::kStages) {
        landing_ = 0;
        landing_phase_ ^= 1;
      }
    } else {
      ++in_flight_;
    }
    shared_.empty[stage_].wait(phase_ ^ 1);
    if (!p_.whole_slices) copy_slices(stage, tile, row, inside, slices);
    if (wanted) {
      const int at = warp_ * kWarpKeys + lane_;
      stage.keys[at] = inside ? row.key : kNoKey;
      if (Config::Format::kScaled && p_.partition > 0) {
        const float* scale = p_.k_scale;
        if (inside) {
          scale += row.page * p_.k_scale_page_stride + (tile.head + head_in_unit_) * p_.k_scale_head_stride +
                   p_.by.partition.quotient(row.slot) * p_.k_scale_group_stride;
        }
        copy4_async(shared_address(stage.k_scale + at), scale, inside ? 4 : 0);
      }
    }
    if (copies_by_thread(p_)) full.arrive_when_copied();
    __syncwarp();
    if (lane_ == 0) {
      if (p_.whole_slices && slices > 0) {
        full.arrive_expecting(slices * 2 * Config::kSliceBytes);
      } else {
        full.arrive();
      }
    }
    if (p_.whole_slices) {
      __syncwarp();
      if (wanted && lane_ % kSliceKeys == 0) {
        // This lane knows the place of the first of 16 keys of one page. A page that is not in the cache is zeros.
        const int slot = static_cast<int>(row.slot), head = tile.head + head_in_unit_;
        const int slice = warp_ * Config::kWarpSlices + lane_ / kSliceKeys;
        load_box(p_.k_map, full, stage.k[slice], CacheHint::kEvictFirst, 0, slot, 0, head, row.page);
        load_box(p_.v_map, full, stage.v[slice], CacheHint::kEvictFirst, 0, slot, 0, head, row.page);
      }
    }
    advance();
  }

  __device__ void copy_slices(typename Config::Stage& stage, const Tile& tile, const Row& row, bool inside,
                              int slices) {
    std::uint32_t k_at = kNowhere, v_at = kNowhere;
    if (inside) {
      const auto page = static_cast<std::uint32_t>(row.page);
      const auto head = static_cast<std::uint32_t>(tile.head + head_in_unit_);
      k_at = page * p_.k_page_stride + head * p_.k_head_stride + row.slot * p_.k_slot_stride;
      v_at = page * p_.v_page_stride + head * p_.v_head_stride + row.slot * p_.v_slot_stride;
    }
#pragma unroll 1
    for (int i = 0; i < slices; ++i) {
      const int slice = warp_ * Config::kWarpSlices + i;
      const std::uint32_t k_of_slice = __shfl_sync(kFullWarp, k_at, i * kSliceKeys + lane_ % kSliceKeys);
      const std::uint32_t v_of_slice = __shfl_sync(kFullWarp, v_at, i * kSliceKeys + lane_ % kSliceKeys);
      if (p_.fetch_ahead) {
        copy_rows<true>(stage.k[slice], p_.k, k_of_slice);
        copy_rows<true>(stage.v[slice], p_.v, v_of_slice);
      } else {
        copy_rows<false>(stage.k[slice], p_.k, k_of_slice);
        copy_rows<false>(stage.v[slice], p_.v, v_of_slice);
      }
    }
  }

  // The rows of a slice, whose offsets lie in lanes 0 to 15.
  template <bool kAhead>
  __device__ void copy_rows(char* to, const char* from, std::uint32_t at) {
    constexpr int kUnits = Config::kRowBytes / 16;  // 16-byte pieces of a row
    const std::uint32_t base = shared_address(to);
    const auto copy = [&](int row, int column, std::uint32_t there) {
      const std::uint32_t offset = __shfl_sync(kFullWarp, at, row);
      const bool inside = offset != kNowhere;
      const char* source = from + (inside ? std::uint64_t{offset} * 16 + column * 16 : 0);
      copy16_async<kAhead>(there, source, inside ? 16 : 0, policy_);
    };
    const auto place = [&](int row, int column) {
      return Config::step_from(base + Config::row_offset(row, column % 2), column / 2);
    };
    if constexpr (32 % kUnits == 0) {
      // Lanes stay in their column; a step of rows only moves the place and exchanges units.
      constexpr int kRows = 32 / kUnits;
      const int row = lane_ / kUnits, column = lane_ % kUnits;
      const std::uint32_t there = place(row, column);
#pragma unroll
      for (int i = 0; i < kSliceKeys; i += kRows) {
        copy(i + row, column, (there ^ (i * Config::kBand / 128 % Config::kBandUnits << 4)) + i * Config::kBand);
      }
    } else {
#pragma unroll 4
      for (int i = 0; i < kSliceKeys * kUnits / 32; ++i) {
        const int piece = i * 32 + lane_, row = piece / kUnits, column = piece % kUnits;
        copy(row, column, place(row, column));
      }
    }
  }

  __device__ void advance() {
    if (++stage_ == Config::kStages) {
      stage_ = 0;
      phase_ ^= 1;
    }
  }

  // The last CTA to find all queues empty fills them again, for the next launch with this plan.
  __device__ void leave() {
    unsigned* gone = p_.queue + p_.shape.ctas;
    if (atomicAdd(gone, 1u) + 1 != gridDim.x) return;
    for (int i = 0; i < p_.shape.ctas; ++i) p_.queue[i] = 1;
    *gone = 0;
  }

  static constexpr std::uint32_t kNowhere = 0xffffffffu;

  const Params& p_;
  Shared& shared_;
  int warp_, tile_keys_, head_in_unit_, first_row_, lane_;  // first_row_: of the warp, among its head's keys of a tile
  std::uint64_t policy_;
  int stage_ = 0, phase_ = 0, parity_ = 0;
  int most_in_flight_ = 0, in_flight_ = 0, landing_ = 0, landing_phase_ = 0;  // stages being filled, the first of them

  Queues queues_;
  Chunk chunk_;
  Walk walk_;
  Item item_;
  int begin_ = 0, work_ = 0, work_phase_ = 0;
  bool flushed_ = false;
  int next_entry_ = 0;

  unsigned unit_ = kNoUnit, entry_ = kNoUnit;
  int row_tile_ = 0, head_ = 0, request_ = 0, kv_len_ = 0, keys_ = 0, all_see_from_ = 0, all_see_to_ = 0;
  VisibleKeys visible_;
};

}  // namespace heddle::cuda::decode
