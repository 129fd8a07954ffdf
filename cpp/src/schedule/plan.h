// Plans: which work items a call consists of, and in which order workers take them.
//
// A unit is a set of query rows that read the same keys: all query heads of a KV head together when they see the same
// keys, or one query head, or one query when every query has a token list of its own. Its rows are cut into row tiles,
// and the keys of a row tile into splits whose partial results are merged in order. Cuts depend on the request alone,
// so results do not depend on who computes what, nor, with the same split size, on the rest of the batch.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "core/problem.h"

namespace heddle {

struct Unit {
  std::int32_t request = 0, kv_head = 0;
  std::int32_t q_head = 0, heads = 1;   // query heads [q_head, q_head + heads)
  std::int64_t query = 0, queries = 0;  // queries [query, query + queries)
  bool listed = false;                  // keys are a token list
  std::span<const std::int32_t> list;
  std::int64_t keys = 0;  // kv_len, or the length of the list

  std::int64_t rows() const { return queries * heads; }
  std::int64_t query_of(std::int64_t row) const { return query + row / heads; }
  std::int64_t head_of(std::int64_t row) const { return q_head + row % heads; }
};

struct WorkItem {
  std::int32_t unit = 0;
  std::int32_t row_tile = 0;
  std::int32_t split = 0;
};

struct Plan {
  std::vector<Unit> units;
  std::int64_t row_tile = 0;    // rows of a row tile
  std::int64_t split_keys = 0;  // keys of a split, or 0: the plan's choice
  std::int64_t heads = 0;       // units of a request that read different keys: one a KV head, or one a query head

  // Splits of a row tile of this unit.
  std::int64_t splits(const Unit& unit) const;
  std::int64_t row_tiles(const Unit& unit) const { return (unit.rows() + row_tile - 1) / row_tile; }
  std::int64_t split_size(const Unit& unit) const;
  // The items of these units in the order in which workers should take them.
  std::vector<WorkItem> items(std::span<const std::int32_t> units) const;
};

Plan make_plan(const Problem& problem, std::int64_t row_tile);

}  // namespace heddle
