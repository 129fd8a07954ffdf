// The arithmetic of the GPU's decode plans, which runs on the host too.
#include <algorithm>
#include <cstdint>
#include <map>
#include <numeric>
#include <set>
#include <vector>

#include <gtest/gtest.h>

#include "cuda/sm90/decode/plan.h"
#include "support/random.h"

namespace heddle {
namespace {

using namespace cuda::decode;
using testing::Random;

struct PlannedItem {
  Item item;
  int chunk;
};

struct HostPlan {
  std::vector<std::int64_t> starts{0};
  std::vector<Chunk> chunks;
  std::vector<PlannedItem> items;
};

HostPlan plan_of(PlanShape shape, const std::vector<int>& keys, std::int64_t max_splits) {
  HostPlan plan;
  shape.prepare();
  for (const int k : keys)
    plan.starts.push_back(plan.starts.back() + std::int64_t{shape.length(k)} * shape.units_per_entry);
  const auto keys_of = [&](std::int64_t entry) { return keys[static_cast<std::size_t>(entry)]; };
  const bool alike = std::ranges::all_of(keys, [&](int k) { return shape.length(k) == shape.length(keys[0]); });
  const Cut cut(shape, plan.starts.back(), alike && !keys.empty() ? shape.length(keys[0]) : 0);
  const int chunks = shape.ctas * cut.per_cta;
  const auto place = [&](int c) { return place_at(shape, plan.starts.data(), cut.start(c), keys_of); };
  for (int c = 0; c < chunks; ++c) {
    const CutPlace begin = place(c), end = place(c + 1);
    const Chunk& chunk = plan.chunks.emplace_back(Chunk{
        .begin = begin.place,
        .end = end.place,
        .first_chunk = static_cast<std::uint16_t>(first_chunk(cut, begin, c)),
        .last_chunk = static_cast<std::uint16_t>(last_chunk(cut, end, c)),
        .index = static_cast<std::uint16_t>(c),
        .per_cta = static_cast<std::uint16_t>(cut.per_cta),
    });
    for (Walk walk{chunk.begin}; walk.more(chunk);) {
      const int unit_keys = keys[walk.at.unit / static_cast<unsigned>(shape.units_per_entry)];
      plan.items.push_back({walk.next(shape, chunk, unit_keys, max_splits), c});
    }
  }
  return plan;
}

// Every key of every unit is in one item, splits of a unit are numbered through, slots are nobody else's.
void check_plan(const PlanShape& shape, const std::vector<int>& keys) {
  const int longest = keys.empty() ? 0 : *std::max_element(keys.begin(), keys.end());
  const std::int64_t max_splits = shape.split_keys > 0 ? std::max(1, shape.granules(longest)) : 1;
  const HostPlan plan = plan_of(shape, keys, max_splits);
  const std::int64_t units = shape.entries * shape.units_per_entry;
  const std::int64_t num_slots = shape.split_keys > 0 ? units * max_splits : 2 * std::int64_t{shape.chunks()};
  std::map<unsigned, std::vector<PlannedItem>> by_unit;
  for (const PlannedItem& planned : plan.items) by_unit[planned.item.unit].push_back(planned);
  ASSERT_EQ(static_cast<std::int64_t>(by_unit.size()), units);
  std::set<std::int64_t> slots;
  for (auto& [unit, items] : by_unit) {
    int at = 0, split = 0;
    for (const auto& [item, chunk] : items) {
      ASSERT_EQ(item.begin, at) << "unit " << unit;
      ASSERT_EQ(item.split, split++) << "unit " << unit;
      ASSERT_EQ(item.num_splits, static_cast<int>(items.size())) << "unit " << unit;
      ASSERT_EQ(item.begin % kGranuleKeys, 0);
      at = item.end;
      if (item.num_splits == 1) continue;
      const std::int64_t slot = slot_of(shape.split_keys > 0, item.slot, item.split);
      ASSERT_TRUE(slot >= 0 && slot < num_slots) << "unit " << unit << ": slot " << slot;
      ASSERT_TRUE(slots.insert(slot).second) << "unit " << unit << ": slot " << slot << " is taken";
      // Whoever merges finds the same slots from any of the items.
      for (const int s : {0, 1, item.num_splits - 1}) {
        ASSERT_EQ(slot_of(shape.split_keys > 0, item.slot, s), slot_of(shape.split_keys > 0, items[0].item.slot, s));
      }
    }
    ASSERT_EQ(at, keys[unit / static_cast<unsigned>(shape.units_per_entry)]) << "unit " << unit;
  }
}

TEST(GpuDecodePlan, CoversEveryKeyOnce) {
  for (std::uint64_t seed = 0; seed < 4000; ++seed) {
    Random r(seed);
    PlanShape shape{.entries = r.log_integer(1, 60),
                    .units_per_entry = static_cast<int>(r.log_integer(1, 64)),
                    .ctas = r.pick<int>({1, 2, 7, 132}),
                    .min_chunk = static_cast<int>(r.integer(1, 32)),
                    .min_share = static_cast<int>(r.log_integer(1, 1024)),
                    .overhead = static_cast<int>(r.integer(0, 8)),
                    .split_keys = r.chance(0.3) ? static_cast<int>(64 * r.log_integer(1, 64)) : 0};
    std::vector<int> keys(static_cast<std::size_t>(shape.entries));
    std::int64_t longest = r.pick<std::int64_t>({1, 100, 4000, 100'000, 1'000'000});
    if (shape.split_keys > 0) longest = std::min<std::int64_t>(longest, 20 * shape.split_keys);
    for (int& k : keys) k = static_cast<int>(r.chance(0.1) ? 0 : r.log_integer(1, longest));
    if (r.chance(0.3)) std::fill(keys.begin(), keys.end(), keys[0]);
    check_plan(shape, keys);
    if (HasFatalFailure()) FAIL() << "seed " << seed;
  }
}

// However skewed, no CTA has more than its share, but for a piece that moved to the end of a unit.
TEST(GpuDecodePlan, SharesAreEqual) {
  const PlanShape shape{
      .entries = 32, .units_per_entry = 8, .ctas = 132, .min_chunk = 16, .min_share = 100, .overhead = 4};
  std::vector<int> keys(32, 4096);
  keys[5] = 131072;
  const HostPlan plan = plan_of(shape, keys, 1);
  const int per_cta = plan.chunks[0].per_cta;
  EXPECT_GT(per_cta, 1);
  std::vector<std::int64_t> granules(132);
  for (const auto& [item, chunk] : plan.items)
    granules[static_cast<std::size_t>(chunk / per_cta)] += shape.granules(item.end - item.begin);
  const double share = static_cast<double>(std::accumulate(granules.begin(), granules.end(), std::int64_t{0})) / 132;
  for (const std::int64_t g : granules) {
    EXPECT_LE(static_cast<double>(g), share + 8 * shape.overhead + kMinPieceGranules);
    EXPECT_GE(static_cast<double>(g), share - 8 * shape.overhead - kMinPieceGranules);
  }
}

// Units of one length that nearly fill the CTAs are not split, if their shares are not to be stolen from.
TEST(GpuDecodePlan, WholeUnitsAreNotSplit) {
  for (const auto& [units, ctas] : {std::pair{128, 128}, {256, 128}, {263, 132}, {264, 132}, {500, 125}}) {
    const PlanShape shape{.entries = units, .ctas = 132, .min_chunk = 16, .min_share = 1024, .overhead = 4};
    const HostPlan plan = plan_of(shape, std::vector<int>(static_cast<std::size_t>(units), 3000), 1);
    std::set<int> busy;
    for (const auto& [item, chunk] : plan.items) {
      EXPECT_EQ(item.num_splits, 1);
      busy.insert(chunk);
    }
    EXPECT_EQ(static_cast<int>(busy.size()), ctas) << units;
  }
  // So few of them would leave many CTAs with nothing to do.
  const PlanShape shape{.entries = 100, .ctas = 132, .min_chunk = 16, .min_share = 1024, .overhead = 4};
  const HostPlan plan = plan_of(shape, std::vector<int>(100, 3000), 1);
  EXPECT_TRUE(std::ranges::any_of(plan.items, [](const PlannedItem& p) { return p.item.num_splits > 1; }));
}

// What is visible to some query, in order and without gaps but for the one behind the global tokens.
TEST(GpuDecodePlan, VisibleKeysAreThoseThatAQuerySees) {
  for (std::uint64_t seed = 0; seed < 3000; ++seed) {
    Random r(seed);
    Mask mask{.num_queries = static_cast<int>(r.integer(1, 8))};
    for (int* x : {&mask.left, &mask.right, &mask.select_left, &mask.select_right}) {
      if (r.chance(0.4)) *x = static_cast<int>(r.integer(0, 40));
    }
    if (r.chance(0.5)) mask.num_globals = static_cast<int>(r.integer(0, 30));
    const int kv_len = static_cast<int>(r.integer(0, 60));
    const VisibleKeys visible = mask.visible(kv_len);
    std::vector<int> listed;
    for (int i = 0; i < visible.count; ++i) listed.push_back(visible.key(i));
    EXPECT_TRUE(std::is_sorted(listed.begin(), listed.end())) << seed;
    EXPECT_EQ(std::set<int>(listed.begin(), listed.end()).size(), listed.size()) << seed;
    for (const int key : listed) EXPECT_TRUE(key >= 0 && key < kv_len) << seed;
    for (int key = 0; key < kv_len; ++key) {
      for (int query = 0; query < mask.num_queries; ++query) {
        if (mask.sees(kv_len - mask.num_queries + query, key)) {
          EXPECT_TRUE(std::binary_search(listed.begin(), listed.end(), key)) << seed << ": key " << key;
        }
      }
    }
  }
}

}  // namespace
}  // namespace heddle
