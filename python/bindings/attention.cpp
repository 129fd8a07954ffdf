// Attention over contiguous or packed keys and values, and merge.
#include "heddle/attention.h"

#include <algorithm>
#include <array>
#include <cstring>
#include <limits>
#include <span>
#include <vector>

#include "arguments.h"
#include "module.h"
#include "quantize.h"
#include "tensor.h"

#include "core/check.h"

namespace heddle::python {
namespace {

py::object attention(py::object q_, py::object k_, py::object v_, py::object causal, py::object window,
                     py::object softcap, py::object scale, py::object sinks_, py::object selection,
                     py::object cu_seqlens_q_, py::object cu_seqlens_k_, py::object return_lse, py::object out_,
                     py::object backend, py::object schedule) {
  const Operand q = operand(q_, "q"), k = operand(k_, "k"), v = operand(v_, "v");
  require_same_kind(k.array, "k", q.array, "q");
  require_same_kind(v.array, "v", q.array, "q");
  const Array sinks = optional_array(sinks_, "sinks");
  const Array cu_seqlens_q = optional_array(cu_seqlens_q_, "cu_seqlens_q");
  const Array cu_seqlens_k = optional_array(cu_seqlens_k_, "cu_seqlens_k");
  Array out = output_array(out_, "out");
  require_same_kind(out, "out", q.array, "q");
  const int rank = q.array.view.rank;
  check::rank("q", q.array.view, {3, 4});
  check::rank("v", v.array.view, rank);
  std::array<std::int64_t, kMaxRank> shape = q.array.view.shape;
  if (!out.given()) {
    shape[rank - 1] = v.array.view.shape[rank - 1];
    out = empty({shape.data(), static_cast<std::size_t>(rank)}, q.quantized() ? DType::kFloat32 : q.array.view.dtype,
                q.array);
    // Rows of a packed batch that cu_seqlens does not reach belong to no request.
    if (cu_seqlens_q.given() && out.view.device.type == DeviceType::kCpu) {
      std::memset(out.view.data, 0, static_cast<std::size_t>(out.view.numel()) * size_of(out.view.dtype));
    }
  }
  Array lse;
  if (to_bool(return_lse, "return_lse")) {
    // [B, Hq, Sq] or [Hq, total]
    std::swap(shape[rank - 3], shape[rank - 2]);
    lse = empty({shape.data(), static_cast<std::size_t>(rank - 1)}, DType::kFloat32, q.array);
    if (cu_seqlens_q.given() && lse.view.device.type == DeviceType::kCpu) {
      std::fill_n(lse.view.as<float>(), lse.view.numel(), -std::numeric_limits<float>::infinity());
    }
  }
  const AttentionParams params{.q = q.array.view,
                               .k = k.array.view,
                               .v = v.array.view,
                               .out = out.view,
                               .lse = lse.view,
                               .q_scales = q.scales,
                               .k_scales = k.scales,
                               .v_scales = v.scales,
                               .causal = to_bool(causal, "causal"),
                               .window = to_window(window),
                               .softcap = to_float(softcap, "softcap"),
                               .scale = to_optional_float(scale, "scale"),
                               .sinks = sinks.view,
                               .selection = to_selection(selection),
                               .cu_seqlens_q = cu_seqlens_q.view,
                               .cu_seqlens_k = cu_seqlens_k.view,
                               .backend = to_backend(backend),
                               .schedule = to_schedule(schedule),
                               .stream = current_stream(q.array)};

  {
    const py::gil_scoped_release release;
    heddle::attention(params);
  }
  return lse.given() ? py::object(py::make_tuple(out.object, lse.object)) : out.object;
}

py::object merge(py::object outs_, py::object lses_, py::object backend) {
  const Array outs = array(outs_, "outs"), lses = array(lses_, "lses");
  require_same_kind(lses, "lses", outs, "outs");
  check::rank("outs", outs.view, {4, 5});
  check::rank("lses", lses.view, outs.view.rank - 1);
  const auto part = [](const Array& parts) {
    return std::span(parts.view.shape).subspan(1, static_cast<std::size_t>(parts.view.rank) - 1);
  };
  const Array out = empty(part(outs), outs.view.dtype, outs);
  const Array lse = empty(part(lses), lses.view.dtype, outs);
  const MergeParams params{.outs = outs.view,
                           .lses = lses.view,
                           .out = out.view,
                           .lse = lse.view,
                           .backend = to_backend(backend),
                           .stream = current_stream(outs)};
  {
    const py::gil_scoped_release release;
    heddle::merge(params);
  }
  return py::make_tuple(out.object, lse.object);
}

}  // namespace

void bind_attention(py::module_& m) {
  m.def("attention", &attention);
  m.def("merge", &merge);
}

}  // namespace heddle::python
