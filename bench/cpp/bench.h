// What the cases share: data, and the counters that every result carries.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <initializer_list>
#include <string>
#include <vector>

#include "limits.h"
#include <benchmark/benchmark.h>

#include "heddle/heddle.h"

namespace heddle::bench {

// A tensor with memory of its own.
class Tensor {
 public:
  Tensor() = default;
  Tensor(DType dtype, std::initializer_list<std::int64_t> shape);
  static Tensor random(DType dtype, std::initializer_list<std::int64_t> shape);  // float32 or bfloat16, about N(0, 1)

  const TensorView& view() const { return view_; }
  operator const TensorView&() const { return view_; }
  template <class T>
  T* as() const {
    return view_.as<T>();
  }

 private:
  std::vector<std::byte> bytes_;
  TensorView view_;
};

// What one call has to do at least.
struct Work {
  double qk_flops = 0, pv_flops = 0;  // of the visible pairs
  Math qk_math = Math::kFloat32, pv_math = Math::kFloat32;
  double bytes = 0;  // inputs and outputs, each once
};

// Query-key pairs that are visible to one head.
double visible_pairs(std::int64_t seq_q, std::int64_t seq_k, bool causal, const Selection& selection = {});

// Whether a case starts with its data in memory or with whatever the last call left in the caches.
enum class Start { kCold, kWarm };

// Times `call` and reports GFLOP/s, GB/s and `fraction`: the time that the measured limits allow over the time taken.
// The label says which limit that is (products or memory) and which kernel ran.
void measure(benchmark::State& state, Start start, const Work& work, const std::function<void()>& call);

// Registers prefill/..., decode/... or merge/..., timed as measure() does.
template <class Body>
void add_case(const std::string& name, Body body) {
  benchmark::RegisterBenchmark(name.c_str(), body)->UseManualTime()->Unit(benchmark::kMillisecond);
}

// One function a file.
void register_attention();
void register_decode();
void register_merge();

}  // namespace heddle::bench
