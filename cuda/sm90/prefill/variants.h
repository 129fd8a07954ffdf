// The instantiations of the prefill kernel, narrow heads first.
#pragma once

#include <array>
#include <span>

#include "cuda/sm90/prefill/launch.cuh"

namespace heddle::cuda {

extern const PrefillVariant kPrefillBf16D64, kPrefillBf16D80, kPrefillBf16D96, kPrefillBf16D128, kPrefillBf16D192V128,
    kPrefillBf16D192, kPrefillBf16D256;
extern const PrefillVariant kPrefillFp16D64, kPrefillFp16D80, kPrefillFp16D96, kPrefillFp16D128, kPrefillFp16D192V128,
    kPrefillFp16D192, kPrefillFp16D256;

inline std::span<const PrefillVariant* const> prefill_variants(DType dtype) {
  static constexpr std::array<const PrefillVariant*, 7> kBf16 = {
      &kPrefillBf16D64,      &kPrefillBf16D80,  &kPrefillBf16D96, &kPrefillBf16D128,
      &kPrefillBf16D192V128, &kPrefillBf16D192, &kPrefillBf16D256};
  static constexpr std::array<const PrefillVariant*, 7> kFp16 = {
      &kPrefillFp16D64,      &kPrefillFp16D80,  &kPrefillFp16D96, &kPrefillFp16D128,
      &kPrefillFp16D192V128, &kPrefillFp16D192, &kPrefillFp16D256};
  return dtype == DType::kBFloat16 ? std::span(kBf16) : std::span(kFp16);
}

}  // namespace heddle::cuda
