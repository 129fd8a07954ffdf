// Memory, and calls that wait for a stream.
#pragma once

#include <cuda_runtime_api.h>

namespace heddle::cuda {

// While it lives, calls of this thread are no part of a capture that is under way, and do not break it.
class BesideCapture {
 public:
  BesideCapture();
  ~BesideCapture();
  BesideCapture(const BesideCapture&) = delete;
  BesideCapture& operator=(const BesideCapture&) = delete;

 private:
  cudaStreamCaptureMode mode_ = cudaStreamCaptureModeRelaxed;
};

// Throws kValue if the stream is being captured.
void refuse_capture(void* stream);

}  // namespace heddle::cuda
