#include "cuda/common/workspace.h"

#include <algorithm>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <tuple>
#include <vector>

#include "cuda/common/check.h"
#include "cuda/launch.h"

namespace heddle::cuda {
namespace {

struct Block {
  std::string purpose;
  int device = 0;
  void* memory = nullptr;
  std::int64_t bytes = 0;
};

// Memory of graphs that are gone. The lock is never held over a call into CUDA: graphs are destroyed on threads of the
// driver, which give their memory back here.
class Pool {
 public:
  Block take(const std::string& purpose, int device, std::int64_t bytes) {
    const std::lock_guard lock(mutex_);
    const auto fits = std::find_if(blocks_.begin(), blocks_.end(), [&](const Block& b) {
      return b.purpose == purpose && b.device == device && b.bytes >= bytes;
    });
    if (fits == blocks_.end()) return {};
    const Block block = *fits;
    blocks_.erase(fits);
    return block;
  }
  void give(const Block& block) {
    const std::lock_guard lock(mutex_);
    blocks_.push_back(block);
  }

 private:
  std::mutex mutex_;
  std::vector<Block> blocks_;
};

Pool& pool() {
  static Pool& pool = *new Pool;  // never destroyed: at exit the driver may be gone before, or still busy
  return pool;
}

// What a stream works on; while it is being captured, what the graph does.
struct Workspace {
  std::string purpose;
  int device = 0;
  cudaStream_t stream = nullptr;
  std::mutex mutex;
  Block block;
  unsigned long long capture = 0;
  Block of_capture;
};

Workspace& workspace_of(const char* purpose, int device, cudaStream_t stream) {
  static std::mutex mutex;
  static auto& all = *new std::map<std::tuple<std::string, int, cudaStream_t>, std::unique_ptr<Workspace>>();
  const std::lock_guard lock(mutex);
  auto& workspace = all[{purpose, device, stream}];
  if (workspace == nullptr) {
    workspace = std::make_unique<Workspace>();
    workspace->purpose = purpose;
    workspace->device = device;
    workspace->stream = stream;
  }
  return *workspace;
}

// The graph keeps the block; the pool has it back when the graph is gone.
void retain(cudaGraph_t graph, const Block& block) {
  cudaUserObject_t object = nullptr;
  check(cudaUserObjectCreate(
            &object, new Block(block),
            [](void* held) {
              auto* gone = static_cast<Block*>(held);
              pool().give(*gone);
              delete gone;
            },
            1, cudaUserObjectNoDestructorSync),
        "workspace");
  check(cudaGraphRetainUserObject(graph, object, 1, cudaGraphUserObjectMove), "workspace");
}

// Its lock is held, and its device is current.
void* memory_of(Workspace& w, std::int64_t bytes) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  unsigned long long capture = 0;
  cudaGraph_t graph = nullptr;
#if CUDART_VERSION >= 13000
  check(cudaStreamGetCaptureInfo(w.stream, &status, &capture, &graph, nullptr, nullptr, nullptr), "stream");
#else
  check(cudaStreamGetCaptureInfo_v2(w.stream, &status, &capture, &graph, nullptr, nullptr), "stream");
#endif
  if (status == cudaStreamCaptureStatusActive) {
    if (w.capture != capture || w.of_capture.bytes < bytes) {
      Block block = pool().take(w.purpose, w.device, bytes);
      if (block.memory == nullptr) block = {w.purpose, w.device, allocate(bytes, w.device), bytes};
      retain(graph, block);
      w.capture = capture;
      w.of_capture = block;
    }
    return w.of_capture.memory;
  }

  if (Block& block = w.block; block.bytes < bytes) {
    const std::int64_t grown = std::max(bytes, 2 * block.bytes);
    void* memory = nullptr;
    check(cudaMallocAsync(&memory, static_cast<std::size_t>(grown), w.stream), "workspace");
    check(cudaMemsetAsync(memory, 0, static_cast<std::size_t>(grown), w.stream), "workspace");
    if (block.memory != nullptr) check(cudaFreeAsync(block.memory, w.stream), "workspace");
    block = {w.purpose, w.device, memory, grown};
  }
  return w.block.memory;
}

std::int64_t at_least_zeroed(std::int64_t bytes) { return std::max(bytes, static_cast<std::int64_t>(kZeroedBytes)); }

}  // namespace

std::byte* workspace(const char* purpose, cudaStream_t stream, std::size_t bytes) {
  int device = 0;
  check(cudaGetDevice(&device), "workspace");
  Workspace& w = workspace_of(purpose, device, stream);
  const std::lock_guard lock(w.mutex);
  return static_cast<std::byte*>(memory_of(w, at_least_zeroed(static_cast<std::int64_t>(bytes))));
}

void with_workspace(const char* purpose, int device, void* stream, std::int64_t bytes,
                    const std::function<void(void*)>& enqueue) {
  const DeviceScope scope(device);
  Workspace& w = workspace_of(purpose, device, static_cast<cudaStream_t>(stream));
  const std::lock_guard lock(w.mutex);
  enqueue(memory_of(w, at_least_zeroed(bytes)));
}

}  // namespace heddle::cuda
