// The KV cache on a GPU: every bit that an append leaves there is what the host's append leaves in host memory.
#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <memory>
#include <numeric>
#include <string>
#include <vector>

#include "cases.h"
#include "cuda_support.h"
#include <gtest/gtest.h>

#include "support/random.h"

namespace heddle::testing {
namespace {

constexpr std::size_t kArenaBytes = std::size_t{256} << 20;

struct Shape {
  CacheFormat format = CacheFormat::kBf16;
  std::int64_t page_size = 16, partition = 1, heads = 2, dim = 64, dim_v = 64, batch = 3, max_new = 40,
               table_pages = 12;
  DType dtype = DType::kBFloat16;  // of the new tokens
  bool packed = false, gaps = false;
  std::int64_t align = 1;
  std::uint64_t seed = 0;

  std::string text() const {
    std::string line(to_string(format));
    for (const auto& [name, value] : {std::pair<const char*, std::int64_t>{"page", page_size},
                                      {"partition", partition},
                                      {"Hkv", heads},
                                      {"D", dim},
                                      {"Dv", dim_v},
                                      {"B", batch},
                                      {"new", max_new},
                                      {"packed", packed},
                                      {"gaps", gaps},
                                      {"align", align},
                                      {"seed", static_cast<std::int64_t>(seed)}}) {
      line += std::string(" ") + name + "=" + std::to_string(value);
    }
    return line + " " + std::string(to_string(dtype));
  }
};

Shape random_shape(std::uint64_t seed) {
  Random r(seed);
  Shape s;
  s.seed = seed;
  s.format = r.pick({CacheFormat::kFp32, CacheFormat::kBf16, CacheFormat::kFp16, CacheFormat::kInt8Baseline,
                     CacheFormat::kInt8A, CacheFormat::kInt8A, CacheFormat::kInt8B, CacheFormat::kFp8});
  s.page_size = r.pick<std::int64_t>({1, 2, 3, 8, 16, 64, 128});
  if (s.format == CacheFormat::kInt8A) {
    const std::int64_t divisor = r.pick<std::int64_t>({1, 2, 3, 8, 64});
    if (s.page_size % divisor == 0) s.partition = divisor;
  }
  s.heads = r.pick<std::int64_t>({1, 2, 3, 8});
  s.dim = r.chance(0.6) ? r.pick<std::int64_t>({64, 128, 256}) : r.integer(1, 600);
  s.dim_v = r.chance(0.6) ? s.dim : r.integer(1, 300);
  s.batch = r.pick<std::int64_t>({1, 2, 5, 40});
  s.max_new = r.pick<std::int64_t>({0, 1, 1, 4, 70});
  s.table_pages = (4 * s.max_new + 3 * s.page_size) / s.page_size + 1;
  s.dtype = r.pick({DType::kFloat32, DType::kBFloat16, DType::kFloat16});
  s.packed = r.chance(0.4);
  s.gaps = r.chance(0.4);
  s.align = r.pick<std::int64_t>({1, 4, 16});
  return s;
}

// A cache of the host and one of the GPU with the same tables, and appends to both.
class Pair {
 public:
  explicit Pair(const Shape& s)
      : s_(s), random_(s.seed), layout_(s.seed + 1), host_(config({})), device_(config({DeviceType::kCuda, 0})) {
    // Any page for anybody, once.
    std::vector<std::int32_t> pages(static_cast<std::size_t>(s.batch * s.table_pages));
    std::iota(pages.begin(), pages.end(), 0);
    for (std::size_t i = pages.size() - 1; i > 0; --i) {
      std::swap(pages[i], pages[static_cast<std::size_t>(random_.integer(0, static_cast<std::int64_t>(i)))]);
    }
    table_ = Tensor(DType::kInt32, {s.batch, s.table_pages}, kPoison, gaps());
    for (std::int64_t b = 0; b < s.batch; ++b) {
      for (std::int64_t i = 0; i < s.table_pages; ++i) {
        table_.set({b, i}, pages[static_cast<std::size_t>(b * s.table_pages + i)]);
      }
    }
    start_ = Tensor(DType::kInt32, {s.batch}, kPoison);
    for (std::int64_t b = 0; b < s.batch; ++b) start_.set({b}, 0);
  }

  KVCache& host() { return host_; }
  KVCache& device() { return device_; }

  // The same random tokens to both caches.
  void append(DeviceArena& arena) {
    arena.clear();
    const Shape& s = s_;
    std::vector<std::int64_t> counts;
    for (std::int64_t b = 0; b < s.batch; ++b) counts.push_back(s.packed ? random_.integer(0, s.max_new) : s.max_new);
    const std::int64_t total = std::accumulate(counts.begin(), counts.end(), std::int64_t{0}) + (s.packed ? 2 : 0);
    const auto tokens = [&](std::int64_t dim) {
      Tensor x = s.packed ? Tensor(s.dtype, {total, s.heads, dim}, kPoison, gaps(), s.align)
                          : Tensor(s.dtype, {s.batch, s.max_new, s.heads, dim}, kPoison, gaps(), s.align);
      const float size = random_.pick({0.0f, 1.0f, 1.0f, 1.0f, 5.0f});  // grows partitions, saturates static scales
      const std::int64_t batches = s.packed ? 1 : s.batch, each = s.packed ? total - 2 : s.max_new;
      for (std::int64_t b = 0; b < batches; ++b) {
        for (std::int64_t i = 0; i < each; ++i) {
          for (std::int64_t h = 0; h < s.heads; ++h) {
            for (std::int64_t d = 0; d < dim; ++d) {
              const double value = static_cast<double>(size * random_.normal());
              s.packed ? x.set({i, h, d}, value) : x.set({b, i, h, d}, value);
            }
          }
        }
      }
      return x;
    };
    const Tensor k = tokens(s.dim), v = tokens(s.dim_v);
    Tensor cu, lengths(DType::kInt32, {s.batch}, kUntouched);
    if (s.packed) {
      cu = Tensor(DType::kInt32, {s.batch + 1}, kPoison);
      cu.set({0}, 0);
      for (std::int64_t b = 0; b < s.batch; ++b) {
        cu.set({b + 1}, cu.get({b}) + static_cast<double>(counts[static_cast<std::size_t>(b)]));
      }
    }
    Tensor device_lengths(DType::kInt32, {s.batch}, kUntouched);
    const TensorView lengths_view = arena.put(device_lengths);
    device_.append(arena.put(k), arena.put(v), arena.put(table_), arena.put(start_), lengths_view,
                   s.packed ? arena.put(cu) : TensorView(), arena.stream());
    arena.get(device_lengths, lengths_view);
    host_.append(k.view, v.view, table_.view, start_.view, lengths.view, cu.view);
    EXPECT_EQ(device_lengths.memory, lengths.memory) << s.text();
    for (std::int64_t b = 0; b < s.batch; ++b) start_.set({b}, lengths.get({b}));
  }

  // Everything in both caches.
  void compare(const DeviceArena& arena) {
    const auto same = [&](const char* name, const TensorView& expected, const TensorView& got) {
      ASSERT_EQ(got.given(), expected.given()) << name;
      if (!expected.given()) return;
      std::vector<std::byte> bytes(static_cast<std::size_t>(expected.numel()) * size_of(expected.dtype));
      arena.get(bytes.data(), got.data, bytes.size());
      const auto* wanted = expected.as<const std::byte>();
      const auto at = std::mismatch(bytes.begin(), bytes.end(), wanted).first - bytes.begin();
      EXPECT_EQ(at, static_cast<std::ptrdiff_t>(bytes.size())) << name << " differs: " << s_.text();
    };
    same("k", host_.k(), device_.k());
    same("v", host_.v(), device_.v());
    same("k_scale", host_.k_scale(), device_.k_scale());
    same("v_scale", host_.v_scale(), device_.v_scale());
    EXPECT_EQ(device_.saturated(), host_.saturated()) << s_.text();
    EXPECT_EQ(device_.kv_calibrated(), host_.kv_calibrated()) << s_.text();
    // Sums of squares in float64, in another order.
    const TensorView norms = host_.value_norms();
    std::vector<float> got(static_cast<std::size_t>(norms.numel()));
    arena.get(got.data(), device_.value_norms().data, got.size() * sizeof(float));
    for (std::size_t i = 0; i < got.size(); ++i) {
      const float wanted = norms.as<const float>()[i];
      ASSERT_NEAR(got[i], wanted, 2e-7f * wanted) << "norm " << i << ": " << s_.text();
    }
  }

  Tensor& table() { return table_; }
  Tensor& start() { return start_; }

 private:
  Random* gaps() { return s_.gaps ? &layout_ : nullptr; }
  CacheConfig config(Device device) const {
    return {.num_pages = s_.batch * s_.table_pages + 1,
            .page_size = s_.page_size,
            .num_kv_heads = s_.heads,
            .head_dim = s_.dim,
            .head_dim_v = s_.dim_v,
            .format = s_.format,
            .partition = s_.partition,
            .device = device};
  }

  Shape s_;
  Random random_, layout_;
  KVCache host_, device_;
  Tensor table_, start_;
};

TEST(CudaStore, AppendsHaveTheHostsBits) {
  NEEDS_HOPPER();
  DeviceArena arena(kArenaBytes);
  for (std::uint64_t seed = 0; seed < 400 && !::testing::Test::HasFailure(); ++seed) {
    Pair pair(random_shape(seed));
    for (int step = 0; step < 3; ++step) pair.append(arena);
    pair.compare(arena);
  }
}

TEST(CudaStore, CalibrationHasTheHostsScales) {
  NEEDS_HOPPER();
  DeviceArena arena(kArenaBytes);
  for (std::uint64_t seed = 0; seed < 40; ++seed) {
    Shape s = random_shape(seed);
    s.format =
        std::array{CacheFormat::kInt8Baseline, CacheFormat::kInt8A, CacheFormat::kInt8B, CacheFormat::kFp8}[seed % 4];
    s.partition = 1;
    Pair pair(s);
    Random r(seed), layout(seed);
    Random* gaps = s.gaps ? &layout : nullptr;
    Tensor k(s.dtype, {2, 300, s.heads, s.dim}, kPoison, gaps, s.align),
        v(s.dtype, {77, s.heads, s.dim_v}, kPoison, gaps), q(s.dtype, {5, 2, 3, s.dim}, kPoison, gaps);
    for (std::int64_t h = 0; h < s.heads; ++h) {
      for (std::int64_t i = 0; i < 2 * 300; ++i) {
        for (std::int64_t d = 0; d < s.dim; ++d) k.set({i / 300, i % 300, h, d}, r.normal());
      }
      for (std::int64_t i = 0; i < 77 * s.dim_v; ++i) v.set({i / s.dim_v, h, i % s.dim_v}, r.normal());
    }
    for (std::int64_t i = 0; i < 5 * 2 * 3 * s.dim; ++i) {
      q.set({i / s.dim / 6, i / s.dim / 3 % 2, i / s.dim % 3, i % s.dim}, r.normal());
    }
    pair.host().calibrate(k.view, v.view, q.view);
    pair.device().calibrate(arena.put(k), arena.put(v), arena.put(q), arena.stream());
    EXPECT_TRUE(pair.device().kv_calibrated() && pair.device().q_calibrated());
    const auto scale_of = [&](const TensorView& x) {
      float scale = 0.0f;
      if (x.given() && x.numel() == 1) arena.get(&scale, x.data, sizeof scale);
      return scale;
    };
    for (const auto part : {&KVCache::v_scale, &KVCache::q_scale}) {
      const TensorView expected = (pair.host().*part)();
      if (!expected.given()) continue;
      EXPECT_EQ(scale_of((pair.device().*part)()), *expected.as<const float>()) << s.text();
    }
    pair.append(arena);
    pair.append(arena);
    pair.compare(arena);
    try {
      pair.device().calibrate(arena.put(k), arena.put(v), {}, arena.stream());
      EXPECT_EQ(s.max_new, 0) << "calibrated over tokens";
    } catch (const Error& error) {
      EXPECT_EQ(error.code(), ErrorCode::kValue);
    }
    k.set({1, 299, s.heads - 1, s.dim - 1}, NAN);
    Pair fresh(s);
    if (s.format == CacheFormat::kInt8A) continue;  // K needs no sample
    try {
      fresh.device().calibrate(arena.put(k), arena.put(v), {}, arena.stream());
      ADD_FAILURE() << "NaN in a sample was not noticed";
    } catch (const Error& error) {
      EXPECT_EQ(error.argument(), "k");
    }
    EXPECT_FALSE(fresh.device().kv_calibrated());
  }
}

// Positions and pages out of range are not written, and in the validating mode refused by name.
TEST(CudaStore, BadTables) {
  NEEDS_HOPPER();
  DeviceArena arena(kArenaBytes);
  const Shape s{
      .format = CacheFormat::kInt8A, .page_size = 8, .partition = 4, .max_new = 6, .table_pages = 3, .seed = 5};
  struct Bad {
    const char* argument;
    ErrorCode code;
    double page, start;
  };
  for (const Bad& bad :
       {Bad{"block_table", ErrorCode::kValue, -1, 0}, Bad{"block_table", ErrorCode::kValue, 2147483647, 0},
        Bad{"block_table", ErrorCode::kValue, -2147483648.0, 0}, Bad{"block_table", ErrorCode::kCapacity, 0, 24},
        Bad{"start", ErrorCode::kValue, 0, -7}, Bad{"block_table", ErrorCode::kCapacity, 0, 2147483640}}) {
    Pair pair(s);
    pair.append(arena);
    const auto snapshot = [&] {
      std::vector<std::byte> all;
      for (const TensorView& x :
           {pair.device().k(), pair.device().v(), pair.device().k_scale(), pair.device().value_norms()}) {
        std::vector<std::byte> bytes(static_cast<std::size_t>(x.numel()) * size_of(x.dtype));
        arena.get(bytes.data(), x.data, bytes.size());
        all.insert(all.end(), bytes.begin(), bytes.end());
      }
      return all;
    };
    const std::vector<std::byte> before = snapshot();
    Tensor table = pair.table(), start = pair.start();
    table.view.data = table.memory.data() + (pair.table().view.as<std::byte>() - pair.table().memory.data());
    start.view.data = start.memory.data() + (pair.start().view.as<std::byte>() - pair.start().memory.data());
    for (std::int64_t i = 0; i < 3; ++i) table.set({1, i}, bad.page);
    start.set({1}, bad.start);
    Tensor k(DType::kFloat32, {1, 6, s.heads, s.dim}, std::byte{0x3f}),
        v(DType::kFloat32, {1, 6, s.heads, s.dim_v}, std::byte{0x3f});
    Tensor lengths(DType::kInt32, {1}, kUntouched);
    TensorView table_view = arena.put(table), start_view = arena.put(start);
    table_view.data = table_view.as<std::int32_t>() + table_view.strides[0];
    table_view.shape[0] = 1;
    start_view.data = start_view.as<std::int32_t>() + 1;
    start_view.shape[0] = 1;
    pair.device().append(arena.put(k), arena.put(v), table_view, start_view, arena.put(lengths), {}, arena.stream());
    arena.wait();
    EXPECT_EQ(snapshot(), before) << bad.page << " " << bad.start;

    set_validation(true);
    try {
      pair.device().append(arena.put(k), arena.put(v), table_view, start_view, arena.put(lengths), {}, arena.stream());
      ADD_FAILURE() << "not refused: page " << bad.page << " start " << bad.start;
    } catch (const Error& error) {
      EXPECT_EQ(error.argument(), bad.argument) << error.what();
      EXPECT_EQ(error.code(), bad.code) << error.what();
      EXPECT_NE(std::string(error.what()).find("request 0"), std::string::npos) << error.what();
    }
    set_validation(false);
    EXPECT_EQ(snapshot(), before);
  }
}

// Captured once, replayed with lengths that the appends themselves advance.
TEST(CudaStore, AppendsInAGraph) {
  NEEDS_HOPPER();
  DeviceArena arena(kArenaBytes);
  constexpr std::int64_t kSteps = 64, kBatch = 3, kHeads = 2, kDim = 64, kPage = 16;
  for (const CacheFormat format : {CacheFormat::kBf16, CacheFormat::kInt8A, CacheFormat::kInt8B, CacheFormat::kFp8}) {
    const CacheConfig on_host{.num_pages = kBatch * kSteps / kPage,
                              .page_size = kPage,
                              .num_kv_heads = kHeads,
                              .head_dim = kDim,
                              .format = format,
                              .partition = format == CacheFormat::kInt8A ? 8 : 1};
    CacheConfig on_device = on_host;
    on_device.device = arena.device();
    KVCache host(on_host), device(on_device);
    Random r(3);
    Tensor k(DType::kFloat32, {kBatch, 1, kHeads, kDim}, kPoison),
        v = Tensor(DType::kFloat32, {kBatch, 1, kHeads, kDim}, kPoison);
    const auto fill = [&] {
      for (Tensor* x : {&k, &v}) {
        for (std::int64_t i = 0; i < x->view.numel(); ++i) x->view.as<float>()[i] = r.normal();
      }
    };
    Tensor table(DType::kInt32, {kBatch, kSteps / kPage}, kPoison), start(DType::kInt32, {kBatch}, kPoison),
        lengths(DType::kInt32, {kBatch}, kPoison);
    for (std::int64_t b = 0; b < kBatch; ++b) {
      start.set({b}, 0);
      for (std::int64_t i = 0; i < kSteps / kPage; ++i) table.set({b, i}, static_cast<double>(b + kBatch * i));
    }
    fill();
    arena.clear();
    host.calibrate(k.view, v.view);
    const TensorView dk = arena.put(k), dv = arena.put(v), dtable = arena.put(table), dstart = arena.put(start),
                     dlengths = arena.put(lengths);
    const auto stream = static_cast<cudaStream_t>(arena.stream().handle);
    cudaGraph_t graph = nullptr;
    cudaGraphExec_t replay = nullptr;
    const bool has_static_scales = format != CacheFormat::kBf16;
    if (has_static_scales) {
      // A first append would have to read what it is given.
      cuda_ok(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal), "capture");
      EXPECT_THROW(device.append(dk, dv, dtable, dstart, dlengths, {}, arena.stream()), Error);
      cuda_ok(cudaStreamEndCapture(stream, &graph), "capture");
      cudaGraphDestroy(graph);
    }
    device.calibrate(dk, dv, {}, arena.stream());
    cuda_ok(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal), "capture");
    device.append(dk, dv, dtable, dstart, dlengths, {}, arena.stream());
    cuda_ok(cudaMemcpyAsync(dstart.data, dlengths.data, kBatch * 4, cudaMemcpyDeviceToDevice, stream), "copy");
    cuda_ok(cudaStreamEndCapture(stream, &graph), "capture");
    cuda_ok(cudaGraphInstantiate(&replay, graph, 0), "instantiate");
    for (std::int64_t step = 0; step < kSteps; ++step) {
      fill();
      cuda_ok(cudaMemcpyAsync(dk.data, k.view.data, static_cast<std::size_t>(k.view.numel()) * 4,
                              cudaMemcpyHostToDevice, stream),
              "upload");
      cuda_ok(cudaMemcpyAsync(dv.data, v.view.data, static_cast<std::size_t>(v.view.numel()) * 4,
                              cudaMemcpyHostToDevice, stream),
              "upload");
      cuda_ok(cudaGraphLaunch(replay, stream), "launch");
      host.append(k.view, v.view, table.view, start.view, lengths.view);
      for (std::int64_t b = 0; b < kBatch; ++b) start.set({b}, lengths.get({b}));
    }
    for (const auto part : {&KVCache::k, &KVCache::v, &KVCache::k_scale}) {
      const TensorView expected = (host.*part)(), got = (device.*part)();
      if (!expected.given()) continue;
      std::vector<std::byte> bytes(static_cast<std::size_t>(expected.numel()) * size_of(expected.dtype));
      arena.get(bytes.data(), got.data, bytes.size());
      EXPECT_EQ(std::memcmp(bytes.data(), expected.data, bytes.size()), 0) << to_string(format);
    }
    std::vector<std::int32_t> final_lengths(kBatch);
    arena.get(final_lengths.data(), dlengths.data, kBatch * 4);
    EXPECT_EQ(final_lengths, std::vector<std::int32_t>(kBatch, kSteps));
    cudaGraphExecDestroy(replay);
    cudaGraphDestroy(graph);
  }
}

TEST(CudaStore, RefusesWhatDoesNotFit) {
  NEEDS_HOPPER();
  DeviceArena arena(kArenaBytes);
  Pair pair({});
  const Shape s;
  Tensor k(DType::kFloat32, {s.batch, 1, s.heads, s.dim}, std::byte{0}),
      wide(DType::kFloat64, {s.batch, 1, s.heads, s.dim}, std::byte{0});
  Tensor lengths(DType::kInt32, {s.batch}, kUntouched);
  const TensorView dk = arena.put(k), table = arena.put(pair.table()), start = arena.put(pair.start()),
                   out = arena.put(lengths);
  const auto refuse = [&](ErrorCode code, const char* argument, const TensorView& keys, const TensorView& pages,
                          const TensorView& to) {
    try {
      pair.device().append(keys, keys, pages, start, to, {}, arena.stream());
      ADD_FAILURE() << argument << " was taken";
    } catch (const Error& error) {
      EXPECT_EQ(error.code(), code) << error.what();
      EXPECT_EQ(error.argument(), argument) << error.what();
    }
  };
  refuse(ErrorCode::kDevice, "k", k.view, table, out);
  refuse(ErrorCode::kDType, "k", arena.put(wide), table, out);
  refuse(ErrorCode::kDevice, "block_table", dk, pair.table().view, out);
  refuse(ErrorCode::kValue, "seq_lens", dk, table, start);
}

}  // namespace
}  // namespace heddle::testing
