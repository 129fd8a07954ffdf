// Loops of nothing but multiply-adds on registers, one copy an instruction set (peak.cpp).
#pragma once

#include <cstdint>

namespace heddle::bench {

// Runs `steps` steps on the calling thread and returns the operations done: a multiply-add counts as two.
struct PeakLoops {
  double (*fp32)(std::int64_t steps);
  double (*bf16)(std::int64_t steps);  // null: no such instruction; the work is done in float32
  double (*int8)(std::int64_t steps);  // likewise
};

namespace portable {
extern const PeakLoops kPeakLoops;
}
namespace avx2 {
extern const PeakLoops kPeakLoops;
}
namespace avx512 {
extern const PeakLoops kPeakLoops;
}
namespace avx512_bf16 {
extern const PeakLoops kPeakLoops;
}
namespace amx {
extern const PeakLoops kPeakLoops;
}

}  // namespace heddle::bench
