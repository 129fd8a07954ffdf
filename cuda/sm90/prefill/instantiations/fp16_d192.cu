#include "cuda/sm90/prefill/instantiate.cuh"

namespace heddle::cuda {

extern const PrefillVariant kPrefillFp16D192V128;
const PrefillVariant kPrefillFp16D192V128 = prefill_variant<PrefillConfig<__half, 192, 128, 2, 112>>();

extern const PrefillVariant kPrefillFp16D192;
const PrefillVariant kPrefillFp16D192 = prefill_variant<PrefillConfig<__half, 192, 192, 2, 96>>();

}  // namespace heddle::cuda
