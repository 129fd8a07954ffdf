#include "cuda/sm90/prefill/instantiate.cuh"

namespace heddle::cuda {

extern const PrefillVariant kPrefillBf16D96;
const PrefillVariant kPrefillBf16D96 = prefill_variant<PrefillConfig<__nv_bfloat16, 96, 96, 3, 112, 3>>();

}  // namespace heddle::cuda
