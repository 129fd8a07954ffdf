// Metrics of tokens and the exact largest k of them, for one instruction set.
#include "host/kernels/matmul.h"
#include "host/kernels/simd.h"
#include "host/select_kernels.h"
#include "host/stream_kernels.h"

namespace heddle::host::HEDDLE_ISA {
namespace {

// Lanes of x that are NaN, as set bits of the sign.
HEDDLE_INLINE I nan_lanes(F x) { return x != x; }

HEDDLE_INLINE bool any_lane(I x) {
  alignas(64) std::int32_t lanes[kWidth];
  store(lanes, x);
  std::int32_t all = 0;
  for (int i = 0; i < kWidth; ++i) all |= lanes[i];
  return all != 0;
}

// Natural logarithm of positive normal numbers, relative error 1e-7 (Cephes' logf); +inf stays, 0 and below give
// meaningless numbers, NaN stays NaN.
HEDDLE_INLINE F log(F x) {
#if HEDDLE_ISA_LEVEL >= 2
  x = max(set1(0x1p-126f), x);
  F m = (F)_mm512_getmant_ps((__m512)x, _MM_MANT_NORM_p5_1, _MM_MANT_SIGN_src);  // [0.5, 1)
  F e = (F)_mm512_getexp_ps((__m512)x);
  const __mmask16 low = _mm512_cmp_ps_mask((__m512)m, _mm512_set1_ps(0.70710678f), _CMP_LT_OQ);
  m = (F)_mm512_mask_add_ps((__m512)m, low, (__m512)m, (__m512)m) - set1(1.0f);
  e = (F)_mm512_mask_add_ps((__m512)e, ~low, (__m512)e, _mm512_set1_ps(1.0f));
#else
  const I bits = as_int(x);
  I exponent = ((bits >> 23) & 0xff) - 126;
  F m = as_float((bits & 0x007fffff) | 0x3f000000);  // [0.5, 1)
  const I low = m < set1(0.70710678f);
  exponent = exponent + low;  // true is -1
  m = blend(low, m + m, m) - set1(1.0f);
  const F e = to_float(exponent);
#endif
  F p = fma(set1(7.0376836292e-2f), m, set1(-1.1514610310e-1f));
  p = fma(p, m, set1(1.1676998740e-1f));
  p = fma(p, m, set1(-1.2420140846e-1f));
  p = fma(p, m, set1(1.4249322787e-1f));
  p = fma(p, m, set1(-1.6668057665e-1f));
  p = fma(p, m, set1(2.0000714765e-1f));
  p = fma(p, m, set1(-2.4999993993e-1f));
  p = fma(p, m, set1(3.3333331174e-1f));
  const F z = m * m;
  F y = p * m * z;
  y = fma(e, set1(-2.12194440e-4f), y);
  y = fma(z, set1(-0.5f), y);
  y = fma(e, set1(0.693359375f), m + y);
#if HEDDLE_ISA_LEVEL >= 2
  constexpr int kStays = 0x01 | 0x80 | 0x08;  // NaN, +inf
  return (F)_mm512_mask_mov_ps((__m512)y, _mm512_fpclass_ps_mask((__m512)x, kStays), (__m512)x);
#else
  y = blend(x == set1(__builtin_inff()), x, y);
  return blend(x != x, x, y);
#endif
}

// The score of kWidth keys of a row.
HEDDLE_INLINE F finish_score(const RawScores& b, std::int64_t row, int key) {
  F x = load(b.scores + row * kStreamKeys + key);
  if (b.key_scale != nullptr) x = x * load(b.key_scale + key);
  x = fma(x, set1(b.factor[row]), set1(b.bias[row]));
  if (b.softcap > 0.0f) x = set1(b.softcap) * tanh(x * set1(1.0f / b.softcap));
  return x;
}

// Whole vectors, and the rest through a buffer: `fn` is given a vector and returns one.
template <class Fn>
HEDDLE_INLINE void for_vectors(std::int64_t n, float* out, Fn&& fn) {
  std::int64_t i = 0;
  for (; i + kWidth <= n; i += kWidth) store(out + i, fn(i));
  if (i < n) {
    alignas(64) float buffer[kWidth];
    store(buffer, fn(i));
    std::memcpy(out + i, buffer, static_cast<std::size_t>(n - i) * 4);
  }
}

// Scores and scales are readable up to kStreamKeys, whatever they hold past `count`.
bool reduce(const RawScores& b, bool first, float* metric) {
  I bad{};
  for (int j = 0; j < b.count; j += kWidth) {
    F best = set1(-__builtin_inff());
    I nan{};
    for (std::int64_t r = 0; r < b.rows; ++r) {
      const F x = finish_score(b, r, j);
      nan = nan | nan_lanes(x);
      best = max(x, best);
    }
    const int left = b.count - j;
    if (left >= kWidth) {
      bad = bad | nan;
      store(metric + j, first ? best : max(best, load(metric + j)));
      continue;
    }
    alignas(64) float lanes[kWidth];
    alignas(64) std::int32_t nans[kWidth];
    store(lanes, best);
    store(nans, nan);
    for (int i = 0; i < left; ++i) {
      if (nans[i] != 0) return false;
      metric[j + i] = first || lanes[i] > metric[j + i] ? lanes[i] : metric[j + i];
    }
  }
  return !any_lane(bad);
}

bool finish(const RawScores& b, float* out, std::int64_t stride) {
  bool good = true;
  for (std::int64_t r = 0; r < b.rows; ++r) {
    float* to = out + r * stride;
    for_vectors(b.count, to, [&](std::int64_t j) { return finish_score(b, r, static_cast<int>(j)); });
    for (int j = 0; j < b.count; ++j) good &= to[j] == to[j];
  }
  return good;
}

// max(0, x) that keeps a NaN.
HEDDLE_INLINE F relu(F x) { return max(F{}, x); }

void index(const RawScores& b, const float* weights, bool first, float* out) {
  for_vectors(b.count, out, [&](std::int64_t j) {
    F sum{};
    if (!first) {
      alignas(64) float there[kWidth] = {};
      const std::int64_t left = b.count - j < kWidth ? b.count - j : kWidth;
      std::memcpy(there, out + j, static_cast<std::size_t>(left) * 4);
      sum = load(there);
    }
    for (std::int64_t r = 0; r < b.rows; ++r) {
      sum = fma(set1(weights[r]), relu(finish_score(b, r, static_cast<int>(j))), sum);
    }
    return sum;
  });
}

HEDDLE_INLINE F value_term(F norm, const ValueTerm& t) {
  if (t.plain) return set1(t.beta) * log(norm + set1(t.epsilon));
  // max(0, log n) = log max(1, n), and NaN stays.
  return set1(t.beta) * log(max(set1(1.0f), norm));
}

bool add_terms(const float* norms, std::int64_t n, const ValueTerm& t, float* metric) {
  I bad{};
  std::int64_t i = 0;
  for (; i + kWidth <= n; i += kWidth) {
    const F x = load(metric + i) + value_term(load(norms + i), t);
    bad = bad | nan_lanes(x);
    store(metric + i, x);
  }
  if (i < n) {
    alignas(64) float norm[kWidth] = {}, at[kWidth] = {};
    std::memcpy(norm, norms + i, static_cast<std::size_t>(n - i) * 4);
    std::memcpy(at, metric + i, static_cast<std::size_t>(n - i) * 4);
    store(at, load(at) + value_term(load(norm), t));
    for (std::int64_t j = 0; i + j < n; ++j) {
      if (at[j] != at[j]) return false;
      metric[i + j] = at[j];
    }
  }
  return !any_lane(bad);
}

void squared_distances(const float* x, std::int64_t dim, const float* o, std::int64_t stride, std::int64_t rows,
                       float* out) {
  const std::int64_t whole = dim / kWidth * kWidth;
  for (std::int64_t r = 0; r < rows; ++r) {
    F sum{};
    for (std::int64_t i = 0; i < whole; i += kWidth) {
      const F d = load(x + i) - load(o + r * stride + i);
      sum = fma(d, d, sum);
    }
    float rest = 0.0f;
    for (std::int64_t i = whole; i < dim; ++i) {
      const float d = x[i] - o[r * stride + i];
      rest += d * d;
    }
    out[r] = reduce_add(sum) + rest;
  }
}

void add_weighted(const float* x, std::int64_t dim, const float* weights, std::int64_t stride, std::int64_t rows,
                  float* sums) {
  for (std::int64_t r = 0; r < rows; ++r) {
    float* to = sums + r * stride;
    const float w = weights[r];
    for (std::int64_t i = 0; i < dim; ++i) to[i] += w * x[i];
  }
}

// --- indexer ---

#if HEDDLE_ISA_LEVEL >= 4
template <Math math>
void index_tile_amx(const IndexQuery& q, const std::uint32_t* panel, float* out) {
  alignas(64) float scores[kAmxRows * kTileKeys];
  F sum[kTileKeys / kWidth] = {};
  for (std::int64_t row = 0; row < q.rows; row += kAmxRows) {
    const std::uint32_t* a = static_cast<const std::uint32_t*>(q.queries) + row * q.words;
    amx_scores_32x32<math>(a, q.words, panel, scores, kTileKeys);
    amx_scores_32x32<math>(a, q.words, panel + 32 * q.words, scores + 32, kTileKeys);
    for (std::int64_t r = 0; r < kAmxRows && row + r < q.rows; ++r) {
      const F w = set1(q.weights[row + r]);
      HEDDLE_UNROLL
      for (int n = 0; n < kTileKeys / kWidth; ++n) {
        const float* at = scores + r * kTileKeys + n * kWidth;
        sum[n] = fma(w, relu(math == Math::kInt8 ? to_float(load_int(at)) : load(at)), sum[n]);
      }
    }
  }
  for (int n = 0; n < kTileKeys / kWidth; ++n) store(out + n * kWidth, sum[n]);
}
#endif

// A register block of heads at a time; their scores never leave the registers.
template <Math math>
void index_tile_vectors(const IndexQuery& q, const std::uint32_t* panel, float* out) {
  using Acc = typename Product<math>::Acc;
  for (int n0 = 0; n0 < kTileKeys; n0 += kBlockVectors * kWidth) {
    F sum[kBlockVectors] = {};
    for (std::int64_t row = 0; row < q.rows; row += kBlockRows) {
      const std::uint32_t* a = static_cast<const std::uint32_t*>(q.queries) + row * q.words;
      Acc acc[kBlockRows][kBlockVectors];
      HEDDLE_UNROLL
      for (int m = 0; m < kBlockRows; ++m) {
        Acc init{};
        if constexpr (math == Math::kInt8) init = init - 128 * q.row_sums[row + m];
        HEDDLE_UNROLL
        for (int n = 0; n < kBlockVectors; ++n) acc[m][n] = init;
      }
      multiply_block<math>(acc, a, q.words, panel + n0, kTileKeys, q.words);
      const auto add = [&](int m) {
        const F w = set1(q.weights[row + m]);
        HEDDLE_UNROLL
        for (int n = 0; n < kBlockVectors; ++n) sum[n] = fma(w, relu(__builtin_convertvector(acc[m][n], F)), sum[n]);
      };
      if (row + kBlockRows <= q.rows) {
        HEDDLE_UNROLL
        for (int m = 0; m < kBlockRows; ++m) add(m);
      } else {  // padding times an infinite key would be NaN
        HEDDLE_UNROLL
        for (int m = 0; m < kBlockRows; ++m) {
          if (row + m < q.rows) add(m);
        }
      }
    }
    HEDDLE_UNROLL
    for (int n = 0; n < kBlockVectors; ++n) store(out + n0 + n * kWidth, sum[n]);
  }
}

void index_tile(const IndexQuery& q, Math math, const void* keys, float* out) {
  const auto* panel = static_cast<const std::uint32_t*>(keys);
#if HEDDLE_ISA_LEVEL >= 4
  if (math == Math::kBFloat16) return index_tile_amx<Math::kBFloat16>(q, panel, out);
  if (math == Math::kInt8) return index_tile_amx<Math::kInt8>(q, panel, out);
#elif HEDDLE_ISA_LEVEL == 3
  if (math == Math::kBFloat16) return index_tile_vectors<Math::kBFloat16>(q, panel, out);
  if (math == Math::kInt8) return index_tile_vectors<Math::kInt8>(q, panel, out);
#else
  (void)math;  // everything is float32 here
#endif
  index_tile_vectors<Math::kFloat32>(q, panel, out);
}

// --- the largest k ---

// Ordered like the floats, as unsigned numbers; -0 like 0.
HEDDLE_INLINE std::uint32_t ordered(float x) {
  const std::uint32_t u = float_bits(x + 0.0f);
  return u ^ ((u >> 31) != 0 ? 0xffffffffu : 0x80000000u);
}

struct Candidates {
  std::uint32_t* keys;
  std::int32_t* positions;
  std::int64_t count;
};

// All of x at or above `least`, in order; with less work than looking at each where few are. False if one is NaN.
bool collect(const float* x, std::int64_t n, float least, Candidates& c) {
  std::int64_t at = 0, i = 0;
#if HEDDLE_ISA_LEVEL >= 2
  const __m512 bound = _mm512_set1_ps(least), zero = _mm512_setzero_ps();
  const __m512i sign = _mm512_set1_epi32(static_cast<int>(0x80000000u));
  __m512i position = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  __mmask16 nan = 0;
  for (; i + 16 <= n; i += 16) {
    const __m512 v = _mm512_loadu_ps(x + i);
    nan |= _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
    const __mmask16 in = _mm512_cmp_ps_mask(v, bound, _CMP_GE_OQ);
    if (in != 0) {
      const __m512i bits = _mm512_castps_si512(_mm512_add_ps(v, zero));
      const __m512i flip = _mm512_or_si512(_mm512_srai_epi32(bits, 31), sign);
      // Whole vectors, past the last candidate too: a masked store from a compressed register is far slower.
      _mm512_storeu_si512(c.keys + at, _mm512_maskz_compress_epi32(in, _mm512_xor_si512(bits, flip)));
      _mm512_storeu_si512(c.positions + at, _mm512_maskz_compress_epi32(in, position));
      at += __builtin_popcount(in);
    }
    position = _mm512_add_epi32(position, _mm512_set1_epi32(16));
  }
  if (nan != 0) return false;
#else
  for (; i + kWidth <= n; i += kWidth) {
    const F v = load(x + i);
    if (!any_lane((v >= set1(least)) | (v != v))) continue;
    for (int lane = 0; lane < kWidth; ++lane) {
      if (v[lane] != v[lane]) return false;
      c.keys[at] = ordered(v[lane]);
      c.positions[at] = static_cast<std::int32_t>(i + lane);
      at += v[lane] >= least ? 1 : 0;
    }
  }
#endif
  for (; i < n; ++i) {
    if (x[i] != x[i]) return false;
    c.keys[at] = ordered(x[i]);
    c.positions[at] = static_cast<std::int32_t>(i);
    at += x[i] >= least ? 1 : 0;
  }
  c.count = at;
  return true;
}

std::int64_t count_at_least(const std::uint32_t* keys, std::int64_t n, std::uint32_t least) {
#if HEDDLE_ISA_LEVEL >= 2
  const __m512i bound = _mm512_set1_epi32(static_cast<int>(least)), one = _mm512_set1_epi32(1);
  __m512i counts = _mm512_setzero_si512();
  std::int64_t i = 0;
  for (; i + 16 <= n; i += 16) {
    const __mmask16 in = _mm512_cmpge_epu32_mask(_mm512_loadu_si512(keys + i), bound);
    counts = _mm512_mask_add_epi32(counts, in, counts, one);
  }
  const auto rest = static_cast<__mmask16>((1u << (n - i)) - 1);
  const __mmask16 in = _mm512_mask_cmpge_epu32_mask(rest, _mm512_maskz_loadu_epi32(rest, keys + i), bound);
  return _mm512_reduce_add_epi32(_mm512_mask_add_epi32(counts, in, counts, one));
#else
  std::int32_t count = 0;
  for (std::int64_t i = 0; i < n; ++i) count += keys[i] >= least ? 1 : 0;
  return count;
#endif
}

// A number above which lie k - `ties` keys, where `ties` or more are equal to it: bit by bit from the top, each with a
// count of all keys, until some number of bits says which k they are.
std::uint32_t kth_largest(const std::uint32_t* keys, std::int64_t n, std::int64_t k, std::int64_t& ties) {
  std::uint32_t found = 0;
  for (std::uint32_t bit = 1u << 31; bit != 0; bit >>= 1) {
    const std::int64_t count = count_at_least(keys, n, found | bit);
    if (count == k) {
      ties = 0;
      return (found | bit) - 1;
    }
    if (count > k) found |= bit;
  }
  ties = k - (found == ~0u ? 0 : count_at_least(keys, n, found + 1));
  return found;
}

// A number that about `want` of x, and hardly ever fewer than k of them, lie at or above: from a sample.
float estimate(const float* x, std::int64_t n, std::int64_t k, std::uint32_t* keys) {
  constexpr std::int64_t kSample = 1024;
  const std::int64_t step = n / kSample;
  std::int64_t count = 0;
  for (std::int64_t i = 0; i < kSample; ++i) {
    constexpr std::int64_t kAhead = 32;  // each lies in a line of its own
    if (i + kAhead < kSample) __builtin_prefetch(x + (i + kAhead) * step);
    const float v = x[i * step];
    keys[count] = ordered(v);
    count += v == v ? 1 : 0;
  }
  // Three standard deviations above the expected rank; a miss costs a second pass, not exactness.
  const double expected = static_cast<double>(k) * kSample / static_cast<double>(n);
  const std::int64_t rank = static_cast<std::int64_t>(expected + 3.0 * __builtin_sqrt(expected) + 6.0);
  if (rank >= count) return -__builtin_inff();
  std::int64_t ties = 0;
  const std::uint32_t key = kth_largest(keys, count, rank, ties);
  return float_from_bits((key >> 31) != 0 ? key ^ 0x80000000u : ~key);
}

bool top_k(const float* x, std::int64_t n, std::int64_t k, std::int32_t base, std::int32_t* out, void* scratch) {
  constexpr std::int64_t kSampled = 8192;  // fewer are looked at one by one
  Candidates c{static_cast<std::uint32_t*>(scratch), nullptr, 0};
  c.positions = reinterpret_cast<std::int32_t*>(c.keys + n + 64);
  float least = -__builtin_inff();
  if (n >= kSampled && k <= n / 4) least = estimate(x, n, k, c.keys);
  if (!collect(x, n, least, c)) return false;
  if (c.count < k && !collect(x, n, -__builtin_inff(), c)) return false;

  std::int64_t ties = 0;
  const std::uint32_t bound = kth_largest(c.keys, c.count, k, ties);
  std::int64_t written = 0;
  for (std::int64_t i = 0; written < k; ++i) {
    const bool tie = c.keys[i] == bound && ties > 0;
    out[written] = base + c.positions[i];
    written += c.keys[i] > bound || tie ? 1 : 0;
    ties -= tie ? 1 : 0;
  }
  return true;
}

}  // namespace

extern const SelectKernels kSelectKernels;
const SelectKernels kSelectKernels{.index_tile = index_tile,
                                   .reduce = reduce,
                                   .index = index,
                                   .finish = finish,
                                   .add_terms = add_terms,
                                   .squared_distances = squared_distances,
                                   .add_weighted = add_weighted,
                                   .top_k = top_k};

}  // namespace heddle::host::HEDDLE_ISA
