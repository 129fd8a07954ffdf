#include "cuda/sm90/prefill/instantiate.cuh"

namespace heddle::cuda {

extern const PrefillVariant kPrefillFp16D64;
const PrefillVariant kPrefillFp16D64 = prefill_variant<PrefillConfig<__half, 64, 64, 3, 128, 4>>();

}  // namespace heddle::cuda
