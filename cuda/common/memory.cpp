#include "cuda/common/memory.h"

#include <string>

#include "cuda/common/check.h"
#include "cuda/launch.h"

namespace heddle::cuda {

BesideCapture::BesideCapture() { check(cudaThreadExchangeStreamCaptureMode(&mode_), "stream"); }
BesideCapture::~BesideCapture() { cudaThreadExchangeStreamCaptureMode(&mode_); }

void* allocate(std::int64_t bytes, int device) {
  const DeviceScope scope(device);
  const BesideCapture beside;
  void* memory = nullptr;
  const cudaError_t status = cudaMalloc(&memory, static_cast<std::size_t>(bytes));
  if (status == cudaErrorMemoryAllocation) {
    (void)cudaGetLastError();
    throw Error(ErrorCode::kCapacity, "device",
                "cuda:" + std::to_string(device) + " refused an allocation of " + std::to_string(bytes) +
                    " bytes; allowed are fewer or smaller caches");
  }
  check(status, "device");
  // Cleared on a stream of its own: whatever stream uses it, it is zero.
  cudaStream_t own = nullptr;
  check(cudaStreamCreateWithFlags(&own, cudaStreamNonBlocking), "device");
  check(cudaMemsetAsync(memory, 0, static_cast<std::size_t>(bytes), own), "device");
  check(cudaStreamSynchronize(own), "device");
  check(cudaStreamDestroy(own), "device");
  return memory;
}

void release(void* memory, int device) noexcept {
  if (memory == nullptr) return;
  try {
    const DeviceScope scope(device);
    // At exit the driver may be gone already, and with it the memory.
    if (cudaFree(memory) != cudaSuccess) (void)cudaGetLastError();
  } catch (const Error&) {
    (void)cudaGetLastError();
  }
}

void synchronize(int device) {
  const DeviceScope scope(device);
  check(cudaDeviceSynchronize(), "device");
}

void refuse_capture(void* stream) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  check(cudaStreamIsCapturing(static_cast<cudaStream_t>(stream), &status), "stream");
  if (status == cudaStreamCaptureStatusNone) return;
  throw Error(ErrorCode::kValue, "stream",
              "being captured, and this call waits for it (calibration and the validating mode read device memory); "
              "allowed are calls after calibrate() with the validating mode off");
}

namespace {

void copy(void* to, const void* from, std::int64_t bytes, cudaMemcpyKind kind, int device, void* stream) {
  const DeviceScope scope(device);
  refuse_capture(stream);
  const auto queue = static_cast<cudaStream_t>(stream);
  check(cudaMemcpyAsync(to, from, static_cast<std::size_t>(bytes), kind, queue), "copy");
  check(cudaStreamSynchronize(queue), "copy");
}

}  // namespace

void copy_to_host(void* to, const void* from, std::int64_t bytes, int device, void* stream) {
  copy(to, from, bytes, cudaMemcpyDeviceToHost, device, stream);
}

void copy_to_device(void* to, const void* from, std::int64_t bytes, int device, void* stream) {
  copy(to, from, bytes, cudaMemcpyHostToDevice, device, stream);
}

}  // namespace heddle::cuda
