// Decode's kernels of one instruction set: scores by dot products over keys where they lie, softmax, and values summed
// the same way.
#include <type_traits>

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

// What is fetched ahead, and where to: tuned on Zen 5; the processors with matrix units are the ones on which 4 KiB
// into the second-level cache was better.
inline constexpr bool kMatrixUnits = HEDDLE_ISA_LEVEL >= 4;
inline constexpr std::int64_t kBytesAhead = kMatrixUnits ? 4096 : 8192;
// Of the next segment, while this one is in work: all of it, into the second level, if it is short.
inline constexpr std::int64_t kBeginBytes = 4096, kShortBytes = 32768;

inline constexpr int kAheadBlock = 16;  // rows that scores fetch at a time, if they are so short

inline int keys_ahead(std::int64_t row_bytes) {
  const auto keys = static_cast<int>(kBytesAhead / row_bytes);
  return keys >= kAheadBlock ? keys / kAheadBlock * kAheadBlock : keys / 4 * 4;
}

HEDDLE_INLINE void fetch_line(const std::byte* p) { __builtin_prefetch(p, 0, kMatrixUnits ? 2 : 3); }

// The rows that will be read so many bytes after the ones in work. Their lines are fetched one by one between the
// arithmetic, in the order of their use: a processor can wait for few lines at once, and a burst of them holds up the
// loads behind it. By itself it only follows rows that it has begun.
class Ahead {
 public:
  Ahead(const StreamStep& step, int num_heads, bool values) : step_(step), num_heads_(num_heads), values_(values) {
    begin_phase(kKeys);
    const std::int64_t row_bytes = step.dim * static_cast<std::int64_t>(size_of(step.key_dtype));
    skip(keys_ahead(row_bytes));  // the step before has fetched them
  }

  // Lines to fetch one by one from p on, or (inc 0) nothing new.
  struct Lines {
    const std::byte* p;
    std::int64_t inc;
    template <int N>
    HEDDLE_INLINE void fetch() {
      HEDDLE_UNROLL
      for (int i = 0; i < N; ++i) fetch_line(p + i * 64);
      p += N * inc;
    }
  };

  // The next n rows. Where they do not follow one another, all of them are fetched now.
  HEDDLE_INLINE Lines take(int n, std::int64_t row_bytes) {
    const std::byte* first = rows_[key_] + offset_;
    if (n > last_ - key_ || rows_[key_ + n - 1] + offset_ != first + (n - 1) * row_bytes) {
      take_pieces(n, row_bytes);
      return {first, 0};
    }
    key_ += n;
    if (key_ == last_) next_run();
    return {first, 64};
  }

 private:
  enum Phase { kKeys, kValues, kNextKeys, kNothing };

  void begin_phase(Phase phase) {
    phase_ = phase;
    rows_ = phase == kKeys ? step_.keys : phase == kValues ? step_.values : step_.keys + step_.count;
    head_stride_ = phase == kValues ? step_.value_head_stride : step_.key_head_stride;
    segment_ = head_ = 0;
    begin_run();
  }
  void begin_run() {
    offset_ = head_ * head_stride_;
    key_ = phase_ == kNextKeys ? 0 : step_.segments[segment_].first;
    last_ = key_ + (phase_ == kNextKeys ? step_.next : step_.segments[segment_].count);
  }
  void skip(int n) {
    for (int m; n > 0; n -= m) {
      m = n < last_ - key_ ? n : last_ - key_;
      key_ += m;
      if (key_ == last_) next_run();
    }
  }
  __attribute__((noinline)) void take_pieces(int n, std::int64_t row_bytes) {
    for (; n > 0; --n) {
      for (std::int64_t b = 0; b < row_bytes; b += 64) fetch_line(rows_[key_] + offset_ + b);
      if (++key_ == last_) next_run();
    }
  }
  __attribute__((noinline)) void next_run() {
    if (phase_ != kNothing) {
      if (++head_ < num_heads_) return begin_run();
      head_ = 0;
      if (phase_ != kNextKeys && ++segment_ < step_.num_segments) return begin_run();
      if (phase_ == kKeys && values_) return begin_phase(kValues);
      if (phase_ != kNextKeys && step_.next > 0) return begin_phase(kNextKeys);
      phase_ = kNothing;
    }
    --key_;  // the last row again
  }

  const StreamStep& step_;
  const int num_heads_;
  const bool values_;
  Phase phase_ = kKeys;
  const std::byte* const* rows_ = nullptr;
  std::int64_t head_stride_ = 0, offset_ = 0;
  int segment_ = 0, head_ = 0, key_ = 0, last_ = 0;
};

// Values are summed block by block of keys, small enough that the later columns of a row are still near when their turn
// comes.
inline constexpr int kBlockKeys = 64;
inline int block_keys(std::int64_t row_bytes) {
  const std::int64_t keys = 8192 / row_bytes / 16 * 16;
  return static_cast<int>(keys < 16 ? 16 : keys > kBlockKeys ? kBlockKeys : keys);
}

// One segment of one head.
struct Run {
  const std::byte* const* rows;  // of the first head
  std::int64_t row_bytes;
  int count;                   // keys of the step
  int ahead_keys, value_keys;  // that scores and values take at a time
  std::int64_t offset = 0;     // of this head
  int first = 0, last = 0;     // keys
  Ahead* ahead = nullptr;      // null where other rows have read the same keys before

  Run(const std::byte* const* all, std::int64_t bytes, int keys)
      : rows(all),
        row_bytes(bytes),
        count(keys),
        ahead_keys(keys_ahead(bytes) >= kAheadBlock ? kAheadBlock : 4),
        value_keys(block_keys(bytes)) {}

  HEDDLE_INLINE const std::byte* row(int key) const { return rows[key] + offset; }
  // Lines to fetch while n rows from `key` on are in work.
  HEDDLE_INLINE Ahead::Lines lines_ahead(int key, int n) const {
    return ahead == nullptr ? Ahead::Lines{row(key), 0} : ahead->take(n, row_bytes);
  }
  // body(first, last, lines): all keys, a few at a time, which is less to do than key by key.
  template <class Body>
  HEDDLE_INLINE void for_ahead(Body&& body) const {
    for (int at = first; at < last; at += ahead_keys) {
      const int end = at + ahead_keys < last ? at + ahead_keys : last;
      body(at, end, lines_ahead(at, end - at));
    }
  }
};

// Keys that scores take at once: as many accumulators as there are registers for.
inline constexpr int kScoreKeys = HEDDLE_ISA_LEVEL >= 2 ? 4 : 2;

#if HEDDLE_ISA_LEVEL >= 2
// scores[r][key + k] = lane 4 r + k.
template <int R>
HEDDLE_INLINE void store_rows(__m512 sums, float* scores, int key) {
  const auto part = [&](auto r) {
    if constexpr (r < R) _mm_storeu_ps(scores + r * kStreamKeys + key, _mm512_extractf32x4_ps(sums, r));
  };
  part(std::integral_constant<int, 0>{});
  part(std::integral_constant<int, 1>{});
  part(std::integral_constant<int, 2>{});
  part(std::integral_constant<int, 3>{});
}
#endif

// scores[r][key + k] = the sum of acc[r][k] over its lanes.
template <int R>
HEDDLE_INLINE void store_sums(const F (&acc)[R][kScoreKeys], float* scores, int key) {
#if HEDDLE_ISA_LEVEL >= 2
  // Transposed addition: within 128-bit lanes, then across them.
  const auto halves = [](__m512 a, __m512 b) {
    return _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));
  };
  __m512 quad[4] = {};
  HEDDLE_UNROLL
  for (int r = 0; r < R; ++r) {
    const __m512 a = (__m512)acc[r][0], b = (__m512)acc[r][1], c = (__m512)acc[r][2], d = (__m512)acc[r][3];
    const __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
    const __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
    quad[r] = _mm512_add_ps(_mm512_shuffle_ps(ab, cd, 0x44), _mm512_shuffle_ps(ab, cd, 0xee));
  }
  store_rows<R>(halves(halves(quad[0], quad[1]), halves(quad[2], quad[3])), scores, key);
#elif HEDDLE_ISA_LEVEL == 1
  HEDDLE_UNROLL
  for (int r = 0; r < R; r += 2) {
    const __m256 upper =
        R > 1 ? (__m256)_mm256_hadd_ps((__m256)acc[(r + 1) % R][0], (__m256)acc[(r + 1) % R][1]) : _mm256_setzero_ps();
    const __m256 x = _mm256_hadd_ps(_mm256_hadd_ps((__m256)acc[r][0], (__m256)acc[r][1]), upper);
    const __m128 sums = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    _mm_storel_pi(reinterpret_cast<__m64*>(scores + r * kStreamKeys + key), sums);
    if (R > 1) _mm_storeh_pi(reinterpret_cast<__m64*>(scores + (r + 1) * kStreamKeys + key), sums);
  }
#else
  for (int r = 0; r < R; ++r) {
    for (int k = 0; k < kScoreKeys; ++k) scores[r * kStreamKeys + key + k] = reduce_add(acc[r][k]);
  }
#endif
}

template <DType dtype, int R>
void float_scores(const Run& run, std::int64_t dim, const float* queries, std::int64_t query_stride, float* scores) {
  constexpr int kBytes = element_bytes<dtype>();
  const std::int64_t whole = dim / kWidth * kWidth;
  run.for_ahead([&](int first, int last, Ahead::Lines ahead) {
    for (int j = first; j < last; j += kScoreKeys) {
      const std::byte* rows[kScoreKeys];
      for (int k = 0; k < kScoreKeys; ++k) rows[k] = run.row(j + k);
      F acc[R][kScoreKeys] = {};
      for (std::int64_t i = 0; i < whole; i += kWidth) {
        constexpr int kEach = kScoreKeys * kWidth * kBytes / 64;
        ahead.fetch < kEach<1 ? 1 : kEach>();
        F x[kScoreKeys];
        HEDDLE_UNROLL
        for (int k = 0; k < kScoreKeys; ++k) x[k] = load_elements<dtype>(rows[k] + i * kBytes);
        HEDDLE_UNROLL
        for (int r = 0; r < R; ++r) {
          const F q = load(queries + r * query_stride + i);
          HEDDLE_UNROLL
          for (int k = 0; k < kScoreKeys; ++k) acc[r][k] = fma(q, x[k], acc[r][k]);
        }
      }
      if (whole < dim) {
        HEDDLE_UNROLL
        for (int k = 0; k < kScoreKeys; ++k) {
          ahead.fetch<1>();
          const F x = load_some<dtype>(rows[k] + whole * kBytes, dim - whole);
          HEDDLE_UNROLL
          for (int r = 0; r < R; ++r) acc[r][k] = fma(load(queries + r * query_stride + whole), x, acc[r][k]);
        }
      }
      store_sums<R>(acc, scores, j);
    }
  });
}

#if HEDDLE_ISA_LEVEL >= 3
// VDPBF16PS: two elements of a key a lane.
template <int R, bool kWhole>
void bf16_scores(const Run& run, std::int64_t dim, const std::uint16_t* queries, std::int64_t query_stride,
                 float* scores) {
  run.for_ahead([&](int first, int last, Ahead::Lines ahead) {
    for (int j = first; j < last; j += kScoreKeys) {
      const std::byte* rows[kScoreKeys];
      for (int k = 0; k < kScoreKeys; ++k) rows[k] = run.row(j + k);
      F acc[R][kScoreKeys] = {};
      for (std::int64_t i = 0; i < dim; i += 32) {
        ahead.fetch<kScoreKeys>();
        const std::int64_t left = dim - i;
        const __mmask32 mask = kWhole || left >= 32 ? ~__mmask32{0} : (__mmask32{1} << left) - 1;
        __m512i x[kScoreKeys];
        HEDDLE_UNROLL
        for (int k = 0; k < kScoreKeys; ++k) x[k] = _mm512_maskz_loadu_epi16(mask, rows[k] + i * 2);
        HEDDLE_UNROLL
        for (int r = 0; r < R; ++r) {
          const __m512i q = _mm512_loadu_si512(queries + r * query_stride + i);
          HEDDLE_UNROLL
          for (int k = 0; k < kScoreKeys; ++k) {
            acc[r][k] = (F)_mm512_dpbf16_ps((__m512)acc[r][k], (__m512bh)q, (__m512bh)x[k]);
          }
        }
      }
      store_sums<R>(acc, scores, j);
    }
  });
}

// Whole-number scores on VPDPBUSD: keys biased by 128, undone by the queries' sums. Below 2^24, so exact as floats too.
// Four keys lie side by side by words of 4 elements, so that there is one accumulator a row: a word of a query,
// repeated within its 16 bytes, meets the same word of four keys.
template <int R, bool kWhole>
void int8_scores(const Run& run, std::int64_t dim, const std::int8_t* queries, std::int64_t query_stride,
                 const std::int32_t* row_sums, float* scores) {
  const __m512i bias = _mm512_set1_epi8(static_cast<char>(0x80));
  // Lane 4 r + k: -128 * row_sums[r].
  const __m512i sums_of_rows = _mm512_maskz_loadu_epi32((1 << R) - 1, row_sums);
  const __m512i row_of_lane = _mm512_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3);
  const __m512i start = _mm512_slli_epi32(
      _mm512_sub_epi32(_mm512_setzero_si512(), _mm512_permutexvar_epi32(row_of_lane, sums_of_rows)), 7);
  run.for_ahead([&](int first, int last, Ahead::Lines ahead) {
    for (int j = first; j < last; j += 4) {
      const std::byte* rows[4];
      for (int k = 0; k < 4; ++k) rows[k] = run.row(j + k);
      __m512i acc[4] = {};
      for (std::int64_t i = 0; i < dim; i += 64) {
        ahead.fetch<4>();
        const std::int64_t left = dim - i;
        const __mmask64 mask = kWhole || left >= 64 ? ~__mmask64{0} : (__mmask64{1} << left) - 1;
        __m512i x[4];
        HEDDLE_UNROLL
        for (int k = 0; k < 4; ++k) x[k] = _mm512_xor_si512(_mm512_maskz_loadu_epi8(mask, rows[k] + i), bias);
        const __m512i a = _mm512_unpacklo_epi32(x[0], x[1]), b = _mm512_unpackhi_epi32(x[0], x[1]);
        const __m512i c = _mm512_unpacklo_epi32(x[2], x[3]), d = _mm512_unpackhi_epi32(x[2], x[3]);
        const __m512i y[4] = {_mm512_unpacklo_epi64(a, c), _mm512_unpackhi_epi64(a, c), _mm512_unpacklo_epi64(b, d),
                              _mm512_unpackhi_epi64(b, d)};
        HEDDLE_UNROLL
        for (int r = 0; r < R; ++r) {
          const __m512i q = _mm512_loadu_si512(queries + r * query_stride + i);
          acc[r] = _mm512_dpbusd_epi32(acc[r], y[0], _mm512_shuffle_epi32(q, _MM_PERM_AAAA));
          acc[r] = _mm512_dpbusd_epi32(acc[r], y[1], _mm512_shuffle_epi32(q, _MM_PERM_BBBB));
          acc[r] = _mm512_dpbusd_epi32(acc[r], y[2], _mm512_shuffle_epi32(q, _MM_PERM_CCCC));
          acc[r] = _mm512_dpbusd_epi32(acc[r], y[3], _mm512_shuffle_epi32(q, _MM_PERM_DDDD));
        }
      }
      const auto halves = [](__m512i u, __m512i v) {
        return _mm512_add_epi32(_mm512_shuffle_i32x4(u, v, 0x88), _mm512_shuffle_i32x4(u, v, 0xdd));
      };
      const __m512i sums = halves(halves(acc[0], acc[1]), halves(acc[2], acc[3]));
      store_rows<R>(_mm512_cvtepi32_ps(_mm512_add_epi32(sums, start)), scores, j);
    }
  });
}
#endif

// o[r][c] = alpha[r] o[r][c] + sum_j p[r][j] v[j][c] over the keys [first, last) and columns from c on, N vectors.
// One of P parts of the lines ahead is fetched on the way.
template <DType dtype, int R, int N, int P>
HEDDLE_INLINE void add_float_block(const Run& run, int first, int last, std::int64_t c, std::int64_t dim,
                                   const float* p, const float* alpha, float* o, std::int64_t columns,
                                   Ahead::Lines& ahead) {
  constexpr int kBytes = element_bytes<dtype>();
  const std::int64_t left = dim - c;
  F acc[R][N];
  HEDDLE_UNROLL
  for (int r = 0; r < R; ++r) {
    HEDDLE_UNROLL
    for (int n = 0; n < N; ++n) {
      acc[r][n] = n * kWidth < left ? load(o + r * columns + c + n * kWidth) : F{};
      if (alpha != nullptr) acc[r][n] = acc[r][n] * set1(alpha[r]);
    }
  }
  if (left >= N * kWidth) {
    for (int j = first; j < last; ++j) {
      constexpr int kEach = N * kWidth * kBytes / 64 / P;
      ahead.fetch < kEach<1 ? 1 : kEach>();
      const std::byte* row = run.row(j) + c * kBytes;
      F x[N];
      HEDDLE_UNROLL
      for (int n = 0; n < N; ++n) x[n] = load_elements<dtype>(row + n * kWidth * kBytes);
      HEDDLE_UNROLL
      for (int r = 0; r < R; ++r) {
        const F w = set1(p[r * kStreamKeys + j]);
        HEDDLE_UNROLL
        for (int n = 0; n < N; ++n) acc[r][n] = fma(w, x[n], acc[r][n]);
      }
    }
  } else {
    for (int j = first; j < last; ++j) {
      const std::byte* row = run.row(j) + c * kBytes;
      HEDDLE_UNROLL
      for (int n = 0; n < N; ++n) {
        if (n * kWidth >= left) continue;
        ahead.fetch<1>();
        const F x = load_some<dtype>(row + n * kWidth * kBytes, left - n * kWidth);
        HEDDLE_UNROLL
        for (int r = 0; r < R; ++r) acc[r][n] = fma(set1(p[r * kStreamKeys + j]), x, acc[r][n]);
      }
    }
  }
  HEDDLE_UNROLL
  for (int r = 0; r < R; ++r) {
    HEDDLE_UNROLL
    for (int n = 0; n < N; ++n) {
      if (n * kWidth < left) store(o + r * columns + c + n * kWidth, acc[r][n]);
    }
  }
}

// `alpha` null: 1. Where there are registers, two rows take 128 columns at a time, so that a row's bytes are first read
// in the order in which they lie.
template <DType dtype, int R>
void add_float_values(const Run& run, std::int64_t dim, const float* p, const float* alpha, float* o,
                      std::int64_t columns) {
  constexpr int kWide = HEDDLE_ISA_LEVEL >= 2 ? 8 : 4, kPair = R < 2 ? R : 2;
  const int block = run.value_keys;
  for (int first = run.first; first < run.last; first += block) {
    const int last = first + block < run.last ? first + block : run.last;
    Ahead::Lines ahead = run.lines_ahead(first, last - first);
    const float* a = first == run.first ? alpha : nullptr;
    for (std::int64_t c = 0; c < dim;) {
      if (R < 4 || HEDDLE_ISA_LEVEL < 2 || dim - c >= kWide * kWidth) {
        for (int r = 0; r < R; r += kPair) {
          add_float_block<dtype, kPair, kWide, R / kPair>(run, first, last, c, dim, p + r * kStreamKeys,
                                                          a == nullptr ? a : a + r, o + r * columns, columns, ahead);
        }
        c += kWide * kWidth;
      } else {
        add_float_block<dtype, R, 4, 1>(run, first, last, c, dim, p, a, o, columns, ahead);
        c += 4 * kWidth;
      }
    }
  }
}

#if HEDDLE_ISA_LEVEL >= 3
// o = alpha o + weight x for one vector of columns, if it exists.
HEDDLE_INLINE void update(float* o, std::int64_t c, std::int64_t columns, float alpha, float weight, __m512 x) {
  if (c >= columns) return;
  const __m512 scaled = _mm512_mul_ps(_mm512_loadu_ps(o + c), _mm512_set1_ps(alpha));
  _mm512_storeu_ps(o + c, _mm512_fmadd_ps(x, _mm512_set1_ps(weight), scaled));
}

// Products of pairs of keys, 64 columns at a time: VDPBF16PS, or VPDPWSSD on values widened to 16 bits. Sums lie as
// [64 columns][R][64], interleaved as the pairs are, until the step ends; those of whole numbers stay below
// 32767 * 127 * 256 < 2^31.
template <Math pv, int R, bool kWhole>
__attribute__((noinline)) void add_paired_values(const Run& run, const StreamTile& tile, std::int64_t row,
                                                 std::int64_t dim) {
  static_assert(kStreamKeys <= 256);
  constexpr bool kInt8 = pv == Math::kInt8;
  constexpr int kBytes = kInt8 ? 1 : 2;
  // 32 columns of a row as 16-bit words.
  const auto load_words = [](__mmask32 mask, const std::byte* p) {
    if constexpr (kInt8 && kWhole) return _mm512_cvtepi8_epi16(_mm256_loadu_si256((const __m256i*)p));
    if constexpr (kInt8) return _mm512_cvtepi8_epi16(_mm256_maskz_loadu_epi8(mask, p));
    return _mm512_maskz_loadu_epi16(mask, p);
  };
  const auto multiply = [](__m512i acc, __m512i w, __m512i x) {
    if constexpr (kInt8) return _mm512_dpwssd_epi32(acc, w, x);
    return (__m512i)_mm512_dpbf16_ps((__m512)acc, (__m512bh)w, (__m512bh)x);
  };
  const auto* p = reinterpret_cast<const std::uint16_t*>(tile.scores + row * kStreamKeys);
  const int block = run.value_keys;
  for (int first = run.first; first < run.last; first += block) {
    const int last = first + block < run.last ? first + block : run.last;
    Ahead::Lines ahead = run.lines_ahead(first, last - first);
    for (std::int64_t c = 0; c < dim; c += 64) {
      const std::int64_t left = dim - c;
      const __mmask64 mask = kWhole || left >= 64 ? ~__mmask64{0} : (__mmask64{1} << left) - 1;
      const auto half = [&](int n) { return static_cast<__mmask32>(mask >> (32 * n)); };
      float* sums = tile.sums + row * stream_dim(dim) + c * R;
      __m512i acc[R][4];
      HEDDLE_UNROLL
      for (int r = 0; r < R; ++r) {
        HEDDLE_UNROLL
        for (int n = 0; n < 4; ++n) {
          acc[r][n] = first == 0 ? _mm512_setzero_si512() : _mm512_loadu_si512(sums + 64 * r + 16 * n);
        }
      }
      for (int j = first; j < last; j += 2) {
        ahead.fetch<2 * kBytes>();
        const std::byte *even = run.row(j) + c * kBytes, *odd = run.row(j + 1) + c * kBytes;
        const bool pair = kInt8 || j + 1 < run.count;  // else 0, not 0 times what may be NaN
        __m512i x[4];
        HEDDLE_UNROLL
        for (int n = 0; n < 2; ++n) {
          const __m512i a = load_words(half(n), even + 32 * kBytes * n);
          const __m512i b = load_words(pair ? half(n) : __mmask32{0}, odd + 32 * kBytes * n);
          x[2 * n] = _mm512_unpacklo_epi16(a, b);
          x[2 * n + 1] = _mm512_unpackhi_epi16(a, b);
        }
        HEDDLE_UNROLL
        for (int r = 0; r < R; ++r) {
          std::int32_t both;
          std::memcpy(&both, p + r * 2 * kStreamKeys + j, 4);
          const __m512i w = _mm512_set1_epi32(both);
          HEDDLE_UNROLL
          for (int n = 0; n < 4; ++n) acc[r][n] = multiply(acc[r][n], w, x[n]);
        }
      }
      HEDDLE_UNROLL
      for (int r = 0; r < R; ++r) {
        HEDDLE_UNROLL
        for (int n = 0; n < 4; ++n) _mm512_storeu_si512(sums + 64 * r + 16 * n, acc[r][n]);
      }
    }
  }
}

// o = alpha o + weight sums for R rows from `row` on, at the end of a step.
template <Math pv, int R>
void finish_paired_values(const StreamTile& tile, std::int64_t row, std::int64_t dim) {
  // Of two vectors of a pair of keys, lane 4 i + k of the lower (upper) one holds column 8 i + k (8 i + 4 + k).
  const __m512i lower = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
  const __m512i upper = _mm512_setr_epi32(8, 9, 10, 11, 24, 25, 26, 27, 12, 13, 14, 15, 28, 29, 30, 31);
  const auto load_sums = [](const float* sums) {
    if constexpr (pv == Math::kInt8) return _mm512_cvtepi32_ps(_mm512_loadu_si512(sums));
    return _mm512_loadu_ps(sums);
  };
  for (int r = 0; r < R && row + r < tile.rows; ++r) {
    const float alpha = tile.alpha[row + r], weight = pv == Math::kInt8 ? tile.weight[row + r] : 1.0f;
    float* o = tile.o + (row + r) * tile.columns;
    for (std::int64_t c = 0; c < dim; c += 32) {
      const float* sums = tile.sums + row * stream_dim(dim) + c / 64 * 64 * R + 64 * r + c % 64;
      const __m512 a = load_sums(sums), b = load_sums(sums + 16);
      update(o, c, tile.columns, alpha, weight, _mm512_permutex2var_ps(a, lower, b));
      update(o, c + 16, tile.columns, alpha, weight, _mm512_permutex2var_ps(a, upper, b));
    }
  }
}
#endif

// Scores and values of R rows of a head.
template <int R>
void scores_of(const Run& run, const StreamTile& tile, const StreamStep& step, std::int64_t row) {
  const std::int64_t stride = stream_dim(step.dim), dim = step.dim;
  float* at = tile.scores + row * kStreamKeys;
#if HEDDLE_ISA_LEVEL >= 3
  if (step.qk == Math::kInt8) {
    const auto* q = static_cast<const std::int8_t*>(tile.queries) + row * stride;
    return dim % 64 == 0 ? int8_scores<R, true>(run, dim, q, stride, tile.row_sums + row, at)
                         : int8_scores<R, false>(run, dim, q, stride, tile.row_sums + row, at);
  }
  if (step.qk == Math::kBFloat16) {
    const auto* q = static_cast<const std::uint16_t*>(tile.queries) + row * stride;
    return dim % 32 == 0 ? bf16_scores<R, true>(run, dim, q, stride, at)
                         : bf16_scores<R, false>(run, dim, q, stride, at);
  }
#endif
  const float* q = static_cast<const float*>(tile.queries) + row * stride;
  switch (step.key_dtype) {
    case DType::kFloat32: return float_scores<DType::kFloat32, R>(run, dim, q, stride, at);
    case DType::kBFloat16: return float_scores<DType::kBFloat16, R>(run, dim, q, stride, at);
    case DType::kFloat16: return float_scores<DType::kFloat16, R>(run, dim, q, stride, at);
    case DType::kInt8: return float_scores<DType::kInt8, R>(run, dim, q, stride, at);
    default: return float_scores<DType::kFloat8E4M3, R>(run, dim, q, stride, at);
  }
}

template <int R>
void values_of(const Run& run, const StreamTile& tile, const StreamStep& step, std::int64_t row) {
#if HEDDLE_ISA_LEVEL >= 3
  const bool whole = step.dim_v % 64 == 0;
  if (step.pv == Math::kBFloat16) {
    return whole ? add_paired_values<Math::kBFloat16, R, true>(run, tile, row, step.dim_v)
                 : add_paired_values<Math::kBFloat16, R, false>(run, tile, row, step.dim_v);
  }
  if (step.pv == Math::kInt8) {
    return whole ? add_paired_values<Math::kInt8, R, true>(run, tile, row, step.dim_v)
                 : add_paired_values<Math::kInt8, R, false>(run, tile, row, step.dim_v);
  }
#endif
  const float* p = tile.scores + row * kStreamKeys;
  const float* alpha = run.first == 0 ? tile.alpha + row : nullptr;
  float* o = tile.o + row * tile.columns;
  switch (step.value_dtype) {
    case DType::kFloat32: return add_float_values<DType::kFloat32, R>(run, step.dim_v, p, alpha, o, tile.columns);
    case DType::kBFloat16: return add_float_values<DType::kBFloat16, R>(run, step.dim_v, p, alpha, o, tile.columns);
    case DType::kFloat16: return add_float_values<DType::kFloat16, R>(run, step.dim_v, p, alpha, o, tile.columns);
    case DType::kInt8: return add_float_values<DType::kInt8, R>(run, step.dim_v, p, alpha, o, tile.columns);
    default: return add_float_values<DType::kFloat8E4M3, R>(run, step.dim_v, p, alpha, o, tile.columns);
  }
}

// Rows by four; one or two alone when there are no more. fn(R, first row)
template <class Fn>
HEDDLE_INLINE void for_rows(std::int64_t rows, Fn&& fn) {
  if (rows == 1) return fn(std::integral_constant<int, 1>{}, 0);
  if (rows == 2) return fn(std::integral_constant<int, 2>{}, 0);
  for (std::int64_t row = 0; row < rows; row += 4) fn(std::integral_constant<int, 4>{}, row);
}

// 0 * NaN is NaN: where rows mask different keys and a value is not finite, each row takes just what it sees.
bool values_finite(const StreamStep& step, std::int64_t offset) {
  alignas(64) float row[kMaxDim];
  for (int j = 0; j < step.count; ++j) {
    row_as_floats(step.values[j] + offset, step.dim_v, step.value_dtype, row);
    bool finite = true;
    for (std::int64_t c = 0; c < step.dim_v; ++c) finite &= is_finite(row[c]);
    if (!finite) return false;
  }
  return true;
}

void add_visible(const StreamTile& tile, const StreamStep& step, std::int64_t offset) {
  alignas(64) float row[kMaxDim];
  for (std::int64_t r = 0; r < tile.rows; ++r) {
    float* o = tile.o + r * tile.columns;
    for (std::int64_t c = 0; c < step.dim_v; ++c) o[c] *= tile.alpha[r];
    for (int j = 0; j < step.count; ++j) {
      if ((step.bits[r * kStepTiles + j / 64] >> (j % 64) & 1u) == 0) continue;
      row_as_floats(step.values[j] + offset, step.dim_v, step.value_dtype, row);
      const float p = tile.scores[r * kStreamKeys + j];
      for (std::int64_t c = 0; c < step.dim_v; ++c) o[c] += p * row[c];
    }
  }
}

template <Math pv>
void softmax(const StreamTile& tile, const StreamStep& step, int head) {
  Step mask;
  mask.tiles = (step.count + kTileKeys - 1) / kTileKeys;
  std::uint64_t tail[kStepTiles];
  for (int t = 0; t < mask.tiles; ++t) {
    const int keys = step.count - t * kTileKeys;
    tail[t] = keys >= kTileKeys ? ~std::uint64_t{0} : (std::uint64_t{1} << keys) - 1;
    mask.bits[t] = step.bits != nullptr ? step.bits + t : keys >= kTileKeys ? nullptr : tail + t;
    mask.key_scale[t] = step.key_scale == nullptr ? nullptr : step.key_scale + head * kStreamKeys + t * kTileKeys;
  }
  const std::int64_t bits_stride = step.bits != nullptr ? kStepTiles : 0;
  constexpr bool kActive[kStepTiles] = {true, true, true, true};
  for (std::int64_t r = 0; r < tile.rows; ++r) {
    const SoftmaxRow state{tile.factor[r], tile.bias == nullptr ? 0.0f : tile.bias[r],
                           tile.softcap,   tile.m + r,
                           tile.l + r,     tile.weight + r};
    float* at = tile.scores + r * kStreamKeys;
    tile.alpha[r] = softmax_row<pv>(at, at, mask, kActive, r * bits_stride, state);
    if (pv == Math::kFloat32 && step.value_scale != nullptr) {
      // A masked key's scale may be NaN.
      const float* scale = step.value_scale + head * kStreamKeys;
      for (int j = 0; j < step.count; ++j) at[j] = at[j] == 0.0f ? 0.0f : at[j] * scale[j];
    }
  }
  for (std::int64_t r = tile.rows; r < stream_rows(tile.rows); ++r) tile.alpha[r] = tile.weight[r] = 1.0f;
}

// body(run, head) in the order in which rows lie: segment by segment, and in each head by head. `after` is read next.
template <class Body>
HEDDLE_INLINE void visit(const StreamStep& step, int num_heads, Run run, std::int64_t head_stride,
                         const std::byte* after, Body&& body) {
  for (int s = 0; s < step.num_segments; ++s) {
    const StreamSegment& segment = step.segments[s];
    const std::byte* next = s + 1 < step.num_segments ? run.rows[step.segments[s + 1].first] : after;
    run.first = segment.first;
    run.last = segment.first + segment.count;
    const std::int64_t bytes = segment.count * run.row_bytes * num_heads;
    const bool is_short = !kMatrixUnits && bytes <= kShortBytes;
    const std::int64_t begin = is_short ? bytes : kBeginBytes;
    const std::int64_t each = (begin / num_heads + 63) / 64 * 64;
    for (int h = 0; h < num_heads; ++h) {
      // The processor needs a while to follow a new place in memory: the next segment is begun meanwhile.
      const std::int64_t first = h * each, last = first + each < begin ? first + each : begin;
      for (std::int64_t b = first; next != nullptr && b < last; b += 64) {
        if (is_short) {
          __builtin_prefetch(next + b, 0, 2);
        } else {
          fetch_line(next + b);
        }
      }
      run.offset = h * head_stride;
      body(run, h);
    }
  }
}

HEDDLE_INLINE void visit_keys(const StreamTile* heads, int num_heads, const StreamStep& step, const std::byte* after,
                              Ahead& ahead) {
  const Run keys(step.keys, step.dim * static_cast<std::int64_t>(size_of(step.key_dtype)), step.count);
  visit(step, num_heads, keys, step.key_head_stride, after, [&](Run& run, int h) {
    for_rows(heads[h].rows, [&](auto r, std::int64_t row) {
      run.ahead = row == 0 ? &ahead : nullptr;
      scores_of<r>(run, heads[h], step, row);
    });
    if (step.scored != nullptr) step.scored(step.context, h, run.first, run.last);
  });
}

void stream_scores(const StreamTile* heads, int num_heads, const StreamStep& step) {
  Ahead ahead(step, num_heads, false);
  visit_keys(heads, num_heads, step, step.next > 0 ? step.keys[step.count] : nullptr, ahead);
}

// Keys, then values.
void stream_step(const StreamTile* heads, int num_heads, const StreamStep& step) {
  Ahead ahead(step, num_heads, true);
  visit_keys(heads, num_heads, step, step.values[0], ahead);
  bool done[kStreamHeads] = {};
  const Run values(step.values, step.dim_v * static_cast<std::int64_t>(size_of(step.value_dtype)), step.count);
  visit(step, num_heads, values, step.value_head_stride, step.next > 0 ? step.keys[step.count] : nullptr,
        [&](Run& run, int h) {
          if (run.first == 0) {
            done[h] = step.bits != nullptr && !values_finite(step, run.offset);
            if (step.pv == Math::kFloat32 || done[h]) {
              softmax<Math::kFloat32>(heads[h], step, h);
            } else if (step.pv == Math::kBFloat16) {
              softmax<Math::kBFloat16>(heads[h], step, h);
            } else {
              softmax<Math::kInt8>(heads[h], step, h);
            }
            if (done[h]) add_visible(heads[h], step, run.offset);
          }
          if (done[h]) return;
          for_rows(heads[h].rows, [&](auto r, std::int64_t row) {
            run.ahead = row == 0 ? &ahead : nullptr;
            values_of<r>(run, heads[h], step, row);
          });
#if HEDDLE_ISA_LEVEL >= 3
          if (run.last < run.count) return;
          for_rows(heads[h].rows, [&](auto r, std::int64_t row) {
            if (step.pv == Math::kBFloat16) finish_paired_values<Math::kBFloat16, r>(heads[h], row, step.dim_v);
            if (step.pv == Math::kInt8) finish_paired_values<Math::kInt8, r>(heads[h], row, step.dim_v);
          });
#endif
        });
}

}  // namespace

extern const StreamKernels kStreamKernels;
const StreamKernels kStreamKernels{.scores = stream_scores, .step = stream_step};

}  // namespace heddle::host::HEDDLE_ISA
