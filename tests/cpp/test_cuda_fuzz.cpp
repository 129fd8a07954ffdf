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
#include "core/front.h"
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
  if (c.op == Op::kDecode && r.chance(0.15)) c.q_len = r.integer(17, 300);  // a chunk of a prompt
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
  if (c.op == Op::kAttention && r.chance(0.7)) c.gaps = false;  // axes in any order and direction, which TMA lacks
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

// Of errors that a call with good arguments may meet: what the backend lacks, by feature or by alignment.
bool is_refusal(const Error& error) {
  return error.code() == ErrorCode::kUnsupported || error.code() == ErrorCode::kLayout;
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
      // What no feature names: alignment, strides, a head dimension that was not compiled.
      if (!is_refusal(error)) throw;
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

// A case placed once, to be called many times.
class PlacedCase {
 public:
  PlacedCase(const Target& target, const Case& c, DeviceArena& arena)
      : target_(target), sample_(c), arena_(arena), output_(sample_, c.q, DType::kFloat32) {
    arena.clear();
    const auto place = [&](const Tensor& x) { return arena.put(x); };
    out_ = arena.put(output_.out);
    if (c.lse) lse_ = arena.put(output_.lse);
    if (c.op == Op::kAttention) {
      attention_ = sample_.attention(place);
    } else {
      cache_.emplace(device_copy(sample_.cache(), arena));
      decode_ = sample_.decode(place, &*cache_);
    }
  }
  const Sample& sample() const { return sample_; }
  DecodeParams decode_params() const { return finished(decode_); }

  void enqueue(ScheduleKind schedule) const {
    const bool is_decode = sample_.spec().op == Op::kDecode;
    if (is_decode) {
      DecodeParams p = finished(decode_);
      p.schedule.kind = schedule;
      decode(p);
    } else {
      AttentionParams p = finished(attention_);
      p.schedule.kind = schedule;
      attention(p);
    }
  }
  // Runs, and returns whether the backend can.
  bool works() const {
    try {
      enqueue(ScheduleKind::kAuto);
    } catch (const Error& error) {
      if (!is_refusal(error)) throw;
      return false;
    }
    arena_.wait();
    return true;
  }
  // What lies where the call writes, after it was cleared or as it is.
  void clear() const {
    arena_.set(output_.out.memory.data(), out_, output_.out);
    if (lse_.given()) arena_.set(output_.lse.memory.data(), lse_, output_.lse);
  }
  std::vector<std::byte> bits() const {
    Tensor out = output_.out, lse = output_.lse;
    out.view.data = out.memory.data() + (output_.out.view.as<std::byte>() - output_.out.memory.data());
    arena_.get(out, out_);
    if (!lse_.given()) return out.memory;
    lse.view.data = lse.memory.data() + (output_.lse.view.as<std::byte>() - output_.lse.memory.data());
    arena_.get(lse, lse_);
    out.memory.insert(out.memory.end(), lse.memory.begin(), lse.memory.end());
    return out.memory;
  }

 private:
  template <class Params>
  Params finished(Params p) const {
    p.out = out_;
    p.lse = lse_;
    p.backend = target_.backend;
    p.stream = arena_.stream();
    return p;
  }
  Target target_;
  Sample sample_;
  DeviceArena& arena_;
  Output output_;
  TensorView out_, lse_;
  AttentionParams attention_;
  DecodeParams decode_;
  std::optional<KVCache> cache_;
};

// Calls fn with `count` placed cases of an operation that the backend runs and `wanted` accepts.
template <class Wanted, class Fn>
void for_cases(const Target& target, Op op, int count, DeviceArena& arena, Wanted&& wanted, Fn&& fn) {
  if (!offered(target, op)) return;
  int found = 0;
  for (std::uint64_t seed = 1; found < count && seed < 20'000; ++seed) {
    const Case c = gpu_case(seed);
    if (c.op != op || c.batch == 0 || c.q_len == 0 || c.q == DType::kInt8 || !wanted(c)) continue;
    PlacedCase placed(target, c, arena);
    if (!placed.works()) continue;
    ++found;
    SCOPED_TRACE("HEDDLE_CASE=\"" + to_string(c) + "\"");
    fn(placed);
    if (::testing::Test::HasFailure()) return;
  }
  EXPECT_EQ(found, count) << "too few cases that the backend runs";
}

bool is_long(const Case& c) { return c.kv_len >= 500; }

void repeats_have_the_same_bits(const Target& target, int cases, std::uint64_t repeats) {
  DeviceArena arena(kArenaBytes, target.device);
  for (const Op op : {Op::kAttention, Op::kDecode}) {
    for_cases(target, op, cases, arena, is_long, [&](const PlacedCase& placed) {
      placed.clear();
      placed.enqueue(ScheduleKind::kStealing);
      const std::vector<std::byte> expected = placed.bits();
      for (std::uint64_t n = 0; n < repeats; ++n) {
        placed.clear();
        placed.enqueue(ScheduleKind::kStealing);
        ASSERT_TRUE(placed.bits() == expected) << "repeat " << n;
      }
    });
  }
}

// With a fixed split size a request of a decode has the bits that it has alone.
void requests_do_not_depend_on_their_batch(const Target& target, int cases) {
  DeviceArena arena(kArenaBytes, target.device);
  const auto wanted = [](const Case& c) {
    return c.batch > 1 && c.split_size > 0 && c.kv_len >= 200 &&
           (c.pattern == Pattern::kNone || c.pattern == Pattern::kWindow);
  };
  for_cases(target, Op::kDecode, cases, arena, wanted, [&](const PlacedCase& placed) {
    placed.clear();
    placed.enqueue(ScheduleKind::kAuto);
    const std::vector<std::byte> together = placed.bits();
    placed.clear();
    for (std::int64_t b = 0; b < placed.sample().spec().batch; ++b) {
      DecodeParams p = placed.decode_params();
      for (TensorView* x : {&p.q, &p.block_table, &p.seq_lens, &p.out, &p.lse}) {
        if (!x->given()) continue;
        x->data = x->as<std::byte>() + b * x->strides[0] * static_cast<std::int64_t>(size_of(x->dtype));
        x->shape[0] = 1;
      }
      decode(p);
    }
    EXPECT_TRUE(placed.bits() == together);
  });
}

TEST(CudaFuzz, RandomConfigurations) {
  NEEDS_HOPPER();
  fuzz(kGpu, {});
}

TEST(CudaFuzz, RepeatsHaveTheSameBits) {
  NEEDS_HOPPER();
  repeats_have_the_same_bits(kGpu, 5, environment("HEDDLE_REPEATS", 1000));
}

TEST(CudaFuzz, RequestsDoNotDependOnTheirBatch) {
  NEEDS_HOPPER();
  requests_do_not_depend_on_their_batch(kGpu, 40);
}

// One capture, many replays; the lengths of a decode change between them.
TEST(CudaFuzz, GraphsReplay) {
  NEEDS_HOPPER();
  DeviceArena arena(kArenaBytes);
  const std::uint64_t replays = environment("HEDDLE_REPEATS", 1000) * 10;
  const auto stream = static_cast<cudaStream_t>(arena.stream().handle);
  for (const Op op : {Op::kAttention, Op::kDecode}) {
    const auto wanted = [](const Case& c) { return is_long(c) && c.batch > 1 && c.pattern == Pattern::kNone; };
    for_cases(kGpu, op, 1, arena, wanted, [&](const PlacedCase& placed) {
      // Two sets of lengths, of which the second is shorter, and their bits.
      std::vector<std::vector<std::int32_t>> lengths(2);
      std::vector<std::vector<std::byte>> expected;
      for (const Lengths& request : placed.sample().requests()) {
        lengths[0].push_back(static_cast<std::int32_t>(request.kv_len));
        lengths[1].push_back(static_cast<std::int32_t>(request.kv_len / 3));
      }
      const auto set_lengths = [&](std::uint64_t n) {
        if (op == Op::kAttention) return;
        const std::vector<std::int32_t>& set = lengths[n % 2];
        cuda_ok(cudaMemcpyAsync(placed.decode_params().seq_lens.data, set.data(), set.size() * 4,
                                cudaMemcpyHostToDevice, stream),
                "lengths");
      };
      for (const std::uint64_t n : {0, 1}) {
        set_lengths(n);
        placed.clear();
        placed.enqueue(ScheduleKind::kAuto);
        expected.push_back(placed.bits());
      }
      cudaGraph_t graph = nullptr;
      cudaGraphExec_t replay = nullptr;
      cuda_ok(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal), "capture");
      placed.enqueue(ScheduleKind::kAuto);
      cuda_ok(cudaStreamEndCapture(stream, &graph), "capture");
      cuda_ok(cudaGraphInstantiate(&replay, graph, 0), "instantiate");
      for (std::uint64_t n = 0; n < replays; ++n) {
        set_lengths(n);
        if (n % 16 == 0) placed.clear();
        cuda_ok(cudaGraphLaunch(replay, stream), "launch");
        ASSERT_TRUE(placed.bits() == expected[n % 2]) << "replay " << n;
      }
      cudaGraphExecDestroy(replay);
      cudaGraphDestroy(graph);
    });
  }
}

// The test itself, with the host's backend in place of the GPU's: it accepts what is right ...
TEST(FuzzHarness, AcceptsTheHost) {
  if (std::getenv("HEDDLE_CASE") != nullptr) GTEST_SKIP() << "replaying a case";
  fuzz(kCpu, {.cases = 150, .seed = 2, .threads = 2, .arena_bytes = std::size_t{96} << 20});
}

TEST(FuzzHarness, AcceptsTheHostsRepeats) {
  set_num_threads(2);
  repeats_have_the_same_bits(kCpu, 2, 3);
  requests_do_not_depend_on_their_batch(kCpu, 10);
  set_num_threads(0);
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
