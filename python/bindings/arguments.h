// Scalar arguments: each conversion names the argument when it refuses.
#pragma once

#include <cstdint>
#include <optional>

#include <pybind11/pybind11.h>

#include "heddle/backend.h"
#include "heddle/select.h"
#include "heddle/tensor.h"

namespace heddle::python {

namespace py = pybind11;

bool to_bool(py::handle value, const char* argument);
std::int64_t to_int(py::handle value, const char* argument);
std::optional<std::int64_t> to_optional_int(py::handle value, const char* argument);
double to_double(py::handle value, const char* argument);
float to_float(py::handle value, const char* argument);
std::optional<float> to_optional_float(py::handle value, const char* argument);
std::string_view to_string_view(py::handle value, const char* argument);

Backend to_backend(py::handle value);               // None or a name
Schedule to_schedule(py::handle value);             // None, a name or a heddle.Schedule
Device to_device(py::handle value);                 // "cpu", "cuda", "cuda:1"
std::optional<Window> to_window(py::handle value);  // None, left or (left, right)
const Selection& to_selection(py::handle value);    // None or a heddle.Selection

}  // namespace heddle::python
