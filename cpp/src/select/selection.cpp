#include <algorithm>
#include <utility>

#include "core/check.h"
#include "heddle/error.h"
#include "heddle/select.h"

namespace heddle {

namespace {

// Farther than any key: as good as unbounded, and positions plus or minus it do not overflow.
constexpr std::int64_t kFar = std::int64_t{1} << 40;

}  // namespace

Selection Selection::window(std::optional<std::int64_t> left, std::optional<std::int64_t> right,
                            std::int64_t n_global) {
  if (left) check::at_least("left", *left, 0);
  if (right) check::at_least("right", *right, 0);
  check::at_least("n_global", n_global, 0);
  if (left) left = std::min(*left, kFar);
  if (right) right = std::min(*right, kFar);
  Selection s;
  s.kind_ = select::WindowGlobal{{left, right}, std::min(n_global, kFar)};
  return s;
}

Selection Selection::strided(std::int64_t width, std::int64_t stride) {
  check::at_least("width", width, 0);
  check::at_least("stride", stride, 1);
  Selection s;
  s.kind_ = select::Strided{std::min(width, kFar), std::min(stride, kFar)};
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

Selection Selection::tokens(TensorView indices, TensorView lengths, std::shared_ptr<const void> owner, bool per_query) {
  if (indices.rank != 3 && indices.rank != 4) {
    throw Error(ErrorCode::kShape, "indices",
                "got rank " + std::to_string(indices.rank) +
                    "; allowed are [B, Hkv, n], [B, Sq, Hkv, n] and [total_q, Hkv, n]");
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
  s.kind_ = select::Tokens{indices, lengths, per_query};
  s.owner_ = std::move(owner);
  return s;
}

Selection Selection::page_list(TensorView indices, TensorView lengths, std::shared_ptr<const void> owner) {
  check::rank("indices", indices, 3);
  Selection s = tokens(indices, lengths, std::move(owner));  // arrays of the same form
  s.kind_ = select::PageList{indices, lengths};
  return s;
}

Selection Selection::with_density(double density) const {
  Selection s = *this;
  s.density_ = density;
  return s;
}

}  // namespace heddle
