// The paged KV cache against a model of it: what every slot, scale and norm holds after any sequence of appends, and
// that a refused append changes nothing.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <numeric>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include <gtest/gtest.h>

#include "core/numeric.h"
#include "heddle/backend.h"
#include "heddle/cache.h"
#include "heddle/error.h"

namespace heddle {
namespace {

constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();
constexpr float kInf = std::numeric_limits<float>::infinity();

constexpr CacheFormat kAllFormats[] = {CacheFormat::kFp32,         CacheFormat::kBf16,  CacheFormat::kFp16,
                                       CacheFormat::kInt8Baseline, CacheFormat::kInt8A, CacheFormat::kInt8B,
                                       CacheFormat::kFp8};

DType storage_of(CacheFormat format) {
  switch (format) {
    case CacheFormat::kFp32: return DType::kFloat32;
    case CacheFormat::kBf16: return DType::kBFloat16;
    case CacheFormat::kFp16: return DType::kFloat16;
    case CacheFormat::kFp8: return DType::kFloat8E4M3;
    default: return DType::kInt8;
  }
}

// What the cache's header promises, one value after the other.
struct Model {
  CacheConfig c;
  DType dtype;
  std::vector<double> k, v;           // stored values (codes of int8, values of the other types)
  std::vector<float> k_scale, norms;  // k_scale: per partition of int8-a
  float k_static = 0, v_static = 0;
  std::int64_t saturated = 0;

  explicit Model(const CacheConfig& config) : c(config), dtype(storage_of(c.format)) {
    if (c.head_dim_v == 0) c.head_dim_v = c.head_dim;
    const std::int64_t slots = c.num_pages * c.num_kv_heads * c.page_size;
    k.resize(static_cast<std::size_t>(slots * c.head_dim));
    v.resize(static_cast<std::size_t>(slots * c.head_dim_v));
    norms.resize(static_cast<std::size_t>(slots));
    k_scale.resize(static_cast<std::size_t>(slots / c.partition));
  }
  bool partitioned() const { return c.format == CacheFormat::kInt8A; }
  bool quantized() const { return dtype == DType::kInt8 || dtype == DType::kFloat8E4M3; }
  std::int64_t row(std::int64_t page, std::int64_t head, std::int64_t slot) const {
    return (page * c.num_kv_heads + head) * c.page_size + slot;
  }
  double store(double exact, float scale) {
    double out = 0;
    if (!quantized()) {
      store_from_double(&out, dtype, 0, exact);
      return load_as_double(&out, dtype, 0);
    }
    if (scale == 0) return 0;
    const float t = static_cast<float>(exact) / scale;
    if (dtype == DType::kInt8) {
      const float rounded = std::nearbyint(t);
      saturated += std::fabs(rounded) > 127 ? 1 : 0;
      return std::clamp(rounded, -127.0f, 127.0f);
    }
    saturated += std::fabs(t) > 464 ? 1 : 0;
    return e4m3_to_float(float_to_e4m3_saturating(t));
  }
  // One run of a request's tokens: x(token, head, d), written at `position` and above.
  template <class K, class V>
  void append(const std::vector<std::int32_t>& pages, std::int64_t position, std::int64_t count, K&& key, V&& value) {
    for (std::int64_t h = 0; h < c.num_kv_heads; ++h) {
      for (std::int64_t t = 0; t < count;) {
        const std::int64_t at = position + t, page = pages[at / c.page_size], slot = at % c.page_size;
        // A run within one partition.
        const std::int64_t n = std::min(count - t, c.partition - slot % c.partition);
        float scale = k_static;
        if (partitioned()) {
          const std::int64_t group = slot / c.partition;
          float& stored = k_scale[row(page, h, 0) / c.partition + group];
          float biggest = 0;
          for (std::int64_t i = 0; i < n; ++i) {
            for (std::int64_t d = 0; d < c.head_dim; ++d) {
              biggest = std::max(biggest, std::fabs(static_cast<float>(key(t + i, h, d))));
            }
          }
          const float wanted = biggest / 127;
          if (slot % c.partition == 0) {
            stored = wanted;
          } else if (wanted > stored) {
            for (std::int64_t old = row(page, h, group * c.partition); old < row(page, h, slot); ++old) {
              for (std::int64_t d = 0; d < c.head_dim; ++d) {
                double& code = k[old * c.head_dim + d];
                code = std::nearbyint(static_cast<float>(code) * stored / wanted);
              }
            }
            stored = wanted;
          }
          scale = stored;
        }
        for (std::int64_t i = 0; i < n; ++i) {
          const std::int64_t to = row(page, h, slot + i);
          double squares = 0;
          for (std::int64_t d = 0; d < c.head_dim; ++d) k[to * c.head_dim + d] = store(key(t + i, h, d), scale);
          for (std::int64_t d = 0; d < c.head_dim_v; ++d) {
            const double exact = value(t + i, h, d);
            const auto x = static_cast<float>(exact);
            v[to * c.head_dim_v + d] = store(exact, v_static);
            squares += static_cast<double>(x) * x;
          }
          norms[to] = static_cast<float>(std::sqrt(squares));
        }
        t += n;
      }
    }
  }
};

void expect_holds(const KVCache& cache, const Model& model) {
  const auto compare = [](const TensorView& view, const auto& want, const char* name) {
    ASSERT_EQ(view.numel(), static_cast<std::int64_t>(want.size())) << name;
    std::int64_t wrong = 0;
    for (std::size_t i = 0; i < want.size(); ++i) {
      const double x = load_as_double(view.data, view.dtype, static_cast<std::int64_t>(i));
      const auto y = static_cast<double>(want[i]);
      if (!(x == y || (std::isnan(x) && std::isnan(y)))) {
        if (++wrong == 1) ADD_FAILURE() << name << "[" << i << "] is " << x << ", not " << y;
      }
    }
    EXPECT_EQ(wrong, 0) << name;
  };
  compare(cache.k(), model.k, "k");
  compare(cache.v(), model.v, "v");
  if (model.partitioned()) compare(cache.k_scale(), model.k_scale, "k_scale");
  const TensorView norms = cache.value_norms();
  for (std::size_t i = 0; i < model.norms.size(); ++i) {
    const float x = norms.as<float>()[i], y = model.norms[i];
    ASSERT_TRUE(std::fabs(x - y) <= 1e-6f * y || (std::isnan(x) && std::isnan(y))) << x << " " << y;
  }
  EXPECT_EQ(cache.saturated(), model.saturated);
}

// Everything a cache holds, to see whether a refused call touched it.
std::vector<std::byte> snapshot(const KVCache& cache) {
  std::vector<std::byte> all;
  for (const TensorView& view :
       {cache.k(), cache.v(), cache.k_scale(), cache.v_scale(), cache.q_scale(), cache.value_norms()}) {
    if (!view.given()) continue;
    const auto* first = view.as<const std::byte>();
    all.insert(all.end(), first, first + view.numel() * static_cast<std::int64_t>(size_of(view.dtype)));
  }
  return all;
}

// New tokens of a batch: random keys and values with gaps between tokens and heads.
struct Tokens {
  DType dtype;
  std::int64_t batch, tokens, heads, dim_k, dim_v;
  std::vector<std::byte> k_memory, v_memory;
  TensorView k, v;

  Tokens(DType type, bool packed, std::int64_t b, std::int64_t s, std::int64_t h, std::int64_t dk, std::int64_t dv,
         std::mt19937& rng, double size = 1.0)
      : dtype(type), batch(b), tokens(s), heads(h), dim_k(dk), dim_v(dv) {
    k = fill(k_memory, packed, dk, rng, size);
    v = fill(v_memory, packed, dv, rng, size);
  }
  TensorView fill(std::vector<std::byte>& memory, bool packed, std::int64_t dim, std::mt19937& rng, double size) const {
    std::normal_distribution<double> normal(0.0, size);
    TensorView view(nullptr, dtype, {batch, tokens, heads, dim});
    view.strides = {tokens * (heads * (dim + 1) + 2) + 1, heads * (dim + 1) + 2, dim + 1, 1};
    const std::int64_t count = batch * view.strides[0] + 1;
    memory.assign(static_cast<std::size_t>(count) * size_of(dtype), std::byte{0xff});  // NaN in the gaps
    view.data = memory.data();
    for (std::int64_t b = 0; b < batch; ++b) {
      for (std::int64_t t = 0; t < tokens; ++t) {
        for (std::int64_t h = 0; h < heads; ++h) {
          const double magnitude = size * std::exp(normal(rng) / size / 2);
          for (std::int64_t d = 0; d < dim; ++d) {
            store_from_double(view.data, dtype, b * view.strides[0] + t * view.strides[1] + h * view.strides[2] + d,
                              magnitude * normal(rng) / size);
          }
        }
      }
    }
    if (packed) {
      view.rank = 3;
      for (int i = 0; i < 3; ++i) {
        view.shape[i] = view.shape[i + 1];
        view.strides[i] = view.strides[i + 1];
      }
    }
    return view;
  }
  static double at(const TensorView& view, std::int64_t b, std::int64_t t, std::int64_t h, std::int64_t d) {
    const int r = view.rank;
    return load_as_double(view.data, view.dtype,
                          (r == 4 ? b * view.strides[0] : 0) + t * view.strides[r - 3] + h * view.strides[r - 2] + d);
  }
  float max_abs(const TensorView& view, std::int64_t used_tokens) const {
    float biggest = 0;
    for (std::int64_t b = 0; b < batch; ++b) {
      for (std::int64_t t = 0; t < used_tokens; ++t) {
        for (std::int64_t h = 0; h < heads; ++h) {
          for (std::int64_t d = 0; d < view.shape[view.rank - 1]; ++d)
            biggest = std::max(biggest, std::fabs(static_cast<float>(at(view, b, t, h, d))));
        }
      }
    }
    return biggest;
  }
};

TensorView ints(const std::vector<std::int32_t>& x) {
  return TensorView(x.data(), DType::kInt32, {static_cast<std::int64_t>(x.size())});
}

struct Table {
  std::vector<std::vector<std::int32_t>> rows;
  std::vector<std::int32_t> memory;

  std::int64_t width() const {
    std::size_t most = 0;
    for (const auto& row : rows) most = std::max(most, row.size());
    return static_cast<std::int64_t>(most);
  }
  TensorView view() const {
    return TensorView(memory.data(), DType::kInt32, {static_cast<std::int64_t>(rows.size()), width()});
  }
};

Table table_of(std::vector<std::vector<std::int32_t>> rows) {
  Table table{std::move(rows), {}};
  for (const auto& row : table.rows) {
    table.memory.insert(table.memory.end(), row.begin(), row.end());
    table.memory.resize(table.memory.size() + static_cast<std::size_t>(table.width()) - row.size(), -7);  // never read
  }
  return table;
}

template <class Fn>
void on_every_host(Fn&& fn) {
  for (const std::string& isa : available_host_isas()) {
    for (const int threads : {1, 3}) {
      SCOPED_TRACE(isa + ", threads " + std::to_string(threads));
      set_host_isa(isa);
      set_num_threads(threads);
      fn();
    }
  }
  set_host_isa("auto");
  set_num_threads(0);
}

std::string describe(const CacheConfig& c, DType in) {
  return std::string(to_string(c.format)) + " from " + std::string(to_string(in)) + ", pages " +
         std::to_string(c.num_pages) + " x " + std::to_string(c.page_size) + ", heads " +
         std::to_string(c.num_kv_heads) + ", dims " + std::to_string(c.head_dim) + "/" + std::to_string(c.head_dim_v) +
         ", partition " + std::to_string(c.partition);
}

// Three requests over shuffled pages: a prefill in chunks, ragged packed appends, then single tokens.
void run_appends(const CacheConfig& config, DType in, unsigned seed) {
  std::mt19937 rng(seed);
  KVCache cache(config);
  Model model(config);
  std::vector<std::int32_t> pages(static_cast<std::size_t>(config.num_pages));
  std::iota(pages.begin(), pages.end(), 0);
  std::shuffle(pages.begin(), pages.end(), rng);
  constexpr std::int64_t kBatch = 3;
  const std::int64_t each = config.num_pages / kBatch, room = each * config.page_size;
  std::vector<std::vector<std::int32_t>> rows(kBatch);
  for (std::int64_t b = 0; b < kBatch; ++b) rows[b].assign(pages.begin() + b * each, pages.begin() + (b + 1) * each);
  const Table table = table_of(rows);
  std::vector<std::int32_t> start(kBatch, 0), lens(kBatch, -1);
  const std::int64_t h = config.num_kv_heads, dk = config.head_dim,
                     dv = config.head_dim_v == 0 ? dk : config.head_dim_v;

  bool first = true;
  for (int step = 0; step < 12; ++step) {
    const bool packed = step % 3 == 1;
    std::vector<std::int32_t> counts(kBatch), cu(kBatch + 1, 0);
    const std::int64_t left = room - *std::max_element(start.begin(), start.end());
    const std::int64_t same = step % 3 == 2 ? 1 : static_cast<std::int64_t>(rng() % static_cast<unsigned>(room / 3));
    for (std::int64_t b = 0; b < kBatch; ++b) {
      const std::int64_t want = packed ? static_cast<std::int64_t>(rng() % 9) : same;
      counts[b] = static_cast<std::int32_t>(std::min(want, left));
      cu[b + 1] = cu[b] + counts[b];
    }
    // A packed tensor may be longer than its sequences; what lies behind them is never read.
    const std::int64_t tokens = packed ? cu[kBatch] + 2 : counts[0];
    Tokens x(in, packed, packed ? 1 : kBatch, tokens, h, dk, dv, rng, step % 4 == 3 ? 2.5 : 1.0);
    const std::int64_t used = packed ? cu[kBatch] : tokens;
    if (packed) {
      for (std::int64_t t = used; t < tokens; ++t) {
        for (const TensorView& view : {x.k, x.v}) {
          for (std::int64_t i = 0; i < h; ++i) {
            store_from_double(view.data, in, t * view.strides[0] + i * view.strides[1], std::nan(""));
          }
        }
      }
    }
    if (first && used * kBatch > 0) {
      const float limit = config.format == CacheFormat::kFp8 ? 448.0f : 127.0f;
      model.k_static = x.max_abs(x.k, used) / limit;
      model.v_static = x.max_abs(x.v, used) / limit;
      first = model.quantized() && (model.k_static == 0 || model.v_static == 0);
    }
    cache.append(x.k, x.v, table.view(), ints(start), ints(lens), packed ? ints(cu) : TensorView());
    for (std::int64_t b = 0; b < kBatch; ++b) {
      const std::int64_t from = packed ? cu[b] : 0, batch = packed ? 0 : b;
      model.append(
          rows[b], start[b], counts[b],
          [&](std::int64_t t, std::int64_t i, std::int64_t d) { return Tokens::at(x.k, batch, from + t, i, d); },
          [&](std::int64_t t, std::int64_t i, std::int64_t d) { return Tokens::at(x.v, batch, from + t, i, d); });
      EXPECT_EQ(lens[b], start[b] + counts[b]);
    }
    expect_holds(cache, model);
    if (testing::Test::HasFailure()) FAIL() << "step " << step;
    start = lens;
  }
  EXPECT_TRUE(cache.kv_calibrated());
  if (model.quantized() && !model.partitioned()) {
    EXPECT_EQ(*cache.k_scale().as<float>(), model.k_static);
  }
  if (model.quantized()) {
    EXPECT_EQ(*cache.v_scale().as<float>(), model.v_static);
  }
}

TEST(Store, HoldsWhatWasAppended) {
  on_every_host([] {
    unsigned seed = 1;
    for (const CacheFormat format : kAllFormats) {
      for (const DType in : {DType::kFloat32, DType::kBFloat16, DType::kFloat16, DType::kFloat64}) {
        for (const std::int64_t page_size : {1, 5, 16, 48}) {
          std::vector<std::int64_t> partitions = {1};
          if (format == CacheFormat::kInt8A && page_size == 16) partitions = {1, 4, 16};
          if (format == CacheFormat::kInt8A && page_size == 48) partitions = {6, 48};
          for (const std::int64_t partition : partitions) {
            const CacheConfig config{.num_pages = 150 / page_size + 3,
                                     .page_size = page_size,
                                     .num_kv_heads = 3,
                                     .head_dim = 24,
                                     .head_dim_v = page_size == 5 ? 17 : 0,
                                     .format = format,
                                     .partition = partition};
            SCOPED_TRACE(describe(config, in));
            run_appends(config, in, seed++);
            if (testing::Test::HasFailure()) return;
          }
        }
      }
    }
  });
}

TEST(Store, LargeChunksAcrossThreads) {
  on_every_host([] {
    for (const CacheFormat format : {CacheFormat::kBf16, CacheFormat::kInt8A, CacheFormat::kFp8}) {
      const CacheConfig config{.num_pages = 12,
                               .page_size = 256,
                               .num_kv_heads = 2,
                               .head_dim = 128,
                               .format = format,
                               .partition = format == CacheFormat::kInt8A ? 64 : 1};
      SCOPED_TRACE(describe(config, DType::kFloat32));
      run_appends(config, DType::kFloat32, 99);
    }
  });
}

TEST(Store, Layout) {
  const CacheConfig config{.num_pages = 6,
                           .page_size = 8,
                           .num_kv_heads = 2,
                           .head_dim = 32,
                           .head_dim_v = 16,
                           .format = CacheFormat::kInt8A,
                           .partition = 4};
  const KVCache cache(config);
  EXPECT_EQ(cache.k().shape_string(), "[6, 2, 8, 32]");
  EXPECT_EQ(cache.v().shape_string(), "[6, 2, 8, 16]");
  EXPECT_EQ(cache.k_scale().shape_string(), "[6, 2, 2]");
  EXPECT_EQ(cache.v_scale().shape_string(), "[1]");
  EXPECT_FALSE(cache.q_scale().given());
  EXPECT_EQ(cache.value_norms().shape_string(), "[6, 2, 8]");
  for (const TensorView& view : {cache.k(), cache.v(), cache.k_scale(), cache.value_norms()}) {
    EXPECT_EQ(reinterpret_cast<std::uintptr_t>(view.data) % 64, 0u);
    EXPECT_TRUE(view.is_contiguous());
  }
  EXPECT_DOUBLE_EQ(cache.bytes_per_token(), 2 * (32 + 16 + 4 + 4.0 / 4));
  EXPECT_EQ(cache.nbytes(), 48 * 2 * (32 + 16 + 4 + 1) + 4);

  const KVCache plain({.num_pages = 3, .page_size = 4, .num_kv_heads = 8, .head_dim = 128});
  EXPECT_EQ(plain.config().head_dim_v, 128);
  EXPECT_EQ(plain.k().dtype, DType::kBFloat16);
  EXPECT_FALSE(plain.k_scale().given());
  EXPECT_FALSE(plain.v_scale().given());
  EXPECT_DOUBLE_EQ(plain.bytes_per_token(), 8 * (2 * 128 * 2 + 4));
  EXPECT_TRUE(plain.kv_calibrated());
  EXPECT_TRUE(plain.q_calibrated());
  const KVCache baseline(
      {.num_pages = 1, .page_size = 4, .num_kv_heads = 1, .head_dim = 8, .format = CacheFormat::kInt8Baseline});
  EXPECT_EQ(baseline.k_scale().shape_string(), "[1]");
  EXPECT_EQ(baseline.q_scale().shape_string(), "[1]");
  EXPECT_FALSE(baseline.kv_calibrated());
  EXPECT_FALSE(baseline.q_calibrated());
}

TEST(Store, FormatNames) {
  for (const CacheFormat format : kAllFormats) EXPECT_EQ(cache_format_from_string(to_string(format)), format);
  EXPECT_THROW(cache_format_from_string("int4"), Error);
}

TEST(Store, CalibrationSetsTheScalesThatLaterTokensUse) {
  std::mt19937 rng(4);
  for (const CacheFormat format :
       {CacheFormat::kInt8Baseline, CacheFormat::kInt8A, CacheFormat::kInt8B, CacheFormat::kFp8}) {
    const float limit = format == CacheFormat::kFp8 ? 448.0f : 127.0f;
    KVCache cache({.num_pages = 4, .page_size = 4, .num_kv_heads = 2, .head_dim = 8, .format = format});
    const Tokens sample(DType::kFloat32, false, 1, 10, 2, 8, 8, rng),
        large(DType::kFloat32, false, 1, 4, 2, 8, 8, rng, 50.0);
    cache.calibrate(sample.k, sample.v, sample.k);
    EXPECT_TRUE(cache.kv_calibrated());
    EXPECT_TRUE(cache.q_calibrated());
    EXPECT_EQ(*cache.v_scale().as<float>(), sample.max_abs(sample.v, 10) / limit);
    if (cache.q_scale().given()) {
      EXPECT_EQ(*cache.q_scale().as<float>(), sample.max_abs(sample.k, 10) / limit);
    }
    const Table table = table_of({{2, 0}});
    std::vector<std::int32_t> start = {0}, lens = {-1};
    cache.append(large.k, large.v, table.view(), ints(start), ints(lens));
    EXPECT_GT(cache.saturated(), 10);
    EXPECT_EQ(*cache.v_scale().as<float>(), sample.max_abs(sample.v, 10) / limit);
    EXPECT_THROW(cache.calibrate(sample.k, sample.v), Error);
    cache.calibrate_q(large.k);  // depends on nothing that is stored
    if (cache.q_scale().given()) {
      EXPECT_EQ(*cache.q_scale().as<float>(), large.max_abs(large.k, 4) / limit);
    }
  }
}

TEST(Store, ZerosDoNotCalibrate) {
  std::mt19937 rng(4);
  KVCache cache({.num_pages = 4, .page_size = 4, .num_kv_heads = 2, .head_dim = 8, .format = CacheFormat::kInt8B});
  Tokens zeros(DType::kFloat32, false, 1, 2, 2, 8, 8, rng);
  std::fill(zeros.k_memory.begin(), zeros.k_memory.end(), std::byte{0});
  std::fill(zeros.v_memory.begin(), zeros.v_memory.end(), std::byte{0});
  const Tokens next(DType::kFloat32, false, 1, 2, 2, 8, 8, rng);
  const Table table = table_of({{1}});
  std::vector<std::int32_t> start = {0}, lens = {0};
  cache.append(zeros.k, zeros.v, table.view(), ints(start), ints(lens));
  EXPECT_FALSE(cache.kv_calibrated());
  cache.append(next.k, next.v, table.view(), ints(lens), ints(lens));  // seq_lens may be start itself
  EXPECT_EQ(lens[0], 4);
  EXPECT_TRUE(cache.kv_calibrated());
  EXPECT_EQ(*cache.k_scale().as<float>(), next.max_abs(next.k, 2) / 127);
  EXPECT_EQ(cache.saturated(), 0);
}

// The documented bound: every growth of the scale rounds the older tokens once more.
TEST(Store, RequantizationErrorIsBounded) {
  std::mt19937 rng(8);
  std::normal_distribution<float> normal;
  constexpr std::int64_t kDim = 64, kPartition = 32;
  KVCache cache({.num_pages = 1,
                 .page_size = kPartition,
                 .num_kv_heads = 1,
                 .head_dim = kDim,
                 .format = CacheFormat::kInt8A,
                 .partition = kPartition});
  const Table table = table_of({{0}});
  std::vector<float> all;
  std::vector<std::int32_t> start = {0}, lens = {0};
  int growths = 0;
  float scale = 0;
  for (std::int64_t t = 0; t < kPartition; ++t) {
    std::vector<float> x(kDim);
    for (float& value : x) value = normal(rng) * (1.0f + 0.3f * static_cast<float>(t % 11));
    all.insert(all.end(), x.begin(), x.end());
    const TensorView view(x.data(), DType::kFloat32, {1, 1, 1, kDim});
    start[0] = static_cast<std::int32_t>(t);
    cache.append(view, view, table.view(), ints(start), ints(lens));
    const float now = *cache.k_scale().as<float>();
    EXPECT_GE(now, scale);
    if (t > 0 && now > scale) ++growths;
    scale = now;
    for (std::size_t i = 0; i < all.size(); ++i) {
      const float back = static_cast<float>(cache.k().as<std::int8_t>()[i]) * scale;
      EXPECT_LE(std::fabs(back - all[i]), 0.501f * static_cast<float>(growths + 1) * scale);
    }
  }
  EXPECT_GE(growths, 3);
}

TEST(Store, ASharedPageServesTwoRequestsAndAReusedOneStartsAfresh) {
  std::mt19937 rng(8);
  KVCache cache({.num_pages = 3,
                 .page_size = 4,
                 .num_kv_heads = 1,
                 .head_dim = 16,
                 .format = CacheFormat::kInt8A,
                 .partition = 4});
  const Tokens prompt(DType::kFloat32, false, 1, 4, 1, 16, 16, rng, 9.0),
      next(DType::kFloat32, false, 2, 1, 1, 16, 16, rng);
  std::vector<std::int32_t> zero = {0}, one = {-1}, four = {4, 4}, two = {-1, -1};
  cache.append(prompt.k, prompt.v, table_of({{1}}).view(), ints(zero), ints(one));
  const std::vector<std::byte> before = snapshot(cache);
  cache.append(next.k, next.v, table_of({{1, 0}, {1, 2}}).view(), ints(four), ints(two));
  EXPECT_EQ(two, (std::vector<std::int32_t>{5, 5}));
  EXPECT_EQ(std::memcmp(cache.k().as<std::int8_t>() + 64, before.data() + 64, 64), 0);  // page 1 is as it was
  // Page 1 goes to a new request of small keys: the old scale must not rule them.
  const float old_scale = cache.k_scale().as<float>()[1];
  const Tokens fresh(DType::kFloat32, false, 1, 1, 1, 16, 16, rng, 0.01);
  cache.append(fresh.k, fresh.v, table_of({{1}}).view(), ints(zero), ints(one));
  EXPECT_EQ(cache.k_scale().as<float>()[1], fresh.max_abs(fresh.k, 1) / 127);
  EXPECT_LT(cache.k_scale().as<float>()[1], old_scale / 50);
}

TEST(Store, FloatFormatsKeepNaN) {
  for (const CacheFormat format : {CacheFormat::kFp32, CacheFormat::kBf16, CacheFormat::kFp16}) {
    KVCache cache({.num_pages = 1, .page_size = 2, .num_kv_heads = 1, .head_dim = 3, .format = format});
    const float x[3] = {kNaN, -kInf, 1.0f};
    const TensorView view(x, DType::kFloat32, {1, 1, 1, 3});
    std::vector<std::int32_t> start = {1}, lens = {0};
    cache.append(view, view, table_of({{0}}).view(), ints(start), ints(lens));
    const TensorView k = cache.k();
    EXPECT_TRUE(std::isnan(load_as_float(k.data, k.dtype, 3)));
    EXPECT_EQ(load_as_float(k.data, k.dtype, 4), -kInf);
    EXPECT_EQ(load_as_float(k.data, k.dtype, 5), 1.0f);
  }
}

TEST(Store, EmptyAppends) {
  KVCache cache({.num_pages = 1, .page_size = 2, .num_kv_heads = 1, .head_dim = 4, .format = CacheFormat::kInt8B});
  const TensorView none(nullptr, DType::kFloat32, {2, 0, 1, 4}), packed(nullptr, DType::kFloat32, {0, 1, 4});
  std::vector<std::int32_t> start = {2, 0}, lens = {-1, -1}, cu = {0, 0, 0};
  cache.append(none, none, table_of({{0}, {0}}).view(), ints(start), ints(lens));
  EXPECT_EQ(lens, start);
  cache.append(packed, packed, table_of({{0}, {0}}).view(), ints(start), ints(lens), ints(cu));
  EXPECT_EQ(lens, start);
  EXPECT_FALSE(cache.kv_calibrated());
  const TensorView nobody(nullptr, DType::kFloat32, {0, 3, 1, 4});
  cache.append(nobody, nobody, TensorView(nullptr, DType::kInt32, {0, 5}), ints({}), ints({}));
}

// ---------------------------------------------------------------------------------------------------------------------

template <class Fn>
std::string expect_error(ErrorCode code, const std::string& argument, Fn&& fn) {
  try {
    fn();
  } catch (const Error& error) {
    EXPECT_EQ(error.code(), code) << error.what();
    EXPECT_EQ(error.argument(), argument) << error.what();
    return error.what();
  }
  ADD_FAILURE() << "no error for " << argument;
  return {};
}

TEST(Store, RefusesBadConfigs) {
  const CacheConfig good{.num_pages = 4, .page_size = 8, .num_kv_heads = 2, .head_dim = 16};
  const auto refuse = [&](ErrorCode code, const std::string& argument, auto&& change) {
    CacheConfig bad = good;
    change(bad);
    expect_error(code, argument, [&] { KVCache cache(bad); });
  };
  refuse(ErrorCode::kValue, "num_pages", [](CacheConfig& c) { c.num_pages = 0; });
  refuse(ErrorCode::kValue, "num_pages", [](CacheConfig& c) { c.num_pages = std::int64_t{1} << 40; });
  refuse(ErrorCode::kValue, "page_size", [](CacheConfig& c) { c.page_size = -1; });
  refuse(ErrorCode::kValue, "num_kv_heads", [](CacheConfig& c) { c.num_kv_heads = 0; });
  refuse(ErrorCode::kValue, "head_dim", [](CacheConfig& c) { c.head_dim = 0; });
  refuse(ErrorCode::kValue, "head_dim_v", [](CacheConfig& c) { c.head_dim_v = -2; });
  refuse(ErrorCode::kValue, "partition", [](CacheConfig& c) { c.partition = 2; });
  refuse(ErrorCode::kValue, "partition", [](CacheConfig& c) { c.format = CacheFormat::kInt8A, c.partition = 3; });
  refuse(ErrorCode::kValue, "partition", [](CacheConfig& c) { c.format = CacheFormat::kInt8A, c.partition = 0; });
  refuse(ErrorCode::kValue, "format", [](CacheConfig& c) { c.format = static_cast<CacheFormat>(99); });
  refuse(ErrorCode::kDevice, "device", [](CacheConfig& c) { c.device = {DeviceType::kCuda, 99}; });
  refuse(ErrorCode::kDevice, "device", [](CacheConfig& c) { c.device = {DeviceType::kCuda, -1}; });
  refuse(ErrorCode::kCapacity, "num_pages",
         [](CacheConfig& c) { c.num_pages = c.page_size = c.head_dim = std::numeric_limits<std::int32_t>::max(); });
}

// Every refusal of append, on a cache that holds tokens: its code, its argument, and that nothing changed.
TEST(Store, RefusedAppendsChangeNothing) {
  for (const CacheFormat format : kAllFormats) {
    SCOPED_TRACE(std::string(to_string(format)));
    std::mt19937 rng(6);
    const bool a = format == CacheFormat::kInt8A;
    KVCache cache({.num_pages = 5,
                   .page_size = 4,
                   .num_kv_heads = 2,
                   .head_dim = 8,
                   .head_dim_v = 6,
                   .format = format,
                   .partition = a ? 4 : 1});
    Tokens x(DType::kFloat32, false, 2, 3, 2, 8, 6, rng);
    Tokens p(DType::kFloat32, true, 1, 6, 2, 8, 6, rng);
    const Table table = table_of({{3, 1}, {0, 4}});
    std::vector<std::int32_t> start = {0, 2}, lens = {-5, -5}, cu = {0, 4, 6};
    const auto append = [&](const TensorView& k, const TensorView& v, const TensorView& t, const TensorView& s,
                            const TensorView& n, const TensorView& c = {}) { cache.append(k, v, t, s, n, c); };
    append(x.k, x.v, table.view(), ints(start), ints(lens));
    EXPECT_EQ(lens, (std::vector<std::int32_t>{3, 5}));
    lens = {-5, -5};
    const std::vector<std::byte> before = snapshot(cache);
    const std::int64_t saturated = cache.saturated();
    const auto refuse = [&](ErrorCode code, const std::string& argument, auto&& fn) {
      const std::string message = expect_error(code, argument, fn);
      EXPECT_EQ(snapshot(cache), before) << message;
      EXPECT_EQ(cache.saturated(), saturated) << message;
      EXPECT_EQ(lens, (std::vector<std::int32_t>{-5, -5})) << message;
      return message;
    };
    const auto with = [](TensorView view, auto&& change) {
      change(view);
      return view;
    };
    const auto int8 = [](TensorView& t) { t.dtype = DType::kInt8; };
    const auto strided = [](TensorView& t) { t.strides[t.rank - 1] = 2; };
    const auto cuda = [](TensorView& t) { t.device = {DeviceType::kCuda, 0}; };
    using E = ErrorCode;
    const TensorView t = table.view(), s = ints(start), n = ints(lens), none;

    refuse(E::kShape, "k", [&] { append(none, x.v, t, s, n); });
    refuse(E::kShape, "v", [&] { append(x.k, none, t, s, n); });
    refuse(E::kDType, "k", [&] { append(with(x.k, int8), x.v, t, s, n); });
    refuse(E::kDType, "v", [&] { append(x.k, with(x.v, [](TensorView& v) { v.dtype = DType::kBFloat16; }), t, s, n); });
    refuse(E::kLayout, "k", [&] { append(with(x.k, strided), x.v, t, s, n); });
    refuse(E::kDevice, "v", [&] { append(x.k, with(x.v, cuda), t, s, n); });
    refuse(E::kShape, "k", [&] { append(with(x.k, [](TensorView& k) { k.shape[2] = 1; }), x.v, t, s, n); });
    refuse(E::kShape, "v", [&] { append(x.k, with(x.v, [](TensorView& v) { v.shape[3] = 5; }), t, s, n); });
    refuse(E::kShape, "v", [&] { append(x.k, with(x.v, [](TensorView& v) { v.shape[1] = 2; }), t, s, n); });
    refuse(E::kShape, "v", [&] { append(x.k, with(x.v, [](TensorView& v) { v.shape[0] = 1; }), t, s, n); });
    refuse(E::kShape, "k", [&] { append(p.k, p.v, t, s, n); });
    refuse(E::kShape, "k", [&] { append(x.k, x.v, t, s, n, ints(cu)); });
    refuse(E::kShape, "v", [&] { append(p.k, x.v, t, s, n, ints(cu)); });
    refuse(E::kShape, "block_table", [&] { append(x.k, x.v, none, s, n); });
    refuse(E::kShape, "block_table", [&] { append(x.k, x.v, s, s, n); });
    refuse(E::kShape, "block_table", [&] { append(x.k, x.v, table_of({{3, 1}}).view(), s, n); });
    refuse(E::kDType, "block_table",
           [&] { append(x.k, x.v, with(t, [](TensorView& v) { v.dtype = DType::kInt64; }), s, n); });
    refuse(E::kShape, "start", [&] { append(x.k, x.v, t, ints({1, 2, 3}), n); });
    refuse(E::kDType, "start", [&] { append(x.k, x.v, t, with(s, int8), n); });
    refuse(E::kShape, "seq_lens", [&] { append(x.k, x.v, t, s, none); });
    refuse(E::kShape, "cu_seqlens", [&] { append(p.k, p.v, t, s, n, ints({0, 6})); });
    refuse(E::kValue, "cu_seqlens", [&] { append(p.k, p.v, t, s, n, ints({1, 3, 6})); });
    refuse(E::kValue, "cu_seqlens", [&] { append(p.k, p.v, t, s, n, ints({0, 4, 3})); });
    refuse(E::kValue, "cu_seqlens", [&] { append(p.k, p.v, t, s, n, ints({0, 4, 7})); });

    refuse(E::kValue, "start", [&] { append(x.k, x.v, t, ints({0, -1}), n); });
    const std::string full = refuse(E::kCapacity, "block_table", [&] { append(x.k, x.v, t, ints({0, 6}), n); });
    EXPECT_NE(full.find("request 1 has no page for position 8"), std::string::npos) << full;
    refuse(E::kCapacity, "block_table", [&] { append(x.k, x.v, t, ints({2000000000, 0}), n); });
    refuse(E::kValue, "block_table", [&] { append(x.k, x.v, table_of({{3, 1}, {5, 4}}).view(), s, n); });
    refuse(E::kValue, "block_table", [&] { append(x.k, x.v, table_of({{3, 1}, {0, -1}}).view(), ints({0, 4}), n); });
    // Two requests, or one request twice, that write the same slots.
    const std::string twice =
        refuse(E::kValue, "block_table", [&] { append(x.k, x.v, table_of({{3, 1}, {3, 4}}).view(), ints({0, 2}), n); });
    EXPECT_NE(twice.find("requests 0 and 1 both write slot"), std::string::npos) << twice;
    refuse(E::kValue, "block_table",
           [&] { append(p.k, p.v, table_of({{2, 2}, {0, 1}}).view(), ints({2, 0}), n, ints({0, 6, 6})); });
    if (a) {
      // Neighbours in one partition.
      refuse(E::kValue, "block_table",
             [&] { append(p.k, p.v, table_of({{2}, {2}}).view(), ints({0, 2}), n, ints({0, 2, 4})); });
    }
    if (cache.v_scale().given()) {
      for (const float bad : {kNaN, kInf}) {
        float* k = x.k.as<float>() + x.k.strides[0] + 2 * x.k.strides[1] + x.k.strides[2] + 7;
        float* v = x.v.as<float>() + x.v.strides[1] + 3;
        const float k_was = std::exchange(*k, bad);
        const std::string message = refuse(E::kValue, "k", [&] { append(x.k, x.v, t, s, n); });
        EXPECT_NE(message.find("[1, 2, 1, 7]"), std::string::npos) << message;
        *k = k_was;
        const float v_was = std::exchange(*v, bad);
        refuse(E::kValue, "v", [&] { append(x.k, x.v, t, s, n); });
        *v = v_was;
      }
      refuse(E::kValue, "cache", [&] { cache.calibrate(x.k, x.v); });
    }
    refuse(E::kShape, "q", [&] { cache.calibrate_q(x.v); });
    // Writing around what another request reads is fine, and entries that are not written are not looked at.
    append(x.k, x.v, table_of({{3, 1, -1}, {1 << 30, 4, 2}}).view(), ints({1, 4}), n);
    EXPECT_EQ(lens, (std::vector<std::int32_t>{4, 7}));
  }
}

TEST(Store, RefusedCalibrationChangesNothing) {
  std::mt19937 rng(6);
  KVCache cache(
      {.num_pages = 5, .page_size = 4, .num_kv_heads = 2, .head_dim = 8, .format = CacheFormat::kInt8Baseline});
  Tokens x(DType::kFloat32, false, 2, 3, 2, 8, 8, rng);
  const std::vector<std::byte> before = snapshot(cache);
  x.v.as<float>()[5] = kNaN;
  expect_error(ErrorCode::kValue, "v", [&] { cache.calibrate(x.k, x.v); });
  expect_error(ErrorCode::kValue, "q", [&] { cache.calibrate(x.k, x.k, x.v); });
  expect_error(ErrorCode::kShape, "k", [&] { cache.calibrate({}, x.k); });
  EXPECT_EQ(snapshot(cache), before);
  EXPECT_FALSE(cache.kv_calibrated());
}

TEST(Store, Moves) {
  KVCache cache({.num_pages = 1, .page_size = 2, .num_kv_heads = 1, .head_dim = 4});
  void* const data = cache.k().data;
  KVCache moved(std::move(cache));
  EXPECT_EQ(moved.k().data, data);
  moved = KVCache({.num_pages = 2, .page_size = 2, .num_kv_heads = 1, .head_dim = 4});
  EXPECT_EQ(moved.config().num_pages, 2);
}

}  // namespace
}  // namespace heddle
