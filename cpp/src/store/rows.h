// Rows of the tensors that the quantizers and the cache read and write: [B, S, H, D], or packed [total, H, D] as one
// batch element.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <string_view>

#include "heddle/tensor.h"

namespace heddle::store {

struct TokenRows {
  std::byte* data = nullptr;
  DType dtype = DType::kFloat32;
  std::int64_t batch = 0, tokens = 0, heads = 0, dim = 0;
  std::int64_t batch_stride = 0, token_stride = 0, head_stride = 0;  // bytes

  explicit TokenRows(const TensorView& view)
      : data(view.as<std::byte>()),
        dtype(view.dtype),
        batch(view.rank == 4 ? view.shape[0] : 1),
        tokens(view.shape[view.rank - 3]),
        heads(view.shape[view.rank - 2]),
        dim(view.shape[view.rank - 1]) {
    const auto size = static_cast<std::int64_t>(size_of(dtype));
    batch_stride = view.rank == 4 ? view.strides[0] * size : 0;
    token_stride = view.strides[view.rank - 3] * size;
    head_stride = view.strides[view.rank - 2] * size;
  }
  std::byte* row(std::int64_t b, std::int64_t t, std::int64_t h) const {
    return data + b * batch_stride + t * token_stride + h * head_stride;
  }
  std::int64_t numel() const { return batch * tokens * heads * dim; }
};

// Floating [B, S, H, D] or [total, H, D] with contiguous rows.
void check_float_rows(std::string_view argument, const TensorView& x);

// Storage lives on the CPU so far.
void check_cpu(std::string_view argument, const TensorView& view, std::string_view feature);

inline void raise_to(std::atomic<std::uint32_t>& value, std::uint32_t at_least) {
  std::uint32_t seen = value.load(std::memory_order_relaxed);
  while (seen < at_least && !value.compare_exchange_weak(seen, at_least, std::memory_order_relaxed)) {
  }
}

// Bits of the largest magnitude of all rows (of x - mean with a mean [batch, heads, dim]). See non_finite_bits().
std::uint32_t max_abs_bits(const TokenRows& x, const float* mean = nullptr);

// Throws kValue naming the first NaN or infinity of x; if there is none, a difference from the mean overflowed.
[[noreturn]] void fail_non_finite(std::string_view argument, const TensorView& x);

// max|x| / 127 (int8) or / 448 (E4M3), in float32.
float scale_for(std::uint32_t max_abs_bits, DType dtype);

}  // namespace heddle::store
