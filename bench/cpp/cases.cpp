// prefill/... and decode/...: the named cases of tests/cpp/cases.h, which the tests check in small.
#include "cases.h"

#include <algorithm>
#include <memory>

#include "bench.h"

#include "support/sample.h"

namespace heddle::bench {
namespace {

using heddle::testing::Case;
using heddle::testing::Op;
using heddle::testing::Output;
using heddle::testing::Pattern;
using heddle::testing::Sample;

// Query-key pairs of all requests and heads.
double visible_pairs(const Sample& sample) {
  const Case& c = sample.spec();
  const bool window = c.pattern == Pattern::kWindow;
  const bool by_formula = (c.pattern == Pattern::kNone || window) && !c.left && !c.right;
  double pairs = 0.0;
  for (std::int64_t b = 0; b < static_cast<std::int64_t>(sample.requests().size()); ++b) {
    const auto& request = sample.requests()[static_cast<std::size_t>(b)];
    for (std::int64_t i = 0; i < request.q_len; ++i) {
      if (!by_formula) {
        for (std::int64_t h = 0; h < c.q_heads; ++h) {
          for (std::int64_t j = 0; j < request.kv_len; ++j) pairs += sample.sees(b, h, i, j);
        }
        continue;
      }
      const std::int64_t at = i + request.kv_len - request.q_len;
      std::int64_t end = c.causal ? std::min(request.kv_len, at + 1) : request.kv_len;
      const std::int64_t visible_end = end;
      std::int64_t first = 0, globals = 0;
      if (window) {
        if (c.select_right) end = std::min(end, at + *c.select_right + 1);
        if (c.select_left) first = std::clamp<std::int64_t>(at - *c.select_left, 0, std::max<std::int64_t>(0, end));
        globals = std::min({c.n_global, first, visible_end});
      }
      pairs += static_cast<double>(c.q_heads * (std::max<std::int64_t>(0, end - first) + globals));
    }
  }
  return pairs;
}

// The dtype of keys and values as they are stored.
DType stored(const Case& c) {
  if (c.op == Op::kAttention) return c.k;
  switch (c.format) {
    case CacheFormat::kFp32: return DType::kFloat32;
    case CacheFormat::kBf16: return DType::kBFloat16;
    case CacheFormat::kFp16: return DType::kFloat16;
    case CacheFormat::kFp8: return DType::kFloat8E4M3;
    default: return DType::kInt8;
  }
}

Work work_of(const Sample& sample, DType out) {
  const Case& c = sample.spec();
  std::int64_t queries = 0, keys = 0;
  for (const auto& request : sample.requests()) {
    queries += request.q_len;
    keys += request.kv_len;
  }
  // K and V once, a scale for each of K's partitions, Q and the output. Value norms are not read.
  const std::int64_t partition = c.op == Op::kAttention ? c.k_partition : c.cache_partition;
  const bool partitioned = c.op == Op::kAttention ? partition > 0 : c.format == CacheFormat::kInt8A;
  double bytes = static_cast<double>(keys * c.kv_heads * (c.dim + c.dim_v)) * static_cast<double>(size_of(stored(c)));
  if (partitioned) bytes += 4.0 * static_cast<double>(keys * c.kv_heads) / static_cast<double>(partition);
  bytes +=
      static_cast<double>(queries * c.q_heads) * static_cast<double>(c.dim * static_cast<std::int64_t>(size_of(c.q)) +
                                                                     c.dim_v * static_cast<std::int64_t>(size_of(out)));

  const double pairs = visible_pairs(sample);
  const auto math_of = [](DType dtype) {
    return dtype == DType::kFloat32 ? Math::kFloat32 : dtype == DType::kInt8 ? Math::kInt8 : Math::kBFloat16;
  };
  const Math math = std::min(math_of(c.q), math_of(stored(c)));
  return {.qk_flops = 2.0 * pairs * static_cast<double>(c.dim),
          .pv_flops = 2.0 * pairs * static_cast<double>(c.dim_v),
          .qk_math = math,
          .pv_math = std::min(math, Math::kBFloat16),  // probabilities are not rounded to 8 bits
          .bytes = bytes};
}

void run(benchmark::State& state, const Case& c) {
  const Sample sample(c);
  const DType out_dtype = c.q == DType::kInt8 ? DType::kFloat32 : c.q;
  Output output(sample, out_dtype, DType::kFloat32);
  measure(state, c.op == Op::kDecode ? Start::kCold : Start::kWarm, work_of(sample, out_dtype),
          [&] { output.run(sample, Backend::kAuto, c.schedule); });
}

}  // namespace

void register_cases() {
  for (const Case& c : heddle::testing::named_cases()) {
    add_case(c.name, [&c](benchmark::State& state) { run(state, c); });
  }
}

}  // namespace heddle::bench
