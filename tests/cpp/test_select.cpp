// Run-time selection on random calls, every instruction set, against definitions in float64 and simple loops.
//
// HEDDLE_FUZZ_CASES (600) and HEDDLE_CASE="op=...,..." (just that one) in the environment.
#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <limits>
#include <map>
#include <numeric>
#include <set>
#include <sstream>
#include <string>
#include <utility>
#include <vector>

#include "cases.h"
#include <gtest/gtest.h>

#include "host/select_kernels.h"
#include "support/sample.h"

namespace heddle::testing {
namespace {

constexpr double kInf = std::numeric_limits<double>::infinity();

// A call without a selection of its own, and what its arguments mean.
struct Call {
  explicit Call(Case c) : sample(plain(std::move(c))), spec(sample.spec()) {
    if (spec.op == Op::kDecode && spec.format == CacheFormat::kInt8Baseline) {
      const DecodeParams call = sample.decode();  // the first queries set the scale that gives them their meaning
      if (call.q.numel() > 0) call.cache->calibrate_q(call.q);
    }
    for (std::int64_t b = 0; b < spec.batch; ++b) meanings.push_back(sample.meaning(b));
  }
  static Case plain(Case c) {
    c.pattern = Pattern::kNone;
    c.poison_seen = false;
    return c;
  }

  std::int64_t group() const { return spec.q_heads / spec.kv_heads; }
  const Lengths& request(std::int64_t b) const { return sample.requests()[static_cast<std::size_t>(b)]; }
  const double* q(std::int64_t b, std::int64_t i, std::int64_t h) const {
    return meanings[static_cast<std::size_t>(b)].q.data() + (i * spec.q_heads + h) * spec.dim;
  }
  const double* k(std::int64_t b, std::int64_t j, std::int64_t h) const {
    return meanings[static_cast<std::size_t>(b)].k.data() + (j * spec.kv_heads + h) * spec.dim;
  }
  const double* v(std::int64_t b, std::int64_t j, std::int64_t h) const {
    return meanings[static_cast<std::size_t>(b)].v.data() + (j * spec.kv_heads + h) * spec.dim_v;
  }
  double dot(std::int64_t b, std::int64_t i, std::int64_t h, std::int64_t j) const {
    double s = 0.0;
    for (std::int64_t d = 0; d < spec.dim; ++d) s += q(b, i, h)[d] * k(b, j, h / group())[d];
    return s * sample.scale();
  }
  double score(std::int64_t b, std::int64_t i, std::int64_t h, std::int64_t j) const {
    const double s = dot(b, i, h, j);
    return spec.softcap > 0 ? spec.softcap * std::tanh(s / spec.softcap) : s;
  }
  // |v|: a cache keeps that of the values as they came.
  double norm(std::int64_t b, std::int64_t j, std::int64_t h) const {
    if (spec.op == Op::kDecode) {
      const DecodeParams call = sample.decode();
      const TensorView& table = call.block_table;
      const std::int32_t page = table.as<std::int32_t>()[b * table.strides[0] + j / spec.page_size * table.strides[1]];
      return call.cache->value_norms().as<float>()[(page * spec.kv_heads + h) * spec.page_size + j % spec.page_size];
    }
    double squares = 0.0;
    for (std::int64_t d = 0; d < spec.dim_v; ++d) squares += v(b, j, h)[d] * v(b, j, h)[d];
    return std::sqrt(squares);
  }
  std::vector<std::int64_t> seen(std::int64_t b, std::int64_t i) const {
    std::vector<std::int64_t> keys;
    for (std::int64_t j = 0; j < request(b).kv_len; ++j) {
      if (sample.sees(b, 0, i, j)) keys.push_back(j);
    }
    return keys;
  }

  Sample sample;
  const Case& spec;
  std::vector<Sample::Meaning> meanings;
};

// The metric of the keys that query i sees, for a KV head.
std::vector<double> token_metric(const Call& c, std::int64_t b, std::int64_t i, std::int64_t kv_head,
                                 const std::vector<std::int64_t>& keys, const select::TopkOptions& o) {
  std::vector<double> metric(keys.size(), -kInf);
  for (std::int64_t h = kv_head * c.group(); h < (kv_head + 1) * c.group(); ++h) {
    std::vector<double> s;
    for (const std::int64_t j : keys) s.push_back(c.score(b, i, h, j));
    double top = c.sample.sink(h), total = 0.0;
    for (const double x : s) top = std::max(top, x);
    for (const double x : s) total += std::exp(x - top);
    if (top > -kInf) total += std::exp(c.sample.sink(h) - top);
    std::vector<double> out(static_cast<std::size_t>(c.spec.dim_v));
    for (std::size_t n = 0; n < keys.size(); ++n) {
      const double* v = c.v(b, keys[n], kv_head);
      for (std::size_t d = 0; d < out.size(); ++d) out[d] += std::exp(s[n] - top) / total * v[d];
    }
    for (std::size_t n = 0; n < keys.size(); ++n) {
      double x = s[n];
      if (o.metric == select::Metric::kOam) {
        const double length = c.norm(b, keys[n], kv_head);
        x += o.beta * (o.norm == select::Norm::kLog ? std::log(length + o.epsilon) : std::max(0.0, std::log(length)));
      } else if (o.metric == select::Metric::kLoo) {
        const double p = std::exp(s[n] - top) / total;
        double squares = 0.0;
        for (std::size_t d = 0; d < out.size(); ++d) {
          const double difference = c.v(b, keys[n], kv_head)[d] - out[d];
          squares += difference * difference;
        }
        x = p < 1.0 ? p / (1.0 - p) * std::sqrt(squares) : kInf;
      }
      metric[n] = std::max(metric[n], x);
    }
  }
  return metric;
}

// One list of a selection.
std::vector<std::int64_t> list_of(const Selection& selection, const Call& c, std::int64_t b, std::int64_t i,
                                  std::int64_t head) {
  const auto& tokens = std::get<select::Tokens>(selection.kind());
  const auto at = [&](const TensorView& t) {
    if (tokens.indices.rank == 4) return b * t.strides[0] + i * t.strides[1] + head * t.strides[2];
    return (c.spec.packed ? c.request(b).q_first + i : b) * t.strides[0] + head * t.strides[1];
  };
  const std::int32_t* first = tokens.indices.as<std::int32_t>() + at(tokens.indices);
  const std::int64_t n = tokens.lengths.as<std::int32_t>()[at(tokens.lengths)];
  for (std::int64_t m = n; m < tokens.indices.shape[tokens.indices.rank - 1]; ++m) EXPECT_EQ(first[m], -1);
  return {first, first + n};
}

std::int64_t wanted_of(const select::Budget& budget, std::size_t seen) {
  if (budget.count > 0) return budget.count;
  return static_cast<std::int64_t>(std::ceil(budget.fraction * static_cast<double>(seen)));
}

// Nothing that was left out beats what was chosen beyond the always-kept; why not, otherwise.
std::string judge(const std::vector<std::int64_t>& chosen, const std::vector<std::int64_t>& candidates,
                  const std::vector<double>& metric, const std::set<std::int64_t>& always, std::int64_t wanted,
                  double tolerance) {
  std::ostringstream why;
  const std::set<std::int64_t> in(chosen.begin(), chosen.end());
  const auto count = std::min<std::int64_t>(static_cast<std::int64_t>(candidates.size()),
                                            std::max(wanted, static_cast<std::int64_t>(always.size())));
  if (!std::is_sorted(chosen.begin(), chosen.end()) || in.size() != chosen.size()) why << "not ascending; ";
  if (static_cast<std::int64_t>(chosen.size()) != count) why << chosen.size() << " chosen, not " << count << "; ";
  double least = kInf, most = -kInf;
  for (std::size_t n = 0; n < candidates.size(); ++n) {
    if (always.contains(candidates[n])) {
      if (!in.contains(candidates[n])) why << candidates[n] << " is not kept; ";
    } else if (in.contains(candidates[n])) {
      least = std::min(least, metric[n]);
    } else {
      most = std::max(most, metric[n]);
    }
  }
  for (const std::int64_t j : chosen) {
    if (!std::binary_search(candidates.begin(), candidates.end(), j)) why << j << " is not seen; ";
  }
  if (least < most - tolerance * std::max(1.0, std::fabs(most))) why << least << " was taken before " << most;
  return std::move(why).str();
}

template <class Select>
Selection run(const Call& c, Select&& select) {
  return c.spec.op == Op::kDecode ? select(c.sample.decode()) : select(c.sample.attention());
}

select::Budget random_budget(Random& r, std::int64_t least) {
  if (r.chance(0.3)) return {.fraction = 0.01 + 0.99 * r.uniform()};
  return {.count = std::max<std::int64_t>({1, least, r.log_integer(1, 200)})};
}

std::string check_topk(const Call& c, Random& r, double tolerance) {
  select::TopkOptions o{.metric = r.pick({select::Metric::kQk, select::Metric::kOam, select::Metric::kLoo}),
                        .n_sink = r.integer(0, 3),
                        .n_recent = r.integer(0, 3),
                        .beta = r.pick({0.2, 1.0, 0.0}),
                        .norm = r.pick({select::Norm::kClipped, select::Norm::kLog})};
  o.budget = random_budget(r, o.n_sink + o.n_recent);
  const Selection selection = run(c, [&](const auto& call) { return select::topk(call, o); });
  double kept = 0.0, total = 0.0;
  for (std::int64_t b = 0; b < c.spec.batch; ++b) {
    for (std::int64_t i = 0; i < c.request(b).q_len; ++i) {
      const std::vector<std::int64_t> keys = c.seen(b, i);
      std::set<std::int64_t> always;
      for (std::size_t n = 0; n < keys.size(); ++n) {
        if (keys[n] < o.n_sink || static_cast<std::int64_t>(keys.size() - n) <= o.n_recent) always.insert(keys[n]);
      }
      for (std::int64_t h = 0; h < c.spec.kv_heads; ++h) {
        const auto chosen = list_of(selection, c, b, i, h);
        const auto metric = token_metric(c, b, i, h, keys, o);
        const std::string why = judge(chosen, keys, metric, always, wanted_of(o.budget, keys.size()), tolerance);
        if (!why.empty()) return "topk: request " + std::to_string(b) + ", query " + std::to_string(i) + ": " + why;
        kept += static_cast<double>(chosen.size());
        total += static_cast<double>(keys.size());
      }
    }
  }
  if (std::fabs(selection.density() - (total > 0 ? kept / total : 1.0)) > 1e-12) return "topk: density";
  return {};
}

std::string check_indexer(const Call& c, Random& r, double tolerance) {
  if (c.spec.kv_heads != 1 || c.spec.softcap > 0 || c.spec.sinks || c.spec.dim > 576 || c.spec.smooth_k) return {};
  const std::int64_t rows = c.spec.packed ? c.sample.attention().q.shape[0] : c.spec.batch * c.spec.q_len;
  std::vector<float> weights(static_cast<std::size_t>(rows * c.spec.q_heads));
  for (float& w : weights) w = r.normal();
  select::IndexerOptions o{.n_sink = r.integer(0, 3), .n_recent = r.integer(0, 3)};
  o.budget = random_budget(r, o.n_sink + o.n_recent);
  o.weights = c.spec.packed ? TensorView(weights.data(), DType::kFloat32, {rows, c.spec.q_heads})
                            : TensorView(weights.data(), DType::kFloat32, {c.spec.batch, c.spec.q_len, c.spec.q_heads});
  const Selection selection = run(c, [&](auto call) {
    call.scale = c.sample.scale();
    return select::indexer(call, o);
  });
  for (std::int64_t b = 0; b < c.spec.batch; ++b) {
    for (std::int64_t i = 0; i < c.request(b).q_len; ++i) {
      const float* w =
          weights.data() + (c.spec.packed ? c.request(b).q_first + i : b * c.spec.q_len + i) * c.spec.q_heads;
      const std::vector<std::int64_t> keys = c.seen(b, i);
      std::vector<double> metric;
      std::set<std::int64_t> always;
      double size = 1e-30;
      for (std::size_t n = 0; n < keys.size(); ++n) {
        if (keys[n] < o.n_sink || static_cast<std::int64_t>(keys.size() - n) <= o.n_recent) always.insert(keys[n]);
        double sum = 0.0, all = 0.0;
        for (std::int64_t h = 0; h < c.spec.q_heads; ++h) {
          const double s = std::max(0.0, c.dot(b, i, h, keys[n]));
          sum += w[h] * s;
          all += std::fabs(w[h]) * s;
        }
        metric.push_back(sum);
        size = std::max(size, all);
      }
      for (double& x : metric) x /= size;
      const auto chosen = list_of(selection, c, b, i, 0);
      const std::string why = judge(chosen, keys, metric, always, wanted_of(o.budget, keys.size()), tolerance);
      if (!why.empty()) return "indexer: request " + std::to_string(b) + ", query " + std::to_string(i) + ": " + why;
    }
  }
  return {};
}

// Blocks of the prompt; windows aside, since a block also pools what they leave out.
std::string check_stem(const Call& c, Random& r, double tolerance) {
  if (c.spec.left || c.spec.right) return {};
  select::StemOptions o{.block = r.pick<std::int64_t>({4, 16, 48}), .decay = r.uniform()};
  o.stride = r.pick<std::int64_t>({1, 2, 4});
  o.n_first = r.integer(0, 2);
  o.n_last = r.integer(0, 2);
  o.norm = r.pick({select::Norm::kClipped, select::Norm::kLog});
  if (r.chance(0.7)) o.budget = random_budget(r, 1);
  const Selection selection = run(c, [&](const auto& call) { return select::stem(call, o); });
  const TensorView& mask = std::get<select::BlockMask>(selection.kind()).mask;
  for (std::int64_t b = 0; b < c.spec.batch; ++b) {
    const auto [q_len, kv_len, q_first, k_first] = c.request(b);
    const std::int64_t columns = (kv_len + o.block - 1) / o.block, offset = kv_len - q_len;
    for (std::int64_t row = 0; row * o.block < q_len; ++row) {
      const std::int64_t q0 = row * o.block, q1 = std::min(q0 + o.block, q_len);
      std::set<std::int64_t> hull;
      for (const std::int64_t i : {q0, q1 - 1}) {
        for (const std::int64_t j : c.seen(b, i)) hull.insert(j / o.block);
      }
      std::vector<std::int64_t> seen;
      for (std::int64_t j = 0; !hull.empty() && j <= *hull.rbegin(); ++j) seen.push_back(j);
      std::set<std::int64_t> always;
      for (std::size_t n = 0; n < seen.size(); ++n) {
        if (seen[n] < o.n_first || static_cast<std::int64_t>(seen.size() - n) <= o.n_last) always.insert(seen[n]);
      }
      for (std::int64_t i = q0; i < q1; ++i) {
        if (i + offset >= 0 && (i + offset) / o.block < static_cast<std::int64_t>(seen.size())) {
          always.insert((i + offset) / o.block);
        }
      }
      const auto n = static_cast<double>(columns);
      double start = columns < 56 ? n : columns < 160 ? 0.2 * n + 30.0 : 0.1 * n + 30.0;
      if (o.budget.count > 0) start = std::min(n, static_cast<double>(o.budget.count));
      if (o.budget.fraction > 0) start = o.budget.fraction * n;
      const auto position = static_cast<double>(std::max<std::int64_t>(0, q0 + offset) / o.block);
      const auto wanted =
          columns == 0 ? 0 : static_cast<std::int64_t>(std::ceil(start - start * (1.0 - o.decay) * position / n));
      for (std::int64_t h = 0; h < c.spec.q_heads; ++h) {
        std::vector<double> score;
        for (const std::int64_t block : seen) {
          const std::int64_t k0 = block * o.block, k1 = std::min(k0 + o.block, kv_len);
          double sum = 0.0, sums = 0.0, longest = 0.0;
          for (std::int64_t a = q0; a < q1; a += o.stride) {
            for (std::int64_t e = k0; e < k1; e += o.stride, sums += 1.0) {
              for (std::int64_t t = 0; t < o.stride; ++t) {
                const std::int64_t j = e + o.stride - 1 - t;
                if (a + t < q1 && j < k1) sum += c.dot(b, a + t, h, j);
              }
            }
          }
          for (std::int64_t j = k0; j < k1; ++j) longest = std::max(longest, c.norm(b, j, h / c.group()));
          const double term =
              o.norm == select::Norm::kLog ? std::log(longest + o.epsilon) : std::max(0.0, std::log(longest));
          score.push_back(sum / sums / static_cast<double>(o.stride) + o.beta * term);
        }
        std::vector<std::int64_t> chosen;
        for (std::int64_t j = 0; j < mask.shape[3]; ++j) {
          if (mask.as<bool>()[((b * mask.shape[1] + h) * mask.shape[2] + row) * mask.shape[3] + j]) chosen.push_back(j);
        }
        const std::string why = judge(chosen, seen, score, always, wanted, tolerance);
        if (!why.empty()) return "stem: request " + std::to_string(b) + ", row " + std::to_string(row) + ": " + why;
      }
    }
  }
  return {};
}

// Pages, windows aside: a bound is of all tokens that a request has of the page.
std::string check_pages(const Call& c, Random& r, double tolerance) {
  if (c.spec.left || c.spec.right) return {};
  select::PagesOptions o{.metric = r.pick({select::Metric::kQk, select::Metric::kOam}),
                         .n_sink = r.integer(0, 3),
                         .n_recent = r.integer(0, 3)};
  o.budget = random_budget(r, o.n_sink + o.n_recent);
  o.page_size = c.spec.op == Op::kDecode ? c.spec.page_size : r.integer(1, 20);
  const Selection selection = run(c, [&](const auto& call) { return select::pages(call, o); });
  for (std::int64_t b = 0; b < c.spec.batch; ++b) {
    for (std::int64_t i = 0; i < c.request(b).q_len; ++i) {
      const std::vector<std::int64_t> keys = c.seen(b, i);
      std::vector<std::int64_t> pages;
      std::set<std::int64_t> always;
      for (std::size_t n = 0; n < keys.size(); ++n) {
        const std::int64_t page = keys[n] / o.page_size;
        if (pages.empty() || pages.back() != page) pages.push_back(page);
        if (keys[n] < o.n_sink || static_cast<std::int64_t>(keys.size() - n) <= o.n_recent) always.insert(page);
      }
      for (std::int64_t kv_head = 0; kv_head < c.spec.kv_heads; ++kv_head) {
        std::vector<double> bounds;
        for (const std::int64_t page : pages) {
          const std::int64_t k0 = page * o.page_size, k1 = std::min(k0 + o.page_size, c.request(b).kv_len);
          double bound = -kInf, longest = 0.0;
          for (std::int64_t h = kv_head * c.group(); h < (kv_head + 1) * c.group(); ++h) {
            double s = 0.0;
            for (std::int64_t d = 0; d < c.spec.dim; ++d) {
              double high = -kInf;
              const double x = c.q(b, i, h)[d] * c.sample.scale();
              for (std::int64_t j = k0; j < k1; ++j) high = std::max(high, x * c.k(b, j, kv_head)[d]);
              s += high;
            }
            bound = std::max(bound, c.spec.softcap > 0 ? c.spec.softcap * std::tanh(s / c.spec.softcap) : s);
          }
          for (std::int64_t j = k0; j < k1; ++j) longest = std::max(longest, c.norm(b, j, kv_head));
          if (o.metric == select::Metric::kOam) bound += o.beta * std::max(0.0, std::log(longest));
          bounds.push_back(bound);
        }
        std::vector<std::int64_t> chosen, expected;
        const std::vector<std::int64_t> list = list_of(selection, c, b, i, kv_head);
        for (const std::int64_t j : list) {
          if (chosen.empty() || chosen.back() != j / o.page_size) chosen.push_back(j / o.page_size);
        }
        for (const std::int64_t j : keys) {
          if (std::binary_search(chosen.begin(), chosen.end(), j / o.page_size)) expected.push_back(j);
        }
        const std::int64_t tokens = std::min(wanted_of(o.budget, keys.size()), static_cast<std::int64_t>(keys.size()));
        const std::int64_t wanted = (tokens + o.page_size - 1) / o.page_size;
        std::string why = judge(chosen, pages, bounds, always, wanted, tolerance);
        if (list != expected) why += "a page is not whole";
        if (!why.empty()) return "pages: request " + std::to_string(b) + ", query " + std::to_string(i) + ": " + why;
      }
    }
  }
  return {};
}

std::string failure_of(const Case& spec) {
  const Call c(spec);
  Random r(spec.seed + 77);
  // Scores of float32 sums; rounding grows with what cancels in them.
  const double tolerance = 2e-4 * std::max(1.0, spec.spread);
  set_num_threads(static_cast<int>(spec.threads));
  for (const auto& check : {check_topk, check_indexer, check_stem, check_pages}) {
    if (std::string why = check(c, r, tolerance); !why.empty()) return why;
  }
  return {};
}

TEST(Select, RandomCalls) {
  const char* one = std::getenv("HEDDLE_CASE");
  const char* count = std::getenv("HEDDLE_FUZZ_CASES");
  const std::uint64_t cases = one != nullptr ? 1 : count != nullptr ? std::strtoull(count, nullptr, 10) : 600;
  for (const std::string& isa : available_host_isas()) {
    set_host_isa(isa);
    for (std::uint64_t seed = 1; seed <= cases; ++seed) {
      const Case c = Call::plain(one != nullptr ? parse_case(one) : random_case(seed));
      if (c.q == DType::kFloat64 || c.k == DType::kFloat64 || c.v == DType::kFloat64) continue;
      if (c.q == DType::kInt8 && c.op == Op::kDecode) continue;
      std::string why;
      try {
        why = failure_of(c);
      } catch (const Error& error) {
        why = error.what();
      }
      ASSERT_EQ(why, "") << "HEDDLE_ISA=" << isa << " HEDDLE_CASE=\"" << to_string(c) << "\"";
    }
  }
  set_host_isa("auto");
  set_num_threads(0);
}

// The code and the argument of the error that `call` throws.
template <class Fn>
std::pair<ErrorCode, std::string> refusal(Fn&& call) {
  try {
    call();
  } catch (const Error& error) {
    return {error.code(), error.argument()};
  }
  return {ErrorCode::kRuntime, "nothing was refused"};
}

TEST(Select, Refusals) {
  using Refusal = std::pair<ErrorCode, std::string>;
  std::vector<double> x(2 * 6 * 4 * 8, 0.5);
  std::vector<float> weights(2 * 6 * 4, 1.0f);
  const auto call = [&](DType dtype, Device device, std::int64_t heads = 2) {
    return AttentionParams{.q = TensorView(x.data(), dtype, {2, 6, 4, 8}, device),
                           .k = TensorView(x.data(), dtype, {2, 6, heads, 8}, device),
                           .v = TensorView(x.data(), dtype, {2, 6, heads, 8}, device)};
  };
  const select::TopkOptions three{.budget = {.count = 3}};
  AttentionParams good = call(DType::kFloat32, {});
  EXPECT_NO_THROW(select::topk(good, three));
  EXPECT_EQ(refusal([&] { select::topk(call(DType::kFloat64, {}), three); }), Refusal(ErrorCode::kDType, "q"));
  const Device gpu{DeviceType::kCuda, 0};
  EXPECT_EQ(refusal([&] { select::topk(call(DType::kFloat32, gpu), three); }), Refusal(ErrorCode::kUnsupported, "q"));
  EXPECT_EQ(refusal([&] { select::stem(call(DType::kFloat32, gpu), {}); }), Refusal(ErrorCode::kUnsupported, "q"));
  EXPECT_EQ(refusal([&] { select::topk(good, {}); }), Refusal(ErrorCode::kValue, "budget"));
  EXPECT_EQ(refusal([&] { select::topk(good, {.budget = {.count = 3, .fraction = 0.5}}); }),
            Refusal(ErrorCode::kValue, "budget"));
  EXPECT_EQ(refusal([&] { select::topk(good, {.budget = {.fraction = NAN}}); }), Refusal(ErrorCode::kValue, "budget"));
  EXPECT_EQ(refusal([&] { select::topk(good, {.budget = {.count = 3}, .norm = select::Norm::kZScore}); }),
            Refusal(ErrorCode::kValue, "norm"));
  EXPECT_EQ(refusal([&] { select::topk(DecodeParams{.q = good.q}, three); }), Refusal(ErrorCode::kValue, "cache"));
  EXPECT_EQ(refusal([&] { select::pages(good, {.budget = {.count = 3}}); }), Refusal(ErrorCode::kValue, "page_size"));
  EXPECT_EQ(refusal([&] { select::indexer(good, {.budget = {.count = 3}}); }), Refusal(ErrorCode::kShape, "k"));
  const AttentionParams index = call(DType::kFloat32, {}, 1);
  EXPECT_EQ(refusal([&] { select::indexer(index, {.budget = {.count = 3}}); }), Refusal(ErrorCode::kShape, "weights"));
  EXPECT_NO_THROW(select::indexer(
      index, {.budget = {.count = 3}, .weights = TensorView(weights.data(), DType::kFloat32, {2, 6, 4})}));
  good.selection = Selection::window(3);
  EXPECT_EQ(refusal([&] { select::topk(good, three); }), Refusal(ErrorCode::kValue, "selection"));
}

TEST(Select, ExactTopK) {
  Random r(5);
  for (const std::string& isa : available_host_isas()) {
    set_host_isa(isa);
    for (int round = 0; round < 400; ++round) {
      const std::int64_t n = r.log_integer(1, 40000), k = r.log_integer(1, n);
      std::vector<float> x(static_cast<std::size_t>(n));
      const int kind = static_cast<int>(r.integer(0, 4));
      for (float& value : x) {
        const float normal = r.normal();
        value = kind == 0   ? normal
                : kind == 1 ? std::round(normal)
                : kind == 2 ? std::ldexp(normal, static_cast<int>(r.integer(-140, 120)))
                : kind == 3 ? (r.chance(0.5) ? 0.0f : -0.0f)
                            : r.pick({-INFINITY, INFINITY, normal});
      }
      std::vector<std::int32_t> order(x.size()), found(static_cast<std::size_t>(k) + 1, -7);
      std::iota(order.begin(), order.end(), 0);
      std::stable_sort(order.begin(), order.end(), [&](std::int32_t a, std::int32_t b) { return x[a] > x[b]; });
      order.resize(static_cast<std::size_t>(k));
      std::sort(order.begin(), order.end());
      std::vector<std::byte> scratch(host::top_k_bytes(n) + 64);
      void* at = scratch.data() + (64 - reinterpret_cast<std::uintptr_t>(scratch.data()) % 64) % 64;
      ASSERT_TRUE(host::select_kernels().top_k(x.data(), n, k, 0, found.data(), at));
      ASSERT_EQ(found.back(), -7);
      found.pop_back();
      ASSERT_EQ(found, order) << isa << ", " << k << " of " << n << ", kind " << kind;
      x[static_cast<std::size_t>(r.integer(0, n - 1))] = NAN;
      ASSERT_FALSE(host::select_kernels().top_k(x.data(), n, k, 0, found.data(), at));
    }
  }
  set_host_isa("auto");
}

}  // namespace
}  // namespace heddle::testing
