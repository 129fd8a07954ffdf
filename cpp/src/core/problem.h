// What a checked call is to a kernel: attention() and decode() both become a Problem, and every backend runs Problems.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <span>
#include <vector>

#include "heddle/backend.h"
#include "heddle/sampling.h"
#include "heddle/select.h"
#include "heddle/tensor.h"

namespace heddle {

// Rows of a tensor by (page, head, slot). Contiguous batches are pages too: page = the request, slot = the token; a
// packed batch is one page whose slots run over all tokens. Strides in bytes for data, in elements for the float
// arrays.
struct Rows {
  std::byte* data = nullptr;
  DType dtype = DType::kFloat32;
  std::int64_t dim = 0;  // elements of a row; contiguous
  std::int64_t page_stride = 0, head_stride = 0, slot_stride = 0;

  // Quantized rows: x = value * scale_of(...) (+ mean_of(...)). partition 0: one scale.
  const float* scale = nullptr;
  std::int64_t partition = 0;
  std::int64_t scale_page_stride = 0, scale_head_stride = 0, scale_group_stride = 0;
  const float* mean = nullptr;
  std::int64_t mean_page_stride = 0, mean_head_stride = 0;

  std::byte* row(std::int64_t page, std::int64_t head, std::int64_t slot) const {
    return data + page * page_stride + head * head_stride + slot * slot_stride;
  }
  // Of a head's groups of slots in a page.
  const float* scales_of(std::int64_t page, std::int64_t head) const {
    return scale + page * scale_page_stride + head * scale_head_stride;
  }
  // Of the slots [slot, slot + count), one a slot.
  void copy_scales(std::int64_t page, std::int64_t head, std::int64_t slot, std::int64_t count, float* out) const {
    const float* scales = scales_of(page, head);
    if (partition == 1 && scale_group_stride == 1) {
      constexpr std::int64_t kLine = 16;  // small pages hold few, and a call for each of them takes long
      scales += slot;
      for (; count >= kLine; count -= kLine, scales += kLine, out += kLine) {
        std::memcpy(out, scales, kLine * sizeof(float));
      }
      if (count > 0) std::memcpy(out, scales, static_cast<std::size_t>(count) * sizeof(float));
    } else {
      for (std::int64_t i = 0; i < count; ++i) out[i] = scales[(slot + i) / partition * scale_group_stride];
    }
  }
  float scale_of(std::int64_t page, std::int64_t head, std::int64_t slot) const {
    if (scale == nullptr) return 1.0f;
    if (partition == 0) return scale[0];
    return scales_of(page, head)[slot / partition * scale_group_stride];
  }
  const float* mean_of(std::int64_t page, std::int64_t head) const {
    return mean == nullptr ? nullptr : mean + page * mean_page_stride + head * mean_head_stride;
  }
};

// One request of the batch.
struct Request {
  std::int64_t q_len = 0, kv_len = 0;
  std::int64_t q_page = 0, q_first = 0;  // query i lies in page q_page, slot q_first + i (q, out, lse)
  std::int64_t k_page = 0, k_first = 0;  // key j likewise, unless the cache is paged:
  const std::int32_t* pages = nullptr;   // key j lies in page pages[j / page_size], slot j % page_size
};

// The lengths of a batch on a device, which the host does not read: decode and packed batches. `requests` is then
// empty, and a request's tokens follow from these as they follow from a Request on the host. So nobody has checked them
// (unless set_validation() is on): a kernel that is handed nonsense may compute nonsense, and must not write outside
// `out` and `lse`. A block mask may have fewer blocks than these bounds allow; blocks beyond it are not seen.
struct DeviceBatch {
  std::int64_t size = 0;                       // requests; 0: the lengths are in `requests`
  std::int64_t max_q_len = 0, max_kv_len = 0;  // what the shapes allow; a request may be shorter
  // decode: [size] and [size, pages]
  const std::int32_t *seq_lens = nullptr, *block_table = nullptr;
  std::int64_t table_stride = 0, num_pages = 0;  // elements from row to row; pages of the cache
  // packed batches: [size + 1] each
  const std::int32_t *cu_seqlens_q = nullptr, *cu_seqlens_k = nullptr;
};

// Sampled attention: what to draw, and where its keys by feature and its counters lie.
struct Sampled {
  const Sampling* options = nullptr;  // null: not sampled
  std::uint32_t offset = 0;           // on the CPU; on a device options->offset_at is still to be added
  // Keys by feature: elements [page][head][feature][slot]; null unless Bernoulli scores are asked for.
  const std::byte* features = nullptr;
  std::int64_t feature_page_stride = 0, feature_head_stride = 0;  // bytes; features are page_size elements apart
  SampledReads reads;                                             // each given or not
};

struct Problem {
  Rows q, k, v, out;
  // lse of (q_page, head, slot); null data: not wanted. float32, or float64 (reference only). Strides in elements.
  void* lse = nullptr;
  DType lse_dtype = DType::kFloat32;
  std::int64_t lse_page_stride = 0, lse_head_stride = 0, lse_slot_stride = 0;

  std::vector<Request> requests;
  DeviceBatch on_device;
  std::int64_t num_q_heads = 0, num_kv_heads = 0;
  std::int64_t page_size = 0;  // 0: keys are contiguous

  bool causal = false;
  Window window;  // both unbounded: none
  double softcap = 0.0;
  double scale = 1.0;
  const float* sinks = nullptr;  // [num_q_heads]
  const Selection* selection = nullptr;
  std::shared_ptr<const Selection> listed_pages;  // the token lists that a page list became; `selection` is then this
  bool packed = false;
  // int8 caches: quantize each query row on the way, by max|q| / 127 of the row, or by a static scale: q_static_scale >
  // 0, or on a device the number that lies at q_static_scale_on_device.
  bool quantize_q = false;
  float q_static_scale = 0.0f;
  const float* q_static_scale_on_device = nullptr;
  Sampled sampled;

  void* plan = nullptr;  // decode: the memory of a plan that a row's plan function made; null: the kernel plans itself
  Schedule schedule;
  Device device;
  Stream stream;

  std::int64_t group() const { return num_q_heads / num_kv_heads; }
  std::int64_t batch() const {
    return on_device.size > 0 ? on_device.size : static_cast<std::int64_t>(requests.size());
  }
};

}  // namespace heddle
