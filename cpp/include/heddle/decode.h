// Attention of a few new tokens over a paged KV cache.
#pragma once

#include <optional>

#include "heddle/backend.h"
#include "heddle/cache.h"
#include "heddle/export.h"
#include "heddle/sampling.h"
#include "heddle/select.h"
#include "heddle/tensor.h"

namespace heddle {

// q [B, Sq, Hq, D], Sq >= 1 (speculative tokens, causal among themselves); out [B, Sq, Hq, Dv]; lse float32 [B, Hq,
// Sq]. block_table int32 [B, max_pages]; seq_lens int32 [B], the new tokens included. Table entries beyond a request's
// length may hold anything. A request of length 0 gives out = 0 and lse = -inf; query i sees nothing when i + seq_len -
// Sq < 0.
struct DecodeParams {
  TensorView q{};
  KVCache* cache = nullptr;
  TensorView block_table{}, seq_lens{};
  TensorView out{};
  TensorView lse{};  // optional

  bool causal = true;
  std::optional<Window> window{};
  double softcap = 0.0;
  std::optional<double> scale{};
  TensorView sinks{};  // optional, float32 [Hq]
  Selection selection{};
  // Draw rows of V instead of reading all that the selection leaves; lse stays exact (with Bernoulli scores, theirs).
  std::optional<Sampling> sampling{};
  SampledReads reads{};  // optional outputs

  Backend backend = Backend::kAuto;
  Schedule schedule{};
  Stream stream{};
};

HEDDLE_API void decode(const DecodeParams& params);

}  // namespace heddle
