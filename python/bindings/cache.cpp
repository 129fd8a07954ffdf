// The paged KV cache and decode.
#include "cache.h"

#include <array>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "arguments.h"
#include "module.h"
#include "sampling.h"
#include "tensor.h"

#include "core/check.h"
#include "heddle/decode.h"
#include "heddle/error.h"

namespace heddle::python {
namespace {

std::unique_ptr<SharedCache> make_cache(py::object num_pages, py::object page_size, py::object num_kv_heads,
                                        py::object head_dim, py::object head_dim_v, py::object format,
                                        py::object device, py::object partition, py::object feature_major,
                                        py::object page_bounds) {
  CacheConfig config;
  config.num_pages = to_int(num_pages, "num_pages");
  config.page_size = to_int(page_size, "page_size");
  config.num_kv_heads = to_int(num_kv_heads, "num_kv_heads");
  config.head_dim = to_int(head_dim, "head_dim");
  if (!head_dim_v.is_none()) {
    config.head_dim_v = to_int(head_dim_v, "head_dim_v");
    check::at_least("head_dim_v", config.head_dim_v, 1);
  }
  config.format = cache_format_from_string(to_string_view(format, "format"));
  config.device = to_device(device);
  config.partition = to_int(partition, "partition");
  config.feature_major = to_bool(feature_major, "feature_major");
  config.page_bounds = to_bool(page_bounds, "page_bounds");
  return std::make_unique<SharedCache>(config);
}

std::unique_ptr<SharedCache> cache_over(py::object k_, py::object v_, py::object value_norms_, py::object saturation_,
                                        py::object k_scale_, py::object v_scale_, py::object q_scale_,
                                        py::object format, py::object partition) {
  const Array k = output_array(k_, "k"), v = output_array(v_, "v"),
              value_norms = output_array(value_norms_, "value_norms"),
              saturation = output_array(saturation_, "saturation"), k_scale = output_array(k_scale_, "k_scale"),
              v_scale = output_array(v_scale_, "v_scale"), q_scale = output_array(q_scale_, "q_scale");
  check::rank("k", k.view, 4);
  check::rank("v", v.view, 4);
  const CacheConfig config{.num_pages = k.view.shape[0],
                           .page_size = k.view.shape[2],
                           .num_kv_heads = k.view.shape[1],
                           .head_dim = k.view.shape[3],
                           .head_dim_v = v.view.shape[3],
                           .format = cache_format_from_string(to_string_view(format, "format")),
                           .partition = to_int(partition, "partition"),
                           .device = k.view.device};
  std::vector<std::shared_ptr<const void>> owners;
  for (const Array* part : {&k, &v, &value_norms, &saturation, &k_scale, &v_scale, &q_scale}) {
    owners.push_back(keep_alive(*part));
  }
  const CacheStorage storage{.k = k.view,
                             .v = v.view,
                             .k_scale = k_scale.view,
                             .v_scale = v_scale.view,
                             .q_scale = q_scale.view,
                             .value_norms = value_norms.view,
                             .saturation = saturation.view};
  return std::make_unique<SharedCache>(config, storage, std::move(owners));
}

py::object append(SharedCache& self, py::object k_, py::object v_, py::object block_table_, py::object start_,
                  py::object cu_seqlens_) {
  const Array k = array(k_, "k"), v = array(v_, "v");
  require_same_kind(v, "v", k, "k");
  const Array block_table = array(block_table_, "block_table"), start = array(start_, "start");
  const Array cu_seqlens = optional_array(cu_seqlens_, "cu_seqlens");
  check::device("k", k.view, self.cache.config().device, "the cache");
  check::rank("block_table", block_table.view, 2);
  const std::array<std::int64_t, 1> shape{block_table.view.shape[0]};
  const Array seq_lens = empty(shape, DType::kInt32, k);
  const Stream stream = current_stream(k);
  {
    const py::gil_scoped_release release;
    const std::unique_lock lock(self.mutex);
    self.cache.append(k.view, v.view, block_table.view, start.view, seq_lens.view, cu_seqlens.view, stream);
  }
  return seq_lens.object;
}

void calibrate(SharedCache& self, py::object k_, py::object v_, py::object q_) {
  const Array k = array(k_, "k"), v = array(v_, "v"), q = optional_array(q_, "q");
  const Stream stream = current_stream(k);
  const py::gil_scoped_release release;
  const std::unique_lock lock(self.mutex);
  self.cache.calibrate(k.view, v.view, q.view, stream);
}

SharedCache& to_cache(const py::object& cache) {
  if (!py::isinstance<SharedCache>(cache)) {
    check::fail(ErrorCode::kDType, "cache", check::text("got ", describe(cache), "; allowed is heddle.KVCache"));
  }
  return cache.cast<SharedCache&>();
}

// Calls `run` beside other readers; alone where it sets the scale of Q, as the first decode does.
template <class Run>
void read_cache(SharedCache& shared, const Run& run) {
  const py::gil_scoped_release release;
  std::shared_lock reading(shared.mutex);
  if (shared.cache.config().format != CacheFormat::kInt8Baseline || shared.cache.q_calibrated()) return run();
  reading.unlock();
  const std::unique_lock writing(shared.mutex);
  run();
}

py::object decode(py::object q_, py::object cache_, py::object block_table_, py::object seq_lens_, py::object causal,
                  py::object window, py::object softcap, py::object scale, py::object sinks_, py::object selection,
                  py::object sampling, py::object return_lse, py::object return_reads, py::object out_,
                  py::object backend, py::object schedule, py::object plan) {
  SharedCache& shared = to_cache(cache_);
  if (!plan.is_none() && !py::isinstance<DecodePlan>(plan)) {
    check::fail(ErrorCode::kDType, "plan",
                check::text("got ", describe(plan), "; allowed are None and what heddle.plan_decode makes"));
  }
  const CacheConfig& config = shared.cache.config();
  const Array q = array(q_, "q");
  const Array block_table = array(block_table_, "block_table"), seq_lens = array(seq_lens_, "seq_lens");
  const Array sinks = optional_array(sinks_, "sinks");
  Array out = output_array(out_, "out");
  require_same_kind(out, "out", q, "q");
  check::rank("q", q.view, 4);
  const auto& shape = q.view.shape;
  if (!out.given()) {
    out = empty(std::array{shape[0], shape[1], shape[2], config.head_dim_v}, q.view.dtype, q);
  }
  Array lse;
  if (to_bool(return_lse, "return_lse")) {
    lse = empty(std::array{shape[0], shape[2], shape[1]}, DType::kFloat32, q);
  }
  Array v_rows, k_features;
  if (to_bool(return_reads, "return_reads")) {
    if (sampling.is_none()) {
      check::fail(ErrorCode::kValue, "return_reads", "True without sampling; allowed is False");
    }
    v_rows = empty(std::array{shape[0], config.num_kv_heads}, DType::kInt64, q);
    k_features = empty(std::array{shape[0], config.num_kv_heads}, DType::kInt64, q);
  }
  const DecodeParams params{.q = q.view,
                            .cache = &shared.cache,
                            .block_table = block_table.view,
                            .seq_lens = seq_lens.view,
                            .out = out.view,
                            .lse = lse.view,
                            .causal = to_bool(causal, "causal"),
                            .window = to_window(window),
                            .softcap = to_float(softcap, "softcap"),
                            .scale = to_optional_float(scale, "scale"),
                            .sinks = sinks.view,
                            .selection = to_selection(selection),
                            .sampling = to_sampling(sampling),
                            .reads = {.v_rows = v_rows.view, .k_features = k_features.view},
                            .plan = plan.is_none() ? nullptr : &plan.cast<const DecodePlan&>(),
                            .backend = to_backend(backend),
                            .schedule = to_schedule(schedule),
                            .stream = current_stream(q)};

  read_cache(shared, [&] { heddle::decode(params); });
  if (!v_rows.given()) return lse.given() ? py::object(py::make_tuple(out.object, lse.object)) : out.object;
  const py::tuple reads = py::make_tuple(v_rows.object, k_features.object);
  if (lse.given()) return py::make_tuple(out.object, lse.object, reads);
  return py::make_tuple(out.object, reads);
}

// prefixes: a list of (block_table, seq_lens, cu_requests).
py::object decode_cascade(py::object q_, py::object cache_, py::object block_table_, py::object seq_lens_,
                          py::list prefixes_, py::object causal, py::object softcap, py::object scale,
                          py::object sinks_, py::object return_lse, py::object out_, py::object backend,
                          py::object schedule) {
  SharedCache& shared = to_cache(cache_);
  const CacheConfig& config = shared.cache.config();
  const Array q = array(q_, "q");
  const Array block_table = array(block_table_, "block_table"), seq_lens = array(seq_lens_, "seq_lens");
  const Array sinks = optional_array(sinks_, "sinks");
  std::vector<Array> arrays;  // keeps them
  std::vector<SharedPrefix> prefixes;
  for (const py::handle level : prefixes_) {
    const auto parts = py::reinterpret_borrow<py::tuple>(level);
    for (const py::handle part : parts) arrays.push_back(array(part, "prefixes"));
    const Array* last = &arrays.back();
    prefixes.push_back({.block_table = last[-2].view, .seq_lens = last[-1].view, .cu_requests = last->view});
  }
  Array out = output_array(out_, "out");
  require_same_kind(out, "out", q, "q");
  check::rank("q", q.view, 4);
  const auto& shape = q.view.shape;
  if (!out.given()) out = empty(std::array{shape[0], shape[1], shape[2], config.head_dim_v}, q.view.dtype, q);
  Array lse;
  if (to_bool(return_lse, "return_lse")) {
    lse = empty(std::array{shape[0], shape[2], shape[1]}, DType::kFloat32, q);
  }
  const DecodeParams params{.q = q.view,
                            .cache = &shared.cache,
                            .block_table = block_table.view,
                            .seq_lens = seq_lens.view,
                            .out = out.view,
                            .lse = lse.view,
                            .causal = to_bool(causal, "causal"),
                            .softcap = to_float(softcap, "softcap"),
                            .scale = to_optional_float(scale, "scale"),
                            .sinks = sinks.view,
                            .backend = to_backend(backend),
                            .schedule = to_schedule(schedule),
                            .stream = current_stream(q)};
  read_cache(shared, [&] { heddle::decode_cascade(params, prefixes); });
  return lse.given() ? py::object(py::make_tuple(out.object, lse.object)) : out.object;
}

py::object plan_decode(py::object q_, py::object cache_, py::object block_table_, py::object seq_lens_,
                       py::object causal, py::object window, py::object selection, py::object backend,
                       py::object schedule, py::object plan) {
  SharedCache& shared = to_cache(cache_);
  if (plan.is_none()) {
    plan = py::cast(DecodePlan());
  } else if (!py::isinstance<DecodePlan>(plan)) {
    check::fail(ErrorCode::kDType, "plan",
                check::text("got ", describe(plan), "; allowed are None and what heddle.plan_decode makes"));
  }
  const Array q = array(q_, "q"), block_table = array(block_table_, "block_table"),
              seq_lens = array(seq_lens_, "seq_lens");
  const DecodeParams params{.q = q.view,
                            .cache = &shared.cache,
                            .block_table = block_table.view,
                            .seq_lens = seq_lens.view,
                            .causal = to_bool(causal, "causal"),
                            .window = to_window(window),
                            .selection = to_selection(selection),
                            .backend = to_backend(backend),
                            .schedule = to_schedule(schedule),
                            .stream = current_stream(q)};
  auto& made = plan.cast<DecodePlan&>();
  {
    const py::gil_scoped_release release;
    const std::shared_lock reading(shared.mutex);
    heddle::plan_decode(params, made);
  }
  return plan;
}

// A view of the storage, or None where the format has no such part.
template <TensorView (KVCache::*Part)() const noexcept>
py::object storage(const py::object& self) {
  const TensorView view = (self.cast<const SharedCache&>().cache.*Part)();
  return view.given() ? view_of_memory(view, self) : py::none();
}

// A number that appends may be changing.
template <auto Number>
auto current(SharedCache& self) {
  const py::gil_scoped_release release;
  const std::shared_lock lock(self.mutex);
  return (self.cache.*Number)();
}

template <std::int64_t CacheConfig::* Member>
std::int64_t config_number(const SharedCache& self) {
  return self.cache.config().*Member;
}

std::string format_of(const SharedCache& self) { return std::string(to_string(self.cache.config().format)); }

std::string repr(const SharedCache& self) {
  const CacheConfig& c = self.cache.config();
  return check::text("KVCache(num_pages=", c.num_pages, ", page_size=", c.page_size, ", num_kv_heads=", c.num_kv_heads,
                     ", head_dim=", c.head_dim,
                     c.head_dim_v != c.head_dim ? check::text(", head_dim_v=", c.head_dim_v) : "", ", format='",
                     to_string(c.format), "'", c.partition > 1 ? check::text(", partition=", c.partition) : "",
                     c.feature_major ? ", feature_major=True" : "", c.page_bounds ? ", page_bounds=True" : "",
                     ", device='", heddle::to_string(c.device), "')");
}

}  // namespace

void bind_cache(py::module_& m) {
  py::class_<SharedCache>(m, "KVCache", R"(A paged cache of keys and values.

    KVCache(num_pages, page_size, num_kv_heads, head_dim, *, head_dim_v=None, format="bf16", device="cpu", partition=1,
            feature_major=False, page_bounds=False)

Pages of page_size tokens; token t of request b lies in page block_table[b, t // page_size], slot t % page_size. Requests
may share pages. format is one of

    fp32, bf16, fp16   K and V as named, q as given
    int8-baseline      K, V and q int8, one static scale each
    int8-a             K int8 with a scale for every `partition` tokens of a head, V int8 per tensor, q int8 per token
    int8-b             K and V int8 per tensor, q int8 per token
    fp8                K and V FP8 E4M3 per tensor, q as given

head_dim_v is the size of a value, head_dim unless given. `partition` must divide page_size. feature_major keeps the keys
by feature too, which Bernoulli scores need (heddle.Sampling), and takes K's memory a second time. page_bounds keeps what
heddle.select.pages ranks pages by. Calls from several threads are safe: appends run alone, decodes side by side.

device is "cpu", "cuda" or "cuda:<index>". A cache on a GPU takes tensors of that GPU, tables and lengths included, works on
the stream that is current, and waits for nothing, except where it calibrates: call calibrate() before a graph is captured.
Its parts (k, v, ...) are torch tensors where torch has been imported, else objects with __dlpack__.)")
      .def(py::init(&make_cache), py::arg("num_pages"), py::arg("page_size"), py::arg("num_kv_heads"),
           py::arg("head_dim"), py::kw_only(), py::arg("head_dim_v") = py::none(), py::arg("format") = "bf16",
           py::arg("device") = "cpu", py::arg("partition") = 1, py::arg("feature_major") = false,
           py::arg("page_bounds") = false)
      .def_static(
          "over", &cache_over, py::arg("k"), py::arg("v"), py::arg("value_norms"), py::arg("saturation"), py::kw_only(),
          py::arg("k_scale") = py::none(), py::arg("v_scale") = py::none(), py::arg("q_scale") = py::none(),
          py::arg("format") = "bf16", py::arg("partition") = 1,
          R"(over(k, v, value_norms, saturation, *, k_scale=None, v_scale=None, q_scale=None, format="bf16", partition=1)

A cache over the caller's memory, for engines that allocate by themselves: each part that the format has, as the property of
the same name describes it, contiguous, writable, and zeroed at first. What the arrays hold is the state of the cache, so
several objects over the same arrays are one cache; on a GPU its static scales count as calibrated.

HeddleValueError and HeddleTypeError for parts that do not fit.)")
      .def("append", &append, py::arg("k"), py::arg("v"), py::arg("block_table"), py::arg("start"), py::kw_only(),
           py::arg("cu_seqlens") = py::none(), R"(append(k, v, block_table, start, *, cu_seqlens=None) -> seq_lens

Writes request b's new tokens at positions start[b], start[b] + 1, ...

k [B, S, Hkv, D] and v [B, S, Hkv, Dv], or packed [total, Hkv, D] with cu_seqlens int32 [B + 1]; float32, float16 or bfloat16.
block_table int32 [B, max_pages], start int32 [B]. Returns seq_lens, int32 [B]: start[b] plus the new tokens, an array of the kind
of k. The first append calibrates the static scales of a quantized format, unless calibrate() did. A partition of
"int8-a" that is still open is quantized again when a token raises its maximum.

On a GPU the tables and lengths are not read by the host: tokens that have no page are not written, and NaN in quantized data
becomes the largest value. heddle.set_validation(True) checks them as on the CPU.

All or nothing: on HeddleValueError (a table that is too small or names pages outside the cache, NaN for a quantized
format, wrong shapes) and HeddleTypeError (dtypes) the cache is as it was.)")
      .def("calibrate", &calibrate, py::arg("k"), py::arg("v"), py::arg("q") = py::none(), R"(calibrate(k, v, q=None)

Sets the static scales from sample data, max|x| / 127 (448 for fp8): k, v and q float [B, S, H, D] or [total, H, D].
Values beyond a scale saturate and are counted. HeddleValueError once the cache holds tokens.)")
      .def_property_readonly(
          "k", &storage<&KVCache::k>,
          "The keys, [num_pages, Hkv, page_size, D]: an array that shares the cache's memory, numpy's on "
          "the CPU.")
      .def_property_readonly(
          "v", &storage<&KVCache::v>,
          "The values, [num_pages, Hkv, page_size, Dv]: an array that shares the cache's memory, numpy's on the CPU.")
      .def_property_readonly(
          "k_by_feature", &storage<&KVCache::k_by_feature>,
          "The keys by feature, [num_pages, Hkv, D, page_size], with feature_major, else None. Shares "
          "the cache's memory.")
      .def_property_readonly("k_scale", &storage<&KVCache::k_scale>,
                             "Scales of K: float32 [num_pages, Hkv, page_size / partition] for int8-a, [1] for the "
                             "other quantized formats, None for the rest. Shares the cache's memory.")
      .def_property_readonly("v_scale", &storage<&KVCache::v_scale>,
                             "The scale of V, float32 [1], or None. Shares the cache's memory.")
      .def_property_readonly("q_scale", &storage<&KVCache::q_scale>,
                             "The scale of q, float32 [1], for int8-baseline, else None. Shares the cache's memory.")
      .def_property_readonly("value_norms", &storage<&KVCache::value_norms>,
                             "The 2-norm of every value before quantization, float32 [num_pages, Hkv, page_size]. "
                             "Shares the cache's memory.")
      .def_property_readonly(
          "page_bounds", &storage<&KVCache::page_bounds>,
          "The element-wise maximum and minimum of each page's keys, [num_pages, Hkv, 2, D] in the dtype "
          "of k (int8-a: float32, scales applied), or None. Shares the cache's memory.")
      .def_property_readonly(
          "page_norms", &storage<&KVCache::page_norms>,
          "The largest value norm of each page, float32 [num_pages, Hkv], or None. Shares the cache's "
          "memory.")
      .def_property_readonly(
          "page_tokens", &storage<&KVCache::page_tokens>,
          "How many of a page's first tokens its bounds stand for, int32 [num_pages], or None. Shares "
          "the cache's memory.")
      .def_property_readonly("saturation", &storage<&KVCache::saturation>,
                             "The number `saturated` where it lies, int64 [1]. Shares the cache's memory.")
      .def_property_readonly("saturated", &current<&KVCache::saturated>,
                             "How many values a static scale has clamped. On a GPU, waits for it.")
      .def_property_readonly("kv_calibrated", &current<&KVCache::kv_calibrated>, "Whether K and V have their scales.")
      .def_property_readonly("q_calibrated", &current<&KVCache::q_calibrated>, "Whether q has its static scale.")
      .def_property_readonly("bytes_per_token", &current<&KVCache::bytes_per_token>,
                             "Bytes of K (twice with feature_major), V, their scales, the value norms and the page "
                             "bounds that a token takes, all heads.")
      .def_property_readonly("nbytes", &current<&KVCache::nbytes>, "Bytes of the whole cache.")
      .def_property_readonly("num_pages", &config_number<&CacheConfig::num_pages>)
      .def_property_readonly("page_size", &config_number<&CacheConfig::page_size>, "Tokens of a page.")
      .def_property_readonly("num_kv_heads", &config_number<&CacheConfig::num_kv_heads>)
      .def_property_readonly("head_dim", &config_number<&CacheConfig::head_dim>)
      .def_property_readonly("head_dim_v", &config_number<&CacheConfig::head_dim_v>)
      .def_property_readonly("partition", &config_number<&CacheConfig::partition>)
      .def_property_readonly("feature_major", [](const SharedCache& self) { return self.cache.config().feature_major; })
      .def_property_readonly("format", &format_of)
      .def_property_readonly("device",
                             [](const SharedCache& self) { return heddle::to_string(self.cache.config().device); })
      .def("__repr__", &repr);
  py::class_<DecodePlan>(m, "DecodePlan", "What heddle.plan_decode makes; the argument `plan` of heddle.decode.");
  m.def("decode", &decode);
  m.def("decode_cascade", &decode_cascade);
  m.def("plan_decode", &plan_decode);
}

}  // namespace heddle::python
