// Backends, schedules, threads, and what supports what.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "heddle/export.h"

namespace heddle {

enum class Backend : std::uint8_t {
  kAuto,       // the first that supports the call, for the device of its tensors
  kReference,  // float64, written for clarity: the oracle
  kHost,       // multi-threaded SIMD
  kSm90,       // Hopper
};

HEDDLE_API std::string_view to_string(Backend backend);
// Throws kValue for a name that does not exist.
HEDDLE_API Backend backend_from_string(std::string_view name);
// The backends that can run in this process, best first.
HEDDLE_API std::vector<Backend> available_backends();

// Who computes what, when. Every kind gives the same bits; only the time differs.
enum class ScheduleKind : std::uint8_t {
  kAuto,
  kTile,      // one tile a CTA (host: tiles dealt in order)
  kStatic,    // persistent, tiles assigned in advance
  kStealing,  // persistent, heavy tiles of a head first, idle workers take from the rest
};

struct Schedule {
  ScheduleKind kind = ScheduleKind::kAuto;
  // Keys a split of one row tile reads, rounded up to 64; 0 chooses. Splits depend on this and on the request alone, so
  // a fixed value makes a request's bits independent of its batch.
  std::int64_t split_size = 0;
};

HEDDLE_API ScheduleKind schedule_from_string(std::string_view name);

// Threads of the host backend: OMP_NUM_THREADS unless set here; n = 0 returns to that default.
HEDDLE_API void set_num_threads(int n);
HEDDLE_API int num_threads();

// The instruction set that the host backend runs: "amx", "avx512_bf16", "avx512", "avx2" or "portable". HEDDLE_ISA in
// the environment, or set_host_isa, lowers it (kValue for a name that this processor or build lacks; "auto" takes the
// best).
HEDDLE_API std::string_view host_isa();
HEDDLE_API void set_host_isa(std::string_view name);
HEDDLE_API std::vector<std::string> available_host_isas();

// The validating mode, off by default: calls with lengths, tables and token lists on a device copy them to the host and
// check them there as they would those of the CPU, so that a bad one raises an error that names the request. Without
// it nobody reads them but the kernels. Such a call waits for its stream, and cannot be captured in a graph.
HEDDLE_API void set_validation(bool on);
HEDDLE_API bool validation();

// The kernel that the last call of this thread ran, e.g. "host/amx/attention bf16": what backend=auto chose.
HEDDLE_API std::string last_kernel();

}  // namespace heddle
