// The order of a packed batch's items, made on the device from its lengths: requests with most keys first, and the
// number of items before each. One block.
#pragma once

#include "cuda/sm90/prefill/params.h"

namespace heddle::cuda {

inline constexpr int kPlanThreads = 1024;
inline constexpr int kPlanSorted = 4096;  // of more requests the order hardly matters: there is work for every CTA

__global__ void __launch_bounds__(kPlanThreads)
    prefill_plan_kernel(const std::int32_t* cu_seqlens_q, const std::int32_t* cu_seqlens_k, int batch,
                        int queries_per_tile, int heads, std::int32_t* order, std::int32_t* first_item) {
  __shared__ std::uint64_t keys[kPlanSorted];
  __shared__ int warp_sums[32];
  const int thread = static_cast<int>(threadIdx.x);
  const bool sorted = batch <= kPlanSorted;
  if (sorted) {
    int size = 1;
    while (size < batch) size *= 2;
    for (int i = thread; i < size; i += kPlanThreads) {
      // Ascending: more keys first, then the lower request; what is not there comes last.
      keys[i] = ~std::uint64_t{0};
      if (i < batch) {
        const auto length = static_cast<std::uint32_t>(cu_seqlens_k[i + 1] - cu_seqlens_k[i]);
        keys[i] = std::uint64_t{0x7fffffffu - length} << 32 | static_cast<std::uint32_t>(i);
      }
    }
    __syncthreads();
    for (int width = 2; width <= size; width *= 2) {
      for (int step = width / 2; step > 0; step /= 2) {
        for (int i = thread; i < size; i += kPlanThreads) {
          const int other = i ^ step;
          if (other > i && (keys[i] > keys[other]) == ((i & width) == 0)) {
            const std::uint64_t key = keys[i];
            keys[i] = keys[other];
            keys[other] = key;
          }
        }
        __syncthreads();
      }
    }
  }
  int before = 0;
  for (int first = 0; first < batch; first += kPlanThreads) {
    const int rank = first + thread;
    int request = 0, items = 0;
    if (rank < batch) {
      request = sorted ? static_cast<int>(keys[rank] & 0xffffffffu) : rank;
      const int q_len = cu_seqlens_q[request + 1] - cu_seqlens_q[request];
      items = (q_len + queries_per_tile - 1) / queries_per_tile * heads;
    }
    // An inclusive prefix sum over the block.
    int sum = items;
    for (int offset = 1; offset < 32; offset *= 2) {
      const int other = __shfl_up_sync(0xffffffffu, sum, offset);
      if (thread % 32 >= offset) sum += other;
    }
    if (thread % 32 == 31) warp_sums[thread / 32] = sum;
    __syncthreads();
    int all = 0;
    for (int warp = 0; warp < 32; ++warp) {
      if (warp == thread / 32) sum += all;
      all += warp_sums[warp];
    }
    __syncthreads();
    if (rank < batch) {
      order[rank] = request;
      first_item[rank] = before + sum - items;
    }
    before += all;
  }
  if (thread == 0) first_item[batch] = before;
}

}  // namespace heddle::cuda
