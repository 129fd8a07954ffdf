// What cuda/launch.h offers in a build without CUDA: no device. Views of device memory can reach the front ends all the
// same, since they are only descriptions; they end here.
#include "cuda/launch.h"

#include "heddle/error.h"

namespace heddle::cuda {
namespace {

[[noreturn]] void refuse() {
  throw Error(ErrorCode::kUnsupported, "device", "cuda; this build of heddle has no CUDA: allowed is cpu");
}

}  // namespace

int device_count() noexcept { return 0; }
int compute_capability(int) { refuse(); }
void* allocate(std::int64_t, int) { refuse(); }
void release(void*, int) noexcept {}
void synchronize(int) { refuse(); }
void copy_to_host(void*, const void*, std::int64_t, int, void*) { refuse(); }
void copy_to_device(void*, const void*, std::int64_t, int, void*) { refuse(); }
std::uint32_t max_abs_bits(const FloatRows&, const std::int32_t*, int, void*) { refuse(); }
void with_workspace(const char*, int, void*, std::int64_t, const std::function<void(void*)>&) { refuse(); }
void launch_append(const AppendArgs&) { refuse(); }

}  // namespace heddle::cuda
