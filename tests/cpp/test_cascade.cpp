// decode_cascade: what its callers in C++ can get wrong, and that it is decode without prefixes. test_cascade.py has
// its results on random shapes.
#include <array>
#include <cmath>
#include <vector>

#include <gtest/gtest.h>

#include "heddle/heddle.h"

namespace heddle {
namespace {

// Two requests with two tokens each behind a prefix of three; every value of page p is p + 1, and all keys are alike.
struct Case {
  Case() : cache({.num_pages = 3, .page_size = 4, .num_kv_heads = 1, .head_dim = 2, .format = CacheFormat::kFp32}) {
    const std::vector<float> keys(3 * 4 * 2, 0.0f);
    std::vector<float> values;
    for (int page = 0; page < 3; ++page) values.insert(values.end(), 4 * 2, static_cast<float>(page + 1));
    const std::array<std::int32_t, 3> table = {0, 1, 2}, start = {0, 0, 0};
    std::array<std::int32_t, 3> end{};
    cache.append({keys.data(), DType::kFloat32, {3, 4, 1, 2}}, {values.data(), DType::kFloat32, {3, 4, 1, 2}},
                 {table.data(), DType::kInt32, {3, 1}}, {start.data(), DType::kInt32, {3}},
                 {end.data(), DType::kInt32, {3}});
    params.q = {q.data(), DType::kFloat32, {2, 1, 1, 2}};
    params.cache = &cache;
    params.block_table = {own.data(), DType::kInt32, {2, 1}};
    params.seq_lens = {own_lens.data(), DType::kInt32, {2}};
    params.out = {out.data(), DType::kFloat32, {2, 1, 1, 2}};
    params.lse = {lse.data(), DType::kFloat32, {2, 1, 1}};
    prefix = {.block_table = {shared.data(), DType::kInt32, {1, 1}},
              .seq_lens = {shared_lens.data(), DType::kInt32, {1}},
              .cu_requests = {cu.data(), DType::kInt32, {2}}};
  }

  std::array<float, 4> q{}, out{7, 7, 7, 7};
  std::array<float, 2> lse{};
  std::array<std::int32_t, 2> own{1, 2}, own_lens{2, 2}, cu{0, 2};
  std::array<std::int32_t, 1> shared{0}, shared_lens{3};
  KVCache cache;
  DecodeParams params;
  SharedPrefix prefix;

  void refused(const char* argument) {
    try {
      decode_cascade(params, std::array{prefix});
      ADD_FAILURE() << argument << " was taken";
    } catch (const Error& error) {
      EXPECT_EQ(error.code(), ErrorCode::kUnsupported);
      EXPECT_EQ(error.argument(), argument);
    }
    EXPECT_EQ(out[0], 7.0f);
  }
};

TEST(Cascade, IsTheMeanOfValuesWithEqualScores) {
  for (const Backend backend : {Backend::kHost, Backend::kReference}) {
    Case c;
    c.params.backend = backend;
    decode_cascade(c.params, std::array{c.prefix});
    for (int b = 0; b < 2; ++b) {
      EXPECT_NEAR(c.out[2 * b], (3.0 * 1 + 2.0 * (b + 2)) / 5, 1e-6);
      EXPECT_NEAR(c.lse[b], std::log(5.0), 1e-6);
    }
  }
}

TEST(Cascade, WithoutPrefixesIsDecode) {
  Case c;
  c.params.window = Window{0, 0};  // which decode takes
  EXPECT_THROW(decode_cascade(c.params, {}), Error);
  c.params.window.reset();
  decode_cascade(c.params, {});
  EXPECT_EQ(c.out, (std::array<float, 4>{2, 2, 3, 3}));
}

TEST(Cascade, RefusesWhatDependsOnThePosition) {
  Case window, selection, sampling, plan;
  window.params.window = Window{2, std::nullopt};
  window.refused("window");
  selection.params.selection = Selection::strided(1, 2);
  selection.refused("selection");
  sampling.params.sampling = Sampling{};
  sampling.refused("sampling");
  DecodePlan made;
  plan.params.plan = &made;
  plan.refused("plan");
}

}  // namespace
}  // namespace heddle
