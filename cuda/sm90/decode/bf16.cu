#include "cuda/sm90/decode/instances.h"
#include "cuda/sm90/decode/kernel.cuh"

namespace heddle::cuda::decode {

#define X(dim, columns) template void launch<Native<__nv_bfloat16>, dim, columns>(const Params&, void*);
HEDDLE_DECODE_SHAPES(X)

}  // namespace heddle::cuda::decode
