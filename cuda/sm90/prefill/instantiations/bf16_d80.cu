#include "cuda/sm90/prefill/instantiate.cuh"

namespace heddle::cuda {

extern const PrefillVariant kPrefillBf16D80;
const PrefillVariant kPrefillBf16D80 = prefill_variant<PrefillConfig<__nv_bfloat16, 80, 80, 3, 112>>();

}  // namespace heddle::cuda
