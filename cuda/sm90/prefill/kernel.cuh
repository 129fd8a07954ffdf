// Attention of many queries, 16-bit elements, on Hopper: out = softmax(scale q k^T) v over the KV tiles that the
// worklist names.
//
// Roles: the warps of warpgroup 0 feed. The planner takes row tiles from the schedule and names their KV tiles; three
// loaders have Q, K and V copied by TMA, each as far ahead as its shared memory goes, over the ends of row tiles too.
// The other warpgroups multiply: 64 rows each of the same row tile. For KV tile t a warpgroup issues S = Q K_t^T and O
// += P V_(t-1) together, then turns S into the next P. They take turns in issuing, so that the tensor cores have one's
// products while another is at its softmax; where there are two, the softmax also runs beside the warpgroup's own
// second product. Data: Q, K and V go through shared memory in chunks of 64 elements with the 128-byte swizzle; S, P
// and O stay in registers, and O is written from there or, where there is room, by way of shared memory. Limit: 4 x
// pairs x dim operations over the rate of the tensor cores.
#pragma once

#include "cuda/common/tma.cuh"
#include "cuda/common/wgmma.cuh"
#include "cuda/sm90/prefill/config.h"
#include "cuda/sm90/prefill/exact.cuh"
#include "cuda/sm90/prefill/params.h"
#include "cuda/sm90/prefill/schedule.cuh"
#include "cuda/sm90/prefill/softmax.cuh"
#include "cuda/sm90/prefill/worklist.cuh"

namespace heddle::cuda {

inline constexpr int kItemSlots = 2, kNoteSlots = 8;

template <class Config>
struct alignas(1024) PrefillShared {
  std::uint8_t q[Config::kQStages][Config::kChunks][Config::kQChunkBytes];
  std::uint8_t k[Config::kStages][Config::kChunks][Config::kKvChunkBytes];
  std::uint8_t v[Config::kStages][Config::kChunksV][Config::kKvChunkBytes];
  std::uint8_t out[Config::kStoresBoxes ? Config::kChunksV : 0][Config::kOutChunkBytes];
  Barrier q_full[Config::kQStages], q_empty[Config::kQStages];
  Barrier k_full[Config::kStages], k_empty[Config::kStages];
  Barrier v_full[Config::kStages], v_empty[Config::kStages];
  Barrier item_full[kItemSlots], item_empty[kItemSlots];
  PrefillItem item[kItemSlots];
  Barrier note_full[kNoteSlots], note_empty[kNoteSlots];
  int item_valid[kItemSlots];   // 0: the end
  int note[kNoteSlots];         // from the planner to the loaders of keys and of values
  int k_note[Config::kStages];  // of the key tiles that lie in k
};

// ---- the planning warp ----------------------------------------------------------------------------------------------

// Takes row tiles from the schedule and says which KV tiles each of them visits.
template <class Config>
class PrefillPlanner {
 public:
  __device__ __forceinline__ PrefillPlanner(const PrefillParams& params, PrefillShared<Config>& shared)
      : params_(params), shared_(shared) {}

  __device__ __forceinline__ void run() {
    ItemQueue queue(params_);
    for (int index = queue.pop(); index >= 0; index = queue.pop()) {
      shared_.item_empty[slot_.stage()].wait(slot_.parity() ^ 1);
      if (lane() == 0) shared_.item[slot_.stage()] = queue.item(index);
      __syncwarp();
      TileWalk<Config::kKeys, Config::kWarpgroups, Config::kTwoSets> walk(params_, shared_.item[slot_.stage()]);
      announce(true);
      TileNote note{0};
      do {
        note = walk.take();
        shared_.note_empty[note_.stage()].wait(note_.parity() ^ 1);
        if (lane() == 0) {
          shared_.note[note_.stage()] = note.value;
          shared_.note_full[note_.stage()].arrive();
        }
        __syncwarp();
        note_.advance();
      } while (!note.last());
    }
    shared_.item_empty[slot_.stage()].wait(slot_.parity() ^ 1);
    announce(false);
    queue.finish();
  }

 private:
  __device__ __forceinline__ static int lane() { return static_cast<int>(threadIdx.x) % 32; }
  __device__ __forceinline__ void announce(bool valid) {
    if (lane() == 0) {
      shared_.item_valid[slot_.stage()] = valid;
      shared_.item_full[slot_.stage()].arrive();
    }
    __syncwarp();
    slot_.advance();
  }

  const PrefillParams& params_;
  PrefillShared<Config>& shared_;
  RingPosition<kNoteSlots> note_;
  RingPosition<kItemSlots> slot_;
};

// ---- the loading warps ----------------------------------------------------------------------------------------------

// One warp each for queries, keys and values, so that none waits for what another's memory is needed for.
template <class Config>
class PrefillLoader {
 public:
  __device__ __forceinline__ PrefillLoader(const PrefillParams& params, PrefillShared<Config>& shared)
      : params_(params), shared_(shared), lane_(static_cast<int>(threadIdx.x) % 32) {}

  __device__ __forceinline__ void load_queries() {
    while (const PrefillItem* item = next_item()) {
      load_q(*item);
      release_item();
    }
  }
  __device__ __forceinline__ void load_keys() { load_tiles<true>(); }
  __device__ __forceinline__ void load_values() { load_tiles<false>(); }

 private:
  template <bool kOfKeys>
  __device__ __forceinline__ void load_tiles() {
    while (const PrefillItem* item = next_item()) {
      TileNote note{0};
      do {
        note = next_note();
        if constexpr (kOfKeys) {
          load_k(*item, note);
        } else {
          load_v(*item, note.tile());
        }
      } while (!note.last());
      release_item();
    }
  }
  // Null after the last.
  __device__ __forceinline__ const PrefillItem* next_item() {
    shared_.item_full[slot_.stage()].wait(slot_.parity());
    return shared_.item_valid[slot_.stage()] != 0 ? &shared_.item[slot_.stage()] : nullptr;
  }
  __device__ __forceinline__ void release_item() {
    __syncwarp();
    if (lane_ == 0) shared_.item_empty[slot_.stage()].arrive();
    slot_.advance();
  }
  __device__ __forceinline__ TileNote next_note() {
    shared_.note_full[note_.stage()].wait(note_.parity());
    const TileNote note{shared_.note[note_.stage()]};
    __syncwarp();
    if (lane_ == 0) shared_.note_empty[note_.stage()].arrive();
    note_.advance();
    return note;
  }

  __device__ __forceinline__ void load_q(const PrefillItem& item) {
    const int rows = params_.schedule.queries_per_tile * params_.packed_heads;
    Barrier& full = shared_.q_full[q_.stage()];
    shared_.q_empty[q_.stage()].wait(q_.parity() ^ 1);
    if (lane_ == 0) full.arrive_expecting(Config::kChunks * rows * kChunkRowBytes);
    __syncwarp();
    if (lane_ < Config::kChunks) {
      load_box(params_.q_map, full, shared_.q[q_.stage()][lane_], CacheHint::kEvictFirst, lane_ * kChunkElements, 0,
               item.q_first + item.first_query, item.q_head / params_.packed_heads, item.q_page);
    }
    __syncwarp();
    q_.advance();
  }
  __device__ __forceinline__ void load_k(const PrefillItem& item, TileNote note) {
    shared_.k_empty[k_.stage()].wait(k_.parity() ^ 1);
    if (lane_ == 0) {
      shared_.k_note[k_.stage()] = note.value;
      shared_.k_full[k_.stage()].arrive_expecting(item.kv_len > 0 ? Config::kChunks * Config::kKvChunkBytes : 0);
    }
    __syncwarp();
    load_tile<Config::kChunks>(params_.k_map, shared_.k_full[k_.stage()], shared_.k[k_.stage()], item, note.tile());
    k_.advance();
  }
  __device__ __forceinline__ void load_v(const PrefillItem& item, int tile) {
    shared_.v_empty[v_.stage()].wait(v_.parity() ^ 1);
    if (lane_ == 0) {
      shared_.v_full[v_.stage()].arrive_expecting(item.kv_len > 0 ? Config::kChunksV * Config::kKvChunkBytes : 0);
    }
    __syncwarp();
    load_tile<Config::kChunksV>(params_.v_map, shared_.v_full[v_.stage()], shared_.v[v_.stage()], item, tile);
    v_.advance();
  }

  template <int kChunks>
  __device__ __forceinline__ void load_tile(const CUtensorMap& map, Barrier& full,
                                            std::uint8_t (&to)[kChunks][Config::kKvChunkBytes], const PrefillItem& item,
                                            int tile) {
    if (item.kv_len == 0) return;  // there may be no memory to read: what lies in the stage is masked and cleared
    const int head = item.q_head / params_.group, first = tile * Config::kKeys;
    if (params_.page_size == 0) {
      if (lane_ < kChunks) {
        load_box(map, full, to[lane_], CacheHint::kEvictLast, lane_ * kChunkElements, item.k_first + first, head,
                 item.q_page);
      }
    } else {
      // A lane a chunk of a box. Boxes behind the last key bring some key again: what lies there is read by nobody.
      const int pieces = Config::kKeys / params_.box_keys * kChunks;
      const std::int32_t* table = params_.block_table + item.request * params_.table_stride;
#pragma unroll 1
      for (int i = lane_; i < pieces; i += 32) {
        const int key = i / kChunks * params_.box_keys, chunk = i % kChunks;
        const int token = min(first + key, (item.kv_len - 1) / params_.box_keys * params_.box_keys);
        const int page = __ldg(table + token / params_.page_size);
        load_box(map, full, to[chunk] + key * kChunkRowBytes, CacheHint::kEvictLast, chunk * kChunkElements,
                 token % params_.page_size, head, page);
      }
    }
    __syncwarp();
  }

  const PrefillParams& params_;
  PrefillShared<Config>& shared_;
  int lane_;
  RingPosition<Config::kQStages> q_;
  RingPosition<Config::kStages> k_, v_;
  RingPosition<kNoteSlots> note_;
  RingPosition<kItemSlots> slot_;
};

// ---- a multiplying warpgroup ----------------------------------------------------------------------------------------

template <class Config>
class PrefillConsumer {
 public:
  using T = typename Config::Element;
  static constexpr int kKeys = Config::kKeys, kDimV = Config::kDimV;

  __device__ __forceinline__ PrefillConsumer(const PrefillParams& params, PrefillShared<Config>& shared)
      : params_(params),
        shared_(shared),
        warpgroup_(__shfl_sync(kFullWarp, static_cast<int>(threadIdx.x) / 128 - 1, 0)),
        queries_(k_major(shared.q[0][0] + warpgroup_ * 64 * kChunkRowBytes)) {}

  __device__ __forceinline__ void run() {
    if (warpgroup_ == Config::kWarpgroups - 1) pass_turn();  // the first turn is warpgroup 0's
    float s[kKeys / 2];
    bool valid = begin(s);
    while (valid) {
      const PrefillItem& item = shared_.item[slot_.stage()];
      float o[kDimV / 2];
#pragma unroll
      for (int i = 0; i < kDimV / 2; ++i) o[i] = 0.0f;
      RowState state;
      valid = multiply(item, s, o, state);
      finish(item, o, state, [&] {
        if constexpr (!Config::kOverlapEnds) valid = begin(s);
      });
      __syncwarp();
      if (elect_one()) shared_.item_empty[slot_.previous()].arrive();
    }
    wgmma_wait<0>();
    if constexpr (Config::kStoresBoxes) await_stores();
    if (warpgroup_ == 0) await_turn();  // the last turn that was passed
  }

 private:
  // Issues the scores of the next row tile's first KV tile. If there is none it returns false and those are of whatever
  // lies there: products have to be issued in any case for others to run on over the place.
  __device__ __forceinline__ bool begin(float (&s)[kKeys / 2]) {
    shared_.item_full[slot_.stage()].wait(slot_.parity());
    const bool valid = __shfl_sync(kFullWarp, shared_.item_valid[slot_.stage()], 0) != 0;
    if (valid) {
      shared_.q_full[q_stage()].wait(q_parity());
      shared_.k_full[k_.stage()].wait(k_.parity());
    }
    wgmma_fence();
    issue_scores(s);
    wgmma_commit();
    return valid;
  }
  // A row tile whose first scores were issued. With kOverlapEnds: whether another follows; its first scores are issued.
  __device__ __forceinline__ bool multiply(const PrefillItem& item, float (&s)[kKeys / 2], float (&o)[kDimV / 2],
                                           RowState& state) {
    std::uint32_t p[kKeys / 4];
    TileNote note = skip(s);
    const SeenBits<kKeys / 4> seen = look_at(item, note);
    wgmma_wait<0>();
    pin(s);
    release_scores(note);
    const bool behind = note.seen_behind_by(warpgroup_);
    prepare_first(note, seen, s, state, behind);
    state.template start<T, !Config::kTwoSets>(s, params_.scale_log2, p, behind);
    await_keys(note);
    if constexpr (Config::kTwoSets) {
      std::uint32_t other[kKeys / 4];
      while (true) {
        if (note.last()) return multiply_last(item, note, s, p, o);
        note = step(item, note, s, p, other, o, state);
        if (note.last()) return multiply_last(item, note, s, other, o);
        note = step(item, note, s, other, p, o, state);
      }
    } else {
      while (!note.last()) note = step(item, note, s, p, p, o, state);
      return multiply_last(item, note, s, p, o);
    }
  }

  // Passes over the tiles in front that none of the warpgroup's rows sees, and returns the first other one.
  __device__ __forceinline__ TileNote skip(float (&s)[kKeys / 2]) {
    TileNote note = read_note();
    while (!note.seen_by(warpgroup_)) {
      wgmma_wait<0>();
      pin(s);
      release_scores(note);
      shared_.v_full[v_.stage()].wait(v_.parity());
      release(shared_.v_empty, v_);
      await_keys(note);
      await_turn();
      wgmma_fence();
      issue_scores(s);
      wgmma_commit();
      pass_turn();
      note = read_note();
    }
    return note;
  }

  // The scores of the next tile, and the output of the one that `note` names. p_next may be p where there is one set.
  __device__ __forceinline__ TileNote step(const PrefillItem& item, TileNote note, float (&s)[kKeys / 2],
                                           std::uint32_t (&p)[kKeys / 4], std::uint32_t (&p_next)[kKeys / 4],
                                           float (&o)[kDimV / 2], RowState& state) {
    float decay[2];
    await_turn();
    pin(o);
    pin(p);
    wgmma_fence();
    issue_scores(s);
    wgmma_commit();
    shared_.v_full[v_.stage()].wait(v_.parity());
    clear_behind(item, note);
    wgmma_fence();
    issue_output(o, p);
    wgmma_commit();
    const TileNote next = read_note();
    const SeenBits<kKeys / 4> seen = look_at(item, next);
    wgmma_wait<1>();
    pin(s);
    pass_turn();
    release_scores(next);
    prepare(next, seen, s);
    bool moved = false;
    if constexpr (Config::kTwoSets) {
      moved = state.template update<T, Config::kSpeculative>(s, params_.scale_log2, p_next, decay);
      pin(p_next);  // all of this before the wait, not after
      await_keys(next);
      finish_output(o, p);
    } else {
      finish_output(o, p);
      moved = state.template update<T, Config::kSpeculative>(s, params_.scale_log2, p_next, decay);
      await_keys(next);
    }
    if (moved) rescale(o, decay);
    return next;
  }
  __device__ __forceinline__ void finish_output(float (&o)[kDimV / 2], std::uint32_t (&p)[kKeys / 4]) {
    wgmma_wait<0>();
    pin(o);
    pin(p);
    release(shared_.v_empty, v_);
  }
  // The last product, and with kOverlapEnds beside it the first of the next row tile, which runs on.
  __device__ __forceinline__ bool multiply_last(const PrefillItem& item, TileNote note, float (&s)[kKeys / 2],
                                                std::uint32_t (&p)[kKeys / 4], float (&o)[kDimV / 2]) {
    shared_.v_full[v_.stage()].wait(v_.parity());
    await_turn();
    clear_behind(item, note);
    pin(o);
    pin(p);
    wgmma_fence();
    issue_output(o, p);
    wgmma_commit();
    slot_.advance();
    bool more = true;
    if constexpr (Config::kOverlapEnds) more = begin(s);
    pass_turn();
    wgmma_wait<Config::kOverlapEnds ? 1 : 0>();
    pin(o);
    pin(p);
    release(shared_.v_empty, v_);
    return more;
  }

  // The keys after those that `note` names, if there are any.
  __device__ __forceinline__ void await_keys(TileNote note) {
    if (!note.last()) shared_.k_full[k_.stage()].wait(k_.parity());
  }
  // All lanes read the same; the shuffle tells the compiler so, which then lets products run on over branches.
  __device__ __forceinline__ TileNote read_note() const {
    return {__shfl_sync(kFullWarp, shared_.k_note[k_.stage()], 0)};
  }

  __device__ __forceinline__ void issue_scores(float (&s)[kKeys / 2]) {
    const Operand q = queries_ + q_stage() * Config::kChunks * Config::kQChunkBytes;
    const Operand k = k_major(shared_.k[k_.stage()][0]);
#pragma unroll
    for (int step = 0; step < Config::kDim / 16; ++step) {
      const int chunk = step / 4, inside = step % 4 * 32;
      wgmma_ss<T, kKeys>(s, q + (chunk * Config::kQChunkBytes + inside), k + (chunk * Config::kKvChunkBytes + inside),
                         step > 0);
    }
  }
  __device__ __forceinline__ void issue_output(float (&o)[kDimV / 2], const std::uint32_t (&p)[kKeys / 4]) {
    const Operand v = mn_major(shared_.v[v_.stage()][0], Config::kKvChunkBytes);
#pragma unroll
    for (int step = 0; step < kKeys / 16; ++step) {
      wgmma_rs<T, kDimV>(o, p + 4 * step, v + (step * 16 * kChunkRowBytes));
    }
  }

  // What rows see of a tile, while its scores are still being computed.
  __device__ __forceinline__ SeenBits<kKeys / 4> look_at(const PrefillItem& item, TileNote note) const {
    SeenBits<kKeys / 4> seen;
    if (note.masked()) {
      const int queries[2] = {query_of(item, row()), query_of(item, row() + 8)};
      const int key = note.tile() * kKeys + accumulator_column(thread());
      if constexpr (Config::kGeneral) {
        Visibility visibility(params_.pattern, item.q_len, item.kv_len);
        if (params_.pattern.kind == PatternKind::kBlockMask) visibility.set_mask(item.request, item.q_head);
        seen.set(visibility, queries, key);
      } else {
        seen.set(item, note, params_.pattern.num_global, queries, key);
      }
    }
    seen.pin();
    return seen;
  }
  // Softcap and masks.
  __device__ __forceinline__ void prepare(TileNote note, const SeenBits<kKeys / 4>& seen, float (&s)[kKeys / 2]) const {
    if (!note.special()) return;
    if constexpr (Config::kGeneral) map_scores(s, params_.score_map, params_.map_factor);
    if (note.masked()) seen.template apply<0, kKeys / 4>(s);
  }
  // The same of a row tile's first KV tile. !behind: the second half is not needed.
  __device__ __forceinline__ void prepare_first(TileNote note, const SeenBits<kKeys / 4>& seen, float (&s)[kKeys / 2],
                                                RowState& state, bool behind) const {
    if (!note.special()) return;
    if constexpr (Config::kGeneral) map_scores(s, params_.score_map, params_.map_factor);
    if (!note.masked()) return;
    if constexpr (!Config::kTwoSets) state.look_ahead(s);
    seen.template apply<0, kKeys / 8>(s);
    if (behind) seen.template apply<kKeys / 8, kKeys / 4>(s);
  }
  __device__ __forceinline__ void rescale(float (&o)[kDimV / 2], const float (&decay)[2]) const {
#pragma unroll
    for (int i = 0; i < kDimV / 2; ++i) o[i] *= decay[i / 2 % 2];
  }

  // Values behind the last key are multiplied by probabilities of 0, which is not enough if they are not numbers.
  __device__ __forceinline__ void clear_behind(const PrefillItem& item, TileNote note) {
    if (!note.ragged()) return;
    const int keys = max(item.kv_len - note.tile() * kKeys, 0);
    constexpr int kWords = kChunkRowBytes / 16;
    for (int i = keys * kWords + thread(); i < kKeys * kWords; i += 128) {
#pragma unroll
      for (int chunk = 0; chunk < Config::kChunksV; ++chunk) {
        *reinterpret_cast<uint4*>(shared_.v[v_.stage()][chunk] + i * 16) = uint4{};
      }
    }
    fence_async_proxy();
    named_sync(kClearBarrier + warpgroup_, 128);
  }

  // ---- the end of a row tile ----

  // What few calls need is behind branches: a row tile's end is a chain of latencies, some 5 clocks an instruction.
  // Without room for boxes `begin_next` is called with half of the output written, by when the next queries have come:
  // their product runs while the other half is.
  template <class BeginNext>
  __device__ __forceinline__ void finish(const PrefillItem& item, float (&o)[kDimV / 2], const RowState& state,
                                         BeginNext begin_next) {
    const auto add = [](float a, float b) { return a + b; };
    float sum[2] = {quad_reduce(state.sum[0], add), quad_reduce(state.sum[1], add)}, decay[2] = {1.0f, 1.0f};
    if (params_.sinks != nullptr || params_.lse != nullptr) weigh(item, state, sum, decay);
    const float factor[2] = {sum[0] == 0.0f ? 0.0f : __fdividef(decay[0], sum[0]),
                             sum[1] == 0.0f ? 0.0f : __fdividef(decay[1], sum[1])};
    std::uint32_t zeros[2] = {0, 0};  // of a row of the thread: stay so unless something in it is not finite
    const int first = query_of(item, warpgroup_ * 64 + thread() / 32 * 16);  // the warp's
    if constexpr (Config::kStoresBoxes) {
      if (params_.queries_per_store > 0 && first + params_.queries_per_store <= item.q_len) {
        store_rows(item, o, factor, first, zeros);
      } else {
        store_row<0>(item, o, factor[0], zeros[0]);
        store_row<1>(item, o, factor[1], zeros[1]);
      }
      begin_next();  // by all warps of the warpgroup, which may have come different ways
    } else {
      store_row<0>(item, o, factor[0], zeros[0]);
      begin_next();
      store_row<1>(item, o, factor[1], zeros[1]);
    }
    const bool poisoned[2] = {(zeros[0] & 0x7fff7fffu) != 0, (zeros[1] & 0x7fff7fffu) != 0};
    // A row that met something not finite may have met it in a key that it does not see: 0 times NaN is NaN. Such rows
    // are rare, and are computed again key by key.
    if (__any_sync(kFullWarp, poisoned[0] || poisoned[1])) {
      if constexpr (Config::kStoresBoxes) await_stores();
      __syncwarp();
#pragma unroll 1
      for (int i = 0; i < 16; ++i) {
        const unsigned votes = __ballot_sync(kFullWarp, i < 8 ? poisoned[0] : poisoned[1]);
        const int again = warpgroup_ * 64 + thread() / 32 * 16 + i;
        if ((votes >> i % 8 * 4 & 0xf) == 0 || !is_row(item, again)) continue;
        exact_row<T, kDimV>(params_, item, query_of(item, again), head_of(item, again));
      }
    }
  }

  // Sinks join the sums, and the log-sum-exp is written.
  __device__ __forceinline__ void weigh(const PrefillItem& item, const RowState& state, float (&sum)[2],
                                        float (&decay)[2]) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      if (!is_row(item, row() + 8 * half)) continue;
      const int query = query_of(item, row() + 8 * half), head = head_of(item, row() + 8 * half);
      float top = state.at[half];
      if (params_.sinks != nullptr) {
        const float sink = __ldg(params_.sinks + head) * kLog2E;
        const float joined = fmaxf(top, sink), at = joined == -INFINITY ? 0.0f : joined;
        decay[half] = exp2_approx(top - at);
        sum[half] = sum[half] * decay[half] + exp2_approx(sink - at);
        top = joined;
      }
      if (params_.lse != nullptr && thread() % 4 == 0) {
        const float lse = sum[half] == 0.0f ? -INFINITY : (top + __log2f(sum[half])) * kLn2;
        params_
            .lse[item.q_page * params_.lse_page + head * params_.lse_head + (item.q_first + query) * params_.lse_slot] =
            lse;
      }
    }
  }

  // The warp's 16 rows by way of shared memory, which it needs nobody else for.
  __device__ __forceinline__ void store_rows(const PrefillItem& item, const float (&o)[kDimV / 2],
                                             const float (&factor)[2], int query, std::uint32_t (&zeros)[2]) {
    const int lane = thread() % 32;
    std::uint8_t* const rows = shared_.out[0] + (warpgroup_ * 64 + thread() / 32 * 16) * kChunkRowBytes;
    // Rows of 128 bytes; 16-byte unit u of row r lies at u ^ r % 8. A lane addresses row lane % 16, unit lane / 16.
    const std::uint32_t to = shared_address(rows) + lane % 16 * kChunkRowBytes + (lane / 16 ^ lane % 8) * 16;
    await_store_reads();  // of the row tile before
    __syncwarp();
#pragma unroll
    for (int j = 0; j < kDimV / 16; ++j) {
      std::uint32_t x[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        x[i] = pack<T>(o[8 * j + 2 * i] * factor[i % 2], o[8 * j + 2 * i + 1] * factor[i % 2]);
        add_zero_times<T>(zeros[i % 2], x[i]);
      }
      store_matrices((to ^ j % 4 * 32) + j / 4 * Config::kOutChunkBytes, x);
    }
    fence_async_proxy();
    __syncwarp();
    if (lane < Config::kChunksV) {
      store_box(params_.out_map, rows + lane * Config::kOutChunkBytes, lane * kChunkElements, 0, item.q_first + query,
                item.q_head / params_.packed_heads, item.q_page);
      commit_stores();
    }
    __syncwarp();
  }

  // One row of each quad from registers. Four lanes hold eight columns of it in turn: they are exchanged so that each
  // lane writes 16 bytes.
  template <int kHalf>
  __device__ __forceinline__ void store_row(const PrefillItem& item, const float (&o)[kDimV / 2], float factor,
                                            std::uint32_t& zeros) const {
    const int query = query_of(item, row() + 8 * kHalf), head = head_of(item, row() + 8 * kHalf);
    const bool valid = is_row(item, row() + 8 * kHalf);
    T* to = static_cast<T*>(params_.out.data) + item.q_page * params_.out.page + head * params_.out.head +
            (item.q_first + query) * params_.out.slot;
    const int lane = thread() % 4;
#pragma unroll
    for (int first = 0; first < kDimV / 8; first += 4) {
      std::uint32_t x[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int at = 4 * (first + j) + 2 * kHalf;
        if (at >= kDimV / 2) continue;
        x[j] = pack<T>(o[at] * factor, o[at + 1] * factor);
        add_zero_times<T>(zeros, x[j]);
      }
      transpose_quad(x, lane);
      const int column = (first + lane) * 8;
      if (valid && column < params_.head_dim_v) *reinterpret_cast<uint4*>(to + column) = uint4{x[0], x[1], x[2], x[3]};
    }
  }
  // x[j] becomes what lane j of the quad had in its x[lane].
  __device__ __forceinline__ static void transpose_quad(std::uint32_t (&x)[4], int lane) {
    const bool odd = (lane & 1) != 0, high = (lane & 2) != 0;
    const std::uint32_t a = __shfl_xor_sync(kFullWarp, odd ? x[0] : x[1], 1);
    const std::uint32_t b = __shfl_xor_sync(kFullWarp, odd ? x[2] : x[3], 1);
    (odd ? x[0] : x[1]) = a;
    (odd ? x[2] : x[3]) = b;
    const std::uint32_t c = __shfl_xor_sync(kFullWarp, high ? x[0] : x[2], 2);
    const std::uint32_t d = __shfl_xor_sync(kFullWarp, high ? x[1] : x[3], 2);
    (high ? x[0] : x[2]) = c;
    (high ? x[1] : x[3]) = d;
  }

  // ---- rows, turns, barriers ----

  // Read again where it is needed, rather than kept: registers are what the main loop lacks.
  __device__ __forceinline__ static int thread() { return static_cast<int>(threadIdx.x) % 128; }
  __device__ __forceinline__ int row() const { return warpgroup_ * 64 + accumulator_row(thread()); }
  // Whether it is one of the request's; some row tiles end in rows that are none.
  __device__ __forceinline__ bool is_row(const PrefillItem& item, int row) const {
    return row < params_.schedule.queries_per_tile * params_.packed_heads && query_of(item, row) < item.q_len;
  }
  __device__ __forceinline__ int query_in_tile(int row) const {  // row / packed_heads
    return row * params_.packed_heads_reciprocal >> 16;
  }
  __device__ __forceinline__ int query_of(const PrefillItem& item, int row) const {
    return item.first_query + query_in_tile(row);
  }
  __device__ __forceinline__ int head_of(const PrefillItem& item, int row) const {
    return item.q_head + row - query_in_tile(row) * params_.packed_heads;
  }

  __device__ __forceinline__ void release(Barrier (&empty)[Config::kStages], RingPosition<Config::kStages>& at) {
    __syncwarp();  // all lanes have read what they wanted
    if (elect_one()) empty[at.stage()].arrive();
    at.advance();
  }

  // Where the queries lie of the row tile whose slot it is: in the stage of the same number, or in the only one.
  __device__ __forceinline__ int q_stage() const { return Config::kQStages == 1 ? 0 : slot_.stage(); }
  __device__ __forceinline__ std::uint32_t q_parity() const {
    return Config::kQStages == 1 ? static_cast<std::uint32_t>(slot_.stage()) : slot_.parity();
  }
  static_assert(kItemSlots == 2 && Config::kQStages <= 2);

  // What the scores of a KV tile were made of: its keys, and after the last the queries.
  __device__ __forceinline__ void release_scores(TileNote note) {
    release(shared_.k_empty, k_);
    if (!note.last()) return;
    if (elect_one()) shared_.q_empty[q_stage()].arrive();
  }

  static constexpr int kTurnBarrier = 1, kClearBarrier = 1 + Config::kWarpgroups;
  __device__ __forceinline__ void await_turn() const {
    if constexpr (Config::kTakeTurns) named_sync(kTurnBarrier + warpgroup_, 256);
  }
  __device__ __forceinline__ void pass_turn() const {
    if constexpr (Config::kTakeTurns) named_arrive(kTurnBarrier + (warpgroup_ + 1) % Config::kWarpgroups, 256);
  }

  const PrefillParams& params_;
  PrefillShared<Config>& shared_;
  int warpgroup_;
  Operand queries_;
  RingPosition<Config::kStages> k_, v_;
  RingPosition<kItemSlots> slot_;
};

// ---- the kernel -----------------------------------------------------------------------------------------------------

template <class Config>
__global__ void __launch_bounds__(Config::kThreads, 1) prefill_kernel(const __grid_constant__ PrefillParams params) {
  extern __shared__ __align__(1024) std::uint8_t memory[];
  auto& shared = *reinterpret_cast<PrefillShared<Config>*>(memory);

  if (threadIdx.x == 0) {
    prefetch_tensor_map(params.q_map);
    prefetch_tensor_map(params.k_map);
    prefetch_tensor_map(params.v_map);
    if (params.queries_per_store > 0) prefetch_tensor_map(params.out_map);
    constexpr int kWarps = 4 * Config::kWarpgroups, kLoaders = 3, kTileLoaders = 2;
    for (int stage = 0; stage < Config::kQStages; ++stage) {
      shared.q_full[stage].init(1);
      shared.q_empty[stage].init(kWarps);
    }
    for (int stage = 0; stage < Config::kStages; ++stage) {
      shared.k_full[stage].init(1);
      shared.k_empty[stage].init(kWarps);
      shared.v_full[stage].init(1);
      shared.v_empty[stage].init(kWarps);
    }
    for (int slot = 0; slot < kItemSlots; ++slot) {
      shared.item_full[slot].init(1);
      shared.item_empty[slot].init(kWarps + kLoaders);
    }
    for (int slot = 0; slot < kNoteSlots; ++slot) {
      shared.note_full[slot].init(1);
      shared.note_empty[slot].init(kTileLoaders);
    }
    fence_barrier_init();
  }
  __syncthreads();

  if (threadIdx.x < 128) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(Config::kProducerRegisters));
    switch (threadIdx.x / 32) {
      case 0: PrefillPlanner<Config>(params, shared).run(); break;
      case 1: PrefillLoader<Config>(params, shared).load_queries(); break;
      case 2: PrefillLoader<Config>(params, shared).load_keys(); break;
      case 3: PrefillLoader<Config>(params, shared).load_values(); break;
    }
  } else {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(Config::kConsumerRegisters));
    PrefillConsumer<Config>(params, shared).run();
  }
}

}  // namespace heddle::cuda
