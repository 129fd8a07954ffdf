#include "cuda/sm90/prefill/instantiate.cuh"

namespace heddle::cuda {

extern const PrefillVariant kPrefillBf16D64;
const PrefillVariant kPrefillBf16D64 = prefill_variant<PrefillConfig<__nv_bfloat16, 64, 64, 3, 128, 4>>();

}  // namespace heddle::cuda
