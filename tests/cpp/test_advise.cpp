// The advisor: pair counts against counting, bytes against arithmetic done by hand, and what it tells people to try
// first.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <functional>
#include <optional>
#include <random>
#include <string>
#include <vector>

#include <gtest/gtest.h>

#include "heddle/advise.h"
#include "heddle/error.h"

namespace heddle {
namespace {

using Kind = Pattern::Kind;

std::int64_t count_one_by_one(std::int64_t q_len, std::int64_t kv_len, bool causal,
                              const std::function<bool(std::int64_t, std::int64_t)>& sees) {
  std::int64_t pairs = 0;
  for (std::int64_t i = 0; i < q_len; ++i) {
    const std::int64_t p = i + kv_len - q_len;
    for (std::int64_t j = 0; j < kv_len; ++j) pairs += (!causal || j <= p) && sees(p, j) ? 1 : 0;
  }
  return pairs;
}

TEST(Advise, PairsOfWindowsAndStrides) {
  std::mt19937 rng(17);
  const auto below = [&](std::int64_t n) { return static_cast<std::int64_t>(rng() % static_cast<unsigned>(n)); };
  for (int trial = 0; trial < 3000; ++trial) {
    const std::int64_t q_len = below(40), kv_len = below(40);  // queries before the first key too
    const bool causal = trial % 2 == 0;
    Pattern window{.kind = Kind::kWindow}, strided{.kind = Kind::kStrided};
    if (below(4) != 0) window.window.window.left = below(45);
    if (below(4) != 0) window.window.window.right = below(45);
    window.window.n_global = below(3) == 0 ? 0 : below(50);
    strided.strided = {.width = below(45), .stride = 1 + below(20)};
    SCOPED_TRACE(testing::Message() << to_string(window) << ", " << to_string(strided) << ", " << q_len << " x "
                                    << kv_len << (causal ? " causal" : ""));
    const auto& w = window.window;
    ASSERT_EQ(count_pairs(window, q_len, kv_len, causal), count_one_by_one(q_len, kv_len, causal, [&](auto p, auto j) {
                return j < w.n_global ||
                       ((!w.window.left || j >= p - *w.window.left) && (!w.window.right || j <= p + *w.window.right));
              }));
    const auto& s = strided.strided;
    ASSERT_EQ(count_pairs(strided, q_len, kv_len, causal), count_one_by_one(q_len, kv_len, causal, [&](auto p, auto j) {
                return p - j < s.width || (p - j) % s.stride == 0;
              }));
    ASSERT_EQ(count_pairs({}, q_len, kv_len, causal),
              count_one_by_one(q_len, kv_len, causal, [](auto, auto) { return true; }));
    // A list of n tokens holds those that the query may see, at most n.
    Pattern tokens{.kind = Kind::kTokens};
    tokens.budget = below(50);
    std::int64_t listed = 0;
    for (std::int64_t i = 0; i < q_len; ++i) {
      const std::int64_t visible = causal ? std::clamp<std::int64_t>(i + kv_len - q_len + 1, 0, kv_len) : kv_len;
      listed += std::min(tokens.budget, visible);
    }
    ASSERT_EQ(count_pairs(tokens, q_len, kv_len, causal), listed);
  }
}

TEST(Advise, PairsOfLongSequences) {
  const std::int64_t n = 1 << 20;
  EXPECT_EQ(count_pairs({}, n, n, true), n * (n + 1) / 2);
  EXPECT_EQ(count_pairs({}, n, n, false), n * n);
  Pattern window{.kind = Kind::kWindow};
  window.window = {.window = {.left = 1023, .right = 0}, .n_global = 0};
  EXPECT_EQ(count_pairs(window, n, n, true), 1024 * n - 1024 * 1023 / 2);
  Pattern blocks{.kind = Kind::kBlocks};
  blocks.density = 0.25;
  EXPECT_EQ(count_pairs(blocks, n, n, false), n * n / 4);
}

// ---------------------------------------------------------------------------------------------------------------------

// A machine of round numbers: 1 GB/s; 1, 2, 4 and 8 GFLOP/s.
Machine toy() {
  Machine m;
  m.name = "toy";
  m.bandwidth = m.fp32 = 1e9;
  m.bf16 = 2e9;
  m.int8 = 4e9;
  m.fp8 = 8e9;
  return m;
}

AdviseParams long_context() {
  AdviseParams p;
  p.num_layers = 80;
  p.num_q_heads = p.num_kv_heads = 64;
  p.head_dim = 128;
  p.seq_len = 128000;
  p.machine = machine_from_name("h100-80gb");
  return p;
}

const Cost& find(const Advice& advice, Phase phase, Kind kind, CacheFormat format) {
  const auto at = std::find_if(advice.costs.begin(), advice.costs.end(), [&](const Cost& c) {
    return c.phase == phase && c.pattern.kind == kind && c.format == format;
  });
  EXPECT_NE(at, advice.costs.end());
  return *at;
}

TEST(Advise, CacheBytesOfALargeModel) {
  AdviseParams params = long_context();
  for (const std::int64_t kv_heads : {64, 8}) {
    params.num_kv_heads = kv_heads;
    const Advice advice = advise(params);
    const double share = static_cast<double>(kv_heads) / 64;
    for (const Phase phase : {Phase::kPrefill, Phase::kDecode}) {
      for (const Kind kind : {Kind::kMaterialized, Kind::kFlash, Kind::kWindow, Kind::kTopK}) {
        EXPECT_EQ(find(advice, phase, kind, CacheFormat::kBf16).kv_bytes, 335.54432e9 * share);
        EXPECT_EQ(find(advice, phase, kind, CacheFormat::kFp32).kv_bytes, 671.08864e9 * share);
        for (const CacheFormat format :
             {CacheFormat::kInt8Baseline, CacheFormat::kInt8A, CacheFormat::kInt8B, CacheFormat::kFp8}) {
          EXPECT_EQ(find(advice, phase, kind, format).kv_bytes, 167.77216e9 * share);
        }
      }
    }
  }
}

// What the advisor says a token costs is what a cache of that shape takes.
TEST(Advise, AgreesWithTheCache) {
  for (const CacheFormat format : {CacheFormat::kFp32, CacheFormat::kBf16, CacheFormat::kInt8B, CacheFormat::kInt8A}) {
    const KVCache cache({.num_pages = 4,
                         .page_size = 16,
                         .num_kv_heads = 3,
                         .head_dim = 40,
                         .head_dim_v = 24,
                         .format = format,
                         .partition = format == CacheFormat::kInt8A ? 8 : 1});
    AdviseParams params;
    params.num_q_heads = params.num_kv_heads = 3;
    params.head_dim = 40;
    params.head_dim_v = 24;
    params.seq_len = 64;
    params.format = format;
    params.partition = 8;
    params.machine = toy();
    const Cost cost = advise(params).decode;
    const double static_scales = format == CacheFormat::kInt8A || format == CacheFormat::kInt8B ? 8 : 0;
    EXPECT_NEAR(cost.kv_bytes + cost.side_bytes - static_scales, 64 * cache.bytes_per_token(), 1e-6);
  }
}

TEST(Advise, CostsByHand) {
  AdviseParams params;
  params.num_layers = 2;
  params.batch = 3;
  params.num_q_heads = 8;
  params.num_kv_heads = 2;
  params.head_dim = 64;
  params.head_dim_v = 32;
  params.seq_len = 1000;
  params.machine = toy();
  Pattern window{.kind = Kind::kWindow}, blocks{.kind = Kind::kBlocks}, topk{.kind = Kind::kTopK},
      tokens{.kind = Kind::kTokens};
  window.window = {.window = {.left = 99, .right = 0}, .n_global = 10};
  blocks.density = 0.5;
  topk.budget = tokens.budget = 50;
  params.patterns = {window, blocks, topk, tokens};
  const Advice advice = advise(params);
  EXPECT_EQ(advice.costs.size(), 2u * 6u * 7u);

  const double causal = 1000.0 * 1001 / 2, heads = 3 * 8, kv = 3 * 2;
  const double in_out = heads * 1000 * 96 * 2;
  const Cost& flash = find(advice, Phase::kPrefill, Kind::kFlash, CacheFormat::kBf16);
  EXPECT_EQ(static_cast<double>(flash.pairs), causal);
  EXPECT_EQ(flash.density, 1.0);
  EXPECT_EQ(flash.operations, 2 * 2 * 96 * causal * heads);
  EXPECT_EQ(flash.score_bytes, 0.0);
  EXPECT_EQ(flash.workspace_bytes, 0.0);
  EXPECT_EQ(flash.kv_bytes, 2 * kv * 1000 * 96 * 2);
  EXPECT_EQ(flash.side_bytes, 2 * kv * 1000 * 4);
  EXPECT_EQ(flash.activation_bytes, in_out + kv * 1000 * 96 * 2);
  EXPECT_EQ(flash.total_bytes, flash.kv_bytes + flash.side_bytes + flash.activation_bytes);
  EXPECT_EQ(flash.moved_bytes, 2 * (in_out + kv * 1000 * 96 * 2));
  EXPECT_FALSE(flash.memory_bound);
  EXPECT_NEAR(flash.seconds, flash.operations / 2e9, 1e-9);

  const Cost& dense = find(advice, Phase::kPrefill, Kind::kMaterialized, CacheFormat::kBf16);
  EXPECT_EQ(dense.score_bytes, heads * 1000 * 1000 * 2);
  EXPECT_EQ(dense.operations, flash.operations);
  EXPECT_EQ(dense.moved_bytes, flash.moved_bytes + 2 * 4 * dense.score_bytes);

  // int8 multiplies the first product at its own rate, fp8 both; float32 caches are multiplied in float32.
  const double qk = 2 * 2 * 64 * causal * heads, pv = 2 * 2 * 32 * causal * heads;
  EXPECT_NEAR(find(advice, Phase::kPrefill, Kind::kFlash, CacheFormat::kInt8B).seconds, qk / 4e9 + pv / 2e9, 1e-9);
  EXPECT_NEAR(find(advice, Phase::kPrefill, Kind::kFlash, CacheFormat::kFp8).seconds, (qk + pv) / 8e9, 1e-9);
  EXPECT_NEAR(find(advice, Phase::kPrefill, Kind::kFlash, CacheFormat::kFp32).seconds, (qk + pv) / 1e9, 1e-9);

  const Cost& masked = find(advice, Phase::kPrefill, Kind::kBlocks, CacheFormat::kBf16);
  EXPECT_EQ(masked.density, 0.5);
  EXPECT_EQ(masked.workspace_bytes, heads * 8 * 8);
  EXPECT_NEAR(masked.seconds, flash.seconds / 2, 1e-9);

  // A decode step reads the cache once; 8-bit formats read half of it.
  const double one = heads * 96 * 2;
  const Cost& step = find(advice, Phase::kDecode, Kind::kFlash, CacheFormat::kBf16);
  EXPECT_EQ(step.pairs, 1000);
  EXPECT_EQ(step.moved_bytes, 2 * (one + kv * 1000 * 96 * 2));
  EXPECT_EQ(find(advice, Phase::kDecode, Kind::kFlash, CacheFormat::kInt8A).moved_bytes,
            2 * (one + kv * 1000 * (96 + 4)));
  EXPECT_EQ(find(advice, Phase::kDecode, Kind::kWindow, CacheFormat::kBf16).pairs, 110);
  EXPECT_EQ(find(advice, Phase::kDecode, Kind::kWindow, CacheFormat::kBf16).moved_bytes, 2 * (one + kv * 110 * 96 * 2));
  const double lists = kv * 51 * 4;
  EXPECT_EQ(find(advice, Phase::kDecode, Kind::kTokens, CacheFormat::kBf16).moved_bytes,
            2 * (one + kv * 50 * 96 * 2 + lists));
  // Top-k ranks every key, so it reads all of K.
  const Cost& best = find(advice, Phase::kDecode, Kind::kTopK, CacheFormat::kBf16);
  EXPECT_EQ(best.moved_bytes, 2 * (one + kv * (1000 * 64 + 50 * 32) * 2 + lists + 2 * kv * 1000 * 4));
  EXPECT_EQ(best.operations, 2 * 2 * heads * (1000 * 64 + 50 * 32));
}

TEST(Advise, DecodeIsSplitOverTheWorkers) {
  AdviseParams params;
  params.num_q_heads = 8;
  params.num_kv_heads = 2;
  params.head_dim = 64;
  params.seq_len = 4096;
  params.machine = toy();
  EXPECT_EQ(advise(params).decode.workspace_bytes, 0.0);  // one worker
  params.machine.workers = 12;
  EXPECT_EQ(advise(params).decode.workspace_bytes, 8 * 6 * 65 * 4);
  params.seq_len = 300;  // too short for six splits
  EXPECT_EQ(advise(params).decode.workspace_bytes, 8 * 2 * 65 * 4);
  params.batch = 6;
  EXPECT_EQ(advise(params).decode.workspace_bytes, 0.0);
}

TEST(Advise, UnknownRatesAreThoseOfTheNextType) {
  AdviseParams params;
  params.seq_len = 4096;
  params.machine = toy();
  params.machine.int8 = params.machine.fp8 = 0.0;
  Advice advice = advise(params);
  const double bf16 = find(advice, Phase::kPrefill, Kind::kFlash, CacheFormat::kBf16).seconds;
  EXPECT_EQ(find(advice, Phase::kPrefill, Kind::kFlash, CacheFormat::kInt8A).seconds, bf16);
  EXPECT_EQ(find(advice, Phase::kPrefill, Kind::kFlash, CacheFormat::kFp8).seconds, bf16);
  params.machine.bf16 = 0.0;
  advice = advise(params);
  EXPECT_EQ(find(advice, Phase::kPrefill, Kind::kFlash, CacheFormat::kBf16).seconds, 2 * bf16);
}

TEST(Advise, TheLongestRequestThatFitsIsTheLongest) {
  for (const CacheFormat format : {CacheFormat::kBf16, CacheFormat::kInt8A}) {
    for (const bool materialized : {false, true}) {
      AdviseParams params = long_context();
      params.num_kv_heads = 8;
      params.seq_len = 1000;
      params.format = format;
      params.materialized = materialized;
      params.other_bytes = 30e9;
      const std::int64_t longest = advise(params).prefill.max_seq_len;
      EXPECT_GT(longest, 1000);
      params.seq_len = longest;
      EXPECT_TRUE(advise(params).prefill.fits);
      params.seq_len = longest + 1;
      EXPECT_FALSE(advise(params).prefill.fits);
    }
  }
}

bool says(const std::string& text, const std::string& what) { return text.find(what) != std::string::npos; }

TEST(Advise, FirstThingToTryWhenItDoesNotFit) {
  AdviseParams params = long_context();
  params.num_kv_heads = 8;
  EXPECT_TRUE(says(advise(params).memory, "fits: 4")) << advise(params).memory;

  params.materialized = true;  // 64 heads x 128000^2 x 2 bytes = 2.1 TB
  EXPECT_TRUE(says(advise(params).memory, "needs 2.1 TB of 80.0 GB. First: flash attention")) << advise(params).memory;

  params.materialized = false;
  params.seq_len = 200000;  // 65.5 GB of KV
  params.other_bytes = 30e9;
  EXPECT_TRUE(says(advise(params).memory, "First: format int8-a")) << advise(params).memory;
  EXPECT_TRUE(says(advise(params).memory, "from 65.5 GB to 32.8 GB")) << advise(params).memory;
  params.materialized = true;
  EXPECT_TRUE(says(advise(params).memory, "First: flash attention, which keeps no scores, and format int8-a"))
      << advise(params).memory;
  params.materialized = false;

  params.batch = 8;
  EXPECT_TRUE(says(advise(params).memory, "at most 1 request at a time")) << advise(params).memory;
  params.batch = 1;
  params.num_kv_heads = 64;  // 262 GB in 8 bits
  const std::string many = advise(params).memory;
  EXPECT_TRUE(says(many, "over 4 such machines")) << many;
  EXPECT_TRUE(says(many, "one machine alone holds requests of up to")) << many;

  params.machine.memory = 0.0;
  EXPECT_TRUE(says(advise(params).memory, "not known")) << advise(params).memory;
}

TEST(Advise, FirstThingToTryWhenItIsSlow) {
  AdviseParams params = long_context();
  params.num_kv_heads = 8;
  params.materialized = true;
  EXPECT_TRUE(says(advise(params).prefill_speed, "First: flash attention, with the same result"));
  params.materialized = false;

  // Decode waits for memory: half the bytes first, then fewer values.
  Advice advice = advise(params);
  EXPECT_TRUE(advice.decode.memory_bound);
  EXPECT_TRUE(says(advice.decode_speed, "memory reads. First: format int8-a")) << advice.decode_speed;
  EXPECT_FALSE(advice.prefill.memory_bound);
  EXPECT_TRUE(says(advice.prefill_speed, "arithmetic. First: ")) << advice.prefill_speed;
  params.format = CacheFormat::kInt8A;
  advice = advise(params);
  EXPECT_TRUE(says(advice.decode_speed, "First: top-2048")) << advice.decode_speed;
  EXPECT_TRUE(says(advice.prefill_speed, "First: blocks of 128")) << advice.prefill_speed;

  // With a target the first that reaches it, or the first that helps and that none does.
  params.format = CacheFormat::kBf16;
  params.decode_target = 1.0;
  EXPECT_TRUE(says(advise(params).decode_speed, "fast enough"));
  params.decode_target = 1e-3;
  EXPECT_TRUE(says(advise(params).decode_speed, "First: window")) << advise(params).decode_speed;
  params.decode_target = 1e-12;
  EXPECT_TRUE(says(advise(params).decode_speed, "nothing here alone reaches")) << advise(params).decode_speed;
}

TEST(Advise, Machines) {
  for (const Machine& machine : known_machines()) {
    EXPECT_EQ(machine_from_name(machine.name).bandwidth, machine.bandwidth);
    EXPECT_FALSE(machine.source.empty());
    EXPECT_GT(machine.memory, 1e9);
    EXPECT_GT(machine.bf16, machine.fp32);
    EXPECT_GT(machine.workers, 1);
  }
  EXPECT_THROW(machine_from_name("abacus"), Error);
}

TEST(Advise, MeasuresThisMachine) {
  const Machine host = machine_from_name("host");
  EXPECT_GT(host.memory, 1e8);
  EXPECT_GT(host.bandwidth, 1e8);
  EXPECT_LT(host.bandwidth, 1e13);
  for (const double rate : {host.fp32, host.bf16, host.int8}) {
    EXPECT_GT(rate, 1e7);
    EXPECT_LT(rate, 1e15);
  }
  AdviseParams params = long_context();
  params.machine = host;
  EXPECT_GT(advise(params).decode.seconds, 0.0);
}

TEST(Advise, RefusesBadParameters) {
  const auto refuse = [](const std::string& argument, auto&& change) {
    AdviseParams params = long_context();
    change(params);
    try {
      advise(params);
      ADD_FAILURE() << "no error for " << argument;
    } catch (const Error& error) {
      EXPECT_EQ(error.argument(), argument) << error.what();
    }
  };
  refuse("num_layers", [](AdviseParams& p) { p.num_layers = 0; });
  refuse("batch", [](AdviseParams& p) { p.batch = -1; });
  refuse("seq_len", [](AdviseParams& p) { p.seq_len = 0; });
  refuse("seq_len", [](AdviseParams& p) { p.seq_len = std::int64_t{1} << 31; });
  refuse("new_tokens", [](AdviseParams& p) { p.new_tokens = 0; });
  refuse("num_q_heads", [](AdviseParams& p) { p.num_q_heads = 65; });
  refuse("num_kv_heads", [](AdviseParams& p) { p.num_kv_heads = 0; });
  refuse("head_dim_v", [](AdviseParams& p) { p.head_dim_v = -1; });
  refuse("dtype", [](AdviseParams& p) { p.dtype = DType::kInt8; });
  refuse("format", [](AdviseParams& p) { p.format = static_cast<CacheFormat>(77); });
  refuse("other_bytes", [](AdviseParams& p) { p.other_bytes = -1; });
  refuse("decode_target", [](AdviseParams& p) { p.decode_target = std::nan(""); });
  refuse("machine", [](AdviseParams& p) { p.machine = {}; });
  refuse("machine", [](AdviseParams& p) { p.machine.bf16 = p.machine.fp32 = 0; });
  refuse("machine", [](AdviseParams& p) { p.machine.workers = 0; });
  refuse("density", [](AdviseParams& p) {
    p.patterns = {{.kind = Kind::kBlocks}};
    p.patterns[0].density = 1.5;
  });
  refuse("window", [](AdviseParams& p) {
    p.patterns = {{.kind = Kind::kWindow}};
    p.patterns[0].window.window.left = -1;
  });
}

// A stride of up to a tile leaves no tile of a prefill unread; a wide one leaves most. Decode reads just what it sees.
TEST(Advise, StridedPrefillMultipliesWholeTiles) {
  AdviseParams params{.num_q_heads = 8, .num_kv_heads = 8, .seq_len = 65536};
  params.machine = {.bandwidth = 100e9, .fp32 = 1e12, .bf16 = 2e12};
  const auto ratio = [&](std::int64_t stride, Phase phase) {
    Pattern dense{.kind = Pattern::Kind::kFlash}, strided{.kind = Pattern::Kind::kStrided};
    strided.strided = {.width = 1024, .stride = stride};
    params.patterns = {strided};
    double operations[2] = {};
    for (const Cost& cost : advise(params).costs) {
      if (cost.phase != phase || cost.format != CacheFormat::kBf16) continue;
      if (cost.pattern.kind == dense.kind) operations[0] = cost.operations;
      if (cost.pattern.kind == strided.kind) operations[1] = cost.operations;
    }
    return operations[1] / operations[0];
  };
  EXPECT_DOUBLE_EQ(ratio(16, Phase::kPrefill), 1.0);
  EXPECT_DOUBLE_EQ(ratio(64, Phase::kPrefill), 1.0);
  EXPECT_NEAR(ratio(640, Phase::kPrefill), 0.13, 0.01);
  EXPECT_LT(ratio(64, Phase::kDecode), 0.04);
}

}  // namespace
}  // namespace heddle
