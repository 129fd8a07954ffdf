// Device memory for tests.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <cuda_runtime_api.h>
#include <stdexcept>
#include <string>
#include <vector>

#include <gtest/gtest.h>

#include "cuda/launch.h"
#include "heddle/heddle.h"
#include "support/sample.h"

namespace heddle::testing {

inline void cuda_ok(cudaError_t status, const char* what) {
  if (status != cudaSuccess) throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(status));
}

inline bool has_hopper() {
  for (const Backend backend : available_backends()) {
    if (backend == Backend::kSm90) return true;
  }
  return false;
}

// The text tells ctest that the whole file was skipped.
#define NEEDS_HOPPER()                \
  if (!heddle::testing::has_hopper()) \
  GTEST_SKIP() << "needs a GPU of compute capability 9.0; CUDA devices here: " << heddle::cuda::device_count()

// Copies of host memory on a device, one after the other in one allocation that is NaN around and between them, and a
// stream to work on. On the CPU too, so that tests of kernels can be tested without a GPU.
class DeviceArena {
 public:
  explicit DeviceArena(std::size_t bytes, Device device = {DeviceType::kCuda, 0}) : bytes_(bytes), device_(device) {
    if (on_cpu()) {
      host_.assign(bytes, std::byte{0xff});
      base_ = host_.data();
    } else {
      cuda_ok(cudaMalloc(&base_, bytes), "cudaMalloc");
      cuda_ok(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking), "cudaStreamCreate");
      cuda_ok(cudaMemsetAsync(base_, 0xff, bytes_, stream_), "cudaMemset");
    }
  }
  ~DeviceArena() {
    if (on_cpu()) return;
    cudaStreamDestroy(stream_);
    cudaFree(base_);
  }
  DeviceArena(const DeviceArena&) = delete;
  DeviceArena& operator=(const DeviceArena&) = delete;

  Device device() const { return device_; }
  bool on_cpu() const { return device_.type == DeviceType::kCpu; }
  Stream stream() const { return {stream_}; }
  void wait() const {
    if (!on_cpu()) cuda_ok(cudaStreamSynchronize(stream_), "kernel");
  }

  // Forgets the copies.
  void clear() {
    if (on_cpu()) {
      std::memset(base_, 0xff, used_);
    } else {
      cuda_ok(cudaMemsetAsync(base_, 0xff, used_, stream_), "cudaMemset");
    }
    used_ = 0;
  }
  std::byte* put(const void* from, std::size_t bytes) {
    constexpr std::size_t kAlignment = 256, kApart = 1024;
    const std::size_t at = (used_ + kApart + kAlignment - 1) / kAlignment * kAlignment;
    if (at + bytes + kApart > bytes_) throw std::runtime_error("the arena of device memory is too small");
    used_ = at + bytes;
    auto* to = static_cast<std::byte*>(base_) + at;
    if (bytes == 0) return to;
    if (on_cpu()) {
      std::memcpy(to, from, bytes);
    } else {
      cuda_ok(cudaMemcpyAsync(to, from, bytes, cudaMemcpyHostToDevice, stream_), "upload");
    }
    return to;
  }
  // All memory of a tensor, guards and gaps included; the view of the copy.
  TensorView put(const Tensor& x) {
    TensorView view = x.view;
    view.data = put(x.memory.data(), x.memory.size()) + (x.view.as<std::byte>() - x.memory.data());
    view.device = device();
    return view;
  }
  // A row-major array.
  TensorView put(const TensorView& x) {
    if (!x.given()) return {};
    TensorView view = x;
    view.data = put(x.data, static_cast<std::size_t>(x.numel()) * size_of(x.dtype));
    view.device = device();
    return view;
  }
  // Writes host memory over the copy `view` of a tensor.
  void set(const std::byte* from, const TensorView& view, const Tensor& x) const {
    auto* to = view.as<std::byte>() - (x.view.as<std::byte>() - x.memory.data());
    if (on_cpu()) {
      std::memcpy(to, from, x.memory.size());
    } else {
      cuda_ok(cudaMemcpyAsync(to, from, x.memory.size(), cudaMemcpyHostToDevice, stream_), "upload");
    }
  }
  void get(void* to, const void* from, std::size_t bytes) const {
    if (on_cpu()) {
      std::memcpy(to, from, bytes);
      return;
    }
    cuda_ok(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToHost, stream_), "download");
    wait();
  }
  // The memory of x, from its copy `view`.
  void get(Tensor& x, const TensorView& view) const {
    get(x.memory.data(), view.as<std::byte>() - (x.view.as<std::byte>() - x.memory.data()), x.memory.size());
  }

 private:
  std::vector<std::byte> host_;
  void* base_ = nullptr;
  std::size_t bytes_, used_ = 0;
  Device device_;
  cudaStream_t stream_ = nullptr;
};

// A copy of a host cache in an arena.
inline KVCache device_copy(const KVCache& cache, DeviceArena& arena) {
  CacheConfig config = cache.config();
  config.device = arena.device();
  config.page_bounds = arena.device().type == DeviceType::kCpu && config.page_bounds;  // kept on the CPU alone
  return KVCache(config, {.k = arena.put(cache.k()),
                          .v = arena.put(cache.v()),
                          .k_scale = arena.put(cache.k_scale()),
                          .v_scale = arena.put(cache.v_scale()),
                          .q_scale = arena.put(cache.q_scale()),
                          .value_norms = arena.put(cache.value_norms()),
                          .saturation = arena.put(cache.saturation())});
}

}  // namespace heddle::testing
