#include "cuda/common/check.h"
#include "cuda/launch.h"

namespace heddle::cuda {

int device_count() noexcept {
  int count = 0;
  if (cudaGetDeviceCount(&count) != cudaSuccess) {
    // No driver or no device. The call's error must not surface in somebody's later cudaGetLastError().
    (void)cudaGetLastError();
    return 0;
  }
  return count;
}

int compute_capability(int device) {
  const int count = device_count();
  if (device < 0 || device >= count) {
    throw Error(ErrorCode::kDevice, "device",
                "CUDA device " + std::to_string(device) + " asked for; this process sees " + std::to_string(count));
  }
  int major = 0, minor = 0;
  check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device), "device");
  check(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device), "device");
  return 10 * major + minor;
}

}  // namespace heddle::cuda
