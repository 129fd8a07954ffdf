// heddle_cuda_decode [--benchmark_filter=TEXT] [--benchmark_out=FILE]: the sm_90 decode kernel against a cold read of
// the bytes that it must read.
//
// Keys and values are random, pages lie in random order. Each call is timed by events on the device, after a pass over
// a large buffer that empties L2 by reading and keeps the device busy while the host enqueues what follows; a figure is
// the median of 25. The plan is made before: it serves all layers of a step. "limit" is a plain read of as many bytes
// (keys, values and their scales) in the same run, the fastest of three ways to read them. "empty" is a kernel without
// a body, launched as the plan is: what of the plan's time is the launch.
#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cuda_runtime.h>
#include <map>
#include <numeric>
#include <random>
#include <regex>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

#include "cuda/common/launch_early.h"
#include "cuda/launch.h"
#include "cuda/sm90/decode/params.h"

namespace {

using namespace heddle;
using cuda::DecodeArgs;

void check(cudaError_t status) {
  if (status != cudaSuccess) throw std::runtime_error(cudaGetErrorString(status));
}

class DeviceBuffer {
 public:
  explicit DeviceBuffer(std::size_t bytes) : bytes_(bytes) {
    check(cudaMalloc(&data_, std::max<std::size_t>(bytes, 256)));
    check(cudaMemset(data_, 0, bytes));
  }
  ~DeviceBuffer() { cudaFree(data_); }
  DeviceBuffer(const DeviceBuffer&) = delete;
  DeviceBuffer& operator=(const DeviceBuffer&) = delete;
  template <class T = void>
  T* as() const {
    return static_cast<T*>(data_);
  }
  std::size_t bytes() const { return bytes_; }
  template <class T>
  void upload(const std::vector<T>& from) const {
    check(cudaMemcpy(data_, from.data(), from.size() * sizeof(T), cudaMemcpyHostToDevice));
  }

 private:
  void* data_ = nullptr;
  std::size_t bytes_;
};

__device__ std::uint32_t hash(std::uint64_t i) {
  i = (i + 0x9e3779b97f4a7c15u) * 0xbf58476d1ce4e5b9u;
  i = (i ^ (i >> 29)) * 0x94d049bb133111ebu;
  return static_cast<std::uint32_t>(i >> 32);
}

// Words of two 16-bit or four 8-bit numbers with random signs, mantissas and a spread of exponents below 4.
__global__ void fill_kernel(std::uint32_t* data, std::size_t words, std::uint32_t keep, std::uint32_t base) {
  for (std::size_t i = blockIdx.x * std::size_t{blockDim.x} + threadIdx.x; i < words;
       i += std::size_t{gridDim.x} * blockDim.x) {
    data[i] = (hash(i) & keep) | base;
  }
}

void fill(const DeviceBuffer& buffer, DType dtype) {
  std::uint32_t keep = 0xffffffffu, base = 0;                               // int8
  if (dtype == DType::kBFloat16) keep = 0x80ff80ffu, base = 0x3f003f00u;    // 0.5 to 2
  if (dtype == DType::kFloat16) keep = 0x87ff87ffu, base = 0x38003800u;     // 0.5 to 2
  if (dtype == DType::kFloat8E4M3) keep = 0x8f8f8f8fu, base = 0x30303030u;  // 0.5 to 2
  fill_kernel<<<1024, 256>>>(buffer.as<std::uint32_t>(), buffer.bytes() / 4, keep, base);
  check(cudaGetLastError());
}

template <int kUnroll>
__global__ void __launch_bounds__(512) read_kernel(const uint4* data, std::size_t count, unsigned* never) {
  unsigned all = 0;
  const std::size_t step = std::size_t{gridDim.x} * blockDim.x;
  for (std::size_t i = blockIdx.x * std::size_t{blockDim.x} + threadIdx.x; i < count; i += kUnroll * step) {
    uint4 x[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) x[u] = i + u * step < count ? __ldcs(data + i + u * step) : uint4{};
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) all += x[u].x ^ x[u].y ^ x[u].z ^ x[u].w;
  }
  if (all == 0x9e3779b9u) *never = all;  // a store that the compiler cannot rule out
}

__global__ void empty_kernel(const __grid_constant__ cuda::decode::Params) {}

class Bench {
 public:
  Bench() : flush_(std::size_t{1} << 29), never_(4) {
    int device = 0;
    check(cudaGetDevice(&device));
    check(cudaDeviceGetAttribute(&multiprocessors_, cudaDevAttrMultiProcessorCount, device));
    check(cudaEventCreate(&begin_));
    check(cudaEventCreate(&end_));
  }

  template <class Enqueue>
  double median(Enqueue enqueue, bool warm = false, int repeats = 25) {
    std::vector<float> times;
    for (int i = 0; i < repeats + 2; ++i) {
      read<4>(flush_.as(), flush_.bytes());
      if (warm) enqueue();
      check(cudaEventRecord(begin_));
      enqueue();
      check(cudaEventRecord(end_));
      check(cudaEventSynchronize(end_));
      float milliseconds = 0.0f;
      check(cudaEventElapsedTime(&milliseconds, begin_, end_));
      if (i >= 2) times.push_back(milliseconds * 1000.0f);
    }
    std::nth_element(times.begin(), times.begin() + repeats / 2, times.end());
    return times[static_cast<std::size_t>(repeats / 2)];
  }

  // Microseconds of a cold read, the same for the same number of bytes.
  double limit(const void* data, std::size_t bytes) {
    auto& us = limits_[bytes];
    if (us == 0.0) {
      us = std::min({median([&] { read<1>(data, bytes); }), median([&] { read<4>(data, bytes); }),
                     median([&] { read<8>(data, bytes); })});
    }
    return us;
  }

 private:
  template <int kUnroll>
  void read(const void* data, std::size_t bytes) const {
    read_kernel<kUnroll><<<static_cast<unsigned>((kUnroll == 8 ? 2 : 4) * multiprocessors_), 512>>>(
        static_cast<const uint4*>(data), bytes / 16, never_.as<unsigned>());
    check(cudaGetLastError());
  }

  DeviceBuffer flush_, never_;
  int multiprocessors_ = 0;
  cudaEvent_t begin_ = nullptr, end_ = nullptr;
  std::map<std::size_t, double> limits_;
};

struct Case {
  std::string name;
  std::vector<int> lens;
  std::string format = "bf16";
  int page = 16, queries = 1, q_heads = 32, kv_heads = 8, dim = 128, tokens = 0;
  Schedule schedule{};
  bool warm = false;  // right after the same call, without emptying L2 between
  int calls = 1;      // in a row, as layers make them; the time is that of one
};

struct Result {
  Case c;
  double us, limit_us, plan_us, empty_us;
  std::size_t bytes;
};

constexpr std::size_t kCacheBytes = std::size_t{1300} << 20;  // of keys, and of values

class Runner {
 public:
  Runner() : k_(kCacheBytes), v_(kCacheBytes), scale_(kCacheBytes / 128 * 4) {
    std::vector<float> ones(scale_.bytes() / 4, 0.01f);
    scale_.upload(ones);
  }

  Result run(const Case& c) {
    const bool eight = c.format != "bf16" && c.format != "fp16";
    const DType dtype = c.format == "fp16"   ? DType::kFloat16
                        : c.format == "bf16" ? DType::kBFloat16
                        : c.format == "fp8"  ? DType::kFloat8E4M3
                                             : DType::kInt8;
    if (dtype != filled_) {
      fill(k_, dtype);
      fill(v_, dtype);
      filled_ = dtype;
    }
    const std::int64_t batch = static_cast<std::int64_t>(c.lens.size()), row = c.dim * (eight ? 1 : 2);
    std::int64_t pages = 0, columns = 0, keys = 0;
    for (const int len : c.lens) {
      pages += (len + c.page - 1) / c.page;
      columns = std::max<std::int64_t>(columns, (len + c.page - 1) / c.page);
      keys += c.tokens > 0 ? std::min(len, c.tokens) : len;
    }
    if (static_cast<std::size_t>(pages * c.page * c.kv_heads * row) > kCacheBytes)
      throw std::runtime_error("too large");
    std::mt19937 random(1);
    std::vector<std::int32_t> order(static_cast<std::size_t>(pages));
    std::iota(order.begin(), order.end(), 0);
    std::shuffle(order.begin(), order.end(), random);
    std::vector<std::int32_t> table(static_cast<std::size_t>(batch * columns), -1);
    std::size_t next = 0;
    for (std::int64_t b = 0; b < batch; ++b) {
      for (std::int64_t i = 0; i * c.page < c.lens[static_cast<std::size_t>(b)]; ++i) {
        table[static_cast<std::size_t>(b * columns + i)] = order[next++];
      }
    }
    const DeviceBuffer table_on_device(table.size() * 4), lens(c.lens.size() * 4);
    table_on_device.upload(table);
    lens.upload(c.lens);
    const std::int64_t q_row = c.q_heads * c.dim;
    const DeviceBuffer q(static_cast<std::size_t>(batch * c.queries * q_row * 2)), out(q.bytes());
    fill(q, c.format == "fp16" ? DType::kFloat16 : DType::kBFloat16);

    DecodeArgs args{.q = q.as(),
                    .out = out.as(),
                    .lse = nullptr,
                    .dtype = c.format == "fp16" ? DType::kFloat16 : DType::kBFloat16,
                    .q_stride = {c.queries * q_row, q_row, c.dim},
                    .out_stride = {c.queries * q_row, q_row, c.dim},
                    .lse_stride = {},
                    .batch = batch,
                    .num_queries = c.queries,
                    .num_q_heads = c.q_heads,
                    .num_kv_heads = c.kv_heads,
                    .head_dim = c.dim,
                    .k = k_.as(),
                    .v = v_.as(),
                    .cache_dtype = dtype,
                    .k_stride = {c.kv_heads * c.page * row, c.page * row, row},
                    .v_stride = {c.kv_heads * c.page * row, c.page * row, row},
                    .num_pages = pages,
                    .page_size = c.page,
                    .max_kv_len = columns * c.page,
                    .table_stride = columns,
                    .seq_lens = lens.as<std::int32_t>(),
                    .block_table = table_on_device.as<std::int32_t>(),
                    .k_scale = scale_.as<float>(),
                    .v_scale = scale_.as<float>(),
                    .partition = c.format == "int8-a" ? 1 : 0,
                    .k_scale_page_stride = c.kv_heads * c.page,
                    .k_scale_head_stride = c.page,
                    .k_scale_group_stride = 1,
                    .scale = 0.088,
                    .schedule = c.schedule};
    DeviceBuffer tokens(static_cast<std::size_t>(batch * c.kv_heads * c.tokens * 4));
    if (c.tokens > 0) {
      std::vector<std::int32_t> lists;
      for (std::int64_t b = 0; b < batch; ++b) {
        for (int h = 0; h < c.kv_heads; ++h) {
          // As many tokens of equal stretches, one at a random place of each.
          const double stretch = double(c.lens[static_cast<std::size_t>(b)]) / c.tokens;
          for (int i = 0; i < c.tokens; ++i) {
            lists.push_back(
                static_cast<std::int32_t>(stretch * (i + 0.999 * std::generate_canonical<double, 32>(random))));
          }
        }
      }
      tokens.upload(lists);
      args.list = tokens.as<std::int32_t>();
      args.list_size = c.tokens;
      args.list_batch_stride = std::int64_t{c.kv_heads} * c.tokens;
      args.list_head_stride = c.tokens;
    }
    const DeviceBuffer workspace(static_cast<std::size_t>(cuda::decode_workspace_bytes(args)));
    args.workspace = workspace.as();
    const std::size_t bytes =
        static_cast<std::size_t>(keys * c.kv_heads * (2 * row + (c.format == "int8-a" ? 4 : 0))) / 16 * 16;
    Result result{c, 0.0, 0.0, 0.0, 0.0, bytes};
    const cuda::decode::Params params;
    result.empty_us =
        bench_.median([&] { cuda::launch_early(empty_kernel, 1, 128, 0, nullptr, "empty", params); }, c.warm);
    result.plan_us = bench_.median([&] { cuda::launch_decode_plan(args); }, c.warm);
    result.us = bench_.median(
                    [&] {
                      for (int i = 0; i < c.calls; ++i) cuda::launch_decode(args);
                    },
                    c.warm) /
                c.calls;
    // Keys and values lie in two buffers, which the limit reads as if they were one.
    result.limit_us = bytes <= 2 * kCacheBytes ? bench_.limit(reads_.as(), bytes) : 0.0;
    return result;
  }

 private:
  Bench bench_;
  DeviceBuffer k_, v_, scale_, reads_{2 * kCacheBytes};
  DType filled_ = DType::kFloat32;
};

std::vector<int> repeat(std::initializer_list<std::pair<int, int>> counts) {
  std::vector<int> lens;
  for (const auto& [count, len] : counts) lens.insert(lens.end(), static_cast<std::size_t>(count), len);
  return lens;
}

std::vector<Case> cases() {
  constexpr int K = 1024;
  const std::vector<std::pair<std::string, std::vector<int>>> scenarios = {
      {"1x128K", repeat({{1, 128 * K}})},
      {"1x32K", repeat({{1, 32 * K}})},
      {"64x4K", repeat({{64, 4 * K}})},
      {"16x32K", repeat({{16, 32 * K}})},
      {"4x128K", repeat({{4, 128 * K}})},
      {"1x128K+31x4K", repeat({{1, 128 * K}, {31, 4 * K}})},
      {"32x128+32x4K", repeat({{32, 128}, {32, 4 * K}})},
      {"64x512", repeat({{64, 512}})},
      {"4x64K+60x1K", repeat({{4, 64 * K}, {60, K}})},
  };
  std::vector<Case> all;
  for (const char* format : {"bf16", "int8-b", "int8-a", "fp8"}) {
    for (const auto& [name, lens] : scenarios)
      all.push_back({.name = "scenario/" + name, .lens = lens, .format = format});
  }
  for (const char* format : {"bf16", "fp8"}) {
    for (const auto& [name, lens] : scenarios) {
      all.push_back({.name = "heads64/" + name, .lens = lens, .format = format, .q_heads = 64});
    }
  }
  // Skewed batches, uniform ones of the same bytes, no stealing, and one request and head a CTA.
  const std::vector<std::pair<std::string, std::vector<int>>> skewed = {
      {"1x128K+31x4K", repeat({{1, 128 * K}, {31, 4 * K}})},
      {"1x128K+31x4K/uniform", repeat({{32, (128 * K + 31 * 4 * K) / 32}})},
      {"4x64K+60x1K", repeat({{4, 64 * K}, {60, K}})},
      {"4x64K+60x1K/uniform", repeat({{64, (256 * K + 60 * K) / 64}})},
      {"1x512K+127x512", repeat({{1, 512 * K}, {127, 512}})},
      {"1x512K+127x512/uniform", repeat({{128, (512 * K + 127 * 512) / 128}})},
  };
  for (const auto& [name, lens] : skewed) {
    all.push_back({.name = "skew/" + name, .lens = lens});
    all.push_back({.name = "skew-static/" + name, .lens = lens, .schedule = {.kind = ScheduleKind::kStatic}});
    all.push_back({.name = "skew-unsplit/" + name, .lens = lens, .schedule = {.split_size = 1 << 20}});
  }
  all.push_back({.name = "fixed-split/16x32K", .lens = repeat({{16, 32 * K}}), .schedule = {.split_size = 4096}});
  for (const int page : {1, 8, 16, 32, 64, 128}) {
    for (const char* format : {"bf16", "fp8"}) {
      all.push_back({.name = "page" + std::to_string(page) + "/16x32K",
                     .lens = repeat({{16, 32 * K}}),
                     .format = format,
                     .page = page});
    }
  }
  for (const int queries : {2, 4, 8, 16}) {
    for (const char* format : {"bf16", "int8-b", "fp8"}) {
      all.push_back({.name = "queries" + std::to_string(queries) + "/16x32K",
                     .lens = repeat({{16, 32 * K}}),
                     .format = format,
                     .queries = queries});
    }
  }
  for (const int dim : {64, 96, 192, 256}) {
    all.push_back({.name = "dim" + std::to_string(dim) + "/8x32K", .lens = repeat({{8, 32 * K}}), .dim = dim});
  }
  for (const int batch : {1, 16, 64}) {
    // A cache of 128K tokens a request would not fit for 64: requests share pages' worth of memory by being shorter.
    all.push_back({.name = "tokens2048/" + std::to_string(batch) + "x" +
                           (batch == 1    ? "128K"
                            : batch == 16 ? "32K"
                                          : "8K"),
                   .lens = repeat({{batch, batch == 1    ? 128 * K
                                           : batch == 16 ? 32 * K
                                                         : 8 * K}}),
                   .tokens = 2048});
  }
  all.push_back({.name = "plan/256x1K", .lens = repeat({{256, K}})});
  all.push_back({.name = "layers/1x32K", .lens = repeat({{1, 32 * K}}), .calls = 16});
  all.push_back({.name = "layers/64x512", .lens = repeat({{64, 512}}), .calls = 16});
  for (const bool warm : {false, true}) {
    for (const auto& [name, lens] : {std::pair{"1x64", repeat({{1, 64}})}, std::pair{"1x2K", repeat({{1, 2 * K}})}}) {
      all.push_back({.name = std::string(warm ? "warm/" : "cold/") + name, .lens = lens, .warm = warm});
    }
  }
  return all;
}

}  // namespace

int main(int argc, char** argv) try {
  // The options of google-benchmark that bench/record.py gives; TEXT is a pattern of names.
  std::string filter, into;
  for (int i = 1; i < argc; ++i) {
    const std::string_view argument = argv[i];
    const auto value = [&](std::string_view option) { return std::string(argument.substr(option.size())); };
    if (argument.starts_with("--benchmark_filter=")) {
      filter = value("--benchmark_filter=");
    } else if (argument.starts_with("--benchmark_out=")) {
      into = value("--benchmark_out=");
    } else if (argument != "--benchmark_out_format=json") {
      std::fprintf(stderr, "no option: %s\n", argv[i]);
      return 1;
    }
  }
  if (heddle::cuda::device_count() == 0 || heddle::cuda::compute_capability(0) != 90) {
    std::fprintf(stderr, "needs a GPU of compute capability 9.0\n");
    return 1;
  }
  cudaDeviceProp device{};
  check(cudaGetDeviceProperties(&device, 0));
  const std::regex wanted(filter);
  Runner runner;
  std::vector<Result> results;
  std::printf("%s\n%-34s %-7s %9s %9s %9s %9s %9s\n", device.name, "case", "format", "us", "limit", "fraction",
              "plan us", "empty us");
  for (const Case& c : cases()) {
    if (!std::regex_search("cuda-decode/" + c.name + "/" + c.format, wanted)) continue;
    const Result r = runner.run(c);
    std::printf("%-34s %-7s %9.1f %9.1f %9.3f %9.1f %9.1f\n", c.name.c_str(), c.format.c_str(), r.us, r.limit_us,
                r.limit_us / r.us, r.plan_us, r.empty_us);
    std::fflush(stdout);
    results.push_back(r);
  }
  if (!into.empty() && !results.empty()) {
    std::FILE* out = std::fopen(into.c_str(), "w");
    if (out == nullptr) throw std::runtime_error("cannot write " + into);
    std::fprintf(out, "{\"context\": {\"nvcc\": \"%s\"}, \"benchmarks\": [", HEDDLE_NVCC);
    for (std::size_t i = 0; i < results.size(); ++i) {
      const Result& r = results[i];
      std::fprintf(out,
                   "%s\n  {\"name\": \"cuda-decode/%s/%s\", \"us\": %.2f, \"limit_us\": %.2f, \"plan_us\": %.2f, "
                   "\"empty_us\": %.2f, \"bytes\": %zu}",
                   i == 0 ? "" : ",", r.c.name.c_str(), r.c.format.c_str(), r.us, r.limit_us, r.plan_us, r.empty_us,
                   r.bytes);
    }
    std::fprintf(out, "\n]}\n");
    std::fclose(out);
  }
  return 0;
} catch (const std::exception& error) {
  std::fprintf(stderr, "%s\n", error.what());
  return 1;
}
