// The decode kernels below the public call, with batches too large for the oracle: chunks that are stolen, merges of
// many splits, graphs whose lengths change. Small shapes of every kind are test_cuda_fuzz's.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <map>
#include <memory>
#include <numeric>
#include <optional>
#include <utility>
#include <vector>

#include "cuda_support.h"
#include <gtest/gtest.h>

#include "core/numeric.h"
#include "cuda/launch.h"
#include "support/random.h"

namespace heddle {
namespace {

using testing::cuda_ok;
using testing::Random;

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
// So many keys that shares are cut into chunks, so many requests that two heads make a unit.
const std::vector<std::int32_t> kLarge = {270'000, 300, 0,   1,  140'000, 4'097, 16,  2'000,
                                          100,     33,  128, 64, 5'000,   7,     900, 1'500};

int repeats(const char* name, int otherwise) {
  const char* value = std::getenv(name);
  return value == nullptr ? otherwise : std::atoi(value);
}

TEST(CudaDecode, StolenChunksChangeNoBit) {
  NEEDS_HOPPER();
  Large large(kLarge, 16'900);
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

TEST(CudaDecode, MillionTokens) {
  NEEDS_HOPPER();
  Large large({1 << 20}, 1 << 16);
  const auto expected = large.run({.kind = ScheduleKind::kStatic});
  EXPECT_LT(largest_difference(expected, large.run({.kind = ScheduleKind::kStatic, .split_size = 5000})), 0.01);
  EXPECT_EQ(large.run({.kind = ScheduleKind::kStealing}), expected);
}

// A list of all pages, with entries beyond them that are no pages, is no list at all.
TEST(CudaDecode, PageListsOfAllPages) {
  NEEDS_HOPPER();
  Large large(kSkewed, 4'400);
  const auto expected = large.run({.kind = ScheduleKind::kStatic});
  const std::int64_t size = 4'500;
  std::vector<std::int32_t> list(kSkewed.size() * static_cast<std::size_t>(size));
  for (std::size_t i = 0; i < list.size(); ++i) {
    const auto page = static_cast<std::int32_t>(i % static_cast<std::size_t>(size));
    list[i] = page < 4'375 ? page : INT32_MAX - page;
  }
  DeviceBuffer on_device(list.size() * 4);
  on_device.upload(list.data());
  for (const std::int64_t split_size : {0, 5'000}) {
    cuda::DecodeArgs args = large.args({.kind = ScheduleKind::kStealing, .split_size = split_size});
    args.list = static_cast<std::int32_t*>(on_device.data());
    args.lists_pages = true;
    args.list_size = args.list_batch_stride = size;
    DeviceBuffer workspace(static_cast<std::size_t>(cuda::decode_workspace_bytes(args)));
    args.workspace = workspace.data();
    cuda::launch_decode_plan(args);
    cuda::launch_decode(args);
    EXPECT_LT(largest_difference(expected, large.out()), 0.01) << split_size;
  }
}

// Lengths are read when a graph runs, not when it was captured. HEDDLE_REPLAYS: how often.
TEST(CudaDecode, GraphsFollowTheLengths) {
  NEEDS_HOPPER();
  const std::vector<std::int32_t>& longest = kLarge;
  Large large(longest, 16'900);
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
  for (int step = 0; step < repeats("HEDDLE_REPLAYS", 200); ++step) {
    std::vector<std::int32_t> lens = longest;
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
