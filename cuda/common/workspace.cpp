#include "cuda/common/workspace.h"

#include <algorithm>
#include <map>
#include <mutex>
#include <string>
#include <tuple>

#include "cuda/common/check.h"

namespace heddle::cuda {
namespace {

struct Block {
  std::byte* data = nullptr;
  std::size_t bytes = 0;
};

// Allocations are allowed while somebody in this thread captures.
class RelaxedCapture {
 public:
  RelaxedCapture() { check(cudaThreadExchangeStreamCaptureMode(&mode_), "workspace"); }
  ~RelaxedCapture() { cudaThreadExchangeStreamCaptureMode(&mode_); }
  RelaxedCapture(const RelaxedCapture&) = delete;
  RelaxedCapture& operator=(const RelaxedCapture&) = delete;

 private:
  cudaStreamCaptureMode mode_ = cudaStreamCaptureModeRelaxed;
};

Block allocate(std::size_t bytes, std::size_t granule) {
  Block block{nullptr, (bytes + granule - 1) / granule * granule};
  const RelaxedCapture relaxed;
  void* data = nullptr;
  check(cudaMalloc(&data, block.bytes), "workspace");
  block.data = static_cast<std::byte*>(data);
  // On a stream of its own: the caller's may be under capture, and would zero at every replay.
  cudaStream_t stream = nullptr;
  check(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "workspace");
  check(cudaMemsetAsync(data, 0, block.bytes, stream), "workspace");
  check(cudaStreamSynchronize(stream), "workspace");
  check(cudaStreamDestroy(stream), "workspace");
  return block;
}

// Pieces of a block that are never given back.
struct Slab {
  Block block;
  std::size_t used = 0;

  std::byte* take(std::size_t bytes) {
    constexpr std::size_t kAlignment = 256, kSlabBytes = 4 << 20;
    bytes = (bytes + kAlignment - 1) / kAlignment * kAlignment;
    if (used + bytes > block.bytes) {
      block = allocate(bytes, kSlabBytes);
      used = 0;
    }
    used += bytes;
    return block.data + used - bytes;
  }
};

}  // namespace

std::byte* workspace(const char* purpose, cudaStream_t stream, std::size_t bytes) {
  static std::mutex mutex;
  static std::map<std::tuple<std::string, int, cudaStream_t>, Block> blocks;
  static std::map<int, Slab> slabs;  // of each device, for captures
  bytes = std::max(bytes, kZeroedBytes);
  int device = 0;
  check(cudaGetDevice(&device), "workspace");
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  check(cudaStreamIsCapturing(stream, &status), "workspace");
  const std::lock_guard lock(mutex);
  if (status != cudaStreamCaptureStatusNone) return slabs[device].take(bytes);

  Block& block = blocks[{purpose, device, stream}];
  if (block.bytes < bytes) {
    // Work on the stream may still use the old block; cudaFree waits for it.
    if (block.data != nullptr) check(cudaFree(block.data), "workspace");
    block = {};
    block = allocate(bytes + bytes / 2, 1 << 20);
  }
  return block.data;
}

}  // namespace heddle::cuda
