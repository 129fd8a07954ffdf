// The DSA indexer: scores of every (query, key) by a few heads of small dimension, and the exact largest k of each
// query.
//
// Keys are packed by 64 as attention packs them, and multiplied by all heads of a query in register blocks, ReLU and
// the weighted sum included: a score is one number when it leaves the registers. Limit: Hi * Di multiply-adds a pair.
// One query of few heads reads keys where they lie, as decode does: packing would be most of the work. Limit: reading.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "core/check.h"
#include "core/front.h"
#include "core/numeric.h"
#include "host/quantize_kernels.h"
#include "host/select_kernels.h"
#include "host/tile_kernels.h"
#include "host/workspace.h"
#include "select/lists.h"
#include "select/scores.h"
#include "select/visibility.h"

namespace heddle::select {
namespace {

using host::kTileKeys;
using host::Math;

constexpr std::int64_t kQueries = 8;   // that read a packed tile while it is near
constexpr std::int64_t kChunk = 1024;  // keys of an item
constexpr std::int64_t kDirectChunk = 2048;
constexpr std::int64_t kDirectHeads = 16;  // with more of them, packed keys are multiplied in less time
constexpr std::int64_t kMaxDim = 576;

// What products run in: exact for what the operands hold.
Math math_of(const Problem& p) {
  if (!host::tile_kernels().native_words) return Math::kFloat32;
  if (p.quantize_q || p.q.dtype == DType::kInt8) return Math::kInt8;
  const bool keys = p.k.dtype == DType::kBFloat16 || p.k.dtype == DType::kInt8 || p.k.dtype == DType::kFloat8E4M3;
  return keys && p.q.dtype == DType::kBFloat16 ? Math::kBFloat16 : Math::kFloat32;
}

// Queries [first, last) of a request, packed.
class Queries {
 public:
  Queries(const Problem& p, Math math)
      : p_(p),
        math_(math),
        words_(host::query_words(p.q.dim, math)),
        heads_(p.num_q_heads),
        padded_((p.num_q_heads + host::kIndexRows - 1) / host::kIndexRows * host::kIndexRows) {
    std::int64_t most = 1;
    for (const Request& r : p.requests) most = std::max(most, std::min(r.q_len, kQueries));
    queries_.resize(static_cast<std::size_t>(most * padded_ * words_));
    row_sums_.resize(static_cast<std::size_t>(most * padded_));
    weights_.resize(static_cast<std::size_t>(most * heads_));
    sources_.resize(static_cast<std::size_t>(heads_));
    quantized_.resize(static_cast<std::size_t>(heads_ * p.q.dim));
  }

  // weight(query, head) of the request.
  template <class Weight>
  void pack(const Request& r, std::int64_t first, std::int64_t last, float key_factor, Weight&& weight) {
    const auto& tile = host::tile_kernels();
    for (std::int64_t i = first; i < last; ++i) {
      const std::int64_t at = i - first;
      DType dtype = p_.q.dtype;
      for (std::int64_t h = 0; h < heads_; ++h) {
        const auto n = static_cast<std::size_t>(h);
        sources_[n] = p_.q.row(r.q_page, h, r.q_first + i);
        float scale = p_.q.scale_of(r.q_page, h, r.q_first + i);
        if (p_.quantize_q) {
          scale = query_scale(p_, sources_[n]);
          std::int8_t* out = quantized_.data() + h * p_.q.dim;
          host::quantize_kernels().quantize(sources_[n], p_.q.dtype, nullptr, p_.q.dim, scale, out, DType::kInt8);
          sources_[n] = reinterpret_cast<const std::byte*>(out);
          dtype = DType::kInt8;
        }
        weights_[static_cast<std::size_t>(at * heads_ + h)] =
            weight(i, h) * scale * key_factor * std::fabs(static_cast<float>(p_.scale));
      }
      std::uint32_t* out = queries_.data() + at * padded_ * words_;
      std::fill(out + heads_ * words_, out + padded_ * words_, 0u);
      std::fill_n(row_sums_.data() + at * padded_, padded_, 0);
      tile.pack_queries({sources_.data(), heads_, p_.q.dim, dtype, nullptr}, math_, p_.scale < 0.0, out,
                        row_sums_.data() + at * padded_);
    }
  }

  host::IndexQuery get(std::int64_t i) const {
    return {.queries = queries_.data() + i * padded_ * words_,
            .row_sums = row_sums_.data() + i * padded_,
            .weights = weights_.data() + i * heads_,
            .rows = heads_,
            .words = words_};
  }

 private:
  const Problem& p_;
  const Math math_;
  const std::int64_t words_, heads_, padded_;
  std::vector<std::uint32_t> queries_;
  std::vector<std::int32_t> row_sums_;
  std::vector<float> weights_;
  std::vector<const std::byte*> sources_;
  std::vector<std::int8_t> quantized_;
};

class Indexer {
 public:
  Indexer(const Problem& problem, const TensorView& q, const IndexerOptions& options)
      : p_(problem),
        options_(options),
        tile_(host::tile_kernels()),
        kernels_(host::select_kernels()),
        math_(math_of(problem)),
        tile_bytes_(host::key_tile_bytes(problem.k.dim, math_)),
        lists_(q, problem.packed, 1) {
    if (p_.k.scale != nullptr && p_.k.partition == 0) key_factor_ = p_.k.scale[0];
  }

  Selection run();

 private:
  struct Item {
    std::size_t first, last;  // jobs, of one request
    std::int64_t begin, end;  // keys
  };
  struct Worker {
    Worker(const Problem& p, Math math, std::size_t tile_bytes) : queries(p, math), scores(p) {
      host::tile_kernels().begin_thread();
      keys.reserve(tile_bytes);
    }
    Worker(Worker&&) = delete;
    ~Worker() { host::tile_kernels().end_thread(); }
    Queries queries;
    KeyScores scores;
    host::Workspace keys;
    float scale[kTileKeys];
  };
  void make_jobs();
  void run_batch(std::size_t first, std::size_t last, std::int64_t floats);
  void run_item(const Item& item, const std::vector<float*>& at, std::size_t batch, Worker& w) const;
  void run_direct(const Item& item, float* out, Worker& w) const;
  // Whether keys are multiplied where they lie: the products must be those of packed keys.
  bool direct(const Item& item) const {
    const bool native = (math_ == Math::kBFloat16 && p_.k.dtype == DType::kBFloat16) || math_ == Math::kInt8;
    return native && item.last - item.first == 1 && p_.num_q_heads <= kDirectHeads &&
           packed_request_ != jobs_[item.first].request;
  }
  // Keys of tile `tile` of the request; their scales too, if they have their own.
  void pack(const Request& r, std::int64_t tile, std::byte* keys, float* scale) const;
  void fetch(const Request& r, std::int64_t tile) const;
  float weight(const Request& r, std::int64_t request, std::int64_t query, std::int64_t head) const {
    const TensorView& w = options_.weights;
    const std::int64_t at =
        w.rank == 3 ? request * w.strides[0] + query * w.strides[1] : (r.q_first + query) * w.strides[0];
    return load_as_float(w.data, w.dtype, at + head * w.strides[w.rank - 1]);
  }
  [[noreturn]] void fail(const ListJob& job) const;

  const Problem& p_;
  const IndexerOptions& options_;
  const host::TileKernels& tile_;
  const host::SelectKernels& kernels_;
  const Math math_;
  const std::size_t tile_bytes_;
  float key_factor_ = 1.0f;
  TokenLists lists_;
  std::vector<ListJob> jobs_;
  // Packed tiles of a request that several items read, and their scales.
  std::int64_t packed_request_ = -1;
  host::Workspace packed_;
  std::vector<float> packed_scale_;
};

void Indexer::make_jobs() {
  for (std::size_t b = 0; b < p_.requests.size(); ++b) {
    const Request& r = p_.requests[b];
    const Visibility seen(p_, static_cast<std::int64_t>(b), 0);
    for (std::int64_t i = 0; i < r.q_len; ++i) {
      const auto [begin, end] = seen.allowed_keys(i);
      ListJob job{.request = static_cast<std::int32_t>(b),
                  .query = static_cast<std::int32_t>(i),
                  .row = lists_.row(r, static_cast<std::int64_t>(b), i, 0),
                  .begin = std::min(begin, end),
                  .end = end};
      set_budget(options_.budget, options_.n_sink, options_.n_recent, job);
      jobs_.push_back(job);
    }
  }
}

Selection Indexer::run() {
  make_jobs();
  lists_.allocate(jobs_);
  // Whole tiles: scores start at a multiple of 64 and run over the end.
  const auto floats = [&](std::size_t n) { return jobs_[n].contested() + 2 * kTileKeys; };
  // One request at a time if it has many queries.
  const auto queries = [&](std::size_t n) { return p_.requests[static_cast<std::size_t>(jobs_[n].request)].q_len; };
  const auto ends = [&](std::size_t n) {
    return jobs_[n].request != jobs_[n - 1].request && std::max(queries(n), queries(n - 1)) > kQueries;
  };
  for_batches(jobs_.size(), 1, floats, ends,
              [&](std::size_t first, std::size_t last, std::int64_t total) { run_batch(first, last, total); });
  return lists_.selection();
}

void Indexer::run_batch(std::size_t first, std::size_t last, std::int64_t floats) {
  static thread_local host::Workspace workspace;
  float* scores = reinterpret_cast<float*>(workspace.reserve(static_cast<std::size_t>(floats) * 4));
  std::vector<float*> at(last - first);  // where the score of the first tile's first key goes
  std::vector<Item> items;
  double work = 0.0;
  for (std::size_t n = first; n < last;) {
    // Queries of one request, a few at a time, and the keys that some of them rank.
    Item item{.first = n, .last = n, .begin = jobs_[n].middle, .end = jobs_[n].recent};
    for (; item.last < last && item.last < n + kQueries && jobs_[item.last].request == jobs_[n].request; ++item.last) {
      const ListJob& job = jobs_[item.last];
      at[item.last - first] = scores;
      scores += job.contested() + 2 * kTileKeys;
      if (job.open() == job.contested()) continue;
      item.begin = std::min(item.begin, job.middle);
      item.end = std::max(item.end, job.recent);
      work += static_cast<double>(job.contested() * p_.num_q_heads * p_.q.dim);
    }
    const std::int64_t begin = item.begin / kTileKeys * kTileKeys, end = item.end;
    const std::int64_t chunk = direct(item) ? kDirectChunk : kChunk;
    for (std::int64_t k = begin; k < end; k += chunk) {
      items.push_back({.first = n, .last = item.last, .begin = k, .end = std::min(end, k + chunk)});
    }
    n = item.last;
  }
  // Packing ahead pays if a packed tile is read more than once.
  const Request& r = p_.requests[static_cast<std::size_t>(jobs_[first].request)];
  const bool one = jobs_[first].request == jobs_[last - 1].request;
  if (one && static_cast<std::int64_t>(last - first) > kQueries && packed_request_ != jobs_[first].request) {
    const std::int64_t tiles = (r.kv_len + kTileKeys - 1) / kTileKeys;
    std::byte* keys = packed_.reserve(static_cast<std::size_t>(tiles) * tile_bytes_);
    packed_scale_.resize(static_cast<std::size_t>(tiles * kTileKeys));
    for_items(tiles, static_cast<double>(r.kv_len * p_.k.dim) * 4.0, stateless, [&](int, std::int64_t t) {
      pack(r, t, keys + static_cast<std::size_t>(t) * tile_bytes_, packed_scale_.data() + t * kTileKeys);
    });
    packed_request_ = jobs_[first].request;
  }
  if (!one) packed_request_ = -1;
  for_items(
      static_cast<std::int64_t>(items.size()), work, [&] { return Worker(p_, math_, tile_bytes_); },
      [&](Worker& w, std::int64_t i) { run_item(items[static_cast<std::size_t>(i)], at, first, w); });
  std::vector<std::uint8_t> bad(last - first, 0);
  for_items(static_cast<std::int64_t>(last - first), work, stateless, [&](int, std::int64_t n) {
    const ListJob& job = jobs_[first + static_cast<std::size_t>(n)];
    const float* metric = at[static_cast<std::size_t>(n)] + job.middle % kTileKeys;
    bad[static_cast<std::size_t>(n)] = lists_.write(job, metric) ? 0 : 1;
  });
  for (std::size_t n = first; n < last; ++n) {
    if (bad[n - first] != 0) fail(jobs_[n]);
  }
  workspace.trim(static_cast<std::size_t>(kBatchFloats) * 4);
}

void Indexer::pack(const Request& r, std::int64_t tile, std::byte* keys, float* scale) const {
  const std::byte* rows[kTileKeys];
  const std::int64_t begin = tile * kTileKeys, count = std::min<std::int64_t>(kTileKeys, r.kv_len - begin);
  for (std::int64_t at = 0; at < count;) {
    const Place place = place_of(p_, r, begin + at);
    std::int64_t run = count - at;
    if (p_.page_size > 0) run = std::min(run, p_.page_size - place.slot);
    const std::byte* row = p_.k.row(place.page, 0, place.slot);
    for (std::int64_t i = 0; i < run; ++i) rows[at + i] = row + i * p_.k.slot_stride;
    for (std::int64_t i = 0; p_.k.partition > 0 && i < run; ++i) {
      // A negative scale would turn ReLU around: it ranks as NaN, which is refused.
      const float x = p_.k.scale_of(place.page, 0, place.slot + i);
      scale[at + i] = x < 0.0f ? __builtin_nanf("") : x;
    }
    at += run;
  }
  if (p_.k.partition > 0) std::fill(scale + count, scale + kTileKeys, 0.0f);
  tile_.pack_keys({rows, count, p_.k.dim, p_.k.dtype, nullptr}, math_, keys);
}

// The keys of a tile that is soon to be packed: into the second-level cache, while others are multiplied.
void Indexer::fetch(const Request& r, std::int64_t tile) const {
  const std::int64_t begin = tile * kTileKeys, end = std::min<std::int64_t>(begin + kTileKeys, r.kv_len);
  const std::int64_t bytes = p_.k.dim * static_cast<std::int64_t>(size_of(p_.k.dtype));
  for (std::int64_t key = begin; key < end;) {
    const Place place = place_of(p_, r, key);
    std::int64_t run = end - key;
    if (p_.page_size > 0) run = std::min(run, p_.page_size - place.slot);
    const std::byte* row = p_.k.row(place.page, 0, place.slot);
    for (std::int64_t i = 0; i < run; ++i) {
      for (std::int64_t b = 0; b < bytes; b += 64) __builtin_prefetch(row + i * p_.k.slot_stride + b, 0, 2);
    }
    key += run;
  }
}

void Indexer::run_item(const Item& item, const std::vector<float*>& at, std::size_t batch, Worker& w) const {
  const ListJob& head = jobs_[item.first];
  const Request& r = p_.requests[static_cast<std::size_t>(head.request)];
  if (direct(item)) {
    return run_direct(item, at[item.first - batch] + (item.begin - head.middle / kTileKeys * kTileKeys), w);
  }
  const bool packed = packed_request_ == head.request;
  std::byte* own = w.keys.reserve(tile_bytes_);
  w.queries.pack(r, head.query, jobs_[item.last - 1].query + 1, key_factor_,
                 [&](std::int64_t i, std::int64_t h) { return weight(r, head.request, i, h); });
  for (std::int64_t key = item.begin; key < item.end; key += kTileKeys) {
    const std::int64_t tile = key / kTileKeys;
    const std::byte* keys = own;
    const float* scale = w.scale;
    if (packed) {
      keys = packed_.data() + static_cast<std::size_t>(tile) * tile_bytes_;
      scale = packed_scale_.data() + key;
    } else {
      if (key + kTileKeys < item.end) fetch(r, tile + 1);
      pack(r, tile, own, w.scale);
    }
    for (std::size_t n = item.first; n < item.last; ++n) {
      const ListJob& job = jobs_[n];
      if (job.open() == job.contested() || key + kTileKeys <= job.middle || key >= job.recent) continue;
      float* out = at[n - batch] + (key - job.middle / kTileKeys * kTileKeys);
      kernels_.index_tile(w.queries.get(static_cast<std::int64_t>(n - item.first)), math_, keys, out);
      for (int i = 0; p_.k.partition > 0 && i < kTileKeys; ++i) out[i] *= scale[i];
    }
  }
}

void Indexer::run_direct(const Item& item, float* out, Worker& w) const {
  const ListJob& job = jobs_[item.first];
  const Request& r = p_.requests[static_cast<std::size_t>(job.request)];
  float weights[kDirectHeads];
  for (std::int64_t h = 0; h < p_.num_q_heads; ++h) weights[h] = weight(r, job.request, job.query, h);
  w.scores.set_query(job.request, job.query, 0, 1);
  w.scores.for_blocks(item.begin, item.end,
                      [&](std::int64_t, std::int64_t row, const host::RawScores& block, std::int64_t key) {
                        float* metric = out + (key - item.begin);
                        kernels_.index(block, weights + row, row == 0, metric);
                        for (int i = 0; block.key_scale != nullptr && i < block.count; ++i) {
                          if (block.key_scale[i] < 0.0f) metric[i] = __builtin_nanf("");  // as in pack
                        }
                      });
}

// Finds out whose fault it is.
void Indexer::fail(const ListJob& job) const {
  const Request& r = p_.requests[static_cast<std::size_t>(job.request)];
  const std::string where = check::text("request ", job.request, ", query ", job.query);
  for (std::int64_t h = 0; h < p_.num_q_heads; ++h) {
    if (!is_finite(weight(r, job.request, job.query, h))) {
      check::fail(ErrorCode::kValue, "weights",
                  check::text("not finite for ", where, ", head ", h, "; allowed are finite numbers"));
    }
  }
  const bool query = query_has_nan(p_, job.request, job.query, 0);
  check::fail(
      ErrorCode::kValue, query ? "q" : "k",
      check::text("a score is NaN (or a scale below 0) for ", where, "; allowed are scores that can be ranked"));
}

// Before the call is looked at, where several heads would be blamed on q.
void check_one_key(std::int64_t heads) {
  if (heads == 1) return;
  check::fail(ErrorCode::kShape, "k", check::text(heads, " heads; allowed is 1: one index key a token"));
}

void check_options(const Problem& problem, const TensorView& q, const IndexerOptions& options) {
  check_call(problem);
  check_budget(options.budget);
  check_always(options.budget, options.n_sink, options.n_recent);
  if (problem.k.mean != nullptr) {
    check::fail(ErrorCode::kUnsupported, "k", "smoothed index keys; the indexer takes those without a mean");
  }
  if (problem.q.dim > kMaxDim) {
    check::fail(ErrorCode::kUnsupported, "q",
                check::text("index heads of ", problem.q.dim, "; the indexer takes up to ", kMaxDim));
  }
  if (problem.softcap != 0.0) check::fail(ErrorCode::kValue, "softcap", "given; allowed is 0: index scores have none");
  if (problem.sinks != nullptr) check::fail(ErrorCode::kValue, "sinks", "given; allowed is none: an indexer has none");
  const TensorView& w = options.weights;
  check::given("weights", w);
  check::dtype("weights", w, {DType::kFloat32, DType::kFloat16, DType::kBFloat16});
  check::device("weights", w, problem.device, "q");
  if (problem.packed) {
    check::shape("weights", w, {q.shape[0], q.shape[1]});
  } else {
    check::shape("weights", w, {q.shape[0], q.shape[1], q.shape[2]});
  }
}

}  // namespace

Selection indexer(const AttentionParams& given, const IndexerOptions& options) {
  if (given.k.rank >= 3) check_one_key(given.k.shape[given.k.rank - 2]);
  AttentionParams call = given;
  call.v = call.k;
  call.v_scales = call.k_scales;
  call.scale = call.scale.value_or(1.0);
  const Problem problem = problem_of(call, false);
  check_options(problem, call.q, options);
  return Indexer(problem, call.q, options).run();
}

Selection indexer(const DecodeParams& given, const IndexerOptions& options) {
  if (given.cache != nullptr) check_one_key(given.cache->config().num_kv_heads);
  DecodeParams call = given;
  call.scale = call.scale.value_or(1.0);
  Problem problem = problem_of(call, false);
  check_options(problem, call.q, options);
  set_query_scale(call, problem);
  return Indexer(problem, call.q, options).run();
}

}  // namespace heddle::select
