#include "peak.h"

#if HEDDLE_ISA_LEVEL >= 3
#include <immintrin.h>
#endif

namespace heddle::bench::HEDDLE_ISA {
namespace {

// Independent chains of dependent multiply-adds: two units of four cycles' latency need eight, and a few more keep both
// busy while the loop counts.
constexpr int kChains = 12;
volatile float sink;

constexpr int kVectorBytes = HEDDLE_ISA_LEVEL >= 2 ? 64 : HEDDLE_ISA_LEVEL == 1 ? 32 : 16;
typedef float Vector __attribute__((vector_size(kVectorBytes)));

// Chains that start as equals would be computed once: the compiler must not know what they start as.
template <class T>
[[gnu::always_inline]] inline void hide(T& value) {
  asm volatile("" : "+v"(value));
}

double fp32(std::int64_t steps) {
  Vector chains[kChains] = {};
  for (Vector& chain : chains) hide(chain);
  const Vector factor = Vector{} + 0.5f, term = Vector{} + 1.0f;
  for (std::int64_t i = 0; i < steps; ++i) {
#pragma GCC unroll 12
    for (int c = 0; c < kChains; ++c) chains[c] = chains[c] * factor + term;
  }
  for (const Vector& chain : chains) sink = chain[0];
  return 2.0 * static_cast<double>(steps) * kChains * (kVectorBytes / 4);
}

#if HEDDLE_ISA_LEVEL == 3
double bf16(std::int64_t steps) {
  __m512 chains[kChains] = {};
  for (__m512& chain : chains) hide(chain);
  const __m512bh a = _mm512_cvtne2ps_pbh(_mm512_set1_ps(0.5f), _mm512_set1_ps(0.25f));
  for (std::int64_t i = 0; i < steps; ++i) {
#pragma GCC unroll 12
    for (int c = 0; c < kChains; ++c) chains[c] = _mm512_dpbf16_ps(chains[c], a, a);
  }
  for (const __m512& chain : chains) sink = _mm512_cvtss_f32(chain);
  return 2.0 * static_cast<double>(steps) * kChains * 32;
}

double int8(std::int64_t steps) {
  __m512i chains[kChains] = {};
  for (__m512i& chain : chains) hide(chain);
  const __m512i a = _mm512_set1_epi8(1);
  for (std::int64_t i = 0; i < steps; ++i) {
#pragma GCC unroll 12
    for (int c = 0; c < kChains; ++c) chains[c] = _mm512_dpbusd_epi32(chains[c], a, a);
  }
  for (const __m512i& chain : chains) sink = static_cast<float>(_mm512_cvtsi512_si32(chain));
  return 2.0 * static_cast<double>(steps) * kChains * 64;
}
#elif HEDDLE_ISA_LEVEL == 4
// Four accumulator tiles of 16 x 16, two tiles of each operand: the largest block that the eight tiles allow.
struct alignas(64) TileConfig {
  std::uint8_t palette = 1, start_row = 0, reserved[14] = {};
  std::uint16_t bytes_per_row[16] = {};
  std::uint8_t rows[16] = {};
};

void configure_tiles() {
  TileConfig config;
  for (int tile = 0; tile < 8; ++tile) {
    config.bytes_per_row[tile] = 64;
    config.rows[tile] = 16;
  }
  asm volatile("" : : "r"(&config) : "memory");  // GCC 12's intrinsic claims to read only the first 8 bytes
  _tile_loadconfig(&config);
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  _tile_zero(4);
  _tile_zero(5);
  _tile_zero(6);
  _tile_zero(7);
}

double bf16(std::int64_t steps) {
  configure_tiles();
  for (std::int64_t i = 0; i < steps; ++i) {
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  _tile_release();
  return 2.0 * static_cast<double>(steps) * 4 * 16 * 16 * 32;
}

double int8(std::int64_t steps) {
  configure_tiles();
  for (std::int64_t i = 0; i < steps; ++i) {
    _tile_dpbssd(0, 4, 6);
    _tile_dpbssd(1, 4, 7);
    _tile_dpbssd(2, 5, 6);
    _tile_dpbssd(3, 5, 7);
  }
  _tile_release();
  return 2.0 * static_cast<double>(steps) * 4 * 16 * 16 * 64;
}
#else
constexpr double (*bf16)(std::int64_t) = nullptr;
constexpr double (*int8)(std::int64_t) = nullptr;
#endif

}  // namespace

const PeakLoops kPeakLoops = {fp32, bf16, int8};

}  // namespace heddle::bench::HEDDLE_ISA
