// Scratch memory that a thread keeps between calls: fresh pages cost more than the work on them when calls are short.
#pragma once

#include <cstddef>
#include <cstdlib>
#include <new>

namespace heddle::host {

class Workspace {
 public:
  Workspace() = default;
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;
  ~Workspace() { std::free(data_); }

  // At least `bytes`, aligned to a cache line; what it held before is lost.
  std::byte* reserve(std::size_t bytes) {
    if (bytes > size_) {
      std::free(data_);
      size_ = 0;
      bytes = (bytes + kAlign - 1) / kAlign * kAlign;
      data_ = static_cast<std::byte*>(std::aligned_alloc(kAlign, bytes));
      if (data_ == nullptr) throw std::bad_alloc();
      size_ = bytes;
    }
    return data_;
  }
  std::byte* data() const { return data_; }
  // Gives memory back beyond `keep` bytes.
  void trim(std::size_t keep) {
    if (size_ <= keep) return;
    std::free(data_);
    data_ = nullptr;
    size_ = 0;
  }

 private:
  static constexpr std::size_t kAlign = 4096;
  std::byte* data_ = nullptr;
  std::size_t size_ = 0;
};

// Hands out aligned pieces of one block; first call it on no memory to learn how much is needed.
class Carver {
 public:
  explicit Carver(std::byte* base) : base_(base) {}
  template <class T>
  T* take(std::size_t count) {
    T* p = reinterpret_cast<T*>(base_ + used_);
    used_ += (count * sizeof(T) + 63) / 64 * 64;
    return p;
  }
  std::size_t used() const { return used_; }

 private:
  std::byte* base_;
  std::size_t used_ = 0;
};

}  // namespace heddle::host
