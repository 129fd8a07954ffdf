// cuda-merge/<dtype>/p<parts>/r<rows>: the CUDA merge, 32 heads, Dv 128, as a fraction of a cold read of the same
// number of bytes. Each call is timed by events on the device, after a pass over a large buffer that empties L2 by
// reading and keeps the device busy while the host enqueues what follows.
#include <algorithm>
#include <cuda_runtime.h>
#include <stdexcept>
#include <string>
#include <vector>

#include "bench.h"

#include "cuda/launch.h"

namespace heddle::bench {
namespace {

constexpr std::int64_t kHeads = 32, kDim = 128;
constexpr std::size_t kFlushBytes = std::size_t{1} << 29;  // several times the L2 of any GPU

void check(cudaError_t status) {
  if (status != cudaSuccess) throw std::runtime_error(cudaGetErrorString(status));
}

class DeviceBuffer {
 public:
  explicit DeviceBuffer(std::size_t bytes) {
    check(cudaMalloc(&data_, bytes));
    check(cudaMemset(data_, 0, bytes));
  }
  ~DeviceBuffer() { cudaFree(data_); }
  DeviceBuffer(const DeviceBuffer&) = delete;
  DeviceBuffer& operator=(const DeviceBuffer&) = delete;
  void* data() const { return data_; }

 private:
  void* data_ = nullptr;
};

__global__ void read_kernel(const uint4* data, std::size_t count, unsigned* never) {
  unsigned all = 0;
  for (std::size_t i = blockIdx.x * std::size_t{blockDim.x} + threadIdx.x; i < count;
       i += std::size_t{gridDim.x} * blockDim.x) {
    const uint4 x = data[i];
    all |= x.x | x.y | x.z | x.w;
  }
  if (all == 0xffffffffu) *never = all;  // the buffers hold zeros: a store that the compiler cannot rule out
}

class Timer {
 public:
  Timer() : flush_(kFlushBytes), never_(sizeof(unsigned)) {
    int device = 0;
    check(cudaGetDevice(&device));
    check(cudaDeviceGetAttribute(&multiprocessors_, cudaDevAttrMultiProcessorCount, device));
    check(cudaEventCreate(&begin_));
    check(cudaEventCreate(&end_));
  }
  ~Timer() {
    cudaEventDestroy(begin_);
    cudaEventDestroy(end_);
  }
  Timer(const Timer&) = delete;
  Timer& operator=(const Timer&) = delete;

  // Enqueues a read of `bytes`, a multiple of 16.
  void read(const void* data, std::size_t bytes) const {
    read_kernel<<<static_cast<unsigned>(8 * multiprocessors_), 512>>>(static_cast<const uint4*>(data), bytes / 16,
                                                                      static_cast<unsigned*>(never_.data()));
    check(cudaGetLastError());
  }
  // Device seconds of what `enqueue` enqueues, from memory.
  template <class Enqueue>
  double seconds(Enqueue enqueue) const {
    read(flush_.data(), kFlushBytes);
    check(cudaEventRecord(begin_));
    enqueue();
    check(cudaEventRecord(end_));
    check(cudaEventSynchronize(end_));
    float milliseconds = 0.0f;
    check(cudaEventElapsedTime(&milliseconds, begin_, end_));
    return milliseconds * 1e-3;
  }

 private:
  DeviceBuffer flush_, never_;
  int multiprocessors_ = 0;
  cudaEvent_t begin_ = nullptr, end_ = nullptr;
};

template <class Call>
double median_of_20(Call call) {
  std::vector<double> seconds(20);
  call();  // the first one loads the kernel
  std::generate(seconds.begin(), seconds.end(), call);
  std::nth_element(seconds.begin(), seconds.begin() + 10, seconds.end());
  return seconds[10];
}

void merge_parts(benchmark::State& state, DType dtype, std::int64_t parts, std::int64_t tokens) {
  const auto rows = static_cast<std::size_t>(tokens * kHeads), row_bytes = kDim * size_of(dtype);
  const std::size_t bytes = rows * static_cast<std::size_t>(parts + 1) * (row_bytes + sizeof(float));
  const DeviceBuffer outs(rows * static_cast<std::size_t>(parts) * row_bytes), out(rows * row_bytes),
      lses(rows * static_cast<std::size_t>(parts) * sizeof(float)), lse(rows * sizeof(float)), limit(bytes);
  const Device gpu{DeviceType::kCuda, 0};
  const MergeParams params{.outs = TensorView(outs.data(), dtype, {parts, 1, tokens, kHeads, kDim}, gpu),
                           .lses = TensorView(lses.data(), DType::kFloat32, {parts, 1, kHeads, tokens}, gpu),
                           .out = TensorView(out.data(), dtype, {1, tokens, kHeads, kDim}, gpu),
                           .lse = TensorView(lse.data(), DType::kFloat32, {1, kHeads, tokens}, gpu),
                           .backend = Backend::kSm90};
  const Timer timer;
  const double read_seconds = median_of_20([&] { return timer.seconds([&] { timer.read(limit.data(), bytes); }); });
  std::vector<double> seconds;
  for (auto _ : state) {
    seconds.push_back(timer.seconds([&] { merge(params); }));
    state.SetIterationTime(seconds.back());
  }
  std::nth_element(seconds.begin(), seconds.begin() + static_cast<std::ptrdiff_t>(seconds.size() / 2), seconds.end());
  const double median = seconds[seconds.size() / 2];
  state.counters["us"] = median * 1e6;
  state.counters["GB/s"] = static_cast<double>(bytes) * 1e-9 / median;
  state.counters["fraction"] = read_seconds / median;
  state.SetLabel("of a cold read of " + std::to_string(bytes >> 10) + " KiB, " + last_kernel());
}

}  // namespace

void register_cuda_merge() {
  const std::vector<Backend> backends = available_backends();
  if (std::find(backends.begin(), backends.end(), Backend::kSm90) == backends.end()) return;
  for (const DType dtype : {DType::kFloat32, DType::kBFloat16}) {
    // What is left of one request decoded over 16, 64 and 128 splits; a batch; prefill over two halves of a context.
    for (const auto& [parts, tokens] : {std::pair{16, 1}, std::pair{64, 1}, std::pair{128, 1}, std::pair{16, 64},
                                        std::pair{2, 8192}, std::pair{8, 8192}}) {
      const std::string name = "cuda-merge/" + std::string(dtype == DType::kFloat32 ? "fp32" : "bf16") + "/p" +
                               std::to_string(parts) + "/r" + std::to_string(tokens * kHeads);
      benchmark::RegisterBenchmark(name.c_str(), merge_parts, dtype, parts, tokens)
          ->UseManualTime()
          ->Unit(benchmark::kMicrosecond)
          ->Iterations(50);
    }
  }
}

}  // namespace heddle::bench
