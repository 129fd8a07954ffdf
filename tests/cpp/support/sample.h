// Random inputs of a case, and outputs that notice when memory around them is touched.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <limits>
#include <memory>
#include <vector>

#include "cases.h"

#include "support/random.h"

namespace heddle::testing {

constexpr std::byte kPoison{0xff};  // NaN in every floating type
constexpr std::byte kUntouched{0xa5};

// A tensor with memory of its own, guards before and after it, and everything filled with `fill` at first. With `gaps`
// its axes but the last lie in any order and direction, with room between the rows.
struct Tensor {
  Tensor() = default;
  Tensor(DType dtype, const std::vector<std::int64_t>& shape, std::byte fill, Random* gaps = nullptr,
         std::int64_t align = 1);

  std::int64_t offset(std::initializer_list<std::int64_t> index) const;  // in elements; axes not named are at 0
  std::byte* row(std::initializer_list<std::int64_t> index) const;
  double get(std::initializer_list<std::int64_t> index) const;
  void set(std::initializer_list<std::int64_t> index, double x);

  std::vector<std::byte> memory;
  TensorView view;
};

struct Lengths {
  std::int64_t q_len, kv_len;
  std::int64_t q_first = 0, k_first = 0;  // in a packed batch
};

class Sample {
 public:
  explicit Sample(const Case& c);

  const Case& spec() const { return c_; }
  const std::vector<Lengths>& requests() const { return requests_; }

  // The definition: does query i of request b and query head h read key j?
  bool sees(std::int64_t b, std::int64_t h, std::int64_t i, std::int64_t j) const;
  // What the arguments mean: [q_len, Hq, D], [kv_len, Hkv, D] and [kv_len, Hkv, Dv] of a request. Queries that the call
  // quantizes are quantized.
  struct Meaning {
    std::vector<double> q, k, v;
  };
  Meaning meaning(std::int64_t b) const;
  double scale() const;
  double sink(std::int64_t h) const { return c_.sinks ? sinks_.get({h}) : -std::numeric_limits<double>::infinity(); }
  // Whether probabilities may be bf16: both products of bf16 or 8-bit operands, values without scales of their own.
  bool rounds_probabilities() const;

  // The call's parameters, outputs aside: over the sample's own memory, or wherever `place` puts a tensor of it, as a
  // view of the copy (and `cache` a copy of the cache).
  using Placement = std::function<TensorView(const Tensor&)>;
  AttentionParams attention(const Placement& place = [](const Tensor& x) { return x.view; }) const;
  DecodeParams decode(const Placement& place = [](const Tensor& x) { return x.view; }, KVCache* cache = nullptr) const;
  const KVCache& cache() const { return *cache_; }  // of a decode

 private:
  // Where a row of k or v lies, and how to read it.
  struct RowRef {
    std::byte* data = nullptr;
    DType dtype = DType::kFloat32;
    float* scale = nullptr;
    bool own_scale = false;  // one of several
    const float* mean = nullptr;
  };
  RowRef key_row(std::int64_t b, std::int64_t j, std::int64_t h) const;
  RowRef value_row(std::int64_t b, std::int64_t j, std::int64_t h) const;
  RowRef row_of(const Tensor& x, const Tensor& scale, const Tensor& mean, std::int64_t partition, std::int64_t b,
                std::int64_t first, std::int64_t token, std::int64_t h) const;
  std::byte* query_row(std::int64_t b, std::int64_t i, std::int64_t h) const;
  std::int64_t list_of(std::int64_t b, std::int64_t i, std::int64_t kv_head) const;

  void make_requests(Random& r);
  void make_contiguous(Random& r);
  void make_cache(Random& r);
  void make_block_mask(Random& r);
  void make_token_lists(Random& r);
  void poison(Random& r);

  Case c_;
  Random layout_;
  Random* gaps_;  // layout_ or null
  std::vector<Lengths> requests_;
  Tensor q_, k_, v_, q_scale_, k_scale_, v_scale_, k_mean_, v_mean_, sinks_, cu_q_, cu_k_, block_table_, seq_lens_;
  Tensor mask_, indices_, lengths_;
  std::vector<std::vector<bool>> listed_;  // token lists: [list][key]
  std::unique_ptr<KVCache> cache_;
};

// Where a call writes: lse only if the case asks for it.
struct Output {
  Output(const Sample& sample, DType out_dtype, DType lse_dtype);

  void run(const Sample& sample, Backend backend, ScheduleKind schedule);
  double out_at(const Sample& sample, std::int64_t b, std::int64_t i, std::int64_t h, std::int64_t d) const;
  double lse_at(const Sample& sample, std::int64_t b, std::int64_t h, std::int64_t i) const;
  // Whether every byte that belongs to no query is as it was.
  bool rest_untouched(const Sample& sample) const;

  Tensor out, lse;
};

}  // namespace heddle::testing
