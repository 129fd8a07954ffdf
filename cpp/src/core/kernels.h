// The entry points that backends offer; the dispatch table (core/dispatch.cpp) lists them with what they support.
#pragma once

#include "core/problem.h"

namespace heddle {

struct MergeProblem {
  // part p, row r (all leading axes and S flattened per lse order), head h: strides in elements.
  TensorView outs, lses, out, lse;
  Stream stream;
};

namespace reference {
void attention(const Problem& problem);  // contiguous, packed and paged alike
void merge(const MergeProblem& problem);
}  // namespace reference

namespace host {
void attention(const Problem& problem);
void merge(const MergeProblem& problem);
}  // namespace host

}  // namespace heddle
