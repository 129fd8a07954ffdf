// Attention and decode on the host: tiled online softmax in one pass over the keys, in parallel over row tiles and key
// splits.
//
// Units with several query rows take the tile path: keys and values are packed (see tile_kernels.h), once for all row
// tiles that read them, and multiplied in registers or matrix tiles. Units with few rows take the stream path: keys and
// values are read once, where they lie. Limits: the FMA, VDPBF16PS or AMX rate for the first, memory bandwidth for the
// second.
#include <algorithm>
#include <atomic>
#include <bit>
#include <cmath>
#include <cstring>
#include <limits>
#include <memory>
#include <span>
#include <vector>

#include "core/kernels.h"
#include "core/threads.h"
#include "host/quantize_kernels.h"
#include "host/stream_kernels.h"
#include "host/tile_kernels.h"
#include "host/workspace.h"
#include "schedule/plan.h"
#include "select/visibility.h"

namespace heddle::host {
namespace {

constexpr float kLog2e = 1.44269504088896340736f;
constexpr float kLn2 = 0.69314718055994530942f;
constexpr float kInfinity = std::numeric_limits<float>::infinity();

// Keys and values packed at a time, and partial results kept at a time (or those of one row tile, if they are more):
// bounds the memory of a call whatever its length.
constexpr std::size_t kPackBudget = std::size_t{64} << 20;

// Keys whose places are looked up at a time: the stream kernels fetch ahead among them.
constexpr int kGatherKeys = 4 * kStreamKeys;

// Element types of the two products, from what q, k and v are and what the processor multiplies natively. bf16 and int8
// operands are never rounded on the way; whatever bf16 cannot hold exactly runs as float32.
struct Formats {
  Math qk = Math::kFloat32, pv = Math::kFloat32;
  bool integer_scores = false;  // int8 queries on int8 keys, as stored
};

Formats choose_formats(const Problem& problem, bool native_words) {
  Formats f;
  f.integer_scores = problem.quantize_q || problem.q.dtype == DType::kInt8;
  if (!native_words) return f;
  const auto fits_bf16 = [](DType d) { return d == DType::kBFloat16 || d == DType::kInt8 || d == DType::kFloat8E4M3; };
  const bool values = fits_bf16(problem.v.dtype) && problem.v.partition == 0;
  if (f.integer_scores) {
    f.qk = Math::kInt8;
    if (values) f.pv = Math::kBFloat16;
  } else if (values && problem.q.dtype == DType::kBFloat16 && fits_bf16(problem.k.dtype)) {
    f.qk = f.pv = Math::kBFloat16;
  }
  return f;
}

// Row tiles that end where the blocks of a mask do see whole blocks, and need no masks of single elements.
std::int64_t row_tile_of(const Problem& problem) {
  const auto* mask = std::get_if<select::BlockMask>(&problem.selection->kind());
  if (mask == nullptr || mask->block_q > kTileRows * kTileRows) return kTileRows;
  const std::int64_t rows = mask->block_q * (Visibility::shared_by_group(problem) ? problem.group() : 1);
  if (rows <= kTileRows) return kTileRows / rows * rows;
  for (std::int64_t tile = kTileRows; 2 * tile > kTileRows; tile -= 32) {
    if (rows % tile == 0) return tile;
  }
  return kTileRows;
}

// Keys and values of a KV head of a request, packed: tiles of 64 keys.
struct PackGroup {
  std::int32_t unit = 0;  // any of its units
  std::vector<std::int32_t> units;
  std::int64_t tiles = 0;
  std::vector<std::uint8_t> visited, finite;
  std::byte* keys = nullptr;
  std::byte* values = nullptr;
  float* key_scale = nullptr;  // [tiles][64] or null
};

struct PackedTile {
  std::byte* keys = nullptr;
  std::byte* values = nullptr;
  float* key_scale = nullptr;  // [64] or null
};

// Partial results of a row tile whose keys are split: of each split and row, o [columns], m and l.
struct Partials {
  std::int32_t unit = 0;
  std::int64_t first_row = 0;  // of the unit
  float* base = nullptr;
  std::int64_t splits = 0, rows = 0, columns = 0;
  float* o(std::int64_t split, std::int64_t row) const { return base + (split * rows + row) * (columns + 2); }
  float* m(std::int64_t split, std::int64_t row) const { return o(split, row) + columns; }
  float* l(std::int64_t split, std::int64_t row) const { return m(split, row) + 1; }
};

// What a thread needs for one item of either path.
struct Scratch {
  std::byte* queries;            // packed, or as floats / int8 for the stream path
  float* query_row;              // one row as floats
  std::int8_t* query_int8;       // [kTileRows][dim]
  float *factor, *bias, *m, *l;  // [kTileRows]
  std::int32_t* row_sums;        // [kTileRows]
  float* o;                      // [kTileRows][columns]
  float* scores;
  void* probabilities;
  std::uint64_t* bits;  // [kStepTiles][kTileRows], or [kStreamRows][kStepTiles]
  std::byte* keys;      // kStepTiles packed tiles
  std::byte* values;
  float *key_scale, *value_scale;  // [kTileKeys], or [kStreamHeads][kStreamKeys]
  float* tile_scale;               // [kStepTiles][64]: of tiles packed on the way
  const std::byte** key_rows;      // [kGatherKeys + 4]
  const std::byte** value_rows;
  float *alpha, *weight, *sums;    // stream path, see StreamTile
  std::span<const Unit> prepared;  // whose queries lie here; stream path
};

// Consecutive keys in one page: slots [slot, slot + count), gathered to `first` and on.
struct KeyRun {
  std::int64_t first = 0, count = 0, page = 0, slot = 0;
};

// Those that hold some of the keys gathered to [first, first + count).
std::span<const KeyRun> runs_of(std::span<const KeyRun> runs, std::int64_t first, std::int64_t count) {
  const auto begin = std::ranges::upper_bound(runs, first, {}, &KeyRun::first) - 1;
  return {begin, std::ranges::lower_bound(begin, runs.end(), first + count, {}, &KeyRun::first)};
}

// Work that one thread does at once: an item of the plan, or the same split of several stream units, whose keys lie
// side by side.
struct Item {
  WorkItem work;
  std::int32_t units = 1;              // from work.unit on
  const Partials* partials = nullptr;  // of its units, or null: not split
};

class Attention {
 public:
  explicit Attention(const Problem& problem)
      : p_(problem),
        tile_(tile_kernels()),
        stream_(stream_kernels()),
        quantize_(quantize_kernels()),
        formats_(choose_formats(problem, tile_.native_words)),
        stream_qk_(formats_.qk != Math::kBFloat16 || problem.k.dtype == DType::kBFloat16 ? formats_.qk
                                                                                         : Math::kFloat32),
        stream_pv_(formats_.pv != Math::kBFloat16        ? Math::kFloat32
                   : problem.v.dtype == DType::kBFloat16 ? Math::kBFloat16
                   : problem.v.dtype == DType::kInt8     ? Math::kInt8
                                                         : Math::kFloat32),
        plan_(make_plan(problem, row_tile_of(problem))),
        columns_(padded_columns(problem.v.dim)),
        words_(query_words(problem.q.dim, formats_.qk)),
        key_bytes_(key_tile_bytes(problem.q.dim, formats_.qk)),
        value_bytes_(value_tile_bytes(problem.v.dim, formats_.pv)),
        page_bits_(std::has_single_bit(static_cast<std::uint64_t>(problem.page_size))
                       ? std::countr_zero(static_cast<std::uint64_t>(problem.page_size))
                       : -1),
        factor_(std::fabs(problem.scale) * kLog2e) {
    if (p_.k.scale != nullptr && p_.k.partition == 0) factor_ *= p_.k.scale[0];
    if (p_.v.scale != nullptr && p_.v.partition == 0) value_factor_ = p_.v.scale[0];
  }

  void run();

 private:
  bool streams(const Unit& unit) const { return unit.rows() <= kStreamRows; }
  std::vector<PackGroup> make_groups() const;
  void run_chunk(std::vector<PackGroup>& groups, const std::vector<std::int32_t>& units);
  PackedTile packed_tile(const PackGroup& group, std::int64_t tile) const {
    const auto t = static_cast<std::size_t>(tile);
    return {group.keys + t * key_bytes_, group.values + t * value_bytes_,
            group.key_scale == nullptr ? nullptr : group.key_scale + t * kTileKeys};
  }
  std::vector<Item> make_items(std::span<const std::int32_t> units) const;
  void gather(const Unit& unit, std::int64_t begin, std::int64_t end, std::int64_t at, Scratch& s,
              std::vector<KeyRun>* runs = nullptr) const;
  void copy_scales(const Rows& rows, std::int64_t head, std::int64_t heads, std::span<const KeyRun> runs,
                   std::int64_t first, std::int64_t count, float* out) const;
  void fetch_scales(const Rows& rows, std::int64_t head, std::int64_t heads, std::span<const KeyRun> runs,
                    std::int64_t first, std::int64_t count) const;
  bool pack_tile(const Unit& unit, std::int64_t tile, const PackedTile& out, Scratch& s) const;
  void run_item(const Item& item, const PackGroup* group, Scratch& s) const;
  void finish_rows(const Unit& unit, std::int64_t row, std::int64_t rows, std::int64_t split, const Partials* partials,
                   Scratch& s) const;
  void begin_rows(std::int64_t rows, Scratch& s) const;
  void prepare_rows(const Unit& unit, std::int64_t row, std::int64_t rows, bool stream, Scratch& s) const;
  void run_tiles(const Unit& unit, std::int64_t row, std::int64_t rows, std::int64_t k0, std::int64_t k1,
                 const PackGroup* group, Scratch& s) const;
  void run_stream(std::span<const Unit> units, std::int64_t k0, std::int64_t k1, Scratch& s) const;
  Scratch rows_from(const Scratch& s, std::int64_t row) const;
  void write_row(const Unit& unit, std::int64_t row, float* o, float m, float l, float factor = 1.0f) const;
  void merge_rows(const Partials& partials, std::int64_t row, float* o) const;

  // Tiles and masks, whether the unit reads all keys or a list.
  void tiles_of(const Unit& unit, const Visibility& seen, std::int64_t q0, std::int64_t q1, std::int64_t k0,
                std::int64_t k1, std::vector<Tile>& tiles) const;
  std::uint64_t bits_of(const Unit& unit, const Visibility& seen, std::int64_t query, std::int64_t k0) const;
  std::pair<std::int64_t, std::int64_t> list_range(const Unit& unit, const Visibility& seen, std::int64_t query) const;

  struct Place {
    std::int64_t page, slot;
  };
  Place place(const Unit& unit, std::int64_t key) const {
    const Request& r = p_.requests[unit.request];
    if (unit.listed) key = unit.list[static_cast<std::size_t>(key)];
    if (p_.page_size == 0) return {r.k_page, r.k_first + key};
    if (page_bits_ < 0) return {r.pages[key / p_.page_size], key % p_.page_size};
    return {r.pages[key >> page_bits_], key & (p_.page_size - 1)};  // a list looks up every key: divisions take long
  }
  const std::byte* q_row(const Unit& unit, std::int64_t row) const {
    const Request& r = p_.requests[unit.request];
    return p_.q.row(r.q_page, unit.head_of(row), r.q_first + unit.query_of(row));
  }

  Scratch& scratch(Workspace& workspace, Scratch& s) const;

  const Problem& p_;
  const TileKernels& tile_;
  const StreamKernels& stream_;
  const QuantizeKernels& quantize_;
  const Formats formats_;
  const Math stream_qk_, stream_pv_;  // of the stream path, which multiplies values as they are stored
  const Plan plan_;
  const std::int64_t columns_, words_;
  const std::size_t key_bytes_, value_bytes_;
  const int page_bits_;  // of slots, if pages are a power of two
  float factor_;
  float value_factor_ = 1.0f;
};

Scratch& Attention::scratch(Workspace& workspace, Scratch& s) const {
  const auto carve = [&](Carver c) {
    const std::size_t dim = static_cast<std::size_t>(p_.q.dim + 63) / 64 * 64;
    s.queries = c.take<std::byte>(kTileRows * std::max<std::size_t>(static_cast<std::size_t>(words_) * 4, dim * 4));
    s.query_row = c.take<float>(dim);
    s.query_int8 = c.take<std::int8_t>(kTileRows * dim);
    for (float** at : {&s.factor, &s.bias, &s.m, &s.l}) *at = c.take<float>(kTileRows);
    s.row_sums = c.take<std::int32_t>(kTileRows);
    s.o = c.take<float>(static_cast<std::size_t>(kTileRows * columns_));
    s.scores = c.take<float>(kScoreBytes / 4);
    s.probabilities = formats_.pv == Math::kFloat32 ? s.scores : static_cast<void*>(c.take<std::byte>(kScoreBytes / 2));
    s.bits = c.take<std::uint64_t>(kStepTiles * kTileRows);
    s.keys = c.take<std::byte>(kStepTiles * key_bytes_);
    s.values = c.take<std::byte>(kStepTiles * value_bytes_);
    for (float** at : {&s.key_scale, &s.value_scale}) *at = c.take<float>(kStreamHeads * kStreamKeys);
    s.tile_scale = c.take<float>(kStepTiles * kTileKeys);
    s.key_rows = c.take<const std::byte*>(kGatherKeys + 4);
    s.value_rows = c.take<const std::byte*>(kGatherKeys + 4);
    for (float** at : {&s.alpha, &s.weight}) *at = c.take<float>(kTileRows);
    s.sums = c.take<float>(static_cast<std::size_t>(kTileRows * stream_dim(p_.v.dim)));
    return c.used();
  };
  carve(Carver(workspace.reserve(carve(Carver(nullptr)))));
  return s;
}

// The same scratch for rows from `row` on.
Scratch Attention::rows_from(const Scratch& s, std::int64_t row) const {
  Scratch part = s;
  const std::int64_t dim = stream_dim(p_.q.dim);
  part.queries += row * dim * 4;
  part.query_int8 += row * dim;
  for (float** at : {&part.factor, &part.bias, &part.m, &part.l, &part.alpha, &part.weight}) *at += row;
  part.row_sums += row;
  part.o += row * columns_;
  part.scores += row * kStreamKeys;
  part.sums += row * stream_dim(p_.v.dim);
  return part;
}

// Units with more than one row tile read the same packed keys, as do all heads of a group.
std::vector<PackGroup> Attention::make_groups() const {
  std::vector<PackGroup> groups;
  for (std::size_t u = 0; u < plan_.units.size(); ++u) {
    const Unit& unit = plan_.units[u];
    const auto index = static_cast<std::int32_t>(u);
    const std::int64_t tiles = (unit.keys + kTileKeys - 1) / kTileKeys;
    if (!groups.empty()) {
      const Unit& last = plan_.units[static_cast<std::size_t>(groups.back().unit)];
      if (last.request == unit.request && last.kv_head == unit.kv_head && last.query == unit.query) {
        groups.back().units.push_back(index);
        if (!streams(unit)) groups.back().tiles = tiles;
        continue;
      }
    }
    PackGroup group;
    group.unit = index;
    group.units = {index};
    // Packing ahead pays if a packed tile is read more than once.
    if (!streams(unit) && plan_.row_tiles(unit) > 1) group.tiles = tiles;
    groups.push_back(std::move(group));
  }
  return groups;
}

void Attention::run() {
  std::vector<PackGroup> groups = make_groups();
  const std::size_t scale_bytes = p_.k.partition > 0 ? kTileKeys * sizeof(float) : 0;
  const std::size_t tile_bytes = key_bytes_ + value_bytes_ + scale_bytes;
  static thread_local Workspace pack_workspace;

  std::vector<PackGroup> chunk;
  std::vector<std::int32_t> units;
  std::size_t bytes = 0;
  const auto flush = [&] {
    if (chunk.empty()) return;
    std::byte* at = pack_workspace.reserve(bytes);
    for (PackGroup& group : chunk) {
      const auto tiles = static_cast<std::size_t>(group.tiles);
      if (tiles == 0) continue;
      group.keys = at;
      group.values = group.keys + tiles * key_bytes_;
      if (scale_bytes > 0) group.key_scale = reinterpret_cast<float*>(group.values + tiles * value_bytes_);
      at += tiles * tile_bytes;
    }
    run_chunk(chunk, units);
    chunk.clear();
    units.clear();
    bytes = 0;
  };
  for (PackGroup& group : groups) {
    std::size_t need = static_cast<std::size_t>(group.tiles) * tile_bytes;
    if (need > kPackBudget) {  // packed on the way, by each row tile for itself
      group.tiles = 0;
      need = 0;
    }
    if (bytes + need > kPackBudget) flush();
    bytes += need;
    units.insert(units.end(), group.units.begin(), group.units.end());
    chunk.push_back(std::move(group));
  }
  flush();
}

// Stream units of one request whose keys lie side by side are taken together, as far as that leaves enough items for
// the threads: who computes a head changes no bit of it.
std::vector<Item> Attention::make_items(std::span<const std::int32_t> units) const {
  constexpr std::int64_t kItemsPerThread = 4;
  std::int64_t splits = 0;
  for (const std::int32_t u : units) {
    const Unit& unit = plan_.units[static_cast<std::size_t>(u)];
    if (streams(unit)) splits += plan_.splits(unit);
  }
  const std::int64_t together = std::max<std::int64_t>(1, splits / (kItemsPerThread * num_threads()));

  std::vector<Item> items;
  for (std::size_t first = 0, last; first < units.size(); first = last) {
    const Unit& unit = plan_.units[static_cast<std::size_t>(units[first])];
    const auto follows = [&](const Unit& next) {
      if (!streams(unit)) return !streams(next);
      const std::int64_t most = std::min<std::int64_t>(kTileRows / stream_rows(unit.rows()), kStreamHeads);
      return static_cast<std::int64_t>(last - first) < std::min(together, most) && streams(next) && !unit.listed &&
             next.request == unit.request && Visibility::shared_by_all(p_);
    };
    for (last = first + 1; last < units.size(); ++last) {
      if (!follows(plan_.units[static_cast<std::size_t>(units[last])])) break;
    }
    const std::vector<WorkItem> work = plan_.items(units.subspan(first, streams(unit) ? 1 : last - first));
    for (const WorkItem& item : work)
      items.push_back({item, static_cast<std::int32_t>(streams(unit) ? last - first : 1)});
  }
  return items;
}

void Attention::run_chunk(std::vector<PackGroup>& groups, const std::vector<std::int32_t>& units) {
  // Which tiles to pack: what some row of some head visits.
  struct PackItem {
    PackGroup* group;
    std::int64_t tile;
  };
  std::vector<PackItem> pack;
  std::vector<const PackGroup*> group_of(plan_.units.size(), nullptr);
  std::vector<Tile> tiles;
  for (PackGroup& group : groups) {
    if (group.tiles == 0) continue;
    group.visited.assign(static_cast<std::size_t>(group.tiles), 0);
    group.finite.assign(static_cast<std::size_t>(group.tiles), 1);
    for (const std::int32_t u : group.units) {
      const Unit& unit = plan_.units[static_cast<std::size_t>(u)];
      group_of[static_cast<std::size_t>(u)] = &group;
      const Visibility seen(p_, unit.request, unit.q_head);
      tiles_of(unit, seen, unit.query, unit.query + unit.queries, 0, unit.keys, tiles);
      for (const Tile& tile : tiles) group.visited[static_cast<std::size_t>(tile.index)] = 1;
    }
    for (std::int64_t t = 0; t < group.tiles; ++t) {
      if (group.visited[static_cast<std::size_t>(t)] != 0) pack.push_back({&group, t});
    }
  }

  // Heads whose rows lie side by side are packed side by side.
  std::ranges::stable_sort(pack, {}, &PackItem::tile);

  std::vector<Item> items = make_items(units);
  const ScheduleKind kind = p_.schedule.kind;
  if (kind == ScheduleKind::kTile) std::reverse(items.begin(), items.end());
  // Little work is done sooner by one thread than by waking another.
  constexpr double kWorkPerThread = 1 << 20;  // multiply-adds
  double work = 0.0;
  for (const std::int32_t u : units) {
    const Unit& unit = plan_.units[static_cast<std::size_t>(u)];
    work +=
        static_cast<double>(unit.rows()) * static_cast<double>(unit.keys) * static_cast<double>(p_.k.dim + p_.v.dim);
  }
  const int threads = static_cast<int>(std::clamp(work / kWorkPerThread, 1.0, static_cast<double>(num_threads())));

  // Each phase: workers take items one by one, or (static) every n-th.
  const auto phase = [&](std::int64_t count, bool in_advance, auto&& body) {
    if (count == 0) return;
    const int n = static_cast<int>(std::min<std::int64_t>(count, threads));
    std::atomic<std::int64_t> next{0};
    parallel(n, [&](int id) {
      static thread_local Workspace workspace;
      Scratch s;
      scratch(workspace, s);
      tile_.begin_thread();
      const auto take = [&](std::int64_t last) {
        if (in_advance) return last < 0 ? std::int64_t{id} : last + n;
        return next.fetch_add(1, std::memory_order_relaxed);
      };
      for (std::int64_t i = take(-1); i < count; i = take(i)) body(i, s);
      tile_.end_thread();
    });
  };
  phase(static_cast<std::int64_t>(pack.size()), false, [&](std::int64_t i, Scratch& s) {
    const auto& [group, tile] = pack[static_cast<std::size_t>(i)];
    group->finite[static_cast<std::size_t>(tile)] =
        pack_tile(plan_.units[static_cast<std::size_t>(group->unit)], tile, packed_tile(*group, tile), s);
  });
  // Items by waves that keep so many partial results. The splits of a row tile lie side by side.
  static thread_local Workspace partial_workspace;
  std::vector<Partials> partials;
  partials.reserve(units.size() + items.size());  // items point into it
  std::vector<std::pair<const Partials*, std::int64_t>> merges;
  for (std::size_t first = 0, last; first < items.size(); first = last) {
    partials.clear();
    merges.clear();
    std::size_t floats = 0;
    for (last = first; last < items.size();) {
      const Item& item = items[last];
      const Unit& unit = plan_.units[static_cast<std::size_t>(item.work.unit)];
      const std::int64_t splits = plan_.splits(unit), row = item.work.row_tile * plan_.row_tile,
                         rows = std::min(plan_.row_tile, unit.rows() - row);
      const auto need = static_cast<std::size_t>(splits > 1 ? item.units * splits * rows * (columns_ + 2) : 0);
      if (floats > 0 && (floats + need) * sizeof(float) > kPackBudget) break;
      floats += need;
      const Partials* kept = splits > 1 ? partials.data() + partials.size() : nullptr;
      for (std::int32_t i = 0; kept != nullptr && i < item.units; ++i) {
        partials.push_back({item.work.unit + i, row, nullptr, splits, rows, columns_});
      }
      for (std::int64_t s = 0; s < splits; ++s) items[last++].partials = kept;
    }
    float* at = reinterpret_cast<float*>(partial_workspace.reserve(floats * sizeof(float)));
    for (Partials& part : partials) {
      part.base = at;
      at += part.splits * part.rows * (columns_ + 2);
      for (std::int64_t row = 0; row < part.rows; ++row) merges.emplace_back(&part, row);
    }
    phase(static_cast<std::int64_t>(last - first), kind == ScheduleKind::kStatic, [&](std::int64_t i, Scratch& s) {
      const Item& item = items[first + static_cast<std::size_t>(i)];
      run_item(item, group_of[static_cast<std::size_t>(item.work.unit)], s);
    });
    phase(static_cast<std::int64_t>(merges.size()), false, [&](std::int64_t i, Scratch& s) {
      const auto& [part, row] = merges[static_cast<std::size_t>(i)];
      merge_rows(*part, row, s.o);
    });
  }
  partial_workspace.trim(kPackBudget);
}

std::pair<std::int64_t, std::int64_t> Attention::list_range(const Unit& unit, const Visibility& seen,
                                                            std::int64_t query) const {
  const auto [begin, end] = seen.allowed_keys(query);
  const auto first = std::lower_bound(unit.list.begin(), unit.list.end(), begin);
  const auto last = std::lower_bound(first, unit.list.end(), end);
  return {first - unit.list.begin(), last - unit.list.begin()};
}

void Attention::tiles_of(const Unit& unit, const Visibility& seen, std::int64_t q0, std::int64_t q1, std::int64_t k0,
                         std::int64_t k1, std::vector<Tile>& tiles) const {
  if (!unit.listed) return seen.tiles(q0, q1, k0, k1, kTileKeys, tiles);
  tiles.clear();
  const auto [first_begin, first_end] = list_range(unit, seen, q0);
  const auto [last_begin, last_end] = list_range(unit, seen, q1 - 1);
  k0 = std::max(k0, first_begin);
  k1 = std::min(k1, last_end);
  for (std::int64_t t = k0 / kTileKeys; t * kTileKeys < k1; ++t) {
    const bool full = t * kTileKeys >= last_begin && (t + 1) * kTileKeys <= first_end;
    tiles.push_back({static_cast<std::int32_t>(t), !full});
  }
}

std::uint64_t Attention::bits_of(const Unit& unit, const Visibility& seen, std::int64_t query, std::int64_t k0) const {
  if (!unit.listed) return seen.bits64(query, k0);
  const auto [begin, end] = list_range(unit, seen, query);
  const std::int64_t first = std::clamp<std::int64_t>(begin - k0, 0, 64),
                     last = std::clamp<std::int64_t>(end - k0, 0, 64);
  return first >= last ? 0 : (~std::uint64_t{0} >> (64 - (last - first))) << first;
}

// Where keys [begin, end) of the unit lie, into the scratch's arrays from `at` on. Appends runs of consecutive slots.
void Attention::gather(const Unit& unit, std::int64_t begin, std::int64_t end, std::int64_t at, Scratch& s,
                       std::vector<KeyRun>* runs) const {
  if (unit.listed && p_.k.partition == 0 && p_.v.partition == 0) {  // nothing is asked of runs of single keys
    const std::byte *keys = p_.k.row(0, unit.kv_head, 0), *values = p_.v.row(0, unit.kv_head, 0);
    for (; begin < end; ++begin, ++at) {
      const Place place = this->place(unit, begin);
      s.key_rows[at] = keys + place.page * p_.k.page_stride + place.slot * p_.k.slot_stride;
      s.value_rows[at] = values + place.page * p_.v.page_stride + place.slot * p_.v.slot_stride;
    }
    return;
  }
  while (begin < end) {
    const Place place = this->place(unit, begin);
    std::int64_t count = end - begin;
    if (unit.listed) {
      count = 1;
    } else if (p_.page_size > 0) {
      count = std::min(count, p_.page_size - place.slot);
    }
    const std::byte* key = p_.k.row(place.page, unit.kv_head, place.slot);
    const std::byte* value = p_.v.row(place.page, unit.kv_head, place.slot);
    for (std::int64_t i = 0; i < count; ++i) {
      s.key_rows[at + i] = key + i * p_.k.slot_stride;
      s.value_rows[at + i] = value + i * p_.v.slot_stride;
    }
    if (runs != nullptr) {
      KeyRun* last = runs->empty() ? nullptr : &runs->back();
      if (last != nullptr && last->page == place.page && last->slot + last->count == place.slot) {
        last->count += count;
      } else {
        runs->push_back({at, count, place.page, place.slot});
      }
    }
    begin += count;
    at += count;
  }
}

// The scales of gathered keys [first, first + count) of some heads, [head][kStreamKeys].
void Attention::copy_scales(const Rows& rows, std::int64_t head, std::int64_t heads, std::span<const KeyRun> runs,
                            std::int64_t first, std::int64_t count, float* out) const {
  for (const KeyRun& run : runs_of(runs, first, count)) {
    const std::int64_t begin = std::max(run.first, first), end = std::min(run.first + run.count, first + count);
    for (std::int64_t h = 0; h < heads; ++h) {
      rows.copy_scales(run.page, head + h, run.slot + begin - run.first, end - begin,
                       out + h * kStreamKeys + begin - first);
    }
  }
}

// Begins to fetch them: they lie apart from the rows, a few bytes of each page.
void Attention::fetch_scales(const Rows& rows, std::int64_t head, std::int64_t heads, std::span<const KeyRun> runs,
                             std::int64_t first, std::int64_t count) const {
  if (rows.partition != 1 || rows.scale_group_stride != 1) return;
  for (const KeyRun& run : runs_of(runs, first, count)) {
    const std::int64_t begin = std::max(run.first, first), end = std::min(run.first + run.count, first + count);
    for (std::int64_t h = 0; h < heads; ++h) {
      const float* scales = rows.scales_of(run.page, head + h) + run.slot - run.first;
      for (std::int64_t i = begin; i < end; i += 16) __builtin_prefetch(scales + i);
    }
  }
}

// Returns whether the values are finite.
bool Attention::pack_tile(const Unit& unit, std::int64_t tile, const PackedTile& out, Scratch& s) const {
  const std::int64_t begin = tile * kTileKeys, count = std::min<std::int64_t>(kTileKeys, unit.keys - begin);
  thread_local std::vector<KeyRun> runs;
  runs.clear();
  gather(unit, begin, begin + count, 0, s, &runs);
  if (out.key_scale != nullptr) copy_scales(p_.k, unit.kv_head, 1, runs, 0, count, out.key_scale);
  if (p_.v.partition > 0) copy_scales(p_.v, unit.kv_head, 1, runs, 0, count, s.value_scale);
  tile_.pack_keys({s.key_rows, count, p_.k.dim, p_.k.dtype, nullptr}, formats_.qk, out.keys);
  return tile_.pack_values({s.value_rows, count, p_.v.dim, p_.v.dtype, p_.v.partition > 0 ? s.value_scale : nullptr},
                           formats_.pv, out.values);
}

// An empty softmax state.
void Attention::begin_rows(std::int64_t rows, Scratch& s) const {
  std::fill_n(s.m, rows, -kInfinity);
  std::fill_n(s.l, rows, 0.0f);
  std::memset(s.o, 0, static_cast<std::size_t>(rows * columns_) * sizeof(float));
}

// Queries in the form their kernel reads, and factor and bias of each row.
void Attention::prepare_rows(const Unit& unit, std::int64_t row, std::int64_t rows, bool stream, Scratch& s) const {
  const Request& request = p_.requests[unit.request];
  const std::int64_t dim = p_.q.dim, stream_stride = (dim + 63) / 64 * 64;
  const bool negate = p_.scale < 0.0f;
  const std::byte* sources[kTileRows];
  DType source_type = p_.q.dtype;
  for (std::int64_t r = 0; r < rows; ++r) {
    sources[r] = q_row(unit, row + r);
    const std::int64_t head = unit.head_of(row + r), slot = request.q_first + unit.query_of(row + r);
    float scale = p_.q.scale_of(request.q_page, head, slot);
    if (p_.quantize_q) {
      scale = p_.q_static_scale;
      if (!(scale > 0.0f)) {
        const std::uint32_t bits = quantize_.max_abs_bits(sources[r], p_.q.dtype, nullptr, dim);
        float largest;
        std::memcpy(&largest, &bits, 4);
        scale = largest / 127.0f;
      }
      std::int8_t* out = s.query_int8 + r * stream_stride;
      quantize_.quantize(sources[r], p_.q.dtype, nullptr, dim, scale, out, DType::kInt8);
      sources[r] = reinterpret_cast<const std::byte*>(out);
      source_type = DType::kInt8;
    }
    s.factor[r] = factor_ * scale;
    s.bias[r] = 0.0f;
    // K smoothing: what the keys' mean adds to every score of the row.
    const Place key = unit.keys > 0 ? place(unit, 0) : Place{0, 0};
    if (const float* mean = unit.keys > 0 ? p_.k.mean_of(key.page, unit.kv_head) : nullptr; mean != nullptr) {
      tile_.read_row(sources[r], dim, source_type, s.query_row);
      double dot = 0.0;
      for (std::int64_t i = 0; i < dim; ++i) dot += static_cast<double>(s.query_row[i]) * mean[i];
      s.bias[r] = static_cast<float>(dot * scale * p_.scale * kLog2e);
    }
  }

  if (!stream) {
    for (std::int64_t r = rows; r < kTileRows; ++r) {  // kernels take whole vectors of rows
      s.factor[r] = s.bias[r] = 0.0f;
      s.row_sums[r] = 0;
    }
    tile_.pack_queries({sources, rows, dim, source_type, nullptr}, formats_.qk, negate, s.queries, s.row_sums);
    return;
  }
  const std::int64_t padded = stream_rows(rows);
  std::memset(s.queries, 0, static_cast<std::size_t>(padded * stream_stride * 4));
  for (std::int64_t r = 0; r < padded; ++r) s.row_sums[r] = 0;
  for (std::int64_t r = 0; r < rows; ++r) {
    if (stream_qk_ == Math::kInt8) {
      std::int8_t* out = reinterpret_cast<std::int8_t*>(s.queries) + r * stream_stride;
      const auto* in = reinterpret_cast<const std::int8_t*>(sources[r]);
      for (std::int64_t i = 0; i < dim; ++i) {
        out[i] = static_cast<std::int8_t>(negate ? -in[i] : in[i]);
        s.row_sums[r] += out[i];
      }
    } else if (stream_qk_ == Math::kBFloat16) {
      std::uint16_t* out = reinterpret_cast<std::uint16_t*>(s.queries) + r * stream_stride;
      std::memcpy(out, sources[r], static_cast<std::size_t>(dim) * 2);
      for (std::int64_t i = 0; negate && i < dim; ++i) out[i] = static_cast<std::uint16_t>(out[i] ^ 0x8000u);
    } else {
      float* out = reinterpret_cast<float*>(s.queries) + r * stream_stride;
      tile_.read_row(sources[r], dim, source_type, out);
      for (std::int64_t i = 0; negate && i < dim; ++i) out[i] = -out[i];
    }
  }
}

void Attention::run_item(const Item& item, const PackGroup* group, Scratch& s) const {
  const auto first = static_cast<std::size_t>(item.work.unit);
  const std::span units = std::span(plan_.units).subspan(first, static_cast<std::size_t>(item.units));
  const Unit& unit = units.front();
  const std::int64_t row = item.work.row_tile * plan_.row_tile, rows = std::min(plan_.row_tile, unit.rows() - row);
  const std::int64_t split = plan_.split_size(unit);
  const std::int64_t k0 = item.work.split * split, k1 = std::min(unit.keys, k0 + split);
  if (!streams(unit)) {
    prepare_rows(unit, row, rows, false, s);
    begin_rows(kTileRows, s);
    s.prepared = {};
    if (k0 < k1) run_tiles(unit, row, rows, k0, k1, group, s);
    return finish_rows(unit, row, rows, item.work.split, item.partials, s);
  }
  const std::int64_t stride = stream_rows(rows);
  if (s.prepared.data() != units.data() || s.prepared.size() != units.size()) {  // often another split of the same
    for (std::size_t i = 0; i < units.size(); ++i) {
      Scratch part = rows_from(s, static_cast<std::int64_t>(i) * stride);
      prepare_rows(units[i], 0, rows, true, part);
    }
    s.prepared = units;
  }
  begin_rows(static_cast<std::int64_t>(units.size()) * stride, s);
  if (k0 < k1) run_stream(units, k0, k1, s);
  for (std::size_t i = 0; i < units.size(); ++i) {
    Scratch part = rows_from(s, static_cast<std::int64_t>(i) * stride);
    finish_rows(units[i], 0, rows, item.work.split, item.partials == nullptr ? nullptr : item.partials + i, part);
  }
}

// Writes the rows, or leaves them to be merged.
void Attention::finish_rows(const Unit& unit, std::int64_t row, std::int64_t rows, std::int64_t split,
                            const Partials* partials, Scratch& s) const {
  // Values as they are, not as they are stored: o * scale + l * mean.
  const Place first = unit.keys > 0 ? place(unit, 0) : Place{0, 0};
  const float* mean = unit.keys > 0 ? p_.v.mean_of(first.page, unit.kv_head) : nullptr;
  for (std::int64_t r = 0; r < rows; ++r) {
    float* o = s.o + r * columns_;
    if (partials == nullptr && mean == nullptr) {
      write_row(unit, row + r, o, s.m[r], s.l[r], value_factor_);
      continue;
    }
    if (value_factor_ != 1.0f || mean != nullptr) {
      for (std::int64_t c = 0; c < p_.v.dim; ++c) {
        o[c] = o[c] * value_factor_ + (mean == nullptr || s.l[r] == 0.0f ? 0.0f : s.l[r] * mean[c]);
      }
    }
    if (partials == nullptr) {
      write_row(unit, row + r, o, s.m[r], s.l[r]);
    } else {
      std::memcpy(partials->o(split, r), o, static_cast<std::size_t>(columns_) * sizeof(float));
      *partials->m(split, r) = s.m[r];
      *partials->l(split, r) = s.l[r];
    }
  }
}

void Attention::run_tiles(const Unit& unit, std::int64_t row, std::int64_t rows, std::int64_t k0, std::int64_t k1,
                          const PackGroup* group, Scratch& s) const {
  static thread_local std::vector<Tile> tiles;
  const Visibility seen(p_, unit.request, unit.q_head);
  tiles_of(unit, seen, unit.query_of(row), unit.query_of(row + rows - 1) + 1, k0, k1, tiles);

  RowTile tile;
  tile.rows = rows;
  tile.queries = s.queries;
  tile.words = words_;
  tile.row_sums = s.row_sums;
  tile.factor = s.factor;
  tile.bias = p_.k.mean == nullptr ? nullptr : s.bias;
  tile.softcap = p_.softcap * kLog2e;
  tile.o = s.o;
  tile.columns = columns_;
  tile.m = s.m;
  tile.l = s.l;

  for (std::size_t first = 0; first < tiles.size(); first += kStepTiles) {
    Step step;
    step.tiles = static_cast<int>(std::min<std::size_t>(kStepTiles, tiles.size() - first));
    for (int t = 0; t < step.tiles; ++t) {
      const Tile& visit = tiles[first + static_cast<std::size_t>(t)];
      PackedTile packed;
      if (group != nullptr) {
        packed = packed_tile(*group, visit.index);
        step.finite[t] = group->finite[static_cast<std::size_t>(visit.index)] != 0;
      } else {
        packed = {s.keys + static_cast<std::size_t>(t) * key_bytes_,
                  s.values + static_cast<std::size_t>(t) * value_bytes_,
                  p_.k.partition > 0 ? s.tile_scale + t * kTileKeys : nullptr};
        step.finite[t] = pack_tile(unit, visit.index, packed, s);
      }
      step.keys[t] = packed.keys;
      step.values[t] = packed.values;
      step.key_scale[t] = packed.key_scale;
      step.bits[t] = nullptr;
      if (!visit.masked) continue;
      std::uint64_t* bits = s.bits + t * kTileRows;
      std::int64_t query = unit.query_of(row);
      for (std::int64_t r = 0; r < rows; ++query) {  // the heads of a query see the same
        const std::int64_t end = std::min(rows, (query + 1 - unit.query) * unit.heads - row);
        std::fill(bits + r, bits + end, bits_of(unit, seen, query, visit.index * kTileKeys));
        r = end;
      }
      step.bits[t] = bits;
    }
    tile_.step(tile, step, formats_.qk, formats_.pv, {s.scores, s.probabilities});
  }
}

void Attention::run_stream(std::span<const Unit> units, std::int64_t k0, std::int64_t k1, Scratch& s) const {
  static thread_local std::vector<Tile> tiles;
  static thread_local std::vector<KeyRun> runs;
  runs.clear();
  const Unit& unit = units.front();
  const Visibility seen(p_, unit.request, unit.q_head);
  tiles_of(unit, seen, unit.query, unit.query + unit.queries, k0, k1, tiles);
  const std::int64_t rows = unit.rows();
  const auto heads_at_once = static_cast<std::int64_t>(units.size());

  StreamTile heads[kStreamHeads];
  for (std::size_t i = 0; i < units.size(); ++i) {
    const Scratch part = rows_from(s, static_cast<std::int64_t>(i) * stream_rows(rows));
    heads[i] = {.rows = rows,
                .queries = part.queries,
                .row_sums = part.row_sums,
                .factor = part.factor,
                .bias = p_.k.mean == nullptr ? nullptr : part.bias,
                .softcap = static_cast<float>(p_.softcap) * kLog2e,
                .o = part.o,
                .columns = columns_,
                .m = part.m,
                .l = part.l,
                .scores = part.scores,
                .sums = part.sums,
                .alpha = part.alpha,
                .weight = part.weight};
  }

  // Small pages hold too few rows for the processor to fetch ahead by itself, and so do rows with gaps in between.
  constexpr int kSegmentKeys = 16;
  StreamStep step;
  step.key_head_stride = p_.k.head_stride;
  step.value_head_stride = p_.v.head_stride;
  step.key_dtype = p_.k.dtype;
  step.value_dtype = p_.v.dtype;
  step.dim = p_.k.dim;
  step.dim_v = p_.v.dim;
  step.qk = stream_qk_;
  step.pv = stream_pv_;

  // Steps of the keys gathered so far, and their segments, which end with a page, at a multiple of 4 (a few keys of a
  // page may come with the next one). Scattered rows and small pages: by kSegmentKeys.
  struct StepSegments {
    int count = 0;
    StreamSegment segments[kStreamKeys / kSegmentKeys];
  };
  StepSegments cut[kGatherKeys / kStreamKeys];
  const bool scattered = unit.listed || (p_.page_size > 0 && p_.page_size < kSegmentKeys) ||
                         p_.k.slot_stride != p_.k.dim * static_cast<std::int64_t>(size_of(p_.k.dtype));
  const auto cut_segments = [&](std::int64_t first, int count) {
    StepSegments& step_cut = cut[first / kStreamKeys];
    step_cut.count = 0;
    int start = 0;
    const auto close = [&](int end) {
      step_cut.segments[step_cut.count++] = {start, end - start};
      start = end;
    };
    for (const KeyRun& run : runs) {
      if (scattered) break;
      const auto end = static_cast<int>(std::min<std::int64_t>(run.first + run.count - first, count)) / 4 * 4;
      if (end - start >= kSegmentKeys) close(end);
    }
    while (scattered && count - start >= kSegmentKeys) close(start + kSegmentKeys);
    if (start < count) close(count);
  };

  std::int64_t gathered = 0;
  const auto flush = [&](const std::uint64_t* bits) {
    for (int i = 0; gathered > 0 && i < 4; ++i) {
      s.key_rows[gathered + i] = s.key_rows[gathered - 1];
      s.value_rows[gathered + i] = s.value_rows[gathered - 1];
    }
    const auto keys_of = [&](std::int64_t first) {
      return static_cast<int>(std::min<std::int64_t>(gathered - first, kStreamKeys));
    };
    for (std::int64_t first = 0; first < gathered; first += kStreamKeys) cut_segments(first, keys_of(first));
    for (std::int64_t first = 0; first < gathered; first += kStreamKeys) {
      const StepSegments& step_cut = cut[first / kStreamKeys];
      step.keys = s.key_rows + first;
      step.values = s.value_rows + first;
      step.count = keys_of(first);
      step.segments = step_cut.segments;
      step.num_segments = step_cut.count;
      step.next = first + step.count < gathered ? (&step_cut)[1].segments[0].count : 0;
      step.bits = bits;
      for (const auto& [stored, scales] : {std::pair(&p_.k, s.key_scale), std::pair(&p_.v, s.value_scale)}) {
        if (stored->partition == 0) continue;
        copy_scales(*stored, unit.kv_head, heads_at_once, runs, first, step.count, scales);
        const std::int64_t next = first + step.count;
        if (next < gathered) fetch_scales(*stored, unit.kv_head, heads_at_once, runs, next, keys_of(next));
      }
      step.key_scale = p_.k.partition > 0 ? s.key_scale : nullptr;
      step.value_scale = p_.v.partition > 0 ? s.value_scale : nullptr;
      stream_.step(heads, static_cast<int>(units.size()), step);
    }
    gathered = 0;
    runs.clear();
  };

  if (unit.queries == 1) {  // all rows see the same keys: only those are read
    for (const Tile& visit : tiles) {
      if (gathered + kTileKeys > kGatherKeys) flush(nullptr);
      const std::int64_t begin = visit.index * kTileKeys;
      std::uint64_t bits = visit.masked ? bits_of(unit, seen, unit.query, begin) : ~std::uint64_t{0};
      while (bits != 0) {  // runs of ones
        const int first = std::countr_zero(bits), run = std::countr_one(bits >> first);
        gather(unit, begin + first, begin + first + run, gathered, s, &runs);
        gathered += run;
        bits = first + run == 64 ? 0 : bits >> (first + run) << (first + run);
      }
    }
    return flush(nullptr);
  }
  for (std::size_t first = 0; first < tiles.size(); first += kStepTiles) {
    const std::size_t count = std::min<std::size_t>(kStepTiles, tiles.size() - first);
    const auto visits = std::span(tiles).subspan(first, count);
    const bool masked = std::any_of(visits.begin(), visits.end(), [](const Tile& t) { return t.masked; });
    for (std::size_t t = 0; t < count; ++t) {
      const std::int64_t begin = visits[t].index * kTileKeys, end = std::min(begin + kTileKeys, unit.keys);
      gather(unit, begin, end, gathered, s, &runs);
      gathered += end - begin;  // only the last tile of all is short
      for (std::int64_t r = 0; masked && r < rows; ++r) {
        s.bits[r * kStepTiles + static_cast<std::int64_t>(t)] =
            visits[t].masked ? bits_of(unit, seen, unit.query_of(r), begin) : ~std::uint64_t{0};
      }
    }
    flush(masked ? s.bits : nullptr);
  }
}

// out = factor o / l and lse = m + log l, the sink's share included.
void Attention::write_row(const Unit& unit, std::int64_t row, float* o, float m, float l, float factor) const {
  const Request& request = p_.requests[unit.request];
  const std::int64_t head = unit.head_of(row), slot = request.q_first + unit.query_of(row);
  if (p_.sinks != nullptr) {
    const float sink = p_.sinks[head] * kLog2e;
    const float top = std::max(m, sink);
    if (top > -kInfinity) {
      const float share = std::exp2(m - top);
      factor *= share;
      l = l * share + std::exp2(sink - top);
      m = top;
    }
  }
  if (l == 0.0f) {
    std::fill_n(o, p_.v.dim, 0.0f);
  } else {
    factor /= l;
  }
  tile_.write_row(o, factor, p_.v.dim, p_.out.dtype, p_.out.row(request.q_page, head, slot));
  if (p_.lse != nullptr) {
    const float lse = l == 0.0f ? -kInfinity : (m + std::log2(l)) * kLn2;
    static_cast<float*>(
        p_.lse)[request.q_page * p_.lse_page_stride + head * p_.lse_head_stride + slot * p_.lse_slot_stride] = lse;
  }
}

// Splits in order, whoever computed them.
void Attention::merge_rows(const Partials& partials, std::int64_t row, float* o) const {
  constexpr std::int64_t kAhead = 4;
  const std::int64_t bytes = p_.v.dim * static_cast<std::int64_t>(sizeof(float));
  float m = -kInfinity;
  for (std::int64_t split = 0; split < partials.splits; ++split) m = std::max(m, *partials.m(split, row));
  float l = 0.0f;
  std::fill_n(o, columns_, 0.0f);
  for (std::int64_t split = 0; split < partials.splits; ++split) {
    // What another core has written comes from its caches, as slowly as from memory.
    const auto* later =
        reinterpret_cast<const std::byte*>(partials.o(std::min(split + kAhead, partials.splits - 1), row));
    for (std::int64_t b = 0; b < bytes; b += 64) __builtin_prefetch(later + b);
    const float part_l = *partials.l(split, row);
    if (part_l == 0.0f) continue;  // saw nothing
    const float weight = std::exp2(*partials.m(split, row) - m);
    const float* part = partials.o(split, row);
    l += part_l * weight;
    for (std::int64_t c = 0; c < p_.v.dim; ++c) o[c] += part[c] * weight;
  }
  write_row(plan_.units[static_cast<std::size_t>(partials.unit)], partials.first_row + row, o, m, l);
}

}  // namespace

void attention(const Problem& problem) { Attention(problem).run(); }

}  // namespace heddle::host
