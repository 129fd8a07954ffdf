#include "limits.h"

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <memory>
#include <omp.h>
#include <string_view>

#include "peak.h"

#include "heddle/backend.h"

namespace heddle::bench {
namespace {

using Clock = std::chrono::steady_clock;
constexpr int kRepeats = 7;  // the best counts: a limit is what the machine does when nothing disturbs it

double seconds_since(Clock::time_point start) { return std::chrono::duration<double>(Clock::now() - start).count(); }

[[gnu::target_clones("avx512f", "avx2", "default")]] std::uint64_t sum(const std::uint64_t* words, std::int64_t count) {
  std::uint64_t total = 0;
  for (std::int64_t i = 0; i < count; ++i) total += words[i];
  return total;
}

// A buffer that no cache holds a useful part of, read by all threads.
class ReadBuffer {
 public:
  explicit ReadBuffer(int threads) : threads_(threads), words_(new std::uint64_t[kWords]) {
#pragma omp parallel num_threads(threads_)
    std::fill_n(mine(), share(), 1);  // first touched by the thread that reads it
  }

  double bytes() const { return static_cast<double>(share() * threads_) * 8; }
  void read() const {
#pragma omp parallel num_threads(threads_)
    sink = sum(mine(), share());
  }

 private:
  static constexpr std::int64_t kWords = (std::int64_t{1} << 30) / 8;
  std::int64_t share() const { return kWords / threads_; }
  std::uint64_t* mine() const { return words_.get() + share() * omp_get_thread_num(); }

  inline static volatile std::uint64_t sink;
  int threads_;
  std::unique_ptr<std::uint64_t[]> words_;
};

const ReadBuffer& read_buffer() {
  static const ReadBuffer buffer(num_threads());
  return buffer;
}

double measure_read() {
  double best = 0.0;
  for (int repeat = 0; repeat < kRepeats; ++repeat) {
    const auto start = Clock::now();
    read_buffer().read();
    best = std::max(best, read_buffer().bytes() / seconds_since(start));
  }
  return best;
}

double measure_peak(double (*loop)(std::int64_t steps), int threads) {
  std::int64_t steps = 1000;
  for (;; steps *= 2) {  // about 20 ms
    const auto start = Clock::now();
    loop(steps);
    if (seconds_since(start) > 0.01) break;
  }
  steps *= 2;
  double best = 0.0;
  for (int repeat = 0; repeat < kRepeats; ++repeat) {
    double operations = 0.0;
    const auto start = Clock::now();
#pragma omp parallel num_threads(threads) reduction(+ : operations)
    operations += loop(steps);
    best = std::max(best, operations / seconds_since(start));
  }
  return best;
}

const PeakLoops& peak_loops() {
  const std::string_view isa = host_isa();
#if defined(HEDDLE_HAVE_ISA_AMX)
  if (isa == "amx") return amx::kPeakLoops;
#endif
#if defined(HEDDLE_HAVE_ISA_AVX512_BF16)
  if (isa == "avx512_bf16") return avx512_bf16::kPeakLoops;
#endif
#if defined(HEDDLE_HAVE_ISA_AVX512)
  if (isa == "avx512") return avx512::kPeakLoops;
#endif
#if defined(HEDDLE_HAVE_ISA_AVX2)
  if (isa == "avx2") return avx2::kPeakLoops;
#endif
  return portable::kPeakLoops;
}

Limits measure() {
  const int threads = num_threads();
  const PeakLoops& loops = peak_loops();
  Limits limits;
  limits.read_bytes_per_second = measure_read();
  limits.fp32_flops = measure_peak(loops.fp32, threads);
  limits.bf16_flops = loops.bf16 ? measure_peak(loops.bf16, threads) : limits.fp32_flops;
  limits.int8_flops = loops.int8 ? measure_peak(loops.int8, threads) : limits.fp32_flops;
  return limits;
}

}  // namespace

const Limits& limits() {
  static const Limits measured = measure();
  return measured;
}

void flush_caches() { read_buffer().read(); }

}  // namespace heddle::bench
