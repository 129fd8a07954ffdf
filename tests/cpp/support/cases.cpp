#include "cases.h"

#include <algorithm>
#include <array>
#include <charconv>
#include <sstream>
#include <stdexcept>
#include <utility>

#include "support/random.h"

namespace heddle::testing {
namespace {

constexpr std::array<std::pair<Op, std::string_view>, 2> kOps = {
    {{Op::kAttention, "attention"}, {Op::kDecode, "decode"}}};
constexpr std::array<std::pair<Pattern, std::string_view>, 6> kPatterns = {{{Pattern::kNone, "none"},
                                                                            {Pattern::kWindow, "window"},
                                                                            {Pattern::kStrided, "strided"},
                                                                            {Pattern::kBlocks, "blocks"},
                                                                            {Pattern::kTokens, "tokens"},
                                                                            {Pattern::kQueryTokens, "query-tokens"}}};
constexpr std::array<std::pair<DType, std::string_view>, 6> kDTypes = {{{DType::kFloat64, "fp64"},
                                                                        {DType::kFloat32, "fp32"},
                                                                        {DType::kFloat16, "fp16"},
                                                                        {DType::kBFloat16, "bf16"},
                                                                        {DType::kInt8, "int8"},
                                                                        {DType::kFloat8E4M3, "fp8"}}};
constexpr std::array<std::pair<ScheduleKind, std::string_view>, 4> kSchedules = {
    {{ScheduleKind::kAuto, "auto"},
     {ScheduleKind::kTile, "tile"},
     {ScheduleKind::kStatic, "static"},
     {ScheduleKind::kStealing, "stealing"}}};

template <class Table, class T>
std::string name_in(const Table& table, T value) {
  for (const auto& [known, name] : table) {
    if (known == value) return std::string(name);
  }
  throw std::invalid_argument("a value without a name");
}

template <class Table, class T>
void parse_in(const Table& table, std::string_view text, T& value) {
  for (const auto& [known, name] : table) {
    if (name == text) {
      value = known;
      return;
    }
  }
  throw std::invalid_argument("'" + std::string(text) + "' is not known");
}

std::string text_of(Op x) { return name_in(kOps, x); }
std::string text_of(Pattern x) { return name_in(kPatterns, x); }
std::string text_of(DType x) { return name_in(kDTypes, x); }
std::string text_of(ScheduleKind x) { return name_in(kSchedules, x); }
std::string text_of(CacheFormat x) { return std::string(heddle::to_string(x)); }
std::string text_of(bool x) { return x ? "1" : "0"; }
std::string text_of(std::int64_t x) { return std::to_string(x); }
std::string text_of(std::uint64_t x) { return std::to_string(x); }
std::string text_of(const std::string& x) { return x; }
std::string text_of(double x) {
  std::array<char, 32> buffer;
  return {buffer.data(), std::to_chars(buffer.data(), buffer.data() + buffer.size(), x).ptr};
}
template <class T>
std::string text_of(const std::optional<T>& x) {
  return x ? text_of(*x) : "none";
}

void parse(std::string_view text, Op& x) { parse_in(kOps, text, x); }
void parse(std::string_view text, Pattern& x) { parse_in(kPatterns, text, x); }
void parse(std::string_view text, DType& x) { parse_in(kDTypes, text, x); }
void parse(std::string_view text, ScheduleKind& x) { parse_in(kSchedules, text, x); }
void parse(std::string_view text, CacheFormat& x) { x = cache_format_from_string(text); }
void parse(std::string_view text, std::string& x) { x = text; }
template <class T>
  requires std::is_arithmetic_v<T>
void parse(std::string_view text, T& x) {
  std::conditional_t<std::is_same_v<T, bool>, int, T> number{};
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), number);
  if (error != std::errc{} || end != text.data() + text.size()) {
    throw std::invalid_argument("'" + std::string(text) + "' is not a number");
  }
  x = static_cast<T>(number);
}
template <class T>
void parse(std::string_view text, std::optional<T>& x) {
  if (text == "none") {
    x.reset();
  } else {
    parse(text, x.emplace());
  }
}

// Every field under its key.
template <class AnyCase, class Visit>
void visit_fields(AnyCase& c, Visit&& visit) {
  visit("name", c.name);
  visit("op", c.op);
  visit("B", c.batch);
  visit("Sq", c.q_len);
  visit("Sk", c.kv_len);
  visit("Hq", c.q_heads);
  visit("Hkv", c.kv_heads);
  visit("D", c.dim);
  visit("Dv", c.dim_v);
  visit("packed", c.packed);
  visit("ragged", c.ragged);
  visit("q", c.q);
  visit("k", c.k);
  visit("v", c.v);
  visit("q_partition", c.q_partition);
  visit("k_partition", c.k_partition);
  visit("v_partition", c.v_partition);
  visit("smooth_k", c.smooth_k);
  visit("smooth_v", c.smooth_v);
  visit("format", c.format);
  visit("page_size", c.page_size);
  visit("cache_partition", c.cache_partition);
  visit("shared_pages", c.shared_pages);
  visit("causal", c.causal);
  visit("left", c.left);
  visit("right", c.right);
  visit("softcap", c.softcap);
  visit("scale", c.scale);
  visit("sinks", c.sinks);
  visit("lse", c.lse);
  visit("pattern", c.pattern);
  visit("select_left", c.select_left);
  visit("select_right", c.select_right);
  visit("n_global", c.n_global);
  visit("width", c.width);
  visit("stride", c.stride);
  visit("block_q", c.block_q);
  visit("block_k", c.block_k);
  visit("mask_rank", c.mask_rank);
  visit("mask_batch", c.mask_batch);
  visit("mask_heads", c.mask_heads);
  visit("density", c.density);
  visit("lengths", c.lengths);
  visit("gaps", c.gaps);
  visit("align", c.align);
  visit("poison_seen", c.poison_seen);
  visit("spread", c.spread);
  visit("seed", c.seed);
  visit("threads", c.threads);
  visit("schedule", c.schedule);
  visit("split_size", c.split_size);
}

void random_types(Case& c, Random& r) {
  const DType floating =
      r.pick({DType::kFloat32, DType::kFloat32, DType::kBFloat16, DType::kBFloat16, DType::kFloat16});
  c.q = c.k = c.v = floating;
  if (c.op == Op::kDecode) {
    c.format = r.pick({CacheFormat::kFp32, CacheFormat::kBf16, CacheFormat::kFp16, CacheFormat::kInt8Baseline,
                       CacheFormat::kInt8A, CacheFormat::kInt8B, CacheFormat::kFp8});
    c.page_size = r.pick<std::int64_t>({1, 2, 3, 4, 8, 16, 24, 64, 128});
    c.cache_partition = 1;
    if (c.format == CacheFormat::kInt8A && r.chance(0.6)) {
      const std::int64_t divisor = r.pick<std::int64_t>({2, 3, 4, 8, 64});
      if (c.page_size % divisor == 0) c.cache_partition = divisor;
    }
    c.shared_pages = r.chance(0.3);
    return;
  }
  const auto partition = [&] { return r.pick<std::int64_t>({0, 0, 1, 3, 16, 64}); };
  if (r.chance(0.3)) {
    c.k = r.pick({DType::kInt8, DType::kInt8, DType::kFloat8E4M3});
    c.k_partition = partition();
    c.smooth_k = r.chance(0.3);
    if (c.k == DType::kInt8 && r.chance(0.7)) {
      c.q = DType::kInt8;
      c.q_partition = partition();
    }
  }
  if (r.chance(c.k == floating ? 0.1 : 0.7)) {
    c.v = c.k == floating ? r.pick({DType::kInt8, DType::kFloat8E4M3}) : c.k;
    c.v_partition = partition();
    c.smooth_v = r.chance(0.15);
  }
}

void random_shape(Case& c, Random& r) {
  const auto head_dim = [&] {
    const double kind = r.uniform();
    if (kind < 0.55) return r.pick<std::int64_t>({8, 16, 32, 64, 80, 96, 128});
    if (kind < 0.9) return r.integer(1, 70);
    return r.pick<std::int64_t>({160, 192, 255, 256, 512, 576});
  };
  c.dim = head_dim();
  c.dim_v = r.chance(0.6) ? c.dim : head_dim();
  if (r.chance(0.02)) {
    c.dim = 576;
    c.dim_v = 512;
  }
  c.kv_heads = r.pick<std::int64_t>({1, 1, 2, 3, 4});
  c.q_heads = c.kv_heads * r.pick<std::int64_t>({1, 1, 2, 3, 4, 5, 7, 8, 12, 16});
  c.batch = r.chance(0.02) ? 0 : r.pick<std::int64_t>({1, 1, 2, 3, 5});
  const auto length = [&](std::int64_t most) {
    const double kind = r.uniform();
    if (kind < 0.03) return std::int64_t{0};
    if (kind < 0.3)
      return std::min(most, r.pick<std::int64_t>({15, 16, 17, 31, 33, 63, 64, 65, 96, 97, 127, 128, 129, 256, 257}));
    return r.log_integer(1, most);
  };
  c.kv_len = length(600);
  if (c.op == Op::kDecode) {
    c.q_len = r.chance(0.5) ? 1 : r.integer(1, 16);
    if (r.chance(0.01)) c.q_len = 0;
    c.ragged = r.chance(0.7);
  } else {
    c.q_len = r.chance(0.4) ? c.kv_len : length(300);
    c.packed = r.chance(0.3);
    c.ragged = c.packed;
  }
  // What the oracle can do in a few milliseconds.
  const auto cost = [&] { return c.batch * c.q_heads * c.q_len * c.kv_len * (c.dim + c.dim_v); };
  while (cost() > 6'000'000) {
    const std::int64_t group = c.q_heads / c.kv_heads;
    switch (r.integer(0, 3)) {
      case 0: c.batch = (c.batch + 1) / 2; break;
      case 1: c.q_len = (c.q_len + 1) / 2; break;
      case 2: c.kv_len = (c.kv_len + 1) / 2; break;
      default:
        if (c.kv_heads > 1) {
          c.kv_heads = c.kv_heads - 1;
          c.q_heads = c.kv_heads * group;
        } else if (c.dim_v > 128) {
          c.dim_v = 128;
        }
    }
  }
}

void random_selection(Case& c, Random& r) {
  const auto some_length = [&] { return r.integer(0, std::max<std::int64_t>(c.kv_len, 1)); };
  const auto side = [&] {
    return r.chance(0.3) ? std::nullopt : std::optional(r.log_integer(1, some_length() + 1) - 1);
  };
  if (r.chance(0.15)) {
    c.left = side();
    c.right = side();
  }
  c.pattern = r.pick({Pattern::kNone, Pattern::kNone, Pattern::kNone, Pattern::kWindow, Pattern::kWindow,
                      Pattern::kStrided, Pattern::kBlocks, Pattern::kBlocks, Pattern::kTokens, Pattern::kQueryTokens});
  switch (c.pattern) {
    case Pattern::kNone: break;
    case Pattern::kWindow:
      c.select_left = side();
      c.select_right = side();
      if (r.chance(0.6)) c.n_global = r.log_integer(1, some_length() + 2) - 1;
      break;
    case Pattern::kStrided:
      c.width = r.log_integer(1, some_length() + 1) - 1;
      c.stride = r.log_integer(1, 80);
      break;
    case Pattern::kBlocks:
      c.block_q = r.pick<std::int64_t>({1, 3, 16, 64, 100, 128});
      c.block_k = r.pick<std::int64_t>({1, 5, 16, 64, 100, 128});
      c.mask_rank = r.integer(2, 4);
      c.mask_batch = c.mask_rank == 4 && r.chance(0.6) ? c.batch : 1;
      if (c.mask_rank >= 3) c.mask_heads = r.pick<std::int64_t>({1, c.kv_heads, c.q_heads});
      c.density = r.pick({0.0, 0.1, 0.5, 0.9});
      break;
    case Pattern::kTokens:
    case Pattern::kQueryTokens:
      c.density = r.pick({0.0, 0.05, 0.3, 1.0});
      c.lengths = r.chance(0.5);
      break;
  }
}

}  // namespace

std::string to_string(const Case& c) {
  std::vector<std::string> defaults;
  const Case default_case;
  visit_fields(default_case, [&](std::string_view, const auto& value) { defaults.push_back(text_of(value)); });
  std::string line;
  std::size_t i = 0;
  visit_fields(c, [&](std::string_view key, const auto& value) {
    const std::string text = text_of(value);
    if (text == defaults[i++]) return;
    if (!line.empty()) line += ',';
    line += std::string(key) + '=' + text;
  });
  return line;
}

Case parse_case(std::string_view line) {
  Case c;
  while (!line.empty()) {
    const std::string_view item = line.substr(0, line.find(','));
    line.remove_prefix(std::min(line.size(), item.size() + 1));
    const std::size_t equals = item.find('=');
    const std::string_view key = item.substr(0, equals);
    bool found = false;
    visit_fields(c, [&](std::string_view name, auto& value) {
      if (name != key || equals == std::string_view::npos) return;
      parse(item.substr(equals + 1), value);
      found = true;
    });
    if (!found) throw std::invalid_argument("'" + std::string(item) + "' is no field of a case");
  }
  return c;
}

Case random_case(std::uint64_t seed) {
  Random r(seed);
  Case c;
  c.seed = seed;
  c.op = r.chance(0.4) ? Op::kDecode : Op::kAttention;
  random_shape(c, r);
  random_types(c, r);
  random_selection(c, r);
  c.causal = r.chance(0.6);
  if (r.chance(0.2)) c.softcap = r.pick({1.0, 5.0, 30.0});
  if (r.chance(0.15)) c.scale = r.pick({0.0, -0.2, 0.05, 1.0});
  c.sinks = r.chance(0.2);
  c.lse = r.chance(0.8);
  c.gaps = r.chance(0.4);
  c.poison_seen = r.chance(0.15);
  if (r.chance(0.2)) c.spread = r.pick({0.0, 4.0, 10.0});
  c.threads = r.integer(1, 3);
  c.schedule = r.pick({ScheduleKind::kAuto, ScheduleKind::kTile, ScheduleKind::kStatic, ScheduleKind::kStealing});
  if (r.chance(0.4)) c.split_size = r.pick<std::int64_t>({1, 50, 64, 100, 128, 256});
  return c;
}

const std::vector<Case>& named_cases() {
  static const std::vector<Case> cases = [] {
    std::vector<Case> all;
    // Prefill: one request, 4 heads. int8-b: Q by token, K and V by tensor.
    for (const std::string type : {"fp32", "bf16", "int8-b"}) {
      for (const std::string mask : {"full", "causal", "window1024+64"}) {
        for (const std::int64_t dim : {64, 128}) {
          for (const std::int64_t length : {1024, 2048, 4096, 8192, 16384}) {
            const bool window = mask == "window1024+64";
            // The window is for long prompts; a full 16384 would take longer than all the rest.
            if (window ? length < 4096 : length == 16384 && (mask == "full" || dim == 128)) continue;
            Case c{.q_len = length, .kv_len = length, .q_heads = 4, .kv_heads = 4, .dim = dim, .dim_v = dim};
            c.name = "prefill/" + type + "/" + mask + "/d" + std::to_string(dim) + "/s" + std::to_string(length);
            c.lse = false;
            if (type == "int8-b") {
              c.q = c.k = c.v = DType::kInt8;
              c.q_partition = 1;
            } else {
              c.q = c.k = c.v = type == "bf16" ? DType::kBFloat16 : DType::kFloat32;
            }
            c.causal = mask != "full";
            if (window) {
              c.pattern = Pattern::kWindow;
              c.select_left = 1024;
              c.select_right = 0;
              c.n_global = 64;
            }
            all.push_back(c);
          }
        }
      }
    }
    // Decode: one new token a request.
    for (const CacheFormat format :
         {CacheFormat::kFp32, CacheFormat::kBf16, CacheFormat::kFp16, CacheFormat::kInt8Baseline, CacheFormat::kInt8A,
          CacheFormat::kInt8B, CacheFormat::kFp8}) {
      for (const auto& [batch, keys] : {std::pair<std::int64_t, std::int64_t>{1, 32768}, {8, 4096}}) {
        Case c{.op = Op::kDecode,
               .batch = batch,
               .q_len = 1,
               .kv_len = keys,
               .q_heads = 32,
               .kv_heads = 8,
               .dim = 128,
               .dim_v = 128};
        c.name = "decode/" + std::string(heddle::to_string(format)) + "/" + std::to_string(batch) + "x" +
                 std::to_string(keys);
        c.q = format == CacheFormat::kFp32 ? DType::kFloat32 : DType::kBFloat16;
        c.format = format;
        c.page_size = 64;
        c.causal = true;
        c.lse = false;
        all.push_back(c);
      }
    }
    // Latent attention (MLA): one KV head, 512 latent and 64 rotary features.
    all.push_back({.name = "decode/mla/bf16/1x8192",
                   .op = Op::kDecode,
                   .q_len = 1,
                   .kv_len = 8192,
                   .q_heads = 16,
                   .kv_heads = 1,
                   .dim = 576,
                   .dim_v = 512,
                   .q = DType::kBFloat16,
                   .format = CacheFormat::kBf16,
                   .page_size = 64,
                   .causal = true,
                   .lse = false});
    return all;
  }();
  return cases;
}

Case shrunk(Case c) {
  const std::int64_t factor = std::max<std::int64_t>(1, c.kv_len / 128);
  const auto shrink = [&](std::int64_t n) { return n == 0 ? 0 : std::max<std::int64_t>(1, n / factor); };
  c.q_len = shrink(c.q_len);
  c.kv_len = shrink(c.kv_len);
  if (c.select_left) c.select_left = shrink(*c.select_left);
  if (c.select_right) c.select_right = shrink(*c.select_right);
  c.n_global = shrink(c.n_global);
  c.lse = true;
  return c;
}

}  // namespace heddle::testing
