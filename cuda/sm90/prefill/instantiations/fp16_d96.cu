#include "cuda/sm90/prefill/instantiate.cuh"

namespace heddle::cuda {

extern const PrefillVariant kPrefillFp16D96;
const PrefillVariant kPrefillFp16D96 = prefill_variant<PrefillConfig<__half, 96, 96, 3, 112, 3>>();

}  // namespace heddle::cuda
