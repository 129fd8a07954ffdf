// Tensors, names, threads, instruction sets and the dispatch table.
#include <array>
#include <atomic>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include <gtest/gtest.h>

#include "core/dispatch.h"
#include "core/isa.h"
#include "core/threads.h"
#include "heddle/heddle.h"

namespace heddle {
namespace {

// The error that `call` throws; a test failure if it throws none.
template <class Call>
Error error_of(Call&& call) {
  try {
    call();
  } catch (const Error& error) {
    return error;
  }
  ADD_FAILURE() << "no error";
  return {ErrorCode::kRuntime, "", ""};
}

TEST(Error, NamesTheArgument) {
  const Error error(ErrorCode::kShape, "block_table", "rank 3; allowed is 2");
  EXPECT_STREQ(error.what(), "block_table: rank 3; allowed is 2");
  EXPECT_EQ(error.argument(), "block_table");
  EXPECT_EQ(error.code(), ErrorCode::kShape);
  EXPECT_EQ(to_string(ErrorCode::kUnsupported), "unsupported");
}

TEST(TensorView, IsRowMajorByDefault) {
  const TensorView x(nullptr, DType::kFloat16, {2, 3, 5});
  EXPECT_EQ(x.rank, 3);
  EXPECT_EQ(x.strides[0], 15);
  EXPECT_EQ(x.strides[1], 5);
  EXPECT_EQ(x.strides[2], 1);
  EXPECT_EQ(x.numel(), 30);
  EXPECT_EQ(x.shape_string(), "[2, 3, 5]");
  EXPECT_TRUE(x.given());
  EXPECT_FALSE(TensorView().given());
  EXPECT_EQ(TensorView().numel(), 0);
  EXPECT_EQ(TensorView(nullptr, DType::kFloat32, {}).numel(), 1);
  EXPECT_EQ(error_of([] { TensorView(nullptr, DType::kFloat32, {1, 1, 1, 1, 1, 1}); }).code(), ErrorCode::kShape);
}

TEST(TensorView, ContiguityIgnoresAxesOfOne) {
  TensorView x(nullptr, DType::kFloat32, {4, 1, 8});
  EXPECT_TRUE(x.is_contiguous());
  x.strides[1] = 77;
  EXPECT_TRUE(x.is_contiguous());
  x.strides[0] = 9;
  EXPECT_FALSE(x.is_contiguous());
  x.shape[0] = 0;
  EXPECT_TRUE(x.is_contiguous());
}

TEST(DType, SizesAndNames) {
  EXPECT_EQ(size_of(DType::kFloat64), 8u);
  EXPECT_EQ(size_of(DType::kFloat32), 4u);
  EXPECT_EQ(size_of(DType::kBFloat16), 2u);
  EXPECT_EQ(size_of(DType::kFloat8E4M3), 1u);
  EXPECT_EQ(size_of(DType::kBool), 1u);
  EXPECT_EQ(to_string(DType::kBFloat16), "bfloat16");
  EXPECT_EQ(to_string(DType::kFloat8E4M3), "float8_e4m3");
  EXPECT_EQ(to_string(Device{}), "cpu");
  EXPECT_EQ(to_string(Device{DeviceType::kCuda, 3}), "cuda:3");
}

TEST(Names, RoundTripAndRefuse) {
  for (const Backend backend : {Backend::kAuto, Backend::kReference, Backend::kHost, Backend::kSm90}) {
    EXPECT_EQ(backend_from_string(to_string(backend)), backend);
  }
  const Error backend = error_of([] { backend_from_string("tpu"); });
  EXPECT_EQ(backend.code(), ErrorCode::kValue);
  EXPECT_STREQ(backend.what(), "backend: 'tpu' does not exist; allowed are auto, reference, host, sm90");
  EXPECT_EQ(schedule_from_string("stealing"), ScheduleKind::kStealing);
  EXPECT_EQ(error_of([] { schedule_from_string("greedy"); }).argument(), "schedule");
}

TEST(Backends, HostBeforeReference) {
  const std::vector<Backend> backends = available_backends();
  ASSERT_GE(backends.size(), 2u);
  EXPECT_EQ(backends[backends.size() - 2], Backend::kHost);
  EXPECT_EQ(backends.back(), Backend::kReference);
}

TEST(Isa, CanBeLoweredToAnyThatIsAvailable) {
  const std::vector<std::string> names = available_host_isas();
  ASSERT_FALSE(names.empty());
  EXPECT_EQ(names.back(), "portable");
  for (const std::string& name : names) {
    set_host_isa(name);
    EXPECT_EQ(host_isa(), name);
  }
  EXPECT_EQ(current_isa(), Isa::kPortable);
  const Error error = error_of([] { set_host_isa("neon2"); });
  EXPECT_EQ(error.code(), ErrorCode::kValue);
  EXPECT_NE(std::string(error.what()).find("portable"), std::string::npos);
  EXPECT_EQ(host_isa(), "portable");
  set_host_isa("auto");
  EXPECT_EQ(host_isa(), names.front());
}

TEST(Threads, EveryIdRunsOnce) {
  for (const int n : {0, 1, 2, 7, 33}) {
    std::vector<std::atomic<int>> runs(static_cast<std::size_t>(n));
    parallel(n, [&](int id) { ++runs[static_cast<std::size_t>(id)]; });
    for (const auto& count : runs) EXPECT_EQ(count, 1);
  }
}

TEST(Threads, EveryIdRunsOnceInsideAParallelRegion) {
  std::array<std::atomic<int>, 6> runs{};
  parallel(2, [&](int outer) { parallel(3, [&](int inner) { ++runs[static_cast<std::size_t>(outer * 3 + inner)]; }); });
  for (const auto& count : runs) EXPECT_EQ(count, 1);
}

TEST(Threads, ParallelForCoversTheRange) {
  std::vector<std::atomic<int>> runs(1000);
  parallel_for(1000, 3, [&](std::int64_t i) { ++runs[static_cast<std::size_t>(i)]; });
  for (const auto& count : runs) EXPECT_EQ(count, 1);
  parallel_for(0, 3, [&](std::int64_t) { FAIL(); });
}

TEST(Threads, ExceptionsComeBackToTheCaller) {
  EXPECT_THROW(parallel(4,
                        [](int id) {
                          if (id == 3) throw std::out_of_range("3");
                        }),
               std::out_of_range);
  EXPECT_EQ(error_of([] {
              parallel_for(100, 2, [](std::int64_t i) {
                if (i == 50) throw Error(ErrorCode::kValue, "i", "50");
              });
            }).argument(),
            "i");
  EXPECT_THROW(parallel(1, [](int) { throw std::bad_alloc(); }), std::bad_alloc);
}

TEST(Threads, NumberCanBeSetAndReset) {
  const int standard = num_threads();
  EXPECT_GE(standard, 1);
  set_num_threads(5);
  EXPECT_EQ(num_threads(), 5);
  std::thread([] { EXPECT_EQ(num_threads(), 5); }).join();
  set_num_threads(0);
  EXPECT_EQ(num_threads(), standard);
  EXPECT_EQ(error_of([] { set_num_threads(-1); }).argument(), "n");
}

// A small valid call to vary.
struct Call {
  std::vector<float> q = std::vector<float>(2 * 4 * 8, 0.5f), out = std::vector<float>(2 * 4 * 8);
  AttentionParams params() {
    const auto view = [](std::vector<float>& x) { return TensorView(x.data(), DType::kFloat32, {1, 2, 4, 8}); };
    return {.q = view(q), .k = view(q), .v = view(q), .out = view(out)};
  }
};

TEST(Dispatch, LastKernelBelongsToTheThread) {
  Call call;
  AttentionParams params = call.params();
  params.backend = Backend::kReference;
  attention(params);
  EXPECT_EQ(last_kernel(), "reference/attention fp32");
  std::thread([] { EXPECT_EQ(last_kernel(), ""); }).join();
  params.backend = Backend::kAuto;
  attention(params);
  EXPECT_EQ(last_kernel(), "host/" + std::string(host_isa()) + "/attention fp32");
}

TEST(Dispatch, RefusalNamesTheFeatureAndWhoHasIt) {
  Features needed{Feature::kCpu, Feature::kFloat64, Feature::kSoftcap, Feature::kWideHeads};
  const Error host = error_of([&] { find_row(Operation::kAttention, Backend::kHost, needed); });
  EXPECT_EQ(host.code(), ErrorCode::kUnsupported);
  EXPECT_STREQ(
      host.what(),
      "backend: host does not support float64 and head dimensions above 576 in attention; allowed is reference");
  EXPECT_EQ(find_row(Operation::kAttention, Backend::kAuto, needed).backend, Backend::kReference);
  EXPECT_EQ(find_row(Operation::kAttention, Backend::kReference, needed).backend, Backend::kReference);
}

TEST(Dispatch, NobodyRunsAttentionOnCudaTensorsYet) {
  const Features needed{Feature::kCuda, Feature::kFloat32};
  for (const Backend backend : {Backend::kAuto, Backend::kHost, Backend::kReference}) {
    const Error error = error_of([&] { find_row(Operation::kDecode, backend, needed); });
    EXPECT_EQ(error.code(), ErrorCode::kUnsupported);
    EXPECT_NE(std::string(error.what()).find("CUDA tensors"), std::string::npos) << error.what();
    EXPECT_NE(std::string(error.what()).find("no backend in this process"), std::string::npos) << error.what();
  }
}

TEST(Dispatch, ABackendThatIsNotHereIsNamed) {
  const Error error =
      error_of([] { find_row(Operation::kAttention, Backend::kSm90, {Feature::kCpu, Feature::kFloat32}); });
  EXPECT_EQ(error.code(), ErrorCode::kUnsupported);
  EXPECT_EQ(error.argument(), "backend");
  EXPECT_NE(std::string(error.what()).find("sm90"), std::string::npos);
  EXPECT_NE(std::string(error.what()).find("allowed are host and reference"), std::string::npos) << error.what();
}

TEST(Dispatch, FeaturesOfACall) {
  const Selection window = Selection::window(3, 0, 2);
  Problem problem;
  problem.q = problem.k = problem.v = problem.out = {.dtype = DType::kBFloat16, .dim = 64};
  problem.v.dtype = DType::kInt8;
  problem.selection = &window;
  problem.softcap = 3.0;
  problem.causal = true;
  const Features features = features_of(problem);
  EXPECT_EQ(
      features.names(),
      "CPU tensors, bfloat16, int8, queries, keys and values of different dtypes, causal masks, windows, global tokens "
      "and softcap");
}

}  // namespace
}  // namespace heddle
