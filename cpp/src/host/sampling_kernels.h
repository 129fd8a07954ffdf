// The kernels of sampled decode beside those that stream (host/stream_kernels.h). Compiled once per instruction set
// (host/kernels/sampling.cpp).
#pragma once

#include <cstddef>
#include <cstdint>

#include "heddle/tensor.h"
#include "host/stream_kernels.h"

namespace heddle::host {

// Logits are scores in base 2. The mass of a tile is the sum of 2^(logit - top) over its keys; top is a whole number,
// so that tiles are put on one scale without rounding.
struct TileMass {
  float top = 0.0f;
  float sum = 0.0f;
};

struct TileShares {
  float top = 0.0f;
  double total = 0.0;  // NaN if a mass is
};

// The scores of one tile for the rows of a row tile.
struct TileScores {
  const float* scores = nullptr;  // [stream_rows(rows)][kStreamKeys], products as the kernels leave them
  std::int64_t rows = 0;
  const float* factor = nullptr;        // [rows]
  const float* key_scale = nullptr;     // [64] or null
  float softcap = 0.0f;                 // in base 2
  const std::uint64_t* bits = nullptr;  // [rows] visible keys, or null: all
  float* logits = nullptr;              // [rows][64]; -inf where a key is not seen
  std::int64_t next = 0;                // floats from there to the logits that will be written next
  TileMass* mass = nullptr;             // [rows], mass_stride apart
  std::int64_t mass_stride = 0;
};

// Keys by feature: `count` consecutive slots of a page.
struct FeatureRun {
  const std::byte* keys = nullptr;  // the first slot of feature 0
  std::int64_t feature_bytes = 0;   // from feature to feature
  DType dtype = DType::kFloat32;
  int count = 0;                           // at most 64
  const std::int32_t* features = nullptr;  // those that some row needs
  std::int64_t num_features = 0;
  const float* queries = nullptr;  // [num_features][rows padded to 4]: gathered, so that a feature's are together
  std::int64_t rows = 0;
  float* scores = nullptr;  // [rows][kStreamKeys], written
};

// One row of V in the sum of one row of the output.
struct ValueTerm {
  std::int32_t key = 0;  // along the unit's keys
  std::int32_t row = 0;
  const std::byte* value = nullptr;
  float weight = 0.0f;
};

struct SamplingKernels {
  void (*logits)(const TileScores& tile) = nullptr;
  void (*feature_scores)(const FeatureRun& run) = nullptr;
  // The mass of the keys of one tile whose bit is set.
  TileMass (*mass)(const float* logits, std::uint64_t bits) = nullptr;
  // The largest logit whose bit is set, and the keys whose logits are at least so large.
  float (*largest)(const float* logits, std::uint64_t bits) = nullptr;
  std::uint64_t (*at_least)(const float* logits, float least) = nullptr;
  // The masses of `count` tiles, divided by 2^(their largest top), and the sum of these.
  TileShares (*shares)(const TileMass* masses, std::int64_t count, double* shares) = nullptr;
  // weights[i] = 2^(logit - top), or 0 where the bit is not set: 64.
  void (*weights)(const float* logits, std::uint64_t bits, float top, float* weights) = nullptr;
  // The key of a tile at which the sums of its weights reach (target - before) * scale, for each of the targets.
  void (*find)(const float* logits, std::uint64_t bits, float top, const double* targets, std::int64_t count,
               double before, double scale, std::uint8_t* keys) = nullptr;
  // o[term.row] += term.weight * row of V, in the order of the terms.
  void (*add_values)(const ValueTerm* terms, std::int64_t count, DType dtype, std::int64_t dim, float* o,
                     std::int64_t columns) = nullptr;
};

const SamplingKernels& sampling_kernels();  // of the current ISA

}  // namespace heddle::host
