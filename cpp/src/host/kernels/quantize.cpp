// Plain loops over blocks of floats, which the compiler vectorises for each instruction set. To give the same bits on
// all of them, no product feeds a sum unless the product is exact (a fused multiply-add would round once, not twice),
// and sums run in a fixed number of lanes.
#include <cstring>

#include "core/numeric.h"
#include "host/quantize_kernels.h"

namespace heddle::host::HEDDLE_ISA {
namespace {

constexpr std::int64_t kBlock = 256;
constexpr int kLanes = 16;

std::int64_t block_size(std::int64_t n, std::int64_t first) { return n - first < kBlock ? n - first : kBlock; }

// Elements first .. first + n of a row as floats: the row itself if it is float32, else converted into `block`.
const float* floats(const void* x, DType dtype, std::int64_t first, std::int64_t n, float* block) {
  switch (dtype) {
    case DType::kFloat32: return static_cast<const float*>(x) + first;
    case DType::kFloat64: {
      const double* in = static_cast<const double*>(x) + first;
      for (std::int64_t i = 0; i < n; ++i) block[i] = static_cast<float>(in[i]);
      return block;
    }
    case DType::kBFloat16: {
      const std::uint16_t* in = static_cast<const std::uint16_t*>(x) + first;
      for (std::int64_t i = 0; i < n; ++i) block[i] = bf16_to_float(in[i]);
      return block;
    }
    case DType::kFloat16: {
      const std::uint16_t* in = static_cast<const std::uint16_t*>(x) + first;
      for (std::int64_t i = 0; i < n; ++i) block[i] = fp16_to_float(in[i]);
      return block;
    }
    default: __builtin_unreachable();
  }
}

void store_floats(const float* x, std::int64_t n, void* out, DType dtype, std::int64_t first) {
  switch (dtype) {
    case DType::kFloat32:
      std::memcpy(static_cast<float*>(out) + first, x, static_cast<std::size_t>(n) * sizeof(float));
      return;
    case DType::kFloat64: {
      double* to = static_cast<double*>(out) + first;
      for (std::int64_t i = 0; i < n; ++i) to[i] = x[i];
      return;
    }
    case DType::kBFloat16: {
      std::uint16_t* to = static_cast<std::uint16_t*>(out) + first;
      for (std::int64_t i = 0; i < n; ++i) to[i] = float_to_bf16(x[i]);
      return;
    }
    case DType::kFloat16: {
      std::uint16_t* to = static_cast<std::uint16_t*>(out) + first;
      for (std::int64_t i = 0; i < n; ++i) to[i] = float_to_fp16(x[i]);
      return;
    }
    default: __builtin_unreachable();
  }
}

std::uint32_t max_abs_bits(const void* x, DType dtype, const float* mean, std::int64_t n) {
  float block[kBlock];
  std::uint32_t best = 0;
  for (std::int64_t first = 0; first < n; first += kBlock) {
    const std::int64_t count = block_size(n, first);
    const float* in = floats(x, dtype, first, count, block);
    if (mean == nullptr) {
      for (std::int64_t i = 0; i < count; ++i) {
        const std::uint32_t bits = float_bits(in[i]) & 0x7fffffffu;
        best = bits > best ? bits : best;
      }
    } else {
      for (std::int64_t i = 0; i < count; ++i) {
        const std::uint32_t bits = float_bits(in[i] - mean[first + i]) & 0x7fffffffu;
        best = bits > best ? bits : best;
      }
    }
  }
  return best;
}

// Adding 1.5 * 2^23 leaves the integer nearest to t (ties to even) in the low bits of the sum, for |t| < 2^22.
constexpr float kRoundToInt = 12582912.0f;

std::int32_t quantize_int8(const float* x, std::int64_t n, float scale, std::int8_t* out) {
  std::int32_t saturated = 0;
  for (std::int64_t i = 0; i < n; ++i) {
    float t = x[i] / scale;
    // 127.5 is a tie that goes to 128.
    saturated += (t >= 127.5f ? 1 : 0) + (t <= -127.5f ? 1 : 0);
    t = t < kInt8Max ? t : kInt8Max;
    t = t > -kInt8Max ? t : -kInt8Max;
    out[i] = static_cast<std::int8_t>(static_cast<std::uint8_t>(float_bits(t + kRoundToInt)));
  }
  return saturated;
}

std::int32_t quantize_e4m3(const float* x, std::int64_t n, float scale, std::uint8_t* out) {
  std::int32_t saturated = 0;
  for (std::int64_t i = 0; i < n; ++i) {
    const float t = x[i] / scale;
    // 464 lies between 448 and what would be 480, and goes to the even of them: 448.
    saturated += (t > 464.0f ? 1 : 0) + (t < -464.0f ? 1 : 0);
    out[i] = float_to_e4m3_saturating(t);
  }
  return saturated;
}

std::int64_t quantize(const void* x, DType dtype, const float* mean, std::int64_t n, float scale, void* out,
                      DType out_dtype) {
  if (scale == 0.0f) {
    std::memset(out, 0, static_cast<std::size_t>(n));
    return 0;
  }
  float block[kBlock];
  std::int64_t saturated = 0;
  for (std::int64_t first = 0; first < n; first += kBlock) {
    const std::int64_t count = block_size(n, first);
    const float* in = floats(x, dtype, first, count, block);
    if (mean != nullptr) {
      for (std::int64_t i = 0; i < count; ++i) block[i] = in[i] - mean[first + i];
      in = block;
    }
    saturated += out_dtype == DType::kInt8 ? quantize_int8(in, count, scale, static_cast<std::int8_t*>(out) + first)
                                           : quantize_e4m3(in, count, scale, static_cast<std::uint8_t*>(out) + first);
  }
  return saturated;
}

void rescale(std::int8_t* x, std::int64_t n, float from, float to) {
  for (std::int64_t i = 0; i < n; ++i) {
    const float t = static_cast<float>(x[i]) * from / to;
    x[i] = static_cast<std::int8_t>(static_cast<std::uint8_t>(float_bits(t + kRoundToInt)));
  }
}

void dequantize_block(const float* q, const float* mean, std::int64_t n, float scale, float* out) {
  if (mean == nullptr) {
    for (std::int64_t i = 0; i < n; ++i) out[i] = q[i] * scale;
  } else {
    // In float64 the product is exact.
    for (std::int64_t i = 0; i < n; ++i) {
      out[i] =
          static_cast<float>(static_cast<double>(q[i]) * static_cast<double>(scale) + static_cast<double>(mean[i]));
    }
  }
}

void dequantize(const void* q, DType dtype, const float* mean, std::int64_t n, float scale, float* out) {
  float block[kBlock];
  for (std::int64_t first = 0; first < n; first += kBlock) {
    const std::int64_t count = block_size(n, first);
    if (dtype == DType::kInt8) {
      const std::int8_t* in = static_cast<const std::int8_t*>(q) + first;
      for (std::int64_t i = 0; i < count; ++i) block[i] = in[i];
    } else {
      const std::uint8_t* in = static_cast<const std::uint8_t*>(q) + first;
      for (std::int64_t i = 0; i < count; ++i) block[i] = e4m3_to_float(in[i]);
    }
    dequantize_block(block, mean == nullptr ? nullptr : mean + first, count, scale, out + first);
  }
}

void convert(const void* x, DType dtype, std::int64_t n, void* out, DType out_dtype) {
  if (dtype == out_dtype) {
    std::memcpy(out, x,
                static_cast<std::size_t>(n) * (dtype == DType::kFloat64   ? 8
                                               : dtype == DType::kFloat32 ? 4
                                                                          : 2));
    return;
  }
  if (dtype == DType::kFloat64) {
    // Through float32 it would be rounded twice.
    for (std::int64_t i = 0; i < n; ++i) store_from_double(out, out_dtype, i, static_cast<const double*>(x)[i]);
    return;
  }
  float block[kBlock];
  for (std::int64_t first = 0; first < n; first += kBlock) {
    const std::int64_t count = block_size(n, first);
    store_floats(floats(x, dtype, first, count, block), count, out, out_dtype, first);
  }
}

double sum_squares(const void* x, DType dtype, std::int64_t n) {
  float block[kBlock];
  double lanes[kLanes] = {};
  for (std::int64_t first = 0; first < n; first += kBlock) {
    const std::int64_t count = block_size(n, first);
    const float* in = floats(x, dtype, first, count, block);
    std::int64_t i = 0;
    // The square of a float is exact in float64.
    for (; i + kLanes <= count; i += kLanes) {
      for (int lane = 0; lane < kLanes; ++lane) {
        lanes[lane] += static_cast<double>(in[i + lane]) * static_cast<double>(in[i + lane]);
      }
    }
    for (int lane = 0; i < count; ++i, ++lane) lanes[lane] += static_cast<double>(in[i]) * static_cast<double>(in[i]);
  }
  for (int width = kLanes / 2; width > 0; width /= 2) {
    for (int lane = 0; lane < width; ++lane) lanes[lane] += lanes[lane + width];
  }
  return lanes[0];
}

void accumulate(const void* x, DType dtype, std::int64_t n, double* sum) {
  float block[kBlock];
  for (std::int64_t first = 0; first < n; first += kBlock) {
    const std::int64_t count = block_size(n, first);
    const float* in = floats(x, dtype, first, count, block);
    for (std::int64_t i = 0; i < count; ++i) sum[first + i] += static_cast<double>(in[i]);
  }
}

void merge_row(const void* const* parts, const float* weights, std::int64_t num_parts, DType dtype, std::int64_t n,
               void* out, DType out_dtype) {
  float block[kBlock];
  float sum[kBlock];
  for (std::int64_t first = 0; first < n; first += kBlock) {
    const std::int64_t count = block_size(n, first);
    for (std::int64_t i = 0; i < count; ++i) sum[i] = 0.0f;
    for (std::int64_t p = 0; p < num_parts; ++p) {
      if (weights[p] == 0.0f) continue;
      const float* in = floats(parts[p], dtype, first, count, block);
      for (std::int64_t i = 0; i < count; ++i) sum[i] += weights[p] * in[i];
    }
    store_floats(sum, count, out, out_dtype, first);
  }
}

}  // namespace

extern const QuantizeKernels kQuantizeKernels;
const QuantizeKernels kQuantizeKernels = {
    .max_abs_bits = max_abs_bits,
    .quantize = quantize,
    .rescale = rescale,
    .dequantize = dequantize,
    .convert = convert,
    .sum_squares = sum_squares,
    .accumulate = accumulate,
    .merge_row = merge_row,
};

}  // namespace heddle::host::HEDDLE_ISA
