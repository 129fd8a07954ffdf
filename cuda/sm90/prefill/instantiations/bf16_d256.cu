#include "cuda/sm90/prefill/instantiate.cuh"

namespace heddle::cuda {

extern const PrefillVariant kPrefillBf16D256;
const PrefillVariant kPrefillBf16D256 = prefill_variant<PrefillConfig<__nv_bfloat16, 256, 256, 2, 80>>();

}  // namespace heddle::cuda
