// The decode kernels below the public call: the plan's arithmetic on the host, and on the GPU what needs batches too
// large for the oracle: chunks that are stolen, merges of many splits, graphs whose lengths change. Small shapes of
// every kind are test_cuda_fuzz's.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <map>
#include <memory>
#include <numeric>
#include <optional>
#include <set>
#include <utility>
#include <vector>

#include "cuda_support.h"
#include <gtest/gtest.h>

#include "core/numeric.h"
#include "cuda/launch.h"
#include "cuda/sm90/decode/plan.h"
#include "support/random.h"

namespace heddle {
namespace {

using namespace cuda::decode;
using testing::cuda_ok;
using testing::Random;

// ---- the plan -------------------------------------------------------------------------------------------------------

struct PlannedItem {
  Item item;
  int chunk;
};

struct HostPlan {
  std::vector<std::int64_t> starts{0};
  std::vector<Place> places;
  std::vector<Chunk> chunks;
  std::vector<PlannedItem> items;
};

HostPlan plan_of(const PlanShape& shape, const std::vector<int>& keys, std::int64_t max_splits) {
  HostPlan plan;
  for (const int k : keys)
    plan.starts.push_back(plan.starts.back() + std::int64_t{shape.length(k)} * shape.units_per_entry);
  const auto keys_of = [&](std::int64_t entry) { return keys[static_cast<std::size_t>(entry)]; };
  const Cut cut(shape, plan.starts.back());
  for (int c = 0; c <= shape.chunks(); ++c) {
    plan.places.push_back(place_at(shape, plan.starts.data(), cut.start(c), keys_of));
  }
  for (int c = 0; c < shape.chunks(); ++c) {
    const Chunk& chunk = plan.chunks.emplace_back(chunk_at(shape, plan.places.data(), c, cut.per_cta));
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

TEST(CudaDecodePlan, CoversEveryKeyOnce) {
  for (std::uint64_t seed = 0; seed < 4000; ++seed) {
    Random r(seed);
    PlanShape shape{.entries = r.log_integer(1, 60),
                    .units_per_entry = static_cast<int>(r.log_integer(1, 64)),
                    .ctas = r.pick<int>({1, 2, 7, 132}),
                    .min_chunk = static_cast<int>(r.integer(1, 32)),
                    .overhead = static_cast<int>(r.integer(0, 8)),
                    .split_keys = r.chance(0.3) ? static_cast<int>(64 * r.log_integer(1, 64)) : 0};
    std::vector<int> keys(static_cast<std::size_t>(shape.entries));
    std::int64_t longest = r.pick<std::int64_t>({1, 100, 4000, 100'000, 1'000'000});
    if (shape.split_keys > 0) longest = std::min<std::int64_t>(longest, 20 * shape.split_keys);
    for (int& k : keys) k = static_cast<int>(r.chance(0.1) ? 0 : r.log_integer(1, longest));
    check_plan(shape, keys);
    if (HasFatalFailure()) FAIL() << "seed " << seed;
  }
}

// However skewed, no CTA has more than its share, but for a piece that moved to the end of a unit.
TEST(CudaDecodePlan, SharesAreEqual) {
  const PlanShape shape{.entries = 32, .units_per_entry = 8, .ctas = 132, .min_chunk = 16, .overhead = 4};
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

// What is visible to some query, in order and without gaps but for the one behind the global tokens.
TEST(CudaDecodePlan, VisibleKeysAreThoseThatAQuerySees) {
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

// ---- large batches on the GPU ---------------------------------------------------------------------------------------

class DeviceBuffer {
 public:
  explicit DeviceBuffer(std::size_t bytes) : bytes_(bytes) { cuda_ok(cudaMalloc(&data_, bytes), "cudaMalloc"); }
  ~DeviceBuffer() { cudaFree(data_); }
  DeviceBuffer(const DeviceBuffer&) = delete;
  DeviceBuffer& operator=(const DeviceBuffer&) = delete;

  void* data() const { return data_; }
  void upload(const void* from) { cuda_ok(cudaMemcpy(data_, from, bytes_, cudaMemcpyHostToDevice), "upload"); }
  std::vector<std::uint8_t> download() const {
    std::vector<std::uint8_t> host(bytes_);
    cuda_ok(cudaMemcpy(host.data(), data_, bytes_, cudaMemcpyDeviceToHost), "download");
    return host;
  }

 private:
  void* data_ = nullptr;
  std::size_t bytes_;
};

// A cache with random keys and values, and a batch whose shares are cut into several chunks.
class Large {
 public:
  static constexpr int kHeads = 8, kGroup = 4, kDim = 64, kPage = 16;

  explicit Large(std::vector<std::int32_t> lens, std::int64_t pages_a_request)
      : lens_(std::move(lens)), columns_(pages_a_request) {
    Random r(7);
    std::int64_t pages = 0;
    for (const std::int32_t len : lens_) pages += (len + kPage - 1) / kPage;
    num_pages_ = pages;
    const auto cache_bytes = static_cast<std::size_t>(pages * kHeads * kPage * kDim * 2);
    std::vector<std::uint16_t> values(cache_bytes / 2);
    k_.emplace(cache_bytes);
    v_.emplace(cache_bytes);
    for (auto* buffer : {&*k_, &*v_}) {
      // bf16 of either sign, 1/2 to 2
      for (std::size_t i = 0; i < values.size(); i += 4) {
        const std::uint64_t bits = r.bits();
        for (std::size_t j = 0; j < 4; ++j)
          values[i + j] = static_cast<std::uint16_t>((bits >> (16 * j) & 0x80ff) | 0x3f00);
      }
      buffer->upload(values.data());
    }
    std::vector<std::int32_t> table(lens_.size() * static_cast<std::size_t>(columns_)),
        order(static_cast<std::size_t>(pages));
    for (auto& entry : table) entry = static_cast<std::int32_t>(r.bits());  // beyond a length: anything
    std::iota(order.begin(), order.end(), 0);
    for (std::size_t i = order.size(); i > 1; --i)
      std::swap(order[i - 1], order[static_cast<std::size_t>(r.integer(0, static_cast<std::int64_t>(i) - 1))]);
    std::size_t next = 0;
    for (std::size_t b = 0; b < lens_.size(); ++b) {
      for (std::int64_t i = 0; i * kPage < lens_[b]; ++i)
        table[b * static_cast<std::size_t>(columns_) + static_cast<std::size_t>(i)] = order[next++];
    }
    table_.emplace(table.size() * 4);
    table_->upload(table.data());
    lens_on_device_.emplace(lens_.size() * 4);
    lens_on_device_->upload(lens_.data());
    const std::size_t q_elements = lens_.size() * kHeads * kGroup * kDim;
    std::vector<std::uint16_t> q(q_elements);
    for (auto& x : q) x = float_to_bf16(static_cast<float>(2.0 * r.uniform() - 1.0));
    q_.emplace(q_elements * 2);
    q_->upload(q.data());
    out_.emplace(q_elements * 2);
    args_ = {.q = q_->data(),
             .out = out_->data(),
             .q_stride = {kHeads * kGroup * kDim, kHeads * kGroup * kDim, kDim},
             .out_stride = {kHeads * kGroup * kDim, kHeads * kGroup * kDim, kDim},
             .batch = static_cast<std::int64_t>(lens_.size()),
             .num_q_heads = kHeads * kGroup,
             .num_kv_heads = kHeads,
             .head_dim = kDim,
             .k = k_->data(),
             .v = v_->data(),
             .k_stride = {kHeads * kPage * kDim * 2, kPage * kDim * 2, kDim * 2},
             .v_stride = {kHeads * kPage * kDim * 2, kPage * kDim * 2, kDim * 2},
             .num_pages = num_pages_,
             .page_size = kPage,
             .max_kv_len = columns_ * kPage,
             .table_stride = columns_,
             .seq_lens = static_cast<std::int32_t*>(lens_on_device_->data()),
             .block_table = static_cast<std::int32_t*>(table_->data()),
             .scale = 0.3};
  }

  cuda::DecodeArgs args(Schedule schedule) {
    cuda::DecodeArgs args = args_;
    args.schedule = schedule;
    auto& workspace = workspaces_[cuda::decode_workspace_bytes(args)];
    if (workspace == nullptr) {
      workspace = std::make_unique<DeviceBuffer>(static_cast<std::size_t>(cuda::decode_workspace_bytes(args)));
    }
    args.workspace = workspace->data();
    return args;
  }
  void set_lens(const std::vector<std::int32_t>& lens) { lens_on_device_->upload(lens.data()); }
  std::vector<std::uint8_t> out() const { return out_->download(); }
  std::vector<std::uint8_t> run(Schedule schedule) {
    const cuda::DecodeArgs a = args(schedule);
    cuda::launch_decode_plan(a);
    cuda::launch_decode(a);
    return out();
  }
  const std::vector<std::int32_t>& lens() const { return lens_; }

 private:
  std::vector<std::int32_t> lens_;
  std::int64_t columns_, num_pages_ = 0;
  std::optional<DeviceBuffer> k_, v_, table_, lens_on_device_, q_, out_;
  std::map<std::int64_t, std::unique_ptr<DeviceBuffer>> workspaces_;
  cuda::DecodeArgs args_;
};

double largest_difference(const std::vector<std::uint8_t>& a, const std::vector<std::uint8_t>& b) {
  double largest = 0.0;
  for (std::size_t i = 0; i < a.size() / 2; ++i) {
    const double x = load_as_double(a.data(), DType::kBFloat16, static_cast<std::int64_t>(i));
    const double y = load_as_double(b.data(), DType::kBFloat16, static_cast<std::int64_t>(i));
    largest = std::max(largest, std::isfinite(x) && std::isfinite(y) ? std::fabs(x - y) : 1e9);
  }
  return largest;
}

const std::vector<std::int32_t> kSkewed = {70'000, 300, 0, 1, 17'000, 4'097, 16, 2'000};

TEST(CudaDecode, StolenChunksChangeNoBit) {
  NEEDS_HOPPER();
  Large large(kSkewed, 4'400);
  const auto expected = large.run({.kind = ScheduleKind::kStatic});
  // Without splits every unit is one item of one CTA: another order of the same sum.
  EXPECT_LT(largest_difference(expected, large.run({.kind = ScheduleKind::kStatic, .split_size = 1 << 20})), 0.01);
  for (int repeat = 0; repeat < 1000; ++repeat) {
    ASSERT_EQ(large.run({.kind = ScheduleKind::kStealing}), expected) << "repeat " << repeat;
  }
  // One plan serves many launches.
  const cuda::DecodeArgs args = large.args({.kind = ScheduleKind::kStealing});
  cuda::launch_decode_plan(args);
  for (int layer = 0; layer < 50; ++layer) {
    cuda::launch_decode(args);
    ASSERT_EQ(large.out(), expected) << "layer " << layer;
  }
}

TEST(CudaDecode, FixedSplitsDoNotDependOnTheBatch) {
  NEEDS_HOPPER();
  Large large(kSkewed, 4'400);
  const Schedule schedule{.kind = ScheduleKind::kStealing, .split_size = 1024};
  const auto expected = large.run(schedule);
  const std::size_t row = Large::kHeads * Large::kGroup * Large::kDim * 2;
  for (std::size_t kept = 0; kept < kSkewed.size(); ++kept) {
    std::vector<std::int32_t> lens(kSkewed.size(), 0);
    lens[kept] = kSkewed[kept];
    large.set_lens(lens);
    const auto alone = large.run(schedule);
    EXPECT_TRUE(std::equal(alone.begin() + static_cast<std::ptrdiff_t>(kept * row),
                           alone.begin() + static_cast<std::ptrdiff_t>((kept + 1) * row),
                           expected.begin() + static_cast<std::ptrdiff_t>(kept * row)))
        << "request " << kept;
  }
}

// Lengths are read when a graph runs, not when it was captured.
TEST(CudaDecode, GraphsFollowTheLengths) {
  NEEDS_HOPPER();
  Large large(kSkewed, 4'400);
  cudaStream_t stream = nullptr;
  cuda_ok(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "graph");
  cuda::DecodeArgs args = large.args({.kind = ScheduleKind::kStealing});
  args.stream = stream;
  cudaGraph_t graph = nullptr;
  cudaGraphExec_t executable = nullptr;
  cuda_ok(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal), "graph");
  cuda::launch_decode_plan(args);
  cuda::launch_decode(args);
  cuda::launch_decode(args);
  cuda_ok(cudaStreamEndCapture(stream, &graph), "graph");
  cuda_ok(cudaGraphInstantiate(&executable, graph, 0), "graph");
  Random r(3);
  for (int step = 0; step < 100; ++step) {
    std::vector<std::int32_t> lens = kSkewed;
    for (auto& len : lens) len = static_cast<std::int32_t>(r.chance(0.2) ? len : r.integer(0, len));
    large.set_lens(lens);
    const auto expected = large.run({.kind = ScheduleKind::kStatic});
    cuda_ok(cudaGraphLaunch(executable, stream), "graph");
    cuda_ok(cudaStreamSynchronize(stream), "graph");
    ASSERT_EQ(large.out(), expected) << "step " << step;
  }
  cuda_ok(cudaGraphExecDestroy(executable), "graph");
  cuda_ok(cudaGraphDestroy(graph), "graph");
  cuda_ok(cudaStreamDestroy(stream), "graph");
}

}  // namespace
}  // namespace heddle
