// The front ends of attention() and decode(): check everything, describe the call as a Problem, hand it to a backend.
#include "heddle/attention.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <span>
#include <utility>
#include <vector>

#include "core/check.h"
#include "core/dispatch.h"
#include "core/front.h"
#include "core/integers.h"
#include "core/readable.h"
#include "core/sampling.h"
#include "core/threads.h"
#include "heddle/decode.h"
#include "select/visibility.h"
#include "store/memory.h"

namespace heddle {
namespace {

constexpr std::initializer_list<DType> kFloats = {DType::kFloat32, DType::kFloat16, DType::kBFloat16, DType::kFloat64};
constexpr std::initializer_list<DType> kFloatsAndInt8 = {DType::kFloat32, DType::kFloat16, DType::kBFloat16,
                                                         DType::kFloat64, DType::kInt8};
constexpr std::initializer_list<DType> kElements = {DType::kFloat32, DType::kFloat16, DType::kBFloat16,
                                                    DType::kFloat64, DType::kInt8,    DType::kFloat8E4M3};

bool is_quantized(DType dtype) { return dtype == DType::kInt8 || dtype == DType::kFloat8E4M3; }
bool on_cpu(const Problem& problem) { return problem.device.type == DeviceType::kCpu; }

void check_data(std::string_view argument, const TensorView& view, int rank, std::initializer_list<DType> dtypes,
                Device device, std::string_view owner) {
  check::given(argument, view);
  check::rank(argument, view, rank);
  check::dtype(argument, view, dtypes);
  check::device(argument, view, device, owner);
  check::contiguous_rows(argument, view);
}

void check_heads(std::int64_t num_q_heads, std::int64_t num_kv_heads) {
  if (num_q_heads % num_kv_heads != 0) {
    check::fail(ErrorCode::kShape, "q",
                check::text(num_q_heads, " heads; allowed are multiples of the ", num_kv_heads, " heads of k and v"));
  }
}

// [B, S, H, D] or packed [total, H, D].
Rows rows_of(const TensorView& x) {
  const auto size = static_cast<std::int64_t>(size_of(x.dtype));
  const int slot = x.rank - 3;
  return {.data = x.as<std::byte>(),
          .dtype = x.dtype,
          .dim = x.shape[x.rank - 1],
          .page_stride = x.rank == 4 ? x.strides[0] * size : 0,
          .head_stride = x.strides[slot + 1] * size,
          .slot_stride = x.strides[slot] * size};
}

void check_not_negative(const std::string& name, float scale) {
  if (scale < 0.0f) check::fail(ErrorCode::kValue, name, check::text(scale, "; allowed are 0 and above"));
}

// The scales of a quantized q, k or v; `name` is "k_scales".
void set_scales(std::string_view x_name, std::string_view name, const TensorView& x, const QuantScales& scales,
                Rows& rows) {
  if (!is_quantized(x.dtype)) {
    if (scales.scale.given() || scales.mean.given()) {
      check::fail(
          ErrorCode::kValue, name,
          check::text("given for ", x_name, " of dtype ", to_string(x.dtype), "; allowed with int8 and float8_e4m3"));
    }
    return;
  }
  const std::string scale_name = check::text(name, ".scale"), mean_name = check::text(name, ".mean");
  const TensorView& scale = scales.scale;
  check::at_least(check::text(name, ".partition"), scales.partition, 0);
  check::given(scale_name, scale);
  check::dtype(scale_name, scale, {DType::kFloat32});
  check::device(scale_name, scale, x.device, x_name);
  const int slot = x.rank - 3;
  if (scales.partition == 0) {
    check::shape(scale_name, scale, {1});
    if (x.device.type == DeviceType::kCpu) {
      check::finite(scale_name, *scale.as<const float>());
      check_not_negative(scale_name, *scale.as<const float>());
    }
  } else {
    const std::int64_t groups = ceil_div(x.shape[slot], scales.partition), heads = x.shape[slot + 1];
    if (x.rank == 4) {
      check::shape(scale_name, scale, {x.shape[0], groups, heads});
    } else {
      check::shape(scale_name, scale, {groups, heads});
    }
    rows.partition = scales.partition;
    rows.scale_page_stride = x.rank == 4 ? scale.strides[0] : 0;
    rows.scale_group_stride = scale.strides[slot];
    rows.scale_head_stride = scale.strides[slot + 1];
    // Scales of queries multiply their rows' maxima.
    const std::int64_t pages = x.rank == 4 ? x.shape[0] : 1;
    for (std::int64_t i = 0; x.device.type == DeviceType::kCpu && x_name == "q" && i < pages * groups; ++i) {
      const float* row =
          scale.as<const float>() + i / groups * rows.scale_page_stride + i % groups * rows.scale_group_stride;
      for (std::int64_t h = 0; h < heads; ++h) check_not_negative(scale_name, row[h * rows.scale_head_stride]);
    }
  }
  rows.scale = scale.as<const float>();
  if (const TensorView& mean = scales.mean; mean.given()) {
    check::given(mean_name, mean);
    check::dtype(mean_name, mean, {DType::kFloat32});
    check::device(mean_name, mean, x.device, x_name);
    check::contiguous_rows(mean_name, mean);
    if (x.rank == 4) {
      check::shape(mean_name, mean, {x.shape[0], x.shape[2], x.shape[3]});
    } else {
      check::shape(mean_name, mean, {x.shape[1], x.shape[2]});
    }
    rows.mean = mean.as<const float>();
    rows.mean_page_stride = x.rank == 4 ? mean.strides[0] : 0;
    rows.mean_head_stride = mean.strides[x.rank - 3];
  }
}

// out and lse. The reference also writes wider types than the inputs', so that it can be an oracle for them.
void set_outputs(const TensorView& q, std::int64_t head_dim_v, const TensorView& out, const TensorView& lse,
                 Backend backend, Problem& problem) {
  const DType own = is_quantized(q.dtype) ? DType::kFloat32 : q.dtype;
  const bool oracle = backend == Backend::kReference;
  check::given("out", out);
  if (oracle) {
    check::dtype("out", out, {own, DType::kFloat32, DType::kFloat64});
  } else {
    check::dtype("out", out, {own});
  }
  check::device("out", out, q.device, "q");
  if (q.rank == 4) {
    check::shape("out", out, {q.shape[0], q.shape[1], q.shape[2], head_dim_v});
  } else {
    check::shape("out", out, {q.shape[0], q.shape[1], head_dim_v});
  }
  check::contiguous_rows("out", out);
  check::writable("out", out);
  problem.out = rows_of(out);
  if (!lse.given()) return;

  check::given("lse", lse);
  if (oracle) {
    check::dtype("lse", lse, {DType::kFloat32, DType::kFloat64});
  } else {
    check::dtype("lse", lse, {DType::kFloat32});
  }
  check::device("lse", lse, q.device, "q");
  if (q.rank == 4) {
    check::shape("lse", lse, {q.shape[0], q.shape[2], q.shape[1]});
  } else {
    check::shape("lse", lse, {q.shape[1], q.shape[0]});
  }
  check::contiguous_rows("lse", lse);
  check::writable("lse", lse);
  problem.lse = lse.data;
  problem.lse_dtype = lse.dtype;
  problem.lse_page_stride = q.rank == 4 ? lse.strides[0] : 0;
  problem.lse_head_stride = lse.strides[lse.rank - 2];
  problem.lse_slot_stride = lse.strides[lse.rank - 1];
}

// Selectors read what they are given.
void check_selects_here(const Problem& problem) {
  if (!on_cpu(problem)) {
    check::fail(ErrorCode::kUnsupported, "q",
                check::text("on ", to_string(problem.device), "; selections are made at run time on cpu alone"));
  }
}

// What AttentionParams and DecodeParams share; problem.q and the numbers of heads are set.
template <class Params>
void set_options(const Params& params, Problem& problem) {
  problem.causal = params.causal;
  if (params.window) {
    // Farther than any key is as good as unbounded, and keeps positions from overflowing.
    constexpr std::int64_t kFar = std::int64_t{1} << 40;
    if (params.window->left) {
      check::at_least("window", *params.window->left, 0, "left");
      problem.window.left = std::min(*params.window->left, kFar);
    }
    if (params.window->right) {
      check::at_least("window", *params.window->right, 0, "right");
      problem.window.right = std::min(*params.window->right, kFar);
    }
  }
  check::finite("softcap", params.softcap);
  if (params.softcap < 0.0) {
    check::fail(ErrorCode::kValue, "softcap", check::text(params.softcap, "; allowed are 0 (none) and above"));
  }
  problem.softcap = params.softcap;
  problem.scale = params.scale.value_or(1.0 / std::sqrt(static_cast<double>(problem.q.dim)));
  check::finite("scale", problem.scale);
  check::at_least("schedule", params.schedule.split_size, 0, "split_size");
  if (const TensorView& sinks = params.sinks; sinks.given()) {
    check::given("sinks", sinks);
    check::dtype("sinks", sinks, {DType::kFloat32});
    check::device("sinks", sinks, problem.device, "q");
    check::shape("sinks", sinks, {problem.num_q_heads});
    check::contiguous_rows("sinks", sinks);
    problem.sinks = sinks.as<const float>();
    for (std::int64_t h = 0; on_cpu(problem) && h < problem.num_q_heads; ++h) {
      if (!(problem.sinks[h] < std::numeric_limits<float>::infinity())) {
        check::fail(ErrorCode::kValue, "sinks",
                    check::text(problem.sinks[h], " for head ", h, "; allowed are finite numbers and -inf"));
      }
    }
  }
  problem.selection = &params.selection;
  problem.schedule = params.schedule;
  problem.stream = params.stream;
}

void check_at_most(std::string_view argument, const TensorView& view, int axis, std::string_view name,
                   std::int64_t tokens, std::int64_t block) {
  const std::int64_t most = ceil_div(tokens, block);
  if (view.shape[axis] <= most) return;
  check::fail(ErrorCode::kShape, argument,
              check::text("axis ", axis, " (", name, ") is ", view.shape[axis], "; allowed are at most ", most,
                          ", for ", tokens, " tokens in blocks of ", block));
}

// mask [nQ, nK], [H, nQ, nK] or [B, H, nQ, nK].
void check_block_mask(const select::BlockMask& selection, const Problem& problem) {
  const TensorView& mask = selection.mask;
  check::given("mask", mask);
  check::rank("mask", mask, {2, 3, 4});
  check::dtype("mask", mask, {DType::kBool});
  check::device("mask", mask, problem.device, "q");
  check::at_least("block", selection.block_q, 1, "the number of queries");
  check::at_least("block", selection.block_k, 1, "the number of keys");
  const int row_axis = mask.rank - 2;
  if (problem.requests.empty() && problem.on_device.size > 0) {
    // The longest request is not known here; what the shapes allow is.
    check_at_most("mask", mask, row_axis, "query blocks", problem.on_device.max_q_len, selection.block_q);
    check_at_most("mask", mask, row_axis + 1, "key blocks", problem.on_device.max_kv_len, selection.block_k);
  } else {
    std::int64_t q_len = 0, kv_len = 0;
    for (const Request& request : problem.requests) {
      q_len = std::max(q_len, request.q_len);
      kv_len = std::max(kv_len, request.kv_len);
    }
    check::axis("mask", mask, row_axis, "query blocks", ceil_div(q_len, selection.block_q),
                check::text("for ", q_len, " queries in blocks of ", selection.block_q));
    check::axis("mask", mask, row_axis + 1, "key blocks", ceil_div(kv_len, selection.block_k),
                check::text("for ", kv_len, " keys in blocks of ", selection.block_k));
  }
  if (mask.rank >= 3) {
    const std::int64_t heads = mask.shape[row_axis - 1];
    if (heads != 1 && heads != problem.num_kv_heads && heads != problem.num_q_heads) {
      check::fail(ErrorCode::kShape, "mask",
                  check::text("axis ", row_axis - 1, " (heads) is ", heads, "; allowed are 1, ", problem.num_kv_heads,
                              " (KV heads) and ", problem.num_q_heads, " (query heads)"));
    }
  }
  if (mask.rank == 4 && mask.shape[0] != 1) {
    check::axis("mask", mask, 0, "batch", problem.batch(), "the requests (or 1)");
  }
}

// One list: ascending in [0, kv_len), -1 only at its end.
// `place` says where it is, for the message.
template <class Place>
void check_token_list(const std::int32_t* list, std::int64_t capacity, const std::int32_t* length, std::int64_t kv_len,
                      const Place& place, std::string_view what = "token") {
  if (length != nullptr && (*length < 0 || *length > capacity)) {
    check::fail(ErrorCode::kValue, "lengths",
                check::text(*length, " for ", place(), "; allowed are 0 to ", capacity, ", the last axis of indices"));
  }
  std::int64_t n = length != nullptr ? *length : capacity;
  if (length == nullptr) {
    while (n > 0 && list[n - 1] == -1) --n;
  }
  if (n == 0) return;
  std::int32_t bad = list[0] < 0 || list[n - 1] >= kv_len ? 1 : 0;
  for (std::int64_t i = 1; i < n; ++i) bad |= list[i] <= list[i - 1] ? 1 : 0;
  if (bad == 0) return;
  std::int64_t previous = -1;
  for (std::int64_t i = 0; i < n; ++i) {
    if (list[i] < 0 || list[i] >= kv_len) {
      check::fail(ErrorCode::kValue, "indices",
                  check::text(what, " ", list[i], " at ", i, " of ", place(), "; allowed are 0 to ", kv_len - 1,
                              list[i] == -1 ? " (-1 pads only at the end)" : ""));
    }
    if (list[i] <= previous) {
      check::fail(ErrorCode::kValue, "indices",
                  check::text(what, " ", list[i], " at ", i, " of ", place(), " follows ", previous,
                              "; allowed are ascending lists without repeats"));
    }
    previous = list[i];
  }
}

// indices [B, Hkv, n], [B, Sq, Hkv, n], or [total_q, Hkv, n] in a packed batch; 1 in place of Hkv: for all heads.
void check_tokens(const select::Tokens& selection, const Problem& problem, std::int64_t num_tokens) {
  const TensorView& indices = selection.indices;
  const TensorView& lengths = selection.lengths;
  check::index_array("indices", indices, problem.device, "q");
  check::rank("indices", indices, problem.packed ? std::initializer_list<int>{3} : std::initializer_list<int>{3, 4});
  const std::int64_t batch = problem.batch();
  const bool per_query = token_lists_per_query(problem);
  const int head_axis = indices.rank - 2;
  if (indices.rank == 4) {
    check::axis("indices", indices, 0, "batch", batch, "the requests");
    check::axis("indices", indices, 1, "queries", num_tokens, "the queries of a request");
  } else if (per_query) {
    check::axis("indices", indices, 0, "queries", num_tokens,
                check::text("all queries (or ", batch, ", the requests)"));
  } else {
    check::axis("indices", indices, 0, "batch", batch, "the requests");
  }
  if (indices.shape[head_axis] != 1) {
    check::axis("indices", indices, head_axis, "heads", problem.num_kv_heads, "the KV heads (or 1: all alike)");
  }
  const std::int64_t capacity = indices.shape[head_axis + 1], heads = indices.shape[head_axis];
  if (lengths.given()) {
    check::given("lengths", lengths);
    check::dtype("lengths", lengths, {DType::kInt32});
    check::device("lengths", lengths, problem.device, "q");
    if (indices.rank == 4) {
      check::shape("lengths", lengths, {indices.shape[0], indices.shape[1], indices.shape[2]});
    } else {
      check::shape("lengths", lengths, {indices.shape[0], indices.shape[1]});
    }
  }
  const Readable list_entries(indices, problem.stream), list_lengths(lengths, problem.stream);
  if (!list_entries.readable()) return;
  for (std::int64_t b = 0; b < batch; ++b) {
    const Request& request = problem.requests[b];
    const std::int64_t lists = per_query ? request.q_len : 1;
    for_ranges(lists * heads, lists * heads * capacity, [&](std::int64_t first, std::int64_t last) {
      for (std::int64_t n = first; n < last; ++n) {
        const std::int64_t i = n / heads, h = n % heads;
        const auto offset = [&](const TensorView& t) {
          if (indices.rank == 4) return b * t.strides[0] + i * t.strides[1] + h * t.strides[2];
          return (per_query ? request.q_first + i : b) * t.strides[0] + h * t.strides[1];
        };
        const std::int32_t* length = lengths.given() ? list_lengths.data() + offset(list_lengths.view()) : nullptr;
        const auto place = [&] {
          return per_query ? check::text("request ", b, ", query ", i, ", KV head ", h)
                           : check::text("request ", b, ", KV head ", h);
        };
        check_token_list(list_entries.data() + offset(list_entries.view()), capacity, length, request.kv_len, place);
      }
    });
  }
}

// Checks a page list. On the CPU, where the requests are known, makes it the token lists that it stands for, 4 bytes
// beside the hundreds that each token's key and value take; kernels of a device read it as it is.
void expand_pages(Problem& problem) {
  const auto* sel = std::get_if<select::PageList>(&problem.selection->kind());
  if (sel == nullptr) return;
  const TensorView &indices = sel->indices, &lengths = sel->lengths;
  check::index_array("indices", indices, problem.device, "q");
  check::rank("indices", indices, 3);
  check::axis("indices", indices, 0, "batch", problem.batch(), "the requests");
  if (indices.shape[1] != 1) {
    check::axis("indices", indices, 1, "heads", problem.num_kv_heads, "the KV heads (or 1: all alike)");
  }
  const std::int64_t heads = indices.shape[1], capacity = indices.shape[2], page = problem.page_size;
  if (lengths.given()) {
    check::given("lengths", lengths);
    check::dtype("lengths", lengths, {DType::kInt32});
    check::device("lengths", lengths, problem.device, "q");
    check::shape("lengths", lengths, {indices.shape[0], heads});
  }
  const Readable list_entries(indices, problem.stream), list_lengths(lengths, problem.stream);
  if (!list_entries.readable()) return;
  const auto at = [](const TensorView& t, std::int64_t b, std::int64_t h) {
    return t.as<const std::int32_t>() + b * t.strides[0] + h * t.strides[1];
  };
  // Of each list, its pages and their tokens: only a request's last page may be short.
  std::vector<std::span<const std::int32_t>> lists;
  std::vector<std::int64_t> counts;
  std::int64_t most = 0;
  for (std::int64_t b = 0; b < problem.batch(); ++b) {
    const std::int64_t kv_len = problem.requests[b].kv_len;
    for (std::int64_t h = 0; h < heads; ++h) {
      const std::int32_t* list = at(list_entries.view(), b, h);
      const std::int32_t* length = lengths.given() ? at(list_lengths.view(), b, h) : nullptr;
      const auto place = [&] { return check::text("request ", b, ", KV head ", h); };
      check_token_list(list, capacity, length, ceil_div(kv_len, page), place, "page");
      const std::int32_t* end =
          length != nullptr ? list + *length
                            : std::partition_point(list, list + capacity, [](std::int32_t p) { return p >= 0; });
      lists.emplace_back(list, end);
      const auto pages = static_cast<std::int64_t>(lists.back().size());
      counts.push_back(pages == 0 ? 0 : (pages - 1) * page + std::min(page, kv_len - end[-1] * page));
      most = std::max(most, counts.back());
    }
  }
  if (!on_cpu(problem)) return;
  const std::int64_t rows = static_cast<std::int64_t>(lists.size());
  auto memory = std::make_shared_for_overwrite<std::int32_t[]>(static_cast<std::size_t>(rows * (most + 1) + 1));
  std::int32_t *const token_lengths = memory.get(), *const tokens = token_lengths + rows;
  for_ranges(rows, rows * most, [&](std::int64_t first, std::int64_t last) {
    for (std::int64_t row = first; row < last; ++row) {
      const std::int64_t count = counts[static_cast<std::size_t>(row)];
      token_lengths[row] = static_cast<std::int32_t>(count);
      std::int32_t* out = tokens + row * most;
      std::int32_t* const end = out + count;
      for (const std::int32_t p : lists[static_cast<std::size_t>(row)]) {
        auto token = static_cast<std::int32_t>(p * page);
        for (std::int64_t i = 0; i < page && out < end; ++i) *out++ = token++;
      }
    }
  });
  problem.listed_pages = std::make_shared<const Selection>(
      Selection::tokens(TensorView(tokens, DType::kInt32, {problem.batch(), heads, most}),
                        TensorView(token_lengths, DType::kInt32, {problem.batch(), heads}), memory));
  problem.selection = problem.listed_pages.get();
}

// The requests are known, or as much of them as the host can. num_tokens: Sq, or all queries of a packed batch. Windows
// and strides were checked when the selection was made.
void check_selection(const Problem& problem, std::int64_t num_tokens) {
  if (problem.listed_pages != nullptr) return;  // checked as pages
  if (std::holds_alternative<select::PageList>(problem.selection->kind())) {
    if (problem.page_size > 0) return;
    check::fail(ErrorCode::kUnsupported, "selection", "a page list in attention; allowed is decode over a paged cache");
  }
  if (const auto* mask = std::get_if<select::BlockMask>(&problem.selection->kind())) check_block_mask(*mask, problem);
  if (const auto* tokens = std::get_if<select::Tokens>(&problem.selection->kind())) {
    check_tokens(*tokens, problem, num_tokens);
  }
}

}  // namespace

Problem problem_of(const AttentionParams& params, bool outputs) {
  const TensorView &q = params.q, &k = params.k, &v = params.v;
  Problem problem;
  problem.packed = params.cu_seqlens_q.given() || params.cu_seqlens_k.given();
  const int rank = problem.packed ? 3 : 4, heads = rank - 2, dim = rank - 1;

  check_data("q", q, rank, kFloatsAndInt8, q.device, "q");
  check_data("k", k, rank, kElements, q.device, "q");
  check_data("v", v, rank, kElements, q.device, "q");
  problem.device = q.device;
  if (q.dtype == DType::kInt8) check::dtype("k", k, {DType::kInt8});
  if (!is_quantized(q.dtype) && !is_quantized(k.dtype)) check::dtype("k", k, {q.dtype});
  for (const DType other : {q.dtype, k.dtype}) {
    if (!is_quantized(other) && !is_quantized(v.dtype)) check::dtype("v", v, {other});
  }
  check::axis_not_empty("q", q, heads, "heads");
  check::axis_not_empty("k", k, heads, "heads");
  check::axis_not_empty("q", q, dim, "head_dim");
  check::axis_not_empty("v", v, dim, "head_dim_v");
  check::axis("k", k, dim, "head_dim", q.shape[dim], "as in q");
  if (!problem.packed) check::axis("k", k, 0, "batch", q.shape[0], "as in q");
  if (!problem.packed) check::axis("v", v, 0, "batch", q.shape[0], "as in q");
  check::axis("v", v, rank - 3, "keys", k.shape[rank - 3], "as in k");
  check::axis("v", v, heads, "heads", k.shape[heads], "as in k");
  check_heads(q.shape[heads], k.shape[heads]);
  problem.num_q_heads = q.shape[heads];
  problem.num_kv_heads = k.shape[heads];

  problem.q = rows_of(q);
  problem.k = rows_of(k);
  problem.v = rows_of(v);
  set_scales("q", "q_scales", q, params.q_scales, problem.q);
  set_scales("k", "k_scales", k, params.k_scales, problem.k);
  set_scales("v", "v_scales", v, params.v_scales, problem.v);
  if (!outputs) check_selects_here(problem);
  if (outputs) set_outputs(q, v.shape[dim], params.out, params.lse, params.backend, problem);
  set_options(params, problem);

  if (problem.packed) {
    const TensorView &cu_q = params.cu_seqlens_q, &cu_k = params.cu_seqlens_k;
    for (const auto& [name, view] : {std::pair("cu_seqlens_q", &cu_q), std::pair("cu_seqlens_k", &cu_k)}) {
      check::index_array(name, *view, q.device, "q");
      check::rank(name, *view, 1);
      check::axis_not_empty(name, *view, 0, "requests + 1");
    }
    check::axis("cu_seqlens_k", cu_k, 0, "requests + 1", cu_q.shape[0], "as in cu_seqlens_q");
    if (!on_cpu(problem)) {
      problem.on_device = {.size = cu_q.shape[0] - 1,
                           .max_q_len = q.shape[0],
                           .max_kv_len = k.shape[0],
                           .cu_seqlens_q = cu_q.as<const std::int32_t>(),
                           .cu_seqlens_k = cu_k.as<const std::int32_t>()};
    }
    if (const Readable at_q(cu_q, params.stream), at_k(cu_k, params.stream); at_q.readable()) {
      check::cu_seqlens("cu_seqlens_q", at_q.view(), q.shape[0], "q");
      check::cu_seqlens("cu_seqlens_k", at_k.view(), k.shape[0], "k");
      for (std::int64_t b = 0; b + 1 < cu_q.shape[0]; ++b) {
        problem.requests.push_back({.q_len = at_q.data()[b + 1] - at_q.data()[b],
                                    .kv_len = at_k.data()[b + 1] - at_k.data()[b],
                                    .q_first = at_q.data()[b],
                                    .k_first = at_k.data()[b]});
      }
    }
  } else {
    for (std::int64_t b = 0; b < q.shape[0]; ++b) {
      problem.requests.push_back({.q_len = q.shape[1], .kv_len = k.shape[1], .q_page = b, .k_page = b});
    }
  }
  check_selection(problem, problem.packed ? q.shape[0] : q.shape[1]);
  if (problem.on_device.size > 0) problem.requests.clear();  // read for the checks alone
  return problem;
}

Problem problem_of(const DecodeParams& params, bool outputs) {
  const TensorView &q = params.q, &table = params.block_table, &seq_lens = params.seq_lens;
  if (params.cache == nullptr) check::fail(ErrorCode::kValue, "cache", "not given; a KVCache is needed");
  KVCache& cache = *params.cache;
  const CacheConfig& config = cache.config();
  Problem problem;

  check_data("q", q, 4, kFloats, config.device, "cache");
  problem.device = q.device;
  check::axis_not_empty("q", q, 2, "heads");
  check::axis("q", q, 3, "head_dim", config.head_dim, "as in cache");
  check_heads(q.shape[2], config.num_kv_heads);
  problem.num_q_heads = q.shape[2];
  problem.num_kv_heads = config.num_kv_heads;
  problem.page_size = config.page_size;

  // A cache keeps the tokens of a page head by head: [num_pages, Hkv, page_size, D].
  const auto paged_rows = [](const TensorView& x) {
    Rows rows = rows_of(x);
    std::swap(rows.head_stride, rows.slot_stride);
    return rows;
  };
  problem.q = rows_of(q);
  problem.k = paged_rows(cache.k());
  problem.v = paged_rows(cache.v());
  if (const TensorView scale = cache.k_scale(); scale.given()) {
    problem.k.scale = scale.as<const float>();
    if (config.format == CacheFormat::kInt8A) {
      problem.k.partition = config.partition;
      problem.k.scale_page_stride = scale.strides[0];
      problem.k.scale_head_stride = scale.strides[1];
      problem.k.scale_group_stride = scale.strides[2];
    }
  }
  problem.v.scale = cache.v_scale().as<const float>();
  if (!outputs) check_selects_here(problem);
  if (outputs) set_outputs(q, problem.v.dim, params.out, params.lse, params.backend, problem);
  set_options(params, problem);

  check::index_array("block_table", table, q.device, "q");
  check::rank("block_table", table, 2);
  check::axis("block_table", table, 0, "batch", q.shape[0], "as in q");
  check::index_array("seq_lens", seq_lens, q.device, "q");
  check::shape("seq_lens", seq_lens, {q.shape[0]});
  if (!on_cpu(problem)) {
    problem.on_device = {.size = q.shape[0],
                         .max_q_len = q.shape[1],
                         .max_kv_len = table.shape[1] * config.page_size,
                         .seq_lens = seq_lens.as<const std::int32_t>(),
                         .block_table = table.as<const std::int32_t>(),
                         .table_stride = table.strides[0],
                         .num_pages = config.num_pages};
  }
  const Readable lengths(seq_lens, params.stream), pages(table, params.stream);
  for (std::int64_t b = 0; lengths.readable() && b < q.shape[0]; ++b) {
    const std::int64_t tokens = lengths.data()[b];
    const std::int64_t capacity = table.shape[1] * config.page_size;
    if (tokens < 0 || tokens > capacity) {
      check::fail(tokens < 0 ? ErrorCode::kValue : ErrorCode::kCapacity, "seq_lens",
                  check::text(tokens, " for request ", b, "; allowed are 0 to ", capacity, ", the tokens of ",
                              table.shape[1], " pages of block_table"));
    }
    check::block_table(pages.view(), b, tokens, config.page_size, config.num_pages);
    problem.requests.push_back({.q_len = q.shape[1],
                                .kv_len = tokens,
                                .q_page = b,
                                .pages = table.as<const std::int32_t>() + b * table.strides[0]});
  }
  expand_pages(problem);
  check_selection(problem, q.shape[1]);
  if (problem.on_device.size > 0) problem.requests.clear();  // read for the checks alone

  problem.quantize_q = config.format == CacheFormat::kInt8Baseline || config.format == CacheFormat::kInt8A ||
                       config.format == CacheFormat::kInt8B;
  return problem;
}

void attention(const AttentionParams& params) {
  const Problem problem = problem_of(params);
  run(find_row(Operation::kAttention, params.backend, features_of(problem)), problem);
}

struct DecodePlan::State {
  std::vector<std::int64_t> key;  // empty: not made yet
  store::Memory memory;
};

DecodePlan::DecodePlan() : state_(std::make_unique<State>()) {}
DecodePlan::~DecodePlan() = default;
DecodePlan::DecodePlan(DecodePlan&&) noexcept = default;
DecodePlan& DecodePlan::operator=(DecodePlan&&) noexcept = default;

namespace {

// All that a plan may depend on: who made it, shapes, what decides which keys are seen, and where the lengths lie.
std::vector<std::int64_t> plan_key(const Problem& p, const Row& row, const TensorView& seq_lens) {
  const auto address = [](const void* data) {
    return static_cast<std::int64_t>(reinterpret_cast<std::intptr_t>(data));
  };
  std::vector<std::int64_t> key = {static_cast<std::int64_t>(row.backend),
                                   p.batch(),
                                   p.on_device.max_q_len,
                                   p.requests.empty() ? 0 : p.requests.front().q_len,
                                   p.on_device.max_kv_len,
                                   p.num_q_heads,
                                   p.num_kv_heads,
                                   p.q.dim,
                                   p.v.dim,
                                   p.page_size,
                                   static_cast<std::int64_t>(p.q.dtype),
                                   static_cast<std::int64_t>(p.k.dtype),
                                   p.k.partition,
                                   p.causal,
                                   p.window.left.value_or(-1),
                                   p.window.right.value_or(-1),
                                   static_cast<std::int64_t>(p.schedule.kind),
                                   p.schedule.split_size,
                                   address(seq_lens.data),
                                   static_cast<std::int64_t>(p.selection->kind().index())};
  if (const auto* window = std::get_if<select::WindowGlobal>(&p.selection->kind())) {
    key.insert(key.end(), {window->window.left.value_or(-1), window->window.right.value_or(-1), window->n_global});
  }
  if (const auto* strided = std::get_if<select::Strided>(&p.selection->kind())) {
    key.insert(key.end(), {strided->width, strided->stride});
  }
  if (const auto* mask = std::get_if<select::BlockMask>(&p.selection->kind())) {
    key.insert(key.end(), {address(mask->mask.data), mask->block_q, mask->block_k});
  }
  const auto* tokens = std::get_if<select::Tokens>(&p.selection->kind());
  if (tokens != nullptr && p.listed_pages == nullptr) {
    key.insert(key.end(), {address(tokens->indices.data), address(tokens->lengths.data)});
  }
  if (const auto* pages = std::get_if<select::PageList>(&p.selection->kind())) {
    key.insert(key.end(), {address(pages->indices.data), address(pages->lengths.data)});
  }
  return key;
}

}  // namespace

void plan_decode(const DecodeParams& params, DecodePlan& plan) {
  DecodeParams with_outputs = params;
  if (!params.out.given() && params.cache != nullptr && params.q.rank == 4) {
    // Of the right shape; a plan writes none.
    const auto& shape = params.q.shape;
    with_outputs.out = TensorView(params.q.data, params.q.dtype,
                                  {shape[0], shape[1], shape[2], params.cache->config().head_dim_v}, params.q.device);
  }
  Problem problem = problem_of(with_outputs);
  const Row& row = find_row(Operation::kDecode, params.backend, features_of(problem));
  DecodePlan::State& state = plan.state();
  std::vector<std::int64_t> key = plan_key(problem, row, params.seq_lens);
  if (row.plan.run != nullptr) {
    const std::int64_t bytes = row.plan.bytes(problem);
    if (state.memory.bytes() < bytes || state.memory.device() != problem.device) {
      state.key.clear();
      state.memory = store::Memory(bytes, problem.device);
    }
    problem.plan = state.memory.as<void>();
    row.plan.run(problem);
  }
  state.key = std::move(key);
}

void set_query_scale(const DecodeParams& params, Problem& problem) {
  KVCache& cache = *params.cache;
  if (!problem.quantize_q || !cache.q_scale().given() || params.q.numel() == 0) return;
  if (!cache.q_calibrated()) cache.calibrate_q(params.q, params.stream);
  const auto* scale = cache.q_scale().as<const float>();
  if (on_cpu(problem)) {
    problem.q_static_scale = *scale;
  } else {
    problem.q_static_scale_on_device = scale;
  }
}

void decode(const DecodeParams& params) {
  Problem problem = problem_of(params);
  set_sampling(params, problem);
  if (problem.sampled.features != nullptr) problem.quantize_q = false;
  const Operation operation = params.sampling ? Operation::kSampledDecode : Operation::kDecode;
  const Row& row = find_row(operation, params.backend, features_of(problem));
  if (params.plan != nullptr) {
    const DecodePlan::State& plan = params.plan->state();
    if (plan.key != plan_key(problem, row, params.seq_lens)) {
      check::fail(ErrorCode::kValue, "plan",
                  plan.key.empty()
                      ? "not made yet; allowed is one that plan_decode() made"
                      : "made for another call; allowed is one of the same backend, shapes, masks, schedule "
                        "and arrays of lengths");
    }
    problem.plan = plan.memory.as<void>();
  }
  set_query_scale(params, problem);
  run(row, problem);
}

}  // namespace heddle
