// Which keys a query sees: the predicate that defines it, and the same thing by tiles and by bit rows for kernels.
#pragma once

#include <cstdint>
#include <span>
#include <utility>
#include <vector>

#include "core/problem.h"

namespace heddle {

enum class TileKind : std::uint8_t { kNone, kPartial, kFull };

// A KV tile to visit: its index, and whether single elements of it must be masked.
struct Tile {
  std::int32_t index;
  bool masked;
};

// The visibility of one request's keys for one query head. Token lists are not part of it: they say which keys a kernel
// is handed in the first place (see token_list), and causality and windows then apply to what they name.
class Visibility {
 public:
  Visibility(const Problem& problem, std::int64_t request, std::int64_t q_head);

  // The definition (DESIGN: causal, window, selection), element by element.
  bool visible(std::int64_t query, std::int64_t key) const;

  // Queries [q0, q1) x keys [k0, k1).
  TileKind classify(std::int64_t q0, std::int64_t q1, std::int64_t k0, std::int64_t k1) const;
  // The tiles of `tile` keys that queries [q0, q1) visit among the keys [k0, k1), ascending; k0 is a multiple of
  // `tile`, and so is k1 unless it ends the keys. A ragged last tile is masked.
  void tiles(std::int64_t q0, std::int64_t q1, std::int64_t k0, std::int64_t k1, std::int64_t tile,
             std::vector<Tile>& out) const;
  // Bit n of the result: `query` sees key k0 + n; keys at and past the request's length are 0.
  std::uint64_t bits64(std::int64_t query, std::int64_t k0) const;
  // The keys [begin, end) that causality and the window argument leave, selections aside.
  std::pair<std::int64_t, std::int64_t> allowed_keys(std::int64_t query) const;

  // Whether all query heads of a KV head see the same keys, so that they can share a row tile.
  static bool shared_by_group(const Problem& problem);
  // Whether all heads see the same keys, token lists aside.
  static bool shared_by_all(const Problem& problem);

 private:
  struct Span {
    std::int64_t begin, end;
  };
  Span allowed(std::int64_t query) const;   // causal and the window argument
  Span selected(std::int64_t query) const;  // the selection's own window, globals aside
  bool block(std::int64_t i, std::int64_t j) const;

  std::int64_t q_len_, kv_len_, offset_;  // query i stands at i + offset_
  std::int64_t left_, right_;             // of causality and the window argument together
  const Selection::Kind* kind_;
  const bool* blocks_ = nullptr;  // the block mask of this request and head
  std::int64_t block_row_stride_ = 0, block_col_stride_ = 0;
};

// The keys that a token-list selection names for (request, query, KV head), ascending.
std::span<const std::int32_t> token_list(const Problem& problem, std::int64_t request, std::int64_t query,
                                         std::int64_t kv_head);
bool has_token_lists(const Problem& problem);
// Whether the lists differ from query to query.
bool token_lists_per_query(const Problem& problem);

}  // namespace heddle
