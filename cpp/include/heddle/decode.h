// Attention of a few new tokens over a paged KV cache.
#pragma once

#include <memory>
#include <optional>
#include <span>

#include "heddle/backend.h"
#include "heddle/cache.h"
#include "heddle/export.h"
#include "heddle/sampling.h"
#include "heddle/select.h"
#include "heddle/tensor.h"

namespace heddle {

// What a backend works out from the lengths before it reads keys: who reads which. A step of a model has one for all
// its layers. Used by one call at a time; on a device it keeps memory there, which graphs that captured it need too.
class HEDDLE_API DecodePlan {
 public:
  DecodePlan();
  ~DecodePlan();
  DecodePlan(DecodePlan&&) noexcept;
  DecodePlan& operator=(DecodePlan&&) noexcept;

  struct State;
  State& state() const noexcept { return *state_; }

 private:
  std::unique_ptr<State> state_;
};

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
  SampledReads reads{};              // optional outputs
  const DecodePlan* plan = nullptr;  // optional: of plan_decode() with this call's shapes, masks and lengths

  Backend backend = Backend::kAuto;
  Schedule schedule{};
  Stream stream{};
};

HEDDLE_API void decode(const DecodeParams& params);

// Makes `plan` the plan of decode(params), from the lengths as they are when it runs: on a device in the order of the
// stream, so that a captured step plans anew at every replay. Outputs need not be given. Allocates when the plan needs
// more memory than before. decode() without a plan makes its own.
HEDDLE_API void plan_decode(const DecodeParams& params, DecodePlan& plan);

// A level of shared prefixes: requests cu_requests[g] up to cu_requests[g + 1] of the batch have the tokens of group g
// in front of their own. block_table int32 [G, max_pages] and seq_lens int32 [G] as in DecodeParams, where q lies;
// cu_requests int32 [G + 1], from 0 to the batch, always on the CPU. A group of length 0 shares nothing.
struct SharedPrefix {
  TensorView block_table{}, seq_lens{}, cu_requests{};
};

// Cascade: decode of requests that share prefixes, each of which is read once for all requests of its group. `params`
// has the requests' own tokens, those behind the prefixes, the new ones included. Every query sees all of its prefixes,
// and its own tokens as in decode(). So the result is decode() over prefixes and own tokens one after the other, as
// long as the own ones include the new ones (or there is one query). Levels are merged by their lse, exactly; partial
// results are of q's dtype. Sinks count once. Throws kUnsupported for a window, a selection, sampling or a plan.
// Hydragen (arXiv 2402.05099); the levels are those of FlashInfer's cascade (arXiv 2501.01005).
HEDDLE_API void decode_cascade(const DecodeParams& params, std::span<const SharedPrefix> prefixes);

}  // namespace heddle
