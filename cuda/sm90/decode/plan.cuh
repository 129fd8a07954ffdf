// The plan, made on the device from lengths that the host has not seen. Every block sums up the lengths of all requests
// and makes some of the chunks, each for itself. Its time is a chain: lengths, a scan over the batch, a binary search
// for a cut, and from its place, by arithmetic, the other chunks of its unit.
#pragma once

#include "cuda/common/async.cuh"
#include "cuda/common/online_softmax.cuh"
#include "cuda/sm90/decode/params.h"

namespace heddle::cuda::decode {

inline constexpr int kPlanThreads = 256, kPlanBlocks = 5;  // 40 warps make 1,240 chunks
inline constexpr int kPlanEntries = 2048;                  // so many are searched in shared memory

// Entries of a list before its first -1.
__device__ inline int list_length(const Params& p, std::int64_t entry) {
  auto head = static_cast<std::uint32_t>(entry);
  const std::uint32_t request = p.by.num_kv_heads.divide(head);
  int high = p.list_size, low = 0;
  if (p.list_lengths != nullptr) {
    return min(max(__ldg(p.list_lengths + request * p.lengths_batch_stride + head * p.lengths_head_stride), 0), high);
  }
  const std::int32_t* list = p.list + request * p.list_batch_stride + head * p.list_head_stride;
  if (high > 0 && __ldg(list + high - 1) >= 0) return high;  // mostly it is full
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

__global__ void __launch_bounds__(kPlanThreads) plan_kernel(const __grid_constant__ Params p) {
  constexpr int kWarps = kPlanThreads / 32;
  __shared__ std::int64_t near_starts[kPlanEntries + 1], warp_sums[2][kWarps];
  __shared__ std::int32_t near_keys[kPlanEntries], unit_length;
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  launch_dependents();
  wait_for_predecessors();

  // On its way while the code that needs it is fetched.
  int ahead = 0;
  if (p.list == nullptr && threadIdx.x < p.shape.entries) ahead = __ldg(p.seq_lens + threadIdx.x);

  const std::int64_t entries = p.shape.entries;
  const bool near = entries <= kPlanEntries;
  std::int64_t* starts = near ? near_starts : p.starts;
  const auto visible = [&](int kv_len) { return p.mask.visible(kv_len).count; };

  // Exclusive sums of the entries' lengths, in every block for itself. Those of a warp, of one unit an entry, take 32
  // bits.
  std::int64_t total = 0;
  int shortest = kUnbounded, longest = 0, turn = 0;
#pragma unroll 1
  for (std::int64_t first = 0; first < entries; first += kPlanThreads, turn ^= 1) {
    const std::int64_t entry = first + threadIdx.x;
    std::uint32_t length = 0;
    if (entry < entries) {
      int keys = 0;
      if (p.list != nullptr) {
        keys = list_length(p, entry) * static_cast<int>(p.list_keys);
        if (blockIdx.x == 0) p.counts[entry] = keys;
      } else {
        keys = visible(in_range(p, first == 0 ? ahead : __ldg(p.seq_lens + entry)));
      }
      if (near) near_keys[entry] = keys;
      length = static_cast<std::uint32_t>(p.shape.length(keys));
      shortest = min(shortest, static_cast<int>(length));
      longest = max(longest, static_cast<int>(length));
    }
    std::uint32_t sum = length;
#pragma unroll
    for (int lanes = 1; lanes < 32; lanes *= 2) {
      const std::uint32_t below = __shfl_up_sync(kFullWarp, sum, lanes);
      if (lane >= lanes) sum += below;
    }
    if (lane == 31) warp_sums[turn][warp] = sum;
    __syncthreads();
    std::int64_t before = 0, all = 0;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
      if (w == warp) before = all;
      all += warp_sums[turn][w];
    }
    if (entry < entries) starts[entry] = total + (before + sum - length) * p.shape.units_per_entry;
    total += all * p.shape.units_per_entry;
  }
  if (threadIdx.x == 0) {
    starts[entries] = total;
    unit_length = longest;
  }
  const bool alike = longest == 0 || (shortest == longest && longest * std::int64_t{p.units()} == total);
  const bool all_alike = __syncthreads_and(alike) != 0;

  const int first = static_cast<int>(blockIdx.x) * kPlanThreads + static_cast<int>(threadIdx.x);
  const int threads = static_cast<int>(gridDim.x) * kPlanThreads;
  // From the last block on: the first has chunks to make.
#pragma unroll 1
  for (int i = threads - 1 - first; i < p.units(); i += threads) p.arrived[i] = 0;
#pragma unroll 1
  for (int i = threads - 1 - first; i <= p.shape.ctas; i += threads) p.queue[i] = i == p.shape.ctas ? 0 : 1;

  // A warp makes 31 chunks from 32 cuts.
  const auto keys_of = [&](std::int64_t entry) {
    return near ? near_keys[entry] : p.list != nullptr ? p.counts[entry] : visible(kv_len_of(p, entry));
  };
  const Cut cut(p.shape, total, all_alike ? unit_length : 0);
  const int chunks = p.shape.ctas * cut.per_cta;
#pragma unroll 1
  for (int base = first / 32 * 31; base < chunks; base += threads / 32 * 31) {
    const int c = min(base + lane, chunks);
    const CutPlace begin = place_at(p.shape, starts, cut.start(c), keys_of);
    Chunk chunk;
    chunk.begin = begin.place;
    chunk.end.unit = __shfl_down_sync(kFullWarp, begin.place.unit, 1);
    chunk.end.key = __shfl_down_sync(kFullWarp, begin.place.key, 1);
    chunk.index = static_cast<std::uint16_t>(c);
    chunk.per_cta = static_cast<std::uint16_t>(cut.per_cta);
    chunk.first_chunk = static_cast<std::uint16_t>(first_chunk(cut, begin, c));
    const int last = last_chunk(cut, begin, c - 1);  // of the chunk that ends here
    chunk.last_chunk = static_cast<std::uint16_t>(__shfl_down_sync(kFullWarp, last, 1));
    if (lane < 31 && base + lane < chunks) {
      const std::int64_t entry = p.by.units_per_entry.quotient(begin.place.unit);
      if (entry < entries) {
        chunk.kv_len =
            kv_len_of(p, p.list != nullptr ? p.by.num_kv_heads.quotient(static_cast<std::uint32_t>(entry)) : entry);
        chunk.keys = keys_of(entry);
      }
      p.chunks[c] = chunk;
      const int cta = cut.cta_of(c);
      if (cta * cut.per_cta == c) p.own[cta] = chunk;
    }
  }
}

}  // namespace heddle::cuda::decode
