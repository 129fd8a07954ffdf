#include "core/dispatch.h"

#include <algorithm>
#include <array>
#include <string_view>
#include <utility>
#include <vector>

#include "core/check.h"
#include "select/visibility.h"

namespace heddle {
namespace {

constexpr std::int64_t kMaxHeadDim = 576;  // MLA: 512 latent and 64 rotary features

std::string_view name_of(Feature feature) {
  switch (feature) {
    case Feature::kCpu: return "CPU tensors";
    case Feature::kCuda: return "CUDA tensors";
    case Feature::kFloat64: return "float64";
    case Feature::kFloat32: return "float32";
    case Feature::kFloat16: return "float16";
    case Feature::kBFloat16: return "bfloat16";
    case Feature::kInt8: return "int8";
    case Feature::kFloat8: return "float8_e4m3";
    case Feature::kMixedDTypes: return "queries, keys and values of different dtypes";
    case Feature::kOutDType: return "an output of another dtype than the input's";
    case Feature::kWideHeads: return "head dimensions above 576";
    case Feature::kPaged: return "a paged cache";
    case Feature::kPacked: return "packed batches";
    case Feature::kCausal: return "causal masks";
    case Feature::kWindow: return "windows";
    case Feature::kGlobalTokens: return "global tokens";
    case Feature::kStrided: return "strided selections";
    case Feature::kBlockMask: return "block masks";
    case Feature::kTokenLists: return "token lists";
    case Feature::kTokenListsPerQuery: return "token lists per query";
    case Feature::kSoftcap: return "softcap";
    case Feature::kSinks: return "sinks";
    case Feature::kLse: return "lse";
    case Feature::kPartitionScales: return "scales per partition";
    case Feature::kKeyMean: return "smoothed keys";
    case Feature::kValueMean: return "smoothed values";
    case Feature::kQueryMean: return "smoothed queries";
    case Feature::kQuantizedQueries: return "queries quantized on the way";
    case Feature::kBernoulli: return "Bernoulli scores";
    case Feature::kKeptKeys: return "sampling that keeps keys";
    case Feature::kReadCounts: return "counts of what was read";
    case Feature::kCount: break;
  }
  return "unknown";
}

std::string_view name_of(Operation operation) {
  switch (operation) {
    case Operation::kAttention: return "attention";
    case Operation::kDecode: return "decode";
    case Operation::kSampledDecode: return "sampled decode";
    case Operation::kMerge: return "merge";
  }
  return "unknown";
}

// "a", "a and b", "a, b and c"
std::string join(const std::vector<std::string_view>& items) {
  std::string all;
  for (std::size_t i = 0; i < items.size(); ++i) {
    all += check::text(i == 0 ? "" : i + 1 == items.size() ? " and " : ", ", items[i]);
  }
  return all;
}

bool always() { return true; }

constexpr Features kReferenceFeatures = Features::all_but({Feature::kCuda});
constexpr Features kHostFeatures = Features::all_but(
    {Feature::kCuda, Feature::kFloat64, Feature::kOutDType, Feature::kWideHeads, Feature::kQueryMean});

// Best first within an operation.
constexpr auto kRows = std::to_array<Row>({
#if defined(HEDDLE_WITH_CUDA)
    {Operation::kAttention,
     Backend::kSm90,
     {Feature::kCuda, Feature::kFloat16, Feature::kBFloat16, Feature::kPacked, Feature::kCausal, Feature::kWindow,
      Feature::kGlobalTokens, Feature::kStrided, Feature::kBlockMask, Feature::kSoftcap, Feature::kSinks,
      Feature::kLse},
     sm90::available,
     sm90::attention},
    {Operation::kDecode,
     Backend::kSm90,
     {Feature::kCuda, Feature::kFloat16, Feature::kBFloat16, Feature::kInt8, Feature::kFloat8, Feature::kMixedDTypes,
      Feature::kPaged, Feature::kCausal, Feature::kWindow, Feature::kGlobalTokens, Feature::kStrided,
      Feature::kTokenLists, Feature::kSoftcap, Feature::kSinks, Feature::kLse, Feature::kPartitionScales,
      Feature::kQuantizedQueries},
     sm90::available,
     sm90::decode,
     {sm90::decode_plan_bytes, sm90::decode_plan}},
    {Operation::kMerge,
     Backend::kSm90,
     {Feature::kCuda, Feature::kFloat32, Feature::kFloat16, Feature::kBFloat16, Feature::kLse},
     sm90::available,
     sm90::merge},
#endif
    {Operation::kAttention, Backend::kHost, kHostFeatures, always, host::attention},
    {Operation::kDecode, Backend::kHost, kHostFeatures, always, host::attention},
    {Operation::kSampledDecode, Backend::kHost, kHostFeatures, always, host::sampled},
    {Operation::kMerge, Backend::kHost, kHostFeatures, always, host::merge},
    {Operation::kAttention, Backend::kReference, kReferenceFeatures, always, reference::attention},
    {Operation::kDecode, Backend::kReference, kReferenceFeatures, always, reference::attention},
    {Operation::kSampledDecode, Backend::kReference, kReferenceFeatures, always, reference::sampled},
    {Operation::kMerge, Backend::kReference, kReferenceFeatures, always, reference::merge},
});

Feature feature_of(DType dtype) {
  switch (dtype) {
    case DType::kFloat64: return Feature::kFloat64;
    case DType::kFloat16: return Feature::kFloat16;
    case DType::kBFloat16: return Feature::kBFloat16;
    case DType::kFloat8E4M3: return Feature::kFloat8;
    case DType::kInt8: return Feature::kInt8;
    default: return Feature::kFloat32;
  }
}

void set_device(Features& features, Device device) {
  features.set(device.type == DeviceType::kCpu ? Feature::kCpu : Feature::kCuda);
}

std::string_view short_name(DType dtype) {
  switch (dtype) {
    case DType::kFloat64: return "fp64";
    case DType::kFloat32: return "fp32";
    case DType::kFloat16: return "fp16";
    case DType::kBFloat16: return "bf16";
    case DType::kFloat8E4M3: return "fp8";
    default: return to_string(dtype);
  }
}

thread_local std::string last_kernel_name;

// "host/amx/attention bf16"; the dtypes of q, k and v if they differ: "host/amx/decode bf16 int8 int8".
void set_last_kernel(const Row& row, const std::vector<DType>& dtypes) {
  std::string name(to_string(row.backend));
  if (row.backend == Backend::kHost) name += check::text("/", host_isa());
  name += check::text("/", name_of(row.operation));
  const bool same = std::all_of(dtypes.begin(), dtypes.end(), [&](DType d) { return d == dtypes.front(); });
  for (std::size_t i = 0; i < (same ? 1 : dtypes.size()); ++i) name += check::text(" ", short_name(dtypes[i]));
  last_kernel_name = std::move(name);
}

}  // namespace

std::string Features::names() const {
  std::vector<std::string_view> items;
  for (int i = 0; i < static_cast<int>(Feature::kCount); ++i) {
    const auto feature = static_cast<Feature>(i);
    if (has(feature)) items.push_back(name_of(feature));
  }
  return join(items);
}

Features features_of(const Problem& p) {
  Features f;
  set_device(f, p.device);
  for (const Rows* rows : {&p.q, &p.k, &p.v}) {
    f.set(feature_of(rows->dtype));
    f.set(Feature::kPartitionScales, rows->partition > 0);
  }
  f.set(Feature::kMixedDTypes, p.q.dtype != p.k.dtype || p.k.dtype != p.v.dtype);
  const DType own_out = p.q.dtype == DType::kInt8 ? DType::kFloat32 : p.q.dtype;
  f.set(Feature::kOutDType, p.out.dtype != own_out || (p.lse != nullptr && p.lse_dtype != DType::kFloat32));
  f.set(Feature::kWideHeads, std::max(p.q.dim, p.v.dim) > kMaxHeadDim);
  f.set(Feature::kPaged, p.page_size > 0);
  f.set(Feature::kPacked, p.packed);
  f.set(Feature::kCausal, p.causal);
  f.set(Feature::kWindow, p.window.left.has_value() || p.window.right.has_value());
  if (const auto* window = std::get_if<select::WindowGlobal>(&p.selection->kind())) {
    f.set(Feature::kWindow);
    f.set(Feature::kGlobalTokens, window->n_global > 0);
  }
  f.set(Feature::kStrided, std::holds_alternative<select::Strided>(p.selection->kind()));
  f.set(Feature::kBlockMask, std::holds_alternative<select::BlockMask>(p.selection->kind()));
  if (has_token_lists(p)) f.set(token_lists_per_query(p) ? Feature::kTokenListsPerQuery : Feature::kTokenLists);
  f.set(Feature::kTokenLists, std::holds_alternative<select::PageList>(p.selection->kind()));
  f.set(Feature::kSoftcap, p.softcap > 0.0);
  f.set(Feature::kSinks, p.sinks != nullptr);
  f.set(Feature::kLse, p.lse != nullptr);
  f.set(Feature::kKeyMean, p.k.mean != nullptr);
  f.set(Feature::kValueMean, p.v.mean != nullptr);
  f.set(Feature::kQueryMean, p.q.mean != nullptr);
  f.set(Feature::kQuantizedQueries, p.quantize_q);
  if (const Sampling* s = p.sampled.options) {
    f.set(Feature::kBernoulli, s->bernoulli > 0);
    f.set(Feature::kKeptKeys, s->n_sink > 0 || s->n_recent > 0 || s->n_top > 0);
    f.set(Feature::kReadCounts, p.sampled.reads.v_rows.given() || p.sampled.reads.k_features.given());
  }
  return f;
}

Features features_of(const MergeProblem& p) {
  Features f;
  set_device(f, p.outs.device);
  f.set(feature_of(p.outs.dtype));
  f.set(feature_of(p.lses.dtype));
  f.set(Feature::kOutDType, p.out.dtype != p.outs.dtype || (p.lse.given() && p.lse.dtype != DType::kFloat32));
  f.set(Feature::kLse, p.lse.given());
  return f;
}

const Row& find_row(Operation operation, Backend wanted, Features needed) {
  const Row* refused = nullptr;
  std::vector<std::string_view> able;    // backends that run the operation with these features
  std::vector<std::string_view> others;  // ... that run the operation at all
  for (const Row& row : kRows) {
    if (row.operation != operation || !row.available()) continue;
    const bool supported = needed.without(row.features).empty();
    if (supported && (wanted == Backend::kAuto || wanted == row.backend)) return row;
    (supported ? able : others).push_back(to_string(row.backend));
    if (wanted == row.backend || (wanted == Backend::kAuto && refused == nullptr)) refused = &row;
  }
  if (refused != nullptr) {
    check::fail(ErrorCode::kUnsupported, "backend",
                check::text(to_string(refused->backend), " does not support ",
                            needed.without(refused->features).names(), " in ", name_of(operation), "; ",
                            able.empty() ? std::string("no backend in this process does")
                                         : check::text("allowed ", able.size() == 1 ? "is " : "are ", join(able))));
  }
  const std::vector<Backend> available = available_backends();
  const bool runs_here = std::find(available.begin(), available.end(), wanted) != available.end();
  check::fail(
      ErrorCode::kUnsupported, "backend",
      check::text(to_string(wanted), runs_here ? " does not offer " : " is not available here, so it cannot run ",
                  name_of(operation), "; allowed are ", join(able.empty() ? others : able)));
}

void run(const Row& row, const Problem& problem) {
  set_last_kernel(row, {problem.q.dtype, problem.k.dtype, problem.v.dtype});
  std::get<void (*)(const Problem&)>(row.run)(problem);
}

void run(const Row& row, const MergeProblem& problem) {
  set_last_kernel(row, {problem.outs.dtype});
  std::get<void (*)(const MergeProblem&)>(row.run)(problem);
}

std::vector<Backend> available_backends() {
  std::vector<Backend> backends;
  for (const Row& row : kRows) {
    if (row.available() && std::find(backends.begin(), backends.end(), row.backend) == backends.end()) {
      backends.push_back(row.backend);
    }
  }
  return backends;
}

std::string last_kernel() { return last_kernel_name; }

}  // namespace heddle
