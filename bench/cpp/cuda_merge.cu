// cuda-merge/<dtype>/p<parts>/r<rows>: the CUDA merge, 32 heads, Dv 128, as a fraction of a cold read of the same
// number of bytes.
#include <algorithm>
#include <string>
#include <vector>

#include "bench.h"
#include "cuda_timer.cuh"

namespace heddle::bench {
namespace {

constexpr std::int64_t kHeads = 32, kDim = 128;
void merge_parts(benchmark::State& state, DType dtype, std::int64_t parts, std::int64_t tokens) {
  const auto rows = static_cast<std::size_t>(tokens * kHeads), row_bytes = kDim * size_of(dtype);
  const std::size_t bytes = rows * static_cast<std::size_t>(parts + 1) * (row_bytes + sizeof(float));
  const DeviceBuffer outs(rows * static_cast<std::size_t>(parts) * row_bytes), out(rows * row_bytes),
      lses(rows * static_cast<std::size_t>(parts) * sizeof(float)), lse(rows * sizeof(float)), limit(bytes);
  const Device gpu{DeviceType::kCuda, 0};
  const MergeParams params{.outs = TensorView(outs.data(), dtype, {parts, 1, tokens, kHeads, kDim}, gpu),
                           .lses = TensorView(lses.data(), DType::kFloat32, {parts, 1, kHeads, tokens}, gpu),
                           .out = TensorView(out.data(), dtype, {1, tokens, kHeads, kDim}, gpu),
                           .lse = TensorView(lse.data(), DType::kFloat32, {1, kHeads, tokens}, gpu),
                           .backend = Backend::kSm90};
  const CudaTimer timer;
  const double read_seconds = median_of_20([&] { return timer.seconds([&] { timer.read(limit.data(), bytes); }); });
  std::vector<double> seconds;
  for (auto _ : state) {
    seconds.push_back(timer.seconds([&] { merge(params); }));
    state.SetIterationTime(seconds.back());
  }
  const double median = median_of(seconds);
  state.counters["us"] = median * 1e6;
  state.counters["GB/s"] = static_cast<double>(bytes) * 1e-9 / median;
  state.counters["fraction"] = read_seconds / median;
  state.SetLabel("of a cold read of " + std::to_string(bytes >> 10) + " KiB, " + last_kernel());
}

}  // namespace

void register_cuda_merge() {
  if (!has_hopper()) return;
  for (const DType dtype : {DType::kFloat32, DType::kBFloat16}) {
    // What is left of one request decoded over 16, 64 and 128 splits; a batch; prefill over two halves of a context.
    for (const auto& [parts, tokens] : {std::pair{16, 1}, std::pair{64, 1}, std::pair{128, 1}, std::pair{16, 64},
                                        std::pair{2, 8192}, std::pair{8, 8192}}) {
      const std::string name = "cuda-merge/" + std::string(dtype == DType::kFloat32 ? "fp32" : "bf16") + "/p" +
                               std::to_string(parts) + "/r" + std::to_string(tokens * kHeads);
      benchmark::RegisterBenchmark(name.c_str(), merge_parts, dtype, parts, tokens)
          ->UseManualTime()
          ->Unit(benchmark::kMicrosecond)
          ->Iterations(50);
    }
  }
}

}  // namespace heddle::bench
