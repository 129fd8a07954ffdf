#include "heddle/cache.h"

#include <algorithm>
#include <array>
#include <atomic>
#include <cmath>
#include <cstdlib>
#include <limits>
#include <string>
#include <utility>
#include <vector>

#include "core/check.h"
#include "core/numeric.h"
#include "core/threads.h"
#include "host/quantize_kernels.h"
#include "store/bounds.h"
#include "store/rows.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace heddle {
namespace {

using store::TokenRows;

struct FormatInfo {
  CacheFormat format;
  std::string_view name;
  DType dtype;  // of K and V
};
constexpr std::array<FormatInfo, 7> kFormats = {{
    {CacheFormat::kFp32, "fp32", DType::kFloat32},
    {CacheFormat::kBf16, "bf16", DType::kBFloat16},
    {CacheFormat::kFp16, "fp16", DType::kFloat16},
    {CacheFormat::kInt8Baseline, "int8-baseline", DType::kInt8},
    {CacheFormat::kInt8A, "int8-a", DType::kInt8},
    {CacheFormat::kInt8B, "int8-b", DType::kInt8},
    {CacheFormat::kFp8, "fp8", DType::kFloat8E4M3},
}};

// Null for a value outside the enumeration.
const FormatInfo* info_of(CacheFormat format) {
  for (const FormatInfo& info : kFormats) {
    if (info.format == format) return &info;
  }
  return nullptr;
}

bool is_quantized(DType dtype) { return dtype == DType::kInt8 || dtype == DType::kFloat8E4M3; }

// Zeroed memory at a multiple of 64 bytes. The system hands it out page by page when it is first touched, so a large
// cache costs what it holds.
class Buffer {
 public:
  Buffer() = default;
  explicit Buffer(std::int64_t bytes) : bytes_(bytes) {
    memory_.reset(std::calloc(static_cast<std::size_t>(bytes) + kAlignment, 1));
    if (memory_ == nullptr) {
      check::fail(ErrorCode::kCapacity, "num_pages",
                  check::text("the system refused an allocation of ", bytes, " bytes; allowed are fewer pages"));
    }
#if defined(MADV_HUGEPAGE)
    constexpr std::uintptr_t kSmallPage = 4096;
    constexpr std::int64_t kHugePage = 2 << 20;
    if (bytes < 2 * kHugePage) return;
    const auto first = (reinterpret_cast<std::uintptr_t>(memory_.get()) + kSmallPage - 1) / kSmallPage * kSmallPage;
    // A wish: nothing is lost if the system does not grant it.
    madvise(reinterpret_cast<void*>(first), static_cast<std::size_t>(bytes) / kSmallPage * kSmallPage - kSmallPage,
            MADV_HUGEPAGE);
#endif
  }
  template <class T>
  T* as() const {
    const auto address = reinterpret_cast<std::uintptr_t>(memory_.get());
    return reinterpret_cast<T*>((address + kAlignment - 1) / kAlignment * kAlignment);
  }
  std::int64_t bytes() const { return bytes_; }

 private:
  static constexpr std::size_t kAlignment = 64;
  struct Free {
    void operator()(void* p) const { std::free(p); }
  };
  std::unique_ptr<void, Free> memory_;
  std::int64_t bytes_ = 0;
};

// Consecutive new tokens of one request that lie in one page.
struct Piece {
  std::int64_t request = 0;
  std::int64_t batch = 0, token = 0, count = 0;  // where they come from: rows token .. of this batch element
  std::int64_t page = 0, slot = 0;               // where they go
};

// Slots that a piece claims for itself.
struct Claim {
  std::int64_t page = 0, first = 0, last = 0, request = 0;
  std::int64_t written = 0;  // the end of its new tokens; `last` may lie beyond it
  bool operator<(const Claim& other) const { return page != other.page ? page < other.page : first < other.first; }
};

CacheConfig checked(CacheConfig config) {
  constexpr std::int64_t kMaxIndex = std::numeric_limits<std::int32_t>::max();  // tables and lengths are int32
  const auto positive = [](std::string_view argument, std::int64_t value, std::int64_t most) {
    if (value < 1 || value > most) {
      check::fail(ErrorCode::kValue, argument, check::text(value, "; allowed are 1 to ", most));
    }
  };
  if (info_of(config.format) == nullptr) {
    check::fail(ErrorCode::kValue, "format", check::text(static_cast<int>(config.format), " is not a CacheFormat"));
  }
  positive("num_pages", config.num_pages, kMaxIndex);
  positive("page_size", config.page_size, kMaxIndex);
  positive("num_kv_heads", config.num_kv_heads, kMaxIndex);
  positive("head_dim", config.head_dim, kMaxIndex);
  check::at_least("head_dim_v", config.head_dim_v, 0);
  if (config.head_dim_v == 0) config.head_dim_v = config.head_dim;
  positive("head_dim_v", config.head_dim_v, kMaxIndex);
  if (config.format == CacheFormat::kInt8A) {
    if (config.partition < 1 || config.page_size % config.partition != 0) {
      check::fail(ErrorCode::kValue, "partition",
                  check::text(config.partition, "; allowed are the divisors of page_size, ", config.page_size));
    }
  } else if (config.partition != 1) {
    check::fail(ErrorCode::kValue, "partition",
                check::text(config.partition, " with format ", to_string(config.format),
                            "; allowed is 1: only int8-a has scales per partition"));
  }
  if (config.device.type != DeviceType::kCpu) {
    check::fail(ErrorCode::kUnsupported, "device",
                check::text(to_string(config.device), "; a KV cache is offered on cpu only"));
  }
  return config;
}

std::int64_t byte_count(std::initializer_list<std::int64_t> sizes) {
  std::int64_t bytes = 1;
  for (const std::int64_t size : sizes) {
    if (__builtin_mul_overflow(bytes, size, &bytes) || bytes > std::numeric_limits<std::int64_t>::max() / 4) {
      check::fail(ErrorCode::kCapacity, "num_pages", "the cache would have more bytes than can be addressed");
    }
  }
  return bytes;
}

}  // namespace

std::string_view to_string(CacheFormat format) {
  const FormatInfo* info = info_of(format);
  return info == nullptr ? "unknown" : info->name;
}

CacheFormat cache_format_from_string(std::string_view name) {
  std::string allowed;
  for (const FormatInfo& info : kFormats) {
    if (info.name == name) return info.format;
    allowed += check::text(allowed.empty() ? "" : ", ", info.name);
  }
  check::fail(ErrorCode::kValue, "format", check::text("'", name, "' does not exist; allowed are ", allowed));
}

struct KVCache::State {
  CacheConfig config;
  DType dtype = DType::kFloat32;
  Buffer k, v, k_features, norms, k_scale, v_scale, q_scale, bounds, page_norms, page_tokens;
  bool holds_tokens = false;
  std::int64_t saturated = 0;
  // Scratch of append, kept so that appending a token does not allocate.
  std::vector<Piece> pieces;
  std::vector<Claim> claims;

  explicit State(const CacheConfig& wanted) : config(checked(wanted)), dtype(info_of(config.format)->dtype) {
    const CacheConfig& c = config;
    const auto size = static_cast<std::int64_t>(size_of(dtype));
    const std::int64_t k_bytes = byte_count({c.num_pages, c.num_kv_heads, c.page_size, c.head_dim, size});
    const std::int64_t v_bytes = byte_count({c.num_pages, c.num_kv_heads, c.page_size, c.head_dim_v, size});
    const std::int64_t slot_bytes = byte_count({c.num_pages, c.num_kv_heads, c.page_size, 4});
    k = Buffer(k_bytes);
    v = Buffer(v_bytes);
    if (c.feature_major) k_features = Buffer(k_bytes);
    norms = Buffer(slot_bytes);
    if (is_quantized(dtype)) {
      k_scale = Buffer(partitioned() ? slot_bytes / c.partition : 4);
      v_scale = Buffer(4);
    }
    if (static_q()) q_scale = Buffer(4);
    if (c.page_bounds) {
      const auto bound = static_cast<std::int64_t>(size_of(bounds_dtype()));
      bounds = Buffer(byte_count({c.num_pages, c.num_kv_heads, 2, c.head_dim, bound}));
      page_norms = Buffer(byte_count({c.num_pages, c.num_kv_heads, 4}));
      page_tokens = Buffer(byte_count({c.num_pages, 4}));
    }
  }

  bool partitioned() const { return config.format == CacheFormat::kInt8A; }
  bool static_k() const { return is_quantized(dtype) && !partitioned(); }
  bool static_v() const { return is_quantized(dtype); }
  DType bounds_dtype() const { return partitioned() ? DType::kFloat32 : dtype; }
  bool static_q() const { return config.format == CacheFormat::kInt8Baseline; }

  // A static scale of 0 has not been calibrated yet: its tokens so far, if any, were all zero, which reads the same
  // under any scale.
  bool needs_k_scale() const { return static_k() && *k_scale.as<float>() == 0.0f; }
  bool needs_v_scale() const { return static_v() && *v_scale.as<float>() == 0.0f; }

  // Row of (page, head, slot) in k, v or the norms, counted in rows.
  std::int64_t row(std::int64_t page, std::int64_t head, std::int64_t slot) const {
    return (page * config.num_kv_heads + head) * config.page_size + slot;
  }

  void plan(const TokenRows& keys, const TensorView& block_table, const TensorView& start,
            const TensorView& cu_seqlens);
  void check_claims();
  std::int64_t write(const Piece& piece, const TokenRows& keys, const TokenRows& values, float k_static,
                     float v_static);
  std::int64_t write_partitions(const Piece& piece, std::int64_t head, const TokenRows& keys);
  void transpose(const Piece& piece, std::int64_t head);
  void update_bounds();
  void update_bounds(std::int64_t page, std::int64_t first, std::int64_t last);
};

// Cuts the new tokens into pieces and checks that each has a place in the cache.
void KVCache::State::plan(const TokenRows& keys, const TensorView& block_table, const TensorView& start,
                          const TensorView& cu_seqlens) {
  constexpr std::int64_t kMaxPiece = 32;  // tokens, so that the pieces of one request can be dealt to several threads
  const std::int64_t page_size = config.page_size, table_tokens = block_table.shape[1] * page_size;
  pieces.clear();
  for (std::int64_t b = 0; b < block_table.shape[0]; ++b) {
    const auto* pages = block_table.as<const std::int32_t>() + b * block_table.strides[0];
    const auto* cu = cu_seqlens.as<const std::int32_t>();
    const std::int64_t first = start.as<const std::int32_t>()[b];
    const std::int64_t count = cu == nullptr ? keys.tokens : cu[b + 1] - cu[b];
    if (first < 0) {
      check::fail(ErrorCode::kValue, "start", check::text(first, " for request ", b, "; allowed are 0 and above"));
    }
    if (first + count > std::min<std::int64_t>(table_tokens, std::numeric_limits<std::int32_t>::max())) {
      check::fail(ErrorCode::kCapacity, "block_table",
                  check::text("request ", b, " has no page for position ", std::max(first, table_tokens), " of its ",
                              count, " new tokens from ", first, "; allowed are 0 to ", table_tokens - 1,
                              ", the tokens of ", block_table.shape[1], " pages"));
    }
    for (std::int64_t done = 0; done < count;) {
      const std::int64_t position = first + done, page = pages[position / page_size], slot = position % page_size;
      if (page < 0 || page >= config.num_pages) {
        check::fail(ErrorCode::kValue, "block_table",
                    check::text("page id ", page, " of request ", b, " at position ", position,
                                " is outside the cache; allowed are 0 to ", config.num_pages - 1));
      }
      const std::int64_t bound = partitioned() && config.partition > 1 ? config.partition - slot % config.partition
                                                                       : std::min(kMaxPiece, page_size - slot);
      const std::int64_t n = std::min(count - done, bound);
      pieces.push_back({.request = b,
                        .batch = cu == nullptr ? b : 0,
                        .token = cu == nullptr ? done : cu[b] + done,
                        .count = n,
                        .page = page,
                        .slot = slot});
      done += n;
    }
  }
  check_claims();
}

// No slot may be written twice in one call; nor a partition by two requests, each of which would set its scale.
void KVCache::State::check_claims() {
  const std::int64_t unit = partitioned() ? config.partition : 1;
  claims.clear();
  for (const Piece& piece : pieces) {
    const std::int64_t first = piece.slot / unit * unit;
    const std::int64_t last = std::max(first + unit, piece.slot + piece.count);
    claims.push_back({.page = piece.page,
                      .first = first,
                      .last = last,
                      .request = piece.request,
                      .written = piece.slot + piece.count});
  }
  if (!std::is_sorted(claims.begin(), claims.end())) std::sort(claims.begin(), claims.end());
  for (std::size_t i = 1; i < claims.size(); ++i) {
    const Claim &a = claims[i - 1], &b = claims[i];
    if (a.page != b.page || a.last <= b.first) continue;
    const auto [low, high] = std::minmax(a.request, b.request);
    check::fail(ErrorCode::kValue, "block_table",
                check::text("requests ", low, " and ", high, " both write slot ", b.first, " of page ", b.page,
                            unit > 1 ? check::text(" (or its partition of ", unit, " tokens)") : std::string(),
                            "; allowed is one writer"));
  }
}

// K of a piece in int8-a, one partition after the other. A partition that already holds tokens keeps its scale unless
// the new tokens exceed it; then what it holds is rounded again at the larger scale. Each growth adds at most half a
// step of the new scale to the error of the older tokens; n tokens in random order grow a maximum about ln n times.
std::int64_t KVCache::State::write_partitions(const Piece& piece, std::int64_t head, const TokenRows& keys) {
  const auto& kernels = host::quantize_kernels();
  const std::int64_t dim = config.head_dim, unit = config.partition;
  std::int64_t clamped = 0;
  for (std::int64_t done = 0; done < piece.count;) {
    const std::int64_t slot = piece.slot + done, group = slot / unit;
    const std::int64_t n = std::min(piece.count - done, (group + 1) * unit - slot);
    std::uint32_t bits = 0;
    for (std::int64_t i = 0; i < n; ++i) {
      const auto* x = keys.row(piece.batch, piece.token + done + i, head);
      bits = std::max(bits, kernels.max_abs_bits(x, keys.dtype, nullptr, dim));
    }
    float& scale = k_scale.as<float>()[row(piece.page, head, 0) / unit + group];
    const float wanted = store::scale_for(bits, DType::kInt8);
    const std::int64_t held = slot - group * unit;  // tokens of this partition that are there already
    if (held == 0) {
      scale = wanted;
    } else if (wanted > scale) {
      kernels.rescale(k.as<std::int8_t>() + row(piece.page, head, group * unit) * dim, held * dim, scale, wanted);
      scale = wanted;
    }
    for (std::int64_t i = 0; i < n; ++i) {
      clamped += kernels.quantize(keys.row(piece.batch, piece.token + done + i, head), keys.dtype, nullptr, dim, scale,
                                  k.as<std::int8_t>() + row(piece.page, head, slot + i) * dim, DType::kInt8);
    }
    done += n;
  }
  return clamped;
}

// Copies the piece's keys, as they are stored, to where they lie by feature.
void KVCache::State::transpose(const Piece& piece, std::int64_t head) {
  const std::int64_t dim = config.head_dim, page_size = config.page_size;
  // A partition that has grown is another one now, the tokens it held before included.
  const std::int64_t first = partitioned() ? piece.slot / config.partition * config.partition : piece.slot;
  const auto copy = [&](auto element) {
    using T = decltype(element);
    const T* from = k.as<T>() + row(piece.page, head, 0) * dim;
    T* to = k_features.as<T>() + row(piece.page, head, 0) * dim;
    for (std::int64_t d = 0; d < dim; ++d) {
      for (std::int64_t s = first; s < piece.slot + piece.count; ++s) to[d * page_size + s] = from[s * dim + d];
    }
  };
  switch (size_of(dtype)) {
    case 4: return copy(std::uint32_t{});
    case 2: return copy(std::uint16_t{});
    default: return copy(std::uint8_t{});
  }
}

std::int64_t KVCache::State::write(const Piece& piece, const TokenRows& keys, const TokenRows& values, float k_static,
                                   float v_static) {
  const auto& kernels = host::quantize_kernels();
  const auto size = static_cast<std::int64_t>(size_of(dtype));
  std::int64_t clamped = 0;
  const auto store_row = [&](const std::byte* x, DType from, std::int64_t dim, float scale, std::byte* out) {
    if (is_quantized(dtype)) {
      clamped += kernels.quantize(x, from, nullptr, dim, scale, out, dtype);
    } else {
      kernels.convert(x, from, dim, out, dtype);
    }
  };
  for (std::int64_t head = 0; head < config.num_kv_heads; ++head) {
    if (partitioned()) clamped += write_partitions(piece, head, keys);
    for (std::int64_t i = 0; i < piece.count; ++i) {
      const std::int64_t to = row(piece.page, head, piece.slot + i);
      if (!partitioned()) {
        store_row(keys.row(piece.batch, piece.token + i, head), keys.dtype, config.head_dim, k_static,
                  k.as<std::byte>() + to * config.head_dim * size);
      }
      const std::byte* value = values.row(piece.batch, piece.token + i, head);
      store_row(value, values.dtype, config.head_dim_v, v_static, v.as<std::byte>() + to * config.head_dim_v * size);
      const double squares = kernels.sum_squares(value, values.dtype, config.head_dim_v);
      norms.as<float>()[to] = static_cast<float>(std::sqrt(squares));
    }
    if (config.feature_major) transpose(piece, head);
  }
  return clamped;
}

// Bounds of the pages that were written, from what they hold now. Claims are sorted by page.
void KVCache::State::update_bounds() {
  std::vector<std::size_t> starts;
  for (std::size_t i = 0; i < claims.size(); ++i) {
    if (i == 0 || claims[i].page != claims[i - 1].page) starts.push_back(i);
  }
  const auto num_pages = static_cast<std::int64_t>(starts.size());
  const std::int64_t elements = num_pages * config.page_size * config.num_kv_heads * config.head_dim;
  for_ranges(num_pages, elements, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t n = begin; n < end; ++n) {
      const std::size_t i = starts[static_cast<std::size_t>(n)];
      const std::size_t next = n + 1 < num_pages ? starts[static_cast<std::size_t>(n) + 1] : claims.size();
      std::int64_t last = 0;
      for (std::size_t c = i; c < next; ++c) last = std::max(last, claims[c].written);
      update_bounds(claims[i].page, claims[i].first, last);
    }
  });
}

// Tokens [first, last) of a page are new. What was there before them is looked at again only if the bounds do not stand
// for just that, or may have been rounded again since.
void KVCache::State::update_bounds(std::int64_t page, std::int64_t first, std::int64_t last) {
  auto& covered = page_tokens.as<std::int32_t>()[page];
  const bool extend = covered == first && first > 0 && config.partition == 1;
  const std::int64_t from = extend ? first : 0, dim = config.head_dim;
  const auto size = static_cast<std::int64_t>(size_of(dtype));
  static thread_local store::BoundsRow high_low;
  for (std::int64_t head = 0; head < config.num_kv_heads; ++head) {
    std::byte* out = bounds.as<std::byte>() +
                     (page * config.num_kv_heads + head) * 2 * dim * static_cast<std::int64_t>(size_of(bounds_dtype()));
    float& norm = page_norms.as<float>()[page * config.num_kv_heads + head];
    high_low.start(dim);
    if (extend) high_low.load(out, bounds_dtype());
    if (!extend) norm = 0.0f;
    for (std::int64_t slot = from; slot < last; ++slot) {
      const std::int64_t at = row(page, head, slot);
      const float scale = partitioned() ? k_scale.as<float>()[at / config.partition] : 1.0f;
      high_low.add(k.as<std::byte>() + at * dim * size, dtype, scale, nullptr);
      const float x = norms.as<float>()[at];
      norm = x > norm || x != x ? x : norm;
    }
    high_low.store(out, bounds_dtype());
  }
  covered = static_cast<std::int32_t>(last);
}

KVCache::KVCache(const CacheConfig& config) : state_(std::make_unique<State>(config)) {}
KVCache::~KVCache() = default;
KVCache::KVCache(KVCache&&) noexcept = default;
KVCache& KVCache::operator=(KVCache&&) noexcept = default;

const CacheConfig& KVCache::config() const noexcept { return state_->config; }

TensorView KVCache::k() const noexcept {
  const CacheConfig& c = state_->config;
  return TensorView(state_->k.as<void>(), state_->dtype, {c.num_pages, c.num_kv_heads, c.page_size, c.head_dim});
}

TensorView KVCache::v() const noexcept {
  const CacheConfig& c = state_->config;
  return TensorView(state_->v.as<void>(), state_->dtype, {c.num_pages, c.num_kv_heads, c.page_size, c.head_dim_v});
}

TensorView KVCache::k_by_feature() const noexcept {
  const CacheConfig& c = state_->config;
  if (!c.feature_major) return {};
  return TensorView(state_->k_features.as<void>(), state_->dtype,
                    {c.num_pages, c.num_kv_heads, c.head_dim, c.page_size});
}

TensorView KVCache::k_scale() const noexcept {
  const CacheConfig& c = state_->config;
  if (!is_quantized(state_->dtype)) return {};
  if (!state_->partitioned()) return TensorView(state_->k_scale.as<void>(), DType::kFloat32, {1});
  return TensorView(state_->k_scale.as<void>(), DType::kFloat32,
                    {c.num_pages, c.num_kv_heads, c.page_size / c.partition});
}

TensorView KVCache::v_scale() const noexcept {
  if (!state_->static_v()) return {};
  return TensorView(state_->v_scale.as<void>(), DType::kFloat32, {1});
}

TensorView KVCache::q_scale() const noexcept {
  if (!state_->static_q()) return {};
  return TensorView(state_->q_scale.as<void>(), DType::kFloat32, {1});
}

TensorView KVCache::value_norms() const noexcept {
  const CacheConfig& c = state_->config;
  return TensorView(state_->norms.as<void>(), DType::kFloat32, {c.num_pages, c.num_kv_heads, c.page_size});
}

TensorView KVCache::page_bounds() const noexcept {
  const CacheConfig& c = state_->config;
  if (!c.page_bounds) return {};
  return TensorView(state_->bounds.as<void>(), state_->bounds_dtype(), {c.num_pages, c.num_kv_heads, 2, c.head_dim});
}

TensorView KVCache::page_norms() const noexcept {
  const CacheConfig& c = state_->config;
  if (!c.page_bounds) return {};
  return TensorView(state_->page_norms.as<void>(), DType::kFloat32, {c.num_pages, c.num_kv_heads});
}

TensorView KVCache::page_tokens() const noexcept {
  const CacheConfig& c = state_->config;
  if (!c.page_bounds) return {};
  return TensorView(state_->page_tokens.as<void>(), DType::kInt32, {c.num_pages});
}

bool KVCache::kv_calibrated() const noexcept { return !state_->needs_k_scale() && !state_->needs_v_scale(); }

bool KVCache::q_calibrated() const noexcept { return !state_->static_q() || *state_->q_scale.as<float>() != 0.0f; }

namespace {

void check_sample(std::string_view argument, const TensorView& x, std::int64_t heads, std::int64_t dim) {
  store::check_float_rows(argument, x);
  if (heads > 0) check::axis(argument, x, x.rank - 2, "heads", heads, "as in the cache");
  check::axis(argument, x, x.rank - 1, "head_dim", dim, "as in the cache");
  check::device(argument, x, {}, "the cache");
}

// The scale that a sample gives; refuses NaN and infinities.
float sample_scale(std::string_view argument, const TensorView& x, DType dtype) {
  const std::uint32_t bits = store::max_abs_bits(TokenRows(x));
  if (host::non_finite_bits(bits)) store::fail_non_finite(argument, x);
  return store::scale_for(bits, dtype);
}

}  // namespace

void KVCache::calibrate(const TensorView& k, const TensorView& v, const TensorView& q) {
  State& s = *state_;
  check_sample("k", k, s.config.num_kv_heads, s.config.head_dim);
  check_sample("v", v, s.config.num_kv_heads, s.config.head_dim_v);
  if (q.given()) check_sample("q", q, 0, s.config.head_dim);
  if (s.holds_tokens) {
    check::fail(ErrorCode::kValue, "cache",
                "it holds tokens of other scales; allowed is calibrating before the first append");
  }
  const float k_scale = s.static_k() ? sample_scale("k", k, s.dtype) : 0.0f;
  const float v_scale = s.static_v() ? sample_scale("v", v, s.dtype) : 0.0f;
  if (q.given()) calibrate_q(q);
  if (s.static_k()) *s.k_scale.as<float>() = k_scale;
  if (s.static_v()) *s.v_scale.as<float>() = v_scale;
}

void KVCache::calibrate_q(const TensorView& q) {
  check_sample("q", q, 0, state_->config.head_dim);
  if (state_->static_q()) *state_->q_scale.as<float>() = sample_scale("q", q, DType::kInt8);
}

void KVCache::append(const TensorView& k, const TensorView& v, const TensorView& block_table, const TensorView& start,
                     const TensorView& seq_lens, const TensorView& cu_seqlens) {
  State& s = *state_;
  const CacheConfig& c = s.config;
  check_sample("k", k, c.num_kv_heads, c.head_dim);
  check_sample("v", v, c.num_kv_heads, c.head_dim_v);
  check::dtype("v", v, {k.dtype});
  check::rank("v", v, k.rank);
  check::axis("v", v, 0, k.rank == 4 ? "batch" : "tokens", k.shape[0], "as in k");
  if (k.rank == 4) check::axis("v", v, 1, "tokens", k.shape[1], "as in k");

  check::index_array("block_table", block_table, c.device, "the cache");
  check::rank("block_table", block_table, 2);
  const std::int64_t batch = block_table.shape[0];
  const bool packed = cu_seqlens.given();
  if (packed) {
    check::rank("k", k, 3);
    check::index_array("cu_seqlens", cu_seqlens, c.device, "the cache");
    check::shape("cu_seqlens", cu_seqlens, {batch + 1});
    check::cu_seqlens("cu_seqlens", cu_seqlens, k.shape[0], "k");
  } else {
    check::rank("k", k, 4);
    check::axis("block_table", block_table, 0, "batch", k.shape[0], "as in k");
  }
  check::index_array("start", start, c.device, "the cache");
  check::shape("start", start, {batch});
  check::index_array("seq_lens", seq_lens, c.device, "the cache");
  check::shape("seq_lens", seq_lens, {batch});
  check::writable("seq_lens", seq_lens);

  const TokenRows keys(k), values(v);
  s.plan(keys, block_table, start, cu_seqlens);
  std::int64_t tokens = 0;
  for (const Piece& piece : s.pieces) tokens += piece.count;
  const std::int64_t elements = tokens * c.num_kv_heads * (c.head_dim + c.head_dim_v);
  const auto num_pieces = static_cast<std::int64_t>(s.pieces.size());

  if (is_quantized(s.dtype) && tokens > 0) {
    // Only the rows that will be written count: a packed tensor may be longer than its sequences.
    const auto& kernels = host::quantize_kernels();
    std::atomic<std::uint32_t> k_bits{0}, v_bits{0};
    for_ranges(num_pieces, elements, [&](std::int64_t first, std::int64_t last) {
      std::uint32_t k_max = 0, v_max = 0;
      for (std::int64_t i = first; i < last; ++i) {
        const Piece& piece = s.pieces[i];
        for (std::int64_t t = piece.token; t < piece.token + piece.count; ++t) {
          for (std::int64_t h = 0; h < c.num_kv_heads; ++h) {
            k_max = std::max(k_max, kernels.max_abs_bits(keys.row(piece.batch, t, h), keys.dtype, nullptr, c.head_dim));
            v_max = std::max(v_max,
                             kernels.max_abs_bits(values.row(piece.batch, t, h), values.dtype, nullptr, c.head_dim_v));
          }
        }
      }
      store::raise_to(k_bits, k_max);
      store::raise_to(v_bits, v_max);
    });
    const auto written = [&](TensorView x) {
      if (packed) x.shape[0] = cu_seqlens.as<const std::int32_t>()[batch];
      return x;
    };
    if (host::non_finite_bits(k_bits)) store::fail_non_finite("k", written(k));
    if (host::non_finite_bits(v_bits)) store::fail_non_finite("v", written(v));
    if (s.needs_k_scale()) *s.k_scale.as<float>() = store::scale_for(k_bits, s.dtype);
    if (s.needs_v_scale()) *s.v_scale.as<float>() = store::scale_for(v_bits, s.dtype);
  }

  // From here on nothing fails.
  const float k_static = s.static_k() ? *s.k_scale.as<float>() : 0.0f;
  const float v_static = s.static_v() ? *s.v_scale.as<float>() : 0.0f;
  std::atomic<std::int64_t> clamped{0};
  for_ranges(num_pieces, elements, [&](std::int64_t first, std::int64_t last) {
    std::int64_t mine = 0;
    for (std::int64_t i = first; i < last; ++i) mine += s.write(s.pieces[i], keys, values, k_static, v_static);
    clamped.fetch_add(mine, std::memory_order_relaxed);
  });
  if (c.page_bounds) s.update_bounds();
  s.saturated += clamped.load();
  s.holds_tokens = s.holds_tokens || tokens > 0;

  const auto* cu = cu_seqlens.as<const std::int32_t>();
  for (std::int64_t b = 0; b < batch; ++b) {
    const auto count = static_cast<std::int32_t>(packed ? cu[b + 1] - cu[b] : k.shape[1]);
    seq_lens.as<std::int32_t>()[b] = start.as<const std::int32_t>()[b] + count;
  }
}

std::int64_t KVCache::saturated() const noexcept { return state_->saturated; }

double KVCache::bytes_per_token() const noexcept {
  const State& s = *state_;
  const std::int64_t bytes = s.k.bytes() + s.k_features.bytes() + s.v.bytes() + s.norms.bytes() +
                             (s.partitioned() ? s.k_scale.bytes() : 0) + s.bounds.bytes() + s.page_norms.bytes() +
                             s.page_tokens.bytes();
  return static_cast<double>(bytes) /
         (static_cast<double>(s.config.num_pages) * static_cast<double>(s.config.page_size));
}

std::int64_t KVCache::nbytes() const noexcept {
  const State& s = *state_;
  return s.k.bytes() + s.k_features.bytes() + s.v.bytes() + s.norms.bytes() + s.k_scale.bytes() + s.v_scale.bytes() +
         s.q_scale.bytes() + s.bounds.bytes() + s.page_norms.bytes() + s.page_tokens.bytes();
}

}  // namespace heddle
