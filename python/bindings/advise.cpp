// The advisor: keyword arguments in, dictionaries out. heddle.advise gives them their types and documentation.
#include "heddle/advise.h"

#include <string>

#include "arguments.h"
#include "module.h"

#include "core/check.h"
#include "heddle/error.h"

namespace heddle::python {
namespace {

DType to_compute_dtype(py::handle value) {
  const std::string name(to_string_view(value, "dtype"));
  for (const DType dtype : {DType::kBFloat16, DType::kFloat16, DType::kFloat32}) {
    if (name == to_string(dtype)) return dtype;
  }
  check::fail(ErrorCode::kDType, "dtype", check::text("'", name, "'; allowed are bfloat16, float16 and float32"));
}

py::dict dict_of(const Machine& m) {
  py::dict out;
  out["name"] = m.name;
  out["source"] = m.source;
  out["memory"] = m.memory;
  out["bandwidth"] = m.bandwidth;
  out["fp32"] = m.fp32;
  out["bf16"] = m.bf16;
  out["int8"] = m.int8;
  out["fp8"] = m.fp8;
  out["workers"] = m.workers;
  return out;
}

Machine machine_of(const py::dict& d) {
  Machine m;
  m.name = to_string_view(d["name"], "machine");
  m.source = to_string_view(d["source"], "machine");
  m.memory = to_double(d["memory"], "machine");
  m.bandwidth = to_double(d["bandwidth"], "machine");
  m.fp32 = to_double(d["fp32"], "machine");
  m.bf16 = to_double(d["bf16"], "machine");
  m.int8 = to_double(d["int8"], "machine");
  m.fp8 = to_double(d["fp8"], "machine");
  m.workers = to_int(d["workers"], "machine");
  return m;
}

py::dict dict_of(const Cost& c) {
  py::dict out;
  out["pattern"] = to_string(c.pattern);
  out["format"] = std::string(to_string(c.format));
  out["phase"] = c.phase == Phase::kPrefill ? "prefill" : "decode";
  out["pairs"] = c.pairs;
  out["density"] = c.density;
  out["kv_bytes"] = c.kv_bytes;
  out["side_bytes"] = c.side_bytes;
  out["score_bytes"] = c.score_bytes;
  out["workspace_bytes"] = c.workspace_bytes;
  out["activation_bytes"] = c.activation_bytes;
  out["total_bytes"] = c.total_bytes;
  out["operations"] = c.operations;
  out["moved_bytes"] = c.moved_bytes;
  out["seconds"] = c.seconds;
  out["memory_bound"] = c.memory_bound;
  out["fits"] = c.fits;
  out["max_seq_len"] = c.max_seq_len;
  return out;
}

std::vector<Pattern> patterns_of(const py::dict& d) {
  Pattern window{.kind = Pattern::Kind::kWindow}, strided{.kind = Pattern::Kind::kStrided};
  Pattern blocks{.kind = Pattern::Kind::kBlocks}, topk{.kind = Pattern::Kind::kTopK},
      tokens{.kind = Pattern::Kind::kTokens};
  window.window = {.window = {.left = to_optional_int(d["window"], "window"), .right = 0},
                   .n_global = to_int(d["n_global"], "n_global")};
  strided.strided = {.width = to_int(d["width"], "strided"), .stride = to_int(d["stride"], "strided")};
  blocks.density = to_double(d["density"], "density");
  blocks.block = to_int(d["block"], "block");
  topk.budget = tokens.budget = to_int(d["budget"], "budget");
  return {window, strided, blocks, topk, tokens};
}

py::dict advise_bound(const py::dict& d) {
  AdviseParams params;
  params.num_layers = to_int(d["num_layers"], "num_layers");
  params.batch = to_int(d["batch"], "batch");
  params.num_q_heads = to_int(d["num_q_heads"], "num_q_heads");
  params.num_kv_heads = to_int(d["num_kv_heads"], "num_kv_heads");
  params.head_dim = to_int(d["head_dim"], "head_dim");
  params.head_dim_v = to_int(d["head_dim_v"], "head_dim_v");
  params.seq_len = to_int(d["seq_len"], "seq_len");
  params.new_tokens = to_int(d["new_tokens"], "new_tokens");
  params.dtype = to_compute_dtype(d["dtype"]);
  params.causal = to_bool(d["causal"], "causal");
  params.materialized = to_bool(d["materialized"], "materialized");
  params.format = cache_format_from_string(to_string_view(d["format"], "format"));
  params.partition = to_int(d["partition"], "partition");
  params.patterns = patterns_of(d);
  params.other_bytes = to_double(d["other_bytes"], "other_bytes");
  params.prefill_target = to_double(d["prefill_target"], "prefill_target");
  params.decode_target = to_double(d["decode_target"], "decode_target");
  params.machine = machine_of(d["machine"]);
  const Advice advice = advise(params);

  py::list costs;
  for (const Cost& cost : advice.costs) costs.append(dict_of(cost));
  py::dict out;
  out["costs"] = costs;
  out["prefill"] = dict_of(advice.prefill);
  out["decode"] = dict_of(advice.decode);
  out["memory"] = advice.memory;
  out["prefill_speed"] = advice.prefill_speed;
  out["decode_speed"] = advice.decode_speed;
  return out;
}

}  // namespace

void bind_advise(py::module_& m) {
  m.def("advise", &advise_bound, py::arg("params"));
  m.def("known_machines", [] {
    py::list machines;
    for (const Machine& machine : known_machines()) machines.append(dict_of(machine));
    return machines;
  });
  m.def(
      "machine_from_name",
      [](py::object name_) {
        const std::string name(to_string_view(name_, "machine"));
        Machine machine;
        {
          const py::gil_scoped_release release;
          machine = machine_from_name(name);
        }
        return dict_of(machine);
      },
      py::arg("name"));
}

}  // namespace heddle::python
