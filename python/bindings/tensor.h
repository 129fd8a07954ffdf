// Python arrays as TensorViews, without copies: numpy arrays and buffers, torch tensors, and anything with __dlpack__.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <string>

#include <dlpack/dlpack.h>
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include "heddle/tensor.h"

namespace heddle::python {

namespace py = pybind11;

// The library that results go back to. Buffers and DLPack producers other than torch get numpy arrays.
enum class Kind { kNumpy, kTorch };

const char* to_string(Kind kind);

// An array argument: where it lies, and what keeps it there.
struct Array {
  TensorView view;
  Kind kind = Kind::kNumpy;
  bool writable = true;
  const DLPackExchangeAPI* exchange = nullptr;  // torch >= 2.10: conversions without a call into Python
  py::object object;
  py::object holder;  // of the memory, if `object` itself is not: a DLPack capsule, a numpy array over a buffer

  bool given() const { return view.given(); }
};

// `argument` is the public parameter name, for errors. Refused: what is no array, element types and devices that heddle
// does not know, foreign byte orders, and tensors whose gradients would be lost.
Array array(py::handle object, const char* argument);
// None is "not given".
Array optional_array(py::handle object, const char* argument);
// An array to write to (out=); None is "not given".
Array output_array(py::handle object, const char* argument);

// Arrays that decide the kind of a call's results must agree.
void require_same_kind(const Array& array, const char* argument, const Array& expected, const char* owner);

// A new array of the kind and on the device of `like`, not initialised.
Array empty(std::span<const std::int64_t> shape, DType dtype, const Array& like);
// An array over memory that `owner` keeps: a numpy array; on a device a torch tensor where torch has been imported, and
// else an object that other libraries read through __dlpack__.
py::object view_of_memory(const TensorView& view, py::handle owner);
void bind_device_memory(py::module_& m);  // the class of those objects

// The stream that the caller's library queues work on (CUDA), for the device of `array`.
Stream current_stream(const Array& array);

// Keeps the memory of arrays alive from C++ that does not hold the GIL.
std::shared_ptr<const void> keep_alive(const Array& array, const Array& another = {});

// "a numpy array", "a torch tensor", "list"
std::string describe(py::handle object);

}  // namespace heddle::python
