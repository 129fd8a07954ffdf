// Attention over contiguous or packed keys and values, and the merge of partial results.
#pragma once

#include <cstdint>
#include <optional>

#include "heddle/backend.h"
#include "heddle/export.h"
#include "heddle/quantize.h"
#include "heddle/select.h"
#include "heddle/tensor.h"

namespace heddle {

// Shapes: q [B, Sq, Hq, D], k [B, Sk, Hkv, D], v [B, Sk, Hkv, Dv], out [B, Sq, Hq, Dv], lse [B, Hq, Sq].
// A packed (ragged) batch drops B and S for a total-token axis, q [total_q, Hq, D], lse [Hq, total_q], and gives
// cu_seqlens (int32 [B + 1], on the CPU for the host backends). Query head h reads KV head h / (Hq / Hkv).
struct AttentionParams {
  TensorView q{}, k{}, v{};
  TensorView out{};  // the dtype of q, or float32 if q is quantized
  TensorView
      lse{};  // optional, float32 (float64 is also accepted by the reference): natural log of the softmax denominator
  // For int8 and fp8 tensors: how to read them. Not given for the others.
  QuantScales q_scales{}, k_scales{}, v_scales{};

  bool causal = false;
  std::optional<Window> window{};
  double softcap = 0.0;           // > 0: s <- softcap * tanh(s / softcap)
  std::optional<double> scale{};  // default 1 / sqrt(D)
  TensorView sinks{};             // optional, float32 [Hq]: a logit that only the denominator sees
  Selection selection{};
  TensorView cu_seqlens_q{}, cu_seqlens_k{};

  Backend backend = Backend::kAuto;
  Schedule schedule{};
  Stream stream{};
};

// out = softmax(scale * q k^T) v, row by row; a row that sees no key gives 0 and lse = -inf (its sink with a sink).
// Throws heddle::Error before any memory is touched.
HEDDLE_API void attention(const AttentionParams& params);

// Merges partial results over disjoint key sets: outs [P, ..., H, Dv] with lses float32 [P, ...] as attention() returns
// them: outs [P, B, S, H, Dv] with lses [P, B, H, S], or outs [P, T, H, Dv] with lses [P, H, T].
// m = max lse_p; out = sum exp(lse_p - m) out_p / sum exp(lse_p - m); lse = m + log sum exp(lse_p - m).
// A part with lse = -inf does not contribute, whatever its out holds; all -inf gives (0, -inf).
struct MergeParams {
  TensorView outs{}, lses{};
  TensorView out{};
  TensorView lse{};  // optional
  Backend backend = Backend::kAuto;
  Stream stream{};
};
HEDDLE_API void merge(const MergeParams& params);

}  // namespace heddle
