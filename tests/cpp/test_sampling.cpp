// Philox, the names, and sampled decode from C++; tests/python/test_sampling.py compares it with its definition.
#include <cmath>
#include <cstdint>
#include <cstring>
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

// Random shapes, formats and masks on every instruction set, with poison in all memory that no query sees. Values are
// alike within a KV head, so that the output does not depend on the draws; lse is that of dense decode.
TEST(SampledShapes, WeightsAddUpAndPoisonStaysOut) {
  testing::Random random(7);
  const auto pick = [&](auto... options) {
    const std::int64_t all[] = {options...};
    return all[random.integer(0, static_cast<std::int64_t>(sizeof...(options)) - 1)];
  };
  for (int round = 0; round < 400; ++round) {
    SCOPED_TRACE(round);
    const std::vector<std::string> isas = available_host_isas();
    set_host_isa(isas[static_cast<std::size_t>(round) % isas.size()]);
    const auto format = static_cast<CacheFormat>(round % 7);
    const bool bernoulli = random.integer(0, 2) == 0;
    const std::int64_t batch = pick(1, 3), group = pick(1, 2, 3, 8, 16), kv_heads = pick(1, 2), queries = pick(1, 2, 5);
    const std::int64_t dim = pick(1, 17, 64, 100), dim_v = pick(1, 16, 33), page_size = pick(1, 7, 16, 64);
    const std::int64_t keys = pick(1, 63, 64, 200, 700), heads = group * kv_heads;
    const std::int64_t pages = (keys + page_size - 1) / page_size;
    KVCache cache({.num_pages = batch * pages,
                   .page_size = page_size,
                   .num_kv_heads = kv_heads,
                   .head_dim = dim,
                   .head_dim_v = dim_v,
                   .format = format,
                   .feature_major = bernoulli});
    const auto floats = [&](std::int64_t n) {
      std::vector<float> x(static_cast<std::size_t>(n));
      for (float& value : x) value = static_cast<float>(random.normal());
      return x;
    };
    std::vector<float> k = floats(batch * keys * kv_heads * dim), q = floats(batch * queries * heads * dim);
    std::vector<float> v(static_cast<std::size_t>(batch * keys * kv_heads * dim_v));
    for (std::size_t i = 0; i < v.size(); ++i)
      v[i] = static_cast<std::int64_t>(i) / dim_v % kv_heads == 0 ? 1.0f : -1.0f;
    std::vector<std::int32_t> table(static_cast<std::size_t>(batch * pages)), start(static_cast<std::size_t>(batch)),
        lens(start);
    std::iota(table.begin(), table.end(), 0);
    const auto view = [](auto& x, DType dtype, std::initializer_list<std::int64_t> shape) {
      return TensorView(x.data(), dtype, shape);
    };
    cache.append(view(k, DType::kFloat32, {batch, keys, kv_heads, dim}),
                 view(v, DType::kFloat32, {batch, keys, kv_heads, dim_v}), view(table, DType::kInt32, {batch, pages}),
                 view(start, DType::kInt32, {batch}), view(lens, DType::kInt32, {batch}));
    std::vector<float> out(static_cast<std::size_t>(batch * queries * heads * dim_v)),
        lse(static_cast<std::size_t>(batch * queries * heads)), dense_lse(lse);
    DecodeParams params{.q = view(q, DType::kFloat32, {batch, queries, heads, dim}),
                        .cache = &cache,
                        .block_table = view(table, DType::kInt32, {batch, pages}),
                        .seq_lens = view(lens, DType::kInt32, {batch}),
                        .out = view(out, DType::kFloat32, {batch, queries, heads, dim_v}),
                        .lse = view(dense_lse, DType::kFloat32, {batch, heads, queries}),
                        .backend = Backend::kHost,
                        .schedule = {.split_size = pick(0, 64, 128)}};
    const std::int64_t left = pick(0, 20, 150);
    if (left < 150) params.window = Window{.left = left, .right = 0};
    decode(params);
    const std::vector<float> dense = out;

    // Floats alone can hold poison. Keys before every query's window are seen by nobody.
    if (params.window && (format < CacheFormat::kInt8Baseline || format == CacheFormat::kFp8)) {
      for (std::int64_t b = 0; b < batch; ++b) {
        for (std::int64_t key = 0; key < keys - queries - left; ++key) {
          const TensorView parts[] = {cache.k(), cache.v()};
          for (const TensorView& part : parts) {
            const std::int64_t size = part.shape[3] * static_cast<std::int64_t>(size_of(part.dtype));
            for (std::int64_t h = 0; h < kv_heads; ++h) {
              const std::int64_t row = ((b * pages + key / page_size) * kv_heads + h) * page_size + key % page_size;
              std::memset(part.as<std::byte>() + row * size, 0xff, static_cast<std::size_t>(size));
            }
          }
          const TensorView by_feature = cache.k_by_feature();
          const auto element = static_cast<std::int64_t>(size_of(by_feature.dtype));
          for (std::int64_t d = 0; by_feature.given() && d < kv_heads * dim; ++d) {
            const std::int64_t at = ((b * pages + key / page_size) * kv_heads * dim + d) * page_size + key % page_size;
            std::memset(by_feature.as<std::byte>() + at * element, 0xff, static_cast<std::size_t>(element));
          }
        }
      }
    }
    params.lse = view(lse, DType::kFloat32, {batch, heads, queries});
    params.sampling = Sampling{.method = static_cast<SamplingMethod>(random.integer(0, 4)),
                               .seed = static_cast<std::uint64_t>(round),
                               .n_sink = pick(0, 3),
                               .n_recent = pick(0, 2),
                               .n_top = pick(0, 1, 9),
                               .bernoulli = bernoulli ? pick(1, 9, 127) : 0,
                               .bernoulli_stratified = round % 2 == 0};
    if (params.sampling->method != SamplingMethod::kExact) params.sampling->samples = pick(1, 5, 100);
    out.assign(out.size(), 7.0f);
    decode(params);
    // 1, -1, or 0 of a query that sees nothing; dense attention may round its probabilities to bf16.
    for (std::size_t i = 0; i < out.size(); ++i) ASSERT_NEAR(out[i], std::round(dense[i]), 1e-5) << i;
    for (std::size_t i = 0; !bernoulli && i < lse.size(); ++i) {
      if (std::isinf(dense_lse[i])) {
        ASSERT_EQ(lse[i], dense_lse[i]) << i;
      } else {
        ASSERT_NEAR(lse[i], dense_lse[i], 1e-4) << i;
      }
    }
  }
  set_host_isa("auto");
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
