// Which row tiles a CTA computes, and in which order. One warp asks, all of its lanes together.
//
// All items stand in one order: sections of heads whose keys the second-level cache holds, in a section the row tiles
// that see most keys first (causal: the late ones), for each of them all heads. kTile: a CTA an item. kStatic: CTA c
// takes every G-th item from c on. kStealing: whoever is free takes the next one. (A queue for each CTA, dealt in this
// order, with stealing from the fullest, leaves heavy items for the end.)
#pragma once

#include "cuda/common/online_softmax.cuh"
#include "cuda/sm90/prefill/params.h"

namespace heddle::cuda {

class ItemQueue {
 public:
  __device__ __forceinline__ explicit ItemQueue(const PrefillParams& params)
      : params_(params), schedule_(params.schedule), next_(static_cast<int>(blockIdx.x)) {}

  // The index of the next item, or -1.
  __device__ __forceinline__ int pop() {
    const int total = count();
    int item = next_;
    if (schedule_.kind == ScheduleKind::kStealing) {
      if (lane() == 0) item = atomicAdd(schedule_.taken, 1);
      item = __shfl_sync(kFullWarp, item, 0);
    } else {
      next_ = schedule_.kind == ScheduleKind::kStatic ? next_ + static_cast<int>(gridDim.x) : total;
    }
    return item < total ? item : -1;
  }

  // After this CTA's last pop: the last CTA leaves the counters as it found them.
  __device__ __forceinline__ void finish() const {
    if (schedule_.kind != ScheduleKind::kStealing || lane() != 0) return;
    __threadfence();
    if (atomicAdd(schedule_.done, 1) != static_cast<int>(gridDim.x) - 1) return;
    *schedule_.taken = 0;
    *schedule_.done = 0;
  }

  // What item `index` is.
  __device__ __forceinline__ PrefillItem item(int index) const {
    const int heads = params_.num_q_heads / params_.packed_heads;  // items side by side
    PrefillItem item{};
    if (schedule_.order != nullptr) {
      const int rank = find(index);
      item.request = __ldg(schedule_.order + rank);
      index -= __ldg(schedule_.first_item + rank);
      item.q_first = __ldg(params_.cu_seqlens_q + item.request);
      item.k_first = __ldg(params_.cu_seqlens_k + item.request);
      item.q_len = __ldg(params_.cu_seqlens_q + item.request + 1) - item.q_first;
      item.kv_len = __ldg(params_.cu_seqlens_k + item.request + 1) - item.k_first;
    } else {
      item.q_len = params_.q_len;
      item.kv_len = params_.kv_len;
    }
    const int all_heads = schedule_.order != nullptr ? heads : heads * params_.batch;
    const int tiles = (item.q_len + schedule_.queries_per_tile - 1) / schedule_.queries_per_tile;
    // As many KV heads as the cache holds, a power of two: sections of one size leave no small one for the end, where
    // it could not feed all CTAs. A float quotient is good enough, and cheap.
    const float kv_heads = __fdividef(schedule_.section_keys, static_cast<float>(max(item.kv_len, 1)));
    const int heads_per_kv_head = params_.group / params_.packed_heads;
    const int section = min((1 << max(ilogb_floor(kv_heads), 0)) * heads_per_kv_head, all_heads);
    const int first_head = index / (section * tiles) * section;
    const int rest = index - first_head * tiles;
    const int width = min(section, all_heads - first_head);
    const int head = first_head + rest % width;
    item.first_query = (tiles - 1 - rest / width) * schedule_.queries_per_tile;
    item.q_head = head % heads * params_.packed_heads;
    if (schedule_.order == nullptr) {
      item.request = item.q_page = head / heads;
      if (params_.seq_lens != nullptr) item.kv_len = __ldg(params_.seq_lens + item.request);
    }
    const Pattern& pattern = params_.pattern;
    const int offset = item.kv_len - item.q_len;
    item.allowed_from = offset - pattern.left;
    item.allowed_until = offset + 1 + (pattern.causal ? 0 : pattern.right);
    item.sees_from = max(item.allowed_from, offset - pattern.select_left);
    item.sees_until = min(item.allowed_until, offset + 1 + pattern.select_right);
    return item;
  }

 private:
  __device__ __forceinline__ static int ilogb_floor(float x) { return (__float_as_int(x) >> 23) - 127; }
  __device__ __forceinline__ static int lane() { return static_cast<int>(threadIdx.x) % 32; }
  __device__ __forceinline__ int count() const {
    return schedule_.order == nullptr ? schedule_.num_items : __ldg(schedule_.first_item + params_.batch);
  }
  // The request that item `index` belongs to: the last rank with first_item <= index.
  __device__ __forceinline__ int find(int index) const {
    int begin = 0, end = params_.batch;  // the rank lies in [begin, end)
#pragma unroll 1
    while (end - begin > 1) {
      const int middle = (begin + end) / 2;
      (__ldg(schedule_.first_item + middle) <= index ? begin : end) = middle;
    }
    return begin;
  }

  const PrefillParams& params_;
  const PrefillSchedule& schedule_;
  int next_;  // kTile, kStatic
};

}  // namespace heddle::cuda
