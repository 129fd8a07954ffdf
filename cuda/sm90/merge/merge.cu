#include <string>

#include "cuda/common/check.h"
#include "cuda/sm90/merge/kernel.cuh"

namespace heddle::cuda {
namespace {

template <class T, int N, int P>
void launch_few(const MergeArgs& args, std::int64_t blocks) {
  merge_few_kernel<T, N, P>
      <<<static_cast<unsigned>(blocks), kMergeThreads, 0, static_cast<cudaStream_t>(args.stream)>>>(args, args.dim / N);
}

template <class T, int N>
void launch(const MergeArgs& args) {
  const MergeShape shape = merge_shape(args.num_parts, args.dim / N);
  const std::int64_t rows = args.batch * args.seq * args.heads;
  const bool few = args.num_parts <= kMergeFew;
  const int few_parts = args.num_parts <= 2 ? 2 : kMergeFew;
  const std::int64_t items = few ? rows * (args.dim / N) : rows;
  const std::int64_t items_per_block = few ? kMergeThreads * (kMergeFewLoads / few_parts) : shape.rows_per_block;
  const std::int64_t blocks = (items + items_per_block - 1) / items_per_block;
  if (args.num_parts > kMergeMaxCount || args.dim > kMergeMaxCount || blocks > kMergeMaxCount) {
    throw Error(ErrorCode::kShape, "outs",
                std::to_string(args.num_parts) + " parts of " + std::to_string(rows) + " rows of " +
                    std::to_string(args.dim) + " elements given; the CUDA merge takes at most " +
                    std::to_string(kMergeMaxCount) + " parts, elements of a row, and blocks of " +
                    std::to_string(shape.rows_per_block) + " rows");
  }
  if (few) {
    few_parts == 2 ? launch_few<T, N, 2>(args, blocks) : launch_few<T, N, kMergeFew>(args, blocks);
    return check(cudaGetLastError(), "merge");
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
