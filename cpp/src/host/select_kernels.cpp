#include "host/select_kernels.h"

#include "core/isa.h"

namespace heddle::host {

#define HEDDLE_DECLARE(isa)                  \
  namespace isa {                            \
  extern const SelectKernels kSelectKernels; \
  }
HEDDLE_DECLARE(portable)
HEDDLE_DECLARE(avx2)
HEDDLE_DECLARE(avx512)
HEDDLE_DECLARE(avx512_bf16)
HEDDLE_DECLARE(amx)
#undef HEDDLE_DECLARE

const SelectKernels& select_kernels() {
  switch (current_isa()) {
#if defined(HEDDLE_HAVE_ISA_AMX)
    case Isa::kAmx: return amx::kSelectKernels;
#endif
#if defined(HEDDLE_HAVE_ISA_AVX512_BF16)
    case Isa::kAvx512Bf16: return avx512_bf16::kSelectKernels;
#endif
#if defined(HEDDLE_HAVE_ISA_AVX512)
    case Isa::kAvx512: return avx512::kSelectKernels;
#endif
#if defined(HEDDLE_HAVE_ISA_AVX2)
    case Isa::kAvx2: return avx2::kSelectKernels;
#endif
    default: return portable::kSelectKernels;
  }
}

}  // namespace heddle::host
