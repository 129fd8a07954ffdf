// Which copy of the host kernels runs: each level includes the ones below it.
#pragma once

#include <cstdint>

namespace heddle {

enum class Isa : std::uint8_t {
  kPortable,
  kAvx2,        // AVX2, FMA, F16C
  kAvx512,      // AVX-512 F, BW, DQ, VL, CD
  kAvx512Bf16,  // AVX512_BF16, VNNI
  kAmx,         // AMX tiles with bf16 and int8
};

// The best that this processor, operating system and build have, unless HEDDLE_ISA or set_host_isa() lowered it.
Isa current_isa();

}  // namespace heddle
