// What the cases share: how they are timed, and the counters that every result carries.
#pragma once

#include <functional>
#include <string>

#include "limits.h"
#include <benchmark/benchmark.h>

#include "heddle/heddle.h"

namespace heddle::bench {

// What one call has to do at least.
struct Work {
  double qk_flops = 0, pv_flops = 0;  // of the visible pairs
  Math qk_math = Math::kFloat32, pv_math = Math::kFloat32;
  double bytes = 0;  // inputs and outputs, each once
};

// Whether a case starts with its data in memory or with whatever the last call left in the caches.
enum class Start { kCold, kWarm };

// Times `call` and reports GFLOP/s, GB/s and `fraction`: the time that the measured limits allow over the time taken.
// The label says which limit that is (products or memory) and which kernel ran.
void measure(benchmark::State& state, Start start, const Work& work, const std::function<void()>& call);

template <class Body>
void add_case(const std::string& name, Body body) {
  benchmark::RegisterBenchmark(name.c_str(), body)->UseManualTime()->Unit(benchmark::kMillisecond);
}

void register_cases();  // cases.cpp
void register_merge();  // merge.cpp
#if defined(HEDDLE_WITH_CUDA)
void register_cuda_append();
void register_cuda_attention();
void register_cuda_merge();  // cuda_merge.cu; nothing without a GPU
#endif

}  // namespace heddle::bench
