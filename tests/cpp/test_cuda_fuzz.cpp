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

constexpr Backend kBackend = Backend::kSm90;
constexpr std::size_t kArenaBytes = std::size_t{192} << 20;

bool offered(Op op) {
  try {
    find_row(op == Op::kAttention ? Operation::kAttention : Operation::kDecode, kBackend, {});
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
Outcome run_case(const Case& c, DeviceArena& arena, std::string& why) {
  const Sample sample(c);
  arena.clear();
  const auto place = [&](const Tensor& x) { return arena.put(x); };
  const auto refused = [&](auto&& params, Operation operation) {
    try {
      find_row(operation, kBackend, features_of(problem_of(params)));
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
    params.backend = kBackend;
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
  why = judge->failure("sm90", output);
  if (why.empty() && (again.out.memory != output.out.memory || again.lse.memory != output.lse.memory)) {
    why = "sm90: other bits with another schedule";
  }
  return why.empty() ? Outcome::kRight : Outcome::kWrong;
}

struct Tally {
  std::atomic<std::uint64_t> tried{0}, right[2]{}, refused[2]{};
  std::atomic<int> wrong{0};
  std::atomic<bool> stop{false};
  std::mutex mutex;  // of the report
};

TEST(CudaFuzz, RandomConfigurations) {
  NEEDS_HOPPER();
  const char* only = std::getenv("HEDDLE_FUZZ_OP");
  const char* line = std::getenv("HEDDLE_CASE");
  bool ops[2];
  for (const Op op : {Op::kAttention, Op::kDecode}) {
    ops[static_cast<int>(op)] =
        offered(op) && (only == nullptr || std::string(only) == (op == Op::kAttention ? "attention" : "decode"));
  }
  if (line == nullptr && !ops[0] && !ops[1]) GTEST_SKIP() << "the sm90 backend has no attention and no decode";

  constexpr int kEnough = 20;
  const std::uint64_t wanted = environment("HEDDLE_FUZZ_CASES", 5000), seed = environment("HEDDLE_FUZZ_SEED", 1);
  const std::uint64_t most = 40 * wanted;  // cases that are looked at
  Tally tally;
  const auto try_case = [&](const Case& c, DeviceArena& arena) {
    std::string why;
    Outcome outcome = Outcome::kWrong;
    try {
      outcome = run_case(c, arena, why);
    } catch (const std::exception& error) {
      why = std::string("threw: ") + error.what();
      // After a fault every call fails: the first of the threads' reports is the one to replay.
      if (cudaPeekAtLastError() != cudaSuccess) tally.stop = true;
    }
    if (outcome == Outcome::kRight) ++tally.right[static_cast<int>(c.op)];
    if (outcome == Outcome::kRefused) ++tally.refused[static_cast<int>(c.op)];
    if (outcome != Outcome::kWrong) return;
    const std::lock_guard lock(tally.mutex);
    ADD_FAILURE() << why << "\n  replay: HEDDLE_CASE=\"" << to_string(c) << "\" test_cuda_fuzz";
    if (++tally.wrong == kEnough) tally.stop = true;
  };

  set_num_threads(1);  // of each thread here
  if (line != nullptr) {
    DeviceArena arena(kArenaBytes);
    try_case(parse_case(line), arena);
    EXPECT_EQ(tally.refused[0] + tally.refused[1], 0u) << "the backend does not run this case";
    set_num_threads(0);
    return;
  }
  const auto num_threads = environment("HEDDLE_FUZZ_THREADS", std::max(1u, std::thread::hardware_concurrency()));
  std::vector<std::thread> threads;
  for (std::uint64_t t = 0; t < num_threads; ++t) {
    threads.emplace_back([&] {
      try {
        DeviceArena arena(kArenaBytes);
        while (!tally.stop && tally.right[0] + tally.right[1] < wanted) {
          const std::uint64_t n = tally.tried++;
          if (n >= most) return;
          const Case c = gpu_case(seed * 1'000'000'007 + n);
          if (ops[static_cast<int>(c.op)]) try_case(c, arena);
        }
      } catch (const std::exception& error) {
        const std::lock_guard lock(tally.mutex);
        ADD_FAILURE() << error.what();
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  set_num_threads(0);
  std::cout << "attention: " << tally.right[0] << " right, " << tally.refused[0]
            << " refused; decode: " << tally.right[1] << " right, " << tally.refused[1]
            << " refused; wrong: " << tally.wrong << "\n";
  for (const int op : {0, 1}) {
    // A table whose promises the kernels do not keep would refuse everything.
    if (!ops[op]) continue;
    EXPECT_GE(20 * tally.right[op], std::min<std::uint64_t>(wanted, tally.right[op] + tally.refused[op]))
        << "too few ran of operation " << op;
  }
}

}  // namespace
}  // namespace heddle::testing
