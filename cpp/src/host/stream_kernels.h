// Decode's kernels: a few query rows stream over keys and values where they lie, each byte read once and never packed.
// Compiled once per instruction set (host/kernels/stream.cpp).
#pragma once

#include <cstddef>
#include <cstdint>

#include "heddle/tensor.h"
#include "host/tile_kernels.h"

namespace heddle::host {

inline constexpr int kStreamRows = 16;                      // query rows of a KV head at most
inline constexpr int kStreamKeys = kStepTiles * kTileKeys;  // keys a step takes at most
inline constexpr int kStreamHeads = 64;                     // KV heads a step takes at most

// Rows that the stream kernels read and write: 1 and 2 stay, more are padded with zeros to a multiple of 4.
constexpr std::int64_t stream_rows(std::int64_t rows) { return rows <= 2 ? rows : (rows + 3) / 4 * 4; }
// Elements of a query row, and of a row of sums: padded with zeros.
constexpr std::int64_t stream_dim(std::int64_t dim) { return (dim + 63) / 64 * 64; }

// The query rows of one KV head and the state of their online softmax. All arrays have stream_rows(rows) rows.
struct StreamTile {
  std::int64_t rows = 0;                   // 1 .. kStreamRows
  const void* queries = nullptr;           // [rows][stream_dim(dim)] of the step's qk
  const std::int32_t* row_sums = nullptr;  // int8: the sum of each query row
  const float* factor = nullptr;           // as in RowTile
  const float* bias = nullptr;
  float softcap = 0.0f;
  float* o = nullptr;        // [rows][columns]
  std::int64_t columns = 0;  // padded_columns(Dv)
  float* m = nullptr;
  float* l = nullptr;
  // What a step keeps from segment to segment.
  float* scores = nullptr;  // [rows][kStreamKeys]; then probabilities
  float* sums = nullptr;    // rows * stream_dim(Dv), in an order of the kernels' own
  float* alpha = nullptr;   // what o is multiplied by
  float* weight = nullptr;  // int8 values: what their sum is multiplied by
};

// Keys of a step whose rows follow one another in memory, head by head: a page. `first` is a multiple of 4.
struct StreamSegment {
  int first = 0, count = 0;
};

struct StreamStep {
  // Rows of the first KV head, rounded up to 4 pointers: the last one is repeated past `count`. Those of head h lie
  // h times the head stride further.
  const std::byte* const* keys = nullptr;
  const std::byte* const* values = nullptr;
  std::int64_t key_head_stride = 0, value_head_stride = 0;  // bytes
  int count = 0;                                            // keys of this step, at most kStreamKeys
  const StreamSegment* segments = nullptr;                  // which make up [0, count)
  int num_segments = 0;
  int next = 0;  // keys of the next step's first segment, whose pointers follow those of this one; 0: none
  DType key_dtype = DType::kFloat32, value_dtype = DType::kFloat32;
  std::int64_t dim = 0, dim_v = 0;
  // The products' operands: qk is bf16 only for bf16 keys, pv bf16 or int8 only for values of that type.
  Math qk = Math::kFloat32, pv = Math::kFloat32;
  const float* key_scale = nullptr;    // [heads][kStreamKeys] or null
  const float* value_scale = nullptr;  // [heads][kStreamKeys] or null
  // [rows * kStepTiles] visible keys by 64, row by row, the same for all heads, or null: all of `count`
  const std::uint64_t* bits = nullptr;
  // scores alone: told after each segment of each head, whose scores are near and whose successors are on their way.
  void (*scored)(const void* context, int head, int first, int last) = nullptr;
  const void* context = nullptr;
};

struct StreamKernels {
  // Products of the queries with the keys of a step, as stored, into each tile's scores: no factor, scale or mask. What
  // a key's product is does not depend on the other keys.
  void (*scores)(const StreamTile* heads, int num_heads, const StreamStep& step) = nullptr;
  // The KV heads of a step together, so that memory is read in the order in which it lies.
  void (*step)(const StreamTile* heads, int num_heads, const StreamStep& step) = nullptr;
};

const StreamKernels& stream_kernels();  // of the current ISA

}  // namespace heddle::host
