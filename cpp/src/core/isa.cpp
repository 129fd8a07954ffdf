#include "core/isa.h"

#include <array>
#include <atomic>
#include <cstdlib>
#include <string>
#include <string_view>

#include "core/check.h"
#include "heddle/backend.h"

#if defined(__x86_64__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace heddle {
namespace {

#if defined(__x86_64__)
// __builtin_cpu_supports also asks the operating system (XGETBV) whether it saves the registers.
bool has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
}
bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512cd");
}
bool has_avx512_bf16() {
  return has_avx512() && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni");
}
bool has_amx() {
#if defined(__linux__)
  if (!has_avx512_bf16() || !__builtin_cpu_supports("amx-tile") || !__builtin_cpu_supports("amx-bf16") ||
      !__builtin_cpu_supports("amx-int8")) {
    return false;
  }
  // Linux hands out the tile registers on request, once for all threads of the process
  // (Documentation/arch/x86/xstate.rst).
  constexpr long kRequestPermission = 0x1023;  // ARCH_REQ_XCOMP_PERM
  constexpr long kTileData = 18;               // XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}
#else
bool has_avx2() { return false; }
bool has_avx512() { return false; }
bool has_avx512_bf16() { return false; }
bool has_amx() { return false; }
#endif

#if defined(HEDDLE_HAVE_ISA_AVX2)
constexpr bool kBuiltAvx2 = true;
#else
constexpr bool kBuiltAvx2 = false;
#endif
#if defined(HEDDLE_HAVE_ISA_AVX512)
constexpr bool kBuiltAvx512 = true;
#else
constexpr bool kBuiltAvx512 = false;
#endif
#if defined(HEDDLE_HAVE_ISA_AVX512_BF16)
constexpr bool kBuiltAvx512Bf16 = true;
#else
constexpr bool kBuiltAvx512Bf16 = false;
#endif
#if defined(HEDDLE_HAVE_ISA_AMX)
constexpr bool kBuiltAmx = true;
#else
constexpr bool kBuiltAmx = false;
#endif

struct Level {
  Isa isa;
  std::string_view name;
  bool available;
};

// Best first. The last one runs everywhere.
const std::array<Level, 5>& levels() {
  static const std::array<Level, 5> table = {{
      {Isa::kAmx, "amx", kBuiltAmx && has_amx()},
      {Isa::kAvx512Bf16, "avx512_bf16", kBuiltAvx512Bf16 && has_avx512_bf16()},
      {Isa::kAvx512, "avx512", kBuiltAvx512 && has_avx512()},
      {Isa::kAvx2, "avx2", kBuiltAvx2 && has_avx2()},
      {Isa::kPortable, "portable", true},
  }};
  return table;
}

Isa isa_from_string(std::string_view name, std::string_view argument) {
  std::string allowed = "auto";
  for (const Level& level : levels()) {
    if (level.available && (name == level.name || name == "auto")) return level.isa;
    if (level.available) allowed += check::text(", ", level.name);
  }
  check::fail(ErrorCode::kValue, argument,
              check::text("'", name, "' is not an instruction set of this processor and build; allowed are ", allowed));
}

std::atomic<Isa>& chosen() {
  static std::atomic<Isa> isa = [] {
    const char* wanted = std::getenv("HEDDLE_ISA");
    return isa_from_string(wanted == nullptr || *wanted == '\0' ? "auto" : wanted, "HEDDLE_ISA");
  }();
  return isa;
}

}  // namespace

Isa current_isa() { return chosen().load(std::memory_order_relaxed); }

std::string_view host_isa() {
  const Isa isa = current_isa();
  for (const Level& level : levels()) {
    if (level.isa == isa) return level.name;
  }
  return {};
}

void set_host_isa(std::string_view name) { chosen().store(isa_from_string(name, "name"), std::memory_order_relaxed); }

std::vector<std::string> available_host_isas() {
  std::vector<std::string> names;
  for (const Level& level : levels()) {
    if (level.available) names.emplace_back(level.name);
  }
  return names;
}

}  // namespace heddle
