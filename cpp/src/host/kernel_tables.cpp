#include "core/isa.h"
#include "host/sampling_kernels.h"
#include "host/stream_kernels.h"
#include "host/tile_kernels.h"

namespace heddle::host {

#define HEDDLE_DECLARE(isa)                      \
  namespace isa {                                \
  extern const TileKernels kTileKernels;         \
  extern const StreamKernels kStreamKernels;     \
  extern const SamplingKernels kSamplingKernels; \
  }
HEDDLE_DECLARE(portable)
HEDDLE_DECLARE(avx2)
HEDDLE_DECLARE(avx512)
HEDDLE_DECLARE(avx512_bf16)
HEDDLE_DECLARE(amx)
#undef HEDDLE_DECLARE

namespace {

struct Tables {
  const TileKernels& tile;
  const StreamKernels& stream;
  const SamplingKernels& sampling;
};

Tables tables() {
  switch (current_isa()) {
#if defined(HEDDLE_HAVE_ISA_AMX)
    case Isa::kAmx: return {amx::kTileKernels, amx::kStreamKernels, amx::kSamplingKernels};
#endif
#if defined(HEDDLE_HAVE_ISA_AVX512_BF16)
    case Isa::kAvx512Bf16:
      return {avx512_bf16::kTileKernels, avx512_bf16::kStreamKernels, avx512_bf16::kSamplingKernels};
#endif
#if defined(HEDDLE_HAVE_ISA_AVX512)
    case Isa::kAvx512: return {avx512::kTileKernels, avx512::kStreamKernels, avx512::kSamplingKernels};
#endif
#if defined(HEDDLE_HAVE_ISA_AVX2)
    case Isa::kAvx2: return {avx2::kTileKernels, avx2::kStreamKernels, avx2::kSamplingKernels};
#endif
    default: return {portable::kTileKernels, portable::kStreamKernels, portable::kSamplingKernels};
  }
}

}  // namespace

const TileKernels& tile_kernels() { return tables().tile; }
const StreamKernels& stream_kernels() { return tables().stream; }
const SamplingKernels& sampling_kernels() { return tables().sampling; }

}  // namespace heddle::host
