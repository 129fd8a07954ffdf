// cuda-append/<format>/b<batch>: KVCache::append of one token of each request, bf16, 8 KV heads, D 128, pages of 64.
// "us" is one call that finds nothing in L2, not even its code; "us_empty" is a kernel without a body, timed likewise.
// "us_in_graph" is one of 32 in a row in a graph, as the layers of a model run it: inputs that were just computed.
#include <cstdint>
#include <string>
#include <vector>

#include "bench.h"
#include "cuda_timer.cuh"

namespace heddle::bench {
namespace {

constexpr std::int64_t kHeads = 8, kDim = 128, kPageSize = 64, kPages = 64, kCalls = 32;

void append_tokens(benchmark::State& state, CacheFormat format, std::int64_t batch) {
  const Device gpu{DeviceType::kCuda, 0};
  KVCache cache({.num_pages = batch * kPages,
                 .page_size = kPageSize,
                 .num_kv_heads = kHeads,
                 .head_dim = kDim,
                 .format = format,
                 .device = gpu});
  std::vector<std::uint16_t> ones(static_cast<std::size_t>(batch * kHeads * kDim), 0x3f80);
  std::vector<std::int32_t> pages(static_cast<std::size_t>(batch * kPages)), lengths(static_cast<std::size_t>(batch));
  for (std::size_t i = 0; i < pages.size(); ++i) pages[i] = static_cast<std::int32_t>(i * 7919 % pages.size());
  for (std::size_t i = 0; i < lengths.size(); ++i) lengths[i] = static_cast<std::int32_t>(i * 37 % 4000);
  const DeviceBuffer k(ones.size() * 2), v(ones.size() * 2), table(pages.size() * 4), start(lengths.size() * 4),
      seq_lens(lengths.size() * 4);
  check(cudaMemcpy(k.data(), ones.data(), ones.size() * 2, cudaMemcpyHostToDevice));
  check(cudaMemcpy(v.data(), ones.data(), ones.size() * 2, cudaMemcpyHostToDevice));
  check(cudaMemcpy(table.data(), pages.data(), pages.size() * 4, cudaMemcpyHostToDevice));
  check(cudaMemcpy(start.data(), lengths.data(), lengths.size() * 4, cudaMemcpyHostToDevice));
  const TensorView rows_k(k.data(), DType::kBFloat16, {batch, 1, kHeads, kDim}, gpu),
      rows_v(v.data(), DType::kBFloat16, {batch, 1, kHeads, kDim}, gpu);
  const auto append = [&](cudaStream_t stream) {
    cache.append(rows_k, rows_v, TensorView(table.data(), DType::kInt32, {batch, kPages}, gpu),
                 TensorView(start.data(), DType::kInt32, {batch}, gpu),
                 TensorView(seq_lens.data(), DType::kInt32, {batch}, gpu), {}, {stream});
  };
  append(nullptr);  // calibrates

  cudaStream_t stream = nullptr;
  cudaGraph_t graph = nullptr;
  cudaGraphExec_t replay = nullptr;
  check(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
  check(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
  for (std::int64_t i = 0; i < kCalls; ++i) append(stream);
  check(cudaStreamEndCapture(stream, &graph));
  check(cudaGraphInstantiate(&replay, graph, 0));

  const CudaTimer timer;
  const double in_graph = median_of_20([&] { return timer.seconds([&] { check(cudaGraphLaunch(replay, nullptr)); }); });
  const double empty = median_of_20([&] {
    return timer.seconds([&] {
      nothing_kernel<<<1, 32>>>();
      check(cudaGetLastError());
    });
  });
  std::vector<double> seconds;
  for (auto _ : state) {
    seconds.push_back(timer.seconds([&] { append(nullptr); }));
    state.SetIterationTime(seconds.back());
  }
  state.counters["us"] = median_of(seconds) * 1e6;
  state.counters["us_empty"] = empty * 1e6;
  state.counters["us_in_graph"] = in_graph / kCalls * 1e6;
  check(cudaGraphExecDestroy(replay));
  check(cudaGraphDestroy(graph));
  check(cudaStreamDestroy(stream));
}

}  // namespace

void register_cuda_append() {
  if (!has_hopper()) return;
  for (const CacheFormat format :
       {CacheFormat::kBf16, CacheFormat::kInt8Baseline, CacheFormat::kInt8A, CacheFormat::kInt8B, CacheFormat::kFp8}) {
    for (const std::int64_t batch : {1, 256}) {
      const std::string name = "cuda-append/" + std::string(to_string(format)) + "/b" + std::to_string(batch);
      benchmark::RegisterBenchmark(name.c_str(), append_tokens, format, batch)
          ->UseManualTime()
          ->Unit(benchmark::kMicrosecond)
          ->Iterations(50);
    }
  }
}

}  // namespace heddle::bench
