// The CUDA merge through the public call, against the formula in float64 on the host.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <cuda_runtime_api.h>
#include <limits>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include <gtest/gtest.h>

#include "core/numeric.h"
#include "cuda/launch.h"
#include "heddle/heddle.h"

namespace heddle {
namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

#define CUDA_OK(call) ASSERT_EQ(call, cudaSuccess) << cudaGetErrorString(cudaGetLastError())

// Device memory that starts as 0xff bytes (NaN in every float type), with room for a shift off the alignment of
// cudaMalloc.
class DeviceBuffer {
 public:
  explicit DeviceBuffer(std::size_t bytes, std::size_t shift = 0) : bytes_(bytes), shift_(shift) {
    if (cudaMalloc(&base_, bytes + shift) != cudaSuccess || cudaMemset(base_, 0xff, bytes + shift) != cudaSuccess) {
      throw std::runtime_error("cudaMalloc of " + std::to_string(bytes) + " bytes failed");
    }
  }
  ~DeviceBuffer() { cudaFree(base_); }
  DeviceBuffer(const DeviceBuffer&) = delete;
  DeviceBuffer& operator=(const DeviceBuffer&) = delete;

  char* data() const { return static_cast<char*>(base_) + shift_; }
  void upload(const void* from) { cudaMemcpy(data(), from, bytes_, cudaMemcpyHostToDevice); }
  std::vector<std::uint8_t> download() const {
    std::vector<std::uint8_t> host(bytes_);
    if (cudaMemcpy(host.data(), data(), bytes_, cudaMemcpyDeviceToHost) != cudaSuccess) {
      throw std::runtime_error(std::string("download: ") + cudaGetErrorString(cudaGetLastError()));
    }
    return host;
  }

 private:
  void* base_ = nullptr;
  std::size_t bytes_, shift_;
};

struct Case {
  DType dtype;
  std::int64_t parts, batch, seq, heads, dim;
  std::int64_t pad = 0;     // unused elements after every row of outs and out
  std::size_t shift = 0;    // bytes that outs and out lie off their alignment
  float logit_spread = 4;   // lse ~ N(0, spread)
  double empty_part = 0.2;  // probability that a part saw no key: lse = -inf, out = NaN
  double empty_row = 0.05;  // probability that no part of a row did
  bool wants_lse = true;

  std::int64_t rows() const { return batch * seq * heads; }
  std::string name() const {
    std::string text = std::string(to_string(dtype)) + "_p" + std::to_string(parts) + "_b" + std::to_string(batch) +
                       "_s" + std::to_string(seq) + "_h" + std::to_string(heads) + "_d" + std::to_string(dim);
    if (pad) text += "_pad" + std::to_string(pad);
    if (shift) text += "_shift" + std::to_string(shift);
    if (logit_spread != 4) text += "_spread" + std::to_string(static_cast<int>(logit_spread));
    if (!wants_lse) text += "_nolse";
    return text;
  }
};

void PrintTo(const Case& c, std::ostream* os) { *os << c.name(); }

// Partial results of one case on the host and on the device, and where the merged ones go.
class Merge {
 public:
  explicit Merge(const Case& c, unsigned seed = 1)
      : c_(c),
        size_(size_of(c.dtype)),
        pitch_(c.dim + c.pad),
        outs_(static_cast<std::size_t>(c.parts * c.rows() * pitch_) * size_),
        lses_(static_cast<std::size_t>(c.parts * c.rows())),
        device_outs_(outs_.size(), c.shift),
        device_lses_(lses_.size() * sizeof(float)),
        device_out_(static_cast<std::size_t>(c.rows() * pitch_) * size_, c.shift),
        device_lse_(static_cast<std::size_t>(c.rows()) * sizeof(float)) {
    std::mt19937 random(seed);
    std::normal_distribution<float> value(0.0f, 1.0f), logit(0.0f, c.logit_spread);
    std::uniform_real_distribution<double> chance(0.0, 1.0);
    std::vector<bool> empty_row(static_cast<std::size_t>(c.rows()));
    for (std::size_t r = 0; r < empty_row.size(); ++r) empty_row[r] = chance(random) < c.empty_row;
    for (std::int64_t p = 0; p < c.parts; ++p) {
      for (std::int64_t r = 0; r < c.rows(); ++r) {
        const bool empty = empty_row[static_cast<std::size_t>(r)] || chance(random) < c.empty_part;
        lses_[lse_index(p, r)] = empty ? -kInf : logit(random);
        for (std::int64_t d = 0; d < pitch_; ++d) {
          store_from_float(outs_.data(), c.dtype, (p * c.rows() + r) * pitch_ + d,
                           empty || d >= c.dim ? kNaN : value(random));
        }
      }
    }
    device_outs_.upload(outs_.data());
    device_lses_.upload(lses_.data());
  }

  MergeParams params() const {
    const Device gpu{DeviceType::kCuda, 0};
    MergeParams params{
        .outs = TensorView(device_outs_.data(), c_.dtype, {c_.parts, c_.batch, c_.seq, c_.heads, c_.dim}, gpu),
        .lses = TensorView(device_lses_.data(), DType::kFloat32, {c_.parts, c_.batch, c_.heads, c_.seq}, gpu),
        .out = TensorView(device_out_.data(), c_.dtype, {c_.batch, c_.seq, c_.heads, c_.dim}, gpu),
        .backend = Backend::kSm90};
    if (c_.wants_lse) {
      params.lse = TensorView(device_lse_.data(), DType::kFloat32, {c_.batch, c_.heads, c_.seq}, gpu);
    }
    for (int axis = 0; axis < 4; ++axis) params.outs.strides[static_cast<std::size_t>(axis)] = outs_stride(axis);
    for (int axis = 0; axis < 3; ++axis) params.out.strides[static_cast<std::size_t>(axis)] = outs_stride(axis + 1);
    return params;
  }

  std::vector<std::uint8_t> out() const { return device_out_.download(); }
  std::vector<std::uint8_t> lse() const { return device_lse_.download(); }

  // The merged results against the formula, and everything between the rows against what lay there before.
  void check() const {
    const std::vector<std::uint8_t> out = this->out(), lse_bytes = lse();
    std::vector<float> lse(static_cast<std::size_t>(c_.rows()));
    std::memcpy(lse.data(), lse_bytes.data(), lse_bytes.size());
    const double ulp = c_.dtype == DType::kBFloat16 ? 0x1p-8 : c_.dtype == DType::kFloat16 ? 0x1p-11 : 0x1p-23;
    for (std::int64_t r = 0; r < c_.rows(); ++r) {
      double largest = -kInf, sum = 0.0;
      for (std::int64_t p = 0; p < c_.parts; ++p) largest = std::max(largest, double{lses_[lse_index(p, r)]});
      const double reference = std::isinf(largest) ? 0.0 : largest;
      for (std::int64_t p = 0; p < c_.parts; ++p) sum += std::exp(lses_[lse_index(p, r)] - reference);
      if (c_.wants_lse) {
        const double expected = reference + std::log(sum), got = lse[lse_index(0, r)];
        ASSERT_TRUE(got == expected || std::abs(got - expected) <= 1e-5 + 0x1p-22 * std::abs(expected))
            << "row " << r << ": lse " << got << ", expected " << expected;
      } else {
        ASSERT_TRUE(std::isnan(lse[lse_index(0, r)])) << "row " << r << ": lse written without being asked for";
      }
      for (std::int64_t d = 0; d < c_.dim; ++d) {
        double expected = 0.0, magnitude = 0.0;
        for (std::int64_t p = 0; p < c_.parts; ++p) {
          const double weight = sum == 0.0 ? 0.0 : std::exp(lses_[lse_index(p, r)] - reference) / sum;
          if (weight == 0.0) continue;
          const double x = load_as_double(outs_.data(), c_.dtype, (p * c_.rows() + r) * pitch_ + d);
          expected += weight * x;
          magnitude += weight * std::abs(x);
        }
        const double got = load_as_double(out.data(), c_.dtype, r * pitch_ + d);
        ASSERT_NEAR(got, expected, ulp * std::abs(expected) + 1e-5 * magnitude + (sum == 0.0 ? 0.0 : 1e-7))
            << "row " << r << " column " << d;
      }
      for (std::int64_t d = c_.dim; d < pitch_; ++d) {
        ASSERT_TRUE(std::isnan(load_as_double(out.data(), c_.dtype, r * pitch_ + d)))
            << "row " << r << ": padding written";
      }
    }
  }

 private:
  std::int64_t outs_stride(int axis) const {  // [parts, batch, seq, heads]
    const std::int64_t sizes[] = {c_.batch, c_.seq, c_.heads};
    return std::accumulate(sizes + axis, sizes + 3, pitch_, std::multiplies<>());
  }
  // Row r counts (batch, seq, head); lses lie as (part, batch, head, seq).
  std::size_t lse_index(std::int64_t p, std::int64_t r) const {
    const std::int64_t b = r / (c_.seq * c_.heads), s = r / c_.heads % c_.seq, h = r % c_.heads;
    return static_cast<std::size_t>(((p * c_.batch + b) * c_.heads + h) * c_.seq + s);
  }

  Case c_;
  std::size_t size_;
  std::int64_t pitch_;
  std::vector<std::uint8_t> outs_;
  std::vector<float> lses_;
  DeviceBuffer device_outs_, device_lses_, device_out_, device_lse_;
};

bool has_hopper() {
  const std::vector<Backend> backends = available_backends();
  return std::find(backends.begin(), backends.end(), Backend::kSm90) != backends.end();
}

// The text tells ctest that the whole file was skipped.
#define NEEDS_HOPPER() \
  if (!has_hopper())   \
  GTEST_SKIP() << "needs a GPU of compute capability 9.0; CUDA devices here: " << cuda::device_count()

std::vector<Case> cases() {
  std::vector<Case> all;
  for (const DType dtype : {DType::kFloat32, DType::kBFloat16, DType::kFloat16}) {
    // Whole vectors and odd rows, less and more than one warp's worth of a row.
    for (const std::int64_t dim : {1, 3, 8, 64, 80, 100, 128, 130, 256, 512, 576, 1024}) {
      all.push_back({.dtype = dtype, .parts = 3, .batch = 2, .seq = 5, .heads = 3, .dim = dim});
    }
    // Fewer parts than an unrolled step, ragged last steps, several groups of threads, more parts than they can share.
    for (const std::int64_t parts : {1, 2, 4, 5, 15, 16, 17, 31, 64, 100, 512, 1000}) {
      all.push_back({.dtype = dtype, .parts = parts, .batch = 1, .seq = 1, .heads = 7, .dim = 128});
      all.push_back({.dtype = dtype, .parts = parts, .batch = 3, .seq = 1, .heads = 2, .dim = 65});
    }
    all.push_back({.dtype = dtype, .parts = 4, .batch = 2, .seq = 3, .heads = 5, .dim = 64, .pad = 16});
    all.push_back({.dtype = dtype, .parts = 4, .batch = 2, .seq = 3, .heads = 5, .dim = 64, .pad = 1});
    all.push_back({.dtype = dtype, .parts = 4, .batch = 2, .seq = 3, .heads = 5, .dim = 64, .shift = 4});
    all.push_back({.dtype = dtype, .parts = 20, .batch = 1, .seq = 1, .heads = 4, .dim = 128, .logit_spread = 1000});
    all.push_back({.dtype = dtype, .parts = 6, .batch = 1, .seq = 4, .heads = 4, .dim = 32, .empty_part = 1.0});
    all.push_back({.dtype = dtype, .parts = 6, .batch = 1, .seq = 4, .heads = 4, .dim = 32, .wants_lse = false});
    all.push_back({.dtype = dtype, .parts = 2, .batch = 5, .seq = 300, .heads = 16, .dim = 64});
  }
  return all;
}

class CudaMerge : public testing::TestWithParam<Case> {};

TEST_P(CudaMerge, MatchesFloat64) {
  NEEDS_HOPPER();
  const Merge problem(GetParam());
  merge(problem.params());
  CUDA_OK(cudaDeviceSynchronize());
  problem.check();
}

INSTANTIATE_TEST_SUITE_P(Cases, CudaMerge, testing::ValuesIn(cases()),
                         [](const auto& test) { return test.param.name(); });

// Row 0 of a large batch has the bits that it has alone, and a repeated call has the bits of the first.
TEST(CudaMerge, BitsDependOnTheRowAlone) {
  NEEDS_HOPPER();
  for (const std::int64_t parts : {3, 40}) {
    const Case c{
        .dtype = DType::kFloat32, .parts = parts, .batch = 64, .seq = 1, .heads = 8, .dim = 128, .empty_part = 0.0};
    const Merge problem(c);
    merge(problem.params());
    const std::vector<std::uint8_t> all = problem.out();
    merge(problem.params());
    EXPECT_EQ(problem.out(), all);

    MergeParams alone = problem.params();
    for (TensorView* view : {&alone.outs, &alone.lses}) view->shape[1] = 1;
    for (TensorView* view : {&alone.out, &alone.lse}) view->shape[0] = 1;
    ASSERT_EQ(cudaMemset(alone.out.data, 0xff, all.size()), cudaSuccess);
    merge(alone);
    const std::vector<std::uint8_t> one = problem.out();
    const auto first_request = static_cast<std::ptrdiff_t>(c.heads * c.dim * 4);
    EXPECT_TRUE(std::equal(one.begin(), one.begin() + first_request, all.begin()));
  }
}

// Offsets beyond 2^31 elements: two parts that lie more than 4 GiB apart.
TEST(CudaMerge, OffsetsAre64Bit) {
  NEEDS_HOPPER();
  constexpr std::int64_t kApart = (std::int64_t{1} << 31) + 64, kDim = 64;
  std::size_t free_bytes = 0, total_bytes = 0;
  CUDA_OK(cudaMemGetInfo(&free_bytes, &total_bytes));
  const auto bytes = static_cast<std::size_t>(kApart + kDim) * 2;
  if (free_bytes < bytes + (std::size_t{1} << 30)) GTEST_SKIP() << "needs 5 GiB of free device memory";

  const DeviceBuffer outs(bytes);
  DeviceBuffer lses(2 * sizeof(float)), out(kDim * 2);
  const float equal_weights[2] = {0.0f, 0.0f};
  lses.upload(equal_weights);
  for (const std::int64_t part : {0, 1}) {
    std::vector<std::uint16_t> row(kDim);
    for (std::int64_t d = 0; d < kDim; ++d)
      store_from_float(row.data(), DType::kBFloat16, d, static_cast<float>(2 * part + d));
    CUDA_OK(cudaMemcpy(outs.data() + part * kApart * 2, row.data(), kDim * 2, cudaMemcpyHostToDevice));
  }
  const Device gpu{DeviceType::kCuda, 0};
  MergeParams params{.outs = TensorView(outs.data(), DType::kBFloat16, {2, 1, 1, 1, kDim}, gpu),
                     .lses = TensorView(lses.data(), DType::kFloat32, {2, 1, 1, 1}, gpu),
                     .out = TensorView(out.data(), DType::kBFloat16, {1, 1, 1, kDim}, gpu)};
  params.outs.strides[0] = kApart;
  merge(params);
  const std::vector<std::uint8_t> got = out.download();
  for (std::int64_t d = 0; d < kDim; ++d)
    EXPECT_EQ(load_as_float(got.data(), DType::kBFloat16, d), static_cast<float>(d + 1));
}

// Nothing on the way synchronizes or allocates: the call can be captured, and the graph replayed on new data.
TEST(CudaMerge, CanBeCaptured) {
  NEEDS_HOPPER();
  const Case c{.dtype = DType::kBFloat16, .parts = 9, .batch = 2, .seq = 1, .heads = 8, .dim = 128};
  const Merge problem(c);
  cudaStream_t stream = nullptr;
  CUDA_OK(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
  cudaGraph_t graph = nullptr;
  cudaGraphExec_t executable = nullptr;
  CUDA_OK(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal));
  MergeParams params = problem.params();
  params.stream = {stream};
  merge(params);
  CUDA_OK(cudaStreamEndCapture(stream, &graph));
  CUDA_OK(cudaGraphInstantiate(&executable, graph, 0));
  CUDA_OK(cudaGraphLaunch(executable, stream));
  CUDA_OK(cudaStreamSynchronize(stream));
  problem.check();
  CUDA_OK(cudaGraphExecDestroy(executable));
  CUDA_OK(cudaGraphDestroy(graph));
  CUDA_OK(cudaStreamDestroy(stream));
}

// A part's NaN is not hidden when the part has weight, and an lse of NaN spoils its row alone.
TEST(CudaMerge, NaNWithWeightSurvives) {
  NEEDS_HOPPER();
  const Device gpu{DeviceType::kCuda, 0};
  constexpr std::int64_t kDim = 4;
  const std::vector<float> parts = {1, 1, 1, 1, 1, kNaN, 1, 1, /* part 1 */ 3, 3, 3, 3, 3, 3, 3, 3};
  const std::vector<float> logits = {kNaN, 0, /* part 1 */ 0, 0};
  DeviceBuffer outs(parts.size() * 4), lses(logits.size() * 4), out(2 * kDim * 4), lse(2 * 4);
  outs.upload(parts.data());
  lses.upload(logits.data());
  merge({.outs = TensorView(outs.data(), DType::kFloat32, {2, 1, 1, 2, kDim}, gpu),
         .lses = TensorView(lses.data(), DType::kFloat32, {2, 1, 2, 1}, gpu),
         .out = TensorView(out.data(), DType::kFloat32, {1, 1, 2, kDim}, gpu),
         .lse = TensorView(lse.data(), DType::kFloat32, {1, 2, 1}, gpu)});
  const std::vector<std::uint8_t> got = out.download(), got_lse = lse.download();
  for (int d = 0; d < kDim; ++d) EXPECT_TRUE(std::isnan(load_as_float(got.data(), DType::kFloat32, d)));
  for (int d = 0; d < kDim; ++d) {
    const float x = load_as_float(got.data(), DType::kFloat32, kDim + d);
    if (d == 1) {
      EXPECT_TRUE(std::isnan(x));
    } else {
      EXPECT_FLOAT_EQ(x, 2.0f);
    }
  }
  EXPECT_TRUE(std::isnan(load_as_float(got_lse.data(), DType::kFloat32, 0)));
  EXPECT_FLOAT_EQ(load_as_float(got_lse.data(), DType::kFloat32, 1), std::log(2.0f));
}

TEST(CudaMerge, RefusesWhatItCannotRun) {
  NEEDS_HOPPER();
  const Case c{.dtype = DType::kFloat32, .parts = 2, .batch = 1, .seq = 1, .heads = 1, .dim = 4};
  const Merge problem(c);
  MergeParams params = problem.params();
  params.backend = Backend::kHost;
  try {
    merge(params);
    FAIL() << "the host backend took CUDA tensors";
  } catch (const Error& error) {
    EXPECT_EQ(error.code(), ErrorCode::kUnsupported);
    EXPECT_NE(std::string(error.what()).find("CUDA"), std::string::npos) << error.what();
  }
}

}  // namespace
}  // namespace heddle
