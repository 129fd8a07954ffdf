// What a model's attention costs in memory and time, on a machine, with every method and KV format; and what to try
// first when it does not fit or is slow.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "heddle/cache.h"
#include "heddle/export.h"
#include "heddle/select.h"
#include "heddle/tensor.h"

namespace heddle {

// Rates that a machine reaches, not what its name promises: bytes and operations (a multiply-add is two) a second. A
// rate of 0 is not known; the next wider type's is used in its place (fp8 and int8: bf16; bf16: fp32).
struct Machine {
  std::string name;
  std::string source;      // where the rates come from
  double memory = 0.0;     // bytes; 0: not known, and everything fits
  double bandwidth = 0.0;  // bytes read a second
  double fp32 = 0.0, bf16 = 0.0, int8 = 0.0, fp8 = 0.0;
  std::int64_t workers = 1;  // cores or SMs: decode is split so that each has work
};

// Presets: "h100-80gb" and others. Rates are measured where `source` says so, else the datasheet's dense peaks.
HEDDLE_API const std::vector<Machine>& known_machines();
// A preset, or "host": measure_host(). Throws kValue for a name that does not exist.
HEDDLE_API Machine machine_from_name(std::string_view name);
// This machine, measured in about a second: a read of memory by all threads, and what heddle's own attention reaches in
// float32, bfloat16 and int8.
HEDDLE_API Machine measure_host();

// Which keys a query reads and what is kept in memory for it.
struct Pattern {
  enum class Kind : std::uint8_t {
    kMaterialized,  // every key; the scores are written to memory and read again
    kFlash,         // every key; scores live in registers
    kWindow,        // `window` and the first `n_global` keys
    kStrided,       // `strided`
    kBlocks,        // a mask of block x block tiles that keeps the fraction `density` of the pairs
    kTopK,          // scores every key, then reads the values of the best `budget` (of each KV head)
    kTokens,        // lists of `budget` tokens that something else has chosen
  };
  Kind kind = Kind::kFlash;
  select::WindowGlobal window{};
  select::Strided strided{};
  double density = 1.0;
  std::int64_t block = 128;
  std::int64_t budget = 0;
};
HEDDLE_API std::string to_string(const Pattern& pattern);  // "window 1024 + 64 global"

// Pairs (query, key) that are multiplied for one head of one request, exactly: query i stands at p = i + kv_len - q_len
// (see select.h). kBlocks gives density x the pairs that causality leaves, rounded. kTopK counts the selected ones.
HEDDLE_API std::int64_t count_pairs(const Pattern& pattern, std::int64_t q_len, std::int64_t kv_len, bool causal);

struct AdviseParams {
  std::int64_t num_layers = 1;
  std::int64_t batch = 1;  // requests at a time
  std::int64_t num_q_heads = 1, num_kv_heads = 1;
  std::int64_t head_dim = 128;
  std::int64_t head_dim_v = 0;     // 0: head_dim
  std::int64_t seq_len = 0;        // tokens of each request, in prefill and already there in decode
  std::int64_t new_tokens = 1;     // a decode step's
  DType dtype = DType::kBFloat16;  // of q and out: float32, float16 or bfloat16
  bool causal = true;

  // What is run today: the advice starts from here.
  bool materialized = false;
  CacheFormat format = CacheFormat::kBf16;
  std::int64_t partition = 1;  // int8-a: tokens a K scale covers

  // Sparse patterns to look at. Empty: a window of 1024 with 64 global tokens, width 1024 and stride 64, a quarter of
  // the blocks, and 2048 tokens.
  std::vector<Pattern> patterns;
  double other_bytes = 0.0;     // memory that is taken already: weights, activations of other layers
  Machine machine;              // bandwidth and one of fp32 and bf16 must be known
  double prefill_target = 0.0;  // seconds that are fast enough; 0: as fast as can be
  double decode_target = 0.0;   // ... of a step
};

enum class Phase : std::uint8_t { kPrefill, kDecode };

// Costs of all layers and requests. Every byte is counted once, so times are those of a perfect overlap and perfect
// caches: the larger of bytes / bandwidth and operations / rate, layer by layer.
struct Cost {
  Pattern pattern;
  CacheFormat format = CacheFormat::kBf16;
  Phase phase = Phase::kPrefill;
  std::int64_t pairs = 0;         // of one head of one request
  double density = 1.0;           // pairs over those of kFlash
  double kv_bytes = 0.0;          // keys and values of the cache
  double side_bytes = 0.0;        // its scales and value norms
  double score_bytes = 0.0;       // of one layer: layers reuse them; so are the next two
  double workspace_bytes = 0.0;   // masks, token lists, partial results of splits
  double activation_bytes = 0.0;  // q, out and the new k and v
  double total_bytes = 0.0;       // all of them and other_bytes
  double operations = 0.0;        // of the pairs; strided prefill: of the tiles of 64 keys that hold them
  double moved_bytes = 0.0;       // read and written in this phase
  double seconds = 0.0;
  bool memory_bound = false;     // more time goes into bytes than into operations
  bool fits = true;              // in the machine's memory
  std::int64_t max_seq_len = 0;  // the longest request that fits (0: none; unknown memory: the longest there can be)
};

struct Advice {
  Machine machine;
  std::vector<Cost> costs;  // phase by phase, pattern by pattern, format by format
  // Today's costs, and the first thing to try from there: the one that changes the outputs least among those that help.
  Cost prefill, decode;
  std::string memory, prefill_speed, decode_speed;
};

// Throws kValue naming the member at fault.
HEDDLE_API Advice advise(const AdviseParams& params);

}  // namespace heddle
