#include "cuda/common/workspace.h"

#include <algorithm>
#include <map>
#include <memory>
#include <mutex>
#include <utility>
#include <vector>

#include "cuda/common/check.h"
#include "cuda/launch.h"

namespace heddle::cuda {
namespace {

struct Block {
  int device = 0;
  void* memory = nullptr;
  std::int64_t bytes = 0;
};

// Memory of graphs that are gone. The lock is never held over a call into CUDA: graphs are destroyed on threads of the
// driver, which give their memory back here.
class Pool {
 public:
  Block take(int device, std::int64_t bytes) {
    const std::lock_guard lock(mutex_);
    const auto fits = std::find_if(blocks_.begin(), blocks_.end(),
                                   [&](const Block& b) { return b.device == device && b.bytes >= bytes; });
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
  std::mutex mutex;
  Block block;
  unsigned long long capture = 0;
  Block of_capture;
};

Workspace& workspace_of(int device, void* stream) {
  static std::mutex mutex;
  static auto& all = *new std::map<std::pair<int, void*>, std::unique_ptr<Workspace>>();
  const std::lock_guard lock(mutex);
  auto& workspace = all[{device, stream}];
  if (workspace == nullptr) workspace = std::make_unique<Workspace>();
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

}  // namespace

void with_workspace(int device, void* stream, std::int64_t bytes, const std::function<void(void*)>& enqueue) {
  const DeviceScope scope(device);
  const auto queue = static_cast<cudaStream_t>(stream);
  Workspace& workspace = workspace_of(device, stream);
  const std::lock_guard lock(workspace.mutex);

  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  unsigned long long capture = 0;
  cudaGraph_t graph = nullptr;
#if CUDART_VERSION >= 13000
  check(cudaStreamGetCaptureInfo(queue, &status, &capture, &graph, nullptr, nullptr, nullptr), "stream");
#else
  check(cudaStreamGetCaptureInfo_v2(queue, &status, &capture, &graph, nullptr, nullptr), "stream");
#endif
  if (status == cudaStreamCaptureStatusActive) {
    if (workspace.capture != capture || workspace.of_capture.bytes < bytes) {
      Block block = pool().take(device, bytes);
      if (block.memory == nullptr) block = {device, allocate(bytes, device), bytes};
      retain(graph, block);
      workspace.capture = capture;
      workspace.of_capture = block;
    }
    return enqueue(workspace.of_capture.memory);
  }

  if (Block& block = workspace.block; block.bytes < bytes) {
    const std::int64_t grown = std::max(bytes, 2 * block.bytes);
    void* memory = nullptr;
    check(cudaMallocAsync(&memory, static_cast<std::size_t>(grown), queue), "workspace");
    check(cudaMemsetAsync(memory, 0, static_cast<std::size_t>(grown), queue), "workspace");
    if (block.memory != nullptr) check(cudaFreeAsync(block.memory, queue), "workspace");
    block = {device, memory, grown};
  }
  enqueue(workspace.block.memory);
}

}  // namespace heddle::cuda
