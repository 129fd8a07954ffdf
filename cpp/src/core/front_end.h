// The first half of attention() and decode(): a checked call as a Problem. What the call needs is then features_of()
// it, and find_row() tells who can run it.
#pragma once

#include "core/problem.h"
#include "heddle/attention.h"
#include "heddle/decode.h"

namespace heddle {

// Throws heddle::Error for arguments that do not fit. The Problem refers to the params' selection and, on the CPU, to
// the memory of their tables. The static scale of an int8-baseline cache's queries is not in it yet.
Problem problem_of(const AttentionParams& params);
Problem problem_of(const DecodeParams& params);

}  // namespace heddle
