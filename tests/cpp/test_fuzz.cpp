// Random configurations of attention and decode on the host backend, every instruction set of this processor, against
// the oracle; and the oracle against the plainest way to write attention.
//
// HEDDLE_FUZZ_CASES (4000), HEDDLE_FUZZ_SEED (1), HEDDLE_CASE="op=...,..." (just that one) and HEDDLE_ISA (just that
// one) in the environment.
#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <memory>
#include <set>
#include <string>
#include <thread>
#include <vector>

#include "cases.h"
#include <gtest/gtest.h>

#include "support/judge.h"
#include "support/sample.h"

namespace heddle::testing {
namespace {

std::vector<std::string> isas() {
  const char* one = std::getenv("HEDDLE_ISA");
  return one == nullptr ? available_host_isas() : std::vector<std::string>{one};
}

// Why a case fails, or an empty string.
std::string failure_of(const Case& c) {
  const Sample sample(c);
  const DType out_dtype = c.q == DType::kInt8 ? DType::kFloat32 : c.q;
  set_num_threads(2);
  const Judge judge(sample, sample.rounds_probabilities() ? DType::kBFloat16 : DType::kFloat32, out_dtype);
  if (const std::string why = judge.oracle_failure(); !why.empty()) return why;
  for (const std::string& isa : isas()) {
    set_host_isa(isa);
    set_num_threads(static_cast<int>(c.threads));
    Output output(sample, out_dtype, DType::kFloat32);
    output.run(sample, Backend::kHost, c.schedule);
    if (const std::string why = judge.failure(isa, output); !why.empty()) return why;
    // The same bits whoever computes what.
    set_num_threads(static_cast<int>(c.threads % 3 + 1));
    Output again(sample, out_dtype, DType::kFloat32);
    again.run(sample, Backend::kHost,
              c.schedule == ScheduleKind::kStatic ? ScheduleKind::kStealing : ScheduleKind::kStatic);
    if (again.out.memory != output.out.memory || again.lse.memory != output.lse.memory) {
      return isa + ": other bits with another schedule and number of threads";
    }
  }
  return {};
}

std::string checked(const Case& c) {
  std::string why;
  try {
    why = failure_of(c);
  } catch (const std::exception& error) {
    why = std::string("threw: ") + error.what();
  }
  set_host_isa("auto");
  set_num_threads(0);
  return why;
}

void expect_all(const std::vector<Case>& cases) {
  constexpr int kEnough = 20;
  int failures = 0;
  for (const Case& c : cases) {
    const std::string why = checked(c);
    if (why.empty()) continue;
    ADD_FAILURE() << why << "\n  replay: HEDDLE_CASE=\"" << to_string(c) << "\" test_fuzz";
    if (++failures == kEnough) FAIL() << "enough; the other cases were not run";
  }
}

TEST(Fuzz, RandomConfigurations) {
  std::vector<Case> cases;
  if (const char* line = std::getenv("HEDDLE_CASE"); line != nullptr) {
    cases.push_back(parse_case(line));
  } else {
    const std::uint64_t count = environment("HEDDLE_FUZZ_CASES", 4000), seed = environment("HEDDLE_FUZZ_SEED", 1);
    for (std::uint64_t n = 0; n < count; ++n) cases.push_back(random_case(seed * 1'000'000'007 + n));
  }
  expect_all(cases);
}

TEST(Fuzz, NamedCasesShrunk) {
  std::vector<Case> cases;
  std::set<std::string> lines;
  for (const Case& named : named_cases()) {
    Case c = shrunk(named);
    c.name.clear();
    if (lines.insert(to_string(c)).second) cases.push_back(c);
  }
  expect_all(cases);
}

// Element b of the first axis; all of a view without that axis (a scale of the whole tensor) or without memory.
TensorView slice(TensorView view, std::int64_t b, int rank) {
  if (view.rank != rank) return view;
  view.data = view.as<std::byte>() + b * view.strides[0] * static_cast<std::int64_t>(size_of(view.dtype));
  view.shape[0] = 1;
  return view;
}

// The bits of a request are those it has alone.
TEST(Fuzz, RequestsDoNotDependOnTheirBatch) {
  int checked_requests = 0;
  for (std::uint64_t seed = 0; seed < 600; ++seed) {
    const Case c = random_case(seed);
    const bool own_mask =
        c.pattern != Pattern::kNone && c.pattern != Pattern::kWindow && c.pattern != Pattern::kStrided;
    if (c.batch < 2 || c.packed || own_mask) continue;
    const Sample sample(c);
    const DType out_dtype = c.q == DType::kInt8 ? DType::kFloat32 : c.q;
    Output together(sample, out_dtype, DType::kFloat32), alone = together;
    alone.out.view.data = alone.out.memory.data() + (together.out.view.as<std::byte>() - together.out.memory.data());
    if (c.lse)
      alone.lse.view.data = alone.lse.memory.data() + (together.lse.view.as<std::byte>() - together.lse.memory.data());
    together.run(sample, Backend::kHost, c.schedule);
    for (std::int64_t b = 0; b < c.batch; ++b, ++checked_requests) {
      const TensorView out = slice(alone.out.view, b, 4), lse = slice(alone.lse.view, b, 3);
      if (c.op == Op::kDecode) {
        DecodeParams p = sample.decode();
        p.q = slice(p.q, b, 4);
        p.block_table = slice(p.block_table, b, 2);
        p.seq_lens = slice(p.seq_lens, b, 1);
        p.out = out;
        p.lse = lse;
        p.backend = Backend::kHost;
        decode(p);
      } else {
        AttentionParams p = sample.attention();
        for (TensorView* x : {&p.q, &p.k, &p.v}) *x = slice(*x, b, 4);
        for (QuantScales* x : {&p.q_scales, &p.k_scales, &p.v_scales}) {
          x->scale = slice(x->scale, b, 3);
          x->mean = slice(x->mean, b, 3);
        }
        p.out = out;
        p.lse = lse;
        p.backend = Backend::kHost;
        attention(p);
      }
    }
    EXPECT_TRUE(alone.out.memory == together.out.memory && alone.lse.memory == together.lse.memory) << to_string(c);
  }
  EXPECT_GT(checked_requests, 200);
}

TEST(Fuzz, CallsFromSeveralThreads) {
  std::vector<std::unique_ptr<Sample>> samples;
  std::vector<Output> expected;
  for (std::uint64_t seed = 0; seed < 12; ++seed) {
    const Sample& sample = *samples.emplace_back(std::make_unique<Sample>(random_case(seed)));
    const DType dtype = sample.spec().q == DType::kInt8 ? DType::kFloat32 : sample.spec().q;
    expected.emplace_back(sample, dtype, DType::kFloat32).run(sample, Backend::kHost, sample.spec().schedule);
  }
  std::atomic<int> wrong{0};
  std::vector<std::thread> threads;
  for (int t = 0; t < 4; ++t) {
    threads.emplace_back([&, t] {
      for (std::size_t n = 0; n < 3 * samples.size(); ++n) {
        const std::size_t at = (n + static_cast<std::size_t>(t) * 3) % samples.size();
        const Sample& sample = *samples[at];
        Output output(sample, expected[at].out.view.dtype, DType::kFloat32);
        output.run(sample, Backend::kHost, sample.spec().schedule);
        if (output.out.memory != expected[at].out.memory || output.lse.memory != expected[at].lse.memory) ++wrong;
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(wrong, 0);
}

TEST(Fuzz, CasesReplayFromTheirLine) {
  for (std::uint64_t seed = 0; seed < 500; ++seed) {
    const std::string line = to_string(random_case(seed));
    EXPECT_EQ(to_string(parse_case(line)), line);
  }
  EXPECT_THROW(parse_case("B=x"), std::invalid_argument);
  EXPECT_THROW(parse_case("nonsense=1"), std::invalid_argument);
}

}  // namespace
}  // namespace heddle::testing
