// The random numbers of sampled attention: which counter stands for which draw. Every backend takes them from here.
#pragma once

#include <array>
#include <cstdint>

#include "aggregate/philox.h"
#include "heddle/sampling.h"

namespace heddle::aggregate {

// The fourth word of the counter: 1 bit what is drawn, 11 bits the query of the call, 20 bits the number of the draw.
inline constexpr std::int64_t kMaxDraws = std::int64_t{1} << 20;
inline constexpr std::int64_t kMaxQueries = std::int64_t{1} << 11;
inline constexpr std::int64_t kMaxBernoulli = 127;  // counts of ternary queries fit int8
inline constexpr std::int64_t kSampleTile = 64;     // keys of a tile of kSystematicTile

// Draws of one row: a query and one of its heads.
class Draws {
 public:
  Draws(const Sampling& sampling, std::uint32_t offset, std::int64_t request, std::int64_t q_head, std::int64_t query)
      : counter_{static_cast<std::uint32_t>(request), static_cast<std::uint32_t>(q_head), offset,
                 static_cast<std::uint32_t>(query << 20)},
        key_{static_cast<std::uint32_t>(sampling.seed), static_cast<std::uint32_t>(sampling.seed >> 32)} {}

  // Uniform in (0, 1). Of a row of V: draw m (iid, stratified), 0 (systematic), or the tile (systematic_tile).
  double value(std::int64_t draw) const { return uniform(words(draw)[0]); }

  // Four at a time, for the features of Bernoulli queries.
  std::array<double, 4> features(std::int64_t quad) const {
    const auto w = words(quad | std::int64_t{1} << 31);
    return {uniform(w[0]), uniform(w[1]), uniform(w[2]), uniform(w[3])};
  }

 private:
  std::array<std::uint32_t, 4> words(std::int64_t draw) const {
    return philox({counter_[0], counter_[1], counter_[2], counter_[3] | static_cast<std::uint32_t>(draw)}, key_);
  }
  // The middle of one of 2^32 intervals: neither 0 nor 1.
  static double uniform(std::uint32_t word) { return (word + 0.5) * 0x1p-32; }

  std::array<std::uint32_t, 4> counter_;
  std::array<std::uint32_t, 2> key_;
};

// The sum of the ternary queries of a row: counts[i] in [-B, B], with mean counts[i] * unit = q_i. Returns
// unit = max|q| / B. Draw number i * B + b is that of feature i in query b; in the stratified form number i.
double ternary_queries(const double* q, std::int64_t dim, const Sampling& sampling, const Draws& draws,
                       std::int8_t* counts);

}  // namespace heddle::aggregate
