// Products of word matrices (see host/tile_kernels.h): a register-blocked kernel on vector FMAs, VDPBF16PS or VPDPBUSD,
// and the same products on AMX tiles.
#pragma once

#include <type_traits>

#include "host/kernels/simd.h"
#include "host/tile_kernels.h"

namespace heddle::host::HEDDLE_ISA {

inline constexpr bool kAmx = HEDDLE_ISA_LEVEL >= 4;
inline constexpr std::int64_t kAmxTile = 256;  // words of an AMX tile

// Where packed words lie. For vectors, panels of up to 64 columns, row by row. For AMX, 16 x 16 tiles one after the
// other, in the order in which they are multiplied: keys by 32, 16 words of D, then 16; values by 16 columns, then 16
// words of keys.
template <Math math>
constexpr std::int64_t key_word(std::int64_t word, std::int64_t key, std::int64_t words) {
  if (kAmx && math != Math::kFloat32) {
    return (key / 32 * (words / 8) + word / 16 * 2 + key % 32 / 16) * kAmxTile + word % 16 * 16 + key % 16;
  }
  return word * kTileKeys + key;
}
template <Math math>
constexpr std::int64_t value_word(std::int64_t word, std::int64_t column, std::int64_t columns) {
  constexpr std::int64_t kWords = kTileKeys / elements_per_word(math);
  if (kAmx && math != Math::kFloat32) {
    return (column / 16 * (kWords / 16) + word / 16) * kAmxTile + word % 16 * 16 + column % 16;
  }
  const std::int64_t panel = column / kTileKeys * kTileKeys;
  const std::int64_t width = columns - panel < kTileKeys ? columns - panel : kTileKeys;
  return panel * kWords + word * width + column % kTileKeys;
}

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

// Scores of whole numbers are left as floats that are higher by this, where every number up to 2^22 is exact: the
// accumulators start from its bits, and nothing has to be converted. More than 64 words of D could sum up to more.
constexpr float score_offset(Math math, std::int64_t words) {
  return math == Math::kInt8 && HEDDLE_ISA_LEVEL == 3 && words <= 64 ? 0x1.8p23f : 0.0f;
}

template <Math math, int NV>
HEDDLE_INLINE void score_columns(const std::uint32_t* a, std::int64_t words, const std::uint32_t* panel,
                                 const std::int32_t* row_sums, float* scores, std::int64_t score_stride) {
  using Acc = typename Product<math>::Acc;
  const float offset = score_offset(math, words);
  Acc acc[kBlockRows][NV];
  HEDDLE_UNROLL
  for (int m = 0; m < kBlockRows; ++m) {
    Acc init{};
    if constexpr (math == Math::kInt8) init = init + (__builtin_bit_cast(std::int32_t, offset) - 128 * row_sums[m]);
    HEDDLE_UNROLL
    for (int n = 0; n < NV; ++n) acc[m][n] = init;
  }
  multiply_block<math>(acc, a, words, panel, kTileKeys, words);
  HEDDLE_UNROLL
  for (int m = 0; m < kBlockRows; ++m) {
    HEDDLE_UNROLL
    for (int n = 0; n < NV; ++n) {
      float* out = scores + m * score_stride + n * kWidth;
      if (math == Math::kInt8 && offset == 0.0f) {
        store(out, __builtin_convertvector(acc[m][n], F));
      } else {
        store(out, acc[m][n]);
      }
    }
  }
}

// scores[m][first..last) = a[m] . panel (+ score_offset()), for kBlockRows rows; whole vectors of keys.
template <Math math>
inline void score_block(const std::uint32_t* a, std::int64_t words, const std::uint32_t* panel,
                        const std::int32_t* row_sums, float* scores, std::int64_t score_stride, int first, int last) {
  const int end = (last + kWidth - 1) / kWidth * kWidth;
  int n = first / kWidth * kWidth;
  const auto columns = [&](auto vectors) {
    score_columns<math, vectors>(a, words, panel + n, row_sums, scores + n, score_stride);
    n += vectors * kWidth;
  };
  while (end - n >= kBlockVectors * kWidth) columns(std::integral_constant<int, kBlockVectors>{});
  if constexpr (kBlockVectors == 4) {
    if (end - n == 3 * kWidth) columns(std::integral_constant<int, 3>{});
    if (end - n == 2 * kWidth) columns(std::integral_constant<int, 2>{});
  }
  if (end - n == kWidth) columns(std::integral_constant<int, 1>{});
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

// One tile's values, of its keys [first, last), rounded to whole words.
template <Math math>
inline void value_block(const std::uint32_t* p, std::int64_t p_stride, const std::uint32_t* values,
                        std::int64_t columns, const float* alpha, float* o, int first, int last) {
  constexpr int kPerWord = elements_per_word(math);
  constexpr std::int64_t kWords = kTileKeys / kPerWord;
  const std::int64_t begin = first / kPerWord, words = (last + kPerWord - 1) / kPerWord - begin;
  p += begin;
  for (std::int64_t c0 = 0; c0 < columns; c0 += kTileKeys) {
    const std::int64_t width = columns - c0 < kTileKeys ? columns - c0 : kTileKeys;
    const std::uint32_t* panel = values + begin * width;
    std::int64_t c = 0;
    for (; c + kBlockVectors * kWidth <= width; c += kBlockVectors * kWidth) {
      value_columns<math, kBlockVectors>(p, p_stride, panel + c, width, words, alpha, o + c0 + c, columns);
    }
    for (; c < width; c += kWidth) {
      value_columns<math, 1>(p, p_stride, panel + c, width, words, alpha, o + c0 + c, columns);
    }
    values += kWords * width;
  }
}

// One tile of P V element by element, skipping what is masked: 0 * NaN is NaN, and memory that a row must not see may
// hold it.
template <Math pv>
inline void add_visible_values(const void* p_row, std::uint64_t bits, const void* values, std::int64_t columns,
                               float* o) {
  constexpr std::int64_t kPerWord = elements_per_word(pv);
  for (; bits != 0; bits &= bits - 1) {
    const int key = __builtin_ctzll(bits);
    const float p = pv == Math::kFloat32 ? static_cast<const float*>(p_row)[key]
                                         : bf16_to_float(static_cast<const std::uint16_t*>(p_row)[key]);
    for (std::int64_t c = 0; c < columns; ++c) {
      const std::int64_t at = value_word<pv>(key / kPerWord, c, columns) * kPerWord + key % kPerWord;
      o[c] += p * (pv == Math::kFloat32 ? static_cast<const float*>(values)[at]
                                        : bf16_to_float(static_cast<const std::uint16_t*>(values)[at]));
    }
  }
}

HEDDLE_INLINE void scale_row(float* o, std::int64_t columns, float alpha) {
  if (alpha == 1.0f) return;
  for (std::int64_t c = 0; c < columns; c += kWidth) store(o + c, load(o + c) * set1(alpha));
}

#if HEDDLE_ISA_LEVEL >= 4

// AMX: tiles 0..3 accumulate 2 x 2 blocks of 16 x 16, 4 and 5 hold A (16 rows x 16 words), 6 and 7 hold B (16 words x
// 16).
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

// scores[0..32)[0..32) = a . keys: `keys` is the first of their AMX tiles (see key_word()).
template <Math math>
HEDDLE_INLINE void amx_scores_32x32(const std::uint32_t* a, std::int64_t words, const std::uint32_t* keys,
                                    float* scores, std::int64_t score_stride) {
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (std::int64_t k = 0; k < words; k += 16) {
    _tile_loadd(6, keys + k * 32, 64);
    _tile_loadd(7, keys + k * 32 + kAmxTile, 64);
    _tile_loadd(4, a + k, words * 4);
    _tile_loadd(5, a + 16 * words + k, words * 4);
    amx_dot_2x2<math>();
  }
  _tile_stored(0, scores, score_stride * 4);
  _tile_stored(1, scores + 16, score_stride * 4);
  _tile_stored(2, scores + 16 * score_stride, score_stride * 4);
  _tile_stored(3, scores + 16 * score_stride + 16, score_stride * 4);
}

// o[0..32)[0..32) (or 16 columns, not `pair`) += p . values over the given KV tiles, each given by the first AMX tile
// of its columns (see value_word()); p's KV tiles lie side by side.
HEDDLE_INLINE void amx_values_32x32(const std::uint32_t* p, std::int64_t p_stride, const std::uint32_t* const* values,
                                    int tiles, bool pair, float* o, std::int64_t o_stride) {
  constexpr std::int64_t kWords = kTileKeys / 2, kNextColumns = kWords / 16 * kAmxTile;
  _tile_loadd(0, o, o_stride * 4);
  _tile_loadd(2, o + 16 * o_stride, o_stride * 4);
  if (pair) {
    _tile_loadd(1, o + 16, o_stride * 4);
    _tile_loadd(3, o + 16 * o_stride + 16, o_stride * 4);
  }
  for (int t = 0; t < tiles; ++t) {
    HEDDLE_UNROLL
    for (std::int64_t k = 0; k < kWords; k += 16) {
      const std::uint32_t* v = values[t] + k / 16 * kAmxTile;
      _tile_loadd(6, v, 64);
      _tile_loadd(4, p + t * kWords + k, p_stride * 4);
      _tile_loadd(5, p + 16 * p_stride + t * kWords + k, p_stride * 4);
      if (pair) {
        _tile_loadd(7, v + kNextColumns, 64);
        amx_dot_2x2<Math::kBFloat16>();
      } else {
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(2, 5, 6);
      }
    }
  }
  _tile_stored(0, o, o_stride * 4);
  _tile_stored(2, o + 16 * o_stride, o_stride * 4);
  if (pair) {
    _tile_stored(1, o + 16, o_stride * 4);
    _tile_stored(3, o + 16 * o_stride + 16, o_stride * 4);
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
