// Packing of rows into words (see host/tile_kernels.h): the only code of the tile path that knows how rows are stored.
#pragma once

#include "host/kernels/matmul.h"
#include "host/kernels/simd.h"
#include "host/tile_kernels.h"

namespace heddle::host::HEDDLE_ISA {

HEDDLE_INLINE float load_element(const std::byte* row, std::int64_t i, DType dtype) {
  switch (dtype) {
    case DType::kFloat32: {
      float x;
      std::memcpy(&x, row + 4 * i, 4);
      return x;
    }
    case DType::kBFloat16: {
      std::uint16_t x;
      std::memcpy(&x, row + 2 * i, 2);
      return bf16_to_float(x);
    }
    case DType::kFloat16: {
      std::uint16_t x;
      std::memcpy(&x, row + 2 * i, 2);
      return fp16_to_float(x);
    }
    case DType::kInt8: return static_cast<float>(static_cast<std::int8_t>(row[i]));
    default: return e4m3_to_float(static_cast<std::uint8_t>(row[i]));
  }
}

template <DType dtype>
inline void load_floats(const std::byte* row, std::int64_t dim, float* out) {
  for (std::int64_t i = 0; i < dim; ++i) out[i] = load_element(row, i, dtype);
}

// One row as floats, as stored.
inline void row_as_floats(const std::byte* row, std::int64_t dim, DType dtype, float* out) {
  switch (dtype) {
    case DType::kFloat32: std::memcpy(out, row, static_cast<std::size_t>(dim) * 4); break;
    case DType::kBFloat16: load_floats<DType::kBFloat16>(row, dim, out); break;
    case DType::kFloat16: load_floats<DType::kFloat16>(row, dim, out); break;
    case DType::kInt8: load_floats<DType::kInt8>(row, dim, out); break;
    default: load_floats<DType::kFloat8E4M3>(row, dim, out);
  }
}

// One row as words of `math`, zero-padded to `words`. scratch: kMaxDim floats.
inline void row_as_words(const RowSource& source, std::int64_t index, Math math, std::int64_t words, void* out,
                         float* scratch) {
  const std::byte* row = source.rows[index];
  const std::int64_t dim = source.dim;
  if (math == Math::kFloat32) {
    float* x = static_cast<float*>(out);
    row_as_floats(row, dim, source.dtype, x);
    if (source.scale != nullptr) {
      const float scale = source.scale[index];
      for (std::int64_t i = 0; i < dim; ++i) x[i] *= scale;
    }
    for (std::int64_t i = dim; i < words; ++i) x[i] = 0.0f;
  } else if (math == Math::kBFloat16) {
    std::uint16_t* x = static_cast<std::uint16_t*>(out);
    if (source.dtype == DType::kBFloat16) {
      std::memcpy(x, row, static_cast<std::size_t>(dim) * 2);
#if HEDDLE_ISA_LEVEL >= 3
    } else if (source.dtype == DType::kInt8) {  // exact in bf16
      const std::int64_t whole = dim / 16 * 16;
      for (std::int64_t i = 0; i < whole; i += 16) {
        const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(row + i));
        const __m512 wide = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes));
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(x + i), (__m256i)_mm512_cvtneps_pbh(wide));
      }
      for (std::int64_t i = whole; i < dim; ++i) x[i] = float_to_bf16(load_element(row, i, DType::kInt8));
#endif
    } else {  // int8 and fp8 values are exact in bf16
      row_as_floats(row, dim, source.dtype, scratch);
      for (std::int64_t i = 0; i < dim; ++i) x[i] = float_to_bf16(scratch[i]);
    }
    for (std::int64_t i = dim; i < words * 2; ++i) x[i] = 0;
  } else {
    std::memcpy(out, row, static_cast<std::size_t>(dim));
    std::memset(static_cast<std::byte*>(out) + dim, 0, static_cast<std::size_t>(words * 4 - dim));
  }
}

inline constexpr std::int64_t kMaxDim = 576;

// 64 rows of `stored` words -> key_word() order of `words`, the others 0; all of them with `flip` inverted.
template <Math math>
inline void transpose_words(const std::byte* const* rows, std::int64_t stored, std::int64_t words, std::uint32_t flip,
                            std::uint32_t* panel) {
#if HEDDLE_ISA_LEVEL >= 2
  // 16 x 16 blocks in registers: interleave words, pairs, then 128-bit lanes.
  for (std::int64_t w0 = 0; w0 < words; w0 += 16) {
    const std::int64_t left = words - w0 < 16 ? words - w0 : 16;
    const std::int64_t present = stored - w0 < 0 ? 0 : stored - w0 < 16 ? stored - w0 : 16;
    const __mmask16 mask = static_cast<__mmask16>((1u << present) - 1u);
    for (int r0 = 0; r0 < kTileKeys; r0 += 16) {
      __m512i a[16], b[16];
      HEDDLE_UNROLL
      for (int i = 0; i < 16; ++i) {
        a[i] = _mm512_xor_si512(_mm512_maskz_loadu_epi32(mask, rows[r0 + i] + w0 * 4),
                                _mm512_set1_epi32(static_cast<int>(flip)));
      }
      HEDDLE_UNROLL
      for (int i = 0; i < 16; i += 2) {
        b[i] = _mm512_unpacklo_epi32(a[i], a[i + 1]);
        b[i + 1] = _mm512_unpackhi_epi32(a[i], a[i + 1]);
      }
      HEDDLE_UNROLL
      for (int i = 0; i < 16; i += 4) {
        a[i] = _mm512_unpacklo_epi64(b[i], b[i + 2]);
        a[i + 1] = _mm512_unpackhi_epi64(b[i], b[i + 2]);
        a[i + 2] = _mm512_unpacklo_epi64(b[i + 1], b[i + 3]);
        a[i + 3] = _mm512_unpackhi_epi64(b[i + 1], b[i + 3]);
      }
      // a[4 g + c] holds, in lane l, word 4 l + c of rows 4 g .. 4 g + 3.
      HEDDLE_UNROLL
      for (int c = 0; c < 4; ++c) {
        b[c] = _mm512_shuffle_i32x4(a[c], a[4 + c], 0x44);
        b[4 + c] = _mm512_shuffle_i32x4(a[c], a[4 + c], 0xee);
        b[8 + c] = _mm512_shuffle_i32x4(a[8 + c], a[12 + c], 0x44);
        b[12 + c] = _mm512_shuffle_i32x4(a[8 + c], a[12 + c], 0xee);
      }
      HEDDLE_UNROLL
      for (int c = 0; c < 4; ++c) {
        a[c] = _mm512_shuffle_i32x4(b[c], b[8 + c], 0x88);
        a[4 + c] = _mm512_shuffle_i32x4(b[c], b[8 + c], 0xdd);
        a[8 + c] = _mm512_shuffle_i32x4(b[4 + c], b[12 + c], 0x88);
        a[12 + c] = _mm512_shuffle_i32x4(b[4 + c], b[12 + c], 0xdd);
      }
      if (left == 16) {
        HEDDLE_UNROLL
        for (int i = 0; i < 16; ++i) _mm512_storeu_si512(panel + key_word<math>(w0 + i, r0, words), a[i]);
      } else {
        HEDDLE_UNROLL
        for (int i = 0; i < 16; ++i) {
          if (i < left) _mm512_storeu_si512(panel + key_word<math>(w0 + i, r0, words), a[i]);
        }
      }
    }
  }
#else
  for (std::int64_t w = 0; w < words; ++w) {
    for (int r = 0; r < kTileKeys; ++r) {
      std::uint32_t x = 0;
      if (w < stored) std::memcpy(&x, rows[r] + w * 4, 4);
      panel[key_word<math>(w, r, words)] = x ^ flip;
    }
  }
#endif
}

constexpr DType word_dtype(Math math) {
  return math == Math::kFloat32 ? DType::kFloat32 : math == Math::kBFloat16 ? DType::kBFloat16 : DType::kInt8;
}

inline void negate_words(void* row, std::int64_t dim, Math math) {
  if (math == Math::kFloat32) {
    float* x = static_cast<float*>(row);
    for (std::int64_t i = 0; i < dim; ++i) x[i] = -x[i];
  } else if (math == Math::kBFloat16) {
    std::uint16_t* x = static_cast<std::uint16_t*>(row);
    for (std::int64_t i = 0; i < dim; ++i) x[i] = static_cast<std::uint16_t>(x[i] ^ 0x8000u);
  } else {
    std::int8_t* x = static_cast<std::int8_t*>(row);
    for (std::int64_t i = 0; i < dim; ++i) x[i] = static_cast<std::int8_t>(-x[i]);
  }
}

inline void pack_queries(const RowSource& source, Math math, bool negate, void* out, std::int32_t* row_sums) {
  const std::int64_t words = query_words(source.dim, math);
  alignas(64) float scratch[kMaxDim];
  for (std::int64_t r = 0; r < source.count; ++r) {
    std::byte* row = static_cast<std::byte*>(out) + r * words * 4;
    row_as_words(source, r, math, words, row, scratch);
    if (negate) negate_words(row, source.dim, math);
    if (math == Math::kInt8) {
      std::int32_t sum = 0;
      for (std::int64_t i = 0; i < source.dim; ++i) sum += reinterpret_cast<const std::int8_t*>(row)[i];
      row_sums[r] = sum;
    }
  }
}

inline void pack_keys(const RowSource& source, Math math, void* out) {
  const std::int64_t words = query_words(source.dim, math);
  alignas(64) float scratch[kMaxDim];
  alignas(64) std::uint32_t copies[kTileKeys * (kMaxDim + 16)];
  alignas(64) static constexpr std::byte kZeros[kMaxDim * 4] = {};
  // Rows that are words as they are stay where they lie.
  const bool as_stored =
      source.dtype == word_dtype(math) && source.scale == nullptr && source.dim % elements_per_word(math) == 0;
  const std::byte* rows[kTileKeys];
  for (std::int64_t r = 0; r < kTileKeys; ++r) {
    rows[r] = r >= source.count ? kZeros
              : as_stored       ? source.rows[r]
                                : reinterpret_cast<std::byte*>(copies + r * words);
    if (r < source.count && !as_stored) row_as_words(source, r, math, words, copies + r * words, scratch);
  }
  const std::int64_t stored = source.dim / elements_per_word(math) + (source.dim % elements_per_word(math) != 0);
  const std::uint32_t flip = math == Math::kInt8 && !kAmx ? 0x80808080u : 0;  // VPDPBUSD reads keys unsigned
  if (math == Math::kFloat32) {
    transpose_words<Math::kFloat32>(rows, stored, words, flip, static_cast<std::uint32_t*>(out));
  } else {  // bf16 and int8 alike
    transpose_words<Math::kBFloat16>(rows, stored, words, flip, static_cast<std::uint32_t*>(out));
  }
}

// -> value_word() order. Returns whether all values are finite.
inline bool pack_values(const RowSource& source, Math math, void* out) {
  const std::int64_t columns = padded_columns(source.dim);
  const int per_word = elements_per_word(math);
  alignas(64) float scratch[kMaxDim];
  alignas(64) std::uint32_t pair[2][kMaxDim + 16];
  std::uint32_t nonfinite = 0;
  // Rows of 16-bit words stay where they lie, and so do those of int8, which are widened as they are read.
  const bool int8 = HEDDLE_ISA_LEVEL >= 3 && source.dtype == DType::kInt8;
  const bool as_stored = (source.dtype == DType::kBFloat16 || int8) && math == Math::kBFloat16 && source.dim == columns;
  for (int w = 0; w < kTileKeys / per_word; ++w) {
    const std::byte* rows[2];
    for (int e = 0; e < per_word; ++e) {
      const std::int64_t key = w * per_word + e;
      rows[e] = reinterpret_cast<const std::byte*>(pair[e]);
      if (as_stored && key < source.count) {
        rows[e] = source.rows[key];
      } else if (key < source.count) {
        row_as_words(source, key, math, columns / per_word, pair[e], scratch);
      } else {
        std::memset(pair[e], 0, static_cast<std::size_t>(columns) * 4 / static_cast<std::size_t>(per_word));
      }
    }
    if (math == Math::kFloat32) {
      for (std::int64_t c = 0; c < columns; ++c) nonfinite |= (pair[0][c] & 0x7f800000u) == 0x7f800000u;
    } else {
      // Interleave two keys: the even one in the lower half of each word.
      std::uint32_t* both = reinterpret_cast<std::uint32_t*>(scratch);
#if HEDDLE_ISA_LEVEL >= 3
      const __m512i exponents = _mm512_set1_epi16(0x7f80);
      const auto half = [&](int e, std::int64_t c) {
        if (!as_stored || !int8 || w * 2 + e >= source.count) {
          return _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(rows[e] + 2 * c)));
        }
        const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(rows[e] + c));
        const __m512 wide = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes));  // exact in bf16: its upper half
        return _mm512_srli_epi32((__m512i)wide, 16);
      };
      for (std::int64_t c = 0; c < columns; c += 16) {
        const __m512i words = _mm512_or_si512(half(0, c), _mm512_slli_epi32(half(1, c), 16));
        nonfinite |= _mm512_cmpeq_epi16_mask(_mm512_and_si512(words, exponents), exponents) != 0;
        _mm512_store_si512(both + c, words);
      }
#else
      for (std::int64_t c = 0; c < columns; ++c) {
        std::uint16_t even, odd;
        std::memcpy(&even, rows[0] + 2 * c, 2);
        std::memcpy(&odd, rows[1] + 2 * c, 2);
        both[c] = static_cast<std::uint32_t>(even) | static_cast<std::uint32_t>(odd) << 16;
        nonfinite |= ((both[c] & 0x7f80u) == 0x7f80u) | ((both[c] & 0x7f800000u) == 0x7f800000u);
      }
#endif
    }
    const std::uint32_t* from = math == Math::kFloat32 ? pair[0] : reinterpret_cast<const std::uint32_t*>(scratch);
    std::uint32_t* to = static_cast<std::uint32_t*>(out);
    for (std::int64_t c = 0; c < columns; c += 16) {  // the columns' unit in either order
      const std::int64_t at = math == Math::kFloat32 ? value_word<Math::kFloat32>(w, c, columns)
                                                     : value_word<Math::kBFloat16>(w, c, columns);
      std::memcpy(to + at, from + c, 64);
    }
  }
  return nonfinite == 0;
}

}  // namespace heddle::host::HEDDLE_ISA
