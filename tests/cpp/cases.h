// The one table of cases: what tests check is what benchmarks time. A case is a line of text
// ("op=decode,B=2,Sk=300,...") that replays it, inputs included: they are random, from its seed.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "heddle/heddle.h"

namespace heddle::testing {

enum class Op : std::uint8_t { kAttention, kDecode };
enum class Pattern : std::uint8_t { kNone, kWindow, kStrided, kBlocks, kTokens, kQueryTokens };

struct Case {
  std::string name{};  // of a case in named_cases(); may be empty

  Op op = Op::kAttention;
  std::int64_t batch = 1, q_len = 64, kv_len = 64, q_heads = 1, kv_heads = 1, dim = 64, dim_v = 64;
  bool packed = false;  // attention: a packed batch
  bool ragged = false;  // lengths of the requests of a packed batch or a cache are random, up to q_len and kv_len

  // Attention: q, k and v; int8 and fp8 with one scale (partition 0) or one for every `partition` tokens.
  DType q = DType::kFloat32, k = DType::kFloat32, v = DType::kFloat32;
  std::int64_t q_partition = 0, k_partition = 0, v_partition = 0;
  bool smooth_k = false, smooth_v = false;  // quantized k, v with a mean
  // Decode: q as above over a cache.
  CacheFormat format = CacheFormat::kFp32;
  std::int64_t page_size = 16, cache_partition = 1;
  bool shared_pages = false;  // requests begin with the same pages

  bool causal = false;
  std::optional<std::int64_t> left{}, right{};  // the window argument
  double softcap = 0.0;
  std::optional<double> scale{};
  bool sinks = false, lse = true;

  Pattern pattern = Pattern::kNone;
  std::optional<std::int64_t> select_left{}, select_right{};  // window
  std::int64_t n_global = 0;                                  // window
  std::int64_t width = 0, stride = 1;                         // strided
  std::int64_t block_q = 128, block_k = 128;                  // blocks
  std::int64_t mask_rank = 2, mask_batch = 1, mask_heads = 1;
  double density = 0.5;  // blocks and token lists
  bool lengths = false;  // token lists come with lengths

  bool gaps = false;         // tensors with strides of all sorts, memory between rows poisoned
  std::int64_t align = 1;    // with gaps: strides and starts are multiples of so many elements
  bool poison_seen = false;  // NaN and infinities in keys that some queries see: those that do not must not notice
  double spread = 1.0;       // standard deviation of q
  std::uint64_t seed = 0;

  std::int64_t threads = 0;  // 0: the default
  ScheduleKind schedule = ScheduleKind::kAuto;
  std::int64_t split_size = 0;
};

// "op=attention,B=2,Sq=17,...": what differs from a default case. parse_case throws std::invalid_argument.
std::string to_string(const Case& c);
Case parse_case(std::string_view line);

// Any combination of features, of small shapes.
Case random_case(std::uint64_t seed);

// What is timed: named, with the shapes that the figures are about.
const std::vector<Case>& named_cases();
// The same kind of work, small enough for the oracle.
Case shrunk(Case c);

}  // namespace heddle::testing
