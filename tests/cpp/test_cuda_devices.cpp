// Asking for devices works on every machine: with a GPU, with a driver that has none, and without a driver.
#include <algorithm>
#include <cuda_runtime_api.h>
#include <string>
#include <vector>

#include <gtest/gtest.h>

#include "cuda/launch.h"
#include "heddle/heddle.h"

namespace heddle {
namespace {

TEST(CudaDevices, CountIsStableAndLeavesNoErrorBehind) {
  const int count = cuda::device_count();
  EXPECT_GE(count, 0);
  EXPECT_EQ(cuda::device_count(), count);
  if (count > 0) {
    EXPECT_EQ(cudaPeekAtLastError(), cudaSuccess);
  }
}

TEST(CudaDevices, CapabilityNamesTheDeviceThatIsMissing) {
  const int count = cuda::device_count();
  for (const int missing : {-1, count}) {
    try {
      cuda::compute_capability(missing);
      FAIL() << "device " << missing << " has a capability";
    } catch (const Error& error) {
      EXPECT_EQ(error.code(), ErrorCode::kDevice);
      EXPECT_EQ(error.argument(), "device");
      EXPECT_NE(std::string(error.what()).find(std::to_string(missing)), std::string::npos) << error.what();
    }
  }
  for (int device = 0; device < count; ++device) EXPECT_GE(cuda::compute_capability(device), 50);
}

// The backend exists exactly where a GPU of its architecture does; a call for it elsewhere says so.
TEST(CudaDevices, HopperBackendNeedsHopper) {
  bool hopper = false;
  for (int device = 0; device < cuda::device_count(); ++device) hopper |= cuda::compute_capability(device) == 90;
  const std::vector<Backend> backends = available_backends();
  EXPECT_EQ(std::find(backends.begin(), backends.end(), Backend::kSm90) != backends.end(), hopper);
  if (hopper) return;

  float x = 1.0f, lse = 0.0f;
  const TensorView out(&x, DType::kFloat32, {1, 1, 1, 1}), lses(&lse, DType::kFloat32, {1, 1, 1, 1});
  try {
    merge({.outs = TensorView(&x, DType::kFloat32, {1, 1, 1, 1, 1}),
           .lses = lses,
           .out = out,
           .backend = Backend::kSm90});
    FAIL() << "merge ran on a backend that is not there";
  } catch (const Error& error) {
    EXPECT_EQ(error.code(), ErrorCode::kUnsupported);
    EXPECT_EQ(error.argument(), "backend");
  }
}

}  // namespace
}  // namespace heddle
