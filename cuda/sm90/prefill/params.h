// What the prefill kernel is launched with, and what its producer tells its consumers.
#pragma once

#include <cstdint>
#include <cuda.h>
#include <vector_types.h>

#include "cuda/launch.h"

namespace heddle::cuda {

// Row tiles: the items that CTAs compute. Their number is known to the host (uniform batches) or on the device (packed
// ones, see plan.cuh).
struct PrefillSchedule {
  ScheduleKind kind = ScheduleKind::kStealing;
  int num_items = 0;  // of a uniform batch
  int queries_per_tile = 0;
  float section_keys = 0.0f;  // how many keys of one head the second-level cache holds
  // Packed batches: requests, longest first, and how many items come before each of them; [batch] and [batch + 1].
  const std::int32_t *order = nullptr, *first_item = nullptr;
  // kStealing: how many items are taken, and how many CTAs are done; zeros between launches.
  std::int32_t *taken = nullptr, *done = nullptr;
};

// Which KV tiles each row tile visits, where that is no interval: for (request, head, row tile) `words` pairs of 32
// bits: visited, and masked element by element.
struct PrefillWorklist {
  uint2* bits = nullptr;
  int words = 0, row_tiles = 0;
  int requests = 1, heads = 1;  // 1 if all have the same
};

enum class ScoreMap : std::int32_t { kNone, kFactor, kSoftcap };

struct PrefillParams {
  CUtensorMap q_map, k_map, v_map, out_map;
  // For rows that have to be computed element by element (exact.cuh), and for out. Strides count elements.
  AttentionArgs::Rows q, k, v, out;
  float* lse = nullptr;
  std::int64_t lse_page = 0, lse_head = 0, lse_slot = 0;
  const float* sinks = nullptr;

  int batch = 0, q_len = 0, kv_len = 0, head_dim = 0, head_dim_v = 0;
  int num_q_heads = 0, group = 0;
  int packed_heads = 1;  // query heads of a group that share a row tile: row r is query r / packed_heads of head r % ..
  int packed_heads_reciprocal = 1 << 16;  // 2^16 / packed_heads, rounded up
  int queries_per_store = 0;              // 16 rows of a warp as a box of out_map; 0: there is no such box
  const std::int32_t *cu_seqlens_q = nullptr, *cu_seqlens_k = nullptr, *seq_lens = nullptr, *block_table = nullptr;
  std::int64_t table_stride = 0;
  int page_size = 0, box_keys = 0;  // paged: a copy brings box_keys keys

  // p = exp2(scale_log2 (map(s) - max)), map(s) = s, map_factor s, or tanh(map_factor s)
  float scale_log2 = 1.0f, map_factor = 1.0f;
  ScoreMap score_map = ScoreMap::kNone;

  Pattern pattern;
  PrefillSchedule schedule;
  PrefillWorklist worklist;
};

// A row tile.
struct PrefillItem {
  int request, q_head;   // q_head: the first of packed_heads
  int first_query;       // of the request
  int q_len, kv_len;     // of the request
  int q_first, k_first;  // where its rows begin in a packed batch
  int q_page;            // the page of q, out, and of contiguous keys
  // Where what a query sees are intervals: query i sees the keys from i + sees_from up to i + sees_until, and of the
  // global ones those from i + allowed_from up to i + allowed_until.
  int sees_from, sees_until, allowed_from, allowed_until;
};

}  // namespace heddle::cuda
