#include "heddle/error.h"

#include <utility>

namespace heddle {

std::string_view to_string(ErrorCode code) {
  switch (code) {
    case ErrorCode::kShape: return "shape";
    case ErrorCode::kDType: return "dtype";
    case ErrorCode::kDevice: return "device";
    case ErrorCode::kLayout: return "layout";
    case ErrorCode::kValue: return "value";
    case ErrorCode::kCapacity: return "capacity";
    case ErrorCode::kUnsupported: return "unsupported";
    case ErrorCode::kRuntime: return "runtime";
  }
  return "unknown";
}

Error::Error(ErrorCode code, std::string argument, const std::string& message)
    : std::runtime_error(argument + ": " + message), code_(code), argument_(std::move(argument)) {}

}  // namespace heddle
