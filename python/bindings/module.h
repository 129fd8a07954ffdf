// The parts of heddle._core, one an axis.
#pragma once

#include <pybind11/pybind11.h>

namespace heddle::python {

void bind_backend(pybind11::module_& m);
void bind_select(pybind11::module_& m);
void bind_selectors(pybind11::module_& m);
void bind_quantize(pybind11::module_& m);
void bind_attention(pybind11::module_& m);
void bind_cache(pybind11::module_& m);
void bind_sampling(pybind11::module_& m);
void bind_advise(pybind11::module_& m);
void bind_trace(pybind11::module_& m);

}  // namespace heddle::python
