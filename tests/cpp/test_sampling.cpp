// Philox, the names, and sampled decode from C++; tests/python/test_sampling.py compares it with its definition.
#include <cstdint>
#include <numeric>
#include <vector>

#include <gtest/gtest.h>

#include "aggregate/philox.h"
#include "heddle/heddle.h"
#include "support/random.h"

namespace heddle {
namespace {

using Words = std::array<std::uint32_t, 4>;

// Random123's published vectors (kat_vectors, "philox4x32 10").
static_assert(aggregate::philox({0, 0, 0, 0}, {0, 0}) == Words{0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8});
static_assert(aggregate::philox({~0u, ~0u, ~0u, ~0u}, {~0u, ~0u}) ==
              Words{0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd});
static_assert(aggregate::philox({0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344}, {0xa4093822, 0x299f31d0}) ==
              Words{0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1});

TEST(Sampling, NamesGoBothWays) {
  for (const auto method : {SamplingMethod::kExact, SamplingMethod::kIid, SamplingMethod::kStratified,
                            SamplingMethod::kSystematic, SamplingMethod::kSystematicTile}) {
    EXPECT_EQ(sampling_method_from_string(to_string(method)), method);
  }
  EXPECT_THROW(sampling_method_from_string("prop"), Error);
}

class SampledDecode : public ::testing::Test {
 protected:
  static constexpr std::int64_t kKeys = 300, kHeads = 4, kKvHeads = 2, kDim = 16;

  SampledDecode()
      : cache_({.num_pages = 32,
                .page_size = 16,
                .num_kv_heads = kKvHeads,
                .head_dim = kDim,
                .format = CacheFormat::kFp32}) {
    std::iota(pages_.begin(), pages_.end(), 0);
    testing::Random random(1);
    for (auto* x : {&k_, &v_, &q_}) {
      for (float& value : *x) value = static_cast<float>(random.normal());
    }
    cache_.append(TensorView(k_.data(), DType::kFloat32, {1, kKeys, kKvHeads, kDim}),
                  TensorView(v_.data(), DType::kFloat32, {1, kKeys, kKvHeads, kDim}), params().block_table,
                  TensorView(start_.data(), DType::kInt32, {1}), params().seq_lens);
  }
  DecodeParams params() {
    return {.q = TensorView(q_.data(), DType::kFloat32, {1, 1, kHeads, kDim}),
            .cache = &cache_,
            .block_table = TensorView(pages_.data(), DType::kInt32, {1, 32}),
            .seq_lens = TensorView(lens_.data(), DType::kInt32, {1}),
            .out = TensorView(out_.data(), DType::kFloat32, {1, 1, kHeads, kDim})};
  }
  std::vector<float> run(const DecodeParams& params) {
    decode(params);
    return out_;
  }

  KVCache cache_;
  std::vector<std::int32_t> pages_ = std::vector<std::int32_t>(32), start_{0}, lens_{0};
  std::vector<float> k_ = std::vector<float>(kKeys * kKvHeads * kDim), v_ = k_, q_ = std::vector<float>(kHeads * kDim),
                     out_ = q_;
};

TEST_F(SampledDecode, KeepingEveryKeyIsDenseAttention) {
  const std::vector<float> dense = run(params());
  DecodeParams sampled = params();
  sampled.sampling = Sampling{.method = SamplingMethod::kIid, .samples = 4, .n_recent = kKeys};
  const std::vector<float> all = run(sampled);
  for (std::size_t i = 0; i < dense.size(); ++i) EXPECT_NEAR(all[i], dense[i], 1e-5);
}

TEST_F(SampledDecode, CountsWhatItReads) {
  std::vector<std::int64_t> rows(kKvHeads, -1), features(kKvHeads, -1);
  DecodeParams sampled = params();
  sampled.sampling = Sampling{.samples = 8};
  sampled.reads = {.v_rows = TensorView(rows.data(), DType::kInt64, {1, kKvHeads}),
                   .k_features = TensorView(features.data(), DType::kInt64, {1, kKvHeads})};
  run(sampled);
  for (int h = 0; h < kKvHeads; ++h) {
    EXPECT_GE(rows[h], 1);
    EXPECT_LE(rows[h], 8 * kHeads / kKvHeads);
    EXPECT_EQ(features[h], kKeys * kDim);
  }
}

TEST_F(SampledDecode, TheOffsetIsReadAtEveryCall) {
  std::int32_t step = 5;
  DecodeParams sampled = params();
  sampled.sampling = Sampling{.samples = 8, .offset = 2, .offset_at = TensorView(&step, DType::kInt32, {1})};
  const std::vector<float> first = run(sampled);
  step = 6;
  EXPECT_NE(run(sampled), first);
  step = 0;
  sampled.sampling->offset = 7;
  EXPECT_EQ(run(sampled), first);
}

TEST_F(SampledDecode, RefusesBeforeItWrites) {
  const auto refused = [&](const DecodeParams& p, std::string_view argument) {
    out_.assign(out_.size(), 7.0f);
    try {
      decode(p);
      ADD_FAILURE() << argument << " was accepted";
    } catch (const Error& error) {
      EXPECT_EQ(error.argument(), argument) << error.what();
    }
    EXPECT_EQ(out_, std::vector<float>(out_.size(), 7.0f));
  };
  const auto with = [&](const Sampling& sampling) {
    DecodeParams p = params();
    p.sampling = sampling;
    return p;
  };
  refused(with({.samples = 0}), "samples");
  refused(with({.method = static_cast<SamplingMethod>(77), .samples = 1}), "method");
  refused(with({.samples = 1, .n_top = -1}), "n_top");
  refused(with({.samples = 1, .bernoulli = 500}), "bernoulli");
  refused(with({.samples = 1, .bernoulli = 5}), "cache");
  float offset = 0;
  refused(with({.samples = 1, .offset_at = TensorView(&offset, DType::kFloat32, {1})}), "offset");
  std::vector<std::int64_t> counts(kKvHeads);
  DecodeParams p = params();
  p.reads.v_rows = TensorView(counts.data(), DType::kInt64, {1, kKvHeads});
  refused(p, "v_rows");
  p.sampling = Sampling{.samples = 1};
  p.reads.v_rows = TensorView(counts.data(), DType::kInt64, {kKvHeads});
  refused(p, "v_rows");
}

}  // namespace
}  // namespace heddle
