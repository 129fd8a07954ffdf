#include "schedule/plan.h"

#include <algorithm>

#include "select/visibility.h"

namespace heddle {
namespace {

// A request with few rows (decode) is cut along its keys so that one long request can use every worker. One with
// several row tiles is cut less, and not at all where its row tiles and heads are enough parallel work.
// Larger splits leave less to merge: they are taken where there are many.
constexpr std::int64_t kSplitKeys = 1024, kLongSplitKeys = 2048, kManySplits = 16;
constexpr std::int64_t kTileSplitKeys = 2048;
constexpr std::int64_t kEnoughItems = 64;

}  // namespace

std::int64_t Plan::split_size(const Unit& unit) const {
  if (split_keys > 0) return (split_keys + 63) / 64 * 64;
  if (row_tiles(unit) == 1) return unit.keys >= kManySplits * kLongSplitKeys ? kLongSplitKeys : kSplitKeys;
  const std::int64_t items = row_tiles(unit) * heads;
  if (items >= kEnoughItems) return std::max<std::int64_t>(unit.keys, 1);
  return std::max(kTileSplitKeys, (unit.keys * items / kEnoughItems + 63) / 64 * 64);
}

std::int64_t Plan::splits(const Unit& unit) const {
  const std::int64_t size = split_size(unit);
  return std::max<std::int64_t>(1, (unit.keys + size - 1) / size);
}

std::vector<WorkItem> Plan::items(std::span<const std::int32_t> chosen) const {
  // KV head by KV head, so that workers share the keys that their caches hold; within one, late rows first, since they
  // see more keys. The last items are then the lightest ones, which levels the end.
  std::vector<WorkItem> all;
  for (std::size_t first = 0, last; first < chosen.size(); first = last) {
    const Unit& head = units[chosen[first]];
    std::int64_t most = 0;
    for (last = first; last < chosen.size(); ++last) {
      const Unit& unit = units[chosen[last]];
      if (unit.request != head.request || unit.kv_head != head.kv_head) break;
      most = std::max(most, row_tiles(unit));
    }
    for (std::int64_t tile = most - 1; tile >= 0; --tile) {
      for (std::size_t i = first; i < last; ++i) {
        const Unit& unit = units[chosen[i]];
        if (tile >= row_tiles(unit)) continue;
        for (std::int64_t s = splits(unit) - 1; s >= 0; --s) {
          all.push_back({chosen[i], static_cast<std::int32_t>(tile), static_cast<std::int32_t>(s)});
        }
      }
    }
  }
  return all;
}

Plan make_plan(const Problem& problem, std::int64_t row_tile) {
  Plan plan;
  plan.row_tile = row_tile;
  plan.split_keys = problem.schedule.split_size;
  const bool lists = has_token_lists(problem), per_query = token_lists_per_query(problem);
  const std::int32_t heads = Visibility::shared_by_group(problem) ? static_cast<std::int32_t>(problem.group()) : 1;
  plan.heads = problem.num_q_heads / heads;
  for (std::int32_t b = 0; b < static_cast<std::int32_t>(problem.requests.size()); ++b) {
    const Request& request = problem.requests[b];
    if (request.q_len == 0) continue;
    for (std::int32_t h = 0; h < problem.num_q_heads; h += heads) {
      Unit unit;
      unit.request = b;
      unit.q_head = h;
      unit.heads = heads;
      unit.kv_head = h / static_cast<std::int32_t>(problem.group());
      unit.queries = request.q_len;
      unit.keys = request.kv_len;
      unit.listed = lists;
      if (!lists) {
        plan.units.push_back(unit);
      } else if (!per_query) {
        unit.list = token_list(problem, b, 0, unit.kv_head);
        unit.keys = static_cast<std::int64_t>(unit.list.size());
        plan.units.push_back(unit);
      } else {
        unit.queries = 1;
        for (std::int64_t i = 0; i < request.q_len; ++i) {
          unit.query = i;
          unit.list = token_list(problem, b, i, unit.kv_head);
          unit.keys = static_cast<std::int64_t>(unit.list.size());
          plan.units.push_back(unit);
        }
      }
    }
  }
  return plan;
}

}  // namespace heddle
