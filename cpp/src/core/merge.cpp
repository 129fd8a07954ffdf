// The front end of merge().
#include "core/check.h"
#include "core/dispatch.h"
#include "heddle/attention.h"

namespace heddle {
namespace {

// The view with an axis of size 1 at `axis`: a packed batch as a batch of one.
TensorView with_batch_axis(TensorView view, int axis) {
  for (int i = view.rank; i > axis; --i) {
    view.shape[i] = view.shape[i - 1];
    view.strides[i] = view.strides[i - 1];
  }
  view.shape[axis] = 1;
  view.strides[axis] = 0;
  ++view.rank;
  return view;
}

}  // namespace

void merge(const MergeParams& params) {
  const bool oracle = params.backend == Backend::kReference;
  const auto check_one = [&](std::string_view argument, const TensorView& view) {
    check::given(argument, view);
    check::device(argument, view, params.outs.device, "outs");
  };
  const auto check_lse_dtype = [&](std::string_view argument, const TensorView& view) {
    if (oracle) {
      check::dtype(argument, view, {DType::kFloat32, DType::kFloat64});
    } else {
      check::dtype(argument, view, {DType::kFloat32});
    }
  };

  check_one("outs", params.outs);
  check::rank("outs", params.outs, {5, 4});
  check::dtype("outs", params.outs, {DType::kFloat32, DType::kFloat16, DType::kBFloat16, DType::kFloat64});
  check::contiguous_rows("outs", params.outs);
  const bool packed = params.outs.rank == 4;
  const TensorView outs = packed ? with_batch_axis(params.outs, 1) : params.outs;
  const std::int64_t parts = outs.shape[0], batch = outs.shape[1], tokens = outs.shape[2], heads = outs.shape[3];
  const int last = params.outs.rank - 1;
  check::axis_not_empty("outs", params.outs, 0, "parts");
  check::axis_not_empty("outs", params.outs, last - 1, "heads");
  check::axis_not_empty("outs", params.outs, last, "head_dim_v");

  check_one("lses", params.lses);
  check_lse_dtype("lses", params.lses);
  check_one("out", params.out);
  if (oracle) {
    check::dtype("out", params.out, {outs.dtype, DType::kFloat32, DType::kFloat64});
  } else {
    check::dtype("out", params.out, {outs.dtype});
  }
  if (packed) {
    check::shape("lses", params.lses, {parts, heads, tokens});
    check::shape("out", params.out, {tokens, heads, outs.shape[4]});
  } else {
    check::shape("lses", params.lses, {parts, batch, heads, tokens});
    check::shape("out", params.out, {batch, tokens, heads, outs.shape[4]});
  }
  check::contiguous_rows("lses", params.lses);
  check::contiguous_rows("out", params.out);
  check::writable("out", params.out);
  if (params.lse.given()) {
    check_one("lse", params.lse);
    check_lse_dtype("lse", params.lse);
    if (packed) {
      check::shape("lse", params.lse, {heads, tokens});
    } else {
      check::shape("lse", params.lse, {batch, heads, tokens});
    }
    check::contiguous_rows("lse", params.lse);
    check::writable("lse", params.lse);
  }

  MergeProblem problem{outs, params.lses, params.out, params.lse, params.stream};
  if (packed) {
    problem.lses = with_batch_axis(params.lses, 1);
    problem.out = with_batch_axis(params.out, 0);
    if (params.lse.given()) problem.lse = with_batch_axis(params.lse, 0);
  }
  run(find_row(Operation::kMerge, params.backend, features_of(problem)), problem);
}

}  // namespace heddle
