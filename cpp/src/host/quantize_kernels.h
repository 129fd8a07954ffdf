// Row operations of the quantizers, the KV cache and the merge of partial results. Compiled once per instruction set
// (host/kernels/quantize.cpp) and called through a table of function pointers. All but merge_row give the same bits
// on every instruction set.
#pragma once

#include <cstdint>

#include "heddle/tensor.h"

namespace heddle::host {

// A row is `n` contiguous elements; `x` has the floating dtype that goes with it (float64 is rounded to float32 first).
struct QuantizeKernels {
  // Bits of the largest |x - mean| (mean: float [n] or null), as an unsigned integer. Ordered like the magnitudes;
  // 0x7f800000 and above says that the row holds an infinity or a NaN.
  std::uint32_t (*max_abs_bits)(const void* x, DType dtype, const float* mean, std::int64_t n);

  // out[i] = clamp(round-half-even((x - mean) / scale), +-127) for int8; E4M3 rounds to nearest even and saturates at
  // 448. The division is IEEE float32's. Scale 0 gives zeros. x must be finite. Returns how many values the clamp
  // changed.
  std::int64_t (*quantize)(const void* x, DType dtype, const float* mean, std::int64_t n, float scale, void* out,
                           DType out_dtype);

  // x = round-half-even(x * from / to) in place: int8 values of scale `from` at the larger scale `to`.
  void (*rescale)(std::int8_t* x, std::int64_t n, float from, float to);

  // out = q * scale (+ mean), q int8 or E4M3. With a mean, the sum is rounded once.
  void (*dequantize)(const void* q, DType dtype, const float* mean, std::int64_t n, float scale, float* out);

  // Between floating dtypes, one rounding to nearest even.
  void (*convert)(const void* x, DType dtype, std::int64_t n, void* out, DType out_dtype);

  // Sum of squares, accumulated in float64 in a fixed order.
  double (*sum_squares)(const void* x, DType dtype, std::int64_t n);

  // sum[i] += x[i]
  void (*accumulate)(const void* x, DType dtype, std::int64_t n, double* sum);

  // out = sum over parts of weights[p] * parts[p], in float32; parts of weight 0 are not read.
  void (*merge_row)(const void* const* parts, const float* weights, std::int64_t num_parts, DType dtype, std::int64_t n,
                    void* out, DType out_dtype);
};

const QuantizeKernels& quantize_kernels();  // of the current ISA

// max_abs_bits of a row that holds an infinity or a NaN.
inline constexpr bool non_finite_bits(std::uint32_t bits) { return bits >= 0x7f800000u; }

}  // namespace heddle::host
