#include "arguments.h"

#include <charconv>
#include <string>
#include <string_view>

#include "tensor.h"

#include "core/check.h"
#include "heddle/error.h"

namespace heddle::python {
namespace {

[[noreturn]] void fail_type(const char* argument, py::handle value, std::string_view allowed) {
  check::fail(ErrorCode::kDType, argument, check::text("got ", describe(value), "; allowed ", allowed));
}

}  // namespace

bool to_bool(py::handle value, const char* argument) {
  if (value.ptr() == Py_True) return true;
  if (value.ptr() == Py_False) return false;
  if (py::isinstance(value, py::module_::import("numpy").attr("bool_"))) return value.attr("item")().cast<bool>();
  fail_type(argument, value, "are True and False");
}

std::int64_t to_int(py::handle value, const char* argument) {
  const auto index = py::reinterpret_steal<py::object>(PyNumber_Index(value.ptr()));
  if (!index) {
    PyErr_Clear();
    fail_type(argument, value, "is an integer");
  }
  int overflow = 0;
  const long long result = PyLong_AsLongLongAndOverflow(index.ptr(), &overflow);
  if (overflow != 0) {
    check::fail(ErrorCode::kValue, argument,
                check::text("got ", py::str(index).cast<std::string>(), "; allowed are 64-bit integers"));
  }
  return result;
}

std::optional<std::int64_t> to_optional_int(py::handle value, const char* argument) {
  if (value.is_none()) return std::nullopt;
  return to_int(value, argument);
}

double to_double(py::handle value, const char* argument) {
  const double result = PyFloat_AsDouble(value.ptr());
  if (result == -1.0 && PyErr_Occurred() != nullptr) {
    PyErr_Clear();
    fail_type(argument, value, "is a number");
  }
  return result;
}

float to_float(py::handle value, const char* argument) { return static_cast<float>(to_double(value, argument)); }

std::optional<float> to_optional_float(py::handle value, const char* argument) {
  if (value.is_none()) return std::nullopt;
  return to_float(value, argument);
}

std::string_view to_string_view(py::handle value, const char* argument) {
  if (PyUnicode_Check(value.ptr()) == 0) fail_type(argument, value, "is a string");
  Py_ssize_t size = 0;
  const char* data = PyUnicode_AsUTF8AndSize(value.ptr(), &size);
  if (data == nullptr) throw py::error_already_set();
  return {data, static_cast<std::size_t>(size)};
}

Backend to_backend(py::handle value) {
  return value.is_none() ? Backend::kAuto : backend_from_string(to_string_view(value, "backend"));
}

Schedule to_schedule(py::handle value) {
  if (value.is_none()) return {};
  if (py::isinstance<Schedule>(value)) return value.cast<Schedule>();
  if (PyUnicode_Check(value.ptr()) == 0) fail_type("schedule", value, "are None, a name and heddle.Schedule");
  return {.kind = schedule_from_string(to_string_view(value, "schedule")), .split_size = 0};
}

Device to_device(py::handle value) {
  const std::string_view name = to_string_view(value, "device");
  if (name == "cpu") return {};
  constexpr std::string_view kCuda = "cuda";
  if (name == kCuda) return {DeviceType::kCuda, 0};
  if (name.starts_with("cuda:")) {
    const std::string_view digits = name.substr(kCuda.size() + 1);
    int index = 0;
    const auto [end, error] = std::from_chars(digits.begin(), digits.end(), index);
    if (error == std::errc{} && end == digits.end() && index >= 0) return {DeviceType::kCuda, index};
  }
  check::fail(ErrorCode::kValue, "device", check::text("'", name, "'; allowed are cpu, cuda and cuda:<index>"));
}

std::optional<Window> to_window(py::handle value) {
  if (value.is_none()) return std::nullopt;
  if (PyTuple_Check(value.ptr()) == 0 && PyList_Check(value.ptr()) == 0) {
    if (PyIndex_Check(value.ptr()) == 0) fail_type("window", value, "are None, left and (left, right)");
    return Window{to_int(value, "window"), 0};
  }
  const auto sides = py::reinterpret_borrow<py::sequence>(value);
  if (sides.size() != 2) {
    check::fail(ErrorCode::kValue, "window", check::text("got ", sides.size(), " numbers; allowed is (left, right)"));
  }
  return Window{to_optional_int(sides[0], "window"), to_optional_int(sides[1], "window")};
}

const Selection& to_selection(py::handle value) {
  static const Selection everything;
  if (value.is_none()) return everything;
  if (!py::isinstance<Selection>(value)) {
    fail_type("selection", value, "are None and what heddle.select makes");
  }
  return value.cast<const Selection&>();
}

}  // namespace heddle::python
