#include "cuda/sm90/prefill/instantiate.cuh"

namespace heddle::cuda {

extern const PrefillVariant kPrefillFp16D256;
const PrefillVariant kPrefillFp16D256 = prefill_variant<PrefillConfig<__half, 256, 256, 2, 80>>();

}  // namespace heddle::cuda
