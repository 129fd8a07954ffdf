// Sampled decode's kernels of one instruction set: scores to logits and masses, weights of a tile, keys by feature, and
// the sum of the drawn values.
#include "host/kernels/pack.h"
#include "host/kernels/simd.h"
#include "host/kernels/softmax.h"
#include "host/sampling_kernels.h"

namespace heddle::host::HEDDLE_ISA {
namespace {

constexpr int kVectors = kTileKeys / kWidth;

HEDDLE_INLINE float sum_of(F x) {
#if HEDDLE_ISA_LEVEL >= 2
  return _mm512_reduce_add_ps((__m512)x);
#else
  return reduce_add(x);
#endif
}

// The mass of logits x(0) .. x(kVectors - 1).
template <class Logits>
HEDDLE_INLINE TileMass mass_of(Logits&& x) {
  F highest = negative_infinity();
  HEDDLE_UNROLL
  for (int n = 0; n < kVectors; ++n) highest = max(x(n), highest);
  const float top = __builtin_ceilf(reduce_max(highest));
  // A tile with nothing in it takes any base: 2^-inf is 0. A NaN gets past max but not past the sum.
  const F base = set1(top == -__builtin_inff() ? 0.0f : top);
  F sum{};
  HEDDLE_UNROLL
  for (int n = 0; n < kVectors; ++n) sum = sum + exp2<5>(x(n) - base);
  return {top, sum_of(sum)};
}

void logits(const TileScores& tile) {
  for (std::int64_t r = 0; r < tile.rows; ++r) {
    const float* s = tile.scores + r * kStreamKeys;
    float* out = tile.logits + r * tile.logit_stride;
    const F factor = set1(tile.factor[r]);
    // Where the next tiles' logits will be written: too many rows for a processor to see where each of them goes.
    for (int n = 0; n < kTileKeys; n += 16) __builtin_prefetch(out + kStreamKeys + n, 1);
    F x[kVectors];
    HEDDLE_UNROLL
    for (int n = 0; n < kVectors; ++n) x[n] = load(s + n * kWidth) * factor;
    if (tile.key_scale != nullptr) {
      for (int n = 0; n < kVectors; ++n) x[n] = x[n] * load(tile.key_scale + n * kWidth);
    }
    if (tile.softcap > 0.0f) {
      for (int n = 0; n < kVectors; ++n) x[n] = set1(tile.softcap) * tanh(x[n] * set1(1.0f / tile.softcap));
    }
    if (tile.bits != nullptr) {
      for (int n = 0; n < kVectors; ++n) x[n] = select(lane_bits(tile.bits[r], n), x[n], negative_infinity());
    }
    HEDDLE_UNROLL
    for (int n = 0; n < kVectors; ++n) store(out + n * kWidth, x[n]);
    tile.mass[r * tile.mass_stride] = mass_of([&](int n) { return x[n]; });
  }
}

TileMass mass(const float* logits, std::uint64_t bits) {
  return mass_of([&](int n) { return select(lane_bits(bits, n), load(logits + n * kWidth), negative_infinity()); });
}

float largest(const float* logits, std::uint64_t bits) {
  F highest = negative_infinity();
  HEDDLE_UNROLL
  for (int n = 0; n < kVectors; ++n) {
    highest = max(select(lane_bits(bits, n), load(logits + n * kWidth), negative_infinity()), highest);
  }
  return reduce_max(highest);
}

std::uint64_t at_least(const float* logits, float least) {
  std::uint64_t bits = 0;
  for (int n = 0; n < kVectors; ++n) {
#if HEDDLE_ISA_LEVEL >= 2
    const __m512 x = _mm512_loadu_ps(logits + n * kWidth);
    const std::uint64_t lanes = _mm512_cmp_ps_mask(x, _mm512_set1_ps(least), _CMP_GE_OQ);
#else
    std::uint64_t lanes = 0;
    for (int i = 0; i < kWidth; ++i) lanes |= std::uint64_t{logits[n * kWidth + i] >= least} << i;
#endif
    bits |= lanes << (n * kWidth);
  }
  return bits;
}

// The sums of x's lanes up to each.
HEDDLE_INLINE F sums_within(F x) {
#if HEDDLE_ISA_LEVEL >= 2
  const __m512i zero = _mm512_setzero_si512();
  x = x + (F)_mm512_alignr_epi32((__m512i)x, zero, 15);
  x = x + (F)_mm512_alignr_epi32((__m512i)x, zero, 14);
  x = x + (F)_mm512_alignr_epi32((__m512i)x, zero, 12);
  return x + (F)_mm512_alignr_epi32((__m512i)x, zero, 8);
#else
  for (int i = 1; i < kWidth; ++i) x[i] += x[i - 1];
  return x;
#endif
}

void weights(const float* logits, std::uint64_t bits, float top, float* out, float* prefix) {
  F sums[kVectors];
  HEDDLE_UNROLL
  for (int n = 0; n < kVectors; ++n) {
    const F x = select(lane_bits(bits, n), exp2<5>(load(logits + n * kWidth) - set1(top)), F{});
    store(out + n * kWidth, x);
    sums[n] = sums_within(x);
  }
  float before = 0.0f;
  HEDDLE_UNROLL
  for (int n = 0; n < kVectors; ++n) {
    store(prefix + n * kWidth, sums[n] + set1(before));
    before += sums[n][kWidth - 1];
  }
}

// Features by sixteen: converted once, then multiplied for four rows at a time with the sums in registers.
void feature_scores(const FeatureRun& run) {
  constexpr int kFeatures = 16;
  const std::int64_t padded = (run.rows + 3) / 4 * 4;
  alignas(64) float keys[kFeatures][kTileKeys];
  alignas(64) float sums[kStreamRows][kTileKeys];
  for (std::int64_t r = 0; r < padded; ++r) std::memset(sums[r], 0, sizeof sums[r]);
  for (int f = 0; f < kFeatures; ++f) std::memset(keys[f], 0, sizeof keys[f]);
  for (std::int64_t first = 0; first < run.num_features; first += kFeatures) {
    const int count = run.num_features - first < kFeatures ? static_cast<int>(run.num_features - first) : kFeatures;
    for (int f = 0; f < count; ++f) {
      row_as_floats(run.keys + run.features[first + f] * run.feature_bytes, run.count, run.dtype, keys[f]);
    }
    for (std::int64_t r = 0; r < padded; r += 4) {
      for (int n = 0; n * kWidth < run.count; n += 2) {
        F acc[4][2];
        HEDDLE_UNROLL
        for (int i = 0; i < 4; ++i) {
          acc[i][0] = load(sums[r + i] + n * kWidth);
          acc[i][1] = load(sums[r + i] + (n + 1) * kWidth);
        }
        for (int f = 0; f < count; ++f) {
          const float* q = run.queries + (first + f) * padded + r;
          const F a = load(keys[f] + n * kWidth), b = load(keys[f] + (n + 1) * kWidth);
          HEDDLE_UNROLL
          for (int i = 0; i < 4; ++i) {
            acc[i][0] = fma(set1(q[i]), a, acc[i][0]);
            acc[i][1] = fma(set1(q[i]), b, acc[i][1]);
          }
        }
        HEDDLE_UNROLL
        for (int i = 0; i < 4; ++i) {
          store(sums[r + i] + n * kWidth, acc[i][0]);
          store(sums[r + i] + (n + 1) * kWidth, acc[i][1]);
        }
      }
    }
  }
  for (std::int64_t r = 0; r < run.rows; ++r) {
    std::memcpy(run.scores + r * kStreamKeys, sums[r], static_cast<std::size_t>(run.count) * sizeof(float));
  }
}

void add_values(const ValueTerm* terms, const std::byte* const* values, std::int64_t count, DType dtype,
                std::int64_t dim, float* o, std::int64_t columns) {
  constexpr std::int64_t kAhead = 16;  // terms: rows lie anywhere, so only this fetches them in time
  const std::int64_t bytes = dim * (dtype == DType::kFloat32                                ? 4
                                    : dtype == DType::kBFloat16 || dtype == DType::kFloat16 ? 2
                                                                                            : 1);
  alignas(64) float row[kMaxDim];
  const std::byte* held = nullptr;
  for (std::int64_t i = 0; i < count; ++i) {
    if (i + kAhead < count && values[i + kAhead] != values[i + kAhead - 1]) {
      for (std::int64_t b = 0; b < bytes; b += 64) __builtin_prefetch(values[i + kAhead] + b);
    }
    if (values[i] != held) {  // rows of one key follow each other: it is read once
      held = values[i];
      row_as_floats(held, dim, dtype, row);
    }
    float* out = o + terms[i].row * columns;
    const F w = set1(terms[i].weight);
    std::int64_t c = 0;
    for (; c + kWidth <= dim; c += kWidth) store(out + c, fma(w, load(row + c), load(out + c)));
    for (; c < dim; ++c) out[c] += terms[i].weight * row[c];
  }
}

}  // namespace

extern const SamplingKernels kSamplingKernels;
const SamplingKernels kSamplingKernels{.logits = logits,
                                       .feature_scores = feature_scores,
                                       .mass = mass,
                                       .largest = largest,
                                       .at_least = at_least,
                                       .weights = weights,
                                       .add_values = add_values};

}  // namespace heddle::host::HEDDLE_ISA
