#include "heddle/select.h"

#include <utility>

#include "heddle/error.h"

namespace heddle {

Selection Selection::window(std::optional<std::int64_t> left, std::optional<std::int64_t> right,
                            std::int64_t n_global) {
  if (left && *left < 0) throw Error(ErrorCode::kValue, "left", "got " + std::to_string(*left) + "; allowed are None and 0 or more");
  if (right && *right < 0) throw Error(ErrorCode::kValue, "right", "got " + std::to_string(*right) + "; allowed are None and 0 or more");
  if (n_global < 0) throw Error(ErrorCode::kValue, "n_global", "got " + std::to_string(n_global) + "; allowed are 0 or more");
  Selection s;
  s.kind_ = select::WindowGlobal{{left, right}, n_global};
  return s;
}

Selection Selection::strided(std::int64_t width, std::int64_t stride) {
  if (width < 0) throw Error(ErrorCode::kValue, "width", "got " + std::to_string(width) + "; allowed are 0 or more");
  if (stride < 1) throw Error(ErrorCode::kValue, "stride", "got " + std::to_string(stride) + "; allowed are 1 or more");
  Selection s;
  s.kind_ = select::Strided{width, stride};
  return s;
}

Selection Selection::block_mask(TensorView mask, std::int64_t block_q, std::int64_t block_k,
                                std::shared_ptr<const void> owner) {
  if (mask.rank < 2 || mask.rank > 4) {
    throw Error(ErrorCode::kShape, "mask",
                "got rank " + std::to_string(mask.rank) + "; allowed are [nQ, nK], [H, nQ, nK] and [B, H, nQ, nK]");
  }
  if (mask.dtype != DType::kBool) {
    throw Error(ErrorCode::kDType, "mask", "got " + std::string(to_string(mask.dtype)) + "; allowed is bool");
  }
  if (block_q < 1 || block_k < 1) {
    throw Error(ErrorCode::kValue, "block",
                "got (" + std::to_string(block_q) + ", " + std::to_string(block_k) + "); allowed are 1 or more");
  }
  Selection s;
  s.kind_ = select::BlockMask{mask, block_q, block_k};
  s.owner_ = std::move(owner);
  return s;
}

Selection Selection::tokens(TensorView indices, TensorView lengths, std::shared_ptr<const void> owner) {
  if (indices.rank != 3 && indices.rank != 4) {
    throw Error(ErrorCode::kShape, "indices",
                "got rank " + std::to_string(indices.rank) + "; allowed are [B, Hkv, n], [B, Sq, Hkv, n] and [total_q, Hkv, n]");
  }
  if (indices.dtype != DType::kInt32) {
    throw Error(ErrorCode::kDType, "indices", "got " + std::string(to_string(indices.dtype)) + "; allowed is int32");
  }
  if (indices.shape[indices.rank - 1] > 1 && indices.strides[indices.rank - 1] != 1) {
    throw Error(ErrorCode::kLayout, "indices", "the last axis must be contiguous");
  }
  if (lengths.given()) {
    if (lengths.dtype != DType::kInt32) {
      throw Error(ErrorCode::kDType, "lengths", "got " + std::string(to_string(lengths.dtype)) + "; allowed is int32");
    }
    bool same = lengths.rank == indices.rank - 1;
    for (int i = 0; same && i < lengths.rank; ++i) same = lengths.shape[i] == indices.shape[i];
    if (!same) {
      throw Error(ErrorCode::kShape, "lengths",
                  "got " + lengths.shape_string() + "; allowed is the shape of indices " + indices.shape_string() +
                      " without its last axis");
    }
  }
  Selection s;
  s.kind_ = select::Tokens{indices, lengths};
  s.owner_ = std::move(owner);
  return s;
}

}  // namespace heddle
