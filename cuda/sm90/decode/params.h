// What the decode kernels are handed: DecodeArgs with the workspace laid out.
#pragma once

#include <cstdint>
#include <cuda.h>

#include "cuda/common/index.cuh"
#include "cuda/sm90/decode/plan.h"

namespace heddle::cuda::decode {

// Strides of rows in bytes (elements for floats).
struct RowStrides {
  std::int64_t batch = 0, seq = 0, head = 0;
};

struct Params {
  const char* q = nullptr;
  char* out = nullptr;
  float* lse = nullptr;
  RowStrides q_stride, out_stride, lse_stride;
  bool wide_out = false;  // rows of out may be written by 8 bytes

  // Pages of keys and values, strides in units of 16 bytes.
  const char *k = nullptr, *v = nullptr;
  std::uint32_t k_page_stride = 0, k_head_stride = 0, k_slot_stride = 0;
  std::uint32_t v_page_stride = 0, v_head_stride = 0, v_slot_stride = 0;
  bool fetch_ahead = false;  // 256 aligned bytes hold rows of one page and head
  // Slices are copied whole: 16 keys lie in one page. Axes of the maps: a band, slot, bands, head, page.
  bool whole_slices = false;
  CUtensorMap k_map{}, v_map{};
  std::uint32_t num_pages = 0;
  const std::int32_t *seq_lens = nullptr, *block_table = nullptr;
  std::int64_t table_stride = 0;
  int max_kv_len = 0;

  // 8-bit formats
  const float *k_scale = nullptr, *v_scale = nullptr, *q_scale = nullptr;
  float q_static_scale = 0.0f;
  int partition = 0;  // tokens that a scale of K covers; 0: all
  std::int64_t k_scale_page_stride = 0, k_scale_head_stride = 0, k_scale_group_stride = 0;

  // score_factor turns products into log2 units, or with softcap into the argument of tanh; `cap` is softcap in log2
  // units, 0 for none.
  float score_factor = 1.0f, cap = 0.0f;
  const float* sinks = nullptr;
  Mask mask;

  // Lists of keys, or of pages of a request: null, or entries [list_batch_stride * b + list_head_stride * h + i], each
  // of list_keys keys. `counts` holds how many keys each list has.
  const std::int32_t *list = nullptr, *list_lengths = nullptr;
  std::int64_t list_batch_stride = 0, list_head_stride = 0, lengths_batch_stride = 0, lengths_head_stride = 0;
  int list_size = 0;
  std::uint32_t list_keys = 1;

  int num_queries = 1, group = 1, num_kv_heads = 1;      // rows of a KV head: num_queries * group
  int row_groups = 1, rows_per_tile = 8, row_tiles = 1;  // rows of one KV head
  int unit_heads = 1;                                    // KV heads of a unit, 1 or 2
  // Division takes a device as long as a few loads from shared memory, by what the host knows a fraction of that.
  struct {
    Divisor page_size, list_keys, units_per_entry, row_tiles, num_kv_heads, group, partition;
  } by;

  // The workspace.
  PlanShape shape;
  std::int64_t max_splits = 1;     // of a unit, with fixed splits
  Chunk* chunks = nullptr;         // [shape.chunks()]
  std::int64_t* starts = nullptr;  // [entries + 1]
  std::int32_t* counts = nullptr;  // [entries], with lists
  unsigned* arrived = nullptr;     // [units]: splits that are done
  Chunk* own = nullptr;            // [ctas]: a copy of the first chunk of each
  // [ctas + 1]: chunks of each CTA that are taken (from 1 on: the first is its own); CTAs that found nothing more
  unsigned* queue = nullptr;
  float* partial_out = nullptr;     // [slots, partial_rows, D]
  float2* partial_state = nullptr;  // [slots, partial_rows]: maximum and sum
  int partial_rows = 0;
  bool stealing = false;

  HEDDLE_HD int units() const { return static_cast<int>(shape.entries) * shape.units_per_entry; }
  HEDDLE_HD int rows() const { return num_queries * group; }
};

#ifdef __CUDACC__
// A length that is out of range counts as the nearest that is not.
__device__ __forceinline__ int in_range(const Params& p, int kv_len) { return min(max(kv_len, 0), p.max_kv_len); }
__device__ __forceinline__ int kv_len_of(const Params& p, std::int64_t request) {
  return in_range(p, __ldg(p.seq_lens + request));
}
#endif

}  // namespace heddle::cuda::decode
