#include "cuda/sm90/prefill/instantiate.cuh"

namespace heddle::cuda {

extern const PrefillVariant kPrefillBf16D128Full;
const PrefillVariant kPrefillBf16D128Full =
    prefill_variant<PrefillConfig<__nv_bfloat16, 128, 128, 2, 160>>(/*only_full=*/true);

extern const PrefillVariant kPrefillBf16D128;
const PrefillVariant kPrefillBf16D128 = prefill_variant<PrefillConfig<__nv_bfloat16, 128, 128, 2, 128>>();

}  // namespace heddle::cuda
