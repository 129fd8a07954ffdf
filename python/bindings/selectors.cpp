// Selections made at run time, for a call of attention or decode.
#include <mutex>
#include <shared_mutex>
#include <string>
#include <utility>

#include "arguments.h"
#include "cache.h"
#include "module.h"
#include "quantize.h"
#include "tensor.h"

#include "core/check.h"
#include "heddle/attention.h"
#include "heddle/decode.h"
#include "heddle/select.h"

namespace heddle::python {
namespace {

// The call that a selection is for: attention over arrays, or decode over a cache. Made from the tuple
// (q, k, v, block_table, seq_lens, causal, window, softcap, scale, sinks, cu_seqlens_q, cu_seqlens_k).
class Call {
 public:
  explicit Call(const py::tuple& arguments)
      : q_(operand(arguments[0], "q")),
        block_table_(optional_array(arguments[3], "block_table")),
        seq_lens_(optional_array(arguments[4], "seq_lens")),
        sinks_(optional_array(arguments[9], "sinks")),
        cu_seqlens_q_(optional_array(arguments[10], "cu_seqlens_q")),
        cu_seqlens_k_(optional_array(arguments[11], "cu_seqlens_k")) {
    const py::handle k = arguments[1], v = arguments[2];
    if (py::isinstance<SharedCache>(k)) {
      cache_ = &k.cast<SharedCache&>();
      const auto unused = [](bool given, const char* argument) {
        if (given) check::fail(ErrorCode::kValue, argument, "given with a cache; allowed is None");
      };
      unused(!v.is_none(), "v");
      unused(cu_seqlens_q_.given(), "cu_seqlens_q");
      unused(cu_seqlens_k_.given(), "cu_seqlens_k");
      if (q_.quantized()) check::fail(ErrorCode::kDType, "q", "quantized, with a cache; allowed are floats");
      decode_ = {.q = q_.array.view,
                 .cache = &cache_->cache,
                 .block_table = block_table_.view,
                 .seq_lens = seq_lens_.view,
                 .causal = to_bool(arguments[5], "causal"),
                 .window = to_window(arguments[6]),
                 .softcap = to_float(arguments[7], "softcap"),
                 .scale = to_optional_float(arguments[8], "scale"),
                 .sinks = sinks_.view};
      return;
    }
    for (const auto& [given, argument] :
         {std::pair(block_table_.given(), "block_table"), std::pair(seq_lens_.given(), "seq_lens")}) {
      if (given) check::fail(ErrorCode::kValue, argument, "given with arrays; allowed with a KVCache as k");
    }
    k_ = operand(k, "k");
    v_ = operand(v, "v");
    require_same_kind(k_.array, "k", q_.array, "q");
    require_same_kind(v_.array, "v", q_.array, "q");
    attention_ = {.q = q_.array.view,
                  .k = k_.array.view,
                  .v = v_.array.view,
                  .q_scales = q_.scales,
                  .k_scales = k_.scales,
                  .v_scales = v_.scales,
                  .causal = to_bool(arguments[5], "causal"),
                  .window = to_window(arguments[6]),
                  .softcap = to_float(arguments[7], "softcap"),
                  .scale = to_optional_float(arguments[8], "scale"),
                  .sinks = sinks_.view,
                  .cu_seqlens_q = cu_seqlens_q_.view,
                  .cu_seqlens_k = cu_seqlens_k_.view};
  }

  // select(call), without Python's lock and with the cache's.
  template <class Select>
  Selection make(Select&& select) {
    const py::gil_scoped_release release;
    if (cache_ == nullptr) return select(attention_);
    std::shared_lock reading(cache_->mutex);
    if (cache_->cache.config().format != CacheFormat::kInt8Baseline || cache_->cache.q_calibrated()) {
      return select(decode_);
    }
    reading.unlock();  // the first use of queries writes their scale
    const std::unique_lock writing(cache_->mutex);
    return select(decode_);
  }

 private:
  Operand q_, k_, v_;
  Array block_table_, seq_lens_, sinks_, cu_seqlens_q_, cu_seqlens_k_;
  SharedCache* cache_ = nullptr;
  AttentionParams attention_;
  DecodeParams decode_;
};

select::Budget to_budget(py::handle value, const char* argument = "budget") {
  if (value.is_none()) {
    check::fail(ErrorCode::kValue, argument, "not given; a count or a fraction is needed");
  }
  if (PyIndex_Check(value.ptr()) != 0) {
    const std::int64_t count = to_int(value, argument);
    if (count == 0)
      check::fail(ErrorCode::kValue, argument, "0; allowed are 1 and above, and fractions above 0 up to 1");
    return {.count = count};
  }
  const double fraction = to_double(value, argument);
  if (!(fraction > 0.0)) {
    check::fail(ErrorCode::kValue, argument,
                check::text(fraction, "; allowed are counts of 1 and above, and fractions above 0 up to 1"));
  }
  return {.fraction = fraction};
}

Selection topk(const py::tuple& call, py::object budget, py::object metric, py::object n_sink, py::object n_recent,
               py::object beta, py::object norm, py::object epsilon, py::object value_norms_, py::object output_) {
  const Array value_norms = optional_array(value_norms_, "value_norms"), output = optional_array(output_, "output");
  const select::TopkOptions options{.budget = to_budget(budget),
                                    .metric = select::metric_from_string(to_string_view(metric, "metric")),
                                    .n_sink = to_int(n_sink, "n_sink"),
                                    .n_recent = to_int(n_recent, "n_recent"),
                                    .beta = to_double(beta, "beta"),
                                    .norm = select::norm_from_string(to_string_view(norm, "norm")),
                                    .epsilon = to_double(epsilon, "epsilon"),
                                    .value_norms = value_norms.view,
                                    .output = output.view};
  return Call(call).make([&](const auto& params) { return select::topk(params, options); });
}

Selection pages(const py::tuple& call, py::object budget, py::object metric, py::object page_size, py::object n_sink,
                py::object n_recent, py::object beta, py::object norm, py::object epsilon) {
  select::PagesOptions options{.budget = to_budget(budget),
                               .metric = select::metric_from_string(to_string_view(metric, "metric")),
                               .n_sink = to_int(n_sink, "n_sink"),
                               .n_recent = to_int(n_recent, "n_recent"),
                               .beta = to_double(beta, "beta"),
                               .norm = select::norm_from_string(to_string_view(norm, "norm")),
                               .epsilon = to_double(epsilon, "epsilon")};
  if (!page_size.is_none()) {
    options.page_size = to_int(page_size, "page_size");
    check::at_least("page_size", options.page_size, 1);
  }
  return Call(call).make([&](const auto& params) { return select::pages(params, options); });
}

Selection stem(const py::tuple& call, py::object budget, py::object block, py::object stride, py::object decay,
               py::object prompt_len, py::object n_first, py::object n_last, py::object beta, py::object norm,
               py::object epsilon, py::object value_norms_) {
  const Array value_norms = optional_array(value_norms_, "value_norms");
  select::StemOptions options{.block = to_int(block, "block"),
                              .stride = to_int(stride, "stride"),
                              .decay = to_double(decay, "decay"),
                              .n_first = to_int(n_first, "n_first"),
                              .n_last = to_int(n_last, "n_last"),
                              .beta = to_double(beta, "beta"),
                              .norm = select::norm_from_string(to_string_view(norm, "norm")),
                              .epsilon = to_double(epsilon, "epsilon"),
                              .value_norms = value_norms.view};
  if (!budget.is_none()) options.budget = to_budget(budget);
  if (!prompt_len.is_none()) {
    options.prompt_len = to_int(prompt_len, "prompt_len");
    check::at_least("prompt_len", options.prompt_len, 1);
  }
  return Call(call).make([&](const auto& params) { return select::stem(params, options); });
}

Selection block_topk(const py::tuple& call, py::object budget, py::object block, py::object n_first,
                     py::object n_last) {
  const select::BlockTopkOptions options{.budget = to_budget(budget),
                                         .block = to_int(block, "block"),
                                         .n_first = to_int(n_first, "n_first"),
                                         .n_last = to_int(n_last, "n_last")};
  return Call(call).make([&](const auto& params) { return select::block_topk(params, options); });
}

Selection xattention(const py::tuple& call, py::object threshold, py::object block, py::object stride,
                     py::object n_first, py::object n_last) {
  const select::XAttentionOptions options{.threshold = to_double(threshold, "threshold"),
                                          .block = to_int(block, "block"),
                                          .stride = to_int(stride, "stride"),
                                          .n_first = to_int(n_first, "n_first"),
                                          .n_last = to_int(n_last, "n_last")};
  return Call(call).make([&](const auto& params) { return select::xattention(params, options); });
}

Selection vertical_slash(const py::tuple& call, py::object vertical, py::object slash, py::object n_queries,
                         py::object block, py::object n_first, py::object n_last) {
  const select::VerticalSlashOptions options{.vertical = to_budget(vertical, "vertical"),
                                             .slash = to_budget(slash, "slash"),
                                             .n_queries = to_int(n_queries, "n_queries"),
                                             .block = to_int(block, "block"),
                                             .n_first = to_int(n_first, "n_first"),
                                             .n_last = to_int(n_last, "n_last")};
  return Call(call).make([&](const auto& params) { return select::vertical_slash(params, options); });
}

Selection indexer(const py::tuple& call, py::object weights_, py::object budget, py::object n_sink,
                  py::object n_recent) {
  const Array weights = array(weights_, "weights");
  const select::IndexerOptions options{.budget = to_budget(budget),
                                       .weights = weights.view,
                                       .n_sink = to_int(n_sink, "n_sink"),
                                       .n_recent = to_int(n_recent, "n_recent")};
  return Call(call).make([&](const auto& params) { return select::indexer(params, options); });
}

Selection top_scores(py::object scores_, py::object budget, py::object n_sink, py::object n_recent,
                     py::object lengths_) {
  const Array scores = array(scores_, "scores"), lengths = optional_array(lengths_, "lengths");
  const select::ScoreOptions options{.budget = to_budget(budget),
                                     .n_sink = to_int(n_sink, "n_sink"),
                                     .n_recent = to_int(n_recent, "n_recent"),
                                     .lengths = lengths.view};
  const py::gil_scoped_release release;
  return select::top_scores(scores.view, options);
}

}  // namespace

void bind_selectors(py::module_& m) {
  m.def("select_topk", &topk);
  m.def("select_pages", &pages);
  m.def("select_stem", &stem);
  m.def("select_block_topk", &block_topk);
  m.def("select_xattention", &xattention);
  m.def("select_vertical_slash", &vertical_slash);
  m.def("select_indexer", &indexer);
  m.def("select_top_scores", &top_scores);
}

}  // namespace heddle::python
