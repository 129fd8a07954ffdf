#include "cuda/sm90/prefill/instantiate.cuh"

namespace heddle::cuda {

extern const PrefillVariant kPrefillBf16D128;
const PrefillVariant kPrefillBf16D128 = prefill_variant<PrefillConfig<__nv_bfloat16, 128, 128, 2, 128>>();

}  // namespace heddle::cuda
