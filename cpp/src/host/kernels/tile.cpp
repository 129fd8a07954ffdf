// The tile operations of one instruction set.
#include "host/kernels/matmul.h"
#include "host/kernels/pack.h"
#include "host/kernels/softmax.h"
#include "host/tile_kernels.h"

namespace heddle::host::HEDDLE_ISA {
namespace {

constexpr std::int64_t kStride = kStepTiles * kTileKeys;  // of a score row

// The rows that a product takes at once.
template <Math math>
constexpr std::int64_t product_rows() {
#if HEDDLE_ISA_LEVEL >= 4
  if (math != Math::kFloat32) return kAmxRows;
#endif
  return kBlockRows;
}

template <Math math>
HEDDLE_INLINE void multiply_scores(const std::uint32_t* q, std::int64_t words, const std::uint32_t* panel,
                                   const std::int32_t* row_sums, float* scores) {
#if HEDDLE_ISA_LEVEL >= 4
  if constexpr (math != Math::kFloat32) {
    amx_scores<math>(q, words, panel, scores, kStride);
    return;
  }
#endif
  if constexpr (math == Math::kFloat32 || HEDDLE_ISA_LEVEL == 3) {
    score_block<math>(q, words, panel, row_sums, scores, kStride);
  }
}

// One tile of P V element by element, skipping what is masked: 0 * NaN is NaN, and memory that a row must not see may hold it.
template <Math pv>
void add_visible_values(const void* p_row, int t, std::uint64_t bits, const void* values, std::int64_t columns,
                        float* o) {
  constexpr std::int64_t kPerWord = elements_per_word(pv);
  for (; bits != 0; bits &= bits - 1) {
    const int key = __builtin_ctzll(bits);
    const std::int64_t at = t * kTileKeys + key;
    const float p = pv == Math::kFloat32 ? static_cast<const float*>(p_row)[at]
                                         : bf16_to_float(static_cast<const std::uint16_t*>(p_row)[at]);
    const std::byte* panel = static_cast<const std::byte*>(values);
    for (std::int64_t c0 = 0; c0 < columns; c0 += kTileKeys) {
      const std::int64_t width = columns - c0 < kTileKeys ? columns - c0 : kTileKeys;
      for (std::int64_t c = 0; c < width; ++c) {
        const std::int64_t element = ((key / kPerWord) * width + c) * kPerWord + key % kPerWord;
        o[c0 + c] += p * (pv == Math::kFloat32 ? reinterpret_cast<const float*>(panel)[element]
                                               : bf16_to_float(reinterpret_cast<const std::uint16_t*>(panel)[element]));
      }
      panel += kTileKeys / kPerWord * width * 4;
    }
  }
}

HEDDLE_INLINE void scale_row(float* o, std::int64_t columns, float alpha) {
  if (alpha == 1.0f) return;
  for (std::int64_t c = 0; c < columns; c += kWidth) store(o + c, load(o + c) * set1(alpha));
}

template <Math qk, Math pv>
void run_step(const RowTile& tile, const Step& step, const StepScratch& scratch) {
  // A block visits the tiles that any of its rows sees. Blocks go through the products in chunks: large enough to use a packed
  // tile more than once while it is in L1, small enough that their scores stay near.
  constexpr bool kAlike = product_rows<qk>() == product_rows<pv>();
  constexpr std::int64_t kBlock = kAlike ? product_rows<qk>() : kTileRows;
  constexpr std::int64_t kChunk = kBlock == kBlockRows ? 4 * kBlockRows : kBlock;
  constexpr std::int64_t kPerWord = elements_per_word(pv);
  static_assert(kTileRows % kChunk == 0 && kChunk % kBlock == 0);

  for (std::int64_t chunk = 0; chunk < tile.rows; chunk += kChunk) {
    const std::int64_t rows = tile.rows - chunk < kChunk ? tile.rows - chunk : kChunk;
    const std::int64_t blocks = (rows + kBlock - 1) / kBlock;
    bool active[kChunk / kBlock][kStepTiles];
    for (std::int64_t b = 0; b < blocks; ++b) {
      const std::int64_t end = (b + 1) * kBlock < rows ? (b + 1) * kBlock : rows;
      for (int t = 0; t < step.tiles; ++t) {
        std::uint64_t seen = step.bits[t] == nullptr;
        for (std::int64_t r = b * kBlock; r < end && seen == 0; ++r) seen |= step.bits[t][chunk + r];
        active[b][t] = seen != 0;
      }
    }

    float* scores = static_cast<float*>(scratch.scores) + chunk * kStride;
    const std::uint32_t* q = static_cast<const std::uint32_t*>(tile.queries) + chunk * tile.words;
    for (int t = 0; t < step.tiles; ++t) {
      const std::uint32_t* panel = static_cast<const std::uint32_t*>(step.keys[t]);
      for (std::int64_t b = 0; b < blocks; ++b) {
        if (!active[b][t]) continue;
        for (std::int64_t r = b * kBlock; r < (b + 1) * kBlock; r += product_rows<qk>()) {
          multiply_scores<qk>(q + r * tile.words, tile.words, panel, tile.row_sums + chunk + r,
                              scores + r * kStride + t * kTileKeys);
        }
      }
    }

    std::uint32_t* p = static_cast<std::uint32_t*>(scratch.probabilities) + chunk * kStride / kPerWord;
    alignas(64) float alpha[kChunk];
    for (std::int64_t r = 0; r < rows; ++r) {
      const std::int64_t at = chunk + r;
      const SoftmaxRow state{tile.factor[at], tile.bias == nullptr ? 0.0f : tile.bias[at], tile.softcap, tile.m + at,
                             tile.l + at};
      alpha[r] = softmax_row<qk == Math::kInt8, pv>(scores + r * kStride, p + r * kStride / kPerWord, step,
                                                    active[r / kBlock], at, state);
    }
    for (std::int64_t r = rows; r < kChunk; ++r) alpha[r] = 1.0f;

    float* o = tile.o + chunk * tile.columns;
#if HEDDLE_ISA_LEVEL >= 4
    if constexpr (pv != Math::kFloat32) {
      for (std::int64_t r = 0; r < rows; ++r) scale_row(o + r * tile.columns, tile.columns, alpha[r]);
      for (std::int64_t b = 0; b < blocks; ++b) {
        for (int t = 0; t < step.tiles; ++t) {
          if (step.finite[t] || step.bits[t] == nullptr || !active[b][t]) continue;
          for (std::int64_t r = b * kBlock; r < (b + 1) * kBlock && r < rows; ++r) {
            add_visible_values<pv>(p + r * kStride / kPerWord, t, step.bits[t][chunk + r], step.values[t], tile.columns,
                                   o + r * tile.columns);
          }
          active[b][t] = false;
        }
        amx_values(p + b * kBlock * kStride / kPerWord, kStride / kPerWord, step.values, active[b], step.tiles,
                   tile.columns, o + b * kBlock * tile.columns);
      }
      continue;
    }
#endif
    if constexpr (pv == Math::kFloat32 || HEDDLE_ISA_LEVEL == 3) {
      bool pending[kChunk / kBlock];
      for (std::int64_t b = 0; b < blocks; ++b) pending[b] = true;
      for (int t = 0; t < step.tiles; ++t) {
        for (std::int64_t b = 0; b < blocks; ++b) {
          if (!active[b][t]) continue;
          if (!step.finite[t] && step.bits[t] != nullptr) {
            for (std::int64_t r = b * kBlock; r < (b + 1) * kBlock && r < rows; ++r) {
              if (pending[b]) scale_row(o + r * tile.columns, tile.columns, alpha[r]);
              add_visible_values<pv>(p + r * kStride / kPerWord, t, step.bits[t][chunk + r], step.values[t],
                                     tile.columns, o + r * tile.columns);
            }
            pending[b] = false;
            continue;
          }
          for (std::int64_t r = b * kBlock; r < (b + 1) * kBlock; r += kBlockRows) {
            value_block<pv>(p + (r * kStride + t * kTileKeys) / kPerWord, kStride / kPerWord,
                            static_cast<const std::uint32_t*>(step.values[t]), tile.columns,
                            pending[b] ? alpha + r : nullptr, o + r * tile.columns);
          }
          pending[b] = false;
        }
      }
    }
  }
}

void step(const RowTile& tile, const Step& step, Math qk, Math pv, const StepScratch& scratch) {
#if HEDDLE_ISA_LEVEL >= 3
  if (qk == Math::kBFloat16 && pv == Math::kBFloat16) return run_step<Math::kBFloat16, Math::kBFloat16>(tile, step, scratch);
  if (qk == Math::kInt8 && pv == Math::kBFloat16) return run_step<Math::kInt8, Math::kBFloat16>(tile, step, scratch);
  if (qk == Math::kInt8) return run_step<Math::kInt8, Math::kFloat32>(tile, step, scratch);
#endif
  (void)qk;
  (void)pv;
  run_step<Math::kFloat32, Math::kFloat32>(tile, step, scratch);
}

void write_row(const float* o, float factor, std::int64_t dim, DType dtype, void* out) {
  if (dtype == DType::kFloat32) {
    for (std::int64_t i = 0; i < dim; ++i) static_cast<float*>(out)[i] = o[i] * factor;
  } else if (dtype == DType::kBFloat16) {
    for (std::int64_t i = 0; i < dim; ++i) static_cast<std::uint16_t*>(out)[i] = float_to_bf16(o[i] * factor);
  } else {
    for (std::int64_t i = 0; i < dim; ++i) static_cast<std::uint16_t*>(out)[i] = float_to_fp16(o[i] * factor);
  }
}

void begin_thread() {
#if HEDDLE_ISA_LEVEL >= 4
  amx_configure();
#endif
}
void end_thread() {
#if HEDDLE_ISA_LEVEL >= 4
  _tile_release();
#endif
}

}  // namespace

extern const TileKernels kTileKernels;
const TileKernels kTileKernels{.native_words = HEDDLE_ISA_LEVEL >= 3,
                               .begin_thread = begin_thread,
                               .end_thread = end_thread,
                               .pack_queries = pack_queries,
                               .pack_keys = pack_keys,
                               .pack_values = pack_values,
                               .step = step,
                               .write_row = write_row,
                               .read_row = row_as_floats};

}  // namespace heddle::host::HEDDLE_ISA
