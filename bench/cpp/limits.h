// What this machine can do, measured once in this process with as many threads as heddle uses.
#pragma once

namespace heddle::bench {

// Element type that a product runs in, the slowest first.
enum class Math { kFloat32, kBFloat16, kInt8 };

struct Limits {
  double read_bytes_per_second = 0;  // a sum over a buffer far larger than the caches
  // Multiply-adds on registers, counted as two operations, with the instructions of host_isa(). A type without
  // instructions of its own has float32's.
  double fp32_flops = 0, bf16_flops = 0, int8_flops = 0;

  double flops(Math math) const {
    return math == Math::kFloat32 ? fp32_flops : math == Math::kBFloat16 ? bf16_flops : int8_flops;
  }
};

const Limits& limits();

// Reads enough that nothing of what was used before is left in a cache. Reads, since written lines would have to be
// written back by whatever is timed next.
void flush_caches();

}  // namespace heddle::bench
