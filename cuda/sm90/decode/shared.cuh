// One instantiation of the decode kernel, and the shared memory of its blocks.
#pragma once

#include <algorithm>

#include "cuda/common/async.cuh"
#include "cuda/sm90/decode/config.h"
#include "cuda/sm90/decode/format.cuh"
#include "cuda/sm90/decode/params.h"

namespace heddle::cuda::decode {

inline constexpr unsigned kNoUnit = 0xffffffffu;
inline constexpr int kNoKey = 0x7fffffff;
inline constexpr int kLoadBarrier = 1, kMathBarrier = 2;  // named barriers of the warps of a role

// An item with what it is part of; unit kNoUnit: nothing follows. Announced before its first tile, so that its queries
// are fetched beside its keys.
struct Work {
  Item item{kNoUnit};
  int row_tile = 0, head = 0, request = 0, kv_len = 0;
  int all_see_from = 0, all_see_to = 0;  // keys of the unit that every query sees
};
inline constexpr int kWorks = 4;

template <class Format_, int kDim_, int kColumns_>
struct Config {
  using Format = Format_;
  static constexpr int kDim = kDim_, kColumns = kColumns_;
  static constexpr int kRowBytes = kDim * Format::kBytes, kSliceBytes = kSliceKeys * kRowBytes;
  static_assert(kSliceBytes / 16 % 32 == 0, "whole warps copy a slice");
  static constexpr int kTileKeys = tile_keys(kRowBytes), kSlices = kTileKeys / kSliceKeys;
  static constexpr int kWarpSlices = kSlices / kLoadWarps;  // of a tile, that a loading warp fills
  static_assert(kWarpSlices == 1 || kWarpSlices == 2);

  static constexpr int kBand = band_bytes(kRowBytes), kBandUnits = kBand / 16;
  // Where unit 0 or 1, of 16 bytes, of a row of a slice lies, and from there the unit 2 * step further on.
  __device__ static std::uint32_t row_offset(int row, int unit) {
    return row * kBand + ((unit ^ row * kBand / 128 % kBandUnits) << 4);
  }
  __device__ static std::uint32_t step_from(std::uint32_t at, int step) {
    return (at ^ (2 * step % kBandUnits << 4)) + 2 * step / kBandUnits * kSliceKeys * kBand;
  }

  // A stage of the ring: slices of one head or, one half each, of two.
  struct Stage {
    alignas(1024) char k[kSlices][kSliceBytes];
    alignas(1024) char v[kSlices][kSliceBytes];
    float k_scale[kTileKeys];
    int keys[kTileKeys];
  };

  // The rows of Q as operands, 4 words apart modulo 32 so that lanes g and t read different banks.
  static constexpr int kQueryRows = kColumns == 1 && kDim <= 128 ? 16 : 8 * kColumns * 4;
  static constexpr int kQueryBytes = Format::kInt8 ? 1 : 2, kQueryPitch = row_pitch(kDim * kQueryBytes);

  // The exchange: of each warp 8 * kColumns rows of 16 * kRoundBlocks features. The pitch makes writes and reads free
  // of bank conflicts: 4 modulo 16.
  static constexpr int kBlocks = kDim / 16;  // of 16 features
  static constexpr int kExchangeBytes = kDim <= 128 ? 36 * 1024 : 20 * 1024;
  static constexpr int exchange_bytes(int blocks) { return kMathWarps * 8 * kColumns * (16 * blocks + 4) * 4; }
  static constexpr int round_blocks() {
    int blocks = kBlocks;
    while (exchange_bytes(blocks) > kExchangeBytes || kBlocks % blocks != 0) --blocks;
    return blocks;
  }
  static constexpr int kRoundBlocks = round_blocks(), kExchangePitch = 16 * kRoundBlocks + 4;

  static constexpr int kFixedBytes = exchange_bytes(kRoundBlocks) + kQueryRows * (kQueryPitch + 4) + 3072;
  static constexpr int kStages = (kSharedBytes - kFixedBytes) / static_cast<int>(sizeof(Stage) + 2 * sizeof(Barrier));
  static_assert(kStages >= 2);
  // So many stages are being filled at a time, 64 KiB, and the others wait to be computed. More would be read no
  // faster, but less evenly: the memory system then serves some multiprocessors a third faster than others. One more
  // where chunks can be stolen.
  static constexpr int kStageBytes = 2 * kTileKeys * kRowBytes;
  static constexpr int kInFlight = std::max(2, (64 * 1024 + kStageBytes - 1) / kStageBytes);
  static_assert(kInFlight <= kStages);

  struct Shared {
    Stage stages[kStages];
    float exchange[kMathWarps * 8 * kColumns][kExchangePitch];
    char query[kQueryRows][kQueryPitch];
    float factor[kQueryRows];  // of each row of Q, what turns its products into scores
    float max[kMathWarps * 8 * kColumns], sum[kMathWarps * 8 * kColumns];
    Barrier full[kStages], empty[kStages];
    Work works[kWorks];
    Barrier work_full[kWorks], work_empty[kWorks];
    int next_chunk[2];
    unsigned is_last;
  };
  static_assert(sizeof(Shared) <= kSharedBytes);
};

}  // namespace heddle::cuda::decode
