// The host's merge against the oracle, and what both must do with parts that hold nothing.
#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include <gtest/gtest.h>

#include "core/kernels.h"
#include "core/numeric.h"
#include "heddle/backend.h"

namespace heddle {
namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

// A tensor whose axes lie in memory in any order, with gaps; the last axis is contiguous.
struct Tensor {
  std::vector<std::byte> memory;
  TensorView view;

  Tensor(DType dtype, const std::vector<std::int64_t>& shape, std::mt19937& rng) {
    view.dtype = dtype;
    view.rank = static_cast<int>(shape.size());
    std::vector<int> order(shape.size() - 1);
    std::iota(order.begin(), order.end(), 0);
    std::shuffle(order.begin(), order.end(), rng);
    order.push_back(view.rank - 1);
    std::int64_t stride = 1;
    for (auto axis = order.rbegin(); axis != order.rend(); ++axis) {
      view.shape[*axis] = shape[*axis];
      view.strides[*axis] = stride;
      stride = stride * shape[*axis] + static_cast<std::int64_t>(rng() % 3);
    }
    memory.assign(static_cast<std::size_t>(stride) * size_of(dtype), std::byte{0xff});  // NaN in every dtype
    view.data = memory.data();
  }
  std::int64_t offset(const std::array<std::int64_t, 5>& index) const {
    std::int64_t at = 0;
    for (int i = 0; i < view.rank; ++i) at += index[i] * view.strides[i];
    return at;
  }
  double get(const std::array<std::int64_t, 5>& index) const {
    return load_as_double(view.data, view.dtype, offset(index));
  }
  void set(const std::array<std::int64_t, 5>& index, double x) {
    store_from_double(view.data, view.dtype, offset(index), x);
  }
};

struct Shape {
  std::int64_t parts, batch, tokens, heads, dim;
};

struct Merge {
  Shape shape;
  Tensor outs, lses, out, lse;

  Merge(const Shape& s, DType dtype, std::mt19937& rng)
      : shape(s),
        outs(dtype, {s.parts, s.batch, s.tokens, s.heads, s.dim}, rng),
        lses(DType::kFloat32, {s.parts, s.batch, s.heads, s.tokens}, rng),
        out(dtype, {s.batch, s.tokens, s.heads, s.dim}, rng),
        lse(DType::kFloat32, {s.batch, s.heads, s.tokens}, rng) {}
  MergeProblem problem() { return {outs.view, lses.view, out.view, lse.view, {}}; }
  template <class Fn>
  void for_rows(Fn&& fn) const {
    for (std::int64_t b = 0; b < shape.batch; ++b) {
      for (std::int64_t s = 0; s < shape.tokens; ++s) {
        for (std::int64_t h = 0; h < shape.heads; ++h) fn(b, s, h);
      }
    }
  }
};

// Random parts; a third of them see nothing and hold NaN.
Merge random_merge(const Shape& shape, DType dtype, std::mt19937& rng) {
  Merge m(shape, dtype, rng);
  std::normal_distribution<double> normal;
  m.for_rows([&](std::int64_t b, std::int64_t s, std::int64_t h) {
    for (std::int64_t p = 0; p < shape.parts; ++p) {
      const bool empty = rng() % 3 == 0;
      m.lses.set({p, b, h, s}, empty ? -kInf : 5 * normal(rng));
      for (std::int64_t d = 0; d < shape.dim; ++d) m.outs.set({p, b, s, h, d}, empty ? kNaN : normal(rng));
    }
  });
  return m;
}

template <class Fn>
void on_every_host(Fn&& fn) {
  for (const std::string& isa : available_host_isas()) {
    for (const int threads : {1, 3}) {
      SCOPED_TRACE(isa + ", threads " + std::to_string(threads));
      set_host_isa(isa);
      set_num_threads(threads);
      fn(threads);
    }
  }
  set_host_isa("auto");
  set_num_threads(0);
}

TEST(Merge, EqualsTheOracle) {
  const std::vector<Shape> shapes = {{1, 1, 1, 1, 1},   {2, 2, 3, 4, 64},   {5, 1, 7, 3, 33},  {3, 2, 1, 8, 300},
                                     {17, 1, 2, 2, 96}, {4, 1, 200, 4, 64}, {64, 2, 1, 4, 128}};
  on_every_host([&](int) {
    std::mt19937 rng(7);
    for (const Shape& shape : shapes) {
      for (const DType dtype : {DType::kFloat32, DType::kBFloat16, DType::kFloat16}) {
        Merge m = random_merge(shape, dtype, rng);
        Merge want = m;
        for (Tensor* t : {&want.outs, &want.lses, &want.out, &want.lse}) t->view.data = t->memory.data();
        host::merge(m.problem());
        reference::merge(want.problem());
        const double unit = dtype == DType::kFloat32 ? 1e-6 : dtype == DType::kFloat16 ? 0x1p-11 : 0x1p-8;
        m.for_rows([&](std::int64_t b, std::int64_t s, std::int64_t h) {
          const double lse = want.lse.get({b, h, s});
          if (std::isinf(lse)) {
            ASSERT_EQ(m.lse.get({b, h, s}), lse);
          } else {
            ASSERT_NEAR(m.lse.get({b, h, s}), lse, 2e-6 * std::max(1.0, std::fabs(lse)));
          }
          for (std::int64_t d = 0; d < shape.dim; ++d) {
            const double x = want.out.get({b, s, h, d});
            ASSERT_NEAR(m.out.get({b, s, h, d}), x, unit * std::max(1.0, std::fabs(x)));
          }
        });
        // Nothing but the rows was written.
        m.for_rows([&](std::int64_t b, std::int64_t s, std::int64_t h) {
          for (std::int64_t d = 0; d < shape.dim; ++d) {
            std::memset(m.out.memory.data() + m.out.offset({b, s, h, d}) * static_cast<std::int64_t>(size_of(dtype)),
                        0xff, size_of(dtype));
          }
        });
        EXPECT_TRUE(
            std::all_of(m.out.memory.begin(), m.out.memory.end(), [](std::byte x) { return x == std::byte{0xff}; }));
      }
    }
  });
}

TEST(Merge, BitsDoNotDependOnThreads) {
  std::mt19937 rng(3);
  Merge m = random_merge({6, 2, 300, 4, 80}, DType::kFloat32, rng);
  set_num_threads(1);
  host::merge(m.problem());
  const std::vector<std::byte> out = m.out.memory, lse = m.lse.memory;
  for (const int threads : {2, 5, 16}) {
    std::fill(m.out.memory.begin(), m.out.memory.end(), std::byte{0xff});
    set_num_threads(threads);
    host::merge(m.problem());
    EXPECT_EQ(m.out.memory, out);
    EXPECT_EQ(m.lse.memory, lse);
  }
  set_num_threads(0);
}

// One row, Dv = 3, from (lse, value of every column) a part.
std::pair<float, float> merge_parts(const std::vector<std::pair<float, float>>& parts) {
  std::mt19937 rng(1);
  const auto n = static_cast<std::int64_t>(parts.size());
  Merge m({n, 1, 1, 1, 3}, DType::kFloat32, rng);
  for (std::int64_t p = 0; p < n; ++p) {
    m.lses.set({p, 0, 0, 0}, parts[p].first);
    for (std::int64_t d = 0; d < 3; ++d) m.outs.set({p, 0, 0, 0, d}, parts[p].second);
  }
  host::merge(m.problem());
  const auto bits = [&](std::int64_t d) { return float_bits(static_cast<float>(m.out.get({0, 0, 0, d}))); };
  EXPECT_EQ(bits(0), bits(2));
  return {static_cast<float>(m.lse.get({0, 0, 0})), static_cast<float>(m.out.get({0, 0, 0, 0}))};
}

TEST(Merge, PartsThatSeeNothing) {
  on_every_host([](int) {
    using Result = std::pair<float, float>;
    EXPECT_EQ(merge_parts({{-kInf, kNaN}}), Result(-kInf, 0.0f));
    EXPECT_EQ(merge_parts({{-kInf, kNaN}, {-kInf, kInf}, {-kInf, 1.0f}}), Result(-kInf, 0.0f));
    EXPECT_EQ(merge_parts({{-kInf, kNaN}, {2.5f, 0.1f}, {-kInf, kInf}}), Result(2.5f, 0.1f));
    // A single part comes through unchanged, however large or small.
    EXPECT_EQ(merge_parts({{1e30f, 3e38f}}), Result(1e30f, 3e38f));
    EXPECT_EQ(merge_parts({{-1e30f, -1e-30f}}), Result(-1e30f, -1e-30f));
    // A part whose weight is zero in float32 does not put its infinities into the row.
    EXPECT_EQ(merge_parts({{0.0f, 1.0f}, {-500.0f, kInf}}), Result(0.0f, 1.0f));
  });
}

TEST(Merge, InfiniteAndNaNLses) {
  on_every_host([](int) {
    using Result = std::pair<float, float>;
    EXPECT_EQ(merge_parts({{kInf, 2.0f}, {3.0f, 7.0f}}), Result(kInf, 2.0f));
    EXPECT_EQ(merge_parts({{kInf, 2.0f}, {-kInf, kNaN}, {kInf, 4.0f}}), Result(kInf, 3.0f));
    for (const auto& parts :
         {std::vector<Result>{{kNaN, 1.0f}, {2.0f, 1.0f}}, std::vector<Result>{{2.0f, 1.0f}, {kNaN, 1.0f}},
          std::vector<Result>{{kInf, 1.0f}, {kNaN, 1.0f}}, std::vector<Result>{{kNaN, 1.0f}, {-kInf, 1.0f}}}) {
      const auto [lse, out] = merge_parts(parts);
      EXPECT_TRUE(std::isnan(lse));
      EXPECT_TRUE(std::isnan(out));
    }
  });
}

// Splitting a softmax anywhere and merging gives the whole.
TEST(Merge, PutsASplitSoftmaxTogether) {
  std::mt19937 rng(23);
  std::normal_distribution<double> normal;
  constexpr std::int64_t kKeys = 300, kDim = 16;
  std::vector<double> score(kKeys), value(kKeys * kDim);
  for (double& x : score) x = 4 * normal(rng);
  for (double& x : value) x = normal(rng);
  const auto attend = [&](std::int64_t first, std::int64_t last, double& lse, double* out) {
    double sum = 0;
    std::fill_n(out, kDim, 0.0);
    for (std::int64_t j = first; j < last; ++j) {
      sum += std::exp(score[j]);
      for (std::int64_t d = 0; d < kDim; ++d) out[d] += std::exp(score[j]) * value[j * kDim + d];
    }
    for (std::int64_t d = 0; d < kDim && sum > 0; ++d) out[d] /= sum;
    lse = std::log(sum);
  };
  double whole_lse = 0, whole[kDim];
  attend(0, kKeys, whole_lse, whole);
  for (int trial = 0; trial < 20; ++trial) {
    std::vector<std::int64_t> cuts = {0, kKeys};
    for (int i = 0; i < 6; ++i) cuts.push_back(static_cast<std::int64_t>(rng() % (kKeys + 1)));  // some parts are empty
    std::sort(cuts.begin(), cuts.end());
    const auto parts = static_cast<std::int64_t>(cuts.size()) - 1;
    Merge m({parts, 1, 1, 1, kDim}, DType::kFloat32, rng);
    for (std::int64_t p = 0; p < parts; ++p) {
      double lse = 0, out[kDim];
      attend(cuts[p], cuts[p + 1], lse, out);
      m.lses.set({p, 0, 0, 0}, lse);
      for (std::int64_t d = 0; d < kDim; ++d) m.outs.set({p, 0, 0, 0, d}, out[d]);
    }
    host::merge(m.problem());
    EXPECT_NEAR(m.lse.get({0, 0, 0}), whole_lse, 2e-6);
    for (std::int64_t d = 0; d < kDim; ++d) EXPECT_NEAR(m.out.get({0, 0, 0, d}), whole[d], 1e-6);
  }
}

TEST(Merge, WithoutLse) {
  std::mt19937 rng(2);
  Merge m = random_merge({3, 1, 4, 2, 8}, DType::kFloat32, rng);
  host::merge(m.problem());
  const std::vector<std::byte> out = m.out.memory;
  std::fill(m.out.memory.begin(), m.out.memory.end(), std::byte{0xff});
  MergeProblem problem = m.problem();
  problem.lse = {};
  host::merge(problem);
  EXPECT_EQ(m.out.memory, out);
}

}  // namespace
}  // namespace heddle
