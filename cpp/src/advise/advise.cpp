#include "heddle/advise.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdio>
#include <functional>
#include <limits>
#include <optional>

#include "core/check.h"

namespace heddle {
namespace {

constexpr std::int64_t kLongest = std::numeric_limits<std::int32_t>::max();  // lengths are int32
constexpr std::int64_t kSplitKeys = 256;      // a split of decode reads at least so many keys
constexpr std::int64_t kSelectQueries = 128;  // top-k scores prefill queries so many at a time
constexpr double kWorthTrying = 1.15;         // a smaller predicted gain is not worth changing anything for

constexpr std::array<CacheFormat, 7> kFormats = {CacheFormat::kFp32,         CacheFormat::kBf16,  CacheFormat::kFp16,
                                                 CacheFormat::kInt8Baseline, CacheFormat::kInt8A, CacheFormat::kInt8B,
                                                 CacheFormat::kFp8};

using Kind = Pattern::Kind;

bool is_int8(CacheFormat f) {
  return f == CacheFormat::kInt8Baseline || f == CacheFormat::kInt8A || f == CacheFormat::kInt8B;
}

double bytes_of(CacheFormat f) {
  if (f == CacheFormat::kFp32) return 4.0;
  return is_int8(f) || f == CacheFormat::kFp8 ? 1.0 : 2.0;
}

double known_or(double rate, double other) { return rate > 0.0 ? rate : other; }

// Operations a second of the two products.
struct Rates {
  double qk, pv;
};
Rates rates_of(const Machine& m, DType dtype, CacheFormat format) {
  const bool wide = dtype == DType::kFloat32 || format == CacheFormat::kFp32;
  const double own = wide ? known_or(m.fp32, m.bf16) : known_or(m.bf16, m.fp32);
  if (is_int8(format)) return {known_or(m.int8, own), own};
  if (format == CacheFormat::kFp8) return {known_or(m.fp8, own), known_or(m.fp8, own)};
  return {own, own};
}

bool every_key(const Pattern& p) { return p.kind == Kind::kMaterialized || p.kind == Kind::kFlash; }

// Different keys that the queries of one KV head read, at most.
std::int64_t rows_read(const Pattern& p, std::int64_t q_len, std::int64_t kv_len, bool causal) {
  const std::int64_t one_query = count_pairs(p, 1, kv_len, causal);
  if (p.kind == Kind::kWindow) {  // a band, moved by one key a query
    return std::min(kv_len, one_query + q_len - 1);
  }
  // Not more than that of each query together. Masked blocks of a few queries are the same ones.
  return p.kind == Kind::kBlocks && q_len <= p.block ? one_query
                                                     : std::min(kv_len, one_query * std::min(q_len, kv_len));
}

// Pairs that are multiplied. In prefill kernels take whole tiles of keys, and with a stride up to a tile's length every
// tile holds a key that is seen.
double pairs_multiplied(const Pattern& pattern, Phase phase, std::int64_t q_len, std::int64_t kv_len, bool causal) {
  constexpr double kTileKeys = 64.0;
  const auto pairs = static_cast<double>(count_pairs(pattern, q_len, kv_len, causal));
  if (pattern.kind != Kind::kStrided || phase != Phase::kPrefill) return pairs;
  Pattern near = pattern;
  near.strided.stride = kv_len + 1;
  const auto dense = static_cast<double>(count_pairs({}, q_len, kv_len, causal)),
             within = static_cast<double>(count_pairs(near, q_len, kv_len, causal));
  const double share = std::min(1.0, kTileKeys / static_cast<double>(pattern.strided.stride));
  return std::max(pairs, within + (dense - within) * share);
}

Cost cost_without_limits(const AdviseParams& a, const Pattern& pattern, CacheFormat format, Phase phase,
                         std::int64_t seq_len) {
  const std::int64_t q_len = phase == Phase::kPrefill ? seq_len : std::min(a.new_tokens, seq_len);
  const auto layers = static_cast<double>(a.num_layers), batch = static_cast<double>(a.batch);
  const auto q_heads = static_cast<double>(a.num_q_heads), kv_heads = static_cast<double>(a.num_kv_heads);
  const auto dim = static_cast<double>(a.head_dim), dim_v = static_cast<double>(a.head_dim_v);
  const auto queries = static_cast<double>(q_len), keys = static_cast<double>(seq_len);
  const auto element = static_cast<double>(size_of(a.dtype));
  const double kv_element = bytes_of(format);

  Cost c;
  c.pattern = pattern;
  c.format = format;
  c.phase = phase;
  c.pairs = count_pairs(pattern, q_len, seq_len, a.causal);
  const auto dense = static_cast<double>(count_pairs({}, q_len, seq_len, a.causal));
  c.density = dense > 0.0 ? static_cast<double>(c.pairs) / dense : 1.0;

  // Memory.
  const double scale_bytes = format == CacheFormat::kInt8A ? 4.0 / static_cast<double>(a.partition) : 0.0;  // a token
  const double static_bytes = kv_element == 1.0 ? 8.0 : 0.0;
  c.kv_bytes = layers * batch * keys * kv_heads * (dim + dim_v) * kv_element;
  c.side_bytes = layers * (batch * keys * kv_heads * (4.0 + scale_bytes) + static_bytes);
  if (pattern.kind == Kind::kMaterialized) c.score_bytes = batch * q_heads * queries * keys * element;
  double lists = 0.0, partials = 0.0, ranking = 0.0;
  if (pattern.kind == Kind::kBlocks) {
    const auto blocks = [&](double n) { return std::ceil(n / static_cast<double>(pattern.block)); };
    lists = batch * q_heads * blocks(queries) * blocks(keys);  // one byte each
  } else if (pattern.kind == Kind::kTopK || pattern.kind == Kind::kTokens) {
    lists = batch * kv_heads * queries * (static_cast<double>(std::min(pattern.budget, seq_len)) + 1.0) * 4.0;
  }
  if (pattern.kind == Kind::kTopK) {
    ranking = batch * kv_heads * static_cast<double>(std::min(q_len, kSelectQueries)) * keys * 4.0;
  }
  const std::int64_t read = rows_read(pattern, q_len, seq_len, a.causal);
  if (phase == Phase::kDecode && pattern.kind != Kind::kMaterialized) {
    const auto tasks = static_cast<double>(a.batch * a.num_kv_heads);
    const double splits = std::clamp(std::ceil(static_cast<double>(a.machine.workers) / tasks), 1.0,
                                     std::ceil(static_cast<double>(std::max<std::int64_t>(read, 1)) / kSplitKeys));
    if (splits > 1.0) partials = batch * q_heads * queries * splits * (dim_v + 1.0) * 4.0;
  }
  c.workspace_bytes = lists + partials + ranking;
  const double in_out = batch * queries * q_heads * (dim + dim_v) * element;
  c.activation_bytes = in_out + batch * queries * kv_heads * (dim + dim_v) * element;
  c.total_bytes = c.kv_bytes + c.side_bytes + c.score_bytes + c.workspace_bytes + c.activation_bytes + a.other_bytes;

  // Time. Top-k reads every key to rank it; every other pattern reads the keys that it multiplies.
  const bool ranks = pattern.kind == Kind::kTopK;
  const double k_rows = static_cast<double>(ranks ? rows_read({}, q_len, seq_len, a.causal) : read);
  const double multiplied = pairs_multiplied(pattern, phase, q_len, seq_len, a.causal);
  const double qk = 2.0 * dim * (ranks ? dense : multiplied) * batch * q_heads;
  const double pv = 2.0 * dim_v * multiplied * batch * q_heads;
  // The two products read and write what softmax reads and writes again.
  const double scores_moved = 4.0 * c.score_bytes;
  const double moved =
      in_out +
      batch * kv_heads * (k_rows * (dim * kv_element + scale_bytes) + static_cast<double>(read) * dim_v * kv_element) +
      scores_moved + lists + 2.0 * partials + 2.0 * ranking;
  const Rates rates = rates_of(a.machine, a.dtype, format);
  const double compute = qk / rates.qk + pv / rates.pv, memory = moved / a.machine.bandwidth;
  c.operations = layers * (qk + pv);
  c.moved_bytes = layers * moved;
  c.seconds = layers * std::max(compute, memory);
  c.memory_bound = memory > compute;
  return c;
}

Cost cost_of(const AdviseParams& a, const Pattern& pattern, CacheFormat format, Phase phase) {
  const auto fits = [&](const Cost& c) { return a.machine.memory == 0.0 || c.total_bytes <= a.machine.memory; };
  Cost cost = cost_without_limits(a, pattern, format, phase, a.seq_len);
  cost.fits = fits(cost);
  std::int64_t good = 0, bad = kLongest + 1;
  while (bad - good > 1) {
    const std::int64_t middle = good + (bad - good) / 2;
    (fits(cost_without_limits(a, pattern, format, phase, middle)) ? good : bad) = middle;
  }
  cost.max_seq_len = good;
  return cost;
}

std::vector<Pattern> default_patterns() {
  Pattern window{.kind = Kind::kWindow}, strided{.kind = Kind::kStrided}, blocks{.kind = Kind::kBlocks};
  Pattern topk{.kind = Kind::kTopK}, tokens{.kind = Kind::kTokens};
  window.window = {.window = {.left = 1024, .right = 0}, .n_global = 64};
  strided.strided = {.width = 1024, .stride = 64};
  blocks.density = 0.25;
  topk.budget = tokens.budget = 2048;
  return {window, strided, blocks, topk, tokens};
}

// "335.5 GB"
std::string bytes_text(double bytes) {
  constexpr std::array<const char*, 6> kUnits = {"B", "KB", "MB", "GB", "TB", "PB"};
  std::size_t unit = 0;
  while (bytes >= 999.95 && unit + 1 < kUnits.size()) {
    bytes /= 1000.0;
    ++unit;
  }
  std::array<char, 32> text{};
  std::snprintf(text.data(), text.size(), unit == 0 ? "%.0f %s" : "%.1f %s", bytes, kUnits[unit]);
  return text.data();
}

// "1.24 ms"
std::string time_text(double seconds) {
  std::array<char, 32> text{};
  const char* format = seconds >= 1.0 ? "%.2f s" : seconds >= 1e-3 ? "%.2f ms" : "%.2f us";
  std::snprintf(text.data(), text.size(), format,
                seconds >= 1.0    ? seconds
                : seconds >= 1e-3 ? seconds * 1e3
                                  : seconds * 1e6);
  return text.data();
}

std::string ratio_text(double ratio) {
  std::array<char, 32> text{};
  std::snprintf(text.data(), text.size(), "%.1fx", ratio);
  return text.data();
}

// A change to what is run today.
struct Step {
  std::string name;
  Pattern pattern;
  CacheFormat format;
};

Pattern pattern_today(const AdviseParams& a) { return {.kind = a.materialized ? Kind::kMaterialized : Kind::kFlash}; }

std::string format_step(CacheFormat format) {
  switch (format) {
    case CacheFormat::kInt8A:
      return "format int8-a (keys with a scale per partition: the most accurate of the 8-bit formats)";
    case CacheFormat::kInt8B: return "format int8-b (one scale for all keys)";
    default: return check::text("format ", to_string(format));
  }
}

// What makes it fit, from the least change to the largest.
std::string memory_advice(const AdviseParams& a) {
  const auto peak = [&](const Pattern& pattern, CacheFormat format) {
    const Cost prefill = cost_of(a, pattern, format, Phase::kPrefill),
               decode = cost_of(a, pattern, format, Phase::kDecode);
    return prefill.total_bytes > decode.total_bytes ? prefill : decode;
  };
  const std::string room = bytes_text(a.machine.memory);
  const Cost today = peak(pattern_today(a), a.format);
  if (a.machine.memory == 0.0)
    return check::text("needs ", bytes_text(today.total_bytes), "; the machine's memory is not known");
  if (today.fits) {
    return check::text("fits: ", bytes_text(today.total_bytes), " of ", room, "; requests of up to ", today.max_seq_len,
                       " tokens would fit");
  }
  const std::string problem = check::text("needs ", bytes_text(today.total_bytes), " of ", room, ". ");
  Cost best = today;
  if (a.materialized) {
    best = peak({}, a.format);
    if (best.fits) {
      return check::text(problem, "First: flash attention, which keeps no scores (", bytes_text(today.score_bytes),
                         "): ", bytes_text(best.total_bytes));
    }
  }
  const std::string also = a.materialized ? "flash attention, which keeps no scores, and " : "";
  for (const CacheFormat format : {CacheFormat::kBf16, CacheFormat::kInt8A, CacheFormat::kInt8B}) {
    const Cost smaller = peak({}, format);
    if (smaller.total_bytes >= best.total_bytes) continue;
    if (smaller.fits) {
      return check::text(problem, "First: ", also, format_step(format), ": the cache shrinks from ",
                         bytes_text(today.kv_bytes), " to ", bytes_text(smaller.kv_bytes), ", all to ",
                         bytes_text(smaller.total_bytes));
    }
    // The less accurate of two formats must earn its place.
    if (smaller.total_bytes < 0.9 * best.total_bytes) best = smaller;
  }
  const std::string with = check::text(also, "format ", to_string(best.format));
  AdviseParams fewer = a;
  const auto fits = [&](std::int64_t batch) {
    fewer.batch = batch;
    return cost_of(fewer, {}, best.format, Phase::kPrefill).fits &&
           cost_of(fewer, {}, best.format, Phase::kDecode).fits;
  };
  std::int64_t good = 0, bad = a.batch;
  while (bad - good > 1) {
    const std::int64_t middle = good + (bad - good) / 2;
    (fits(middle) ? good : bad) = middle;
  }
  if (good > 0)
    return check::text(problem, "First: ", with, " with at most ", good, good == 1 ? " request" : " requests",
                       " at a time");
  const double machines = std::ceil(best.total_bytes / a.machine.memory);
  return check::text(problem, "First: ", with, " (", bytes_text(best.total_bytes), ") over ", machines,
                     " such machines, split by KV heads or layers; one machine alone holds requests of up to ",
                     best.max_seq_len, " tokens");
}

// The first change that makes a phase fast enough, or else the first that helps.
std::string speed_advice(const AdviseParams& a, const std::vector<Pattern>& patterns, const Cost& today,
                         double target) {
  const bool prefill = today.phase == Phase::kPrefill;
  const std::string limit = today.memory_bound ? "memory reads" : "arithmetic";
  const std::string now = check::text(time_text(today.seconds), prefill ? " of " : " a step of ", limit);
  if (target > 0.0 && today.seconds <= target) return check::text("fast enough: ", now);

  std::vector<Step> steps;
  if (a.materialized) steps.push_back({"flash attention, with the same result", {}, a.format});
  if (bytes_of(a.format) > 1.0) {
    steps.push_back({format_step(CacheFormat::kInt8A), {}, CacheFormat::kInt8A});
    steps.push_back({format_step(CacheFormat::kInt8B), {}, CacheFormat::kInt8B});
  }
  // Patterns that look at the keys before they drop some come before those that do not.
  const auto add_patterns = [&](std::initializer_list<Kind> kinds) {
    for (const Kind kind : kinds) {
      for (const Pattern& p : patterns) {
        if (p.kind == kind) steps.push_back({to_string(p), p, a.format});
      }
    }
  };
  if (prefill) {
    add_patterns({Kind::kBlocks, Kind::kWindow, Kind::kStrided});
  } else {
    add_patterns({Kind::kTopK, Kind::kBlocks, Kind::kWindow, Kind::kStrided});
  }

  std::string first;
  for (const Step& step : steps) {
    const Cost cost = cost_of(a, step.pattern, step.format, today.phase);
    const double gain = today.seconds / cost.seconds;
    if (gain < kWorthTrying) continue;
    const std::string text = check::text(step.name, ": ", time_text(cost.seconds), ", ", ratio_text(gain), " faster");
    if (target == 0.0 || cost.seconds <= target) return check::text(now, ". First: ", text);
    if (first.empty()) first = text;
  }
  if (first.empty()) {
    return check::text(now, ". Nothing here is noticeably faster");
  }
  return check::text(now, ". First: ", first, "; nothing here alone reaches ", time_text(target));
}

AdviseParams checked(AdviseParams a) {
  const auto positive = [](std::string_view name, std::int64_t value) {
    if (value < 1 || value > kLongest) {
      check::fail(ErrorCode::kValue, name, check::text(value, "; allowed are 1 to ", kLongest));
    }
  };
  positive("num_layers", a.num_layers);
  positive("batch", a.batch);
  positive("num_q_heads", a.num_q_heads);
  positive("num_kv_heads", a.num_kv_heads);
  positive("head_dim", a.head_dim);
  check::at_least("head_dim_v", a.head_dim_v, 0);
  if (a.head_dim_v == 0) a.head_dim_v = a.head_dim;
  positive("head_dim_v", a.head_dim_v);
  positive("seq_len", a.seq_len);
  positive("new_tokens", a.new_tokens);
  positive("partition", a.partition);
  if (a.num_q_heads % a.num_kv_heads != 0) {
    check::fail(ErrorCode::kValue, "num_q_heads",
                check::text(a.num_q_heads, "; allowed are multiples of num_kv_heads, ", a.num_kv_heads));
  }
  if (a.dtype != DType::kFloat32 && a.dtype != DType::kFloat16 && a.dtype != DType::kBFloat16) {
    check::fail(ErrorCode::kDType, "dtype",
                check::text(to_string(a.dtype), "; allowed are float32, float16 and bfloat16"));
  }
  if (to_string(a.format) == "unknown") check::fail(ErrorCode::kValue, "format", "not a CacheFormat");
  const auto not_negative = [](std::string_view name, double value) {
    if (!(value >= 0.0) || std::isinf(value)) {
      check::fail(ErrorCode::kValue, name, check::text(value, "; allowed are finite numbers of 0 and above"));
    }
  };
  not_negative("other_bytes", a.other_bytes);
  not_negative("prefill_target", a.prefill_target);
  not_negative("decode_target", a.decode_target);
  const Machine& m = a.machine;
  for (const double value : {m.memory, m.bandwidth, m.fp32, m.bf16, m.int8, m.fp8}) not_negative("machine", value);
  if (m.bandwidth == 0.0 || (m.fp32 == 0.0 && m.bf16 == 0.0)) {
    check::fail(ErrorCode::kValue, "machine",
                check::text("bandwidth ", m.bandwidth, ", fp32 ", m.fp32, ", bf16 ", m.bf16,
                            "; allowed is a bandwidth above 0 and one of the other two above 0"));
  }
  positive("machine", m.workers);
  for (const Pattern& p : a.patterns) {
    check::at_least("n_global", p.window.n_global, 0);
    check::at_least("window", p.window.window.left.value_or(0), 0, "left");
    check::at_least("window", p.window.window.right.value_or(0), 0, "right");
    check::at_least("strided", p.strided.width, 0, "width");
    check::at_least("strided", p.strided.stride, 1, "stride");
    check::at_least("block", p.block, 1);
    check::at_least("budget", p.budget, 0);
    if (!(p.density >= 0.0 && p.density <= 1.0)) {
      check::fail(ErrorCode::kValue, "density", check::text(p.density, "; allowed are 0 to 1"));
    }
  }
  return a;
}

}  // namespace

std::string to_string(const Pattern& p) {
  switch (p.kind) {
    case Kind::kMaterialized: return "scores in memory";
    case Kind::kFlash: return "flash";
    case Kind::kWindow: {
      const auto side = [](const std::optional<std::int64_t>& keys) { return keys ? std::to_string(*keys) : "all"; };
      std::string text = check::text("window ", side(p.window.window.left));
      if (p.window.window.right != 0) text += check::text(":", side(p.window.window.right));
      return p.window.n_global > 0 ? check::text(text, " + ", p.window.n_global, " global") : text;
    }
    case Kind::kStrided: return check::text("strided ", p.strided.width, "/", p.strided.stride);
    case Kind::kBlocks: return check::text("blocks of ", p.block, ", ", 100.0 * p.density, "%");
    case Kind::kTopK: return check::text("top-", p.budget);
    case Kind::kTokens: return check::text("lists of ", p.budget);
  }
  return "unknown";
}

Advice advise(const AdviseParams& params) {
  const AdviseParams a = checked(params);
  std::vector<Pattern> patterns = {{.kind = Kind::kMaterialized}, {.kind = Kind::kFlash}};
  const std::vector<Pattern> sparse = a.patterns.empty() ? default_patterns() : a.patterns;
  for (const Pattern& p : sparse) {
    if (!every_key(p)) patterns.push_back(p);
  }
  Advice advice;
  advice.machine = a.machine;
  for (const Phase phase : {Phase::kPrefill, Phase::kDecode}) {
    for (const Pattern& pattern : patterns) {
      for (const CacheFormat format : kFormats) advice.costs.push_back(cost_of(a, pattern, format, phase));
    }
  }
  advice.prefill = cost_of(a, pattern_today(a), a.format, Phase::kPrefill);
  advice.decode = cost_of(a, pattern_today(a), a.format, Phase::kDecode);
  advice.memory = memory_advice(a);
  advice.prefill_speed = speed_advice(a, patterns, advice.prefill, a.prefill_target);
  advice.decode_speed = speed_advice(a, patterns, advice.decode, a.decode_target);
  return advice;
}

}  // namespace heddle
