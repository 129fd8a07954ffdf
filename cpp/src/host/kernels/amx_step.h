// A step of the tile path on AMX, pipelined: matrix tiles multiply one block while vector units take the softmax of
// another.
//
//   block      0         1         2     ...      32 query rows x up to 4 KV tiles
//   AMX       S0 | S1          S2  P0 V    S3  P1 V
//   vectors      | softmax S0  softmax S1  softmax S2
//
// The two streams of instructions are interleaved row by row; out-of-order execution overlaps them. Scores of a block
// are 32 KiB and probabilities 16 KiB, two of each in flight. Smaller blocks fit the first-level cache, but were 10 %
// slower at D 128: each block loads and stores its output rows once.
#pragma once

#if HEDDLE_ISA_LEVEL >= 4

#include "host/kernels/matmul.h"
#include "host/kernels/simd.h"
#include "host/kernels/softmax.h"
#include "host/tile_kernels.h"

namespace heddle::host::HEDDLE_ISA {

template <bool kIntScores>
HEDDLE_INLINE F load_scores(const float* s) {
  if constexpr (kIntScores) return to_float(load_int(s));
  return load(s);
}

inline constexpr int kBlockTiles = 4;
inline constexpr int kMaxBlocks = kTileRows / kAmxRows * ((kStepTiles + kBlockTiles - 1) / kBlockTiles);

struct AmxBlock {
  std::int64_t row = 0;  // first of its rows in the row tile
  int tiles = 0;         // of the step that it multiplies
  int tile[kBlockTiles];
  float* scores = nullptr;                 // [tiles][32][64]
  std::uint32_t* probabilities = nullptr;  // [32][kBlockTiles * 32] words
};
inline constexpr std::int64_t kScoreTile = kAmxRows * kTileKeys;
inline constexpr std::int64_t kProbabilityStride = kBlockTiles * kTileKeys / 2;  // words

// Matrix work that runs behind a softmax, in units of some 16 tile products.
template <Math qk>
struct AmxWork {
  const RowTile& tile;
  const Step& step;
  const AmxBlock* scores_of = nullptr;  // S = Q K of this block
  const AmxBlock* values_of = nullptr;  // O += P V of this block
  int next = 0, score_units = 0, units = 0;

  AmxWork(const RowTile& t, const Step& s, const AmxBlock* scores, const AmxBlock* values)
      : tile(t), step(s), scores_of(scores), values_of(values) {
    score_units = scores == nullptr ? 0 : 2 * scores->tiles;
    units = score_units + (values == nullptr ? 0 : static_cast<int>((tile.columns + 31) / 32));
  }

  HEDDLE_INLINE void run_until(int end) {
    for (; next < end; ++next) {
      if (next < score_units) {
        score_unit(next);
      } else {
        value_unit(next - score_units);
      }
    }
  }

  // 32 rows x 32 keys
  HEDDLE_INLINE void score_unit(int unit) {
    const int t = unit / 2, n0 = unit % 2 * 32;
    const std::uint32_t* panel = static_cast<const std::uint32_t*>(step.keys[scores_of->tile[t]]) + n0 * tile.words;
    const std::uint32_t* q = static_cast<const std::uint32_t*>(tile.queries) + scores_of->row * tile.words;
    amx_scores_32x32<qk>(q, tile.words, panel, scores_of->scores + t * kScoreTile + n0, kTileKeys);
  }

  // 32 rows x 32 (or the last 16) columns
  HEDDLE_INLINE void value_unit(int unit) {
    const std::int64_t c = unit * 32;
    const std::uint32_t* panels[kBlockTiles];
    for (int t = 0; t < values_of->tiles; ++t) {
      panels[t] = static_cast<const std::uint32_t*>(step.values[values_of->tile[t]]) + c * kTileKeys / 2;
    }
    amx_values_32x32(values_of->probabilities, kProbabilityStride, panels, values_of->tiles, c + 16 < tile.columns,
                     tile.o + values_of->row * tile.columns + c, tile.columns);
  }
};

// The vector of the sums (or maxima) of 16 vectors.
template <bool kMax>
HEDDLE_INLINE F reduce_16(const float* vectors) {
  const auto both = [](__m512 a, __m512 b) { return kMax ? _mm512_max_ps(a, b) : _mm512_add_ps(a, b); };
  __m512 quad[4];
  HEDDLE_UNROLL
  for (int r = 0; r < 4; ++r) {
    const __m512 a = (__m512)load(vectors + 64 * r), b = (__m512)load(vectors + 64 * r + 16);
    const __m512 c = (__m512)load(vectors + 64 * r + 32), d = (__m512)load(vectors + 64 * r + 48);
    const __m512 ab = both(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
    const __m512 cd = both(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
    quad[r] = both(_mm512_shuffle_ps(ab, cd, 0x44), _mm512_shuffle_ps(ab, cd, 0xee));
  }
  const __m512 lo = both(_mm512_shuffle_f32x4(quad[0], quad[1], 0x88), _mm512_shuffle_f32x4(quad[0], quad[1], 0xdd));
  const __m512 hi = both(_mm512_shuffle_f32x4(quad[2], quad[3], 0x88), _mm512_shuffle_f32x4(quad[2], quad[3], 0xdd));
  return (F)both(_mm512_shuffle_f32x4(lo, hi, 0x88), _mm512_shuffle_f32x4(lo, hi, 0xdd));
}

// softmax_row() for 16 rows of a block, with the rows' own arithmetic in vectors and matrix work in between.
template <bool kIntScores, class Work>
HEDDLE_INLINE void softmax_16(const RowTile& tile, const Step& step, const AmxBlock& block, std::int64_t first,
                              std::int64_t rows, float* alpha, Work& work, int work_begin, int work_end) {
  constexpr int kVectors = kTileKeys / kWidth;
  constexpr std::int64_t kRows = 16;
  alignas(64) float lanes[kRows * kWidth];
  alignas(64) float shift[kRows];
  const bool rewrite = tile.softcap > 0.0f || step.key_scale[block.tile[0]] != nullptr;
  const std::int64_t row0 = block.row + first;  // of the row tile
  float* scores = block.scores + first * kTileKeys;
  const auto advance = [&](std::int64_t pass) {  // 0 .. 2 kRows
    work.run_until(work_begin + static_cast<int>((work_end - work_begin) * pass / (2 * kRows)));
  };

  for (std::int64_t r = 0; r < rows; ++r) {
    F top[2] = {negative_infinity(), negative_infinity()};
    for (int i = 0; i < block.tiles; ++i) {
      float* s = scores + i * kScoreTile + r * kTileKeys;
      const int t = block.tile[i];
      if (rewrite) {
        HEDDLE_UNROLL
        for (int n = 0; n < kVectors; ++n) {
          F x = load_scores<kIntScores>(s + n * kWidth);
          if (step.key_scale[t] != nullptr) x = x * load(step.key_scale[t] + n * kWidth);
          x = fma(x, set1(tile.factor[row0 + r]), set1(tile.bias == nullptr ? 0.0f : tile.bias[row0 + r]));
          if (tile.softcap > 0.0f) x = set1(tile.softcap) * tanh(x * set1(1.0f / tile.softcap));
          store(s + n * kWidth, x);
        }
      }
      F x[kVectors];
      HEDDLE_UNROLL
      for (int n = 0; n < kVectors; ++n) {
        x[n] = kIntScores && !rewrite ? load_scores<kIntScores>(s + n * kWidth) : load(s + n * kWidth);
      }
      if (step.bits[t] != nullptr) {
        const std::uint64_t bits = step.bits[t][row0 + r];
        HEDDLE_UNROLL
        for (int n = 0; n < kVectors; ++n) x[n] = select(lane_bits(bits, n), x[n], negative_infinity());
      }
      HEDDLE_UNROLL
      for (int n = 0; n < kVectors; ++n) top[n % 2] = max(x[n], top[n % 2]);
    }
    store(lanes + r * kWidth, max(top[0], top[1]));
    if (r % 2 == 1) advance(r + 1);
  }

  const F highest = reduce_16<true>(lanes);
  const F factor = rewrite ? set1(1.0f) : load(tile.factor + row0);
  const F bias = rewrite || tile.bias == nullptr ? F{} : load(tile.bias + row0);
  const F m_old = load(tile.m + row0);
  const I unseen = highest == negative_infinity();
  const F candidate = as_float((unseen & as_int(highest)) | (~unseen & as_int(fma(highest, factor, bias))));
  const F m = max(candidate, m_old);
  const F base = as_float((m != negative_infinity()) & as_int(m));  // see softmax_row()
  const F correction = exp2<5>(m_old - base);
  store(tile.m + row0, m);
  store(shift, bias - base);
  store(alpha, correction);

  for (std::int64_t r = 0; r < rows; ++r) {
    const F f = set1(rewrite ? 1.0f : tile.factor[row0 + r]), s0 = set1(shift[r]);
    F sum[2] = {};
    for (int i = 0; i < block.tiles; ++i) {
      const float* s = scores + i * kScoreTile + r * kTileKeys;
      const int t = block.tile[i];
      F p[kVectors];
      HEDDLE_UNROLL
      for (int n = 0; n < kVectors; ++n) {
        const F x = kIntScores && !rewrite ? load_scores<kIntScores>(s + n * kWidth) : load(s + n * kWidth);
        p[n] = exp2<4>(fma(x, f, s0));
      }
      if (step.bits[t] != nullptr) {
        const std::uint64_t bits = step.bits[t][row0 + r];
        HEDDLE_UNROLL
        for (int n = 0; n < kVectors; ++n) p[n] = select(lane_bits(bits, n), p[n], F{});
      }
      HEDDLE_UNROLL
      for (int n = 0; n < kVectors; ++n) sum[n % 2] = sum[n % 2] + p[n];
      std::uint32_t* out = block.probabilities + (first + r) * kProbabilityStride + i * kTileKeys / 2;
      HEDDLE_UNROLL
      for (int n = 0; n < kVectors; n += 2) store_pair<Math::kBFloat16>(out, n * kWidth, p[n], p[n + 1]);
    }
    store(lanes + r * kWidth, sum[0] + sum[1]);
    if (r % 2 == 1) advance(kRows + r + 1);
  }
  work.run_until(work_end);
  store(tile.l + row0, fma(load(tile.l + row0), correction, reduce_16<false>(lanes)));
}

template <Math qk>
void amx_step(const RowTile& tile, const Step& step, const StepScratch& scratch) {
  AmxBlock blocks[kMaxBlocks];
  int count = 0;
  for (int t0 = 0; t0 < step.tiles; t0 += kBlockTiles) {
    for (std::int64_t row = 0; row < tile.rows; row += kAmxRows) {
      const std::int64_t end = row + kAmxRows < tile.rows ? row + kAmxRows : tile.rows;
      AmxBlock& block = blocks[count];
      block.row = row;
      block.tiles = 0;
      for (int t = t0; t < t0 + kBlockTiles && t < step.tiles; ++t) {
        std::uint64_t seen = step.bits[t] == nullptr;
        for (std::int64_t r = row; r < end && seen == 0; ++r) seen |= step.bits[t][r];
        if (seen != 0) block.tile[block.tiles++] = t;
      }
      if (block.tiles == 0) continue;
      block.scores = static_cast<float*>(scratch.scores) + count % 2 * kBlockTiles * kScoreTile;
      block.probabilities =
          static_cast<std::uint32_t*>(scratch.probabilities) + count % 2 * kAmxRows * kProbabilityStride;
      ++count;
    }
  }
  if (count == 0) return;

  AmxWork<qk> first(tile, step, blocks, nullptr);
  first.run_until(first.units);
  const AmxBlock* ready = nullptr;  // its probabilities wait for their product
  for (int i = 0; i < count; ++i) {
    AmxBlock& block = blocks[i];
    AmxWork<qk> work(tile, step, i + 1 < count ? blocks + i + 1 : nullptr, ready);
    const std::int64_t rows = tile.rows - block.row < kAmxRows ? tile.rows - block.row : kAmxRows;
    alignas(64) float alpha[kAmxRows];
    const int half = rows > 16 ? work.units / 2 : work.units;
    softmax_16<qk == Math::kInt8>(tile, step, block, 0, rows < 16 ? rows : 16, alpha, work, 0, half);
    if (rows > 16) softmax_16<qk == Math::kInt8>(tile, step, block, 16, rows - 16, alpha + 16, work, half, work.units);

    float* o = tile.o + block.row * tile.columns;
    for (std::int64_t r = 0; r < rows; ++r) scale_row(o + r * tile.columns, tile.columns, alpha[r]);
    int kept = 0;
    for (int t = 0; t < block.tiles; ++t) {
      const int at = block.tile[t];
      const std::uint32_t* p = block.probabilities + t * kTileKeys / 2;
      if (!step.finite[at] && step.bits[at] != nullptr) {
        for (std::int64_t r = 0; r < rows; ++r) {
          add_visible_values<Math::kBFloat16>(p + r * kProbabilityStride, step.bits[at][block.row + r], step.values[at],
                                              tile.columns, o + r * tile.columns);
        }
        continue;
      }
      if (kept != t) {  // close the gap that such a tile leaves
        for (std::int64_t r = 0; r < kAmxRows; ++r) {
          std::uint32_t* row = block.probabilities + r * kProbabilityStride;
          std::memcpy(row + kept * kTileKeys / 2, row + t * kTileKeys / 2, kTileKeys * 2);
        }
      }
      block.tile[kept++] = at;
    }
    block.tiles = kept;
    ready = kept > 0 ? &block : nullptr;
  }
  AmxWork<qk> last(tile, step, nullptr, ready);
  last.run_until(last.units);
}

}  // namespace heddle::host::HEDDLE_ISA

#endif  // HEDDLE_ISA_LEVEL >= 4
