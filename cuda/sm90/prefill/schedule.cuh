// Which row tiles a CTA computes, and in which order. One warp asks, all of its lanes together.
//
// All items stand in one order: sections of heads whose keys fit the second-level cache, in a section the row tiles
// that see most keys first (causal: the late ones), for each of them all heads. Item n belongs to the queue of CTA n
// mod G. A CTA takes its own items in order; with stealing, an idle CTA then takes from the queue that has most items
// left.
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
    const int ctas = static_cast<int>(gridDim.x), own = static_cast<int>(blockIdx.x), total = count();
    if (schedule_.kind != ScheduleKind::kStealing) {
      const int item = next_;
      next_ = schedule_.kind == ScheduleKind::kStatic ? next_ + ctas : total;
      return item < total ? item : -1;
    }
    if (next_ < total) {
      next_ = own + take(own) * ctas;
      if (next_ < total) return next_;
    }
    while (true) {
      int most = 0, victim = -1;
#pragma unroll 1
      for (int queue = lane(); queue < ctas; queue += 32) {
        const int taken = *reinterpret_cast<volatile const std::int32_t*>(schedule_.taken + queue);
        const int left = (total - queue + ctas - 1) / ctas - taken;
        if (left > most) {
          most = left;
          victim = queue;
        }
      }
#pragma unroll 1
      for (int offset = 16; offset > 0; offset /= 2) {
        const int other_most = __shfl_xor_sync(kFullWarp, most, offset);
        const int other = __shfl_xor_sync(kFullWarp, victim, offset);
        if (other_most > most || (other_most == most && other > victim)) {
          most = other_most;
          victim = other;
        }
      }
      if (victim < 0) return -1;
      const int item = victim + take(victim) * ctas;
      if (item < total) return item;
    }
  }

  // After this CTA's last pop: the last CTA leaves the counters as it found them.
  __device__ __forceinline__ void finish() {
    if (schedule_.kind != ScheduleKind::kStealing) return;
    const int ctas = static_cast<int>(gridDim.x);
    int before = 0;
    if (lane() == 0) {
      __threadfence();
      before = atomicAdd(schedule_.done, 1);
    }
    if (__shfl_sync(kFullWarp, before, 0) != ctas - 1) return;
    for (int queue = lane(); queue < ctas; queue += 32) schedule_.taken[queue] = 0;
    if (lane() == 0) *schedule_.done = 0;
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
    return item;
  }

 private:
  __device__ __forceinline__ static int ilogb_floor(float x) { return (__float_as_int(x) >> 23) - 127; }
  __device__ __forceinline__ static int lane() { return static_cast<int>(threadIdx.x) % 32; }
  __device__ __forceinline__ int count() const {
    return schedule_.order == nullptr ? schedule_.num_items : __ldg(schedule_.first_item + params_.batch);
  }
  __device__ __forceinline__ int take(int queue) const {
    int taken = 0;
    if (lane() == 0) taken = atomicAdd(schedule_.taken + queue, 1);
    return __shfl_sync(kFullWarp, taken, 0);
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
  int next_;  // an own item, or a number beyond the last if none is left
};

}  // namespace heddle::cuda
