// The entry points that backends offer; the dispatch table (core/dispatch.cpp) lists them with what they support.
#pragma once

#include "core/problem.h"

namespace heddle {

// A checked merge. Packed batches come as a batch of one, so that the ranks are always these.
struct MergeProblem {
  TensorView outs;  // [P, B, S, H, Dv], P >= 1, any strides but a contiguous last axis; so are all of these
  TensorView lses;  // [P, B, H, S], float32 (float64 for the reference)
  TensorView out;   // [B, S, H, Dv]
  TensorView lse;   // [B, H, S], or not given
  Stream stream;
};

namespace reference {
void attention(const Problem& problem);  // contiguous, packed and paged alike
void sampled(const Problem& problem);
void merge(const MergeProblem& problem);
}  // namespace reference

namespace host {
void attention(const Problem& problem);
void sampled(const Problem& problem);
void merge(const MergeProblem& problem);
}  // namespace host

// Defined in builds with CUDA (HEDDLE_WITH_CUDA).
namespace sm90 {
bool available();  // a visible GPU of this architecture
void merge(const MergeProblem& problem);
}  // namespace sm90

}  // namespace heddle
