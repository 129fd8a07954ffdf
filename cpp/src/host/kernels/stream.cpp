// Decode's kernels of one instruction set: scores by dot products over keys where they lie, softmax, and values summed
// the same way.
#include "host/kernels/pack.h"
#include "host/kernels/simd.h"
#include "host/kernels/softmax.h"
#include "host/stream_kernels.h"

namespace heddle::host::HEDDLE_ISA {
namespace {

template <DType dtype>
constexpr int element_bytes() {
  return dtype == DType::kFloat32 ? 4 : dtype == DType::kBFloat16 || dtype == DType::kFloat16 ? 2 : 1;
}

// kWidth elements as floats.
template <DType dtype>
HEDDLE_INLINE F load_elements(const std::byte* p) {
  if constexpr (dtype == DType::kFloat32) {
    return load(p);
#if HEDDLE_ISA_LEVEL >= 2
  } else if constexpr (dtype == DType::kBFloat16) {
    return (F)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))), 16);
  } else if constexpr (dtype == DType::kFloat16) {
    return (F)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  } else if constexpr (dtype == DType::kInt8) {
    return (F)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
  } else if constexpr (dtype == DType::kFloat8E4M3) {
    // E4M3 is fp16 with a bias of 7 instead of 15: shift, convert (which handles subnormals) and multiply by 2^8. Its
    // NaN, the code 0x7f, comes out as 480.
    const __m256i wide = _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    const __m256i half = _mm256_and_si256(_mm256_slli_epi16(wide, 7), _mm256_set1_epi16(static_cast<short>(0xbf80)));
    const F x = (F)_mm512_cvtph_ps(half) * set1(256.0f);
    const __mmask16 nan = _mm512_cmp_ps_mask(_mm512_abs_ps((__m512)x), _mm512_set1_ps(480.0f), _CMP_EQ_OQ);
    return (F)_mm512_mask_mov_ps((__m512)x, nan, _mm512_set1_ps(__builtin_nanf("")));
#elif HEDDLE_ISA_LEVEL == 1
  } else if constexpr (dtype == DType::kBFloat16) {
    return (F)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))), 16);
  } else if constexpr (dtype == DType::kFloat16) {
    return (F)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  } else if constexpr (dtype == DType::kInt8) {
    return (F)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
#endif
  } else {
    F x;
    for (int i = 0; i < kWidth; ++i) x[i] = load_element(p, i, dtype);
    return x;
  }
}

// The first n of them; the others are 0.
template <DType dtype>
HEDDLE_INLINE F load_some(const std::byte* p, std::int64_t n) {
  if (n >= kWidth) return load_elements<dtype>(p);
  alignas(64) std::byte buffer[kWidth * 4] = {};
  std::memcpy(buffer, p, static_cast<std::size_t>(n * element_bytes<dtype>()));
  return load_elements<dtype>(buffer);
}

// Into the second-level cache, which can wait for more lines at once than the first.
HEDDLE_INLINE void prefetch_row(const std::byte* row, std::int64_t bytes) {
  for (std::int64_t b = 0; b < bytes; b += 64) __builtin_prefetch(row + b, 0, 2);
}

// Keys between the one in work and the one being fetched.
HEDDLE_INLINE int keys_ahead(std::int64_t row_bytes) {
  constexpr std::int64_t kBytesAhead = 4096;
  const std::int64_t keys = kBytesAhead / (row_bytes < 64 ? 64 : row_bytes);
  return keys < 4 ? 4 : static_cast<int>(keys);
}

// scores[r][key + k] = the sum of acc[r][k] over its lanes (whole numbers if Acc is I).
template <class Acc, int R>
HEDDLE_INLINE void store_sums(const Acc (&acc)[R][4], float* scores, int key) {
#if HEDDLE_ISA_LEVEL >= 2
  // Transposed addition: within 128-bit lanes, then across them.
  const auto add = [](__m512 a, __m512 b) { return (__m512)((Acc)a + (Acc)b); };
  __m512 quad[4];
  for (int r = 0; r < 4; ++r) {
    if (r >= R) {
      quad[r] = _mm512_setzero_ps();
      continue;
    }
    const __m512 a = (__m512)acc[r][0], b = (__m512)acc[r][1], c = (__m512)acc[r][2], d = (__m512)acc[r][3];
    const __m512 ab = add(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
    const __m512 cd = add(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
    quad[r] = add(_mm512_shuffle_ps(ab, cd, 0x44), _mm512_shuffle_ps(ab, cd, 0xee));
  }
  const auto halves = [&](__m512 a, __m512 b) {
    return add(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));
  };
  const __m512 sums = halves(halves(quad[0], quad[1]), halves(quad[2], quad[3]));
  alignas(64) float all[16];
  store(all, __builtin_convertvector((Acc)sums, F));
  for (int r = 0; r < R; ++r) std::memcpy(scores + r * kStreamKeys + key, all + 4 * r, 16);
#else
  for (int r = 0; r < R; ++r) {
    for (int k = 0; k < 4; ++k) scores[r * kStreamKeys + key + k] = reduce_add(acc[r][k]);
  }
#endif
}

template <DType dtype, int R>
void float_scores(const StreamStep& step, const float* queries, std::int64_t query_stride, float* scores) {
  constexpr int kBytes = element_bytes<dtype>();
  const std::int64_t whole = step.dim / kWidth * kWidth;
  const int ahead = keys_ahead(step.dim * kBytes);
  for (int j = 0; j < step.count; j += 4) {
    const std::byte* const* rows = step.keys + j;
    for (int k = j + ahead; k < j + ahead + 4 && k < step.readable; ++k) prefetch_row(step.keys[k], step.dim * kBytes);
    F acc[R][4] = {};
    for (std::int64_t i = 0; i < whole; i += kWidth) {
      F x[4];
      HEDDLE_UNROLL
      for (int k = 0; k < 4; ++k) x[k] = load_elements<dtype>(rows[k] + i * kBytes);
      HEDDLE_UNROLL
      for (int r = 0; r < R; ++r) {
        const F q = load(queries + r * query_stride + i);
        HEDDLE_UNROLL
        for (int k = 0; k < 4; ++k) acc[r][k] = fma(q, x[k], acc[r][k]);
      }
    }
    if (whole < step.dim) {
      HEDDLE_UNROLL
      for (int k = 0; k < 4; ++k) {
        const F x = load_some<dtype>(rows[k] + whole * kBytes, step.dim - whole);
        HEDDLE_UNROLL
        for (int r = 0; r < R; ++r) acc[r][k] = fma(load(queries + r * query_stride + whole), x, acc[r][k]);
      }
    }
    store_sums(acc, scores, j);
  }
}

#if HEDDLE_ISA_LEVEL >= 3
// Whole-number scores on VPDPBUSD: keys biased by 128, undone by the queries' sums. Below 2^24, so exact as floats too.
template <int R>
void int8_scores(const StreamStep& step, const std::int8_t* queries, std::int64_t query_stride,
                 const std::int32_t* row_sums, float* scores) {
  const __m512i bias = _mm512_set1_epi8(static_cast<char>(0x80));
  const int ahead = keys_ahead(step.dim);
  I start[R];
  HEDDLE_UNROLL
  for (int r = 0; r < R; ++r) start[r] = I{-128 * row_sums[r]};  // in one lane
  for (int j = 0; j < step.count; j += 4) {
    const std::byte* const* rows = step.keys + j;
    for (int k = j + ahead; k < j + ahead + 4 && k < step.readable; ++k) prefetch_row(step.keys[k], step.dim);
    I acc[R][4];
    HEDDLE_UNROLL
    for (int r = 0; r < R; ++r) {
      HEDDLE_UNROLL
      for (int k = 0; k < 4; ++k) acc[r][k] = start[r];
    }
    for (std::int64_t i = 0; i < step.dim; i += 64) {
      const std::int64_t left = step.dim - i;
      const __mmask64 mask = left >= 64 ? ~__mmask64{0} : (__mmask64{1} << left) - 1;
      __m512i x[4];
      HEDDLE_UNROLL
      for (int k = 0; k < 4; ++k) x[k] = _mm512_xor_si512(_mm512_maskz_loadu_epi8(mask, rows[k] + i), bias);
      HEDDLE_UNROLL
      for (int r = 0; r < R; ++r) {
        const __m512i q = _mm512_loadu_si512(queries + r * query_stride + i);
        HEDDLE_UNROLL
        for (int k = 0; k < 4; ++k) acc[r][k] = (I)_mm512_dpbusd_epi32((__m512i)acc[r][k], x[k], q);
      }
    }
    store_sums(acc, scores, j);
  }
}
#endif

// Values are summed by 64 keys, so that the second 64 columns of a row are still near when their turn comes.
inline constexpr int kValueKeys = 64;

// o[r][c] = alpha[r] o[r][c] + sum_j p[r][j] v[j][c] over the keys [first, last)
template <DType dtype, int R>
HEDDLE_INLINE void add_values_of(const StreamStep& step, int first, int last, const float* p, const float* alpha,
                                 float* o, std::int64_t columns) {
  constexpr int kBytes = element_bytes<dtype>();
  constexpr int kVectors = 64 / kWidth < 4 ? 64 / kWidth : 4;
  const int ahead = keys_ahead(step.dim_v * kBytes);
  for (std::int64_t c = 0; c < step.dim_v; c += kVectors * kWidth) {
    const std::int64_t left = step.dim_v - c;
    F acc[R][kVectors];
    HEDDLE_UNROLL
    for (int r = 0; r < R; ++r) {
      HEDDLE_UNROLL
      for (int n = 0; n < kVectors; ++n) {
        acc[r][n] = n * kWidth < left ? load(o + r * columns + c + n * kWidth) * set1(alpha[r]) : F{};
      }
    }
    if (left >= kVectors * kWidth) {
      for (int j = first; j < last; ++j) {
        const std::byte* row = step.values[j] + c * kBytes;
        if (c == 0 && j + ahead < step.readable) prefetch_row(step.values[j + ahead], step.dim_v * kBytes);
        F x[kVectors];
        HEDDLE_UNROLL
        for (int n = 0; n < kVectors; ++n) x[n] = load_elements<dtype>(row + n * kWidth * kBytes);
        HEDDLE_UNROLL
        for (int r = 0; r < R; ++r) {
          const F w = set1(p[r * kStreamKeys + j]);
          HEDDLE_UNROLL
          for (int n = 0; n < kVectors; ++n) acc[r][n] = fma(w, x[n], acc[r][n]);
        }
      }
    } else {
      for (int j = first; j < last; ++j) {
        const std::byte* row = step.values[j] + c * kBytes;
        for (int n = 0; n * kWidth < left; ++n) {
          const F x = load_some<dtype>(row + n * kWidth * kBytes, left - n * kWidth);
          for (int r = 0; r < R; ++r) acc[r][n] = fma(set1(p[r * kStreamKeys + j]), x, acc[r][n]);
        }
      }
    }
    HEDDLE_UNROLL
    for (int r = 0; r < R; ++r) {
      HEDDLE_UNROLL
      for (int n = 0; n < kVectors; ++n) {
        if (n * kWidth < left) store(o + r * columns + c + n * kWidth, acc[r][n]);
      }
    }
  }
}

template <DType dtype, int R>
void add_values(const StreamStep& step, const float* p, const float* alpha, float* o, std::int64_t columns) {
  static constexpr float kOnes[4] = {1.0f, 1.0f, 1.0f, 1.0f};
  for (int first = 0; first < step.count; first += kValueKeys) {
    const int last = first + kValueKeys < step.count ? first + kValueKeys : step.count;
    add_values_of<dtype, R>(step, first, last, p, first == 0 ? alpha : kOnes, o, columns);
  }
}

template <int R>
void scores_of(const StreamTile& tile, const StreamStep& step, std::int64_t row, float* scores) {
  const std::int64_t stride = (step.dim + 63) / 64 * 64;
  float* at = scores + row * kStreamKeys;
  if (tile.int8_queries != nullptr) {
#if HEDDLE_ISA_LEVEL >= 3
    return int8_scores<R>(step, tile.int8_queries + row * stride, stride, tile.row_sums + row, at);
#endif
  }
  const float* q = tile.queries + row * stride;
  switch (step.key_dtype) {
    case DType::kFloat32: return float_scores<DType::kFloat32, R>(step, q, stride, at);
    case DType::kBFloat16: return float_scores<DType::kBFloat16, R>(step, q, stride, at);
    case DType::kFloat16: return float_scores<DType::kFloat16, R>(step, q, stride, at);
    case DType::kInt8: return float_scores<DType::kInt8, R>(step, q, stride, at);
    default: return float_scores<DType::kFloat8E4M3, R>(step, q, stride, at);
  }
}

template <int R>
void values_of(const StreamTile& tile, const StreamStep& step, std::int64_t row, const float* alpha, float* scores) {
  const float* p = scores + row * kStreamKeys;
  float* o = tile.o + row * tile.columns;
  switch (step.value_dtype) {
    case DType::kFloat32: return add_values<DType::kFloat32, R>(step, p, alpha + row, o, tile.columns);
    case DType::kBFloat16: return add_values<DType::kBFloat16, R>(step, p, alpha + row, o, tile.columns);
    case DType::kFloat16: return add_values<DType::kFloat16, R>(step, p, alpha + row, o, tile.columns);
    case DType::kInt8: return add_values<DType::kInt8, R>(step, p, alpha + row, o, tile.columns);
    default: return add_values<DType::kFloat8E4M3, R>(step, p, alpha + row, o, tile.columns);
  }
}

// 0 * NaN is NaN: where rows mask different keys and a value is not finite, each row takes just what it sees.
bool values_finite(const StreamStep& step, float* row) {
  for (int j = 0; j < step.count; ++j) {
    row_as_floats(step.values[j], step.dim_v, step.value_dtype, row);
    bool finite = true;
    for (std::int64_t c = 0; c < step.dim_v; ++c) finite &= is_finite(row[c]);
    if (!finite) return false;
  }
  return true;
}

void add_visible(const StreamTile& tile, const StreamStep& step, const float* alpha, const float* scores, float* row) {
  for (std::int64_t r = 0; r < tile.rows; ++r) {
    float* o = tile.o + r * tile.columns;
    for (std::int64_t c = 0; c < step.dim_v; ++c) o[c] *= alpha[r];
    for (int j = 0; j < step.count; ++j) {
      if ((step.bits[r * kStepTiles + j / 64] >> (j % 64) & 1u) == 0) continue;
      row_as_floats(step.values[j], step.dim_v, step.value_dtype, row);
      const float p = scores[r * kStreamKeys + j];
      for (std::int64_t c = 0; c < step.dim_v; ++c) o[c] += p * row[c];
    }
  }
}

// Rows by four; one or two alone when there are no more.
void stream_scores(const StreamTile& tile, const StreamStep& step, float* scores) {
  if (tile.rows == 1) return scores_of<1>(tile, step, 0, scores);
  if (tile.rows == 2) return scores_of<2>(tile, step, 0, scores);
  for (std::int64_t row = 0; row < tile.rows; row += 4) scores_of<4>(tile, step, row, scores);
}

void stream_step(const StreamTile& tile, const StreamStep& step, float* scores) {
  stream_scores(tile, step, scores);

  Step mask;
  mask.tiles = (step.count + kTileKeys - 1) / kTileKeys;
  std::uint64_t tail[kStepTiles];
  for (int t = 0; t < mask.tiles; ++t) {
    const int keys = step.count - t * kTileKeys;
    tail[t] = keys >= kTileKeys ? ~std::uint64_t{0} : (std::uint64_t{1} << keys) - 1;
    mask.bits[t] = step.bits != nullptr ? step.bits + t : keys >= kTileKeys ? nullptr : tail + t;
    mask.key_scale[t] = step.key_scale == nullptr ? nullptr : step.key_scale + t * kTileKeys;
  }
  const std::int64_t bits_stride = step.bits != nullptr ? kStepTiles : 0;
  constexpr bool kActive[kStepTiles] = {true, true, true, true};
  alignas(64) float alpha[kStreamRows];
  for (std::int64_t r = 0; r < tile.rows; ++r) {
    const SoftmaxRow state{tile.factor[r], tile.bias == nullptr ? 0.0f : tile.bias[r], tile.softcap, tile.m + r,
                           tile.l + r};
    float* at = scores + r * kStreamKeys;
    alpha[r] = softmax_row<false, Math::kFloat32>(at, at, mask, kActive, r * bits_stride, state);
    if (step.value_scale != nullptr) {
      // A masked key's scale may be NaN.
      for (int j = 0; j < step.count; ++j) at[j] = at[j] == 0.0f ? 0.0f : at[j] * step.value_scale[j];
    }
  }
  for (std::int64_t r = tile.rows; r < kStreamRows; ++r) alpha[r] = 1.0f;

  alignas(64) float value_row[kMaxDim];
  if (step.bits != nullptr && !values_finite(step, value_row)) return add_visible(tile, step, alpha, scores, value_row);
  if (tile.rows == 1) return values_of<1>(tile, step, 0, alpha, scores);
  if (tile.rows == 2) return values_of<2>(tile, step, 0, alpha, scores);
  for (std::int64_t row = 0; row < tile.rows; row += 4) values_of<4>(tile, step, row, alpha, scores);
}

}  // namespace

extern const StreamKernels kStreamKernels;
const StreamKernels kStreamKernels{.scores = stream_scores, .step = stream_step};

}  // namespace heddle::host::HEDDLE_ISA
