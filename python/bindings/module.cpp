// heddle._core: what the package heddle is made of. Conversions and checks of Python's arguments, nothing else.
#include "module.h"

#include "heddle/error.h"
#include "heddle/version.h"

namespace heddle::python {
namespace {

namespace py = pybind11;

// heddle.HeddleError has one kind for each of Python's own that callers know to catch.
const char* exception_of(ErrorCode code) {
  switch (code) {
    case ErrorCode::kDType: return "HeddleTypeError";
    case ErrorCode::kUnsupported: return "HeddleNotImplementedError";
    case ErrorCode::kRuntime: return "HeddleRuntimeError";
    default: return "HeddleValueError";
  }
}

void raise(const Error& error) {
  const py::object type = py::module_::import("heddle._errors").attr(exception_of(error.code()));
  const py::object exception = type(error.what(), to_string(error.code()), error.argument());
  PyErr_SetObject(type.ptr(), exception.ptr());
}

}  // namespace

PYBIND11_MODULE(_core, m) {
  py::options options;
  options.disable_function_signatures();

  py::register_local_exception_translator([](std::exception_ptr thrown) {
    try {
      if (thrown) std::rethrow_exception(thrown);
    } catch (const Error& error) {
      raise(error);
    }
  });
  m.attr("__version__") = HEDDLE_VERSION_STRING;
  bind_backend(m);
  bind_select(m);
  bind_selectors(m);
  bind_quantize(m);
  bind_attention(m);
  bind_sampling(m);
  bind_cache(m);
  bind_advise(m);
  bind_trace(m);
}

}  // namespace heddle::python
