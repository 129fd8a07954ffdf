// What the core may ask of the CUDA part. Plain pointers, element strides and a cudaStream_t as void*: whoever includes
// this needs neither CUDA's headers nor its compiler. Nothing here synchronizes or allocates.
#pragma once

#include <cstdint>

#include "heddle/backend.h"
#include "heddle/tensor.h"

namespace heddle::cuda {

// CUDA devices that this process can use; 0 without a driver.
int device_count() noexcept;

// major * 10 + minor of the device's compute capability, e.g. 90 for Hopper. Throws kDevice if there is no such device.
int compute_capability(int device);

inline constexpr std::int32_t kUnbounded = std::int32_t{1} << 30;  // farther than any key

enum class PatternKind : std::int32_t { kNone, kWindowGlobal, kStrided, kBlockMask };

// causal, the window argument and the selection of a call, as numbers. Positions and lengths are below kUnbounded.
struct Pattern {
  bool causal = false;
  std::int32_t left = kUnbounded, right = kUnbounded;  // the window argument

  PatternKind kind = PatternKind::kNone;
  std::int32_t select_left = kUnbounded, select_right = kUnbounded, num_global = 0;  // kWindowGlobal
  std::int32_t width = 0, stride = 1;                                                // kStrided
  const bool* mask = nullptr;                                                        // kBlockMask
  std::int32_t block_q = 1, block_k = 1, heads_per_mask = 1;  // heads_per_mask: query heads that share a mask's head
  std::int64_t mask_batch_stride = 0, mask_head_stride = 0, mask_row_stride = 0, mask_col_stride = 0;
};

// Merge of partial results over disjoint key sets. Partial p of row (b, s, h) is `dim` contiguous elements of `outs`;
// its lse is one element of `lses`. Sizes are counts, strides count elements.
struct MergeArgs {
  const void* outs = nullptr;
  const float* lses = nullptr;
  void* out = nullptr;
  float* lse = nullptr;           // null: not wanted
  DType dtype = DType::kFloat32;  // of outs and out: float32, bfloat16 or float16

  std::int64_t num_parts = 0, batch = 0, seq = 0, heads = 0, dim = 0;
  struct Strides {
    std::int64_t part = 0, batch = 0, seq = 0, head = 0;
  };
  Strides outs_stride, lses_stride, out_stride, lse_stride;  // `part` is unused for the two results

  int device = 0;
  void* stream = nullptr;
};

// Enqueues the merge. The bits of a row depend on its partials alone, not on the rows beside it.
// Throws kDType for other element types and kRuntime if the launch fails.
void launch_merge(const MergeArgs& args);

// Attention over contiguous, packed or paged keys and values, 16-bit elements. Strides count elements; rows are
// contiguous. A row of q and out is (page, head, slot) as in Problem: a request of a uniform batch is a page, a packed
// batch is one page, and the keys of a paged cache lie in the pages that the block table names.
struct AttentionArgs {
  struct Rows {
    void* data = nullptr;
    std::int64_t page = 0, head = 0, slot = 0;
  };
  Rows q, k, v, out;
  DType dtype = DType::kBFloat16;
  std::int64_t num_q_heads = 0, num_kv_heads = 0, head_dim = 0, head_dim_v = 0;

  std::int64_t batch = 0, q_len = 0, kv_len = 0;  // with lengths on the device: what the shapes allow
  // Packed: q and k hold q_len and kv_len tokens in all.
  const std::int32_t *cu_seqlens_q = nullptr, *cu_seqlens_k = nullptr;
  // Paged: every request has q_len queries.
  const std::int32_t *seq_lens = nullptr, *block_table = nullptr;
  std::int64_t table_stride = 0, page_size = 0, num_pages = 0;

  float* lse = nullptr;  // null: not wanted
  std::int64_t lse_page = 0, lse_head = 0, lse_slot = 0;
  const float* sinks = nullptr;
  double scale = 1.0, softcap = 0.0;
  Pattern pattern;
  ScheduleKind schedule = ScheduleKind::kAuto;

  int device = 0;
  void* stream = nullptr;
};

// Enqueues it. Throws kUnsupported for what the kernels lack, kLayout for rows that bulk copies cannot reach, kRuntime
// if the launch fails.
void launch_attention(const AttentionArgs& args);

}  // namespace heddle::cuda
