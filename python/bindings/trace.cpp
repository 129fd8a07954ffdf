// Replay of access traces; heddle.trace has the public functions.
#include <cstdint>
#include <span>
#include <string>
#include <string_view>

#include "arguments.h"
#include "module.h"
#include "trace/replay.h"
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include "core/check.h"

namespace heddle::python {
namespace {

namespace py = pybind11;

template <class T>
using Vector = py::array_t<T, py::array::c_style | py::array::forcecast>;

trace::Policy to_policy(py::handle value) {
  const std::string_view name = to_string_view(value, "policy");
  if (name == "lru") return trace::Policy::kLru;
  if (name == "fifo") return trace::Policy::kFifo;
  if (name == "previous") return trace::Policy::kPrevious;
  if (name == "optimum") return trace::Policy::kOptimum;
  check::fail(ErrorCode::kValue, "policy",
              check::text("'", name, "' does not exist; allowed are lru, fifo, previous and optimum"));
}

py::array_t<std::int64_t> replay(py::object policy_, Vector<std::int32_t> ids, Vector<std::int64_t> batches,
                                 py::object capacity_) {
  const trace::Policy policy = to_policy(policy_);
  const std::int64_t capacity = to_int(capacity_, "capacity");
  check::at_least("capacity", capacity, 0);
  const std::span<const std::int32_t> sequence(ids.data(), static_cast<std::size_t>(ids.size()));
  const std::span<const std::int64_t> bounds(batches.data(), static_cast<std::size_t>(batches.size()));
  std::int64_t most = -1, before = 0;
  for (const std::int32_t id : sequence) {
    if (id < 0) check::fail(ErrorCode::kValue, "ids", check::text(id, "; allowed are 0 and above"));
    most = std::max<std::int64_t>(most, id);
  }
  for (const std::int64_t bound : bounds) {
    if (bound < before) check::fail(ErrorCode::kValue, "batches", "decrease; allowed are offsets that do not");
    before = bound;
  }
  if (bounds.empty() || bounds.front() != 0 || bounds.back() != ids.size()) {
    check::fail(ErrorCode::kValue, "batches", check::text("allowed are offsets from 0 to ", ids.size()));
  }
  py::array_t<std::int64_t> misses(static_cast<py::ssize_t>(bounds.size() - 1));
  const std::span<std::int64_t> out(misses.mutable_data(), bounds.size() - 1);
  {
    const py::gil_scoped_release release;
    trace::replay(policy, sequence, most + 1, bounds, capacity, out);
  }
  return misses;
}

}  // namespace

void bind_trace(py::module_& m) { m.def("replay", &replay); }

}  // namespace heddle::python
