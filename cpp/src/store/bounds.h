// Element-wise maximum and minimum of a page's keys.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "heddle/tensor.h"

namespace heddle::store {

// [maximum | minimum], 2 * dim numbers. A NaN stays.
class BoundsRow {
 public:
  void start(std::int64_t dim);  // of nothing
  // One more row: x * scale (+ mean).
  void add(const std::byte* x, DType dtype, float scale, const float* mean);
  // Any dtype that holds them exactly.
  void load(const std::byte* row, DType dtype);
  void store(std::byte* row, DType dtype) const;
  const float* data() const { return bounds_.data(); }

 private:
  std::vector<float> bounds_, row_;
};

}  // namespace heddle::store
