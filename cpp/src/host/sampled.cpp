// Sampled decode on the host: the scores of all keys, then a few rows of V.
//
//   prepare  each row tile: its queries as the kernels read them, or their Bernoulli counts
//   score    each split of a row tile: logits of its keys, and the mass of every tile of 64
//   draw     each unit: prefix sums over the masses of the tiles, tiles opened only where a draw falls, values summed
//
// Logits take 4 bytes a key and query row and are written once, tile by tile as they are scored. A tile's mass depends
// on its own keys alone and prefix sums run over tiles in order, in float64, so no result depends on splits, threads or
// schedule. What is drawn by several rows of a unit is merged by key, so that each row of V is read once. Limit: the
// bytes of K.
#include <algorithm>
#include <atomic>
#include <bit>
#include <cmath>
#include <cstring>
#include <functional>
#include <limits>
#include <utility>
#include <vector>

#include "aggregate/draws.h"
#include "core/kernels.h"
#include "core/numeric.h"
#include "core/threads.h"
#include "host/quantize_kernels.h"
#include "host/sampling_kernels.h"
#include "host/tile_kernels.h"
#include "host/workspace.h"
#include "schedule/plan.h"
#include "select/visibility.h"

namespace heddle::host {
namespace {

constexpr double kLog2e = 1.4426950408889634;
constexpr double kLn2 = 0.6931471805599453;
constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr float kLowest = std::numeric_limits<float>::lowest();  // below it there is only -inf: keys not seen
constexpr std::size_t kLogitBudget = std::size_t{64} << 20;  // bytes held at a time, if a query needs no more by itself
constexpr std::size_t kNearBytes = std::size_t{1} << 20;     // of logits that a second-level cache may hold
constexpr std::int64_t kSplitKeys = 2048;
constexpr int kGatherTiles = 16;  // tiles whose keys are looked up at a time: the stream kernels fetch ahead among them
static_assert(kTileKeys == aggregate::kSampleTile);

// 2^x for a whole number x <= 0.
double power(float x) {
  return x < -1022.0f ? 0.0 : std::bit_cast<double>(static_cast<std::uint64_t>(1023 + static_cast<int>(x)) << 52);
}

// What is known of a unit between the phases.
struct UnitState {
  std::int64_t tiles = 0, rows = 0;
  bool near = true;                // whether the caches hold the logits until values are drawn
  float* logits = nullptr;         // [tiles][rows][64], where the mass is not 0
  float* parts = nullptr;          // [tiles][rows][kTileParts], where the mass is not 0
  TileMass* mass = nullptr;        // [rows][tiles]
  std::vector<std::byte> queries;  // [row tiles][kStreamRows][padded dim] as floats or int8
  std::vector<float> factor;       // [rows]: logit = factor * product (* key scale)
  std::vector<std::int32_t> sums;  // [row tiles][kStreamRows]
  struct Features {                // Bernoulli: what some row of the tile needs
    std::vector<std::int32_t> index;
    std::vector<float> queries;  // [index][rows padded to 4]
  };
  std::vector<Features> features;  // [row tiles]

  float* logits_of(std::int64_t tile, std::int64_t row) const { return logits + (tile * rows + row) * kTileKeys; }
  TileMass* row_mass(std::int64_t row) const { return mass + row * tiles; }
  float* parts_of(std::int64_t tile, std::int64_t row) const { return parts + (tile * rows + row) * kTileParts; }
};

// The logits of one row.
struct RowLogits {
  const float* first = nullptr;
  std::int64_t stride = 0;

  const float* tile(std::size_t t) const { return first + static_cast<std::int64_t>(t) * stride; }
};

// A tile into which the targets [first, last) fall; `before`: what lies before it.
struct Opening {
  std::size_t tile, first, last;
  double before;
};

// What a thread keeps between items.
struct Scratch {
  std::vector<Tile> tiles;
  std::vector<const std::byte*> keys;
  std::vector<float> key_scale, scores;
  std::vector<std::uint64_t> bits;
  std::vector<double> row, share, targets;
  std::vector<std::int8_t> counts;
  std::vector<std::uint64_t> kept;
  std::vector<float> tops, order;
  std::vector<ValueTerm> terms, merged;
  std::vector<std::size_t> runs;
  std::vector<Opening> openings;
  std::vector<Pick> picks;
  std::vector<float> out;
};

class SampledDecode {
 public:
  explicit SampledDecode(const Problem& problem)
      : p_(problem),
        s_(*problem.sampled.options),
        tile_(tile_kernels()),
        stream_(stream_kernels()),
        sampling_(sampling_kernels()),
        quantize_(quantize_kernels()),
        plan_(make_plan(problem, kStreamRows)),
        dim_(stream_dim(problem.q.dim)),
        columns_(padded_columns(problem.v.dim)),
        value_bytes_(problem.v.dim * static_cast<std::int64_t>(size_of(problem.v.dtype))),
        math_(choose_math(problem, tile_.native_words)) {}

  void run();

 private:
  // Whole numbers on int8 products, bf16 where queries and keys are; everything else as float32.
  static Math choose_math(const Problem& problem, bool native_words) {
    if (!native_words || problem.sampled.features != nullptr) return Math::kFloat32;
    if (problem.quantize_q) return Math::kInt8;
    const bool bf16 = problem.q.dtype == DType::kBFloat16 && problem.k.dtype == DType::kBFloat16;
    return bf16 ? Math::kBFloat16 : Math::kFloat32;
  }
  std::byte* queries_of(UnitState& state, std::int64_t row) const {
    return state.queries.data() + row * dim_ * 4 / elements_per_word(math_);
  }

  struct Item {
    std::int32_t unit, row_tile, split, heads;
  };
  struct Place {
    std::int64_t page, slot;
  };

  void run_chunk(const std::vector<Unit>& units);
  void prepare(const Unit& unit, UnitState& state, std::int64_t row_tile, Scratch& s) const;
  void score(const Unit* units, UnitState* states, int heads, std::int64_t row_tile, std::int64_t k0, std::int64_t k1,
             Scratch& s) const;
  void locate(const Unit& unit, int heads, std::int64_t tile, std::uint64_t bits, int at, Scratch& s) const;
  void score_by_feature(const Unit& unit, const UnitState::Features& features, std::int64_t rows, std::int64_t tile,
                        std::uint64_t bits, float* scores) const;
  void draw(const Unit& unit, UnitState& state, Scratch& s) const;
  void draw_row(const Unit& unit, UnitState& state, std::int64_t row, Scratch& s) const;
  void keep(const RowLogits& logits, Scratch& s) const;
  void merge_terms(Scratch& s) const;

  std::int64_t split_size() const {
    return p_.schedule.split_size > 0 ? (p_.schedule.split_size + kTileKeys - 1) / kTileKeys * kTileKeys : kSplitKeys;
  }
  std::int64_t tile_rows(const Unit& unit, std::int64_t row_tile) const {
    return std::min<std::int64_t>(kStreamRows, unit.rows() - row_tile * kStreamRows);
  }
  Place place(const Unit& unit, std::int64_t key) const {
    const Request& r = p_.requests[static_cast<std::size_t>(unit.request)];
    if (unit.listed) key = unit.list[static_cast<std::size_t>(key)];
    return {r.pages[key / p_.page_size], key % p_.page_size};
  }
  // Where the list's keys lie that causality and the window leave.
  std::pair<std::int64_t, std::int64_t> list_range(const Unit& unit, const Visibility& seen, std::int64_t query) const {
    const auto [begin, end] = seen.allowed_keys(query);
    const auto first = std::lower_bound(unit.list.begin(), unit.list.end(), begin);
    return {first - unit.list.begin(), std::lower_bound(first, unit.list.end(), end) - unit.list.begin()};
  }
  void tiles_of(const Unit& unit, const Visibility& seen, std::int64_t q0, std::int64_t q1, std::int64_t k0,
                std::int64_t k1, std::vector<Tile>& tiles) const;
  std::uint64_t bits_of(const Unit& unit, const Visibility& seen, std::int64_t query, std::int64_t k0) const;
  // fn(lane, count, place) for each run of set bits that lies in one page (of a list: for each key).
  template <class Fn>
  void for_runs(const Unit& unit, std::int64_t k0, std::uint64_t bits, Fn&& fn) const;
  static void count(const TensorView& counts, const Unit& unit, std::int64_t n) {
    if (!counts.given() || n == 0) return;
    std::int64_t& total =
        counts.as<std::int64_t>()[unit.request * counts.strides[0] + unit.kv_head * counts.strides[1]];
    std::atomic_ref<std::int64_t>(total).fetch_add(n, std::memory_order_relaxed);
  }

  const Problem& p_;
  const Sampling& s_;
  const TileKernels& tile_;
  const StreamKernels& stream_;
  const SamplingKernels& sampling_;
  const QuantizeKernels& quantize_;
  const Plan plan_;
  const std::int64_t dim_, columns_, value_bytes_;
  const Math math_;  // of the queries that the stream kernels multiply
};

void SampledDecode::run() {
  for (const TensorView* counts : {&p_.sampled.reads.v_rows, &p_.sampled.reads.k_features}) {
    for (std::int64_t i = 0; counts->given() && i < counts->numel(); ++i) {
      const std::int64_t b = i / counts->shape[1], h = i % counts->shape[1];
      counts->as<std::int64_t>()[b * counts->strides[0] + h * counts->strides[1]] = 0;
    }
  }
  // Units by the budget's worth; of one that is larger by itself, some queries at a time.
  std::vector<Unit> chunk;
  std::size_t bytes = 0;
  for (const Unit& unit : plan_.units) {
    const std::int64_t tiles = (unit.keys + kTileKeys - 1) / kTileKeys;
    const std::size_t per_query = static_cast<std::size_t>(unit.heads * tiles * kTileKeys) * sizeof(float);
    const auto most = static_cast<std::int64_t>(per_query == 0 ? unit.queries : kLogitBudget / per_query);
    for (std::int64_t first = 0; first < unit.queries;) {
      Unit piece = unit;
      piece.query += first;
      piece.queries = std::min(unit.queries - first, std::max<std::int64_t>(most, 1));
      const std::size_t need = static_cast<std::size_t>(piece.queries) * per_query;
      if (!chunk.empty() && bytes + need > kLogitBudget) {
        run_chunk(chunk);
        chunk.clear();
        bytes = 0;
      }
      first += piece.queries;
      chunk.push_back(piece);
      bytes += need;
    }
  }
  if (!chunk.empty()) run_chunk(chunk);
}

void SampledDecode::run_chunk(const std::vector<Unit>& units) {
  static thread_local Workspace workspace;
  std::vector<UnitState> states(units.size());
  std::vector<Item> row_tiles, splits;
  std::size_t all_tiles = 0;
  double work = 0.0;
  for (std::size_t u = 0; u < units.size(); ++u) {
    const Unit& unit = units[u];
    UnitState& state = states[u];
    state.rows = unit.rows();
    state.tiles = (unit.keys + kTileKeys - 1) / kTileKeys;
    const std::int64_t tiles = plan_.row_tiles(unit);
    state.queries.resize(static_cast<std::size_t>(tiles * kStreamRows * dim_) * 4 /
                         static_cast<std::size_t>(elements_per_word(math_)));
    state.factor.resize(static_cast<std::size_t>(state.rows));
    state.sums.resize(static_cast<std::size_t>(tiles * kStreamRows));
    state.features.resize(static_cast<std::size_t>(tiles));
    all_tiles += static_cast<std::size_t>(state.rows * state.tiles);
    work += static_cast<double>(state.rows) * static_cast<double>(unit.keys) * static_cast<double>(p_.k.dim);
    for (std::int32_t t = 0; t < tiles; ++t) {
      row_tiles.push_back({static_cast<std::int32_t>(u), t, 0, 1});
    }
  }
  // KV heads of a request whose keys lie side by side are taken together, as far as that leaves every thread some
  // items.
  constexpr std::int64_t kItemsPerThread = 4;
  std::int64_t all = 0;
  for (const Unit& unit : units) all += plan_.row_tiles(unit) * ((unit.keys + split_size() - 1) / split_size());
  const std::int64_t together = std::clamp<std::int64_t>(all / (kItemsPerThread * num_threads()), 1, kStreamHeads);
  for (std::size_t first = 0, last; first < units.size(); first = last) {
    const Unit& unit = units[first];
    const auto follows = [&](const Unit& next) {
      return static_cast<std::int64_t>(last - first) < together && !unit.listed && next.request == unit.request &&
             next.query == unit.query && Visibility::shared_by_all(p_) &&
             next.kv_head == unit.kv_head + static_cast<std::int32_t>(last - first);
    };
    for (last = first + 1; last < units.size() && follows(units[last]);) ++last;
    for (std::int32_t t = 0; t < plan_.row_tiles(unit); ++t) {
      for (std::int32_t n = 0; n * split_size() < unit.keys; ++n) {
        splits.push_back({static_cast<std::int32_t>(first), t, n, static_cast<std::int32_t>(last - first)});
      }
    }
  }
  constexpr std::size_t kTileBytes = (kTileKeys + kTileParts) * sizeof(float) + sizeof(TileMass);
  float* logits = reinterpret_cast<float*>(workspace.reserve(all_tiles * kTileBytes));
  float* parts = logits + all_tiles * kTileKeys;
  auto* mass = reinterpret_cast<TileMass*>(parts + all_tiles * kTileParts);
  for (UnitState& state : states) {
    const std::int64_t tiles = state.rows * state.tiles;
    state.logits = std::exchange(logits, logits + tiles * kTileKeys);
    state.parts = std::exchange(parts, parts + tiles * kTileParts);
    state.mass = std::exchange(mass, mass + tiles);
    state.near = all_tiles * kTileKeys * sizeof(float) <= kNearBytes;
  }

  // Little work is done sooner by one thread than by waking another.
  constexpr double kWorkPerThread = 1 << 20;  // multiply-adds
  const int threads = static_cast<int>(std::clamp(work / kWorkPerThread, 1.0, static_cast<double>(num_threads())));
  const auto phase = [&](std::size_t count, auto&& body) {
    parallel_for(static_cast<std::int64_t>(count), threads, [&](std::int64_t i) {
      static thread_local Scratch scratch;
      body(static_cast<std::size_t>(i), scratch);
    });
  };
  phase(row_tiles.size(), [&](std::size_t i, Scratch& s) {
    const Item& item = row_tiles[i];
    const auto u = static_cast<std::size_t>(item.unit);
    prepare(units[u], states[u], item.row_tile, s);
  });
  phase(splits.size(), [&](std::size_t i, Scratch& s) {
    const Item& item = splits[i];
    const auto u = static_cast<std::size_t>(item.unit);
    const std::int64_t first = item.split * split_size();
    score(&units[u], &states[u], item.heads, item.row_tile, first, std::min(units[u].keys, first + split_size()), s);
  });
  phase(units.size(), [&](std::size_t u, Scratch& s) { draw(units[u], states[u], s); });
  workspace.trim(kLogitBudget);
}

void SampledDecode::prepare(const Unit& unit, UnitState& state, std::int64_t row_tile, Scratch& s) const {
  const Request& request = p_.requests[static_cast<std::size_t>(unit.request)];
  const std::int64_t first = row_tile * kStreamRows, rows = tile_rows(unit, row_tile), dim = p_.q.dim;
  const bool static_scale = p_.k.scale != nullptr && p_.k.partition == 0;
  const double factor = p_.scale * kLog2e * (static_scale ? p_.k.scale[0] : 1.0f);
  s.counts.resize(static_cast<std::size_t>(dim));
  s.row.resize(static_cast<std::size_t>(dim));
  for (std::int64_t r = 0; r < rows; ++r) {
    const std::int64_t head = unit.head_of(first + r), query = unit.query_of(first + r);
    const std::byte* q = p_.q.row(request.q_page, head, request.q_first + query);
    std::byte* row = queries_of(state, first + r);
    auto* out = reinterpret_cast<float*>(row);
    double scale = 1.0;
    if (s_.bernoulli > 0) {
      for (std::int64_t d = 0; d < dim; ++d) s.row[static_cast<std::size_t>(d)] = load_as_double(q, p_.q.dtype, d);
      const aggregate::Draws draws(s_, p_.sampled.offset, unit.request, head, query);
      scale = aggregate::ternary_queries(s.row.data(), dim, s_, draws, s.counts.data());
      for (std::int64_t d = 0; d < dim; ++d) out[d] = s.counts[static_cast<std::size_t>(d)];
    } else if (p_.quantize_q) {
      float step = p_.q_static_scale;
      if (!(step > 0.0f)) step = float_from_bits(quantize_.max_abs_bits(q, p_.q.dtype, nullptr, dim)) / kInt8Max;
      quantize_.quantize(q, p_.q.dtype, nullptr, dim, step, s.counts.data(), DType::kInt8);
      scale = step;
      std::int32_t& sum = state.sums[static_cast<std::size_t>(first + r)];
      for (std::int64_t d = 0; d < dim; ++d) {
        const std::int8_t x = s.counts[static_cast<std::size_t>(d)];
        if (math_ == Math::kInt8) {
          reinterpret_cast<std::int8_t*>(row)[d] = x;
          sum += x;
        } else {
          out[d] = x;
        }
      }
    } else if (math_ == Math::kBFloat16) {
      std::memcpy(row, q, static_cast<std::size_t>(dim) * 2);
    } else {
      tile_.read_row(q, dim, p_.q.dtype, out);
    }
    state.factor[static_cast<std::size_t>(first + r)] = static_cast<float>(factor * scale);
  }
  if (s_.bernoulli == 0) return;
  const auto* floats = reinterpret_cast<const float*>(queries_of(state, first));
  UnitState::Features& features = state.features[static_cast<std::size_t>(row_tile)];
  const std::int64_t padded = (rows + 3) / 4 * 4;
  for (std::int64_t d = 0; d < dim; ++d) {
    bool needed = false;
    for (std::int64_t r = 0; r < rows; ++r) needed |= floats[r * dim_ + d] != 0.0f;
    if (!needed) continue;
    features.index.push_back(static_cast<std::int32_t>(d));
    for (std::int64_t r = 0; r < padded; ++r) features.queries.push_back(r < rows ? floats[r * dim_ + d] : 0.0f);
  }
}

void SampledDecode::tiles_of(const Unit& unit, const Visibility& seen, std::int64_t q0, std::int64_t q1,
                             std::int64_t k0, std::int64_t k1, std::vector<Tile>& tiles) const {
  if (!unit.listed) return seen.tiles(q0, q1, k0, k1, kTileKeys, tiles);
  tiles.clear();
  const auto [first_begin, first_end] = list_range(unit, seen, q0);
  const auto [last_begin, last_end] = list_range(unit, seen, q1 - 1);
  k0 = std::max(k0, first_begin / kTileKeys * kTileKeys);
  k1 = std::min(k1, last_end);
  for (std::int64_t t = k0 / kTileKeys; t * kTileKeys < k1; ++t) {
    const bool full = t * kTileKeys >= last_begin && (t + 1) * kTileKeys <= first_end;
    tiles.push_back({static_cast<std::int32_t>(t), !full});
  }
}

std::uint64_t SampledDecode::bits_of(const Unit& unit, const Visibility& seen, std::int64_t query,
                                     std::int64_t k0) const {
  if (!unit.listed) return seen.bits64(query, k0);
  const auto [begin, end] = list_range(unit, seen, query);
  const std::int64_t first = std::clamp<std::int64_t>(begin - k0, 0, 64),
                     last = std::clamp<std::int64_t>(end - k0, 0, 64);
  return first >= last ? 0 : (~std::uint64_t{0} >> (64 - (last - first))) << first;
}

template <class Fn>
void SampledDecode::for_runs(const Unit& unit, std::int64_t k0, std::uint64_t bits, Fn&& fn) const {
  while (bits != 0) {
    const int lane = std::countr_zero(bits);
    const Place at = place(unit, k0 + lane);
    std::int64_t run = unit.listed ? 1 : std::min<std::int64_t>(std::countr_one(bits >> lane), p_.page_size - at.slot);
    fn(lane, run, at);
    bits = lane + run == 64 ? 0 : bits >> (lane + run) << (lane + run);
  }
}

// Logits of the keys [k0, k1) for one row tile of `heads` units that differ in their KV head alone, and the masses of
// their tiles. Keys that no row sees are not read; the others in the order in which they lie in memory.
void SampledDecode::score(const Unit* units, UnitState* states, int heads, std::int64_t row_tile, std::int64_t k0,
                          std::int64_t k1, Scratch& s) const {
  const Unit& unit = *units;
  const std::int64_t first = row_tile * kStreamRows, rows = tile_rows(unit, row_tile);
  const Visibility seen(p_, unit.request, unit.q_head);
  tiles_of(unit, seen, unit.query_of(first), unit.query_of(first + rows - 1) + 1, k0, k1, s.tiles);
  const bool by_feature = s_.bernoulli > 0, key_scales = p_.k.partition > 0;
  constexpr std::int64_t kGatherKeys = kGatherTiles * kTileKeys;
  const std::int64_t head_scores = stream_rows(rows) * kStreamKeys;
  s.keys.resize(kGatherKeys + 4);
  s.key_scale.resize(static_cast<std::size_t>(heads * kGatherKeys));
  s.scores.resize(static_cast<std::size_t>(heads * head_scores));
  s.bits.resize(kGatherTiles * kStreamRows);

  StreamTile queries[kStreamHeads];
  for (int h = 0; h < heads; ++h) {
    UnitState& state = states[h];
    for (std::int64_t r = first; r < first + rows; ++r) {
      std::fill(state.row_mass(r) + k0 / kTileKeys, state.row_mass(r) + (k1 + kTileKeys - 1) / kTileKeys,
                TileMass{-std::numeric_limits<float>::infinity(), 0.0f});
    }
    queries[h].rows = rows;
    queries[h].queries = queries_of(state, first);
    queries[h].row_sums = state.sums.data() + first;
    queries[h].scores = s.scores.data() + h * head_scores;
  }
  // A segment is what lies together of a head: a page, or a tile of it.
  const bool pages = p_.page_size >= 16 && kTileKeys % p_.page_size == 0;
  const int segment_keys = pages ? static_cast<int>(p_.page_size) : kTileKeys;
  StreamSegment segments[kStreamKeys / 16];
  for (int i = 0; i < kStreamKeys / segment_keys; ++i) segments[i] = {.first = i * segment_keys, .count = segment_keys};
  StreamStep step;
  step.key_head_stride = p_.k.head_stride;
  step.key_dtype = p_.k.dtype;
  step.dim = p_.k.dim;
  step.qk = math_;
  step.segments = segments;

  struct Visit {
    std::int64_t tile = 0;
    std::uint64_t bits = 0;  // some row sees
    bool masked = false;
  };
  Visit visits[kGatherTiles];
  int first_tile = 0;  // of the step, among the visits
  // Makes logits of a tile as soon as its last key has been scored, while the next keys are on their way.
  const auto scored = [&](int h, int, int end) {
    if (end % kTileKeys != 0) return;
    const int column = end - kTileKeys, t = first_tile + column / kTileKeys;
    UnitState& state = states[h];
    sampling_.logits({.scores = queries[h].scores + column,
                      .rows = rows,
                      .factor = state.factor.data() + first,
                      .key_scale = key_scales ? s.key_scale.data() + h * kGatherKeys + t * kTileKeys : nullptr,
                      .softcap = static_cast<float>(p_.softcap * kLog2e),
                      .bits = visits[t].masked ? s.bits.data() + t * kStreamRows : nullptr,
                      .logits = state.logits_of(visits[t].tile, first),
                      .next = state.near ? state.rows * kTileKeys : 0,
                      .mass = state.row_mass(first) + visits[t].tile,
                      .parts = state.parts_of(visits[t].tile, first),
                      .next_parts = state.rows * kTileParts,
                      .mass_stride = state.tiles});
  };
  step.context = &scored;
  step.scored = [](const void* context, int h, int begin, int end) {
    (*static_cast<decltype(&scored)>(context))(h, begin, end);
  };
  std::int64_t read = 0;
  for (std::size_t next = 0; next < s.tiles.size();) {
    int count = 0;
    for (; next < s.tiles.size() && count < kGatherTiles; ++next) {
      Visit& visit = visits[count];
      visit = {s.tiles[next].index, ~std::uint64_t{0}, s.tiles[next].masked};
      if (visit.masked) {
        std::uint64_t* bits = s.bits.data() + count * kStreamRows;
        visit.bits = 0;
        for (std::int64_t r = 0; r < rows; ++r) {
          const bool same = r > 0 && unit.query_of(first + r) == unit.query_of(first + r - 1);
          bits[r] = same ? bits[r - 1] : bits_of(unit, seen, unit.query_of(first + r), visit.tile * kTileKeys);
          visit.bits |= bits[r];
        }
        if (visit.bits == 0) continue;
      }
      locate(unit, heads, visit.tile, visit.bits, count * kTileKeys, s);
      read += std::popcount(visit.bits);
      ++count;
    }
    for (int i = 0; count > 0 && i < 4; ++i) s.keys[static_cast<std::size_t>(count * kTileKeys + i)] = s.keys[0];
    for (first_tile = 0; first_tile < count; first_tile += kStepTiles) {
      const int keys = std::min((count - first_tile) * kTileKeys, kStreamKeys);
      if (by_feature) {
        for (int at = 0; at < keys; at += kTileKeys) {
          const Visit& visit = visits[first_tile + at / kTileKeys];
          for (int h = 0; h < heads; ++h) {
            const UnitState::Features& features = states[h].features[static_cast<std::size_t>(row_tile)];
            score_by_feature(units[h], features, rows, visit.tile, visit.bits, queries[h].scores + at);
            scored(h, at, at + kTileKeys);
          }
        }
        continue;
      }
      const int left = (count - first_tile) * kTileKeys - keys;
      step.keys = s.keys.data() + first_tile * kTileKeys;
      step.count = keys;
      step.num_segments = keys / segment_keys;
      step.next = left > 0 ? segment_keys : 0;
      stream_.scores(queries, heads, step);
    }
  }
  for (int h = 0; h < heads; ++h) {
    const std::size_t features = states[h].features[static_cast<std::size_t>(row_tile)].index.size();
    count(p_.sampled.reads.k_features, units[h], read * (by_feature ? static_cast<std::int64_t>(features) : p_.k.dim));
  }
}

// Where the keys of a tile lie whose bits are set, from `at` on in s.keys, and each head's scales in s.key_scale.
void SampledDecode::locate(const Unit& unit, int heads, std::int64_t tile, std::uint64_t bits, int at,
                           Scratch& s) const {
  const std::byte** keys = s.keys.data() + at;
  for_runs(unit, tile * kTileKeys, bits, [&](int lane, std::int64_t run, const Place& place) {
    const std::byte* key = p_.k.row(place.page, unit.kv_head, place.slot);
    for (std::int64_t i = 0; i < run; ++i) keys[lane + i] = key + i * p_.k.slot_stride;
    for (int h = 0; p_.k.partition > 0 && h < heads; ++h) {
      float* scale = s.key_scale.data() + h * kGatherTiles * kTileKeys + at + lane;
      p_.k.copy_scales(place.page, unit.kv_head + h, place.slot, run, scale);
    }
  });
  if (bits == ~std::uint64_t{0}) return;
  const int some = std::countr_zero(bits);  // the other lanes take a key that is read anyway; their bits hide it
  for (std::uint64_t other = ~bits; other != 0; other &= other - 1) keys[std::countr_zero(other)] = keys[some];
}

void SampledDecode::score_by_feature(const Unit& unit, const UnitState::Features& features, std::int64_t rows,
                                     std::int64_t tile, std::uint64_t bits, float* scores) const {
  const auto size = static_cast<std::int64_t>(size_of(p_.k.dtype));
  for_runs(unit, tile * kTileKeys, bits, [&](int lane, std::int64_t run, const Place& place) {
    sampling_.feature_scores({.keys = p_.sampled.features + place.page * p_.sampled.feature_page_stride +
                                      unit.kv_head * p_.sampled.feature_head_stride + place.slot * size,
                              .feature_bytes = p_.page_size * size,
                              .dtype = p_.k.dtype,
                              .count = static_cast<int>(run),
                              .features = features.index.data(),
                              .num_features = static_cast<std::int64_t>(features.index.size()),
                              .queries = features.queries.data(),
                              .rows = rows,
                              .scores = scores + lane});
  });
}

// s.kept: 64 bits a tile of the keys that are read exactly. s.share and s.tops say which tiles hold anything, and up to
// what.
void SampledDecode::keep(const RowLogits& logits, Scratch& s) const {
  const std::size_t tiles = s.share.size();
  // The keys of a tile whose logits are at least this; by default all that are seen.
  const auto keys_of = [&](std::size_t t, float least = kLowest) {
    return s.share[t] > 0.0 ? sampling_.at_least(logits.tile(t), least) : 0;
  };
  std::int64_t left = s_.n_sink;
  for (std::size_t t = 0; t < tiles && left > 0; ++t) {
    for (std::uint64_t bits = keys_of(t); bits != 0 && left > 0; bits &= bits - 1, --left) {
      s.kept[t] |= bits & (~bits + 1);
    }
  }
  left = s_.n_recent;
  for (std::size_t t = tiles; t-- > 0 && left > 0;) {
    for (std::uint64_t bits = keys_of(t); bits != 0 && left > 0; --left) {
      const std::uint64_t last = std::uint64_t{1} << (63 - std::countl_zero(bits));
      s.kept[t] |= last;
      bits &= ~last;
    }
  }
  if (s_.n_top == 0) return;

  // The largest free logits of n tiles are n keys: none below the least of these is among the n largest.
  const auto top = static_cast<std::size_t>(s_.n_top);
  const auto raise = [&](float& least) {
    if (s.order.size() <= top) return;
    const auto nth = s.order.begin() + static_cast<std::ptrdiff_t>(top - 1);
    std::nth_element(s.order.begin(), nth, s.order.end(), std::greater<>());
    least = std::max(least, *nth);
  };
  float least = kLowest;
  s.order.clear();
  for (std::size_t t = 0; t < tiles; ++t) {
    if (s.share[t] > 0.0) s.order.push_back(sampling_.largest(logits.tile(t), ~s.kept[t]));
  }
  raise(least);
  const auto candidates = [&](auto&& fn) {
    for (std::size_t t = 0; t < tiles; ++t) {
      if (s.tops[t] < least) continue;  // rounded up, so nothing of it reaches
      for (std::uint64_t bits = keys_of(t, least) & ~s.kept[t]; bits != 0; bits &= bits - 1) {
        const int lane = std::countr_zero(bits);
        fn(t, lane, logits.tile(t)[lane]);
      }
    }
  };
  s.order.clear();
  candidates([&](std::size_t, int, float logit) { s.order.push_back(logit); });
  raise(least);
  // All above it, and of its equals the first ones.
  std::int64_t equals = s_.n_top;
  for (const float logit : s.order) equals -= logit > least ? 1 : 0;
  candidates([&](std::size_t t, int lane, float logit) {
    if (logit > least || equals-- > 0) s.kept[t] |= std::uint64_t{1} << lane;
  });
}

// One row's terms, ascending by key, appended to s.terms; its lse is written.
void SampledDecode::draw_row(const Unit& unit, UnitState& state, std::int64_t row, Scratch& s) const {
  const Request& request = p_.requests[static_cast<std::size_t>(unit.request)];
  const std::int64_t head = unit.head_of(row), query = unit.query_of(row), slot = request.q_first + query;
  const auto tiles = static_cast<std::size_t>(state.tiles);
  const RowLogits logits{state.logits_of(0, row), state.rows * kTileKeys};
  const TileMass* mass = state.row_mass(row);
  const auto index = static_cast<std::int32_t>(row);

  // The denominator, over all keys and the sink, relative to 2^base; s.share are the tiles' masses relative to
  // 2^highest.
  s.share.resize(tiles);
  const auto [highest, total] = sampling_.shares(mass, state.tiles, s.share.data());
  const bool nan = std::isnan(total);
  const double sink = p_.sinks != nullptr ? p_.sinks[head] * kLog2e : -kInfinity;
  const double base = std::max(static_cast<double>(highest), std::ceil(sink));
  const double shift = total > 0.0 ? std::exp2(highest - base) : 0.0;
  double denominator = total * shift + (sink == -kInfinity ? 0.0 : std::exp2(sink - base));
  if (nan) denominator = std::numeric_limits<double>::quiet_NaN();
  if (p_.lse != nullptr) {
    const double lse = denominator == 0.0 ? -kInfinity : (base + std::log2(denominator)) * kLn2;
    static_cast<float*>(
        p_.lse)[request.q_page * p_.lse_page_stride + head * p_.lse_head_stride + slot * p_.lse_slot_stride] =
        static_cast<float>(lse);
  }
  if (nan) {
    std::fill_n(s.out.data() + row * columns_, p_.v.dim, std::numeric_limits<float>::quiet_NaN());
    return;
  }
  if (total == 0.0) return;
  const double normal = shift / denominator;  // makes a probability of what is relative to 2^highest

  alignas(64) float weights[kTileKeys];
  const auto add = [&](std::int32_t key, double weight) {
    const Place at = place(unit, key);
    const std::byte* value = p_.v.row(at.page, unit.kv_head, at.slot);
    for (std::int64_t b = 0; b < value_bytes_; b += 64) __builtin_prefetch(value + b, 0, 2);
    s.terms.push_back({key, index, value, static_cast<float>(weight) * p_.v.scale_of(at.page, unit.kv_head, at.slot)});
  };
  const std::size_t first_term = s.terms.size();
  // What may be drawn: everything, less the keys that are read exactly.
  double sampled = total;
  const bool keeps = s_.method == SamplingMethod::kExact || s_.n_sink > 0 || s_.n_recent > 0 || s_.n_top > 0;
  s.kept.assign(tiles, s_.method == SamplingMethod::kExact ? ~std::uint64_t{0} : 0);
  s.tops.resize(tiles);
  for (std::size_t t = 0; t < tiles; ++t) s.tops[t] = mass[t].top;
  if (keeps) {
    if (s_.method != SamplingMethod::kExact) keep(logits, s);
    sampled = 0.0;
    for (std::size_t t = 0; t < tiles; ++t) {
      const std::uint64_t kept = s.kept[t];
      if (kept != 0 && s.share[t] > 0.0) {
        sampling_.weights(logits.tile(t), kept, mass[t].top, weights);
        const double scale = power(mass[t].top - highest) * normal;
        for (int lane = 0; lane < kTileKeys; ++lane) {
          if (weights[lane] > 0.0f) add(static_cast<std::int32_t>(t * kTileKeys) + lane, weights[lane] * scale);
        }
        const TileMass rest = sampling_.mass(logits.tile(t), ~kept, state.parts_of(static_cast<std::int64_t>(t), row));
        s.tops[t] = rest.top;
        s.share[t] = rest.sum > 0.0f ? rest.sum * power(rest.top - highest) : 0.0;
      }
      sampled += s.share[t];
    }
  }
  if (sampled == 0.0) return;
  const std::size_t first_drawn = s.terms.size();

  // A draw of the key of tile t at which the prefix sums of shares reach so far into it.
  const auto pick = [&](std::size_t t, double into, double weight) {
    const float* part = state.parts_of(static_cast<std::int64_t>(t), row);
    const auto target = static_cast<float>(into / power(s.tops[t] - highest));
    float before[kTileParts] = {};
    for (int n = 1; n < kTileParts; ++n) before[n] = before[n - 1] + part[n - 1];
    int n = 0;
    for (int i = 1; i < kTileParts; ++i) n += before[i] < target ? 1 : 0;
    if (part[n] == 0.0f) {
      std::uint32_t some = 0;
      for (int i = 0; i < kTileParts; ++i) some |= std::uint32_t{part[i] > 0.0f} << i;
      n = nearest(some, n);
    }
    const float* at = logits.tile(t) + n * kPartKeys;
    __builtin_prefetch(at);
    s.picks.push_back({.logits = at,
                       .bits = static_cast<std::uint32_t>(~s.kept[t] >> (n * kPartKeys)),
                       .top = s.tops[t],
                       .target = target - before[n],
                       .weight = static_cast<float>(weight),
                       .key = static_cast<std::int32_t>(t * kTileKeys) + n * kPartKeys});
  };
  s.picks.clear();

  const aggregate::Draws draws(s_, p_.sampled.offset, unit.request, head, query);
  const auto samples = static_cast<double>(s_.samples);
  if (s_.method == SamplingMethod::kSystematicTile) {
    const auto nonempty =
        static_cast<std::int64_t>(std::count_if(s.share.begin(), s.share.end(), [](double x) { return x > 0.0; }));
    const std::int64_t each = std::max<std::int64_t>(1, s_.samples / nonempty);
    const auto own = static_cast<double>(each);
    for (std::size_t t = 0; t < tiles; ++t) {
      if (s.share[t] == 0.0) continue;
      const double u = draws.value(static_cast<std::int64_t>(t));
      for (std::int64_t i = 0; i < each; ++i) {
        pick(t, (static_cast<double>(i) + u) / own * s.share[t], s.share[t] * normal / own);
      }
    }
  } else {
    const auto count = static_cast<std::size_t>(s_.samples);
    s.targets.resize(count + 1);
    const double shared = s_.method == SamplingMethod::kSystematic ? draws.value(0) : 0.0;
    for (std::int64_t i = 0; i < s_.samples; ++i) {
      const double u = s_.method == SamplingMethod::kSystematic ? shared : draws.value(i);
      const double f = s_.method == SamplingMethod::kIid ? u : (static_cast<double>(i) + u) / samples;
      s.targets[static_cast<std::size_t>(i)] = f * sampled;
    }
    if (s_.method == SamplingMethod::kIid) std::sort(s.targets.begin(), s.targets.end() - 1);
    s.targets.back() = kInfinity;
    // Tiles in which some targets lie. Where slices have one each, the slice says how many there are up to a place,
    // give or take one: to walk from target to target instead would be a guess for the processor at each of them.
    s.openings.resize(tiles);
    std::size_t last_tile = tiles - 1, opened = 0, m = 0;
    while (s.share[last_tile] == 0.0) --last_tile;
    const bool slices = s_.method != SamplingMethod::kIid;
    const double per_share = samples / sampled * (1.0 - 1e-12);
    double before = 0.0;
    for (std::size_t t = 0; t <= last_tile; ++t) {
      const double after = before + s.share[t];
      std::size_t last = slices ? std::min(static_cast<std::size_t>(after * per_share), count) : m;
      last += s.targets[last] <= after ? 1 : 0;
      while (s.targets[last] <= after) ++last;
      if (t == last_tile) last = count;  // what rounding has left
      s.openings[opened] = {t, m, last, before};
      const bool open = last > m && s.share[t] > 0.0;
      opened += open ? 1 : 0;
      m = open ? last : m;
      before = after;
    }
    for (std::size_t i = 0; i < opened; ++i) {
      constexpr std::size_t kAhead = 8;
      if (i + kAhead < opened) {
        __builtin_prefetch(state.parts_of(static_cast<std::int64_t>(s.openings[i + kAhead].tile), row));
      }
      const Opening& open = s.openings[i];
      for (std::size_t n = open.first; n < open.last; ++n) {
        pick(open.tile, s.targets[n] - open.before, sampled * normal / samples);
      }
    }
  }
  sampling_.find(s.picks.data(), static_cast<std::int64_t>(s.picks.size()));
  for (std::size_t i = 0, next; i < s.picks.size(); i = next) {
    for (next = i + 1; next < s.picks.size() && s.picks[next].key == s.picks[i].key;) ++next;
    add(s.picks[i].key, static_cast<double>(next - i) * s.picks[i].weight);
  }
  const auto at = [&](std::size_t i) { return s.terms.begin() + static_cast<std::ptrdiff_t>(i); };
  const auto by_key = [](const ValueTerm& a, const ValueTerm& b) { return a.key < b.key; };
  if (first_drawn > first_term) std::inplace_merge(at(first_term), at(first_drawn), s.terms.end(), by_key);
}

// The rows' ascending runs as one, equal keys in the order of the rows.
void SampledDecode::merge_terms(Scratch& s) const {
  const auto by_key = [](const ValueTerm& a, const ValueTerm& b) { return a.key < b.key; };
  s.merged.resize(s.terms.size());
  while (s.runs.size() > 2) {  // bounds of the runs
    std::vector<std::size_t>& runs = s.runs;
    std::size_t kept = 1;
    for (std::size_t i = 0; i + 1 < runs.size(); i += 2) {
      const auto at = [&](std::size_t n) { return s.terms.begin() + static_cast<std::ptrdiff_t>(n); };
      const std::size_t a = runs[i], b = runs[i + 1], c = i + 2 < runs.size() ? runs[i + 2] : b;
      std::merge(at(a), at(b), at(b), at(c), s.merged.begin() + static_cast<std::ptrdiff_t>(a), by_key);
      runs[kept++] = c;
    }
    runs.resize(kept);
    s.terms.swap(s.merged);
  }
}

void SampledDecode::draw(const Unit& unit, UnitState& state, Scratch& s) const {
  const Request& request = p_.requests[static_cast<std::size_t>(unit.request)];
  s.out.assign(static_cast<std::size_t>(state.rows * columns_), 0.0f);
  s.terms.clear();
  s.runs.assign(1, 0);
  for (std::int64_t row = 0; row < state.rows; ++row) {
    draw_row(unit, state, row, s);
    s.runs.push_back(s.terms.size());
  }
  merge_terms(s);
  std::int64_t distinct = 0;
  const std::byte* held = nullptr;
  for (const ValueTerm& term : s.terms) {
    distinct += term.value != held ? 1 : 0;
    held = term.value;
  }
  count(p_.sampled.reads.v_rows, unit, distinct);
  sampling_.add_values(s.terms.data(), static_cast<std::int64_t>(s.terms.size()), p_.v.dtype, p_.v.dim, s.out.data(),
                       columns_);
  for (std::int64_t row = 0; row < state.rows; ++row) {
    tile_.write_row(s.out.data() + row * columns_, 1.0f, p_.v.dim, p_.out.dtype,
                    p_.out.row(request.q_page, unit.head_of(row), request.q_first + unit.query_of(row)));
  }
}

}  // namespace

void sampled(const Problem& problem) { SampledDecode(problem).run(); }

}  // namespace heddle::host
