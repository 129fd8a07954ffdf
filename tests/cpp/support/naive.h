// Attention as a matrix of scores and a softmax over its rows: the plainest way to write it, in a number type and with
// the roundings of one's choice.
#pragma once

#include <vector>

#include "support/sample.h"

namespace heddle::testing {

// Rows of a request: out [q_len, Hq, Dv], lse [Hq, q_len]; size[...] = sum_j p_j |v_j|, what the error of a rounded p
// scales with.
struct Result {
  std::vector<double> out, lse, size;
};

// T: the type of all arithmetic. Probabilities (before the division by their sum) and outputs are rounded to these
// dtypes.
template <class T>
Result naive_attention(const Sample& sample, std::int64_t request, DType probability, DType out);

}  // namespace heddle::testing
