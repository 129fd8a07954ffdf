// Online softmax on a block of score rows, in base 2.
#pragma once

#include "host/kernels/simd.h"
#include "host/tile_kernels.h"

namespace heddle::host::HEDDLE_ISA {

HEDDLE_INLINE F negative_infinity() { return set1(-__builtin_inff()); }

// 64 visibility bits, kWidth at a time.
HEDDLE_INLINE std::uint32_t lane_bits(std::uint64_t bits, int vector) {
  return static_cast<std::uint32_t>(bits >> (vector * kWidth)) & ((1u << kWidth) - 1u);
}

// Probabilities that multiply int8 values: whole numbers up to this, 1 being the largest of the row in the step.
inline constexpr float kWholeProbability = 32767.0f;

// Stores two vectors of probabilities, as float32, as bf16, or as whole numbers of 16 bits.
template <Math pv>
HEDDLE_INLINE void store_pair(void* row, int column, F a, F b) {
  if constexpr (pv == Math::kFloat32) {
    store(static_cast<float*>(row) + column, a);
    store(static_cast<float*>(row) + column + kWidth, b);
  } else if constexpr (pv == Math::kBFloat16) {
#if HEDDLE_ISA_LEVEL >= 3
    _mm512_storeu_si512(static_cast<std::uint16_t*>(row) + column, (__m512i)_mm512_cvtne2ps_pbh((__m512)b, (__m512)a));
#endif
  } else {
#if HEDDLE_ISA_LEVEL >= 3
    const __m512i order = _mm512_setr_epi64(0, 2, 4, 6, 1, 3, 5, 7);
    const __m512i both = _mm512_packs_epi32(_mm512_cvtps_epi32((__m512)a), _mm512_cvtps_epi32((__m512)b));
    _mm512_storeu_si512(static_cast<std::uint16_t*>(row) + column, _mm512_permutexvar_epi64(order, both));
#endif
  }
}

// What a row brings to the softmax of one step.
struct SoftmaxRow {
  float factor, bias, softcap;
  float* m;
  float* l;
  float* weight = nullptr;  // pv int8: what one stands for in the probabilities stored
  float offset = 0.0f;      // by how much scores are higher than products
};

// scores [kStepTiles * 64] of one row -> probabilities; updates m and l; returns what earlier sums must be multiplied
// by. Tiles that are not active are neither read nor written.
template <Math pv>
inline float softmax_row(float* scores, void* probabilities, const Step& step, const bool* active,
                         std::int64_t bits_row, const SoftmaxRow& row) {
  constexpr int kVectors = kTileKeys / kWidth;
  F top[4] = {negative_infinity(), negative_infinity(), negative_infinity(), negative_infinity()};
  float factor = row.factor, bias = row.bias, offset = row.offset;
  for (int t = 0; t < step.tiles; ++t) {
    if (!active[t]) continue;
    float* s = scores + t * kTileKeys;
    F x[kVectors];
    HEDDLE_UNROLL
    for (int n = 0; n < kVectors; ++n) x[n] = load(s + n * kWidth);
    if (const float* key_scale = step.key_scale[t]; key_scale != nullptr || row.softcap > 0.0f) {
      // Scores that are not a multiple of the product, and are rewritten in place.
      HEDDLE_UNROLL
      for (int n = 0; n < kVectors; ++n) {
        x[n] = x[n] - set1(row.offset);
        if (key_scale != nullptr) x[n] = x[n] * load(key_scale + n * kWidth);
        if (row.softcap > 0.0f) {
          x[n] = set1(row.softcap) * tanh(fma(x[n], set1(row.factor), set1(row.bias)) * set1(1.0f / row.softcap));
        }
        store(s + n * kWidth, x[n]);
      }
      offset = 0.0f;
      if (row.softcap > 0.0f) {
        factor = 1.0f;
        bias = 0.0f;
      }
    }
    if (const std::uint64_t* bits = step.bits[t]; bits != nullptr) {
      HEDDLE_UNROLL
      for (int n = 0; n < kVectors; ++n) x[n] = select(lane_bits(bits[bits_row], n), x[n], negative_infinity());
    }
    HEDDLE_UNROLL
    for (int n = 0; n < kVectors; ++n) top[n % 4] = max(x[n], top[n % 4]);
  }
  const float highest = reduce_max(max(max(top[0], top[1]), max(top[2], top[3])));
  const float candidate = highest == -__builtin_inff() ? highest : __builtin_fmaf(highest - offset, factor, bias);
  const float m_old = *row.m;
  float m = candidate > m_old ? candidate : m_old;
  // A row that has seen nothing keeps m = -inf; any finite number in its place gives probabilities of 0.
  float base = m == -__builtin_inff() ? 0.0f : m;
  float shift = bias - base;
  if (offset != 0.0f) {
    // factor * offset is large, and what the sum loses by rounding is the same for all of the row's scores of the step:
    // a maximum that takes it over leaves nothing lost.
    const double constant = static_cast<double>(bias) - static_cast<double>(factor) * offset;
    shift = static_cast<float>(constant - base);
    base = static_cast<float>(constant - shift);
    if (m != -__builtin_inff()) m = base;
  }
  // Whole numbers count from the step's own maximum, so that they are as fine where a step weighs little.
  constexpr bool kWhole = pv == Math::kInt8;
  const bool none = candidate == -__builtin_inff();
  constexpr float kLog2Whole = 14.99995597f;
  if constexpr (kWhole) shift = bias - (none ? 0.0f : candidate) + kLog2Whole;
  F sum[2] = {};
  for (int t = 0; t < step.tiles; ++t) {
    if (!active[t]) continue;
    const float* s = scores + t * kTileKeys;
    const std::uint64_t* bits = step.bits[t];
    HEDDLE_UNROLL
    for (int n = 0; n < kVectors; n += 2) {
      F p[2];
      HEDDLE_UNROLL
      for (int i = 0; i < 2; ++i) {
        p[i] = exp2<pv == Math::kFloat32 ? 5 : 4>(fma(load(s + (n + i) * kWidth), set1(factor), set1(shift)));
        if (bits != nullptr) p[i] = select(lane_bits(bits[bits_row], n + i), p[i], F{});
        sum[i] = sum[i] + p[i];
      }
      store_pair<pv>(probabilities, t * kTileKeys + n * kWidth, p[0], p[1]);
    }
  }
  const float alpha = exp2<5>(set1(m_old - base))[0];
  float total = reduce_add(sum[0] + sum[1]);
  if constexpr (kWhole) {
    *row.weight = none ? 0.0f : exp2<5>(set1(candidate - base))[0] / kWholeProbability;
    total *= *row.weight;
  }
  *row.l = *row.l * alpha + total;
  *row.m = m;
  return alpha;
}

}  // namespace heddle::host::HEDDLE_ISA
