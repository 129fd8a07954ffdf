// The instantiations of the decode kernel, one line each. The files named after formats define them.
#pragma once

#include "cuda/sm90/decode/format.cuh"
#include "cuda/sm90/decode/params.h"

namespace heddle::cuda::decode {

template <class Format, int kDim, int kColumns>
void launch(const Params& params, void* stream);

// X(head_dim, columns)
#define HEDDLE_DECODE_SHAPES(X) X(64, 1) X(64, 2) X(96, 1) X(96, 2) X(128, 1) X(128, 2) X(192, 1) X(256, 1)

}  // namespace heddle::cuda::decode
