// Cascade decode: a decode of each level of shared prefixes and one of the requests' own tokens, merged by their lse.
// The queries of a group are those of a single request that holds its prefix.
#include <algorithm>
#include <string>
#include <vector>

#include "core/check.h"
#include "core/dispatch.h"
#include "core/front.h"
#include "cuda/launch.h"
#include "heddle/decode.h"
#include "heddle/error.h"
#include "host/workspace.h"

namespace heddle {
namespace {

// A decode of some of the batch's requests, whose results are a part of one level's.
struct Part {
  Problem problem;
  const Row* row = nullptr;
  std::int64_t level = 0, first = 0;  // the first of its tokens (request, query) among the batch's
};

// Partial results, one level after the other: outs [levels, tokens, Hq, Dv], lses [levels, Hq, tokens].
struct Partials {
  std::int64_t levels = 0, batch = 0, queries = 0, heads = 0, dim = 0;
  DType dtype = DType::kFloat32, lse_dtype = DType::kFloat32;

  std::int64_t tokens() const { return batch * queries; }
  std::int64_t out_bytes() const { return tokens() * heads * dim * static_cast<std::int64_t>(size_of(dtype)); }
  std::int64_t lse_bytes() const { return tokens() * heads * static_cast<std::int64_t>(size_of(lse_dtype)); }
  std::int64_t lses_at() const { return (levels * out_bytes() + 255) / 256 * 256; }
  std::int64_t bytes() const { return lses_at() + levels * lse_bytes(); }

  // Of n requests with q queries each, anywhere.
  TensorView out(const void* data, std::int64_t n, std::int64_t q, Device device) const {
    return TensorView(data, dtype, {n, q, heads, dim}, device);
  }
  TensorView lse(const void* data, std::int64_t n, std::int64_t q, Device device) const {
    TensorView view(data, lse_dtype, {n, heads, q}, device);
    view.strides = {q, tokens(), 1};
    return view;
  }
};

void refuse(std::string_view argument) {
  check::fail(ErrorCode::kUnsupported, argument, "given; allowed is none in decode_cascade");
}

void check_call(const DecodeParams& params) {
  if (params.window && (params.window->left || params.window->right)) refuse("window");
  if (!std::holds_alternative<std::monostate>(params.selection.kind())) refuse("selection");
  if (params.sampling) refuse("sampling");
  if (params.plan != nullptr) refuse("plan");
}

void check_groups(const SharedPrefix& prefix, const TensorView& q) {
  check::index_array("cu_requests", prefix.cu_requests, {}, "what the host reads");
  check::rank("cu_requests", prefix.cu_requests, 1);
  check::axis_not_empty("cu_requests", prefix.cu_requests, 0, "groups + 1");
  check::cu_seqlens("cu_requests", prefix.cu_requests, q.shape[0], "the batch");
  const std::int64_t groups = prefix.cu_requests.shape[0] - 1;
  if (const std::int32_t last = prefix.cu_requests.as<const std::int32_t>()[groups]; last != q.shape[0]) {
    check::fail(ErrorCode::kValue, "cu_requests",
                check::text("ends at ", last, "; allowed is ", q.shape[0], ", the batch"));
  }
  check::index_array("block_table", prefix.block_table, q.device, "q");
  check::rank("block_table", prefix.block_table, 2);
  check::axis("block_table", prefix.block_table, 0, "groups", groups, "as in cu_requests");
  check::index_array("seq_lens", prefix.seq_lens, q.device, "q");
  check::shape("seq_lens", prefix.seq_lens, {groups});
}

TensorView rows(TensorView view, std::int64_t first, std::int64_t count) {
  view.data = view.as<std::byte>() + first * view.strides[0] * static_cast<std::int64_t>(size_of(view.dtype));
  view.shape[0] = count;
  return view;
}

// q [groups * size, Sq, ...] as [groups, size * Sq, ...].
TensorView by_group(TensorView q, std::int64_t groups, std::int64_t size) {
  if (q.shape[1] == 1) q.strides[1] = q.strides[0];
  q.strides[0] *= size;
  q.shape[0] = groups;
  q.shape[1] *= size;
  return q;
}

// One decode for each run of groups of the same size.
void add_parts(const DecodeParams& params, const SharedPrefix& prefix, const Partials& partials, std::int64_t level,
               std::vector<Part>& parts) {
  check_groups(prefix, params.q);
  const auto* cu = prefix.cu_requests.as<const std::int32_t>();
  const std::int64_t groups = prefix.cu_requests.shape[0] - 1, queries = partials.queries;
  for (std::int64_t g = 0, end = 0; g < groups; g = end) {
    const std::int64_t size = cu[g + 1] - cu[g];
    for (end = g + 1; end < groups && cu[end + 1] - cu[end] == size;) ++end;
    const std::int64_t n = end - g;
    DecodeParams shared = params;
    shared.q = by_group(rows(params.q, cu[g], n * size), n, size);
    shared.block_table = rows(prefix.block_table, g, n);
    shared.seq_lens = rows(prefix.seq_lens, g, n);
    shared.causal = false;
    shared.sinks = {};
    shared.out = partials.out(params.out.data, n, size * queries, params.q.device);
    shared.lse = partials.lse(params.out.data, n, size * queries, params.q.device);
    Part part{.problem = problem_of(shared), .level = level, .first = cu[g] * queries};
    part.row = &find_row(Operation::kDecode, params.backend, features_of(part.problem));
    if (size > 0) parts.push_back(std::move(part));
  }
}

}  // namespace

void decode_cascade(const DecodeParams& params, std::span<const SharedPrefix> prefixes) {
  check_call(params);
  if (prefixes.empty()) return decode(params);
  const Problem whole = problem_of(params);  // the arguments of the call, its own outputs included
  const TensorView& q = params.q;
  if (q.shape[0] > 1 && q.shape[1] > 1 && q.strides[0] != q.shape[1] * q.strides[1]) {
    check::fail(ErrorCode::kLayout, "q",
                check::text("axis 0 has stride ", q.strides[0], "; allowed is ", q.shape[1] * q.strides[1],
                            ", so that requests follow each other as their queries do"));
  }

  const bool oracle = params.backend == Backend::kReference;
  const Partials partials{.levels = static_cast<std::int64_t>(prefixes.size()) + 1,
                          .batch = q.shape[0],
                          .queries = q.shape[1],
                          .heads = q.shape[2],
                          .dim = whole.v.dim,
                          .dtype = oracle ? DType::kFloat64 : q.dtype,
                          .lse_dtype = oracle ? DType::kFloat64 : DType::kFloat32};
  // Outputs of the right shapes, to be checked with the rest; where they lie is known below.
  std::vector<Part> parts;
  DecodeParams own = params;
  own.out = partials.out(params.out.data, q.shape[0], q.shape[1], q.device);
  own.lse = partials.lse(params.out.data, q.shape[0], q.shape[1], q.device);
  parts.push_back({.problem = problem_of(own)});
  parts.front().row = &find_row(Operation::kDecode, params.backend, features_of(parts.front().problem));
  for (std::size_t i = 0; i < prefixes.size(); ++i) {
    try {
      add_parts(params, prefixes[i], partials, static_cast<std::int64_t>(i) + 1, parts);
    } catch (const Error& error) {
      const std::string name = check::text("prefixes[", i, "].", error.argument());
      const bool of_prefix =
          error.argument() == "block_table" || error.argument() == "seq_lens" || error.argument() == "cu_requests";
      if (!of_prefix) throw;
      throw Error(error.code(), name, std::string(error.what()).substr(error.argument().size() + 2));
    }
  }

  MergeProblem merge;
  merge.outs = TensorView(params.out.data, partials.dtype,
                          {partials.levels, q.shape[0], q.shape[1], partials.heads, partials.dim}, q.device);
  merge.lses = TensorView(params.out.data, partials.lse_dtype,
                          {partials.levels, q.shape[0], partials.heads, q.shape[1]}, q.device);
  merge.lses.strides = {partials.heads * partials.tokens(), q.shape[1], partials.tokens(), 1};
  merge.out = params.out;
  merge.lse = params.lse;
  merge.stream = params.stream;
  const Row& merge_row = find_row(Operation::kMerge, params.backend, features_of(merge));

  const auto enqueue = [&](void* workspace) {
    auto* outs = static_cast<std::byte*>(workspace);
    std::byte* lses = outs + partials.lses_at();
    const auto token_bytes = partials.heads * partials.dim * static_cast<std::int64_t>(size_of(partials.dtype));
    for (Part& part : parts) {
      part.problem.selection = &params.selection;
      part.problem.out.data = outs + part.level * partials.out_bytes() + part.first * token_bytes;
      part.problem.lse = lses + part.level * partials.lse_bytes() +
                         part.first * static_cast<std::int64_t>(size_of(partials.lse_dtype));
      set_query_scale(params, part.problem);
      run(*part.row, part.problem);
    }
    merge.outs.data = outs;
    merge.lses.data = lses;
    run(merge_row, merge);
  };
  if (q.device.type == DeviceType::kCpu) {
    static thread_local host::Workspace workspace;
    enqueue(workspace.reserve(static_cast<std::size_t>(partials.bytes())));
  } else {
    cuda::with_workspace("cascade", q.device.index, params.stream.handle, partials.bytes(), enqueue);
  }
}

}  // namespace heddle
