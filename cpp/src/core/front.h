// From a call's parameters to a checked Problem: what attention(), decode() and the run-time selectors share.
#pragma once

#include "core/problem.h"
#include "heddle/attention.h"
#include "heddle/decode.h"

namespace heddle {

// Throws heddle::Error before any memory is touched. outputs = false: `out` and `lse` are not looked at.
Problem problem_of(const AttentionParams& params, bool outputs = true);
Problem problem_of(const DecodeParams& params, bool outputs = true);

// int8-baseline: the static scale of the queries, calibrated from this call's if there is none yet.
void set_query_scale(const DecodeParams& params, Problem& problem);

}  // namespace heddle
