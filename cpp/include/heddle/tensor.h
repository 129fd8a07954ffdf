// Non-owning views of tensors, element types, devices and streams.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <string>
#include <string_view>

#include "heddle/export.h"

namespace heddle {

enum class DType : std::uint8_t {
  kFloat64,
  kFloat32,
  kFloat16,
  kBFloat16,
  kFloat8E4M3,  // OCP E4M3 ("fn"): no infinities, largest value 448, NaN is 0x7f / 0xff
  kInt8,
  kInt32,
  kInt64,
  kBool,  // one byte
};

HEDDLE_API std::string_view to_string(DType dtype);
HEDDLE_API std::size_t size_of(DType dtype);

enum class DeviceType : std::uint8_t { kCpu, kCuda };

struct Device {
  DeviceType type = DeviceType::kCpu;
  int index = 0;
  friend bool operator==(const Device&, const Device&) = default;
};

HEDDLE_API std::string to_string(Device device);

// A cudaStream_t without its header. The default is the legacy default stream; ignored on the CPU.
struct Stream {
  void* handle = nullptr;
};

inline constexpr int kMaxRank = 5;

// Where a tensor lies. Copying copies the view. Strides count elements and may be anything (0 and negative included) on
// every axis but the last one, which must be contiguous wherever a function does not say otherwise.
// A default-constructed view means "not given".
struct HEDDLE_API TensorView {
  void* data = nullptr;
  DType dtype = DType::kFloat32;
  Device device{};
  int rank = -1;
  std::array<std::int64_t, kMaxRank> shape{};
  std::array<std::int64_t, kMaxRank> strides{};

  TensorView() = default;
  // A row-major view.
  TensorView(const void* data, DType dtype, std::initializer_list<std::int64_t> shape, Device device = {});

  bool given() const noexcept { return rank >= 0; }
  std::int64_t numel() const noexcept;
  bool is_contiguous() const noexcept;
  std::string shape_string() const;  // "[2, 16, 8, 64]"

  template <class T>
  T* as() const noexcept {
    return static_cast<T*>(data);
  }
};

}  // namespace heddle
