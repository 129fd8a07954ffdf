// The kernels of sampled decode beside those that stream (host/stream_kernels.h). Compiled once per instruction set
// (host/kernels/sampling.cpp).
#pragma once

#include <cstddef>
#include <cstdint>

#include "heddle/tensor.h"
#include "host/stream_kernels.h"

namespace heddle::host {

// Logits are scores in base 2. The mass of a tile is the sum of 2^(logit - top) over its keys; top is a whole number,
// so that tiles are put on one scale without rounding. It is the sum of its parts, which tell a draw what little of the
// tile to look at.
inline constexpr int kPartKeys = 16;
inline constexpr int kTileParts = kTileKeys / kPartKeys;

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
  float* logits = nullptr;              // [rows][64], aligned to 64 bytes; -inf where a key is not seen
  std::int64_t next = 0;                // floats from there to the logits that will be written next; 0: past the caches
  TileMass* mass = nullptr;             // [rows], mass_stride apart
  float* parts = nullptr;               // [rows][kTileParts]
  std::int64_t next_parts = 0;          // floats from there to the parts that will be written next
  std::int64_t mass_stride = 0;
};

// A draw within a part of a tile.
struct Pick {
  const float* logits = nullptr;  // [kPartKeys]
  std::uint32_t bits = 0;         // keys that may be drawn; some of them weigh something
  float top = 0.0f, target = 0.0f;
  float weight = 0.0f;   // of what is drawn
  std::int32_t key = 0;  // the first of the part; then the drawn one
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

// Where a draw lands that `place` parts or keys lie before, if `some` of them weigh anything: rounding may have passed
// the last one, or stopped at one without weight.
constexpr int nearest(std::uint32_t some, int place) {
  if ((some >> place & 1) != 0) return place;
  const std::uint32_t earlier = some & ((1u << place) - 1);
  return earlier != 0 ? 31 - __builtin_clz(earlier) : __builtin_ctz(some);
}

struct SamplingKernels {
  void (*logits)(const TileScores& tile) = nullptr;
  void (*feature_scores)(const FeatureRun& run) = nullptr;
  // The mass of the keys of one tile whose bit is set, and its parts.
  TileMass (*mass)(const float* logits, std::uint64_t bits, float* parts) = nullptr;
  // The largest logit whose bit is set, and the keys whose logits are at least so large.
  float (*largest)(const float* logits, std::uint64_t bits) = nullptr;
  std::uint64_t (*at_least)(const float* logits, float least) = nullptr;
  // The masses of `count` tiles, divided by 2^(their largest top), and the sum of these.
  TileShares (*shares)(const TileMass* masses, std::int64_t count, double* shares) = nullptr;
  // weights[i] = 2^(logit - top), or 0 where the bit is not set: 64.
  void (*weights)(const float* logits, std::uint64_t bits, float top, float* weights) = nullptr;
  // The key at which the sums of the part's weights, 2^(logit - top), reach each pick's target.
  void (*find)(Pick* picks, std::int64_t count) = nullptr;
  // o[term.row] += term.weight * row of V, in the order of the terms.
  void (*add_values)(const ValueTerm* terms, std::int64_t count, DType dtype, std::int64_t dim, float* o,
                     std::int64_t columns) = nullptr;
};

const SamplingKernels& sampling_kernels();  // of the current ISA

}  // namespace heddle::host
