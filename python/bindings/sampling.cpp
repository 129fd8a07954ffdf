// Sampled attention's argument.
#include "sampling.h"

#include <string>

#include "arguments.h"
#include "module.h"
#include "tensor.h"

#include "core/check.h"
#include "core/sampling.h"
#include "heddle/error.h"

namespace heddle::python {
namespace {

constexpr std::string_view kStratified = "stratified";

// None, B or ("stratified", B).
void set_bernoulli(py::handle value, Sampling& options) {
  if (value.is_none()) return;
  if (py::isinstance<py::tuple>(value) || py::isinstance<py::list>(value)) {
    const auto pair = py::reinterpret_borrow<py::sequence>(value);
    if (pair.size() != 2 || to_string_view(pair[0], "bernoulli") != kStratified) {
      check::fail(ErrorCode::kValue, "bernoulli",
                  check::text("got ", py::repr(value).cast<std::string>(),
                              "; allowed are None, a number of queries and ('stratified', number)"));
    }
    options.bernoulli_stratified = true;
    options.bernoulli = to_int(pair[1], "bernoulli");
  } else {
    options.bernoulli = to_int(value, "bernoulli");
  }
  check::at_least("bernoulli", options.bernoulli, 1);
}

SharedSampling make_sampling(py::object method, py::object samples, py::object seed, py::object bernoulli,
                             py::object offset, py::object n_sink, py::object n_recent, py::object n_top) {
  SharedSampling s;
  s.options.method = sampling_method_from_string(to_string_view(method, "method"));
  s.options.samples = to_int(samples, "samples");
  const std::int64_t key = to_int(seed, "seed");
  check::at_least("seed", key, 0);
  s.options.seed = static_cast<std::uint64_t>(key);
  set_bernoulli(bernoulli, s.options);
  if (PyIndex_Check(offset.ptr()) != 0 && !py::hasattr(offset, "shape")) {
    const std::int64_t number = to_int(offset, "offset");
    constexpr std::int64_t kMost = 0xffffffff;
    if (number < 0 || number > kMost) {
      check::fail(ErrorCode::kValue, "offset", check::text(number, "; allowed are 0 to ", kMost));
    }
    s.options.offset = static_cast<std::uint32_t>(number);
  } else {
    const Array at = array(offset, "offset");
    check::dtype("offset", at.view, {DType::kInt32});
    check::shape("offset", at.view, {1});
    s.options.offset_at = at.view;
    s.owner = keep_alive(at);
  }
  s.options.n_sink = to_int(n_sink, "n_sink");
  s.options.n_recent = to_int(n_recent, "n_recent");
  s.options.n_top = to_int(n_top, "n_top");
  check_sampling(s.options);
  return s;
}

std::string repr(const SharedSampling& self) {
  const Sampling& s = self.options;
  std::string text = check::text("Sampling('", to_string(s.method), "', ", s.samples, ", seed=", s.seed);
  if (s.bernoulli > 0) {
    text += s.bernoulli_stratified ? check::text(", bernoulli=('", kStratified, "', ", s.bernoulli, ")")
                                   : check::text(", bernoulli=", s.bernoulli);
  }
  text += s.offset_at.given() ? std::string(", offset=<array>")
          : s.offset > 0      ? check::text(", offset=", s.offset)
                              : std::string();
  if (s.n_sink > 0) text += check::text(", n_sink=", s.n_sink);
  if (s.n_recent > 0) text += check::text(", n_recent=", s.n_recent);
  if (s.n_top > 0) text += check::text(", n_top=", s.n_top);
  return text + ")";
}

}  // namespace

std::optional<Sampling> to_sampling(py::handle value) {
  if (value.is_none()) return std::nullopt;
  if (!py::isinstance<SharedSampling>(value)) {
    check::fail(ErrorCode::kDType, "sampling",
                check::text("got ", describe(value), "; allowed are None and heddle.Sampling"));
  }
  return value.cast<const SharedSampling&>().options;
}

void bind_sampling(py::module_& m) {
  py::class_<SharedSampling>(m, "Sampling",
                             R"(Rows of V drawn at random in place of all of them: decode's argument `sampling`.

    Sampling(method, samples, *, seed=0, bernoulli=None, offset=0, n_sink=0, n_recent=0, n_top=0)

All keys that a query sees are scored; the output is the mean of `samples` rows of V, each drawn with its softmax
probability, times the mass of those probabilities (1 without sinks). Its expectation is exact attention. method is

    "iid"              independent draws; covariance Cov_p(v) / samples
    "stratified"       one draw in each of `samples` equal slices of the cumulative distribution: variance never above iid
    "systematic"       one random offset for all slices (S2ANTA)
    "systematic_tile"  each tile of 64 keys draws max(1, samples // tiles) rows by itself, and so more than `samples` where
                       there are more tiles than that
    "exact"            every row of V, samples=0: for Bernoulli scores alone

n_sink, n_recent, n_top: the first and the last keys that a query sees, and of those between the ones with the largest
scores (ties to the lower index), are read exactly; the others are sampled. Still unbiased.

bernoulli: B, 1 to 127: scores are means over B ternary queries whose features are sign(q_i) with probability
|q_i| / max|q|, else 0, so that keys' features which none of them needs are not read. ("stratified", B) draws
floor(B |q_i| / max|q|) for certain and one more at random. Scores are unbiased, their softmax is not. Needs
KVCache(feature_major=True); over int8 keys q is then not quantized.

seed, offset: random numbers are Philox 4x32-10 with key `seed` and counter (request, query head, offset, draw), and
depend on nothing else: the rows drawn do not change with threads, splits or schedule. Calls with equal offsets repeat
their draws: count it up from layer to layer and step to step. It is a number, or an int32 array of one, read at every
call. HeddleValueError for numbers out of range and names that do not exist.

Source: SANTA and S2ANTA (arXiv 2605.01910).)")
      .def(py::init(&make_sampling), py::arg("method"), py::arg("samples"), py::kw_only(), py::arg("seed") = 0,
           py::arg("bernoulli") = py::none(), py::arg("offset") = 0, py::arg("n_sink") = 0, py::arg("n_recent") = 0,
           py::arg("n_top") = 0)
      .def_property_readonly("method", [](const SharedSampling& s) { return std::string(to_string(s.options.method)); })
      .def_property_readonly("samples", [](const SharedSampling& s) { return s.options.samples; })
      .def_property_readonly("seed", [](const SharedSampling& s) { return s.options.seed; })
      .def("__repr__", &repr);
}

}  // namespace heddle::python
