// Paged KV cache.
#pragma once

#include <cstdint>
#include <memory>
#include <string_view>

#include "heddle/export.h"
#include "heddle/quantize.h"
#include "heddle/tensor.h"

namespace heddle {

enum class CacheFormat : std::uint8_t { kFp32, kBf16, kFp16, kInt8Baseline, kInt8A, kInt8B, kFp8 };

HEDDLE_API std::string_view to_string(CacheFormat format);  // "int8-a"
HEDDLE_API CacheFormat cache_format_from_string(std::string_view name);

// format          K                           V            Q (in decode)
// fp32/bf16/fp16  as named                    as named     as given
// int8-baseline   int8, per tensor            per tensor   int8, per tensor
// int8-a          int8, per `partition` tokens per tensor  int8, per token
// int8-b          int8, per tensor            per tensor   int8, per token
// fp8             e4m3, per tensor            per tensor   as given
// Per-tensor scales are static: values beyond them saturate and are counted.
struct CacheConfig {
  std::int64_t num_pages = 0;
  std::int64_t page_size = 0;
  std::int64_t num_kv_heads = 0;
  std::int64_t head_dim = 0;
  std::int64_t head_dim_v = 0;  // 0: head_dim
  CacheFormat format = CacheFormat::kBf16;
  std::int64_t partition = 1;  // int8-a: tokens a K scale covers; divides page_size
  bool feature_major = false;  // keep K by feature too, for Bernoulli scores (heddle/sampling.h): K's memory again
  bool page_bounds = false;    // keep what select::pages() ranks pages by
  Device device{};
};

// Pages of page_size tokens. Page p holds, for each KV head, its tokens' keys one after the other:
// k [num_pages, Hkv, page_size, D], v [num_pages, Hkv, page_size, Dv]. Token t of request b lies in page
// block_table[b, t / page_size], slot t % page_size. Requests may share pages.
// Concurrent decodes are fine; an append or calibration must be alone.
class HEDDLE_API KVCache {
 public:
  explicit KVCache(const CacheConfig& config);
  ~KVCache();
  KVCache(KVCache&&) noexcept;
  KVCache& operator=(KVCache&&) noexcept;

  const CacheConfig& config() const noexcept;

  // Views of the storage, valid as long as the cache lives; scales that the format lacks are not given.
  TensorView k() const noexcept;
  TensorView v() const noexcept;
  TensorView k_by_feature() const noexcept;  // [num_pages, Hkv, D, page_size] with feature_major; else not given
  TensorView k_scale() const noexcept;       // float32 [num_pages, Hkv, page_size / partition] (int8-a) or [1]
  TensorView v_scale() const noexcept;       // float32 [1] for int8 and fp8; else not given
  TensorView q_scale() const noexcept;       // float32 [1] for int8-baseline; else not given
  TensorView value_norms() const noexcept;   // float32 [num_pages, Hkv, page_size]: |v|_2 as it was before quantization
  // With page_bounds, else not given. Of the first page_tokens [num_pages] (int32) tokens of each page: the
  // element-wise maximum and minimum of the stored keys, [num_pages, Hkv, 2, D] in the dtype of k (float32 with scales
  // in int8-a), and the largest value norm, float32 [num_pages, Hkv].
  TensorView page_bounds() const noexcept;
  TensorView page_norms() const noexcept;
  TensorView page_tokens() const noexcept;

  // Sets the static per-tensor scales from sample data (k, v, q: float [B, S, H, D] or [total, H, D]). Never called,
  // the first append calibrates K and V from its own tokens and the first decode Q. Calibrating a cache that holds
  // tokens is kValue.
  void calibrate(const TensorView& k, const TensorView& v, const TensorView& q = {});
  bool kv_calibrated() const noexcept;
  bool q_calibrated() const noexcept;
  void calibrate_q(const TensorView& q);

  // Writes request b's new tokens at positions start[b], start[b] + 1, ...: k [B, S, Hkv, D], v [B, S, Hkv, Dv], or
  // packed [total, Hkv, D] with cu_seqlens int32 [B + 1]. block_table int32 [B, max_pages], start int32 [B]. seq_lens
  // (int32 [B], written) becomes start[b] + new tokens. All or nothing: a bad table, a full cache or NaN in quantized
  // data leaves everything as it was. int8-a with partition > 1: a token that raises the maximum of its open partition
  // re-quantizes that partition.
  void append(const TensorView& k, const TensorView& v, const TensorView& block_table, const TensorView& start,
              const TensorView& seq_lens, const TensorView& cu_seqlens = {});

  std::int64_t saturated() const noexcept;  // values clamped by a static scale since construction
  double bytes_per_token() const noexcept;  // K (and by feature), V, scales, value norms and page bounds, all KV heads
  std::int64_t nbytes() const noexcept;

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace heddle
