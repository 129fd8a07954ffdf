// Which keys a query sees, on the device: select/visibility.h says the same for the host and explains the terms.
#pragma once

#include <cstdint>

#include "cuda/launch.h"

namespace heddle::cuda {

enum class TileKind : std::int32_t { kNone, kPartial, kFull };

struct Span {
  std::int32_t begin, end;

  __device__ __forceinline__ bool has(std::int32_t key) const { return key >= begin && key < end; }
};

// A Pattern for the lengths of one request.
struct Visibility {
  const Pattern& pattern;
  const bool* mask;
  std::int32_t kv_len, offset;  // query i stands at position i + offset

  __device__ __forceinline__ Visibility(const Pattern& p, int q_len, int keys)
      : pattern(p), mask(nullptr), kv_len(keys), offset(keys - q_len) {}
  // Before `chosen` or `classify` of a pattern with a block mask.
  __device__ __forceinline__ void set_mask(int request, int q_head) {
    mask =
        pattern.mask + request * pattern.mask_batch_stride + q_head / pattern.heads_per_mask * pattern.mask_head_stride;
  }

  // What causality and the window argument leave.
  __device__ __forceinline__ Span allowed(std::int32_t query) const {
    const std::int32_t position = query + offset;
    Span span{max(0, position - pattern.left), min(kv_len, position + pattern.right + 1)};
    if (pattern.causal) span.end = min(span.end, position + 1);
    return span;
  }
  // The selection's own window.
  __device__ __forceinline__ Span selected(std::int32_t query) const {
    const std::int32_t position = query + offset;
    return {position - pattern.select_left, position + pattern.select_right + 1};
  }
  __device__ __forceinline__ bool block(std::int32_t i, std::int32_t j) const {
    return i < pattern.mask_rows && j < pattern.mask_cols &&
           mask[i * pattern.mask_row_stride + j * pattern.mask_col_stride];
  }

  // The selection alone: of keys that `allowed` leaves, is this one seen?
  __device__ __forceinline__ bool chosen(std::int32_t query, std::int32_t key) const {
    switch (pattern.kind) {
      case PatternKind::kNone: return true;
      case PatternKind::kWindowGlobal: return selected(query).has(key) || key < pattern.num_global;
      case PatternKind::kStrided: {
        const std::int32_t distance = query + offset - key;
        return distance < pattern.width || distance % pattern.stride == 0;
      }
      case PatternKind::kBlockMask: return block(query / pattern.block_q, key / pattern.block_k);
    }
    return false;
  }

  // Queries [q0, q1) x keys [k0, k1). A tile that reaches beyond the keys is partial, and so may be one that is full.
  __device__ __forceinline__ TileKind classify(std::int32_t q0, std::int32_t q1, std::int32_t k0,
                                               std::int32_t k1) const {
    const bool ragged = k1 > kv_len;
    k1 = min(k1, kv_len);
    if (q0 >= q1 || k0 >= k1) return TileKind::kNone;
    const Span first = allowed(q0), last = allowed(q1 - 1);
    if (k1 <= first.begin || k0 >= last.end || last.end <= first.begin) return TileKind::kNone;
    bool full = !ragged && k0 >= last.begin && k1 <= first.end;
    switch (pattern.kind) {
      case PatternKind::kNone: break;
      case PatternKind::kWindowGlobal: {
        const Span s0 = selected(q0), s1 = selected(q1 - 1);
        if ((k1 <= s0.begin || k0 >= s1.end) && k0 >= pattern.num_global) return TileKind::kNone;
        full = full && ((k0 >= s1.begin && k1 <= s0.end) || k1 <= pattern.num_global);
        break;
      }
      case PatternKind::kStrided: {
        const std::int32_t nearest = q0 + offset - (k1 - 1), farthest = q1 - 1 + offset - k0;
        const std::int32_t multiple = farthest >= 0
                                          ? farthest / pattern.stride * pattern.stride
                                          : -((-farthest + pattern.stride - 1) / pattern.stride) * pattern.stride;
        if (nearest >= pattern.width && multiple < nearest) return TileKind::kNone;
        full = full && (farthest < pattern.width || pattern.stride == 1);
        break;
      }
      case PatternKind::kBlockMask: {
        bool any = false, all = true;
        for (std::int32_t i = q0 / pattern.block_q; i <= (q1 - 1) / pattern.block_q; ++i) {
          for (std::int32_t j = k0 / pattern.block_k; j <= (k1 - 1) / pattern.block_k; ++j) {
            const bool on = block(i, j);
            any |= on;
            all &= on;
          }
        }
        if (!any) return TileKind::kNone;
        full = full && all;
        break;
      }
    }
    return full ? TileKind::kFull : TileKind::kPartial;
  }
};

}  // namespace heddle::cuda
