// Symmetric INT8 and FP8 E4M3 quantization.
#pragma once

#include <cstdint>
#include <vector>

#include "heddle/export.h"
#include "heddle/tensor.h"

namespace heddle {

// How to read an int8 or fp8 tensor x_q [..., S, H, D]: x = x_q * scale (+ mean).
// partition = 0: scale float32 [1], one for the tensor. partition = n >= 1: scale float32 [..., ceil(S / n), H], one
// for every n consecutive tokens of one head. mean: optional float32 [..., H, D] (K smoothing): what was subtracted
// before quantizing. Attention puts it back as scale * q.mean on the scores, so out and lse are those of x.
struct QuantScales {
  TensorView scale{};
  std::int64_t partition = 0;
  TensorView mean{};
};

// x: float [B, S, H, D] or [total, H, D]; data: int8 or fp8, the shape of x; scales as above, allocated by the caller.
// x_q = clamp(round-half-even(x / scale), -127, 127), scale = max|x| / 127 over the group (fp8: 448, and rounding to
// nearest even saturates); an all-zero group has scale 0 and values 0. With static_scale > 0 (per tensor only) that
// scale is used and values beyond it saturate. Returns how many values saturated. NaN or Inf in x is an error (kValue).
HEDDLE_API std::int64_t quantize(const TensorView& x, const TensorView& data, const QuantScales& scales,
                                 float static_scale = 0.0f);
// out: float32, the shape of data.
HEDDLE_API void dequantize(const TensorView& data, const QuantScales& scales, const TensorView& out);

}  // namespace heddle
