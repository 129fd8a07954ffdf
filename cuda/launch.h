// What the core may ask of the CUDA part. Plain pointers, element strides and a cudaStream_t as void*: whoever includes
// this needs neither CUDA's headers nor its compiler. No launch_*() synchronizes or allocates. A build without CUDA has
// the same functions, which see no device (cpp/src/no_cuda).
#pragma once

#include <cstdint>
#include <functional>

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
  std::int32_t mask_rows = 0, mask_cols = 0;                  // blocks beyond them are not seen
  std::int64_t mask_batch_stride = 0, mask_head_stride = 0, mask_row_stride = 0, mask_col_stride = 0;
};

// Memory of a device, zeroed, also while a stream is being captured. Throws kCapacity when it has not so much left.
void* allocate(std::int64_t bytes, int device);
void release(void* memory, int device) noexcept;
void synchronize(int device);  // waits for all work of the device
// Copies after the stream's earlier work, and waits for it. Throw kValue if the stream is being captured.
void copy_to_host(void* to, const void* from, std::int64_t bytes, int device, void* stream);
void copy_to_device(void* to, const void* from, std::int64_t bytes, int device, void* stream);

// Calls `enqueue` with at least `bytes` of memory that the stream's work may use until the next call for the same
// purpose and stream (cuda/common/workspace.h). Calls for one stream and purpose exclude each other, so that what they
// enqueue stays together.
void with_workspace(const char* purpose, int device, void* stream, std::int64_t bytes,
                    const std::function<void(void*)>& enqueue);

// Rows of floats [batch, tokens, heads, dim], strides in elements; a packed batch is a batch of one.
struct FloatRows {
  const void* data = nullptr;
  DType dtype = DType::kFloat32;  // float32, bfloat16 or float16
  std::int64_t batch = 0, tokens = 0, heads = 0, dim = 0;
  std::int64_t batch_stride = 0, token_stride = 0, head_stride = 0;
};

// Bits of the largest magnitude (0x7f800000 and above: there is a NaN or an infinity). Waits for the stream; throws
// kValue if it is being captured. token_limit: optional, on the device: so many of the tokens count.
std::uint32_t max_abs_bits(const FloatRows& rows, const std::int32_t* token_limit, int device, void* stream);

// Writes new tokens into a paged cache: see KVCache::append.
struct AppendArgs {
  FloatRows k, v;  // of one dtype; k.tokens of each request, or all of a packed batch

  // The cache: [num_pages, heads, page_size, dim] and [num_pages, heads, page_size]
  void *k_pages = nullptr, *v_pages = nullptr;
  DType dtype = DType::kBFloat16;
  std::int64_t num_pages = 0, page_size = 0;
  float* value_norms = nullptr;
  // int8 and fp8. partition 0: one scale of K, read; else [num_pages, heads, page_size / partition], written
  float* k_scale = nullptr;
  const float* v_scale = nullptr;
  std::int64_t partition = 0;
  std::int64_t* saturated = nullptr;  // how many values a scale clamped is added to it

  std::int64_t batch = 0, table_pages = 0, table_stride = 0;
  const std::int32_t *block_table = nullptr, *start = nullptr;
  const std::int32_t* cu_seqlens = nullptr;  // null: not packed
  std::int32_t* seq_lens = nullptr;          // written: start + new tokens

  int device = 0;
  void* stream = nullptr;
};

// Tokens without a page in the table or in the cache are not written.
// Throws kDType for other element types, kShape for more rows than a launch can have and kRuntime if it fails.
void launch_append(const AppendArgs& args);

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

// Attention of `num_queries` new tokens a request over a paged cache. Rows of q and out have head_dim contiguous
// elements; strides count elements, those of the cache bytes.
struct DecodeArgs {
  const void* q = nullptr;
  void* out = nullptr;
  float* lse = nullptr;            // null: not wanted
  DType dtype = DType::kBFloat16;  // of q and out: bfloat16 or float16
  struct Strides {
    std::int64_t batch = 0, seq = 0, head = 0;
  };
  Strides q_stride, out_stride, lse_stride;
  std::int64_t batch = 0, num_queries = 1, num_q_heads = 0, num_kv_heads = 0, head_dim = 0;

  // The cache: 16-bit pages are of q's dtype, 8-bit ones int8 or float8_e4m3.
  const void *k = nullptr, *v = nullptr;
  DType cache_dtype = DType::kBFloat16;
  struct PageStrides {
    std::int64_t page = 0, head = 0, slot = 0;
  };
  PageStrides k_stride, v_stride;
  std::int64_t num_pages = 0, page_size = 0, max_kv_len = 0, table_stride = 0;
  const std::int32_t *seq_lens = nullptr, *block_table = nullptr;

  // 8-bit caches. partition 0: one scale of K; else one for so many tokens of a page and head.
  const float *k_scale = nullptr, *v_scale = nullptr;
  std::int64_t partition = 0, k_scale_page_stride = 0, k_scale_head_stride = 0, k_scale_group_stride = 0;
  // int8: the static scale of q, on the device or (> 0) here; neither: max|q| / 127 of each row.
  const float* q_scale = nullptr;
  float q_static_scale = 0.0f;

  // Keys p - left to p + right around a query's position p are seen, and of these the first num_globals and those from
  // p - select_left to p + select_right. kUnbounded: no limit.
  static constexpr std::int64_t kUnbounded = std::int64_t{1} << 40;
  bool causal = true;
  std::int64_t left = kUnbounded, right = kUnbounded;
  std::int64_t select_left = kUnbounded, select_right = kUnbounded, num_globals = 0;
  double softcap = 0.0, scale = 1.0;
  const float* sinks = nullptr;  // [num_q_heads]

  // Lists of keys or, with lists_pages, of pages of the request (columns of the block table), or null: int32 [batch,
  // num_kv_heads, list_size], ascending, -1 pads at the end; lengths optional.
  const std::int32_t *list = nullptr, *list_lengths = nullptr;
  bool lists_pages = false;
  std::int64_t list_size = 0, list_batch_stride = 0, list_head_stride = 0;
  std::int64_t lengths_batch_stride = 0, lengths_head_stride = 0;

  Schedule schedule;
  void* workspace = nullptr;  // of decode_workspace_bytes() bytes, 256-byte aligned; one launch at a time uses it
  int device = 0;
  void* stream = nullptr;
};

// Depends on the shapes alone: not on lengths, nor on what pointers point to.
std::int64_t decode_workspace_bytes(const DecodeArgs& args);

// Enqueues the plan: who reads which keys, from the lengths as they are when it runs. It serves every launch_decode()
// with the same workspace and shapes until the lengths change (layers of a model share one).
void launch_decode_plan(const DecodeArgs& args);

// Enqueues decode, by a plan in args.workspace. A row's bits depend on the lengths of the batch and the shapes; with
// schedule.split_size, on its own request alone.
// Both throw kUnsupported for shapes and types that have no kernel, and kRuntime if the launch fails.
void launch_decode(const DecodeArgs& args);

}  // namespace heddle::cuda
