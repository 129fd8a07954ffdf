#include "heddle/backend.h"

#include <array>
#include <utility>

#include "core/check.h"

namespace heddle {
namespace {

constexpr std::array<std::pair<std::string_view, Backend>, 4> kBackends = {{
    {"auto", Backend::kAuto},
    {"reference", Backend::kReference},
    {"host", Backend::kHost},
    {"sm90", Backend::kSm90},
}};

constexpr std::array<std::pair<std::string_view, ScheduleKind>, 4> kSchedules = {{
    {"auto", ScheduleKind::kAuto},
    {"tile", ScheduleKind::kTile},
    {"static", ScheduleKind::kStatic},
    {"stealing", ScheduleKind::kStealing},
}};

template <class Table>
auto from_string(std::string_view argument, const Table& table, std::string_view name) {
  std::string allowed;
  for (const auto& [known, value] : table) {
    if (known == name) return value;
    allowed += check::text(allowed.empty() ? "" : ", ", known);
  }
  check::fail(ErrorCode::kValue, argument, check::text("'", name, "' does not exist; allowed are ", allowed));
}

}  // namespace

std::string_view to_string(Backend backend) {
  for (const auto& [name, value] : kBackends) {
    if (value == backend) return name;
  }
  return "unknown";
}

Backend backend_from_string(std::string_view name) { return from_string("backend", kBackends, name); }
ScheduleKind schedule_from_string(std::string_view name) { return from_string("schedule", kSchedules, name); }

}  // namespace heddle
