// The plan, made on the device from lengths that the host has not seen: one block. Its time is a few dependent reads:
// lengths, a scan over the batch, two binary searches a chunk.
#pragma once

#include "cuda/common/async.cuh"
#include "cuda/common/online_softmax.cuh"
#include "cuda/sm90/decode/params.h"

namespace heddle::cuda::decode {

inline constexpr int kPlanThreads = 512;
inline constexpr int kPlanEntries = 2048;  // so many are searched in shared memory
inline constexpr int kPlanChunks = 4096;

// Entries of a list before its first -1.
__device__ inline int list_length(const Params& p, std::int64_t entry) {
  const std::int64_t request = entry / p.num_kv_heads, head = entry % p.num_kv_heads;
  int high = p.list_size, low = 0;
  if (p.list_lengths != nullptr) {
    return min(max(__ldg(p.list_lengths + request * p.lengths_batch_stride + head * p.lengths_head_stride), 0), high);
  }
  const std::int32_t* list = p.list + request * p.list_batch_stride + head * p.list_head_stride;
  while (low < high) {
    const int middle = (low + high) / 2;
    if (__ldg(list + middle) >= 0) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return low;
}

__global__ void __launch_bounds__(kPlanThreads, 1) plan_kernel(const __grid_constant__ Params p) {
  __shared__ std::int64_t near_starts[kPlanEntries + 1];
  __shared__ Place places[kPlanChunks + 1];
  __shared__ std::int64_t warp_sums[kPlanThreads / 32];
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32, warp = thread / 32;
  launch_dependents();
  wait_for_predecessors();

  const std::int64_t entries = p.shape.entries;
  const auto visible = [&](std::int64_t entry) { return p.mask.visible(kv_len_of(p, entry)).count; };
  const auto keys_of = [&](std::int64_t entry) { return p.list != nullptr ? p.counts[entry] : visible(entry); };
  std::int64_t* starts = entries <= kPlanEntries ? near_starts : p.starts;

  for (int i = thread; i < p.units(); i += kPlanThreads) p.arrived[i] = 0;

  // Exclusive sums of the entries' lengths.
  std::int64_t total = 0;
  for (std::int64_t first = 0; first < entries; first += kPlanThreads) {
    const std::int64_t entry = first + thread;
    std::int64_t length = 0;
    if (entry < entries) {
      int keys = 0;
      if (p.list != nullptr) {
        keys = p.counts[entry] = list_length(p, entry) * static_cast<int>(p.list_keys);
      } else {
        keys = visible(entry);
      }
      length = std::int64_t{p.shape.length(keys)} * p.shape.units_per_entry;
    }
    std::int64_t sum = length;
    for (int lanes = 1; lanes < 32; lanes *= 2) {
      const std::int64_t below = __shfl_up_sync(kFullWarp, sum, lanes);
      if (lane >= lanes) sum += below;
    }
    if (lane == 31) warp_sums[warp] = sum;
    __syncthreads();
    std::int64_t before = lane < kPlanThreads / 32 ? warp_sums[lane] : 0;  // sums of the warps up to the lane's
    for (int lanes = 1; lanes < kPlanThreads / 32; lanes *= 2) {
      const std::int64_t below = __shfl_up_sync(kFullWarp, before, lanes);
      if (lane >= lanes) before += below;
    }
    const std::int64_t all = __shfl_sync(kFullWarp, before, kPlanThreads / 32 - 1);
    before = __shfl_sync(kFullWarp, before, max(warp - 1, 0));
    if (entry < entries) starts[entry] = total + (warp == 0 ? 0 : before) + sum - length;
    total += all;
    __syncthreads();
  }
  if (thread == 0) starts[entries] = total;
  __syncthreads();

  const Cut cut(p.shape, total);
  const int per_cta = cut.per_cta, chunks = p.shape.ctas * per_cta;
  for (int c = thread; c <= chunks; c += kPlanThreads) {
    places[c] = place_at(p.shape, starts, cut.start(c), keys_of);
  }
  __syncthreads();
  for (int c = thread; c < chunks; c += kPlanThreads) {
    Chunk chunk = chunk_at(places, chunks, c, per_cta);
    const std::int64_t entry = chunk.begin.unit / static_cast<unsigned>(p.shape.units_per_entry);
    if (entry < entries) {
      chunk.kv_len = kv_len_of(p, p.list != nullptr ? entry / p.num_kv_heads : entry);
      chunk.keys = keys_of(entry);
    }
    p.chunks[c] = chunk;
    if (c % per_cta == 0) p.own[c / per_cta] = chunk;
  }
  for (int i = thread; i <= p.shape.ctas; i += kPlanThreads) p.queue[i] = i == p.shape.ctas ? 0 : 1;
}

}  // namespace heddle::cuda::decode
