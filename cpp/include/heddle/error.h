// Typed errors: every refusal names the argument, what was given and what is allowed.
#pragma once

#include <stdexcept>
#include <string>
#include <string_view>

#include "heddle/export.h"

namespace heddle {

enum class ErrorCode {
  kShape,        // wrong rank, mismatched or meaningless sizes
  kDType,        // an element type that the argument cannot have
  kDevice,       // tensors on different devices
  kLayout,       // strides that cannot be used (the last axis must be contiguous)
  kValue,        // a number, name or index outside its range
  kCapacity,     // a cache or table that is too small for what it is asked to hold
  kUnsupported,  // a combination of features that no requested backend has
  kRuntime,      // the device or the system failed
};

HEDDLE_API std::string_view to_string(ErrorCode code);

class HEDDLE_API Error : public std::runtime_error {
 public:
  // what() reads "<argument>: <message>"; `argument` is the public parameter name.
  Error(ErrorCode code, std::string argument, const std::string& message);

  ErrorCode code() const noexcept { return code_; }
  const std::string& argument() const noexcept { return argument_; }

 private:
  ErrorCode code_;
  std::string argument_;
};

}  // namespace heddle
