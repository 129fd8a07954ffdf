// decode()'s sampling argument.
#pragma once

#include "core/problem.h"
#include "heddle/decode.h"

namespace heddle {

// The numbers of a Sampling, without the call that it is for.
void check_sampling(const Sampling& sampling);

// Checks params.sampling and params.reads and sets problem.sampled; everything else of the problem is set.
void set_sampling(const DecodeParams& params, Problem& problem);

}  // namespace heddle
