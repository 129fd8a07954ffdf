#include "host/quantize_kernels.h"

#include "core/isa.h"

namespace heddle::host {

#define HEDDLE_DECLARE(isa)                      \
  namespace isa {                                \
  extern const QuantizeKernels kQuantizeKernels; \
  }
HEDDLE_DECLARE(portable)
HEDDLE_DECLARE(avx2)
HEDDLE_DECLARE(avx512)
HEDDLE_DECLARE(avx512_bf16)
HEDDLE_DECLARE(amx)
#undef HEDDLE_DECLARE

const QuantizeKernels& quantize_kernels() {
  switch (current_isa()) {
#if defined(HEDDLE_HAVE_ISA_AMX)
    case Isa::kAmx: return amx::kQuantizeKernels;
#endif
#if defined(HEDDLE_HAVE_ISA_AVX512_BF16)
    case Isa::kAvx512Bf16: return avx512_bf16::kQuantizeKernels;
#endif
#if defined(HEDDLE_HAVE_ISA_AVX512)
    case Isa::kAvx512: return avx512::kQuantizeKernels;
#endif
#if defined(HEDDLE_HAVE_ISA_AVX2)
    case Isa::kAvx2: return avx2::kQuantizeKernels;
#endif
    default: return portable::kQuantizeKernels;
  }
}

}  // namespace heddle::host
