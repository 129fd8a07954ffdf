#include <algorithm>
#include <cstdint>
#include <string>

#include "cuda/common/check.h"
#include "cuda/common/memory.h"
#include "cuda/sm90/append/kernel.cuh"

namespace heddle::cuda {
namespace {

// Whether vectors of a row begin where one access may read them: the base and every stride.
bool aligned(const FloatRows& rows) {
  const auto access = std::min<std::int64_t>(kAccessBytes, kAppendVector * static_cast<int>(size_of(rows.dtype)));
  const std::int64_t steps =
      (rows.batch_stride | rows.token_stride | rows.head_stride) * static_cast<std::int64_t>(size_of(rows.dtype));
  return rows.dim % kAppendVector == 0 && reinterpret_cast<std::uintptr_t>(rows.data) % access == 0 &&
         steps % access == 0;
}

// Of what may be 0, or more than anything that it divides.
Divisor divisor(std::int64_t d) { return Divisor(std::clamp<std::int64_t>(d, 1, kAppendMaxRows)); }

// Calls fn with the element type as a value of it.
template <class Fn>
void with_type(std::string_view argument, DType dtype, Fn&& fn) {
  switch (dtype) {
    case DType::kFloat32: return fn(float{});
    case DType::kFloat16: return fn(__half{});
    case DType::kBFloat16: return fn(__nv_bfloat16{});
    default:
      throw Error(ErrorCode::kDType, std::string(argument),
                  "dtype " + std::string(to_string(dtype)) + "; allowed on a device are float32, float16 and bfloat16");
  }
}

}  // namespace

void launch_append(const AppendArgs& args) {
  const FloatRows& k = args.k;
  const std::int64_t tasks = k.batch * k.tokens * k.heads;
  const std::int64_t threads = std::max(tasks * kWarp, args.batch);
  const std::int64_t blocks = (threads + kAppendThreads - 1) / kAppendThreads;
  if (tasks > kAppendMaxRows) {
    throw Error(ErrorCode::kShape, "k",
                std::to_string(tasks) + " rows; allowed on a device are at most " + std::to_string(kAppendMaxRows) +
                    " in one call");
  }
  if (args.batch == 0) return;
  const AppendDivisors by{.heads = divisor(k.heads),
                          .tokens = divisor(k.tokens),
                          .page_size = divisor(args.page_size),
                          .partition = divisor(args.partition),
                          .page_partitions = args.partition > 0 ? args.page_size / args.partition : 0};
  const DeviceScope scope(args.device);
  with_type("k", k.dtype, [&](auto type) {
    using T = decltype(type);
    const dim3 grid(static_cast<unsigned>(blocks), 2);
    const auto stream = static_cast<cudaStream_t>(args.stream);
    if (aligned(k) && aligned(args.v)) {
      append_kernel<T, kAppendVector><<<grid, kAppendThreads, 0, stream>>>(args, by);
    } else {
      append_kernel<T, 1><<<grid, kAppendThreads, 0, stream>>>(args, by);
    }
  });
  check(cudaGetLastError(), "append");
}

std::uint32_t max_abs_bits(const FloatRows& rows, const std::int32_t* token_limit, int device, void* stream) {
  const DeviceScope scope(device);
  refuse_capture(stream);
  const auto queue = static_cast<cudaStream_t>(stream);
  int multiprocessors = 0;
  check(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device), "device");
  std::uint32_t* result = nullptr;
  check(cudaMallocAsync(reinterpret_cast<void**>(&result), sizeof *result, queue), "calibrate");
  check(cudaMemsetAsync(result, 0, sizeof *result, queue), "calibrate");
  with_type("k", rows.dtype, [&](auto type) {
    using T = decltype(type);
    const auto blocks = static_cast<unsigned>(kMaxAbsBlocksPerSm * multiprocessors);
    if (aligned(rows)) {
      max_abs_kernel<T, kAppendVector><<<blocks, kAppendThreads, 0, queue>>>(rows, token_limit, result);
    } else {
      max_abs_kernel<T, 1><<<blocks, kAppendThreads, 0, queue>>>(rows, token_limit, result);
    }
  });
  check(cudaGetLastError(), "calibrate");
  std::uint32_t bits = 0;
  check(cudaMemcpyAsync(&bits, result, sizeof bits, cudaMemcpyDeviceToHost, queue), "calibrate");
  check(cudaFreeAsync(result, queue), "calibrate");
  check(cudaStreamSynchronize(queue), "calibrate");
  return bits;
}

}  // namespace heddle::cuda
