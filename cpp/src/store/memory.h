// What a cache keeps its parts in: memory of the CPU or of a device, its own or its caller's.
#pragma once

#include <cstdint>
#include <cstring>
#include <memory>
#include <string_view>
#include <utility>

#include "cuda/launch.h"
#include "heddle/tensor.h"

namespace heddle::store {

class Memory {
 public:
  Memory() = default;
  // Zeroed. On the CPU at a multiple of 64 bytes, and handed out page by page when it is first touched, so that a large
  // cache costs what it holds.
  Memory(std::int64_t bytes, Device device);
  // That of `given`, the caller's argument `name`, which keeps it.
  Memory(std::string_view name, const TensorView& given, std::int64_t bytes, Device device);

  template <class T>
  T* as() const {
    return static_cast<T*>(data_);
  }
  std::int64_t bytes() const { return bytes_; }
  Device device() const { return device_; }

  // The number at the beginning. On a device these wait: for all its work, and for the stream.
  template <class T>
  T read() const {
    T value{};
    if (device_.type == DeviceType::kCpu) {
      std::memcpy(&value, data_, sizeof value);
    } else {
      wait_and_read(&value, sizeof value);
    }
    return value;
  }
  template <class T>
  void write(T value, Stream stream) {
    if (device_.type == DeviceType::kCpu) {
      std::memcpy(data_, &value, sizeof value);
    } else {
      cuda::copy_to_device(data_, &value, sizeof value, device_.index, stream.handle);
    }
  }

 private:
  void wait_and_read(void* to, std::int64_t bytes) const;

  std::shared_ptr<void> owner_;
  void* data_ = nullptr;
  std::int64_t bytes_ = 0;
  Device device_{};
};

}  // namespace heddle::store
