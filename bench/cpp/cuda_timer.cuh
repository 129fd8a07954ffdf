// Times on a GPU, by events on the device, after a pass over a large buffer that empties L2 by reading (written lines
// would be paid for by who comes next) and keeps the device busy while the host enqueues what follows.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cuda_runtime.h>
#include <stdexcept>
#include <utility>
#include <vector>

#include "heddle/heddle.h"

namespace heddle::bench {

constexpr std::size_t kFlushBytes = std::size_t{1} << 29;  // several times the L2 of any GPU

inline void check(cudaError_t status) {
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

static __global__ void read_kernel(const uint4* data, std::size_t count, unsigned* never) {
  constexpr int kInFlight = 8;
  const std::size_t threads = std::size_t{gridDim.x} * blockDim.x;
  unsigned all = 0;
  for (std::size_t i = blockIdx.x * std::size_t{blockDim.x} + threadIdx.x; i < count; i += kInFlight * threads) {
    uint4 x[kInFlight];
#pragma unroll
    for (int u = 0; u < kInFlight; ++u) x[u] = i + u * threads < count ? __ldcs(data + i + u * threads) : uint4{};
#pragma unroll
    for (int u = 0; u < kInFlight; ++u) all |= x[u].x | x[u].y | x[u].z | x[u].w;
  }
  if (all == 0xffffffffu) *never = all;  // the buffers hold zeros: a store that the compiler cannot rule out
}

static __global__ void nothing_kernel() {}

class CudaTimer {
 public:
  CudaTimer() : flush_(kFlushBytes), never_(sizeof(unsigned)) {
    int device = 0;
    check(cudaGetDevice(&device));
    check(cudaDeviceGetAttribute(&multiprocessors_, cudaDevAttrMultiProcessorCount, device));
    check(cudaEventCreate(&begin_));
    check(cudaEventCreate(&end_));
  }
  ~CudaTimer() {
    cudaEventDestroy(begin_);
    cudaEventDestroy(end_);
  }
  CudaTimer(const CudaTimer&) = delete;
  CudaTimer& operator=(const CudaTimer&) = delete;

  // Enqueues a read of `bytes`, a multiple of 16.
  void read(const void* data, std::size_t bytes) const {
    read_kernel<<<static_cast<unsigned>(4 * multiprocessors_), 512>>>(static_cast<const uint4*>(data), bytes / 16,
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

inline double median_of(std::vector<double> seconds) {
  const auto middle = seconds.begin() + static_cast<std::ptrdiff_t>(seconds.size() / 2);
  std::nth_element(seconds.begin(), middle, seconds.end());
  return *middle;
}

template <class Call>
double median_of_20(Call call) {
  std::vector<double> seconds(20);
  call();  // the first one loads the kernel
  std::generate(seconds.begin(), seconds.end(), call);
  return median_of(std::move(seconds));
}

inline bool has_hopper() {
  const std::vector<Backend> backends = available_backends();
  return std::find(backends.begin(), backends.end(), Backend::kSm90) != backends.end();
}

}  // namespace heddle::bench
