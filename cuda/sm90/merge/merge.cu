#include <string>

#include "cuda/common/check.h"
#include "cuda/sm90/merge/kernel.cuh"

namespace heddle::cuda {
namespace {

template <class T, int N, int P>
void launch_few(const MergeArgs& args, std::int64_t total) {
  constexpr std::int64_t kPerBlock = kMergeThreads * (kMergeFewLoads / P);
  const MergeDivisors by{Divisor(args.dim / N), Divisor(args.heads), Divisor(args.seq)};
  merge_few_kernel<T, N, P><<<static_cast<unsigned>((total + kPerBlock - 1) / kPerBlock), kMergeThreads, 0,
                              static_cast<cudaStream_t>(args.stream)>>>(args, by, static_cast<std::uint32_t>(total));
  check(cudaGetLastError(), "merge");
}

template <class T, int N>
void launch(const MergeArgs& args) {
  const MergeShape shape = merge_shape(args.num_parts, args.dim / N);
  const std::int64_t rows = args.batch * args.seq * args.heads;
  const std::int64_t blocks = (rows + shape.rows_per_block - 1) / shape.rows_per_block;
  if (const std::int64_t total = rows * (args.dim / N); args.num_parts <= kMergeFew && total <= kMergeMaxCount) {
    return args.num_parts <= 2 ? launch_few<T, N, 2>(args, total) : launch_few<T, N, kMergeFew>(args, total);
  }
  if (args.num_parts > kMergeMaxCount || args.dim > kMergeMaxCount || blocks > kMergeMaxCount) {
    throw Error(ErrorCode::kShape, "outs",
                std::to_string(args.num_parts) + " parts of " + std::to_string(rows) + " rows of " +
                    std::to_string(args.dim) + " elements given; the CUDA merge takes at most " +
                    std::to_string(kMergeMaxCount) + " parts, elements of a row, and blocks of " +
                    std::to_string(shape.rows_per_block) + " rows");
  }
  merge_kernel<T, N>
      <<<static_cast<unsigned>(blocks), kMergeThreads, 0, static_cast<cudaStream_t>(args.stream)>>>(args, shape);
  check(cudaGetLastError(), "merge");
}

// Whether every row begins where a 16-byte access may: the base and every stride that is stepped over.
bool aligned(const void* data, const MergeArgs::Strides& s, std::int64_t element_bytes) {
  const std::int64_t steps = (s.part | s.batch | s.seq | s.head) * element_bytes;
  return reinterpret_cast<std::uintptr_t>(data) % kAccessBytes == 0 && steps % kAccessBytes == 0;
}

template <class T>
void launch_width(const MergeArgs& args) {
  constexpr int kWide = kAccessBytes / sizeof(T);
  const bool wide = args.dim % kWide == 0 && aligned(args.outs, args.outs_stride, sizeof(T)) &&
                    aligned(args.out, args.out_stride, sizeof(T));
  wide ? launch<T, kWide>(args) : launch<T, 1>(args);
}

}  // namespace

void launch_merge(const MergeArgs& args) {
  if (args.batch == 0 || args.seq == 0 || args.heads == 0) return;
  const DeviceScope scope(args.device);
  switch (args.dtype) {
    case DType::kFloat32: return launch_width<float>(args);
    case DType::kFloat16: return launch_width<__half>(args);
    case DType::kBFloat16: return launch_width<__nv_bfloat16>(args);
    default:
      throw Error(ErrorCode::kDType, "outs",
                  std::string(to_string(args.dtype)) + " given; the CUDA merge takes float32, bfloat16 and float16");
  }
}

}  // namespace heddle::cuda
