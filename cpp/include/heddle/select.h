// Selections: which keys a query reads, beyond what `causal` and `window` say.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <variant>

#include "heddle/export.h"
#include "heddle/tensor.h"

namespace heddle {

// Positions are aligned at the bottom right: query i of a request with Sq queries and Sk keys stands at
// p = i + Sk - Sq. A key j is read if `causal`, `window` and the selection all allow it.

// Keys p - left <= j <= p + right; std::nullopt is unbounded.
struct Window {
  std::optional<std::int64_t> left{};
  std::optional<std::int64_t> right{};
};

namespace select {

// The window, and also the first `n_global` keys.
struct WindowGlobal {
  Window window{};
  std::int64_t n_global = 0;
};

// Keys with p - j < width or (p - j) mod stride = 0.
struct Strided {
  std::int64_t width = 0;
  std::int64_t stride = 1;
};

// mask: bool [nQ, nK], [H, nQ, nK] or [B, H, nQ, nK] with H = 1, Hkv or Hq and B = 1 or the batch; block (I, J) holds
// the queries I*block_q.. and the keys J*block_k.. (counted from the first of each request, not bottom-right). nQ and
// nK are ceilings over the longest request.
struct BlockMask {
  TensorView mask{};
  std::int64_t block_q = 128;
  std::int64_t block_k = 128;
};

// indices: int32 [B, Hkv, n] for all queries of a request, or [B, Sq, Hkv, n] ([total_q, Hkv, n] in a packed batch,
// where a first axis of B entries always means requests); ascending, without repeats, -1 pads at the end. lengths:
// int32, the shape of indices without its last axis; optional.
struct Tokens {
  TensorView indices{};
  TensorView lengths{};
};

}  // namespace select

class HEDDLE_API Selection {
 public:
  using Kind = std::variant<std::monostate, select::WindowGlobal, select::Strided, select::BlockMask, select::Tokens>;

  Selection() = default;  // every key
  static Selection window(std::optional<std::int64_t> left, std::optional<std::int64_t> right = 0,
                          std::int64_t n_global = 0);
  static Selection strided(std::int64_t width, std::int64_t stride);
  // `owner` keeps the memory behind the views alive for as long as the selection lives.
  static Selection block_mask(TensorView mask, std::int64_t block_q = 128, std::int64_t block_k = 128,
                              std::shared_ptr<const void> owner = {});
  static Selection tokens(TensorView indices, TensorView lengths = {}, std::shared_ptr<const void> owner = {});

  const Kind& kind() const noexcept { return kind_; }

 private:
  Kind kind_;
  std::shared_ptr<const void> owner_;
};

}  // namespace heddle
