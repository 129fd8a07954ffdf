// The launch of one instantiation: each file below instantiations/ defines some, prefill.cu chooses.
#pragma once

#include <cuda_runtime_api.h>

#include "cuda/sm90/prefill/params.h"

namespace heddle::cuda {

// What the host has to know of an instantiation to fill its parameters.
struct PrefillVariant {
  int dim, dim_v, rows, keys;
  void (*launch)(const PrefillParams& params, int grid, cudaStream_t stream);
  void (*make_worklist)(const PrefillParams& params, cudaStream_t stream);
};

}  // namespace heddle::cuda
