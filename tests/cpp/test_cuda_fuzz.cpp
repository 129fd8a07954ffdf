// Random configurations of attention and decode on the GPU against the oracle: whatever the dispatch table says that
// the backend has. Several threads, each with a stream of its own, prepare, run and judge cases side by side.
//
// HEDDLE_FUZZ_CASES (5000 that run), HEDDLE_FUZZ_SEED (1), HEDDLE_FUZZ_THREADS (all cores), HEDDLE_FUZZ_OP ("attention"
// or "decode": just that one) and HEDDLE_CASE="op=...,..." (just that one) in the environment.
#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <iostream>
#include <mutex>
#include <optional>
#include <string>
#include <thread>
#include <vector>

#include "cases.h"
#include "cuda_support.h"
#include <gtest/gtest.h>

#include "core/dispatch.h"
#include "core/front_end.h"
#include "support/judge.h"
#include "support/random.h"

namespace heddle::testing {
namespace {

// Who is tested. The host: a test of this test.
struct Target {
  Backend backend;
  Device device;
};
constexpr Target kGpu{Backend::kSm90, {DeviceType::kCuda, 0}}, kCpu{Backend::kHost, {}};
constexpr std::size_t kArenaBytes = std::size_t{512} << 20;

bool offered(const Target& target, Op op) {
  try {
    find_row(op == Op::kAttention ? Operation::kAttention : Operation::kDecode, target.backend, {});
    return true;
  } catch (const Error&) {
    return false;
  }
}

// A random case that leans towards what GPUs are used for. Whether it can run, the dispatch table says.
Case gpu_case(std::uint64_t seed) {
  Case c = random_case(seed);
  Random r(seed + 7);
  if (c.q == DType::kFloat32 && r.chance(0.95)) {
    const DType half = r.pick({DType::kBFloat16, DType::kFloat16});
    for (DType* x : {&c.q, &c.k, &c.v}) {
      if (*x == DType::kFloat32) *x = half;
    }
  }
  if (c.format == CacheFormat::kFp32) c.format = r.pick({CacheFormat::kBf16, CacheFormat::kFp16});
  // A cache of another 16-bit type than q is rare.
  if (c.op == Op::kDecode && r.chance(0.9)) {
    if (c.format == CacheFormat::kBf16) c.q = DType::kBFloat16;
    if (c.format == CacheFormat::kFp16) c.q = DType::kFloat16;
  }
  if (r.chance(0.9)) {
    c.dim = r.chance(0.7) ? r.pick<std::int64_t>({64, 96, 128, 192, 256})
                          : std::min<std::int64_t>(256, (c.dim + 7) / 8 * 8);
    c.dim_v = r.chance(0.8) ? c.dim : r.pick<std::int64_t>({64, 128, 192, 256});
  }
  if (c.op == Op::kDecode && r.chance(0.7)) {
    c.page_size = r.pick<std::int64_t>({1, 8, 16, 32, 64, 128});
    if (c.page_size % c.cache_partition != 0) c.cache_partition = 1;
  }
  if (c.op == Op::kAttention && r.chance(0.6)) c.k = c.v = c.q == DType::kInt8 ? DType::kInt8 : c.q;
  if (c.k != DType::kInt8 && c.k != DType::kFloat8E4M3) {
    c.k_partition = 0;
    c.smooth_k = false;
  }
  if (c.v != DType::kInt8 && c.v != DType::kFloat8E4M3) {
    c.v_partition = 0;
    c.smooth_v = false;
  }
  if (r.chance(0.85)) c.align = 16;
  // Longer than the host's cases, where the oracle can afford it.
  const auto cost = [&] { return c.batch * c.q_heads * c.q_len * c.kv_len * (c.dim + c.dim_v); };
  if (r.chance(0.3)) {
    const std::int64_t factor = r.pick<std::int64_t>({2, 4, 8, 16});
    if (cost() * factor <= 24'000'000) c.kv_len *= factor;
  }
  while (cost() > 24'000'000) {
    if (c.batch > 1) {
      --c.batch;
      c.mask_batch = std::min(c.mask_batch, c.batch);
    } else {
      c.q_len = (c.q_len + 1) / 2;
      c.kv_len = (c.kv_len + 1) / 2;
    }
  }
  return c;
}

// What the kernels may round probabilities to: the type of the second product's operands.
DType probability_dtype(const Case& c) {
  const bool quantized =
      c.op == Op::kDecode
          ? c.format != CacheFormat::kFp32 && c.format != CacheFormat::kBf16 && c.format != CacheFormat::kFp16
          : c.k == DType::kInt8 || c.v == DType::kInt8 || c.k == DType::kFloat8E4M3 || c.v == DType::kFloat8E4M3;
  if (quantized || c.q == DType::kBFloat16) return DType::kBFloat16;
  return c.q == DType::kFloat16 ? DType::kFloat16 : DType::kFloat32;
}

enum class Outcome : std::uint8_t { kRight, kRefused, kWrong };

// Runs a case twice, by two schedules. `why` says what is wrong.
Outcome run_case(const Target& target, const Case& c, DeviceArena& arena, std::string& why) {
  const Sample sample(c);
  arena.clear();
  const auto place = [&](const Tensor& x) { return arena.put(x); };
  const auto refused = [&](auto&& params, Operation operation) {
    try {
      find_row(operation, target.backend, features_of(problem_of(params)));
      return false;
    } catch (const Error& error) {
      if (error.code() != ErrorCode::kUnsupported) throw;
      return true;
    }
  };
  const DType out_dtype = c.q == DType::kInt8 ? DType::kFloat32 : c.q;
  Output output(sample, out_dtype, DType::kFloat32), again = output;
  const std::vector<std::byte> clean_out = output.out.memory, clean_lse = output.lse.memory;
  again.out.view.data = again.out.memory.data() + (output.out.view.as<std::byte>() - output.out.memory.data());
  if (c.lse)
    again.lse.view.data = again.lse.memory.data() + (output.lse.view.as<std::byte>() - output.lse.memory.data());

  const auto call = [&](auto params, auto&& function, Output& to, ScheduleKind schedule) {
    params.out = arena.put(to.out);
    if (c.lse) params.lse = arena.put(to.lse);
    params.backend = target.backend;
    params.schedule.kind = schedule;
    params.stream = arena.stream();
    function(params);
    arena.wait();
    arena.get(to.out, params.out);
    if (c.lse) arena.get(to.lse, params.lse);
  };
  const auto both = [&](auto params, auto&& function, Operation operation) {
    auto probe = params;
    probe.out = arena.put(output.out);
    if (c.lse) probe.lse = arena.put(output.lse);
    if (refused(probe, operation)) return false;
    const ScheduleKind other = c.schedule == ScheduleKind::kStatic ? ScheduleKind::kStealing : ScheduleKind::kStatic;
    try {
      call(params, function, output, c.schedule);
      call(params, function, again, other);
    } catch (const Error& error) {
      // What no feature names: alignment, a head dimension that was not compiled.
      if (error.code() != ErrorCode::kUnsupported) throw;
      return false;
    }
    return true;
  };

  // The oracle comes first: it also calibrates the queries of an int8-baseline cache.
  std::optional<Judge> judge;
  if (c.op == Op::kAttention) {
    if (!both(sample.attention(place), [](const AttentionParams& p) { attention(p); }, Operation::kAttention))
      return Outcome::kRefused;
    judge.emplace(sample, probability_dtype(c), out_dtype);
  } else {
    {
      KVCache probe = device_copy(sample.cache(), arena);
      DecodeParams params = sample.decode(place, &probe);
      params.out = arena.put(output.out);
      if (c.lse) params.lse = arena.put(output.lse);
      if (refused(params, Operation::kDecode)) return Outcome::kRefused;
    }
    judge.emplace(sample, probability_dtype(c), out_dtype);
    KVCache cache = device_copy(sample.cache(), arena);
    if (!both(sample.decode(place, &cache), [](const DecodeParams& p) { decode(p); }, Operation::kDecode))
      return Outcome::kRefused;
  }
  why = judge->failure(std::string(to_string(target.backend)), output);
  if (why.empty() && (again.out.memory != output.out.memory || again.lse.memory != output.lse.memory)) {
    why = std::string(to_string(target.backend)) + ": other bits with another schedule";
  }
  return why.empty() ? Outcome::kRight : Outcome::kWrong;
}

struct Options {
  std::uint64_t cases = environment("HEDDLE_FUZZ_CASES", 5000), seed = environment("HEDDLE_FUZZ_SEED", 1);
  std::uint64_t threads = environment("HEDDLE_FUZZ_THREADS", std::max(1u, std::thread::hardware_concurrency()));
  std::size_t arena_bytes = kArenaBytes;
};

// Random cases until so many were right, or too many were looked at.
void fuzz(const Target& target, const Options& options) {
  const char* only = std::getenv("HEDDLE_FUZZ_OP");
  const char* line = std::getenv("HEDDLE_CASE");
  bool ops[2];
  for (const Op op : {Op::kAttention, Op::kDecode}) {
    const std::string name = op == Op::kAttention ? "attention" : "decode";
    ops[static_cast<int>(op)] = offered(target, op) && (only == nullptr || only == name);
  }
  if (line == nullptr && !ops[0] && !ops[1]) GTEST_SKIP() << "the backend has no attention and no decode";

  constexpr int kEnough = 20;
  const std::uint64_t most = 40 * options.cases;  // cases that are looked at
  std::atomic<std::uint64_t> tried{0}, right[2]{}, refused[2]{};
  std::atomic<bool> stop{false};
  std::mutex reporting;
  int wrong = 0;
  const auto try_case = [&](const Case& c, DeviceArena& arena) {
    std::string why;
    Outcome outcome = Outcome::kWrong;
    try {
      outcome = run_case(target, c, arena, why);
    } catch (const std::exception& error) {
      why = std::string("threw: ") + error.what();
      // After a fault every call fails: the first of the threads' reports is the one to replay.
      if (!arena.on_cpu() && cudaPeekAtLastError() != cudaSuccess) stop = true;
    }
    if (outcome == Outcome::kRight) ++right[static_cast<int>(c.op)];
    if (outcome == Outcome::kRefused) ++refused[static_cast<int>(c.op)];
    if (outcome != Outcome::kWrong) return;
    const std::lock_guard lock(reporting);
    ADD_FAILURE() << why << "\n  replay: HEDDLE_CASE=\"" << to_string(c) << "\" test_cuda_fuzz";
    if (++wrong == kEnough) stop = true;
  };

  set_num_threads(1);  // of each thread here
  const auto work = [&] {
    try {
      DeviceArena arena(options.arena_bytes, target.device);
      if (line != nullptr) return try_case(parse_case(line), arena);
      while (!stop && right[0] + right[1] < options.cases) {
        const std::uint64_t n = tried++;
        if (n >= most) return;
        const Case c = gpu_case(options.seed * 1'000'000'007 + n);
        if (ops[static_cast<int>(c.op)]) try_case(c, arena);
      }
    } catch (const std::exception& error) {
      const std::lock_guard lock(reporting);
      ADD_FAILURE() << error.what();
    }
  };
  std::vector<std::thread> threads;
  for (std::uint64_t t = 0; t < (line != nullptr ? 1 : options.threads); ++t) threads.emplace_back(work);
  for (std::thread& thread : threads) thread.join();
  set_num_threads(0);
  std::cout << "attention: " << right[0] << " right, " << refused[0] << " refused; decode: " << right[1] << " right, "
            << refused[1] << " refused; wrong: " << wrong << "\n";
  if (line != nullptr) {
    EXPECT_EQ(refused[0] + refused[1], 0u) << "the backend does not run this case";
    return;
  }
  for (const int op : {0, 1}) {
    // A table whose promises the kernels do not keep would refuse everything.
    if (!ops[op]) continue;
    EXPECT_GE(20 * right[op], std::min<std::uint64_t>(options.cases, right[op] + refused[op]))
        << "too few ran of operation " << op;
  }
}

TEST(CudaFuzz, RandomConfigurations) {
  NEEDS_HOPPER();
  fuzz(kGpu, {});
}

// The test itself, with the host's backend in place of the GPU's: it accepts what is right ...
TEST(FuzzHarness, AcceptsTheHost) {
  if (std::getenv("HEDDLE_CASE") != nullptr) GTEST_SKIP() << "replaying a case";
  fuzz(kCpu, {.cases = 150, .seed = 2, .threads = 2, .arena_bytes = std::size_t{96} << 20});
}

// ... and notices an output that is wrong, and one that was written to where it should not be.
TEST(FuzzHarness, NoticesWhatIsWrong) {
  const Case c = parse_case("B=2,Sq=5,Sk=70,Hq=4,Hkv=2,q=bf16,k=bf16,v=bf16,causal=1,gaps=1,seed=3");
  const Sample sample(c);
  const Judge judge(sample, DType::kBFloat16, DType::kBFloat16);
  Output output(sample, DType::kBFloat16, DType::kFloat32);
  output.run(sample, Backend::kHost, ScheduleKind::kAuto);
  EXPECT_EQ(judge.failure("host", output), "");
  const double x = output.out.get({1, 2, 3, 4});
  output.out.set({1, 2, 3, 4}, x + 0.05);
  EXPECT_NE(judge.failure("host", output).find("out element"), std::string::npos);
  output.out.set({1, 2, 3, 4}, x);
  const double lse = output.lse.get({1, 3, 2});
  output.lse.set({1, 3, 2}, lse + 1e-3);
  EXPECT_NE(judge.failure("host", output).find("lse element"), std::string::npos);
  output.lse.set({1, 3, 2}, lse);
  output.out.memory.back() = std::byte{0};
  EXPECT_NE(judge.failure("host", output).find("outside"), std::string::npos);
}

}  // namespace
}  // namespace heddle::testing
