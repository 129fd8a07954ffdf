#include "core/check.h"

#include <cmath>

namespace heddle::check {
namespace {

template <class List>
std::string join(const List& items) {
  std::string all;
  for (const auto& item : items) all += text(all.empty() ? "" : ", ", item);
  return all;
}

std::string named(std::string_view what) { return what.empty() ? std::string() : text(what, " is "); }

}  // namespace

void fail(ErrorCode code, std::string_view argument, const std::string& message) {
  throw Error(code, std::string(argument), message);
}

void given(std::string_view argument, const TensorView& view) {
  if (!view.given()) fail(ErrorCode::kShape, argument, "not given; a tensor is needed");
  if (view.rank > kMaxRank)
    fail(ErrorCode::kShape, argument, text("rank ", view.rank, "; allowed are 0 to ", kMaxRank));
  for (int i = 0; i < view.rank; ++i) {
    if (view.shape[i] < 0) {
      fail(ErrorCode::kShape, argument, text("axis ", i, " is ", view.shape[i], "; allowed are 0 and above"));
    }
  }
  if (view.data == nullptr && view.numel() > 0) {
    fail(ErrorCode::kValue, argument, text("a null pointer for shape ", view.shape_string()));
  }
}

void rank(std::string_view argument, const TensorView& view, std::initializer_list<int> allowed) {
  for (const int n : allowed) {
    if (view.rank == n) return;
  }
  fail(ErrorCode::kShape, argument,
       text("rank ", view.rank, " (shape ", view.shape_string(), "); allowed ", allowed.size() == 1 ? "is " : "are ",
            join(allowed)));
}

void axis(std::string_view argument, const TensorView& view, int axis, std::string_view name, std::int64_t expected,
          std::string_view reason) {
  if (view.shape[axis] == expected) return;
  fail(ErrorCode::kShape, argument,
       text("axis ", axis, " (", name, ") is ", view.shape[axis], "; allowed is ", expected, ", ", reason));
}

void axis_not_empty(std::string_view argument, const TensorView& view, int axis, std::string_view name) {
  if (view.shape[axis] > 0) return;
  fail(ErrorCode::kShape, argument, text("axis ", axis, " (", name, ") is 0; allowed are 1 and above"));
}

void shape(std::string_view argument, const TensorView& view, std::initializer_list<std::int64_t> expected) {
  rank(argument, view, static_cast<int>(expected.size()));
  int i = 0;
  for (const std::int64_t size : expected) {
    if (view.shape[i++] != size) {
      fail(ErrorCode::kShape, argument, text("shape ", view.shape_string(), "; allowed is [", join(expected), "]"));
    }
  }
}

void dtype(std::string_view argument, const TensorView& view, std::initializer_list<DType> allowed) {
  std::string names;
  for (const DType d : allowed) {
    if (view.dtype == d) return;
    names += text(names.empty() ? "" : ", ", to_string(d));
  }
  fail(ErrorCode::kDType, argument,
       text("dtype ", to_string(view.dtype), "; allowed ", allowed.size() == 1 ? "is " : "are ", names));
}

void device(std::string_view argument, const TensorView& view, Device expected, std::string_view owner) {
  if (view.device == expected) return;
  fail(ErrorCode::kDevice, argument,
       text("on ", to_string(view.device), "; allowed is ", to_string(expected), ", where ", owner, " lies"));
}

void contiguous_rows(std::string_view argument, const TensorView& view) {
  const int last = view.rank - 1;
  if (last < 0 || view.numel() == 0 || view.shape[last] <= 1 || view.strides[last] == 1) return;
  fail(ErrorCode::kLayout, argument,
       text("the last axis has stride ", view.strides[last], "; allowed is 1 (contiguous)"));
}

void writable(std::string_view argument, const TensorView& view) {
  for (int i = 0; i < view.rank && view.numel() > 0; ++i) {
    if (view.shape[i] > 1 && view.strides[i] == 0) {
      fail(ErrorCode::kLayout, argument, text("axis ", i, " has stride 0, but it is written; allowed is any other"));
    }
  }
}

void at_least(std::string_view argument, std::int64_t value, std::int64_t least, std::string_view what) {
  if (value >= least) return;
  fail(ErrorCode::kValue, argument, text(named(what), value, "; allowed are ", least, " and above"));
}

void finite(std::string_view argument, double value, std::string_view what) {
  if (std::isfinite(value)) return;
  fail(ErrorCode::kValue, argument, text(named(what), value, "; allowed are finite numbers"));
}

void index_array(std::string_view argument, const TensorView& view, Device where, std::string_view owner) {
  given(argument, view);
  dtype(argument, view, {DType::kInt32});
  device(argument, view, where, owner);
  contiguous_rows(argument, view);
}

void cu_seqlens(std::string_view argument, const TensorView& view, std::int64_t total, std::string_view owner) {
  const auto* entries = view.as<const std::int32_t>();
  const std::int64_t last = view.shape[0] - 1;
  if (entries[0] != 0) fail(ErrorCode::kValue, argument, text("entry 0 is ", entries[0], "; allowed is 0"));
  for (std::int64_t i = 1; i <= last; ++i) {
    if (entries[i] < entries[i - 1]) {
      fail(ErrorCode::kValue, argument,
           text("entry ", i, " is ", entries[i], "; allowed are ", entries[i - 1], " (the entry before it) and above"));
    }
  }
  if (entries[last] > total) {
    fail(ErrorCode::kValue, argument,
         text("ends at ", entries[last], "; allowed are at most ", total, ", the tokens of ", owner));
  }
}

void block_table(const TensorView& table, std::int64_t request, std::int64_t tokens, std::int64_t page_size,
                 std::int64_t num_pages) {
  const std::int32_t* pages = table.as<const std::int32_t>() + request * table.strides[0];
  for (std::int64_t i = 0; i * page_size < tokens; ++i) {
    if (pages[i] < 0 || pages[i] >= num_pages) {
      fail(ErrorCode::kValue, "block_table",
           text("page id ", pages[i], " of request ", request, " is outside the cache; allowed are 0 to ",
                num_pages - 1));
    }
  }
}

}  // namespace heddle::check
