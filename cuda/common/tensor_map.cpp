#include "cuda/common/tensor_map.h"

#include <algorithm>
#include <array>
#include <string>

#include "cuda/common/check.h"

namespace heddle::cuda {
namespace {

constexpr std::int64_t kAlignment = 16, kMaxBytes = std::int64_t{1} << 40;
constexpr int kMaxAxes = 5;

// Through the runtime: the library loads on machines that have no driver.
auto encode_function() {
  static const auto function = [] {
    void* entry = nullptr;
    cudaDriverEntryPointQueryResult result{};
    check(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &entry, 12000, cudaEnableDefault, &result),
          "cuTensorMapEncodeTiled");
    if (result != cudaDriverEntryPointSuccess) {
      throw Error(ErrorCode::kRuntime, "cuTensorMapEncodeTiled", "this driver does not offer it");
    }
    return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(entry);
  }();
  return function;
}

CUtensorMapDataType type_of(DType dtype) {
  switch (dtype) {
    case DType::kBFloat16: return CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
    case DType::kFloat16: return CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
    case DType::kFloat32: return CU_TENSOR_MAP_DATA_TYPE_FLOAT32;
    default: return CU_TENSOR_MAP_DATA_TYPE_UINT8;
  }
}

}  // namespace

CUtensorMap make_tensor_map(const char* argument, const void* data, DType dtype,
                            std::initializer_list<TensorAxis> axes) {
  const auto element = static_cast<std::int64_t>(size_of(dtype));
  std::array<cuuint64_t, kMaxAxes> sizes{};
  std::array<cuuint64_t, kMaxAxes> strides{};  // of the axes after the first, in bytes
  std::array<cuuint32_t, kMaxAxes> box{}, steps{};
  int rank = 0;
  if (reinterpret_cast<std::uintptr_t>(data) % kAlignment != 0) {
    throw Error(ErrorCode::kLayout, argument, "its memory does not begin at a multiple of 16 bytes");
  }
  for (const TensorAxis& axis : axes) {
    // An axis of one element is not stepped over, whatever its stride says.
    std::int64_t stride = rank == 0 ? element : axis.stride * element;
    if (rank > 0 && axis.size <= 1) stride = kAlignment;
    if (rank > 0 && (stride < 0 || stride % kAlignment != 0 || stride >= kMaxBytes)) {
      throw Error(ErrorCode::kLayout, argument,
                  "a stride of " + std::to_string(stride) +
                      " bytes; allowed on this backend are multiples of 16 from 0 to 2^40");
    }
    sizes[rank] = static_cast<cuuint64_t>(std::max<std::int64_t>(axis.size, 1));
    if (rank > 0) strides[rank - 1] = static_cast<cuuint64_t>(stride);
    box[rank] = static_cast<cuuint32_t>(axis.box);
    steps[rank] = 1;
    ++rank;
  }
  // The boxes' rows, whose 16-byte units are exchanged.
  const cuuint32_t row = box[0] * static_cast<cuuint32_t>(element);
  const CUtensorMapSwizzle swizzle = row == 128  ? CU_TENSOR_MAP_SWIZZLE_128B
                                     : row == 64 ? CU_TENSOR_MAP_SWIZZLE_64B
                                                 : CU_TENSOR_MAP_SWIZZLE_32B;
  CUtensorMap map;
  const CUresult result =
      encode_function()(&map, type_of(dtype), static_cast<cuuint32_t>(rank), const_cast<void*>(data), sizes.data(),
                        strides.data(), box.data(), steps.data(), CU_TENSOR_MAP_INTERLEAVE_NONE, swizzle,
                        CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result != CUDA_SUCCESS) {
    throw Error(ErrorCode::kRuntime, argument, "cuTensorMapEncodeTiled failed with " + std::to_string(result));
  }
  return map;
}

}  // namespace heddle::cuda
