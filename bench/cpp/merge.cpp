// merge/<dtype>/p<parts>: partial results of 1024 tokens, 32 heads, Dv 128.
#include <string>

#include "bench.h"

#include "support/random.h"
#include "support/sample.h"

namespace heddle::bench {
namespace {

using heddle::testing::Random;
using heddle::testing::Tensor;

constexpr std::int64_t kTokens = 1024, kHeads = 32, kDim = 128;

void merge_parts(benchmark::State& state, DType dtype, std::int64_t parts) {
  // Which numbers they are makes no difference to the time: outs are zeros.
  const Tensor outs(dtype, {parts, 1, kTokens, kHeads, kDim}, std::byte{0}),
      out(dtype, {1, kTokens, kHeads, kDim}, std::byte{0}), lse(DType::kFloat32, {1, kHeads, kTokens}, std::byte{0});
  Tensor lses(DType::kFloat32, {parts, 1, kHeads, kTokens}, std::byte{0});
  Random random(0);
  for (std::int64_t i = 0; i < lses.view.numel(); ++i) lses.view.as<float>()[i] = random.normal();
  const MergeParams params{.outs = outs.view, .lses = lses.view, .out = out.view, .lse = lse.view};

  const double rows = static_cast<double>(kTokens * kHeads), all = static_cast<double>(parts + 1);
  measure(state, Start::kCold,
          {.pv_flops = 2.0 * static_cast<double>(parts) * rows * kDim,
           .bytes = rows * all * (kDim * static_cast<double>(size_of(dtype)) + sizeof(float))},
          [&] { merge(params); });
}

}  // namespace

void register_merge() {
  for (const DType dtype : {DType::kFloat32, DType::kBFloat16}) {
    for (const std::int64_t parts : {2, 16}) {
      const std::string name =
          "merge/" + std::string(dtype == DType::kFloat32 ? "fp32" : "bf16") + "/p" + std::to_string(parts);
      add_case(name, [=](benchmark::State& state) { merge_parts(state, dtype, parts); });
    }
  }
}

}  // namespace heddle::bench
