// Products of word matrices (see host/tile_kernels.h): a register-blocked kernel on vector FMAs, VDPBF16PS or VPDPBUSD, and
// the same products on AMX tiles.
#pragma once

#include "host/kernels/simd.h"
#include "host/tile_kernels.h"

namespace heddle::host::HEDDLE_ISA {

inline constexpr bool kAmx = HEDDLE_ISA_LEVEL >= 4;

// Row block x vectors: accumulators + operands just fit the registers (32 zmm, 16 ymm or xmm).
inline constexpr int kBlockRows = 6;
inline constexpr int kBlockVectors = HEDDLE_ISA_LEVEL >= 2 ? 4 : 2;

template <Math>
struct Product;

template <>
struct Product<Math::kFloat32> {
  using Acc = F;
  static HEDDLE_INLINE F dot(F acc, std::uint32_t a, const std::uint32_t* b) {
    return fma(set1(__builtin_bit_cast(float, a)), load(b), acc);
  }
};

#if HEDDLE_ISA_LEVEL >= 3
template <>
struct Product<Math::kBFloat16> {
  using Acc = F;
  static HEDDLE_INLINE F dot(F acc, std::uint32_t a, const std::uint32_t* b) {
    return (F)_mm512_dpbf16_ps((__m512)acc, (__m512bh)_mm512_set1_epi32(static_cast<int>(a)),
                               (__m512bh)_mm512_loadu_si512(b));
  }
};
// VPDPBUSD takes its first operand unsigned: keys are packed with 128 added, and the accumulator starts at -128 sum(q).
template <>
struct Product<Math::kInt8> {
  using Acc = I;
  static HEDDLE_INLINE I dot(I acc, std::uint32_t a, const std::uint32_t* b) {
    return (I)_mm512_dpbusd_epi32((__m512i)acc, _mm512_loadu_si512(b), _mm512_set1_epi32(static_cast<int>(a)));
  }
};
#endif

// acc[m][n] += sum over `words` of a[m][word] b[word][n]: one register block.
template <Math math, int NV>
HEDDLE_INLINE void multiply_block(typename Product<math>::Acc (&acc)[kBlockRows][NV], const std::uint32_t* a,
                                  std::int64_t a_stride, const std::uint32_t* b, std::int64_t b_stride,
                                  std::int64_t words) {
  for (std::int64_t k = 0; k < words; ++k) {
    HEDDLE_UNROLL
    for (int m = 0; m < kBlockRows; ++m) {
      HEDDLE_UNROLL
      for (int n = 0; n < NV; ++n) acc[m][n] = Product<math>::dot(acc[m][n], a[m * a_stride + k], b + n * kWidth);
    }
    b += b_stride;
  }
}

// scores[m][0..64) = a[m] . panel, for kBlockRows rows.
template <Math math>
inline void score_block(const std::uint32_t* a, std::int64_t words, const std::uint32_t* panel,
                        const std::int32_t* row_sums, float* scores, std::int64_t score_stride) {
  using Acc = typename Product<math>::Acc;
  for (int n0 = 0; n0 < kTileKeys; n0 += kBlockVectors * kWidth) {
    Acc acc[kBlockRows][kBlockVectors];
    HEDDLE_UNROLL
    for (int m = 0; m < kBlockRows; ++m) {
      Acc init{};
      if constexpr (math == Math::kInt8) init = init - 128 * row_sums[m];
      HEDDLE_UNROLL
      for (int n = 0; n < kBlockVectors; ++n) acc[m][n] = init;
    }
    multiply_block<math>(acc, a, words, panel + n0, kTileKeys, words);
    HEDDLE_UNROLL
    for (int m = 0; m < kBlockRows; ++m) {
      HEDDLE_UNROLL
      for (int n = 0; n < kBlockVectors; ++n) store(scores + m * score_stride + n0 + n * kWidth, acc[m][n]);
    }
  }
}

// o[m][...] = alpha[m] o[m][...] + p[m] . panels, for kBlockRows rows and NV vectors of columns.
template <Math math, int NV>
HEDDLE_INLINE void value_columns(const std::uint32_t* p, std::int64_t p_stride, const std::uint32_t* panel,
                                 std::int64_t panel_width, std::int64_t words, const float* alpha, float* o,
                                 std::int64_t o_stride) {
  F acc[kBlockRows][NV];
  HEDDLE_UNROLL
  for (int m = 0; m < kBlockRows; ++m) {
    HEDDLE_UNROLL
    for (int n = 0; n < NV; ++n) {
      acc[m][n] = load(o + m * o_stride + n * kWidth);
      if (alpha != nullptr) acc[m][n] = acc[m][n] * set1(alpha[m]);
    }
  }
  multiply_block<math>(acc, p, p_stride, panel, panel_width, words);
  HEDDLE_UNROLL
  for (int m = 0; m < kBlockRows; ++m) {
    HEDDLE_UNROLL
    for (int n = 0; n < NV; ++n) store(o + m * o_stride + n * kWidth, acc[m][n]);
  }
}

template <Math math>
inline void value_block(const std::uint32_t* p, std::int64_t p_stride, const std::uint32_t* values,
                        std::int64_t columns, const float* alpha, float* o) {
  constexpr std::int64_t kWords = kTileKeys / elements_per_word(math);
  for (std::int64_t c0 = 0; c0 < columns; c0 += kTileKeys) {
    const std::int64_t width = columns - c0 < kTileKeys ? columns - c0 : kTileKeys;
    std::int64_t c = 0;
    for (; c + kBlockVectors * kWidth <= width; c += kBlockVectors * kWidth) {
      value_columns<math, kBlockVectors>(p, p_stride, values + c, width, kWords, alpha, o + c0 + c, columns);
    }
    for (; c < width; c += kWidth) {
      value_columns<math, 1>(p, p_stride, values + c, width, kWords, alpha, o + c0 + c, columns);
    }
    values += kWords * width;
  }
}

#if HEDDLE_ISA_LEVEL >= 4

// AMX: tiles 0..3 accumulate 2 x 2 blocks of 16 x 16, 4 and 5 hold A (16 rows x 16 words), 6 and 7 hold B (16 words x 16).
inline constexpr int kAmxRows = 32;

template <Math math>
HEDDLE_INLINE void amx_dot_2x2() {
  if constexpr (math == Math::kBFloat16) {
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  } else {
    _tile_dpbssd(0, 4, 6);
    _tile_dpbssd(1, 4, 7);
    _tile_dpbssd(2, 5, 6);
    _tile_dpbssd(3, 5, 7);
  }
}

// scores[0..32)[0..64) = a . panel
template <Math math>
inline void amx_scores(const std::uint32_t* a, std::int64_t words, const std::uint32_t* panel, float* scores,
                       std::int64_t score_stride) {
  for (int n0 = 0; n0 < kTileKeys; n0 += 32) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (std::int64_t k = 0; k < words; k += 16) {
      _tile_loadd(6, panel + k * kTileKeys + n0, kTileKeys * 4);
      _tile_loadd(7, panel + k * kTileKeys + n0 + 16, kTileKeys * 4);
      _tile_loadd(4, a + k, words * 4);
      _tile_loadd(5, a + 16 * words + k, words * 4);
      amx_dot_2x2<math>();
    }
    _tile_stored(0, scores + n0, score_stride * 4);
    _tile_stored(1, scores + n0 + 16, score_stride * 4);
    _tile_stored(2, scores + 16 * score_stride + n0, score_stride * 4);
    _tile_stored(3, scores + 16 * score_stride + n0 + 16, score_stride * 4);
  }
}

// o[0..32)[..] += p . values over the given tiles, columns by twos (and one) of 16.
inline void amx_values(const std::uint32_t* p, std::int64_t p_stride, const void* const* values, const bool* active,
                       int tiles, std::int64_t columns, float* o) {
  constexpr std::int64_t kWords = kTileKeys / 2;
  for (std::int64_t c0 = 0; c0 < columns; c0 += kTileKeys) {
    const std::int64_t width = columns - c0 < kTileKeys ? columns - c0 : kTileKeys;
    for (std::int64_t c = 0; c < width; c += 32) {
      const bool pair = c + 16 < width;
      float* at = o + c0 + c;
      _tile_loadd(0, at, columns * 4);
      _tile_loadd(2, at + 16 * columns, columns * 4);
      if (pair) {
        _tile_loadd(1, at + 16, columns * 4);
        _tile_loadd(3, at + 16 * columns + 16, columns * 4);
      }
      for (int t = 0; t < tiles; ++t) {
        if (!active[t]) continue;
        const std::uint32_t* panel = static_cast<const std::uint32_t*>(values[t]) + kWords * c0 + c;
        const std::uint32_t* a = p + t * kWords;
        HEDDLE_UNROLL
        for (std::int64_t k = 0; k < kWords; k += 16) {
          _tile_loadd(6, panel + k * width, width * 4);
          _tile_loadd(4, a + k, p_stride * 4);
          _tile_loadd(5, a + 16 * p_stride + k, p_stride * 4);
          if (pair) {
            _tile_loadd(7, panel + k * width + 16, width * 4);
            amx_dot_2x2<Math::kBFloat16>();
          } else {
            _tile_dpbf16ps(0, 4, 6);
            _tile_dpbf16ps(2, 5, 6);
          }
        }
      }
      _tile_stored(0, at, columns * 4);
      _tile_stored(2, at + 16 * columns, columns * 4);
      if (pair) {
        _tile_stored(1, at + 16, columns * 4);
        _tile_stored(3, at + 16 * columns + 16, columns * 4);
      }
    }
  }
}

inline void amx_configure() {
  struct alignas(64) {
    std::uint8_t palette = 1, start_row = 0, reserved[14] = {};
    std::uint16_t column_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    std::uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
  } config;
  asm volatile("" : : "r"(&config) : "memory");  // GCC 12's intrinsic claims to read only the first 8 bytes
  _tile_loadconfig(&config);
}

#endif  // HEDDLE_ISA_LEVEL >= 4

}  // namespace heddle::host::HEDDLE_ISA
