// |v| of every token: what a cache keeps, what the caller gives, or computed from the values.
#pragma once

#include <cstdint>
#include <vector>

#include "core/problem.h"
#include "heddle/cache.h"

namespace heddle::select {

class Norms {
 public:
  // From `cache` if there is one, else `given`, float32 [B, Sk, Hkv] or [total_k, Hkv], else from v.
  Norms(const Problem& problem, const TensorView& given, const KVCache* cache);

  // Fetches what get() will read of a cache, while something else is computed.
  void fetch(std::int64_t request, std::int64_t kv_head, std::int64_t begin, std::int64_t end) const;
  // Of the keys [begin, end) of a request's KV head; `buffer`, of end - begin, may be where they are put.
  const float* get(std::int64_t request, std::int64_t kv_head, std::int64_t begin, std::int64_t end,
                   float* buffer) const;

 private:
  void compute();

  const Problem& p_;
  TensorView stored_{}, given_{};
  std::vector<float> computed_;
  std::vector<std::int64_t> first_;
};

void check_value_norms(const Problem& problem, const TensorView& norms);

}  // namespace heddle::select
