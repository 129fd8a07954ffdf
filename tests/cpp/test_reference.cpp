// The oracle against results worked out by hand, and identities that hold for every backend.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <numbers>
#include <string>
#include <vector>

#include <gtest/gtest.h>

#include "core/numeric.h"
#include "heddle/heddle.h"

namespace heddle {
namespace {

constexpr double kInf = std::numeric_limits<double>::infinity();
constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();

// One request of float64 with D = Dv = 1: q [1, Sq, Hq, 1], k and v [1, Sk, Hkv, 1], token by token.
struct Tiny {
  std::vector<double> q, k, v;
  std::int64_t q_heads = 1, kv_heads = 1;
  std::vector<double> out, lse;
  AttentionParams p;

  Tiny(std::vector<double> q_, std::vector<double> k_, std::vector<double> v_, std::int64_t q_heads_ = 1,
       std::int64_t kv_heads_ = 1)
      : q(std::move(q_)), k(std::move(k_)), v(std::move(v_)), q_heads(q_heads_), kv_heads(kv_heads_) {}

  void run(Backend backend = Backend::kReference) {
    const auto q_len = static_cast<std::int64_t>(q.size()) / q_heads;
    const auto kv_len = static_cast<std::int64_t>(k.size()) / kv_heads;
    out.assign(q.size(), kNaN);
    lse.assign(q.size(), kNaN);
    p.q = {q.data(), DType::kFloat64, {1, q_len, q_heads, 1}};
    p.k = {k.data(), DType::kFloat64, {1, kv_len, kv_heads, 1}};
    p.v = {v.data(), DType::kFloat64, {1, kv_len, kv_heads, 1}};
    p.out = {out.data(), DType::kFloat64, {1, q_len, q_heads, 1}};
    p.lse = {lse.data(), DType::kFloat64, {1, q_heads, q_len}};
    p.backend = backend;
    attention(p);
  }
};

const double kLn3 = std::log(3.0), kLn4 = std::log(4.0);

void expect_near(const std::vector<double>& got, const std::vector<double>& expected, double tolerance = 1e-14) {
  ASSERT_EQ(got.size(), expected.size());
  for (std::size_t i = 0; i < got.size(); ++i) {
    if (std::isinf(expected[i])) {
      EXPECT_EQ(got[i], expected[i]) << "element " << i;
    } else {
      EXPECT_NEAR(got[i], expected[i], tolerance) << "element " << i;
    }
  }
}

TEST(Reference, OneKeyIsItsValue) {
  Tiny tiny({2.0}, {3.0}, {5.0});
  tiny.run();
  expect_near(tiny.out, {5.0});
  expect_near(tiny.lse, {6.0});
}

TEST(Reference, WeightsOneToThree) {
  Tiny tiny({1.0}, {0.0, kLn3}, {10.0, 20.0});
  tiny.run();
  expect_near(tiny.out, {17.5});
  expect_near(tiny.lse, {kLn4});
}

TEST(Reference, ScaleMultipliesScores) {
  Tiny tiny({0.25}, {0.0, kLn3}, {10.0, 20.0});
  tiny.p.scale = 4.0;
  tiny.run();
  expect_near(tiny.out, {17.5});
}

TEST(Reference, DefaultScaleIsOneOverRootD) {
  std::vector<double> q = {1.0, 1.0, 1.0, 1.0}, k = q, v = {1.0}, out(1), lse(1);
  attention({.q = {q.data(), DType::kFloat64, {1, 1, 1, 4}},
             .k = {k.data(), DType::kFloat64, {1, 1, 1, 4}},
             .v = {v.data(), DType::kFloat64, {1, 1, 1, 1}},
             .out = {out.data(), DType::kFloat64, {1, 1, 1, 1}},
             .lse = {lse.data(), DType::kFloat64, {1, 1, 1}},
             .backend = Backend::kReference});
  expect_near(lse, {2.0});
}

TEST(Reference, SinkTakesWeightOnly) {
  Tiny tiny({1.0}, {0.0, kLn3}, {10.0, 20.0});
  const float sink = static_cast<float>(kLn4);
  tiny.p.sinks = {&sink, DType::kFloat32, {1}};
  tiny.run();
  expect_near(tiny.out, {8.75}, 1e-6);
  expect_near(tiny.lse, {std::log(8.0)}, 1e-6);
}

TEST(Reference, SoftcapSquashesScores) {
  // 2 tanh(s / 2) of s = 0 and s = ln 9: 0 and 2 (9 - 1) / (9 + 1) = 1.6
  Tiny tiny({1.0}, {0.0, std::log(9.0)}, {0.0, 1.0});
  tiny.p.softcap = 2.0;
  tiny.run();
  const double weight = std::exp(1.6);
  expect_near(tiny.out, {weight / (1.0 + weight)});
  expect_near(tiny.lse, {std::log(1.0 + weight)});
}

TEST(Reference, LargeScoresDoNotOverflow) {
  Tiny tiny({1000.0}, {1.0, 1.0, -1.0}, {3.0, 5.0, 7.0});
  tiny.run();
  expect_near(tiny.out, {4.0});
  expect_near(tiny.lse, {1000.0 + std::numbers::ln2});
}

TEST(Reference, QueryHeadsReadTheirGroupsKeys) {
  // Six query heads over two KV heads: three each. k and v [token][head].
  Tiny tiny({0, 0, 0, 0, 0, 0}, {0, 0, 0, 0}, {1, 100, 3, 300}, 6, 2);
  tiny.run();
  expect_near(tiny.out, {2, 2, 2, 200, 200, 200});
}

// With equal scores and v_j = 2^j, out * count is the set of keys that a row sees, as a bit mask, and lse the log of
// its size.
struct Sets : Tiny {
  Sets(std::int64_t q_len, std::int64_t kv_len)
      : Tiny(std::vector<double>(static_cast<std::size_t>(q_len)),
             std::vector<double>(static_cast<std::size_t>(kv_len)), {}) {
    for (std::int64_t j = 0; j < kv_len; ++j) v.push_back(std::ldexp(1.0, static_cast<int>(j)));
  }
  // One "0110..." a query: character j stands for key j.
  std::vector<std::string> seen() {
    run();
    std::vector<std::string> rows;
    for (std::size_t i = 0; i < out.size(); ++i) {
      const double count = std::round(std::exp(lse[i]));
      const auto bits = static_cast<std::uint64_t>(std::llround(out[i] * count));
      std::string& row = rows.emplace_back();
      for (std::size_t j = 0; j < k.size(); ++j) row += (bits >> j & 1) != 0 ? '1' : '0';
      EXPECT_EQ(std::count(row.begin(), row.end(), '1'), static_cast<std::ptrdiff_t>(count));
    }
    return rows;
  }
};

using Rows = std::vector<std::string>;

TEST(ReferenceMask, Everything) { EXPECT_EQ(Sets(2, 3).seen(), (Rows{"111", "111"})); }

TEST(ReferenceMask, CausalIsAlignedToTheBottomRight) {
  Sets more_keys(2, 4);
  more_keys.p.causal = true;
  EXPECT_EQ(more_keys.seen(), (Rows{"1110", "1111"}));
  Sets more_queries(4, 2);
  more_queries.p.causal = true;
  EXPECT_EQ(more_queries.seen(), (Rows{"00", "00", "10", "11"}));
  EXPECT_EQ(more_queries.out[0], 0.0);
  EXPECT_EQ(more_queries.lse[0], -kInf);
}

TEST(ReferenceMask, Window) {
  Sets sets(2, 5);  // at positions 3 and 4
  sets.p.window = Window{1, 0};
  EXPECT_EQ(sets.seen(), (Rows{"00110", "00011"}));
  sets.p.window = Window{{}, 0};
  EXPECT_EQ(sets.seen(), (Rows{"11110", "11111"}));
  sets.p.window = Window{0, {}};
  EXPECT_EQ(sets.seen(), (Rows{"00011", "00001"}));
  Sets square(4, 4);
  square.p.window = Window{1, 1};
  EXPECT_EQ(square.seen(), (Rows{"1100", "1110", "0111", "0011"}));
}

TEST(ReferenceMask, WindowWithGlobalTokens) {
  Sets sets(6, 6);
  sets.p.causal = true;
  sets.p.selection = Selection::window(1, 0, 2);
  EXPECT_EQ(sets.seen(), (Rows{"100000", "110000", "111000", "111100", "110110", "110011"}));
}

TEST(ReferenceMask, Strided) {
  Sets sets(7, 7);
  sets.p.causal = true;
  sets.p.selection = Selection::strided(2, 3);
  EXPECT_EQ(sets.seen(), (Rows{"1000000", "1100000", "0110000", "1011000", "0101100", "0010110", "1001011"}));
}

TEST(ReferenceMask, HugeNumbersAreUnbounded) {
  constexpr std::int64_t kHuge = std::numeric_limits<std::int64_t>::max();
  Sets sets(2, 3);
  sets.p.window = Window{kHuge, kHuge};
  for (const Selection& selection : {Selection::window(kHuge, kHuge, kHuge), Selection::strided(kHuge, 1)}) {
    sets.p.selection = selection;
    EXPECT_EQ(sets.seen(), (Rows{"111", "111"}));
  }
  sets.p.selection = Selection::strided(0, kHuge);
  EXPECT_EQ(sets.seen(), (Rows{"011", "001"}));  // i - j < 0, too
}

TEST(ReferenceMask, BlocksCountFromTheFirstToken) {
  const std::vector<std::uint8_t> mask = {1, 0, 1, 0, 1, 0};  // [2, 3]
  Sets sets(3, 5);
  sets.p.selection = Selection::block_mask({mask.data(), DType::kBool, {2, 3}}, 2, 2);
  EXPECT_EQ(sets.seen(), (Rows{"11001", "11001", "00110"}));
  sets.p.causal = true;
  EXPECT_EQ(sets.seen(), (Rows{"11000", "11000", "00110"}));
}

TEST(ReferenceMask, TokenLists) {
  const std::vector<std::int32_t> indices = {0, 2, 4, -1};
  Sets sets(2, 5);
  sets.p.selection = Selection::tokens({indices.data(), DType::kInt32, {1, 1, 4}});
  EXPECT_EQ(sets.seen(), (Rows{"10101", "10101"}));
  sets.p.causal = true;
  EXPECT_EQ(sets.seen(), (Rows{"10100", "10101"}));

  const std::vector<std::int32_t> per_query = {1, 3, 99, 0, 99, 99}, lengths = {2, 1};
  sets.p.selection =
      Selection::tokens({per_query.data(), DType::kInt32, {1, 2, 1, 3}}, {lengths.data(), DType::kInt32, {1, 2, 1}});
  EXPECT_EQ(sets.seen(), (Rows{"01010", "10000"}));
}

TEST(Reference, WhatNobodySeesMayBeNaN) {
  Tiny tiny({1.0}, {kNaN, 0.0, kLn3}, {kNaN, 10.0, 20.0});
  tiny.p.selection = Selection::window(1, 0);
  tiny.run();
  expect_near(tiny.out, {17.5});
  // What is seen shows.
  tiny.p.selection = {};
  tiny.run();
  EXPECT_TRUE(std::isnan(tiny.out[0]));
}

TEST(Reference, Int8ScalesAndMean) {
  // k = 2 * (0.5, 0.25 by partition) + mean 1: 0.5 * 4 + 1 = 3, 0.25 * -8 + 1 = -1. v = 10 * 0.1, 20 * 0.1.
  std::vector<float> q = {0.5f}, k_scale = {0.5f, 0.25f}, k_mean = {1.0f}, v_scale = {0.1f};
  std::vector<std::int8_t> k = {4, -8}, v = {10, 20};
  std::vector<double> out(1), lse(1);
  AttentionParams p{.q = {q.data(), DType::kFloat32, {1, 1, 1, 1}},
                    .k = {k.data(), DType::kInt8, {1, 2, 1, 1}},
                    .v = {v.data(), DType::kInt8, {1, 2, 1, 1}},
                    .out = {out.data(), DType::kFloat64, {1, 1, 1, 1}},
                    .lse = {lse.data(), DType::kFloat64, {1, 1, 1}},
                    .backend = Backend::kReference};
  p.k_scales = {{k_scale.data(), DType::kFloat32, {1, 2, 1}}, 1, {k_mean.data(), DType::kFloat32, {1, 1, 1}}};
  p.v_scales.scale = {v_scale.data(), DType::kFloat32, {1}};
  attention(p);
  const double a = std::exp(1.5), b = std::exp(-0.5);
  expect_near(lse, {std::log(a + b)}, 1e-12);
  expect_near(out, {(1.0 * a + 2.0 * b) / (a + b)}, 1e-7);
}

TEST(Reference, PackedRequestsDoNotSeeEachOther) {
  std::vector<double> q = {0, 0, 0}, k = {0, 0, 0, 0, 0}, v = {1, 2, 4, 8, 16}, out(3), lse(3);
  const std::vector<std::int32_t> cu_q = {0, 1, 1, 3}, cu_k = {0, 2, 3, 5};
  attention({.q = {q.data(), DType::kFloat64, {3, 1, 1}},
             .k = {k.data(), DType::kFloat64, {5, 1, 1}},
             .v = {v.data(), DType::kFloat64, {5, 1, 1}},
             .out = {out.data(), DType::kFloat64, {3, 1, 1}},
             .lse = {lse.data(), DType::kFloat64, {1, 3}},
             .causal = true,
             .cu_seqlens_q = {cu_q.data(), DType::kInt32, {4}},
             .cu_seqlens_k = {cu_k.data(), DType::kInt32, {4}},
             .backend = Backend::kReference});
  expect_near(out, {1.5, 8.0, 12.0});
  expect_near(lse, {std::numbers::ln2, 0.0, std::numbers::ln2});
}

// A cache of pages of 2 tokens, one head, D = 2.
struct Paged {
  KVCache cache;
  std::vector<std::int32_t> table = {2, 0}, seq_lens = {3}, start = {0};
  std::vector<float> k = {0, 1, 0, 2, 0, 3}, v = {1, 0, 2, 0, 4, 0}, q = {0, 0};
  std::vector<double> out = std::vector<double>(2), lse = std::vector<double>(1);
  explicit Paged(CacheFormat format)
      : cache({.num_pages = 3, .page_size = 2, .num_kv_heads = 1, .head_dim = 2, .format = format, .device = {}}) {}
  void run() {
    const TensorView table_view(table.data(), DType::kInt32, {1, 2});
    cache.append({k.data(), DType::kFloat32, {1, 3, 1, 2}}, {v.data(), DType::kFloat32, {1, 3, 1, 2}}, table_view,
                 {start.data(), DType::kInt32, {1}}, {seq_lens.data(), DType::kInt32, {1}});
    decode({.q = {q.data(), DType::kFloat32, {1, 1, 1, 2}},
            .cache = &cache,
            .block_table = table_view,
            .seq_lens = {seq_lens.data(), DType::kInt32, {1}},
            .out = {out.data(), DType::kFloat64, {1, 1, 1, 2}},
            .lse = {lse.data(), DType::kFloat64, {1, 1, 1}},
            .scale = 1.0,
            .backend = Backend::kReference});
  }
};

TEST(Reference, PagedKeysFollowTheTable) {
  Paged paged(CacheFormat::kFp32);
  paged.q = {0, static_cast<float>(std::numbers::ln2)};
  paged.run();
  // weights 2, 4, 8
  expect_near(paged.out, {(1.0 * 2 + 2.0 * 4 + 4.0 * 8) / 14.0, 0.0}, 1e-6);
  expect_near(paged.lse, {std::log(14.0)}, 1e-6);
}

TEST(Reference, Int8CachesQuantizeTheQuery) {
  // q = (1, 0.3) by its own maximum: steps of 1/127, 0.3 * 127 = 38.1 -> 38. k in steps of 3/127: 1, 2, 3 -> 42
  // (42.33), 85 (84.67), 127. v in steps of 4/127: 1, 2, 4 -> 32 (31.75), 64 (63.5, to even), 127.
  Paged paged(CacheFormat::kInt8B);
  paged.q = {1.0f, 0.3f};
  paged.run();
  const double q = 38.0 / 127.0, k = 3.0 / 127.0, v = 4.0 / 127.0;
  const double w0 = std::exp(q * 42 * k), w1 = std::exp(q * 85 * k), w2 = std::exp(q * 127 * k);
  expect_near(paged.lse, {std::log(w0 + w1 + w2)}, 1e-6);
  expect_near(paged.out, {v * (32 * w0 + 64 * w1 + 127 * w2) / (w0 + w1 + w2), 0.0}, 1e-6);
}

// Attention over all keys is the merge of attention over disjoint sets of them.
class MergeOfParts : public ::testing::TestWithParam<Backend> {};

TEST_P(MergeOfParts, IsAttentionOverAll) {
  constexpr std::int64_t kBatch = 2, kQueries = 3, kKeys = 40, kHeads = 4, kDim = 8, kParts = 3;
  constexpr std::int64_t kEnds[kParts] = {1, 23, 40};
  const auto fill = [](std::vector<float>& x) {
    for (std::size_t i = 0; i < x.size(); ++i) x[i] = std::sin(0.7f * static_cast<float>(i * i % 101));
  };
  std::vector<float> q(kBatch * kQueries * kHeads * kDim), k(kBatch * kKeys * 2 * kDim), v(k.size());
  fill(q);
  fill(k);
  std::reverse_copy(k.begin(), k.end(), v.begin());
  std::vector<float> whole(q.size()), whole_lse(kBatch * kHeads * kQueries), parts(kParts * whole.size()),
      part_lses(kParts * whole_lse.size()), merged(whole.size()), merged_lse(whole_lse.size());
  const auto run = [&](std::int64_t begin, std::int64_t end, float* out, float* lse) {
    AttentionParams p{.q = {q.data(), DType::kFloat32, {kBatch, kQueries, kHeads, kDim}},
                      .k = {k.data() + begin * 2 * kDim, DType::kFloat32, {kBatch, kKeys, 2, kDim}},
                      .v = {v.data() + begin * 2 * kDim, DType::kFloat32, {kBatch, kKeys, 2, kDim}},
                      .out = {out, DType::kFloat32, {kBatch, kQueries, kHeads, kDim}},
                      .lse = {lse, DType::kFloat32, {kBatch, kHeads, kQueries}},
                      .softcap = 1.5,
                      .scale = 2.0,
                      .backend = GetParam()};
    p.k.shape[1] = p.v.shape[1] = end - begin;
    attention(p);
  };
  run(0, kKeys, whole.data(), whole_lse.data());
  for (std::int64_t part = 0; part < kParts; ++part) {
    run(part == 0 ? 0 : kEnds[part - 1], kEnds[part], parts.data() + part * std::ssize(whole),
        part_lses.data() + part * std::ssize(whole_lse));
  }
  merge({.outs = {parts.data(), DType::kFloat32, {kParts, kBatch, kQueries, kHeads, kDim}},
         .lses = {part_lses.data(), DType::kFloat32, {kParts, kBatch, kHeads, kQueries}},
         .out = {merged.data(), DType::kFloat32, {kBatch, kQueries, kHeads, kDim}},
         .lse = {merged_lse.data(), DType::kFloat32, {kBatch, kHeads, kQueries}},
         .backend = GetParam()});
  for (std::size_t i = 0; i < whole.size(); ++i) EXPECT_NEAR(merged[i], whole[i], 1e-6) << i;
  for (std::size_t i = 0; i < whole_lse.size(); ++i) EXPECT_NEAR(merged_lse[i], whole_lse[i], 2e-6) << i;
}

INSTANTIATE_TEST_SUITE_P(Backends, MergeOfParts, ::testing::Values(Backend::kReference, Backend::kHost),
                         [](const auto& backend) { return std::string(to_string(backend.param)); });

// Two parts of one row of width 1.
struct TwoParts {
  std::vector<double> outs, lses, out = {7.0}, lse = {7.0};
  void run() {
    const auto parts = static_cast<std::int64_t>(outs.size());
    merge({.outs = {outs.data(), DType::kFloat64, {parts, 1, 1, 1}},
           .lses = {lses.data(), DType::kFloat64, {parts, 1, 1}},
           .out = {out.data(), DType::kFloat64, {1, 1, 1}},
           .lse = {lse.data(), DType::kFloat64, {1, 1}},
           .backend = Backend::kReference});
  }
};

TEST(ReferenceMerge, WeighsByTheDenominators) {
  TwoParts two{.outs = {10.0, 20.0}, .lses = {0.0, kLn3}};
  two.run();
  expect_near(two.out, {17.5});
  expect_near(two.lse, {kLn4});
}

TEST(ReferenceMerge, PartsThatSawNothingDoNotCount) {
  TwoParts two{.outs = {kNaN, 20.0}, .lses = {-kInf, 5.0}};
  two.run();
  expect_near(two.out, {20.0});
  expect_near(two.lse, {5.0});
  TwoParts none{.outs = {kNaN, kNaN}, .lses = {-kInf, -kInf}};
  none.run();
  EXPECT_EQ(none.out[0], 0.0);
  EXPECT_EQ(none.lse[0], -kInf);
}

TEST(ReferenceMerge, IsAssociative) {
  const std::vector<double> outs = {1.0, -2.0, 5.0}, lses = {700.0, 701.5, 698.0};
  TwoParts all{.outs = outs, .lses = lses};
  all.run();
  TwoParts first{.outs = {outs[0], outs[1]}, .lses = {lses[0], lses[1]}};
  first.run();
  TwoParts second{.outs = {first.out[0], outs[2]}, .lses = {first.lse[0], lses[2]}};
  second.run();
  expect_near(second.out, all.out, 1e-13);
  expect_near(second.lse, all.lse, 1e-12);
}

}  // namespace
}  // namespace heddle
