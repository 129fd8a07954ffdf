// The memory that kernels use between themselves: a stream's, and a captured graph's.
#include <chrono>
#include <set>
#include <thread>
#include <vector>

#include "cuda_support.h"
#include <gtest/gtest.h>

#include "cuda/common/workspace.h"

namespace heddle::testing {
namespace {

class Streams : public ::testing::Test {
 protected:
  void SetUp() override {
    NEEDS_HOPPER();
    for (cudaStream_t& s : streams_) cuda_ok(cudaStreamCreateWithFlags(&s, cudaStreamNonBlocking), "stream");
  }
  void TearDown() override {
    for (const cudaStream_t s : streams_) {
      if (s != nullptr) cudaStreamDestroy(s);
    }
  }
  // Where a call that needs `bytes` works, and what it finds in the first of them before it writes `mark`.
  void* use(int stream, std::int64_t bytes, unsigned char mark = 0xff) {
    void* at = nullptr;
    cuda::with_workspace("test", 0, streams_[stream], bytes, [&](void* memory) {
      at = memory;
      cuda_ok(cudaMemsetAsync(memory, mark, static_cast<std::size_t>(bytes), streams_[stream]), "memset");
    });
    return at;
  }
  cudaGraph_t capture(int stream, const std::vector<std::int64_t>& sizes, std::vector<void*>& places,
                      cudaStreamCaptureMode mode = cudaStreamCaptureModeGlobal) {
    cudaGraph_t graph = nullptr;
    cuda_ok(cudaStreamBeginCapture(streams_[stream], mode), "capture");
    for (const std::int64_t bytes : sizes) places.push_back(use(stream, bytes));
    cuda_ok(cudaStreamEndCapture(streams_[stream], &graph), "capture");
    return graph;
  }
  cudaStream_t streams_[2] = {};
};

TEST_F(Streams, KeepTheirMemoryApart) {
  void* first = use(0, 1000);
  EXPECT_EQ(use(0, 500), first);
  EXPECT_NE(use(1, 1000), first);
  EXPECT_NE(static_cast<void*>(cuda::workspace("another test", streams_[0], 1000)), first);
  EXPECT_EQ(static_cast<void*>(cuda::workspace("test", streams_[0], 1000)), first);
  EXPECT_EQ(reinterpret_cast<std::uintptr_t>(first) % 256, 0u);
  // Grown memory is new, and zero before it is used.
  unsigned char found = 1;
  cuda::with_workspace("test", 0, streams_[0], 1 << 24, [&](void* memory) {
    cuda_ok(cudaMemcpyAsync(&found, static_cast<char*>(memory) + (1 << 24) - 1, 1, cudaMemcpyDeviceToHost, streams_[0]),
            "copy");
    cuda_ok(cudaStreamSynchronize(streams_[0]), "wait");
  });
  EXPECT_EQ(found, 0);
}

TEST_F(Streams, GraphsOwnTheirMemory) {
  void* eager = use(0, 4096);
  std::vector<void*> a, b;
  const cudaGraph_t first = capture(0, {40960, 100, 81920, 40960}, a), second = capture(0, {40960}, b);
  EXPECT_EQ(a[0], a[1]);
  EXPECT_NE(a[0], a[2]) << "a larger block";
  EXPECT_EQ(a[2], a[3]);
  EXPECT_EQ((std::set<void*>{eager, a[0], a[2], b[0]}).size(), 4u);
  EXPECT_EQ(use(0, 4096), eager);

  // As long as something that was made of the graph lives, nobody else gets its memory.
  cudaGraphExec_t replay = nullptr;
  cuda_ok(cudaGraphInstantiate(&replay, second, 0), "instantiate");
  cuda_ok(cudaGraphDestroy(second), "destroy");
  std::vector<void*> c;
  const cudaGraph_t third = capture(1, {40960}, c);
  EXPECT_NE(c[0], b[0]);
  cuda_ok(cudaGraphLaunch(replay, streams_[1]), "launch");
  cuda_ok(cudaStreamSynchronize(streams_[1]), "replay");
  cuda_ok(cudaGraphExecDestroy(replay), "destroy");
  cuda_ok(cudaGraphDestroy(first), "destroy");
  cuda_ok(cudaGraphDestroy(third), "destroy");
  // Graphs are taken apart behind the caller's back: wait until a capture gets old memory.
  const std::set<void*> old = {a[0], a[2], b[0], c[0]};
  bool reused = false;
  for (int attempt = 0; attempt < 200 && !reused; ++attempt) {
    std::this_thread::sleep_for(std::chrono::milliseconds(5));
    std::vector<void*> d;
    cuda_ok(cudaGraphDestroy(capture(0, {100}, d, cudaStreamCaptureModeThreadLocal)), "destroy");
    reused = old.contains(d[0]);
  }
  EXPECT_TRUE(reused);
}

}  // namespace
}  // namespace heddle::testing
