// How the append kernels are cut: a warp takes a row (a token's key or value of one head), or the rows of a partition.
#pragma once

#include <cstdint>

namespace heddle::cuda {

inline constexpr int kWarp = 32;
inline constexpr int kAppendThreads = 256;
inline constexpr int kAppendWarps = kAppendThreads / kWarp;
// Elements a lane moves at once: a row of 128 16-bit elements is one 8-byte access of every lane.
inline constexpr int kAppendVector = 4;
// Rows of keys of a launch, so that they are counted in 32 bits.
inline constexpr std::int64_t kAppendMaxRows = (std::int64_t{1} << 31) - 1;
// Calibration reads with so many blocks an SM, each striding over the rows.
inline constexpr int kMaxAbsBlocksPerSm = 4;

}  // namespace heddle::cuda
