// Decode's kernels: a few query rows stream over keys and values where they lie, each byte read once and never packed.
// Compiled once per instruction set (host/kernels/stream.cpp).
#pragma once

#include <cstddef>
#include <cstdint>

#include "heddle/tensor.h"
#include "host/tile_kernels.h"

namespace heddle::host {

inline constexpr int kStreamRows = 16;                      // query rows at most
inline constexpr int kStreamKeys = kStepTiles * kTileKeys;  // keys a step takes at most

// Query rows are padded with zeros to a multiple of 64 elements, and in number to a multiple of 4 (1 and 2 stay).
struct StreamTile {
  std::int64_t rows = 0;           // 1 .. kStreamRows
  const float* queries = nullptr;  // [padded rows][dim padded to 64], or
  const std::int8_t* int8_queries = nullptr;
  const std::int32_t* row_sums = nullptr;  // int8: the sum of each query row
  const float* factor = nullptr;           // as in RowTile
  const float* bias = nullptr;
  float softcap = 0.0f;
  float* o = nullptr;        // [kStreamRows][columns]
  std::int64_t columns = 0;  // padded_columns(Dv)
  float* m = nullptr;
  float* l = nullptr;
};

struct StreamStep {
  const std::byte* const* keys = nullptr;  // rounded up to 4 pointers: the last one is repeated past `count`
  const std::byte* const* values = nullptr;
  int count = 0;     // keys of this step, at most kStreamKeys
  int readable = 0;  // pointers from `keys` and `values` on that may be fetched ahead, count included
  DType key_dtype = DType::kFloat32, value_dtype = DType::kFloat32;
  std::int64_t dim = 0, dim_v = 0;
  const float* key_scale = nullptr;    // [count rounded up to 64] or null
  const float* value_scale = nullptr;  // [count] or null
  // [rows * kStepTiles] visible keys by 64, row by row, or null: all of `count`
  const std::uint64_t* bits = nullptr;
};

struct StreamKernels {
  // scores[row * kStreamKeys + key] = q . k, as stored: no factor, scale or mask. Whole numbers for int8 queries.
  void (*scores)(const StreamTile& tile, const StreamStep& step, float* scores) = nullptr;
  // scores: kStreamRows x kStreamKeys floats of scratch
  void (*step)(const StreamTile& tile, const StreamStep& step, float* scores) = nullptr;
};

const StreamKernels& stream_kernels();  // of the current ISA

}  // namespace heddle::host
