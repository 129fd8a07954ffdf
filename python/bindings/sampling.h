// heddle.Sampling as Python holds it.
#pragma once

#include <memory>
#include <optional>

#include <pybind11/pybind11.h>

#include "heddle/sampling.h"

namespace heddle::python {

struct SharedSampling {
  Sampling options;
  std::shared_ptr<const void> owner;  // of the offset's memory
};

// None or a heddle.Sampling.
std::optional<Sampling> to_sampling(pybind11::handle value);

}  // namespace heddle::python
