// Backends, schedules, threads and instruction sets.
#include "heddle/backend.h"

#include <algorithm>
#include <limits>
#include <string>

#include "arguments.h"
#include "module.h"
#include <pybind11/stl.h>

#include "core/check.h"

namespace heddle::python {
namespace {

const char* name_of(ScheduleKind kind) {
  switch (kind) {
    case ScheduleKind::kTile: return "tile";
    case ScheduleKind::kStatic: return "static";
    case ScheduleKind::kStealing: return "stealing";
    default: return "auto";
  }
}

}  // namespace

void bind_backend(py::module_& m) {
  py::class_<Schedule>(m, "Schedule", R"(Who computes what, when. Every kind gives the same bits; only the time differs.

    Schedule(kind="auto", split_size=0)

kind: "auto", "tile" (tiles dealt in order), "static" (persistent workers, tiles assigned in advance) or "stealing"
(heaviest first, idle workers take from the rest). split_size: keys that one split of a row tile reads; 0 chooses. Splits
depend on this and on the request alone, so a fixed size makes a request's bits independent of its batch.)")
      .def(py::init([](py::object kind, py::object split_size) {
             const std::int64_t keys = to_int(split_size, "split_size");
             check::at_least("split_size", keys, 0);
             return Schedule{schedule_from_string(to_string_view(kind, "kind")), keys};
           }),
           py::arg("kind") = "auto", py::arg("split_size") = 0)
      .def_property_readonly("kind", [](const Schedule& s) { return name_of(s.kind); })
      .def_readonly("split_size", &Schedule::split_size)
      .def("__repr__", [](const Schedule& s) {
        return check::text("Schedule(kind='", name_of(s.kind), "', split_size=", s.split_size, ")");
      });

  m.def(
      "available_backends",
      [] {
        py::list names;
        for (const Backend backend : available_backends()) names.append(py::str(std::string(to_string(backend))));
        return names;
      },
      R"(available_backends() -> list of str

The backends that can run in this process, best first: "sm90" (with a Hopper GPU), "host", "reference".)");
  m.def("num_threads", &num_threads, R"(num_threads() -> int

Threads of the host backend: those of set_num_threads, else OpenMP's own number (OMP_NUM_THREADS, torch.set_num_threads).)");
  m.def(
      "set_num_threads",
      [](py::object n) {
        const std::int64_t threads = to_int(n, "n");
        check::at_least("n", threads, 0);
        set_num_threads(static_cast<int>(std::min<std::int64_t>(threads, std::numeric_limits<int>::max())));
      },
      py::arg("n"), R"(set_num_threads(n)

Sets the threads of the host backend for the whole process; 0 returns to OpenMP's own number. A forked child starts with 1:
OpenMP's pool does not survive a fork.)");
  m.def("host_isa", [] { return std::string(host_isa()); }, R"(host_isa() -> str

The instruction set that the host backend runs: "amx", "avx512_bf16", "avx512", "avx2" or "portable".)");
  m.def(
      "set_host_isa", [](py::object name) { set_host_isa(to_string_view(name, "name")); }, py::arg("name"),
      R"(set_host_isa(name)

Runs another instruction set from now on, as HEDDLE_ISA in the environment does; "auto" takes the best. HeddleValueError
for one that this processor or build lacks.)");
  m.def("available_host_isas", &available_host_isas, R"(available_host_isas() -> list of str

The instruction sets that this processor and build have.)");
  m.def(
      "set_validation", [](py::object on) { set_validation(to_bool(on, "on")); }, py::arg("on"),
      R"(set_validation(on)

The validating mode, off by default, for the whole process. The host does not read lengths, tables and token lists that lie
on a GPU; with the mode on, each call copies them to the host and checks them as it would those of the CPU, so that a bad
one raises the error that names its request. Such calls wait for their stream and cannot be captured in a graph.)");
  m.def("validation", &validation, R"(validation() -> bool

Whether the validating mode is on.)");
  m.def("last_kernel", &last_kernel, R"(last_kernel() -> str

The kernel that this thread's last call ran, e.g. "host/amx/attention bf16": what backend="auto" chose.)");
  m.attr("compiler") = check::text(
#ifdef __clang__
      "clang "
#else
      "gcc "
#endif
      ,
      __VERSION__);
#ifdef HEDDLE_WITH_CUDA
  m.attr("with_cuda") = true;
#else
  m.attr("with_cuda") = false;
#endif
}

}  // namespace heddle::python
