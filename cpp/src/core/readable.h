// Index arrays as far as the host can read them.
#pragma once

#include <cstdint>
#include <vector>

#include "heddle/tensor.h"

namespace heddle {

// An int32 array: on the CPU its own memory; on a device a copy if validation() is on, for which the call waits for
// the stream, and else nothing: a call does not synchronize.
class Readable {
 public:
  Readable(const TensorView& array, Stream stream);
  Readable(const Readable&) = delete;
  Readable& operator=(const Readable&) = delete;

  bool readable() const { return readable_; }
  // The array, with the strides of the copy if it is one.
  const TensorView& view() const { return view_; }
  const std::int32_t* data() const { return view_.as<const std::int32_t>(); }

 private:
  bool readable_ = true;
  TensorView view_;
  std::vector<std::int32_t> copy_;
};

}  // namespace heddle
