#include "core/sampling.h"

#include "aggregate/draws.h"
#include "core/check.h"

namespace heddle {

void check_sampling(const Sampling& s) {
  if (to_string(s.method) == "unknown") {
    check::fail(ErrorCode::kValue, "method", check::text(static_cast<int>(s.method), " is not a SamplingMethod"));
  }
  if (s.method == SamplingMethod::kExact) {
    if (s.samples != 0) {
      check::fail(ErrorCode::kValue, "samples", check::text(s.samples, " with method exact; allowed is 0"));
    }
  } else if (s.samples < 1 || s.samples > aggregate::kMaxDraws) {
    check::fail(ErrorCode::kValue, "samples", check::text(s.samples, "; allowed are 1 to ", aggregate::kMaxDraws));
  }
  if (s.bernoulli < 0 || s.bernoulli > aggregate::kMaxBernoulli) {
    check::fail(ErrorCode::kValue, "bernoulli",
                check::text(s.bernoulli, " queries; allowed are 1 to ", aggregate::kMaxBernoulli, ", and 0 for none"));
  }
  check::at_least("n_sink", s.n_sink, 0);
  check::at_least("n_recent", s.n_recent, 0);
  check::at_least("n_top", s.n_top, 0);
}

void set_sampling(const DecodeParams& params, Problem& problem) {
  const bool cpu = problem.device.type == DeviceType::kCpu;
  for (const auto& [name, view] :
       {std::pair("v_rows", &params.reads.v_rows), std::pair("k_features", &params.reads.k_features)}) {
    if (!view->given()) continue;
    if (!params.sampling) {
      check::fail(ErrorCode::kValue, name, "given without sampling; allowed is None: dense decode reads everything");
    }
    check::given(name, *view);
    check::dtype(name, *view, {DType::kInt64});
    check::device(name, *view, problem.device, "q");
    check::shape(name, *view, {params.q.shape[0], problem.num_kv_heads});
    check::writable(name, *view);
  }
  if (!params.sampling) return;
  const Sampling& s = *params.sampling;
  check_sampling(s);
  if (params.q.shape[1] > aggregate::kMaxQueries) {
    check::fail(ErrorCode::kValue, "q",
                check::text("axis 1 (queries) is ", params.q.shape[1], "; allowed with sampling are at most ",
                            aggregate::kMaxQueries));
  }
  for (const Request& request : problem.requests) {
    if (s.method == SamplingMethod::kSystematicTile && request.kv_len > aggregate::kMaxDraws * aggregate::kSampleTile) {
      check::fail(ErrorCode::kValue, "seq_lens",
                  check::text(request.kv_len, "; allowed with systematic_tile are at most ",
                              aggregate::kMaxDraws * aggregate::kSampleTile));
    }
  }
  Sampled& sampled = problem.sampled;
  sampled.options = &s;
  sampled.offset = s.offset;
  sampled.reads = params.reads;
  if (s.offset_at.given()) {
    check::given("offset", s.offset_at);
    check::dtype("offset", s.offset_at, {DType::kInt32});
    check::device("offset", s.offset_at, problem.device, "q");
    check::shape("offset", s.offset_at, {1});
    if (cpu) sampled.offset += static_cast<std::uint32_t>(*s.offset_at.as<const std::int32_t>());
  }
  if (s.bernoulli > 0) {
    const std::int64_t draws = problem.q.dim * (s.bernoulli_stratified ? 1 : s.bernoulli);
    if (draws > 4 * aggregate::kMaxDraws) {
      check::fail(ErrorCode::kValue, "bernoulli",
                  check::text(s.bernoulli, " queries of ", problem.q.dim, " features; allowed are at most ",
                              4 * aggregate::kMaxDraws, " draws"));
    }
    const TensorView features = params.cache->k_by_feature();
    if (!features.given()) {
      check::fail(ErrorCode::kValue, "cache",
                  "keeps its keys by token; allowed with Bernoulli scores is one with feature_major set");
    }
    const auto size = static_cast<std::int64_t>(size_of(features.dtype));
    sampled.features = features.as<const std::byte>();
    sampled.feature_page_stride = features.strides[0] * size;
    sampled.feature_head_stride = features.strides[1] * size;
  }
}

}  // namespace heddle
