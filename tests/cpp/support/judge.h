// What a result is measured with: the oracle in float64, and how far the plainest formula in the kernel's dtypes is
// off.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "support/naive.h"
#include "support/sample.h"

namespace heddle::testing {

// A number of the environment, or `otherwise`.
std::uint64_t environment(const char* name, std::uint64_t otherwise);

// Rows of a request, in the order of Result.
struct Values {
  std::vector<double> out, lse;
};
Values read(const Sample& sample, const Output& output, std::int64_t b);

class Judge {
 public:
  // Runs the oracle. probability: what a kernel may round probabilities to; out: its output's dtype.
  Judge(const Sample& sample, DType probability, DType out);

  // Why `output` (of a backend called `who`) is not the result, or an empty string: memory beside it was written, an
  // infinity or a number is wrong. Allowed is twice the error of the plain formula in the same dtypes, or, as that one
  // may be lucky when there are few values, one rounding of each probability and of the output; plus 1e-5. Where the
  // oracle says NaN (a key that is seen holds it) anything goes; so it does where an infinity is multiplied by a
  // probability that its dtype rounds to 0.
  std::string failure(const std::string& who, const Output& output) const;
  // The same of the oracle itself, against the plain formula in float64.
  std::string oracle_failure() const;

 private:
  const Sample& sample_;
  DType probability_, out_dtype_;
  bool oracle_wrote_beside_ = false;
  std::vector<Values> oracle_, expected_;
  std::vector<std::vector<double>> size_;  // of each request: what errors of rounded probabilities scale with
  double out_error_ = 0.0, lse_error_ = 0.0;
};

}  // namespace heddle::testing
