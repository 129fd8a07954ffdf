#include "cuda/sm90/prefill/instantiate.cuh"

namespace heddle::cuda {

extern const PrefillVariant kPrefillFp16D80;
const PrefillVariant kPrefillFp16D80 = prefill_variant<PrefillConfig<__half, 80, 80, 3, 112>>();

}  // namespace heddle::cuda
