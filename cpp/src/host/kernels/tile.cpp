// The tile operations of one instruction set.
#include "host/kernels/amx_step.h"
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
                                   const std::int32_t* row_sums, float* scores, int first, int last) {
#if HEDDLE_ISA_LEVEL >= 4
  if constexpr (math != Math::kFloat32) {
    amx_scores_32x32<math>(q, words, panel, scores, kStride);
    amx_scores_32x32<math>(q, words, panel + 32 * words, scores + 32, kStride);
    for (std::int64_t r = 0; r < kAmxRows && math == Math::kInt8; ++r) {
      float* row = scores + r * kStride;
      for (int n = 0; n < kTileKeys; n += kWidth) store(row + n, to_float(load_int(row + n)));
    }
    return;
  }
#endif
  if constexpr (math == Math::kFloat32 || HEDDLE_ISA_LEVEL == 3) {
    score_block<math>(q, words, panel, row_sums, scores, kStride, first, last);
  }
}

template <Math qk, Math pv>
void run_step(const RowTile& tile, const Step& step, const StepScratch& scratch) {
  // A block visits the tiles that any of its rows sees. Blocks go through the products in chunks: large enough to use a
  // packed tile more than once while it is in L1, small enough that their scores stay near.
  constexpr bool kAlike = product_rows<qk>() == product_rows<pv>();
  constexpr std::int64_t kBlock = kAlike ? product_rows<qk>() : kTileRows;
  constexpr std::int64_t kChunk = kBlock == kBlockRows ? 4 * kBlockRows : kBlock;
  constexpr std::int64_t kPerWord = elements_per_word(pv);
  static_assert(kTileRows % kChunk == 0 && kChunk % kBlock == 0);

  for (std::int64_t chunk = 0; chunk < tile.rows; chunk += kChunk) {
    const std::int64_t rows = tile.rows - chunk < kChunk ? tile.rows - chunk : kChunk;
    const std::int64_t blocks = (rows + kBlock - 1) / kBlock;
    bool active[kChunk / kBlock][kStepTiles];
    int first_key[kChunk / kBlock][kStepTiles], last_key[kChunk / kBlock][kStepTiles];  // that some row sees
    for (std::int64_t b = 0; b < blocks; ++b) {
      const std::int64_t end = (b + 1) * kBlock < rows ? (b + 1) * kBlock : rows;
      for (int t = 0; t < step.tiles; ++t) {
        std::uint64_t seen = step.bits[t] == nullptr ? ~std::uint64_t{0} : 0;
        for (std::int64_t r = b * kBlock; r < end && ~seen != 0; ++r) seen |= step.bits[t][chunk + r];
        active[b][t] = seen != 0;
        first_key[b][t] = seen == 0 ? 0 : __builtin_ctzll(seen);
        last_key[b][t] = seen == 0 ? 0 : 64 - __builtin_clzll(seen);
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
                              scores + r * kStride + t * kTileKeys, first_key[b][t], last_key[b][t]);
        }
      }
    }

    std::uint32_t* p = static_cast<std::uint32_t*>(scratch.probabilities) + chunk * kStride / kPerWord;
    alignas(64) float alpha[kChunk];
    for (std::int64_t r = 0; r < rows; ++r) {
      const std::int64_t at = chunk + r;
      const SoftmaxRow state{tile.factor[at],
                             tile.bias == nullptr ? 0.0f : tile.bias[at],
                             tile.softcap,
                             tile.m + at,
                             tile.l + at,
                             nullptr,
                             score_offset(qk, tile.words)};
      alpha[r] = softmax_row<pv>(scores + r * kStride, p + r * kStride / kPerWord, step, active[r / kBlock], at, state);
    }
    for (std::int64_t r = rows; r < kChunk; ++r) alpha[r] = 1.0f;

    float* o = tile.o + chunk * tile.columns;
    if constexpr (pv == Math::kFloat32 || HEDDLE_ISA_LEVEL == 3) {
      bool pending[kChunk / kBlock];
      for (std::int64_t b = 0; b < blocks; ++b) pending[b] = true;
      for (int t = 0; t < step.tiles; ++t) {
        for (std::int64_t b = 0; b < blocks; ++b) {
          if (!active[b][t]) continue;
          if (!step.finite[t] && step.bits[t] != nullptr) {
            for (std::int64_t r = b * kBlock; r < (b + 1) * kBlock && r < rows; ++r) {
              if (pending[b]) scale_row(o + r * tile.columns, tile.columns, alpha[r]);
              add_visible_values<pv>(p + (r * kStride + t * kTileKeys) / kPerWord, step.bits[t][chunk + r],
                                     step.values[t], tile.columns, o + r * tile.columns);
            }
            pending[b] = false;
            continue;
          }
          for (std::int64_t r = b * kBlock; r < (b + 1) * kBlock; r += kBlockRows) {
            value_block<pv>(p + (r * kStride + t * kTileKeys) / kPerWord, kStride / kPerWord,
                            static_cast<const std::uint32_t*>(step.values[t]), tile.columns,
                            pending[b] ? alpha + r : nullptr, o + r * tile.columns, first_key[b][t], last_key[b][t]);
          }
          pending[b] = false;
        }
      }
    }
  }
}

void step(const RowTile& tile, const Step& step, Math qk, Math pv, const StepScratch& scratch) {
#if HEDDLE_ISA_LEVEL >= 4
  if (qk == Math::kBFloat16) return amx_step<Math::kBFloat16>(tile, step, scratch);
  if (qk == Math::kInt8 && pv == Math::kBFloat16) return amx_step<Math::kInt8>(tile, step, scratch);
#elif HEDDLE_ISA_LEVEL == 3
  if (qk == Math::kBFloat16) return run_step<Math::kBFloat16, Math::kBFloat16>(tile, step, scratch);
  if (qk == Math::kInt8 && pv == Math::kBFloat16) return run_step<Math::kInt8, Math::kBFloat16>(tile, step, scratch);
#endif
#if HEDDLE_ISA_LEVEL >= 3
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
