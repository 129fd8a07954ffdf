// The host's tile operations: packing of queries, keys and values, one step of online softmax, and the finish. Compiled
// once per instruction set (host/kernels/); the drivers call them through a table of function pointers.
//
// All products run on 32-bit words, whatever the element type: a word holds 1 float, 2 bf16 or 4 int8 along the
// contracted axis.
//   Q  [row][word of D]                K  panel [word of D][key]       S = Q K: contracts D
//   P  [row][word of key]              V  panel [word of key][column]  O = P V: contracts keys
// (matmul.h gives the order within a packed tile.) This is the form of vector FMAs, VDPBF16PS, VPDPBUSD and AMX tiles
// alike, so packing is the only place that knows how a cache stores its rows.
#pragma once

#include <cstddef>
#include <cstdint>

#include "heddle/tensor.h"

namespace heddle::host {

inline constexpr int kTileKeys = 64;   // keys of a KV tile: the width of a K panel
inline constexpr int kTileRows = 192;  // query rows of a row tile: a multiple of every kernel's chunk of rows (24, 32)
inline constexpr int kStepTiles = 4;   // KV tiles a step takes at most

// Element type of a product's operands.
enum class Math : std::uint8_t { kFloat32, kBFloat16, kInt8 };

constexpr int elements_per_word(Math math) { return math == Math::kFloat32 ? 1 : math == Math::kBFloat16 ? 2 : 4; }
// Words of D, padded with zeros to what the widest kernel contracts at once.
constexpr std::int64_t query_words(std::int64_t dim, Math math) {
  const std::int64_t e = elements_per_word(math);
  const std::int64_t words = (dim + e - 1) / e;
  return math == Math::kFloat32 ? words : (words + 15) / 16 * 16;
}
constexpr std::int64_t padded_columns(std::int64_t dim_v) { return (dim_v + 15) / 16 * 16; }
// Bytes of a packed tile of 64 keys.
constexpr std::size_t key_tile_bytes(std::int64_t dim, Math math) {
  return static_cast<std::size_t>(query_words(dim, math)) * kTileKeys * 4;
}
constexpr std::size_t value_tile_bytes(std::int64_t dim_v, Math math) {
  return static_cast<std::size_t>(padded_columns(dim_v)) * kTileKeys * 4 / elements_per_word(math);
}

// Up to kTileRows (queries) or kTileKeys (keys, values) rows to pack.
struct RowSource {
  const std::byte* const* rows = nullptr;
  std::int64_t count = 0, dim = 0;
  DType dtype = DType::kFloat32;
  const float* scale = nullptr;  // float32 words only: multiplies row i by scale[i]; null: the values as stored
};

// A row tile and the state of its online softmax.
struct RowTile {
  std::int64_t rows = 0;                   // 1 .. kTileRows
  const void* queries = nullptr;           // [kTileRows][words]
  std::int64_t words = 0;                  // of D
  const std::int32_t* row_sums = nullptr;  // int8: the sum of each query row
  const float* factor =
      nullptr;                  // [rows], >= 0: score = factor * product (* key scale) + bias, in base 2 (times log2 e)
  const float* bias = nullptr;  // [rows] or null
  float softcap = 0.0f;         // in base 2 units too
  float* o = nullptr;           // [kTileRows][columns]
  std::int64_t columns = 0;     // padded_columns(Dv)
  float* m = nullptr;           // [kTileRows] running maximum, base 2
  float* l = nullptr;           // [kTileRows] running sum
};

struct Step {
  int tiles = 0;
  const void* keys[kStepTiles];
  const void* values[kStepTiles];
  const std::uint64_t* bits[kStepTiles];  // [rows] visible keys, or null: all
  const float* key_scale[kStepTiles];     // [64] or null
  bool finite[kStepTiles];  // whether all values are; a masked tile with others is multiplied element by element
};

// Scratch of a step: scores and probabilities of a row tile.
inline constexpr std::size_t kScoreBytes = std::size_t{kTileRows} * kStepTiles * kTileKeys * 4;
struct StepScratch {
  void* scores = nullptr;         // kScoreBytes
  void* probabilities = nullptr;  // kScoreBytes; may be the same memory when P is float32
};

struct TileKernels {
  // Whether bf16 and int8 products exist; otherwise everything runs as float32. That is exact for int8 scores: every
  // partial sum is a whole number below 2^24 (127 * 127 * 576 = 9.3e6).
  bool native_words = false;
  void (*begin_thread)() = nullptr;  // before and after a thread's tile work: matrix-unit configuration
  void (*end_thread)() = nullptr;
  void (*pack_queries)(const RowSource& source, Math math, bool negate, void* out, std::int32_t* row_sums) = nullptr;
  void (*pack_keys)(const RowSource& source, Math math, void* out) = nullptr;
  // Returns whether every value is finite.
  bool (*pack_values)(const RowSource& source, Math math, void* out) = nullptr;
  void (*step)(const RowTile& tile, const Step& step, Math qk, Math pv, const StepScratch& scratch) = nullptr;
  // out[i] = o[i] * factor for one row of `dim` columns, in the given dtype.
  void (*write_row)(const float* o, float factor, std::int64_t dim, DType dtype, void* out) = nullptr;
  // One row of any dtype as floats, as stored.
  void (*read_row)(const std::byte* row, std::int64_t dim, DType dtype, float* out) = nullptr;
};

const TileKernels& tile_kernels();  // of the current ISA

}  // namespace heddle::host
