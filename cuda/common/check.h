// CUDA's error codes as heddle::Error, and the current device as a scope. Host code.
#pragma once

#include <cuda_runtime_api.h>
#include <string>

#include "heddle/error.h"

namespace heddle::cuda {

// `what` names the operation, e.g. "merge".
inline void check(cudaError_t status, const char* what) {
  if (status == cudaSuccess) return;
  throw Error(ErrorCode::kRuntime, what, std::string(cudaGetErrorName(status)) + ": " + cudaGetErrorString(status));
}

// Makes `device` current and gives the caller's back.
class DeviceScope {
 public:
  explicit DeviceScope(int device) {
    check(cudaGetDevice(&previous_), "device");
    if (previous_ == device) {
      previous_ = -1;
    } else {
      check(cudaSetDevice(device), "device");
    }
  }
  ~DeviceScope() {
    if (previous_ >= 0) cudaSetDevice(previous_);
  }
  DeviceScope(const DeviceScope&) = delete;
  DeviceScope& operator=(const DeviceScope&) = delete;

 private:
  int previous_ = -1;
};

}  // namespace heddle::cuda
