// core/numeric.h against first principles over every code; quantize and dequantize against the formula in their header.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <functional>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include <gtest/gtest.h>

#include "core/numeric.h"
#include "heddle/backend.h"
#include "heddle/error.h"
#include "heddle/quantize.h"
#include "host/quantize_kernels.h"

namespace heddle {
namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

// A small binary float format, by its definition.
struct Format {
  int exponent_bits, mantissa_bits, bias;
  bool ieee_specials;  // an all-ones exponent is infinity or NaN; otherwise only the all-ones code is NaN

  int sign_shift() const { return exponent_bits + mantissa_bits; }
  double decode(std::uint32_t code) const {
    const std::uint32_t magnitude = code & ((1u << sign_shift()) - 1);
    const int exponent = static_cast<int>(magnitude >> mantissa_bits);
    const std::uint32_t mantissa = magnitude & ((1u << mantissa_bits) - 1);
    const double sign = code >> sign_shift() != 0 ? -1.0 : 1.0;
    if (ieee_specials && exponent == (1 << exponent_bits) - 1) {
      return mantissa != 0 ? std::numeric_limits<double>::quiet_NaN() : sign * static_cast<double>(kInf);
    }
    if (!ieee_specials && magnitude == (1u << sign_shift()) - 1) return std::numeric_limits<double>::quiet_NaN();
    if (exponent == 0) return sign * std::ldexp(mantissa, 1 - bias - mantissa_bits);
    return sign * std::ldexp(mantissa + (1u << mantissa_bits), exponent - bias - mantissa_bits);
  }
  std::uint32_t largest() const {  // largest finite code
    return ieee_specials ? (((1u << exponent_bits) - 1) << mantissa_bits) - 1 : (1u << sign_shift()) - 2;
  }
};

constexpr Format kBf16{8, 7, 127, true}, kFp16{5, 10, 15, true}, kE4M3{4, 3, 7, false};

// Every code decodes as defined, and every boundary between two neighbouring codes rounds as round-half-even says.
void check_format(const Format& format, const std::function<float(std::uint32_t)>& decode,
                  const std::function<std::uint32_t(float)>& encode) {
  const std::uint32_t sign = 1u << format.sign_shift();
  for (std::uint32_t code = 0; code < 2 * sign; ++code) {
    const double want = format.decode(code);
    const float got = decode(code);
    if (std::isnan(want)) {
      EXPECT_TRUE(std::isnan(got)) << code;
      EXPECT_TRUE(std::isnan(decode(encode(got)))) << code;
    } else {
      EXPECT_EQ(static_cast<double>(got), want) << code;
      EXPECT_EQ(std::signbit(got), code >= sign) << code;
      if (std::isfinite(want)) {
        EXPECT_EQ(encode(got), code);
      }
    }
  }
  for (const std::uint32_t s : {0u, sign}) {
    const float unit = s != 0 ? -1.0f : 1.0f;
    for (std::uint32_t code = 0; code < format.largest(); ++code) {
      const auto tie = static_cast<float>((format.decode(code) + format.decode(code + 1)) / 2);
      const std::uint32_t even = code % 2 == 0 ? code : code + 1;
      EXPECT_EQ(encode(unit * tie), s | even) << code;
      EXPECT_EQ(encode(unit * std::nextafter(tie, 0.0f)), s | code) << code;
      EXPECT_EQ(encode(unit * std::nextafter(tie, kInf)), s | (code + 1)) << code;
    }
  }
}

TEST(Numeric, Bf16) {
  check_format(kBf16, [](std::uint32_t c) { return bf16_to_float(static_cast<std::uint16_t>(c)); }, float_to_bf16);
  EXPECT_EQ(float_to_bf16(kInf), 0x7f80);
  EXPECT_EQ(float_to_bf16(std::numeric_limits<float>::max()), 0x7f80);
  EXPECT_TRUE(
      std::isnan(bf16_to_float(float_to_bf16(float_from_bits(0x7f800001u)))));  // a payload in the low bits only
}

TEST(Numeric, Fp16) {
  check_format(kFp16, [](std::uint32_t c) { return fp16_to_float(static_cast<std::uint16_t>(c)); }, float_to_fp16);
  EXPECT_EQ(float_to_fp16(kInf), 0x7c00);
  EXPECT_EQ(float_to_fp16(65519.996f), 0x7bff);
  EXPECT_EQ(float_to_fp16(65520.0f), 0x7c00);
  EXPECT_EQ(float_to_fp16(-1e30f), 0xfc00);
  EXPECT_EQ(float_to_fp16(1e-40f), 0x0000);
  EXPECT_TRUE(std::isnan(fp16_to_float(float_to_fp16(float_from_bits(0xff800001u)))));
}

TEST(Numeric, E4M3) {
  check_format(
      kE4M3, [](std::uint32_t c) { return e4m3_to_float(static_cast<std::uint8_t>(c)); }, float_to_e4m3_saturating);
  EXPECT_EQ(kE4M3.decode(kE4M3.largest()), kE4M3Max);
  for (const float x : {448.0f, 463.0f, 464.0f, 1e9f, kInf}) {
    EXPECT_EQ(float_to_e4m3_saturating(x), 0x7e) << x;
    EXPECT_EQ(float_to_e4m3_saturating(-x), 0xfe) << x;
  }
}

TEST(Numeric, DoublesRoundOnce) {
  std::uint16_t h = 0;
  // Just above a tie of binary16, by less than a float sees.
  store_from_double(&h, DType::kFloat16, 0, 1.0 + 0x1p-11 + 0x1p-40);
  EXPECT_EQ(h, 0x3c01);
  store_from_double(&h, DType::kFloat16, 0, -(1.0 + 0x1p-11 - 0x1p-40));
  EXPECT_EQ(h, 0xbc00);
  store_from_double(&h, DType::kBFloat16, 0, 1.0 + 0x1p-8 + 0x1p-40);
  EXPECT_EQ(h, 0x3f81);
  store_from_double(&h, DType::kBFloat16, 0, 1e300);
  EXPECT_EQ(h, 0x7f80);
  store_from_double(&h, DType::kFloat16, 0, std::numeric_limits<double>::quiet_NaN());
  EXPECT_TRUE(std::isnan(fp16_to_float(h)));
  std::uint8_t c = 0;
  store_from_double(&c, DType::kFloat8E4M3, 0, 1.0 + 0x1p-4 + 0x1p-40);
  EXPECT_EQ(c, 0x39);
  const std::int64_t wide = 1234567;
  EXPECT_EQ(load_as_double(&wide, DType::kInt64, 0), 1234567.0);
}

// ---------------------------------------------------------------------------------------------------------------------

// Runs a test on every instruction set of this machine and several thread counts.
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

std::int64_t element_of(DType dtype) { return static_cast<std::int64_t>(size_of(dtype)); }

// A tensor of random normal numbers with gaps between rows, heads, tokens and batch elements.
struct Strided {
  std::vector<std::byte> memory;
  TensorView view;

  Strided(DType dtype, std::vector<std::int64_t> shape, std::byte fill = std::byte{0xa5}) {
    view.dtype = dtype;
    view.rank = static_cast<int>(shape.size());
    std::int64_t stride = 1;
    for (int i = view.rank - 1; i >= 0; --i) {
      view.shape[i] = shape[i];
      view.strides[i] = stride;
      stride = stride * std::max<std::int64_t>(shape[i], 1) + 3;
    }
    memory.assign(static_cast<std::size_t>(stride * element_of(dtype)), fill);
    view.data = memory.data();
  }
  std::int64_t offset(std::int64_t b, std::int64_t t, std::int64_t h, std::int64_t d) const {
    const int r = view.rank;
    return (r == 4 ? b * view.strides[0] : 0) + t * view.strides[r - 3] + h * view.strides[r - 2] +
           d * view.strides[r - 1];
  }
  double at(std::int64_t b, std::int64_t t, std::int64_t h, std::int64_t d) const {
    return load_as_double(view.data, view.dtype, offset(b, t, h, d));
  }
};

struct Case {
  DType in, out;
  bool packed;
  std::int64_t batch, tokens, heads, dim, partition;
  bool smooth;
  float static_scale;
};

std::ostream& operator<<(std::ostream& out, const Case& c) {
  return out << to_string(c.in) << " -> " << to_string(c.out) << (c.packed ? " packed" : "") << " [" << c.batch << ", "
             << c.tokens << ", " << c.heads << ", " << c.dim << "] partition " << c.partition << " smooth " << c.smooth
             << " static " << c.static_scale;
}

std::vector<std::int64_t> shape_of(const Case& c, bool packed) {
  if (packed) return {c.tokens, c.heads, c.dim};
  return {c.batch, c.tokens, c.heads, c.dim};
}

// The nearer of the two codes around |t|, the even one of a tie; saturates. `clamped`: a format without a limit would
// have gone further.
std::uint8_t nearest_e4m3(float t, bool& clamped) {
  static const std::vector<double> values = [] {
    std::vector<double> all;
    for (std::uint32_t code = 0; code <= kE4M3.largest(); ++code) all.push_back(kE4M3.decode(code));
    return all;
  }();
  const double size = std::fabs(t);
  clamped = size > 464.0;
  auto code = std::min<std::ptrdiff_t>(std::upper_bound(values.begin(), values.end(), size) - values.begin(), 126);
  const double up = values[code] - size, down = size - values[code - 1];
  if (down < up || (down == up && code % 2 == 1)) --code;
  return static_cast<std::uint8_t>(code | (std::signbit(t) ? 0x80 : 0));
}

void check_quantize(const Case& c) {
  std::mt19937 rng(static_cast<unsigned>(c.tokens * 131 + c.dim * 7 + c.partition));
  std::normal_distribution<double> normal(0.3, 1.0);
  Strided x(c.in, shape_of(c, c.packed));
  for (std::int64_t b = 0; b < c.batch; ++b) {
    for (std::int64_t t = 0; t < c.tokens; ++t) {
      for (std::int64_t h = 0; h < c.heads; ++h) {
        const double size = (t + h) % 5 == 3 ? 0.0 : std::exp(normal(rng));  // some groups are all zero
        for (std::int64_t d = 0; d < c.dim; ++d)
          store_from_double(x.view.data, c.in, x.offset(b, t, h, d), size * normal(rng));
      }
    }
  }
  const std::int64_t partitions = c.partition == 0 ? 1 : (c.tokens + c.partition - 1) / c.partition;
  Strided data(c.out, shape_of(c, c.packed));
  const std::vector<std::byte> before = data.memory;
  std::vector<std::int64_t> scale_shape = c.packed ? std::vector<std::int64_t>{partitions, c.heads}
                                                   : std::vector<std::int64_t>{c.batch, partitions, c.heads};
  if (c.partition == 0) scale_shape = {1};
  Strided scale(DType::kFloat32, scale_shape);
  Strided mean(DType::kFloat32, c.packed ? std::vector<std::int64_t>{c.heads, c.dim}
                                         : std::vector<std::int64_t>{c.batch, c.heads, c.dim});
  QuantScales scales{.scale = scale.view, .partition = c.partition};
  if (c.smooth) scales.mean = mean.view;
  const std::int64_t saturated = quantize(x.view, data.view, scales, c.static_scale);

  const auto mean_at = [&](std::int64_t b, std::int64_t h, std::int64_t d) {
    if (!c.smooth) return 0.0f;
    return mean.view
        .as<float>()[(c.packed ? 0 : b * mean.view.strides[0]) + h * mean.view.strides[mean.view.rank - 2] + d];
  };
  const auto difference = [&](std::int64_t b, std::int64_t t, std::int64_t h, std::int64_t d) {
    const auto value = static_cast<float>(x.at(b, t, h, d));
    return c.smooth ? value - mean_at(b, h, d) : value;
  };
  for (std::int64_t b = 0; c.smooth && b < c.batch; ++b) {
    for (std::int64_t h = 0; h < c.heads; ++h) {
      for (std::int64_t d = 0; d < c.dim; ++d) {
        double sum = 0;
        for (std::int64_t t = 0; t < c.tokens; ++t) sum += static_cast<float>(x.at(b, t, h, d));
        const double want = c.tokens == 0 ? 0.0 : sum / static_cast<double>(c.tokens);
        EXPECT_NEAR(mean_at(b, h, d), want, 1e-7 + 1e-7 * std::fabs(want));
      }
    }
  }
  const float limit = c.out == DType::kInt8 ? 127.0f : 448.0f;
  const std::int64_t step = c.partition == 0 ? c.tokens : c.partition;
  float tensor_max = 0;
  for (std::int64_t b = 0; b < c.batch; ++b) {
    for (std::int64_t t = 0; t < c.tokens; ++t) {
      for (std::int64_t h = 0; h < c.heads; ++h) {
        for (std::int64_t d = 0; d < c.dim; ++d) tensor_max = std::max(tensor_max, std::fabs(difference(b, t, h, d)));
      }
    }
  }
  std::int64_t want_saturated = 0, wrong = 0;
  for (std::int64_t b = 0; b < c.batch; ++b) {
    for (std::int64_t h = 0; h < c.heads; ++h) {
      for (std::int64_t first = 0; first < c.tokens; first += step) {
        const std::int64_t last = std::min(first + step, c.tokens);
        float biggest = 0;
        for (std::int64_t t = first; t < last; ++t) {
          for (std::int64_t d = 0; d < c.dim; ++d) biggest = std::max(biggest, std::fabs(difference(b, t, h, d)));
        }
        float want_scale = biggest / limit, got_scale = scale.view.as<float>()[0];
        if (c.partition == 0) {
          want_scale = c.static_scale > 0 ? c.static_scale : tensor_max / limit;
        } else {
          const TensorView& s = scale.view;
          got_scale = s.as<float>()[(c.packed ? 0 : b * s.strides[0]) + first / step * s.strides[s.rank - 2] +
                                    h * s.strides[s.rank - 1]];
        }
        EXPECT_EQ(got_scale, want_scale);
        for (std::int64_t t = first; t < last; ++t) {
          for (std::int64_t d = 0; d < c.dim; ++d) {
            const float ratio = want_scale == 0 ? 0.0f : difference(b, t, h, d) / want_scale;
            if (c.out == DType::kInt8) {
              const float rounded = std::nearbyint(ratio);
              want_saturated += std::fabs(rounded) > 127 ? 1 : 0;
              wrong += data.at(b, t, h, d) != std::clamp(rounded, -127.0f, 127.0f) ? 1 : 0;
            } else {
              bool clamped = false;
              const std::uint8_t code = want_scale == 0 ? 0 : nearest_e4m3(ratio, clamped);
              want_saturated += clamped ? 1 : 0;
              wrong += static_cast<std::uint8_t>(data.memory[data.offset(b, t, h, d)]) != code ? 1 : 0;
            }
          }
        }
      }
    }
  }
  EXPECT_EQ(wrong, 0);
  EXPECT_EQ(saturated, want_saturated);
  EXPECT_TRUE(c.static_scale == 0 || saturated > 0);  // the case has something to saturate

  Strided back(DType::kFloat32, shape_of(c, c.packed));
  dequantize(data.view, scales, back.view);
  for (std::int64_t b = 0; b < c.batch; ++b) {
    for (std::int64_t t = 0; t < c.tokens; ++t) {
      for (std::int64_t h = 0; h < c.heads; ++h) {
        const TensorView& s = scale.view;
        const float unit = c.partition == 0
                               ? s.as<float>()[0]
                               : s.as<float>()[(c.packed ? 0 : b * s.strides[0]) +
                                               t / c.partition * s.strides[s.rank - 2] + h * s.strides[s.rank - 1]];
        for (std::int64_t d = 0; d < c.dim; ++d) {
          const auto want = static_cast<float>(data.at(b, t, h, d) * unit + mean_at(b, h, d));
          ASSERT_EQ(back.at(b, t, h, d), want);
        }
      }
    }
  }
  // The gaps are as they were.
  std::vector<std::byte> restored = data.memory;
  for (std::int64_t b = 0; b < c.batch; ++b) {
    for (std::int64_t t = 0; t < c.tokens; ++t) {
      for (std::int64_t h = 0; h < c.heads; ++h) {
        for (std::int64_t d = 0; d < c.dim; ++d) restored[data.offset(b, t, h, d)] = before[0];
      }
    }
  }
  EXPECT_EQ(restored, before);
}

TEST(Quantize, EveryGranularityAndType) {
  std::vector<Case> cases;
  for (const DType out : {DType::kInt8, DType::kFloat8E4M3}) {
    for (const DType in : {DType::kFloat32, DType::kBFloat16, DType::kFloat16, DType::kFloat64}) {
      for (const bool smooth : {false, true}) {
        cases.push_back({in, out, false, 2, 19, 3, 40, 0, smooth, 0.0f});
        cases.push_back({in, out, false, 2, 19, 3, 17, 1, smooth, 0.0f});
        cases.push_back({in, out, false, 1, 37, 2, 64, 16, smooth, 0.0f});  // ragged last partition
        cases.push_back({in, out, true, 1, 29, 3, 33, 8, smooth, 0.0f});
        cases.push_back({in, out, true, 1, 29, 3, 33, 1000, smooth, 0.0f});
      }
      cases.push_back({in, out, false, 2, 23, 2, 24, 0, false, 0.004f});
    }
    cases.push_back({DType::kFloat32, out, false, 1, 1100, 4, 128, 0, true, 0.0f});  // several chunks and threads
    cases.push_back({DType::kFloat32, out, false, 1, 700, 2, 300, 64, true, 0.0f});  // rows longer than a block
    cases.push_back({DType::kFloat32, out, true, 1, 5, 1, 1, 2, false, 0.0f});
  }
  on_every_host([&] {
    for (const Case& c : cases) {
      SCOPED_TRACE(testing::Message() << c);
      check_quantize(c);
    }
  });
}

TEST(Quantize, TiesGoToEven) {
  on_every_host([] {
    std::vector<float> x;
    for (int i = -256; i <= 256; ++i) x.push_back(static_cast<float>(i) * 0.5f);
    std::vector<std::int8_t> q(x.size());
    const auto n = static_cast<std::int64_t>(x.size());
    float scale = 0;
    const std::int64_t saturated =
        quantize(TensorView(x.data(), DType::kFloat32, {1, 1, n}), TensorView(q.data(), DType::kInt8, {1, 1, n}),
                 {.scale = TensorView(&scale, DType::kFloat32, {1})}, 1.0f);
    for (std::size_t i = 0; i < x.size(); ++i) {
      EXPECT_EQ(q[i], std::clamp(std::nearbyint(x[i]), -127.0f, 127.0f)) << x[i];
    }
    EXPECT_EQ(saturated, 4);  // +-127.5 and +-128
  });
}

TEST(Quantize, RoundsTheQuotientAndNothingElse) {
  // Multiplying by a reciprocal gets some of these wrong.
  std::mt19937 rng(5);
  std::uniform_real_distribution<float> uniform(-1.0f, 1.0f);
  on_every_host([&] {
    for (int trial = 0; trial < 200; ++trial) {
      std::vector<float> x(512);
      const float unit = std::fabs(uniform(rng)) + 0.01f;
      for (std::size_t i = 0; i < x.size(); ++i) x[i] = (static_cast<float>(i % 255) - 127.0f + 0.5f) * unit;
      std::vector<std::int8_t> q(x.size());
      float scale = 0;
      quantize(TensorView(x.data(), DType::kFloat32, {1, 1, 512}), TensorView(q.data(), DType::kInt8, {1, 1, 512}),
               {.scale = TensorView(&scale, DType::kFloat32, {1})}, unit);
      for (std::size_t i = 0; i < x.size(); ++i) {
        ASSERT_EQ(q[i], std::clamp(std::nearbyint(x[i] / unit), -127.0f, 127.0f)) << x[i] << " / " << unit;
      }
    }
  });
}

TEST(Quantize, ExtremeMagnitudes) {
  on_every_host([] {
    const float max = 3e38f;
    for (const std::vector<float>& x :
         {std::vector<float>{max, -max, 1.0f, max / 2}, std::vector<float>{1e-44f, 0, 0, -1e-44f},
          std::vector<float>{0, -0.0f, 0, 0}, std::vector<float>{1e-30f, 2e-30f, 0, -3e-30f}}) {
      for (const DType dtype : {DType::kInt8, DType::kFloat8E4M3}) {
        std::vector<std::uint8_t> q(4, 0x55);
        std::vector<float> back(4, kNaN);
        float scale = kNaN;
        const QuantScales scales{.scale = TensorView(&scale, DType::kFloat32, {1})};
        quantize(TensorView(x.data(), DType::kFloat32, {1, 1, 4}), TensorView(q.data(), dtype, {1, 1, 4}), scales);
        dequantize(TensorView(q.data(), dtype, {1, 1, 4}), scales, TensorView(back.data(), DType::kFloat32, {1, 1, 4}));
        float biggest = 0;
        for (const float value : x) biggest = std::max(biggest, std::fabs(value));
        for (std::size_t i = 0; i < 4; ++i) {
          EXPECT_NEAR(back[i] / max, x[i] / max, biggest / max / 16) << x[i];
          EXPECT_TRUE(std::isfinite(back[i]));
        }
      }
    }
  });
}

TEST(Quantize, EmptyTensors) {
  float scale = kNaN, mean[6] = {kNaN, kNaN, kNaN, kNaN, kNaN, kNaN};
  EXPECT_EQ(
      quantize(
          TensorView(nullptr, DType::kFloat32, {1, 0, 2, 3}), TensorView(nullptr, DType::kInt8, {1, 0, 2, 3}),
          {.scale = TensorView(&scale, DType::kFloat32, {1}), .mean = TensorView(mean, DType::kFloat32, {1, 2, 3})}),
      0);
  EXPECT_EQ(scale, 0.0f);
  for (const float m : mean) EXPECT_EQ(m, 0.0f);
  EXPECT_EQ(quantize(TensorView(nullptr, DType::kFloat32, {0, 2, 3}), TensorView(nullptr, DType::kInt8, {0, 2, 3}),
                     {.scale = TensorView(nullptr, DType::kFloat32, {0, 2}), .partition = 4}),
            0);
}

// ---------------------------------------------------------------------------------------------------------------------

template <class Fn>
void expect_error(ErrorCode code, const std::string& argument, Fn&& fn) {
  try {
    fn();
    ADD_FAILURE() << "no error for " << argument;
  } catch (const Error& error) {
    EXPECT_EQ(error.code(), code) << error.what();
    EXPECT_EQ(error.argument(), argument) << error.what();
  }
}

TEST(Quantize, RefusesAndLeavesOutputsAlone) {
  std::vector<float> x(2 * 6 * 3 * 8, 1.0f), scale(2 * 6 * 3, kNaN), mean(2 * 3 * 8, kNaN);
  std::vector<std::int8_t> q(x.size(), 77);
  const TensorView xv(x.data(), DType::kFloat32, {2, 6, 3, 8}), qv(q.data(), DType::kInt8, {2, 6, 3, 8});
  const TensorView one(scale.data(), DType::kFloat32, {1}), two(scale.data(), DType::kFloat32, {2, 3, 3});
  const TensorView mv(mean.data(), DType::kFloat32, {2, 3, 8});

  for (const float bad : {kNaN, kInf, -kInf}) {
    for (const QuantScales& scales : {QuantScales{.scale = one}, QuantScales{.scale = two, .partition = 2},
                                      QuantScales{.scale = one, .mean = mv}}) {
      x[100] = bad;
      expect_error(ErrorCode::kValue, "x", [&] { quantize(xv, qv, scales); });
      x[100] = 1.0f;
    }
  }
  try {
    x[2 * 24 + 8 + 5] = kNaN;
    quantize(xv, qv, {.scale = one});
    ADD_FAILURE();
  } catch (const Error& error) {
    EXPECT_NE(std::string(error.what()).find("[0, 2, 1, 5]"), std::string::npos) << error.what();
  }
  x[2 * 24 + 8 + 5] = 1.0f;
  for (std::size_t t = 0; t < 6; ++t) x[t * 24] = t == 0 ? -3e38f : 3e38f;
  expect_error(ErrorCode::kValue, "x", [&] { quantize(xv, qv, {.scale = one, .mean = mv}); });
  std::fill(x.begin(), x.end(), 1.0f);

  TensorView wrong = xv;
  wrong.dtype = DType::kInt8;
  expect_error(ErrorCode::kDType, "x", [&] { quantize(wrong, qv, {.scale = one}); });
  expect_error(ErrorCode::kShape, "x",
               [&] { quantize(TensorView(x.data(), DType::kFloat32, {6, 8}), qv, {.scale = one}); });
  expect_error(ErrorCode::kShape, "x", [&] { quantize({}, qv, {.scale = one}); });
  wrong = xv;
  wrong.strides[3] = 2;
  expect_error(ErrorCode::kLayout, "x", [&] { quantize(wrong, qv, {.scale = one}); });
  wrong = qv;
  wrong.shape[1] = 5;
  expect_error(ErrorCode::kShape, "data", [&] { quantize(xv, wrong, {.scale = one}); });
  wrong = qv;
  wrong.dtype = DType::kBFloat16;
  expect_error(ErrorCode::kDType, "data", [&] { quantize(xv, wrong, {.scale = one}); });
  wrong = qv;
  wrong.strides[0] = 0;
  expect_error(ErrorCode::kLayout, "data", [&] { quantize(xv, wrong, {.scale = one}); });
  wrong = qv;
  wrong.device = {DeviceType::kCuda, 0};
  expect_error(ErrorCode::kDevice, "data", [&] { quantize(xv, wrong, {.scale = one}); });
  expect_error(ErrorCode::kShape, "scale", [&] { quantize(xv, qv, {}); });
  expect_error(ErrorCode::kShape, "scale", [&] { quantize(xv, qv, {.scale = two}); });
  expect_error(ErrorCode::kShape, "scale", [&] { quantize(xv, qv, {.scale = two, .partition = 4}); });
  expect_error(ErrorCode::kValue, "partition", [&] { quantize(xv, qv, {.scale = two, .partition = -1}); });
  expect_error(ErrorCode::kShape, "mean", [&] { quantize(xv, qv, {.scale = one, .mean = two}); });
  expect_error(ErrorCode::kValue, "static_scale", [&] { quantize(xv, qv, {.scale = one}, -1.0f); });
  expect_error(ErrorCode::kValue, "static_scale", [&] { quantize(xv, qv, {.scale = one}, kNaN); });
  expect_error(ErrorCode::kValue, "static_scale", [&] { quantize(xv, qv, {.scale = two, .partition = 2}, 1.0f); });
  TensorView cuda_x = xv, cuda_q = qv, cuda_s = one;
  for (TensorView* view : {&cuda_x, &cuda_q, &cuda_s}) view->device = {DeviceType::kCuda, 0};
  expect_error(ErrorCode::kUnsupported, "x", [&] { quantize(cuda_x, cuda_q, {.scale = cuda_s}); });

  EXPECT_TRUE(std::all_of(q.begin(), q.end(), [](int value) { return value == 77; }));
  EXPECT_TRUE(std::all_of(scale.begin(), scale.end(), [](float value) { return std::isnan(value); }));
  EXPECT_TRUE(std::all_of(mean.begin(), mean.end(), [](float value) { return std::isnan(value); }));

  std::vector<float> back(x.size());
  const TensorView out(back.data(), DType::kFloat32, {2, 6, 3, 8});
  expect_error(ErrorCode::kDType, "data", [&] { dequantize(xv, {.scale = one}, out); });
  expect_error(ErrorCode::kDType, "out", [&] { dequantize(qv, {.scale = one}, qv); });
  expect_error(ErrorCode::kShape, "out",
               [&] { dequantize(qv, {.scale = one}, TensorView(back.data(), DType::kFloat32, {2, 6, 3, 4})); });
}

// The kernels that only the cache uses.
TEST(QuantizeKernels, SameBitsOnEveryIsa) {
  std::mt19937 rng(11);
  std::normal_distribution<float> normal;
  std::vector<float> x(700);
  for (float& value : x) value = normal(rng) * std::exp(4 * normal(rng));
  std::vector<std::uint16_t> half(x.size());
  for (std::size_t i = 0; i < x.size(); ++i) half[i] = float_to_fp16(x[i]);
  for (const std::int64_t n : {1, 15, 16, 17, 256, 257, 700}) {
    set_host_isa("portable");
    const auto& base = host::quantize_kernels();
    const double want = base.sum_squares(x.data(), DType::kFloat32, n);
    double exact = 0;
    for (std::int64_t i = 0; i < n; ++i) exact += static_cast<double>(x[i]) * x[i];
    EXPECT_NEAR(want, exact, 1e-13 * exact);
    std::vector<std::int8_t> grown(static_cast<std::size_t>(n));
    for (std::int64_t i = 0; i < n; ++i) grown[i] = static_cast<std::int8_t>(i % 255 - 127);
    on_every_host([&] {
      const auto& kernels = host::quantize_kernels();
      EXPECT_EQ(kernels.sum_squares(x.data(), DType::kFloat32, n), want);
      std::vector<std::int8_t> got = grown;
      kernels.rescale(got.data(), n, 0.013f, 0.0171f);
      for (std::int64_t i = 0; i < n; ++i) {
        const float t = static_cast<float>(grown[i]) * 0.013f;
        ASSERT_EQ(got[i], std::nearbyint(t / 0.0171f));
      }
      std::vector<std::uint16_t> bf(static_cast<std::size_t>(n));
      kernels.convert(half.data(), DType::kFloat16, n, bf.data(), DType::kBFloat16);
      for (std::int64_t i = 0; i < n; ++i) ASSERT_EQ(bf[i], float_to_bf16(fp16_to_float(half[i])));
      std::vector<double> wide(x.begin(), x.begin() + n);
      for (double& value : wide) value += 0x1p-30 * value;
      kernels.convert(wide.data(), DType::kFloat64, n, bf.data(), DType::kFloat16);
      for (std::int64_t i = 0; i < n; ++i) ASSERT_EQ(bf[i], float_to_fp16(double_to_float_odd(wide[i])));
    });
  }
}

}  // namespace
}  // namespace heddle
