// Calls that wait for a stream.
#pragma once

namespace heddle::cuda {

// Throws kValue if the stream is being captured.
void refuse_capture(void* stream);

}  // namespace heddle::cuda
