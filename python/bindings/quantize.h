// heddle.QuantizedTensor, and operands that may be one.
#pragma once

#include <cstdint>

#include "tensor.h"

#include "heddle/quantize.h"

namespace heddle::python {

struct QuantizedTensor {
  Array data, scale, mean;
  std::int64_t partition = 0;  // as in QuantScales
  std::int64_t saturated = 0;

  QuantScales scales() const { return {scale.view, partition, mean.view}; }
};

// q, k or v of attention: floating-point, or quantized with its scales.
struct Operand {
  Array array;
  QuantScales scales;

  bool quantized() const { return scales.scale.given(); }
};

Operand operand(py::handle object, const char* argument);

}  // namespace heddle::python
