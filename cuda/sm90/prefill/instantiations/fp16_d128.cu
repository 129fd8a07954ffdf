#include "cuda/sm90/prefill/instantiate.cuh"

namespace heddle::cuda {

extern const PrefillVariant kPrefillFp16D128;
const PrefillVariant kPrefillFp16D128 = prefill_variant<PrefillConfig<__half, 128, 128, 2, 128>>();

}  // namespace heddle::cuda
