#include "cuda/sm90/workspace.h"

#include <algorithm>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <utility>

#include "cuda/common/check.h"
#include "cuda/launch.h"

namespace heddle::cuda {
namespace {

struct Workspace {
  std::mutex mutex;
  void* memory = nullptr;
  std::int64_t bytes = 0;
};

Workspace& workspace_of(int device, void* stream) {
  static std::mutex mutex;
  // Never freed: at exit the driver may be gone before.
  static auto& all = *new std::map<std::pair<int, void*>, std::unique_ptr<Workspace>>();
  const std::lock_guard lock(mutex);
  auto& workspace = all[{device, stream}];
  if (workspace == nullptr) workspace = std::make_unique<Workspace>();
  return *workspace;
}

}  // namespace

void with_workspace(int device, void* stream, std::int64_t bytes, const std::function<void(void*)>& enqueue) {
  Workspace& workspace = workspace_of(device, stream);
  const std::lock_guard lock(workspace.mutex);
  if (workspace.bytes < bytes) {
    const DeviceScope scope(device);
    cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
    check(cudaStreamIsCapturing(static_cast<cudaStream_t>(stream), &status), "stream");
    if (status != cudaStreamCaptureStatusNone) {
      throw Error(ErrorCode::kValue, "stream",
                  "being captured, and this call needs " + std::to_string(bytes) +
                      " bytes of workspace, which this stream does not have yet; allowed is a call of the same shapes "
                      "before the capture");
    }
    const std::int64_t grown = std::max(bytes, 2 * workspace.bytes);
    workspace.memory = allocate(grown, device);
    workspace.bytes = grown;
  }
  enqueue(workspace.memory);
}

}  // namespace heddle::cuda
