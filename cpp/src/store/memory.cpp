#include "store/memory.h"

#include <cstdlib>

#include "core/check.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace heddle::store {
namespace {

constexpr std::size_t kAlignment = 64;

void* allocate_on_cpu(std::int64_t bytes) {
  void* memory = std::calloc(static_cast<std::size_t>(bytes) + kAlignment, 1);
  if (memory == nullptr) {
    check::fail(ErrorCode::kCapacity, "num_pages",
                check::text("the system refused an allocation of ", bytes, " bytes; allowed are fewer pages"));
  }
#if defined(MADV_HUGEPAGE)
  constexpr std::uintptr_t kSmallPage = 4096;
  constexpr std::int64_t kHugePage = 2 << 20;
  if (bytes >= 2 * kHugePage) {
    const auto first = (reinterpret_cast<std::uintptr_t>(memory) + kSmallPage - 1) / kSmallPage * kSmallPage;
    // A wish: nothing is lost if the system does not grant it.
    madvise(reinterpret_cast<void*>(first), static_cast<std::size_t>(bytes) / kSmallPage * kSmallPage - kSmallPage,
            MADV_HUGEPAGE);
  }
#endif
  return memory;
}

}  // namespace

Memory::Memory(std::int64_t bytes, Device device) : bytes_(bytes), device_(device) {
  if (device.type == DeviceType::kCpu) {
    owner_ = {allocate_on_cpu(bytes), std::free};
    const auto address = reinterpret_cast<std::uintptr_t>(owner_.get());
    data_ = reinterpret_cast<void*>((address + kAlignment - 1) / kAlignment * kAlignment);
  } else {
    owner_ = {cuda::allocate(bytes, device.index), [index = device.index](void* p) { cuda::release(p, index); }};
    data_ = owner_.get();
  }
}

Memory::Memory(std::string_view name, const TensorView& given, std::int64_t bytes, Device device)
    : data_(given.data), bytes_(bytes), device_(device) {
  check::given(name, given);
  check::device(name, given, device, "the cache");
}

void Memory::wait_and_read(void* to, std::int64_t bytes) const {
  cuda::synchronize(device_.index);
  cuda::copy_to_host(to, data_, bytes, device_.index, nullptr);
}

}  // namespace heddle::store
