// Machines: presets with the sources of their rates, and the one that this process runs on, measured.
#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstring>
#include <fstream>
#include <limits>
#include <memory>
#include <random>
#include <unistd.h>
#include <vector>

#include "core/check.h"
#include "core/numeric.h"
#include "core/threads.h"
#include "heddle/advise.h"
#include "heddle/attention.h"
#include "heddle/backend.h"
#include "heddle/quantize.h"
#include "host/quantize_kernels.h"

namespace heddle {
namespace {

constexpr double kGiga = 1e9, kTera = 1e12;

// Seconds of the fastest call among those of 0.15 s, and at least three: what else runs on the machine only makes them
// slower.
template <class Fn>
double best_time(Fn&& fn) {
  const auto now = [] {
    return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
  };
  const double first = now();
  double best = std::numeric_limits<double>::infinity();
  for (int i = 0; i < 3 || now() - first < 0.15; ++i) {
    const double start = now();
    fn();
    best = std::min(best, now() - start);
  }
  return best;
}

// Memory that this process may use: the machine's, or its control group's.
double host_memory() {
  double bytes = static_cast<double>(sysconf(_SC_PHYS_PAGES)) * static_cast<double>(sysconf(_SC_PAGESIZE));
  for (const char* path : {"/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"}) {
    std::ifstream file(path);
    if (double limit = 0.0; file >> limit && limit > 0.0) bytes = std::min(bytes, limit);
  }
  return bytes;
}

double measure_bandwidth() {
  // Larger than the last-level cache several times over, and small beside any machine's memory.
  const std::int64_t cache = std::max<std::int64_t>(sysconf(_SC_LEVEL3_CACHE_SIZE), 0);
  const std::int64_t count = std::clamp<std::int64_t>(4 * cache, 256 << 20, 512 << 20) / 4;
  const std::unique_ptr<float[]> data(new float[static_cast<std::size_t>(count)]);
  const auto& kernels = host::quantize_kernels();
  for_ranges(count, count, [&](std::int64_t first, std::int64_t last) {
    std::memset(data.get() + first, 0x3f, static_cast<std::size_t>(last - first) * sizeof(float));
  });
  std::atomic<std::uint32_t> sink{0};
  const double seconds = best_time([&] {
    for_ranges(count, count, [&](std::int64_t first, std::int64_t last) {
      sink += kernels.max_abs_bits(data.get() + first, DType::kFloat32, nullptr, last - first);
    });
  });
  return static_cast<double>(count) * sizeof(float) / seconds;
}

// Operations a second of heddle's attention, for each type of q, k and v.
void measure_attention(Machine& machine) {
  constexpr std::int64_t kTokens = 1024, kDim = 128;
  const std::int64_t heads = std::max(2, num_threads());
  const auto count = static_cast<std::size_t>(kTokens * heads * kDim);
  const double half = 2.0 * kTokens * kTokens * kDim * static_cast<double>(heads);  // of one product

  std::vector<float> x(count), out(count);
  std::minstd_rand rng;
  for (float& value : x) value = static_cast<float>(rng() % 2001) / 1000.0f - 1.0f;
  std::vector<std::uint16_t> x_bf16(count);
  host::quantize_kernels().convert(x.data(), DType::kFloat32, static_cast<std::int64_t>(count), x_bf16.data(),
                                   DType::kBFloat16);
  std::vector<std::int8_t> x_int8(count);
  float scale = 0.0f;
  const auto view = [&](const void* data, DType dtype) { return TensorView(data, dtype, {1, kTokens, heads, kDim}); };
  QuantScales scales;
  scales.scale = TensorView(&scale, DType::kFloat32, {1});
  quantize(view(x.data(), DType::kFloat32), view(x_int8.data(), DType::kInt8), scales);

  const auto seconds = [&](const TensorView& in, const QuantScales& in_scales) {
    AttentionParams params;
    params.q = params.k = params.v = in;
    params.q_scales = params.k_scales = params.v_scales = in_scales;
    params.out = view(out.data(), in.dtype == DType::kInt8 ? DType::kFloat32 : in.dtype);
    params.backend = Backend::kHost;
    return best_time([&] { attention(params); });
  };
  machine.fp32 = 2.0 * half / seconds(view(x.data(), DType::kFloat32), {});
  machine.bf16 = 2.0 * half / seconds(view(x_bf16.data(), DType::kBFloat16), {});
  // int8 speeds up the first product alone; what is left after the second one's time is its own.
  const double all = seconds(view(x_int8.data(), DType::kInt8), scales);
  const double second = half / std::max(machine.bf16, machine.fp32);
  machine.int8 = half / std::max(all - second, 0.25 * all);
}

}  // namespace

const std::vector<Machine>& known_machines() {
  static const std::vector<Machine> machines = {
      {.name = "h100-80gb",
       .source = "measured on an H100 80GB HBM3: large read, large matrix products of bf16, int8 and fp8; fp32: NVIDIA "
                 "datasheet",
       .memory = 80 * kGiga,
       .bandwidth = 3.1 * kTera,
       .fp32 = 67 * kTera,
       .bf16 = 780 * kTera,
       .int8 = 870 * kTera,
       .fp8 = 1400 * kTera,
       .workers = 132},
      {.name = "h200-141gb",
       .source = "NVIDIA H200 SXM datasheet, dense peaks",
       .memory = 141 * kGiga,
       .bandwidth = 4.8 * kTera,
       .fp32 = 67 * kTera,
       .bf16 = 989 * kTera,
       .int8 = 1979 * kTera,
       .fp8 = 1979 * kTera,
       .workers = 132},
      {.name = "a100-80gb",
       .source = "NVIDIA A100 SXM datasheet, dense peaks",
       .memory = 80 * kGiga,
       .bandwidth = 2.039 * kTera,
       .fp32 = 19.5 * kTera,
       .bf16 = 312 * kTera,
       .int8 = 624 * kTera,
       .workers = 108},
      {.name = "l40s-48gb",
       .source = "NVIDIA L40S datasheet, dense peaks",
       .memory = 48 * kGiga,
       .bandwidth = 0.864 * kTera,
       .fp32 = 91.6 * kTera,
       .bf16 = 362 * kTera,
       .int8 = 733 * kTera,
       .fp8 = 733 * kTera,
       .workers = 142},
      {.name = "rtx4090-24gb",
       .source = "NVIDIA Ada architecture whitepaper, dense peaks with fp32 accumulation",
       .memory = 24 * kGiga,
       .bandwidth = 1.008 * kTera,
       .fp32 = 82.6 * kTera,
       .bf16 = 165.2 * kTera,
       .int8 = 660.6 * kTera,
       .fp8 = 330.3 * kTera,
       .workers = 128},
  };
  return machines;
}

Machine machine_from_name(std::string_view name) {
  if (name == "host") return measure_host();
  std::string allowed = "host";
  for (const Machine& machine : known_machines()) {
    if (machine.name == name) return machine;
    allowed += check::text(", ", machine.name);
  }
  check::fail(ErrorCode::kValue, "machine", check::text("'", name, "' does not exist; allowed are ", allowed));
}

Machine measure_host() {
  Machine machine;
  machine.name = check::text("host, ", host_isa(), ", ", num_threads(), num_threads() == 1 ? " thread" : " threads");
  machine.source = "measured in this process: a read of memory, and heddle's own attention";
  machine.memory = host_memory();
  machine.bandwidth = measure_bandwidth();
  machine.workers = num_threads();
  measure_attention(machine);
  return machine;
}

}  // namespace heddle
