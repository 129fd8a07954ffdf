#include "heddle/quantize.h"

#include <algorithm>
#include <atomic>
#include <vector>

#include "core/check.h"
#include "core/threads.h"
#include "host/quantize_kernels.h"
#include "store/rows.h"

namespace heddle {
namespace {

using store::TokenRows;

// The scales of a quantized tensor: one, or one a partition and head.
struct ScaleGrid {
  float* data;
  std::int64_t partition, partitions;
  std::int64_t batch_stride = 0, partition_stride = 0, head_stride = 0;

  ScaleGrid(const QuantScales& scales, const TokenRows& rows)
      : data(scales.scale.as<float>()),
        partition(std::min(scales.partition, std::max<std::int64_t>(rows.tokens, 1))),
        partitions(count(rows.tokens, scales.partition)) {
    if (partition == 0) return;
    const TensorView& view = scales.scale;
    batch_stride = view.rank == 3 ? view.strides[0] : 0;
    partition_stride = view.strides[view.rank - 2];
    head_stride = view.strides[view.rank - 1];
  }
  static std::int64_t count(std::int64_t tokens, std::int64_t partition) {
    return partition == 0 ? 1 : tokens / partition + (tokens % partition != 0 ? 1 : 0);
  }
  float& at(std::int64_t b, std::int64_t p, std::int64_t h) const {
    return data[b * batch_stride + p * partition_stride + h * head_stride];
  }
};

void check_quantized(const TensorView& data, const QuantScales& scales) {
  check::dtype("data", data, {DType::kInt8, DType::kFloat8E4M3});
  check::contiguous_rows("data", data);
  check::at_least("partition", scales.partition, 0);
  check::given("scale", scales.scale);
  check::dtype("scale", scales.scale, {DType::kFloat32});
  check::device("scale", scales.scale, data.device, "data");
  const bool packed = data.rank == 3;
  const std::int64_t tokens = data.shape[data.rank - 3], heads = data.shape[data.rank - 2];
  if (scales.partition == 0) {
    check::shape("scale", scales.scale, {1});
  } else {
    const std::int64_t partitions = ScaleGrid::count(tokens, scales.partition);
    if (packed) {
      check::shape("scale", scales.scale, {partitions, heads});
    } else {
      check::shape("scale", scales.scale, {data.shape[0], partitions, heads});
    }
  }
  if (!scales.mean.given()) return;
  const std::int64_t dim = data.shape[data.rank - 1];
  check::given("mean", scales.mean);
  check::dtype("mean", scales.mean, {DType::kFloat32});
  check::device("mean", scales.mean, data.device, "data");
  if (packed) {
    check::shape("mean", scales.mean, {heads, dim});
  } else {
    check::shape("mean", scales.mean, {data.shape[0], heads, dim});
  }
  check::contiguous_rows("mean", scales.mean);
}

void check_same_shape(std::string_view argument, const TensorView& view, const TensorView& like,
                      std::string_view owner) {
  check::rank(argument, view, like.rank);
  for (int i = 0; i < like.rank; ++i) {
    check::axis(argument, view, i, "size", like.shape[i], check::text("as in ", owner));
  }
}

float* mean_row(const TensorView& mean, std::int64_t b, std::int64_t h) {
  if (!mean.given()) return nullptr;
  const std::int64_t batch_stride = mean.rank == 3 ? mean.strides[0] : 0;
  return mean.as<float>() + b * batch_stride + h * mean.strides[mean.rank - 2];
}

// Mean over the tokens of every (batch element, head, dimension), [batch, heads, dim], in float64. Sums of fixed chunks
// are added in order, so the bits do not depend on the number of threads.
std::vector<float> mean_over_tokens(const TokenRows& x) {
  constexpr std::int64_t kChunk = 512;
  const auto& kernels = host::quantize_kernels();
  const std::int64_t width = x.heads * x.dim, chunks = (x.tokens + kChunk - 1) / kChunk;
  std::vector<double> sums(static_cast<std::size_t>(x.batch * chunks * width));
  for_ranges(x.batch * chunks, x.numel(), [&](std::int64_t first, std::int64_t last) {
    for (std::int64_t i = first; i < last; ++i) {
      const std::int64_t b = i / chunks, t0 = i % chunks * kChunk;
      for (std::int64_t t = t0; t < std::min(t0 + kChunk, x.tokens); ++t) {
        for (std::int64_t h = 0; h < x.heads; ++h) {
          kernels.accumulate(x.row(b, t, h), x.dtype, x.dim, sums.data() + i * width + h * x.dim);
        }
      }
    }
  });
  std::vector<float> mean(static_cast<std::size_t>(x.batch * width));
  for (std::int64_t b = 0; b < x.batch; ++b) {
    double* total = sums.data() + b * chunks * width;
    for (std::int64_t c = 1; c < chunks; ++c) {
      for (std::int64_t i = 0; i < width; ++i) total[i] += total[c * width + i];
    }
    for (std::int64_t i = 0; i < width && chunks > 0; ++i) {
      mean[b * width + i] = static_cast<float>(total[i] / static_cast<double>(x.tokens));
    }
  }
  return mean;
}

// Calls fn(b, p, h) for a thread's share of the (batch element, partition, head) groups.
template <class Fn>
void for_groups(const TokenRows& x, std::int64_t partitions, Fn&& fn) {
  for_ranges(x.batch * partitions * x.heads, x.numel(), [&](std::int64_t first, std::int64_t last) {
    if (first == last) return;
    std::int64_t h = first % x.heads, p = first / x.heads % partitions, b = first / x.heads / partitions;
    for (std::int64_t i = first; i < last; ++i) {
      fn(b, p, h);
      if (++h < x.heads) continue;
      h = 0;
      if (++p < partitions) continue;
      p = 0;
      ++b;
    }
  });
}

}  // namespace

std::int64_t quantize(const TensorView& x, const TensorView& data, const QuantScales& scales, float static_scale) {
  store::check_float_rows("x", x);
  check::given("data", data);
  check_same_shape("data", data, x, "x");
  check::device("data", data, x.device, "x");
  check_quantized(data, scales);
  check::writable("data", data);
  check::writable("scale", scales.scale);
  if (scales.mean.given()) check::writable("mean", scales.mean);
  check::finite("static_scale", static_scale);
  if (static_scale < 0.0f) {
    check::fail(ErrorCode::kValue, "static_scale",
                check::text(static_scale, "; allowed are numbers above 0, or 0 for the scale of x itself"));
  }
  if (static_scale > 0.0f && scales.partition > 0) {
    check::fail(ErrorCode::kValue, "static_scale",
                check::text(static_scale, " with partition = ", scales.partition, "; allowed is 0, or partition = 0"));
  }
  store::check_cpu("x", x, "quantize");

  const auto& kernels = host::quantize_kernels();
  const TokenRows in(x), out(data);
  const ScaleGrid grid(scales, in);
  const std::vector<float> mean = scales.mean.given() ? mean_over_tokens(in) : std::vector<float>();
  const auto mean_of = [&](std::int64_t b, std::int64_t h) {
    return mean.empty() ? nullptr : mean.data() + (b * in.heads + h) * in.dim;
  };

  // Everything that can be refused is read first; from here on nothing fails.
  std::vector<float> group_scales;
  if (grid.partition == 0) {
    const std::uint32_t bits = store::max_abs_bits(in, mean.empty() ? nullptr : mean.data());
    if (host::non_finite_bits(bits)) store::fail_non_finite("x", x);
    group_scales.assign(1, static_scale > 0.0f ? static_scale : store::scale_for(bits, data.dtype));
  } else {
    group_scales.resize(static_cast<std::size_t>(in.batch * grid.partitions * in.heads));
    std::atomic<bool> finite{true};
    for_groups(in, grid.partitions, [&](std::int64_t b, std::int64_t p, std::int64_t h) {
      std::uint32_t bits = 0;
      for (std::int64_t t = p * grid.partition; t < std::min((p + 1) * grid.partition, in.tokens); ++t) {
        bits = std::max(bits, kernels.max_abs_bits(in.row(b, t, h), in.dtype, mean_of(b, h), in.dim));
      }
      if (host::non_finite_bits(bits)) finite.store(false, std::memory_order_relaxed);
      group_scales[(b * grid.partitions + p) * in.heads + h] = store::scale_for(bits, data.dtype);
    });
    if (!finite.load()) store::fail_non_finite("x", x);
  }

  if (scales.mean.given()) {
    for (std::int64_t b = 0; b < in.batch; ++b) {
      for (std::int64_t h = 0; h < in.heads; ++h) std::copy_n(mean_of(b, h), in.dim, mean_row(scales.mean, b, h));
    }
  }
  if (grid.partition == 0) grid.data[0] = group_scales[0];

  // Per tensor, a group of one token is as good a piece of work as any.
  const std::int64_t step = std::max<std::int64_t>(grid.partition, 1);
  const std::int64_t steps = grid.partition == 0 ? in.tokens : grid.partitions;
  std::atomic<std::int64_t> saturated{0};
  for_groups(in, steps, [&](std::int64_t b, std::int64_t p, std::int64_t h) {
    float scale = group_scales[0];
    if (grid.partition > 0) {
      scale = group_scales[(b * steps + p) * in.heads + h];
      grid.at(b, p, h) = scale;
    }
    std::int64_t clamped = 0;
    for (std::int64_t t = p * step; t < std::min((p + 1) * step, in.tokens); ++t) {
      clamped += kernels.quantize(in.row(b, t, h), in.dtype, mean_of(b, h), in.dim, scale, out.row(b, t, h), out.dtype);
    }
    if (clamped > 0) saturated.fetch_add(clamped, std::memory_order_relaxed);
  });
  return saturated.load();
}

void dequantize(const TensorView& data, const QuantScales& scales, const TensorView& out) {
  check::given("data", data);
  check::rank("data", data, {3, 4});
  check_quantized(data, scales);
  check::given("out", out);
  check::dtype("out", out, {DType::kFloat32});
  check_same_shape("out", out, data, "data");
  check::device("out", out, data.device, "data");
  check::contiguous_rows("out", out);
  check::writable("out", out);
  store::check_cpu("data", data, "dequantize");

  const auto& kernels = host::quantize_kernels();
  const TokenRows in(data), to(out);
  const ScaleGrid grid(scales, in);
  const std::int64_t step = std::max<std::int64_t>(grid.partition, 1);
  const std::int64_t steps = grid.partition == 0 ? in.tokens : grid.partitions;
  for_groups(in, steps, [&](std::int64_t b, std::int64_t p, std::int64_t h) {
    const float scale = grid.partition == 0 ? grid.data[0] : grid.at(b, p, h);
    for (std::int64_t t = p * step; t < std::min((p + 1) * step, in.tokens); ++t) {
      kernels.dequantize(in.row(b, t, h), in.dtype, mean_row(scales.mean, b, h), in.dim, scale,
                         reinterpret_cast<float*>(to.row(b, t, h)));
    }
  });
}

}  // namespace heddle
