// Quantization: quantize() and the tensor it returns.
#include "quantize.h"

#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "arguments.h"
#include "module.h"

#include "core/check.h"
#include "heddle/error.h"

namespace heddle::python {
namespace {

// "tensor", "token" or ("partition", n) as QuantScales counts it.
std::int64_t to_partition(py::handle value) {
  constexpr std::string_view kAllowed = "allowed are 'tensor', 'token' and ('partition', n)";
  if (py::isinstance<py::tuple>(value) || py::isinstance<py::list>(value)) {
    const auto pair = py::reinterpret_borrow<py::sequence>(value);
    if (pair.size() == 2 && to_string_view(pair[0], "granularity") == "partition") {
      const std::int64_t n = to_int(pair[1], "granularity");
      check::at_least("granularity", n, 1, "partition");
      return n;
    }
  } else {
    const std::string_view name = to_string_view(value, "granularity");
    if (name == "tensor") return 0;
    if (name == "token") return 1;
  }
  check::fail(ErrorCode::kValue, "granularity",
              check::text("got ", py::repr(value).cast<std::string>(), "; ", kAllowed));
}

py::object from_partition(std::int64_t partition) {
  if (partition == 0) return py::str("tensor");
  if (partition == 1) return py::str("token");
  return py::make_tuple("partition", partition);
}

DType to_quantized_dtype(py::handle format) {
  const std::string_view name = to_string_view(format, "format");
  if (name == "int8") return DType::kInt8;
  if (name == "fp8") return DType::kFloat8E4M3;
  check::fail(ErrorCode::kValue, "format", check::text("'", name, "' does not exist; allowed are int8, fp8"));
}

QuantizedTensor quantize(py::handle object, py::handle format, py::handle granularity, py::handle smooth,
                         py::handle static_scale) {
  const DType dtype = to_quantized_dtype(format);
  QuantizedTensor result;
  result.partition = to_partition(granularity);
  const bool subtract_mean = to_bool(smooth, "smooth");
  const float given_scale = to_optional_float(static_scale, "static_scale").value_or(0.0f);
  const Array x = array(object, "x");
  check::rank("x", x.view, {3, 4});

  const auto& shape = x.view.shape;
  const int rank = x.view.rank;
  const std::int64_t tokens = shape[rank - 3], heads = shape[rank - 2], dim = shape[rank - 1];
  result.data = empty({shape.data(), static_cast<std::size_t>(rank)}, dtype, x);
  std::vector<std::int64_t> scale_shape{1};
  if (result.partition > 0) {
    scale_shape.assign(shape.begin(), shape.begin() + rank - 3);
    scale_shape.insert(scale_shape.end(),
                       {tokens / result.partition + (tokens % result.partition != 0 ? 1 : 0), heads});
  }
  result.scale = empty(scale_shape, DType::kFloat32, x);
  if (subtract_mean) {
    std::vector<std::int64_t> mean_shape(shape.begin(), shape.begin() + rank - 3);
    mean_shape.insert(mean_shape.end(), {heads, dim});
    result.mean = empty(mean_shape, DType::kFloat32, x);
  }
  const py::gil_scoped_release release;
  result.saturated = heddle::quantize(x.view, result.data.view, result.scales(), given_scale);
  return result;
}

py::object dequantize(const QuantizedTensor& tensor) {
  const TensorView& data = tensor.data.view;
  Array out = empty({data.shape.data(), static_cast<std::size_t>(data.rank)}, DType::kFloat32, tensor.data);
  {
    const py::gil_scoped_release release;
    heddle::dequantize(data, tensor.scales(), out.view);
  }
  return out.object;
}

std::int64_t nbytes(const QuantizedTensor& tensor) {
  std::int64_t bytes = 0;
  for (const Array* part : {&tensor.data, &tensor.scale, &tensor.mean}) {
    bytes += part->view.numel() * static_cast<std::int64_t>(size_of(part->view.dtype));
  }
  return bytes;
}

const char* format_name(const QuantizedTensor& tensor) {
  return tensor.data.view.dtype == DType::kInt8 ? "int8" : "fp8";
}

}  // namespace

Operand operand(py::handle object, const char* argument) {
  if (!py::isinstance<QuantizedTensor>(object)) {
    Array plain = array(object, argument);
    if (plain.view.dtype == DType::kInt8 || plain.view.dtype == DType::kFloat8E4M3) {
      check::fail(ErrorCode::kDType, argument,
                  check::text("dtype ", to_string(plain.view.dtype),
                              " without scales; allowed are floating-point arrays and heddle.QuantizedTensor"));
    }
    return {std::move(plain), {}};
  }
  const auto& tensor = object.cast<const QuantizedTensor&>();
  return {tensor.data, tensor.scales()};
}

void bind_quantize(py::module_& m) {
  py::class_<QuantizedTensor>(m, "QuantizedTensor",
                              R"(An int8 or FP8 E4M3 tensor with its scales: x = data * scale (+ mean).

    QuantizedTensor(data, scale, granularity="tensor", mean=None)

data is int8 or float8_e4m3fn, [B, S, H, D] or [total, H, D]. scale is float32: [1] for granularity "tensor", one for every
n consecutive tokens of a head, [B, ceil(S / n), H] or [ceil(total / n), H], for ("partition", n); "token" is n = 1.
mean, optional, is float32 [B, H, D] or [H, D]: what was subtracted before quantizing. heddle.quantize makes one;
heddle.attention takes it for q, k or v.)")
      .def(py::init([](py::object data, py::object scale, py::object granularity, py::object mean) {
             QuantizedTensor tensor;
             tensor.data = array(data, "data");
             check::dtype("data", tensor.data.view, {DType::kInt8, DType::kFloat8E4M3});
             tensor.scale = array(scale, "scale");
             check::dtype("scale", tensor.scale.view, {DType::kFloat32});
             tensor.partition = to_partition(granularity);
             tensor.mean = optional_array(mean, "mean");
             return tensor;
           }),
           py::arg("data"), py::arg("scale"), py::arg("granularity") = "tensor", py::arg("mean") = py::none())
      .def_property_readonly(
          "data", [](const QuantizedTensor& t) { return t.data.object; }, "The int8 or FP8 values.")
      .def_property_readonly(
          "scale", [](const QuantizedTensor& t) { return t.scale.object; }, "The scales, float32.")
      .def_property_readonly(
          "mean", [](const QuantizedTensor& t) -> py::object { return t.mean.given() ? t.mean.object : py::none(); },
          "What smoothing subtracted, float32, or None.")
      .def_property_readonly(
          "granularity", [](const QuantizedTensor& t) { return from_partition(t.partition); },
          "'tensor', 'token' or ('partition', n).")
      .def_property_readonly("format", &format_name, "'int8' or 'fp8'.")
      .def_property_readonly(
          "shape",
          [](const QuantizedTensor& t) {
            py::tuple shape(static_cast<std::size_t>(t.data.view.rank));
            for (int axis = 0; axis < t.data.view.rank; ++axis) shape[axis] = t.data.view.shape[axis];
            return shape;
          },
          "The shape of data.")
      .def_readonly("saturated", &QuantizedTensor::saturated, "How many values a static scale clamped.")
      .def_property_readonly("nbytes", &nbytes, "Bytes of data, scales and mean.")
      .def("dequantize", &dequantize, "data * scale (+ mean), float32, an array of the kind of data.")
      .def("__repr__", [](const QuantizedTensor& t) {
        return check::text("QuantizedTensor(", format_name(t), " ", t.data.view.shape_string(),
                           ", granularity=", py::repr(from_partition(t.partition)).cast<std::string>(),
                           t.mean.given() ? ", smoothed" : "", ", saturated=", t.saturated, ")");
      });
  m.def("quantize", &quantize, py::arg("x"), py::arg("format"), py::arg("granularity"), py::arg("smooth"),
        py::arg("static_scale"));
}

}  // namespace heddle::python
