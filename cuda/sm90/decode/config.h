// How the decode kernel is cut, for host and device.
#pragma once

#include <cstdint>

#include "cuda/common/exponents.h"

namespace heddle::cuda::decode {

// Roles: four warps load, eight compute. 384 threads leave 168 registers to each; those that load hand some over.
inline constexpr int kLoadWarps = 4, kMathWarps = 8;
inline constexpr int kLoadRegisters = 88, kMathRegisters = 208;
inline constexpr int kThreads = 32 * (kLoadWarps + kMathWarps);
static_assert(32 * (kLoadWarps * kLoadRegisters + kMathWarps * kMathRegisters) <= kThreads * 168);
inline constexpr int kMathThreads = 32 * kMathWarps;

// A KV tile is what one stage of the ring holds: 64 keys of a head, 128 of short rows, or half as many of two heads. A
// warp computes slices of 16 keys, the rows of one matrix product.
inline constexpr int kSliceKeys = 16;
constexpr int tile_keys(int row_bytes) { return row_bytes <= 128 ? 128 : 64; }
inline constexpr int kSplitKeys = 64;  // what a fixed split is a multiple of

// Query rows (query, head of the group) are columns of the products, in steps of 8. A warp takes kColumns steps of
// them; row_groups = 1, 2 or 4 sets of warps take different rows, the warps of a set different slices.
constexpr int max_columns(int head_dim) { return head_dim <= 128 ? 2 : 1; }
struct RowTile {
  int columns = 1, row_groups = 1;
  int rows() const { return 8 * columns * row_groups; }
};
constexpr RowTile row_tile(std::int64_t rows, int head_dim) {
  RowTile tile;
  if (rows > 8) tile.columns = max_columns(head_dim);
  while (tile.row_groups < 4 && 8 * tile.columns * tile.row_groups < rows) tile.row_groups *= 2;
  return tile;
}

// Shared memory of a block on sm_90, less what the compiler's own use may take.
inline constexpr int kSharedBytes = 227 * 1024;

// Rows of Q in shared memory: an odd number of 16-byte units apart, so that eight of them lie in different banks.
constexpr int row_pitch(int row_bytes) { return row_bytes / 16 % 2 == 1 ? row_bytes : row_bytes + 16; }

// A slice of K or V in shared memory, as a bulk copy lays it down: columns of `band_bytes`, in each the 16 rows one
// after the other, their 16-byte units exchanged so that the eight rows of a matrix lie in different banks.
constexpr int band_bytes(int row_bytes) { return row_bytes % 128 == 0 ? 128 : row_bytes % 64 == 0 ? 64 : 32; }

// What starting and ending a unit costs beside its keys, in granules of 16 keys: of 16-bit elements, and of 8-bit ones,
// which are read in half the time and take longer to start.
inline constexpr int kOverheadGranules = 6, kNarrowOverheadGranules = 16;
// The shortest chunk that may be stolen, in such granules.
inline constexpr int kMinChunkGranules = 16;
// Below so many of any size, a CTA's share is one chunk.
inline constexpr int kMinShareGranules = 1536;
// Two heads a unit from so many units on: fewer have more splits, of which the last to come merges those of both heads.
inline constexpr int kMinPairs = 64;

}  // namespace heddle::cuda::decode
