// How the merge kernel is cut. Everything follows from the shape of one row, never from how many rows there are, so
// that a row's bits do not depend on the batch.
#pragma once

#include <cstdint>

namespace heddle::cuda {

inline constexpr int kMergeThreads = 256;
// Loads that a thread has in flight. With 3 blocks an SM that is 4 x 16 x 768 = 48 KB an SM; to hide 700 ns of latency
// at 3.3 TB/s over 132 SMs takes 17 KB.
inline constexpr int kMergeUnroll = 4;
inline constexpr int kMergeBlocksPerSm = 3;
// Fewer parts than this are not worth a group of threads of their own.
inline constexpr int kMergePartsPerGroup = 2 * kMergeUnroll;
inline constexpr int kMergeMaxLanes = 32;
// Few parts: loads of 16 bytes that a thread has in flight, 8 x 16 x 256 = 32 KB a block.
inline constexpr int kMergeFew = 4, kMergeFewLoads = 8;
inline constexpr int kMergeFewBlocksPerSm = 3;
// Parts, columns and blocks are counted in 32 bits, with room to step beyond the last.
inline constexpr std::int64_t kMergeMaxCount = std::int64_t{1} << 30;

// A row is taken by `groups` groups of `lanes` threads: a lane owns every lanes-th vector of the row, a group every
// groups-th part. All powers of two; a row's lanes lie in one warp.
struct MergeShape {
  int lanes = 1, groups = 1, rows_per_block = kMergeThreads;
};

constexpr MergeShape merge_shape(std::int64_t num_parts, std::int64_t vectors_per_row) {
  MergeShape shape;
  while (shape.lanes < kMergeMaxLanes && shape.lanes < vectors_per_row) shape.lanes *= 2;
  const int max_groups = kMergeThreads / shape.lanes;
  while (shape.groups < max_groups && 2 * shape.groups * kMergePartsPerGroup <= num_parts) shape.groups *= 2;
  shape.rows_per_block = kMergeThreads / (shape.lanes * shape.groups);
  return shape;
}

}  // namespace heddle::cuda
