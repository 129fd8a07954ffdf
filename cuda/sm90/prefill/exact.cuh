// One row of attention by one warp, key by key: what is not seen is not read. For rows that met NaN or Inf in a tile.
#pragma once

#include "cuda/common/online_softmax.cuh"
#include "cuda/common/vec.cuh"
#include "cuda/common/visibility.cuh"
#include "cuda/sm90/prefill/params.h"
#include "cuda/sm90/prefill/softmax.cuh"

namespace heddle::cuda {

template <class T, int kDimV>
__device__ __forceinline__ void exact_row(const PrefillParams& params, const PrefillItem& item, int query, int head) {
  constexpr int kColumns = (kDimV + 31) / 32;
  const int lane = static_cast<int>(threadIdx.x) % 32, kv_head = head / params.group;
  Visibility visibility(params.pattern, item.q_len, item.kv_len);
  visibility.set_mask(item.request, head);
  const Span span = visibility.allowed(query);
  const T* q = static_cast<const T*>(params.q.data) + item.q_page * params.q.page + head * params.q.head +
               (item.q_first + query) * params.q.slot;
  float acc[kColumns] = {};
  float top = -INFINITY, sum = 0.0f;
#pragma unroll 1
  for (int key = span.begin; key < span.end; ++key) {
    if (!visibility.chosen(query, key)) continue;
    std::int64_t page = item.q_page, slot = item.k_first + key;
    if (params.page_size > 0) {
      page = __ldg(params.block_table + item.request * params.table_stride + key / params.page_size);
      slot = key % params.page_size;
    }
    const T* k =
        static_cast<const T*>(params.k.data) + page * params.k.page + kv_head * params.k.head + slot * params.k.slot;
    float score = 0.0f;
    for (int d = lane; d < params.head_dim; d += 32) score += to_float(q[d]) * to_float(k[d]);
    for (int offset = 16; offset > 0; offset /= 2) score += __shfl_xor_sync(kFullWarp, score, offset);
    float mapped[1] = {score};
    map_scores(mapped, params.score_map, params.map_factor);
    score = mapped[0] * params.scale_log2;
    // Maxima as the tiles take them: NaN does not raise one.
    const float joined = fmaxf(top, score), at = joined == -INFINITY ? 0.0f : joined;
    const float decay = exp2_approx(top - at), p = exp2_approx(score - at);
    const T* v =
        static_cast<const T*>(params.v.data) + page * params.v.page + kv_head * params.v.head + slot * params.v.slot;
    bool hopeless = true;
#pragma unroll
    for (int i = 0; i < kColumns; ++i) {
      const int d = lane + 32 * i;
      if (d >= params.head_dim_v) continue;
      acc[i] = acc[i] * decay + p * to_float(v[d]);
      hopeless = hopeless && acc[i] != acc[i];
    }
    sum = sum * decay + p;
    top = joined;
    if (__all_sync(kFullWarp, hopeless)) break;  // NaN everywhere, and stays so
  }
  if (params.sinks != nullptr) {
    const float sink = __ldg(params.sinks + head) * kLog2E;
    const float joined = fmaxf(top, sink), at = joined == -INFINITY ? 0.0f : joined;
    const float decay = exp2_approx(top - at);
#pragma unroll
    for (int i = 0; i < kColumns; ++i) acc[i] *= decay;
    sum = sum * decay + exp2_approx(sink - at);
  }
  const float factor = sum == 0.0f ? 0.0f : 1.0f / sum;
  T* out = static_cast<T*>(params.out.data) + item.q_page * params.out.page + head * params.out.head +
           (item.q_first + query) * params.out.slot;
  __syncwarp();  // what other lanes wrote of this row is overwritten
#pragma unroll
  for (int i = 0; i < kColumns; ++i) {
    const int d = lane + 32 * i;
    if (d < params.head_dim_v) out[d] = from_float<T>(acc[i] * factor);
  }
}

}  // namespace heddle::cuda
