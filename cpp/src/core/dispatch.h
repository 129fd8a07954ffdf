// One table says what every backend runs: (operation, backend, features). A call asks for the features that its
// arguments need; a row that lacks one is refused by name.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <string>
#include <variant>

#include "core/kernels.h"

namespace heddle {

enum class Operation : std::uint8_t { kAttention, kDecode, kSampledDecode, kMerge };

enum class Feature : std::uint8_t {
  kCpu,
  kCuda,
  kFloat64,
  kFloat32,
  kFloat16,
  kBFloat16,
  kInt8,
  kFloat8,
  kMixedDTypes,
  kOutDType,
  kWideHeads,
  kPaged,
  kPacked,
  kCausal,
  kWindow,
  kGlobalTokens,
  kStrided,
  kBlockMask,
  kTokenLists,
  kTokenListsPerQuery,
  kSoftcap,
  kSinks,
  kLse,
  kPartitionScales,
  kKeyMean,
  kValueMean,
  kQueryMean,
  kQuantizedQueries,
  kBernoulli,
  kKeptKeys,
  kReadCounts,
  kCount,
};

class Features {
 public:
  constexpr Features() = default;
  constexpr Features(std::initializer_list<Feature> features) {
    for (const Feature f : features) set(f);
  }
  static constexpr Features all_but(std::initializer_list<Feature> features) {
    Features s;
    s.bits_ = ((std::uint64_t{1} << static_cast<int>(Feature::kCount)) - 1) & ~Features(features).bits_;
    return s;
  }
  constexpr void set(Feature f, bool on = true) {
    if (on) bits_ |= std::uint64_t{1} << static_cast<int>(f);
  }
  constexpr bool has(Feature f) const { return (bits_ >> static_cast<int>(f) & 1) != 0; }
  constexpr bool empty() const { return bits_ == 0; }
  constexpr Features without(Features other) const {
    Features s;
    s.bits_ = bits_ & ~other.bits_;
    return s;
  }
  // "float64 and softcap"
  std::string names() const;

 private:
  std::uint64_t bits_ = 0;
};

struct Row {
  using Run = std::variant<void (*)(const Problem&), void (*)(const MergeProblem&)>;
  Operation operation;
  Backend backend;
  Features features;
  bool (*available)();
  Run run;
};

Features features_of(const Problem& problem);
Features features_of(const MergeProblem& problem);

// The row that runs `operation` with these features: the first that can with Backend::kAuto, that of `wanted`
// otherwise. Throws kUnsupported, with the missing features and who has them.
const Row& find_row(Operation operation, Backend wanted, Features needed);

// Runs the problem and records the kernel's name for last_kernel().
void run(const Row& row, const Problem& problem);
void run(const Row& row, const MergeProblem& problem);

}  // namespace heddle
