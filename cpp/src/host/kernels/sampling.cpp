// Sampled decode's kernels of one instruction set: scores to logits and masses, weights of a tile, keys by feature, and
// the sum of the drawn values.
#include "host/kernels/pack.h"
#include "host/kernels/simd.h"
#include "host/kernels/softmax.h"
#include "host/sampling_kernels.h"

namespace heddle::host::HEDDLE_ISA {
namespace {

constexpr int kVectors = kTileKeys / kWidth;

HEDDLE_INLINE F ceil(F x) {
#if HEDDLE_ISA_LEVEL >= 2
  return (F)_mm512_roundscale_ps((__m512)x, _MM_FROUND_TO_POS_INF | _MM_FROUND_NO_EXC);
#else
  for (int i = 0; i < kWidth; ++i) x[i] = __builtin_ceilf(x[i]);
  return x;
#endif
}

// Lanes where a < b, as bits.
HEDDLE_INLINE std::uint32_t below(F a, F b) {
#if HEDDLE_ISA_LEVEL >= 2
  return _mm512_cmp_ps_mask((__m512)a, (__m512)b, _CMP_LT_OQ);
#else
  std::uint32_t bits = 0;
  for (int i = 0; i < kWidth; ++i) bits |= std::uint32_t{a[i] < b[i]} << i;
  return bits;
#endif
}

struct Larger {
  HEDDLE_INLINE F operator()(F a, F b) const { return max(a, b); }
  HEDDLE_INLINE float operator()(float a, float b) const { return a > b ? a : b; }
};

struct Sum {
  template <class T>
  HEDDLE_INLINE T operator()(T a, T b) const {
    return a + b;
  }
};

#if HEDDLE_ISA_LEVEL >= 2
// Of four vectors (of R, again from the first one on), lane r of each 128 bits: vector r's maximum or sum over them.
template <int R, class Op>
HEDDLE_INLINE F reduce_quads(const F (&x)[R], Op&& op) {
  const __m512 a = (__m512)x[0], b = (__m512)x[1 % R], c = (__m512)x[2 % R], d = (__m512)x[3 % R];
  const F ab = op((F)_mm512_unpacklo_ps(a, b), (F)_mm512_unpackhi_ps(a, b));
  const F cd = op((F)_mm512_unpacklo_ps(c, d), (F)_mm512_unpackhi_ps(c, d));
  return op((F)_mm512_shuffle_ps((__m512)ab, (__m512)cd, 0x44), (F)_mm512_shuffle_ps((__m512)ab, (__m512)cd, 0xee));
}
#endif

// Maxima or sums of R vectors' lanes: those of vector r in every lane 4 i + r (of one vector: in every lane).
template <int R, class Op>
HEDDLE_INLINE F reduce_rows(const F (&x)[R], Op&& op) {
#if HEDDLE_ISA_LEVEL >= 2
  F t = reduce_quads(x, op);
  t = op(t, (F)_mm512_shuffle_f32x4((__m512)t, (__m512)t, 0x4e));
  return op(t, (F)_mm512_shuffle_f32x4((__m512)t, (__m512)t, 0xb1));
#else
  static_assert(R == 1);
  alignas(64) float lanes[kWidth];
  store(lanes, x[0]);
  HEDDLE_UNROLL
  for (int w = kWidth / 2; w > 0; w /= 2) {
    for (int i = 0; i < w; ++i) lanes[i] = op(lanes[i], lanes[i + w]);
  }
  return set1(lanes[0]);
#endif
}

// What reduce_rows found for vector r, in every lane.
template <int R>
HEDDLE_INLINE F row_of(F x, int r) {
#if HEDDLE_ISA_LEVEL >= 2
  if (R > 1) return (F)_mm512_permutevar_ps((__m512)x, _mm512_set1_epi32(r));
#endif
  (void)r;
  return x;
}

// The parts of the masses of R rows with weights e, and the masses; `rows` of them are asked for.
template <int R>
HEDDLE_INLINE void store_parts(const F (&e)[R][kVectors], std::int64_t rows, float* parts, float (&sums)[R]) {
#if HEDDLE_ISA_LEVEL >= 2
  static_assert(kVectors == 4 && kTileParts == 4);
  F quad[4];
  HEDDLE_UNROLL
  for (int r = 0; r < 4; ++r) quad[r] = reduce_quads(e[r % R], Sum{});
  const auto halves = [](F a, F b) {
    return (F)_mm512_shuffle_f32x4((__m512)a, (__m512)b, 0x88) + (F)_mm512_shuffle_f32x4((__m512)a, (__m512)b, 0xdd);
  };
  const F all = halves(halves(quad[0], quad[1]), halves(quad[2], quad[3]));  // lane 4 r + n: part n of row r
  F total = all + (F)_mm512_permute_ps((__m512)all, 0xb1);
  total = total + (F)_mm512_permute_ps((__m512)total, 0x4e);
  if (R == 4 && rows == 4) {
    store(parts, all);
  } else {
    _mm512_mask_storeu_ps(parts, static_cast<__mmask16>((1u << (4 * rows)) - 1), (__m512)all);
  }
  HEDDLE_UNROLL
  for (int r = 0; r < R; ++r) sums[r] = total[4 * r];
#else
  constexpr int kEach = kPartKeys / kWidth;
  for (int r = 0; r < R && r < rows; ++r) {
    sums[r] = 0.0f;
    for (int n = 0; n < kTileParts; ++n) {
      F sum = e[r][n * kEach];
      for (int i = 1; i < kEach; ++i) sum = sum + e[r][n * kEach + i];
      parts[r * kTileParts + n] = reduce_add(sum);
      sums[r] += parts[r * kTileParts + n];
    }
  }
#endif
}

// The masses and their parts of logits of R rows, of which `rows` are asked for.
template <int R>
HEDDLE_INLINE void masses_of(const F (&x)[R][kVectors], std::int64_t rows, TileMass* mass, float* parts,
                             std::int64_t stride) {
  F top[R], e[R][kVectors];
  HEDDLE_UNROLL
  for (int r = 0; r < R; ++r) {
    top[r] = max(x[r][0], negative_infinity());
    HEDDLE_UNROLL
    for (int n = 1; n < kVectors; ++n) top[r] = max(x[r][n], top[r]);
  }
  const F tops = ceil(reduce_rows(top, Larger{}));
  // A tile with nothing in it takes any base: 2^-inf is 0. A NaN gets past max but not past the sum.
  const F bases = blend(tops == negative_infinity(), F{}, tops);
  HEDDLE_UNROLL
  for (int r = 0; r < R; ++r) {
    const F base = row_of<R>(bases, r);
    HEDDLE_UNROLL
    for (int n = 0; n < kVectors; ++n) e[r][n] = exp2<5>(x[r][n] - base);
  }
  float sums[R];
  store_parts(e, rows, parts, sums);
  HEDDLE_UNROLL
  for (int r = 0; r < R; ++r) {
    if (r < rows) mass[r * stride] = {tops[r], sums[r]};
  }
}

// Rows from `first` on, `rows` of them (R, or fewer of scores that are padded to R).
template <int R>
HEDDLE_INLINE void logits_of(const TileScores& tile, std::int64_t first, std::int64_t rows) {
  F x[R][kVectors];
  HEDDLE_UNROLL
  for (int r = 0; r < R; ++r) {
    const std::int64_t row = first + (r < rows ? r : 0);
    const float* s = tile.scores + (first + r) * kStreamKeys;
    const F factor = set1(tile.factor[row]);
    HEDDLE_UNROLL
    for (int n = 0; n < kVectors; ++n) x[r][n] = load(s + n * kWidth) * factor;
    if (tile.key_scale != nullptr) {
      HEDDLE_UNROLL
      for (int n = 0; n < kVectors; ++n) x[r][n] = x[r][n] * load(tile.key_scale + n * kWidth);
    }
    if (tile.softcap > 0.0f) {
      for (int n = 0; n < kVectors; ++n) x[r][n] = set1(tile.softcap) * tanh(x[r][n] * set1(1.0f / tile.softcap));
    }
    if (tile.bits != nullptr) {
      for (int n = 0; n < kVectors; ++n) {
        x[r][n] = select(lane_bits(tile.bits[row], n), x[r][n], negative_infinity());
      }
    }
    if (r >= rows) continue;
    float* out = tile.logits + row * kTileKeys;
#if HEDDLE_ISA_LEVEL >= 2
    if (tile.next == 0) {  // the lines that would be overwritten are not read
      HEDDLE_UNROLL
      for (int n = 0; n < kVectors; ++n) _mm512_stream_ps(out + n * kWidth, (__m512)x[r][n]);
      continue;
    }
#endif
    HEDDLE_UNROLL
    for (int n = 0; n < kVectors; ++n) store(out + n * kWidth, x[r][n]);
    HEDDLE_UNROLL
    for (int n = 0; n < kTileKeys; n += 16) __builtin_prefetch(out + tile.next + n, 1);
  }
  __builtin_prefetch(tile.parts + first * kTileParts + tile.next_parts, 1);
  masses_of(x, rows, tile.mass + first * tile.mass_stride, tile.parts + first * kTileParts, tile.mass_stride);
}

void logits(const TileScores& tile) {
#if HEDDLE_ISA_LEVEL >= 2
  if (tile.rows == 2) return logits_of<2>(tile, 0, 2);
  if (tile.rows > 2) {
    for (std::int64_t r = 0; r < tile.rows; r += 4) logits_of<4>(tile, r, tile.rows - r < 4 ? tile.rows - r : 4);
    return;
  }
#endif
  for (std::int64_t r = 0; r < tile.rows; ++r) logits_of<1>(tile, r, 1);
}

TileMass mass(const float* logits, std::uint64_t bits, float* parts) {
  F x[1][kVectors];
  HEDDLE_UNROLL
  for (int n = 0; n < kVectors; ++n) {
    x[0][n] = select(lane_bits(bits, n), load(logits + n * kWidth), negative_infinity());
  }
  TileMass all;
  masses_of(x, 1, &all, parts, 0);
  return all;
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

HEDDLE_INLINE F weight_of(const float* logits, std::uint64_t bits, float top, int n) {
  return select(lane_bits(bits, n), exp2<5>(load(logits + n * kWidth) - set1(top)), F{});
}

void weights(const float* logits, std::uint64_t bits, float top, float* out) {
  HEDDLE_UNROLL
  for (int n = 0; n < kVectors; ++n) store(out + n * kWidth, weight_of(logits, bits, top, n));
}

void find(Pick* picks, std::int64_t count) {
  constexpr int kEach = kPartKeys / kWidth;
  for (std::int64_t i = 0; i < count; ++i) {
    Pick& pick = picks[i];
    const F target = set1(pick.target);
    std::uint32_t some = 0;  // keys that weigh something
    int key = 0;
    float carry = 0.0f;
    HEDDLE_UNROLL
    for (int n = 0; n < kEach; ++n) {
      const F x = weight_of(pick.logits, pick.bits, pick.top, n);
      const F sums = sums_within(x) + set1(carry);  // of the weights up to each key
      carry = sums[kWidth - 1];
      some |= below(F{}, x) << (n * kWidth);
      key += __builtin_popcount(below(sums, target));
    }
    pick.key += nearest(some, key);
  }
}

TileShares shares(const TileMass* masses, std::int64_t count, double* out) {
  float top = -__builtin_inff();
  double total = 0.0;
#if HEDDLE_ISA_LEVEL >= 2
  // Eight masses a vector.
  const auto mask_of = [&](std::int64_t t) {
    return count - t >= 8 ? ~__mmask16{0} : static_cast<__mmask16>((1u << (2 * (count - t))) - 1);
  };
  const __m512 nothing = _mm512_set1_ps(-__builtin_inff());
  __m512 highest = nothing;
  for (std::int64_t t = 0; t < count; t += 8) {
    highest = _mm512_max_ps(_mm512_mask_loadu_ps(nothing, mask_of(t) & 0x5555, masses + t), highest);
  }
  top = _mm512_reduce_max_ps(highest);
  const __m512d base = _mm512_set1_pd(top == -__builtin_inff() ? 0.0 : top), least = _mm512_set1_pd(-1022.0);
  const __m512i split = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 1, 3, 5, 7, 9, 11, 13, 15);
  __m512d all = _mm512_setzero_pd();
  for (std::int64_t t = 0; t < count; t += 8) {
    const __m512 x = _mm512_permutexvar_ps(split, _mm512_maskz_loadu_ps(mask_of(t), masses + t));
    const __m512d by = _mm512_sub_pd(_mm512_cvtps_pd(_mm512_castps512_ps256(x)), base);
    const __m512d sum = _mm512_cvtps_pd(_mm512_extractf32x8_ps(x, 1));
    const __mmask8 within = _mm512_cmp_pd_mask(by, least, _CMP_NLT_UQ);
    const __mmask8 nan = _mm512_cmp_pd_mask(sum, sum, _CMP_UNORD_Q);
    const __m512d share = _mm512_mask_mov_pd(_mm512_maskz_scalef_pd(within, sum, by), nan, sum);
    const auto tiles = static_cast<__mmask8>(count - t >= 8 ? 0xff : (1 << (count - t)) - 1);
    all = _mm512_mask_add_pd(all, tiles, all, share);
    _mm512_mask_storeu_pd(out + t, tiles, share);
  }
  total = _mm512_reduce_add_pd(all);
#else
  for (std::int64_t t = 0; t < count; ++t) top = masses[t].top > top ? masses[t].top : top;
  for (std::int64_t t = 0; t < count; ++t) {
    const float by = masses[t].top - top;  // a whole number, if there is anything
    const bool some = masses[t].sum > 0.0f && !(by < -1022.0f);
    out[t] = some ? masses[t].sum * __builtin_ldexp(1.0, static_cast<int>(by)) : masses[t].sum;
    total += out[t];
  }
#endif
  return {top, total};
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

void add_values(const ValueTerm* terms, std::int64_t count, DType dtype, std::int64_t dim, float* o,
                std::int64_t columns) {
  constexpr std::int64_t kAhead = 16;  // terms: rows lie anywhere, so only this fetches them in time
  const std::int64_t bytes = dim * (dtype == DType::kFloat32                                ? 4
                                    : dtype == DType::kBFloat16 || dtype == DType::kFloat16 ? 2
                                                                                            : 1);
  alignas(64) float row[kMaxDim];
  const std::byte* held = nullptr;
  for (std::int64_t i = 0; i < count; ++i) {
    if (i + kAhead < count && terms[i + kAhead].value != terms[i + kAhead - 1].value) {
      for (std::int64_t b = 0; b < bytes; b += 64) __builtin_prefetch(terms[i + kAhead].value + b);
    }
    if (terms[i].value != held) {  // rows of one key follow each other: it is read once
      held = terms[i].value;
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
                                       .shares = shares,
                                       .weights = weights,
                                       .find = find,
                                       .add_values = add_values};

}  // namespace heddle::host::HEDDLE_ISA
