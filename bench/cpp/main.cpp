// heddle_bench: host attention, decode and merge as fractions of what this machine was measured to do in the same run.
//
//   heddle_bench --benchmark_filter=decode                               some of the cases
//   heddle_bench --benchmark_out=result.json --benchmark_out_format=json  a record of them
//   OMP_NUM_THREADS=1 HEDDLE_ISA=avx2 heddle_bench                        fewer threads, older instructions
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <string>
#include <string_view>

#include "bench.h"

#include "heddle/version.h"

namespace heddle::bench {

void measure(benchmark::State& state, Start start, const Work& work, const std::function<void()>& call) {
  using Clock = std::chrono::steady_clock;
  const Limits& limit = limits();
  double total = 0.0;
  for (auto _ : state) {
    if (start == Start::kCold) flush_caches();
    const auto begin = Clock::now();
    call();
    benchmark::ClobberMemory();
    const double seconds = std::chrono::duration<double>(Clock::now() - begin).count();
    state.SetIterationTime(seconds);
    total += seconds;
  }
  const double seconds = total / static_cast<double>(state.iterations());
  const double compute = work.qk_flops / limit.flops(work.qk_math) + work.pv_flops / limit.flops(work.pv_math);
  const double memory = work.bytes / limit.read_bytes_per_second;
  state.counters["GFLOP/s"] = (work.qk_flops + work.pv_flops) * 1e-9 / seconds;
  state.counters["GB/s"] = work.bytes * 1e-9 / seconds;
  state.counters["fraction"] = std::max(compute, memory) / seconds;
  state.SetLabel(std::string(compute > memory ? "of products" : "of memory") + ", " + last_kernel());
}

}  // namespace heddle::bench

int main(int argc, char** argv) {
  using namespace heddle;
  const auto asks_for = [&](std::string_view flag) {
    return std::any_of(argv + 1, argv + argc, [&](std::string_view arg) { return arg.substr(0, flag.size()) == flag; });
  };
  const bool measures = !asks_for("--help") && !asks_for("--benchmark_list_tests");
  bench::register_cases();
  bench::register_merge();
#if defined(HEDDLE_WITH_CUDA)
  bench::register_cuda_append();
  bench::register_cuda_attention();
  bench::register_cuda_merge();
#endif
  benchmark::Initialize(&argc, argv);
  if (benchmark::ReportUnrecognizedArguments(argc, argv)) return 1;

  benchmark::AddCustomContext("heddle", HEDDLE_VERSION_STRING);
  benchmark::AddCustomContext("host_isa", std::string(host_isa()));
#if defined(HEDDLE_NVCC)
  benchmark::AddCustomContext("nvcc", HEDDLE_NVCC);
#endif
  benchmark::AddCustomContext("threads", std::to_string(num_threads()));
  if (measures) {
    const bench::Limits& limit = bench::limits();
    const auto add = [](const char* name, double value, const char* unit) {
      char text[64];
      std::snprintf(text, sizeof text, "%.1f %s", value * 1e-9, unit);
      benchmark::AddCustomContext(name, text);
    };
    add("limit_read", limit.read_bytes_per_second, "GB/s");
    add("limit_fp32", limit.fp32_flops, "GFLOP/s");
    add("limit_bf16", limit.bf16_flops, "GFLOP/s");
    add("limit_int8", limit.int8_flops, "GOP/s");
  }
  benchmark::RunSpecifiedBenchmarks();
  benchmark::Shutdown();
  return 0;
}
