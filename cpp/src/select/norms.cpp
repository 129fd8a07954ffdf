#include "select/norms.h"

#include <algorithm>

#include "core/check.h"
#include "core/threads.h"
#include "select/scores.h"

namespace heddle::select {

Norms::Norms(const Problem& problem, const TensorView& given, const KVCache* cache) : p_(problem) {
  if (cache != nullptr) {
    stored_ = cache->value_norms();
  } else if (given.given()) {
    given_ = given;
  } else {
    compute();
  }
}

const float* Norms::get(std::int64_t request, std::int64_t kv_head, std::int64_t begin, std::int64_t end,
                        float* buffer) const {
  const Request& r = p_.requests[static_cast<std::size_t>(request)];
  if (!computed_.empty())
    return computed_.data() + first_[static_cast<std::size_t>(request)] + kv_head * r.kv_len + begin;
  if (given_.given()) {
    const int token = given_.rank - 2;
    const float* at = given_.as<const float>() + (given_.rank == 3 ? request * given_.strides[0] : 0) +
                      kv_head * given_.strides[token + 1];
    for (std::int64_t j = begin; j < end; ++j) buffer[j - begin] = at[(r.k_first + j) * given_.strides[token]];
    return buffer;
  }
  for (std::int64_t j = begin; j < end;) {
    const Place at = place_of(p_, r, j);
    const std::int64_t run = std::min(end - j, p_.page_size - at.slot);
    const float* row = stored_.as<const float>() + at.page * stored_.strides[0] + kv_head * stored_.strides[1];
    if (run == end - begin) return row + at.slot;
    std::copy_n(row + at.slot, run, buffer + (j - begin));
    j += run;
  }
  return buffer;
}

void Norms::fetch(std::int64_t request, std::int64_t kv_head, std::int64_t begin, std::int64_t end) const {
  if (!stored_.given()) return;
  constexpr std::int64_t kLine = 64 / sizeof(float);
  const Request& r = p_.requests[static_cast<std::size_t>(request)];
  for (std::int64_t j = begin; j < end;) {
    const Place at = place_of(p_, r, j);
    const std::int64_t run = std::min(end - j, p_.page_size - at.slot);
    const float* row =
        stored_.as<const float>() + at.page * stored_.strides[0] + kv_head * stored_.strides[1] + at.slot;
    for (std::int64_t i = 0; i < run; i += kLine) __builtin_prefetch(row + i, 0, 2);
    j += run;
  }
}

void Norms::compute() {
  std::int64_t total = 0;
  for (const Request& r : p_.requests) {
    first_.push_back(total);
    total += r.kv_len * p_.num_kv_heads;
  }
  computed_.resize(static_cast<std::size_t>(std::max<std::int64_t>(total, 1)));
  for (std::size_t b = 0; b < p_.requests.size(); ++b) {
    const std::int64_t keys = p_.requests[b].kv_len;
    for_ranges(keys, keys * p_.num_kv_heads * p_.v.dim, [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t h = 0; h < p_.num_kv_heads; ++h) {
        value_norms(p_, static_cast<std::int64_t>(b), h, begin, end, computed_.data() + first_[b] + h * keys + begin);
      }
    });
  }
}

void check_value_norms(const Problem& problem, const TensorView& norms) {
  check::given("value_norms", norms);
  check::dtype("value_norms", norms, {DType::kFloat32});
  check::device("value_norms", norms, problem.device, "q");
  check::rank("value_norms", norms, problem.packed ? 2 : 3);
  if (!problem.packed) {
    check::axis("value_norms", norms, 0, "batch", static_cast<std::int64_t>(problem.requests.size()), "as in q");
  }
  std::int64_t keys = 0;
  for (const Request& r : problem.requests) keys = std::max(keys, r.k_first + r.kv_len);
  if (problem.packed ? norms.shape[0] < keys : norms.shape[1] != keys) {
    check::axis("value_norms", norms, norms.rank - 2, "keys", keys, "as in k");
  }
  check::axis("value_norms", norms, norms.rank - 1, "heads", problem.num_kv_heads, "the KV heads");
}

}  // namespace heddle::select
