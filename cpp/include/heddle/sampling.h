// Sampled attention: a few rows of V in place of all of them (the SANTA family, arXiv 2605.01910).
#pragma once

#include <cstdint>
#include <string_view>

#include "heddle/export.h"
#include "heddle/tensor.h"

namespace heddle {

// How the rows are drawn. With p_n the probabilities of the keys that a query sees, F their prefix sums and S the
// samples, the output is the mean of S rows of V, unbiased in every case. U are uniform in (0, 1).
enum class SamplingMethod : std::uint8_t {
  kExact,       // all rows of V, no samples: for Bernoulli scores alone
  kIid,         // S draws at F = U_m, with replacement; covariance Cov_p(v) / S
  kStratified,  // one draw in each of S equal slices, F = (m + U_m) / S; variance never above iid
  kSystematic,  // one offset for all slices, F = (m + U) / S (S2ANTA)
  // The published "flash" form: each tile of 64 keys in which the query sees some draws max(1, floor(S / tiles))
  // systematically by itself, so that no prefix over all keys is needed. May draw more rows than S.
  kSystematicTile,
};

HEDDLE_API std::string_view to_string(SamplingMethod method);
// Throws kValue for a name that does not exist.
HEDDLE_API SamplingMethod sampling_method_from_string(std::string_view name);

// The random numbers are Philox 4x32-10 with key = seed and counter = (request, query head, offset, draw); they depend
// on nothing else, so neither do the rows drawn on threads, splits or schedule. A caller advances the offset from layer
// to layer and step to step: equal offsets repeat the draws, and their errors add up instead of averaging out.
struct Sampling {
  SamplingMethod method = SamplingMethod::kSystematic;
  std::int64_t samples = 0;  // 1 to 2^20; 0 with kExact
  std::uint64_t seed = 0;
  std::uint32_t offset = 0;
  TensorView offset_at{};  // optional, int32 [1] on the device of q: added to offset, read by every call

  // Keys that each query reads exactly, the others being sampled: the first and the last that it sees, and of those
  // between the ones with the largest scores (ties to the lower index).
  std::int64_t n_sink = 0, n_recent = 0, n_top = 0;

  // Bernoulli scores: the mean of this many ternary queries, each feature of which is sign(q_i) with probability
  // |q_i| / max|q|, else 0; only keys' features that some ternary query needs are read. 0: exact scores. At most 127.
  // Needs a cache that keeps its keys by feature. Queries over int8 keys are then not quantized.
  std::int64_t bernoulli = 0;
  bool bernoulli_stratified = false;  // of B queries floor(B |q_i| / max|q|) for certain, one more at random
};

// What a sampled call read, counted on request: int64 [B, Hkv] each.
struct SampledReads {
  TensorView v_rows{};      // rows of V; one that several queries of a KV head drew counts once
  TensorView k_features{};  // elements of K
};

}  // namespace heddle
