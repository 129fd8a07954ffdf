// cuda-prefill/<dtype>/<mask>/d<D>/s<S> and cuda-decode/<format>/h<Hq>/p<page>/<lengths>: the public calls on a GPU.
// Prefill reports TFLOP/s of the visible pairs; decode the fraction of a cold read of the same bytes (K, V and scales
// of K). Inputs are random, since the power that zeros do not take would flatter the figures.
#include <cstdint>
#include <memory>
#include <numeric>
#include <string>
#include <utility>
#include <vector>

#include "bench.h"
#include "cuda_timer.cuh"

#include "core/dispatch.h"

namespace heddle::bench {
namespace {

constexpr Device kGpu{DeviceType::kCuda, 0};

// Elements of about N(0, 1) (the sum of four bytes); int8 in steps of 1/32, E4M3 without its NaNs.
__global__ void fill_kernel(void* data, std::size_t count, DType dtype, std::uint32_t seed) {
  for (std::size_t i = blockIdx.x * std::size_t{blockDim.x} + threadIdx.x; i < count;
       i += std::size_t{gridDim.x} * blockDim.x) {
    std::uint32_t x = static_cast<std::uint32_t>(i) * 0x9e3779b9u + seed;  // Murmur3's finalizer
    x = (x ^ (x >> 16)) * 0x85ebca6bu;
    x = (x ^ (x >> 13)) * 0xc2b2ae35u;
    x ^= x >> 16;
    const int sum = static_cast<int>((x & 0xff) + (x >> 8 & 0xff) + (x >> 16 & 0xff) + (x >> 24)) - 510;
    const float value = static_cast<float>(sum) / 148.0f;
    switch (dtype) {
      case DType::kBFloat16:
        static_cast<std::uint16_t*>(data)[i] = static_cast<std::uint16_t>(__float_as_uint(value) >> 16);
        break;
      case DType::kFloat32: static_cast<float*>(data)[i] = value; break;
      case DType::kInt8: static_cast<std::int8_t*>(data)[i] = static_cast<std::int8_t>(sum / 5); break;
      default: static_cast<std::uint8_t*>(data)[i] = static_cast<std::uint8_t>(x & 0xb7u); break;  // E4M3, below 16
    }
  }
}

// A row-major tensor on the GPU.
class DeviceTensor {
 public:
  DeviceTensor(DType dtype, std::initializer_list<std::int64_t> shape)
      : view(nullptr, dtype, shape, kGpu), memory_(static_cast<std::size_t>(view.numel()) * size_of(dtype)) {
    view.data = memory_.data();
  }
  DeviceTensor& random() {
    fill_kernel<<<1024, 256>>>(view.data, static_cast<std::size_t>(view.numel()), view.dtype, 1);
    check(cudaGetLastError());
    return *this;
  }
  template <class T>
  DeviceTensor& upload(const std::vector<T>& values) {
    check(cudaMemcpy(view.data, values.data(), values.size() * sizeof(T), cudaMemcpyHostToDevice));
    return *this;
  }
  TensorView view;

 private:
  DeviceBuffer memory_;
};

template <class Params, class Call>
double median_seconds(benchmark::State& state, const CudaTimer& timer, const Params& params, Call call) {
  try {
    call(params);
    check(cudaDeviceSynchronize());
  } catch (const Error& error) {
    state.SkipWithError(error.what());
    return 0.0;
  }
  std::vector<double> seconds;
  for (auto _ : state) {
    seconds.push_back(timer.seconds([&] { call(params); }));
    state.SetIterationTime(seconds.back());
  }
  state.SetLabel(last_kernel());
  const double median = median_of(std::move(seconds));
  state.counters["us"] = median * 1e6;
  return median;
}

struct Prefill {
  const char* mask;
  std::int64_t batch, length, q_heads, kv_heads, dim;
};

void prefill(benchmark::State& state, const Prefill& p) {
  DeviceTensor q(DType::kBFloat16, {p.batch, p.length, p.q_heads, p.dim}),
      k(DType::kBFloat16, {p.batch, p.length, p.kv_heads, p.dim}),
      v(DType::kBFloat16, {p.batch, p.length, p.kv_heads, p.dim}),
      out(DType::kBFloat16, {p.batch, p.length, p.q_heads, p.dim});
  AttentionParams params{
      .q = q.random().view, .k = k.random().view, .v = v.random().view, .out = out.view, .backend = Backend::kSm90};
  const std::string mask(p.mask);
  constexpr std::int64_t kWindow = 1024, kGlobals = 64;
  params.causal = mask != "full";
  double pairs = 0.0;  // of a head
  for (std::int64_t i = 0; i < p.length; ++i) pairs += static_cast<double>(params.causal ? i + 1 : p.length);
  if (mask == "window1024+64") {
    params.selection = Selection::window(kWindow - 1, 0, kGlobals);
    pairs = 0.0;
    for (std::int64_t i = 0; i < p.length; ++i) {
      const std::int64_t first = std::max<std::int64_t>(0, i + 1 - kWindow);
      pairs += static_cast<double>(i + 1 - first + std::min(first, kGlobals));
    }
  }
  const CudaTimer timer;
  const double seconds = median_seconds(state, timer, params, [](const AttentionParams& x) { attention(x); });
  if (seconds == 0.0) return;
  state.counters["TFLOP/s"] = 4.0 * pairs * static_cast<double>(p.batch * p.q_heads * p.dim) * 1e-12 / seconds;
}

using Lengths = std::vector<std::int32_t>;

Lengths operator+(Lengths a, const Lengths& b) {
  a.insert(a.end(), b.begin(), b.end());
  return a;
}

struct Decode {
  CacheFormat format;
  std::int64_t q_heads, page_size;
  Lengths lengths;
};

void decode_lengths(benchmark::State& state, const Decode& d) {
  constexpr std::int64_t kHeads = 8, kDim = 128;
  const auto batch = static_cast<std::int64_t>(d.lengths.size());
  std::int64_t longest = 0, num_pages = 0, tokens = 0;
  for (const std::int32_t n : d.lengths) {
    longest = std::max<std::int64_t>(longest, (n + d.page_size - 1) / d.page_size);
    num_pages += (n + d.page_size - 1) / d.page_size;
    tokens += n;
  }
  // Pages in a random order, as an engine that has run for a while has them.
  std::vector<std::int32_t> pages(static_cast<std::size_t>(num_pages)),
      table(static_cast<std::size_t>(batch * longest), -1);
  std::iota(pages.begin(), pages.end(), 0);
  std::uint32_t random = 1;
  for (std::size_t i = pages.size() - 1; i > 0; --i) {
    random = random * 1664525u + 1013904223u;
    std::swap(pages[i], pages[(std::uint64_t{random} * (i + 1)) >> 32]);
  }
  std::size_t next = 0;
  for (std::int64_t b = 0; b < batch; ++b) {
    for (std::int64_t i = 0; i * d.page_size < d.lengths[static_cast<std::size_t>(b)]; ++i) {
      table[static_cast<std::size_t>(b * longest + i)] = pages[next++];
    }
  }

  const bool float8 = d.format == CacheFormat::kFp8, quantized = d.format != CacheFormat::kBf16;
  const DType dtype = float8 ? DType::kFloat8E4M3 : quantized ? DType::kInt8 : DType::kBFloat16;
  const bool by_token = d.format == CacheFormat::kInt8A;
  DeviceTensor k(dtype, {num_pages, kHeads, d.page_size, kDim}), v(dtype, {num_pages, kHeads, d.page_size, kDim}),
      norms(DType::kFloat32, {num_pages, kHeads, d.page_size}), saturation(DType::kInt64, {1}),
      k_scale = by_token ? DeviceTensor(DType::kFloat32, {num_pages, kHeads, d.page_size})
                         : DeviceTensor(DType::kFloat32, {1}),
      v_scale(DType::kFloat32, {1});
  const float step = 1.0f / 32.0f;
  k_scale.upload(std::vector<float>(static_cast<std::size_t>(k_scale.view.numel()), step));
  v_scale.upload(std::vector<float>{step});
  CacheStorage storage{
      .k = k.random().view, .v = v.random().view, .value_norms = norms.view, .saturation = saturation.view};
  if (quantized) {
    storage.k_scale = k_scale.view;
    storage.v_scale = v_scale.view;
  }
  KVCache cache({.num_pages = num_pages,
                 .page_size = d.page_size,
                 .num_kv_heads = kHeads,
                 .head_dim = kDim,
                 .format = d.format,
                 .device = kGpu},
                storage);
  DeviceTensor q(DType::kBFloat16, {batch, 1, d.q_heads, kDim}), out(DType::kBFloat16, {batch, 1, d.q_heads, kDim}),
      block_table(DType::kInt32, {batch, longest}), seq_lens(DType::kInt32, {batch});
  const DecodeParams params{.q = q.random().view,
                            .cache = &cache,
                            .block_table = block_table.upload(table).view,
                            .seq_lens = seq_lens.upload(d.lengths).view,
                            .out = out.view,
                            .backend = Backend::kSm90};
  const auto bytes = static_cast<std::size_t>(tokens * kHeads) *
                     (2 * kDim * size_of(dtype) + (by_token ? sizeof(float) : 0)) / 16 * 16;
  const CudaTimer timer;
  const DeviceBuffer limit(bytes);
  const double read = median_of_20([&] { return timer.seconds([&] { timer.read(limit.data(), bytes); }); });
  const double seconds = median_seconds(state, timer, params, [](const DecodeParams& x) { decode(x); });
  if (seconds == 0.0) return;
  state.counters["limit_us"] = read * 1e6;
  state.counters["fraction"] = read / seconds;
}

bool offered(Operation operation) {
  try {
    find_row(operation, Backend::kSm90, {});
    return true;
  } catch (const Error&) {
    return false;
  }
}

template <class Run, class Case>
void add(const std::string& name, Run run, const Case& c) {
  benchmark::RegisterBenchmark(name.c_str(), [=](benchmark::State& state) { run(state, c); })
      ->UseManualTime()
      ->Unit(benchmark::kMicrosecond)
      ->Iterations(20);
}

}  // namespace

void register_cuda_attention() {
  if (!has_hopper()) return;
  if (offered(Operation::kAttention)) {
    std::vector<Prefill> cases;
    for (const auto& [dim, heads] : {std::pair<std::int64_t, std::int64_t>{64, 32}, {128, 16}, {256, 8}}) {
      for (const std::int64_t length : {2048, 8192, 16384}) {
        for (const char* mask : {"full", "causal"}) cases.push_back({mask, 16384 / length, length, heads, heads, dim});
      }
    }
    for (const std::int64_t length : {32768, 131072}) cases.push_back({"causal", 1, length, 32, 8, 128});
    for (const std::int64_t length : {16384, 32768}) cases.push_back({"window1024+64", 1, length, 16, 16, 128});
    for (const Prefill& c : cases) {
      add("cuda-prefill/bf16/" + std::string(c.mask) + "/d" + std::to_string(c.dim) + "/s" + std::to_string(c.length),
          prefill, c);
    }
  }
  if (!offered(Operation::kDecode)) return;
  const std::vector<std::pair<const char*, Lengths>> scenarios = {
      {"1x128K", Lengths(1, 131072)},
      {"1x32K", Lengths(1, 32768)},
      {"64x4K", Lengths(64, 4096)},
      {"16x32K", Lengths(16, 32768)},
      {"4x128K", Lengths(4, 131072)},
      {"1x128K+31x4K", Lengths(1, 131072) + Lengths(31, 4096)},
      {"32x128+32x4K", Lengths(32, 128) + Lengths(32, 4096)},
      {"64x512", Lengths(64, 512)},
      {"4x64K+60x1K", Lengths(4, 65536) + Lengths(60, 1024)},
      {"1x512K+127x512", Lengths(1, 524288) + Lengths(127, 512)}};
  for (const CacheFormat format : {CacheFormat::kBf16, CacheFormat::kInt8B, CacheFormat::kInt8A, CacheFormat::kFp8}) {
    for (const std::int64_t heads : {32, 64}) {
      for (const std::int64_t page : {16, 64}) {
        for (const auto& [name, lengths] : scenarios) {
          add("cuda-decode/" + std::string(to_string(format)) + "/h" + std::to_string(heads) + "/p" +
                  std::to_string(page) + "/" + name,
              decode_lengths, Decode{format, heads, page, lengths});
        }
      }
    }
  }
}

}  // namespace heddle::bench
