// Argument checks, one line each. Every one throws heddle::Error "<argument>: <what came>; allowed ...", before any of
// the memory that a call would write is touched.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <sstream>
#include <string>
#include <string_view>

#include "heddle/error.h"
#include "heddle/tensor.h"

namespace heddle::check {

// The parts one after the other.
template <class... Parts>
std::string text(const Parts&... parts) {
  std::ostringstream out;
  (out << ... << parts);
  return std::move(out).str();
}

[[noreturn]] void fail(ErrorCode code, std::string_view argument, const std::string& message);

// Given, with sizes of at least 0, and with memory behind it if it has elements.
void given(std::string_view argument, const TensorView& view);
void rank(std::string_view argument, const TensorView& view, std::initializer_list<int> allowed);
inline void rank(std::string_view argument, const TensorView& view, int allowed) { rank(argument, view, {allowed}); }
// Axis `axis` (called `name`) has the size `expected`, which `reason` explains: "k: axis 0 (batch) is 3; allowed is 2,
// as in q".
void axis(std::string_view argument, const TensorView& view, int axis, std::string_view name, std::int64_t expected,
          std::string_view reason);
void axis_not_empty(std::string_view argument, const TensorView& view, int axis, std::string_view name);
void shape(std::string_view argument, const TensorView& view, std::initializer_list<std::int64_t> expected);
void dtype(std::string_view argument, const TensorView& view, std::initializer_list<DType> allowed);
void device(std::string_view argument, const TensorView& view, Device expected, std::string_view owner);
// The last axis is contiguous.
void contiguous_rows(std::string_view argument, const TensorView& view);
// No two elements share memory through a stride of 0: what a call writes.
void writable(std::string_view argument, const TensorView& view);

// `what` names the number within the argument ("left") and may be empty.
void at_least(std::string_view argument, std::int64_t value, std::int64_t least, std::string_view what = {});
void finite(std::string_view argument, double value, std::string_view what = {});

// An int32 array: given, on `device` (where `owner` lies), contiguous along its last axis.
void index_array(std::string_view argument, const TensorView& view, Device device, std::string_view owner);
// cu_seqlens: starts at 0, never decreases, ends at or before `total` rows of `owner`. Reads memory: CPU only.
void cu_seqlens(std::string_view argument, const TensorView& view, std::int64_t total, std::string_view owner);
// The pages that `tokens` tokens of request `request` use lie in [0, num_pages). Reads memory: CPU only.
void block_table(const TensorView& table, std::int64_t request, std::int64_t tokens, std::int64_t page_size,
                 std::int64_t num_pages);

}  // namespace heddle::check
