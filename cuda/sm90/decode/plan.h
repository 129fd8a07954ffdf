// The plan of a decode step: which CTA reads which keys. Pure arithmetic, for the device and for tests on the host.
//
// A *unit* is what one CTA reads together: a KV head of a request, or two, with up to 64 query rows. Units stand in a
// line, request by request; each is as long as its visible keys, in granules, plus a fixed overhead. The line is cut
// into chunks of equal length, in places that are multiples of the granule. A chunk is a run of *items*, an item the
// part of a unit that lies in it: one split. So every CTA gets the same number of keys, however skewed the batch is,
// and a unit has at most one split a chunk. Cuts depend on the lengths alone, never on who takes which chunk.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define HEDDLE_HD __host__ __device__ __forceinline__
#else
#define HEDDLE_HD inline
#endif

namespace heddle::cuda::decode {

// For guesses.
HEDDLE_HD float roughly(std::int64_t a, std::int64_t b, std::int64_t divisor) {
#ifdef __CUDA_ARCH__
  return static_cast<float>(a) * __fdividef(static_cast<float>(b), static_cast<float>(divisor));
#else
  return static_cast<float>(a) * (static_cast<float>(b) / static_cast<float>(divisor));
#endif
}

inline constexpr int kGranuleKeys = 16;
inline constexpr int kMinPieceGranules = 4;  // a cut closer than this to an end of a unit moves there
inline constexpr int kUnbounded = 1 << 30;

// Chunks of one CTA's queue: the first, three quarters of its share, is the CTA's own; each of the rest, which may be
// stolen, is half as long as the one before (the last two are equal). So the last ones to start are short, though not
// shorter than min_chunk. Shares below min_share are one chunk: every end of an item costs, and few loads in flight
// keep multiprocessors about equally fast.
inline constexpr int kQueueChunks = 8;
// Shares are whole units if that leaves at most one CTA of so many with nothing to do.
inline constexpr int kMaxIdleShare = 16;
inline constexpr int kMaxCtas = 255;  // see inverse_of

// Which keys of a request some of its queries see: `globals` keys from global_first, then those from `first` to the
// end. They begin and end at multiples of the granule, so a few that nobody sees are among them, and 16 consecutive
// ones from such a multiple on lie in one page, if its size is one too.
struct VisibleKeys {
  int global_first = 0, globals = 0, first = 0, count = 0;

  HEDDLE_HD int key(int i) const { return i < globals ? global_first + i : first + (i - globals); }
};

// Windows around a query's position p: keys p - left to p + right; of these the first num_globals, and those from
// p - select_left to p + select_right.
struct Mask {
  int num_queries = 1;
  int left = kUnbounded, right = kUnbounded, select_left = kUnbounded, select_right = kUnbounded, num_globals = 0;

  HEDDLE_HD bool sees(int position, int key) const {
    return key >= position - left && key <= position + right &&
           (key < num_globals || (key >= position - select_left && key <= position + select_right));
  }
  HEDDLE_HD VisibleKeys visible(int kv_len) const {
    const int position = kv_len - num_queries;  // of the first query, which looks back furthest
    const auto down = [](int key) { return key / kGranuleKeys * kGranuleKeys; };
    const int from = position - left > 0 ? down(position - left) : 0;
    const int selected = position - select_left > from ? down(position - select_left) : from;
    const int end = num_globals < selected ? down(num_globals + kGranuleKeys - 1) : selected;
    VisibleKeys keys;
    keys.global_first = from;
    keys.globals = end > from ? end - from : 0;
    keys.first = selected;
    keys.count = keys.globals + (kv_len > selected ? kv_len - selected : 0);
    return keys;
  }
};

// 2^32 / n, rounded up, for n from 2 to kMaxCtas: x / n = x * inverse_of(n) / 2^32 if x is below 2^24.
HEDDLE_HD std::uint32_t inverse_of(int n) { return 0xffffffffu / static_cast<std::uint32_t>(n) + 1; }
HEDDLE_HD std::uint32_t times_inverse(std::uint32_t x, std::uint32_t inverse) {
  return static_cast<std::uint32_t>(std::uint64_t{x} * inverse >> 32);
}

// Units are numbered entry by entry. Entries are requests, or (request, KV head) where every KV head has its own keys.
struct PlanShape {
  std::int64_t entries = 0;
  int units_per_entry = 1;
  int ctas = 1;
  int min_chunk = 1;   // of those that may be stolen, in granules
  int min_share = 1;   // of a CTA, in granules, to be cut into chunks
  int overhead = 0;    // what starting a unit costs, in granules
  int split_keys = 0;  // > 0: every split of a unit has this many keys, a multiple of a tile
  // Set by prepare().
  std::uint32_t inverse = 0;            // of ctas, see inverse_of
  int whole_units = 0, whole_ctas = 0;  // units a CTA and CTAs, where whole units leave few with nothing to do; or 0

  // What the device would divide for.
  void prepare() {
    inverse = inverse_of(ctas);
    const std::int64_t units = entries * units_per_entry, whole = (units + ctas - 1) / ctas;
    whole_units = whole * ctas - units <= whole * ctas / kMaxIdleShare ? static_cast<int>(whole) : 0;
    whole_ctas = whole_units > 0 ? static_cast<int>((units + whole - 1) / whole) : 0;
  }
  HEDDLE_HD int chunks() const { return ctas * kQueueChunks; }
  HEDDLE_HD int granule() const { return split_keys > 0 ? split_keys : kGranuleKeys; }
  HEDDLE_HD int granules(int keys) const {  // two divisions, so that one is by a constant
    return split_keys > 0 ? (keys + split_keys - 1) / split_keys : (keys + kGranuleKeys - 1) / kGranuleKeys;
  }
  // Length of a unit on the line, never 0.
  HEDDLE_HD int length(int keys) const {
    const int n = granules(keys) + (split_keys > 0 ? 0 : overhead);
    return n > 0 ? n : 1;
  }
};

// A place on the line: key `key` (counted among the visible ones) of a unit. Ordered as the line is.
struct Place {
  std::uint32_t unit = 0, key = 0;

  HEDDLE_HD std::uint64_t order() const { return std::uint64_t{unit} << 32 | key; }
};

// Where a cut falls. Inside a unit (key > 0), which cuts fall into it follows from where they are on the line: those
// behind first_from up to last_to. So a chunk finds the others of its units without looking at their places.
struct CutPlace {
  Place place;
  std::int64_t first_from = 0, last_to = 0;
};

// 32 bytes. first_chunk: where the unit at `begin` starts; last_chunk: where the unit at `end` ends (both this chunk if
// `begin` or `end` lies at the start of a unit).
struct alignas(16) Chunk {
  Place begin, end;
  std::uint16_t first_chunk = 0, last_chunk = 0;
  std::uint16_t index = 0;            // of this chunk
  std::uint16_t per_cta = 1;          // chunks of each CTA's queue: CTA c has those from c * per_cta on
  std::int32_t kv_len = 0, keys = 0;  // of the entry at `begin`
};
static_assert(sizeof(Chunk) == 32);

// How a line of `total` granules is cut: `ctas` shares, each at least a piece, of `per_cta` chunks each.
struct Cut {
  std::int64_t total = 0, share = 0;
  std::uint32_t rest = 0;  // total = share * ctas + rest, unless shares are whole units
  std::uint32_t inverse = 0;
  int ctas = 1, per_cta = 1;

  // unit_length: of every unit, if they all have the same, or 0.
  HEDDLE_HD Cut(const PlanShape& shape, std::int64_t total_, int unit_length)
      : total(total_), inverse(shape.inverse), ctas(shape.ctas) {
    const std::int64_t pieces = shape.split_keys > 0 ? total : total / kMinPieceGranules;
    if (pieces < ctas) {
      ctas = pieces < 1 ? 1 : static_cast<int>(pieces);
      inverse = inverse_of(ctas);
    }
    share = ctas > 1 && total >> 24 == 0 ? times_inverse(static_cast<std::uint32_t>(total), inverse) : total / ctas;
    rest = static_cast<std::uint32_t>(total - share * ctas);
    if (shape.split_keys > 0) return;
    if (share >= shape.min_share) {
      per_cta = 2;
      while (per_cta < kQueueChunks && share >> (per_cta + 1) >= shape.min_chunk) ++per_cta;
    } else if (unit_length > 0 && shape.whole_units > 0 && ctas == shape.ctas) {
      // So that no unit has splits to merge.
      ctas = shape.whole_ctas;
      share = std::int64_t{shape.whole_units} * unit_length;
      rest = 0;
    }
  }

  // Where a chunk begins on the line. Chunks beyond the line are empty.
  HEDDLE_HD std::int64_t start(int chunk) const {
    const int cta = cta_of(chunk);
    return start(cta, chunk - cta * per_cta);
  }
  HEDDLE_HD int cta_of(int chunk) const {
    return per_cta == 1 ? chunk
                        : static_cast<int>(static_cast<std::uint32_t>(chunk) / static_cast<std::uint32_t>(per_cta));
  }
  // Of a CTA's chunk `at`.
  HEDDLE_HD std::int64_t start(int cta, int at) const {
    if (cta >= ctas) return total;
    const std::uint32_t before =
        static_cast<std::uint32_t>(256 * cta + (at == 0 ? 0 : 256 - (128 >> at)));  // in 256ths
    return (share * before + times_inverse(rest * before, inverse)) / 256;          // rest * before is below 2^24
  }
  // The last chunk that begins at or before x, which lies on the line.
  HEDDLE_HD int holding(std::int64_t x) const {
    int cta = static_cast<int>(roughly(x, ctas, total)), at = 0;
    cta = cta < ctas ? cta : ctas - 1;
    while (cta > 0 && start(cta, 0) > x) --cta;
    while (cta + 1 < ctas && start(cta + 1, 0) <= x) ++cta;
    while (at + 1 < per_cta && start(cta, at + 1) <= x) ++at;
    return cta * per_cta + at;
  }
};

// The place at x on the line. starts[e]: where entry e starts, starts[entries] the total; keys_of(e): its keys.
template <class KeysOf>
HEDDLE_HD CutPlace place_at(const PlanShape& shape, const std::int64_t* starts, std::int64_t x, KeysOf keys_of) {
  const auto units = static_cast<std::uint32_t>(shape.units_per_entry);
  std::int64_t low = 0, high = shape.entries;  // the entry with starts[entry] <= x < starts[entry + 1]
  const std::int64_t total = starts[high];
  if (x >= total) return {{static_cast<std::uint32_t>(high) * units, 0}};
  // Near the truth where lengths are alike.
  const auto guess = static_cast<std::int64_t>(roughly(x, high, total));
  if (guess < high) {
    (starts[guess] <= x ? low : high) = guess;
    if (low == guess && starts[guess + 1] > x) high = guess + 1;
  }
  while (high - low > 1) {
    const std::int64_t middle = (low + high) / 2;
    (starts[middle] <= x ? low : high) = middle;
  }
  const int keys = keys_of(low), length = shape.length(keys), granules = shape.granules(keys);
  // 32 bits: an entry has fewer granules than that.
  const auto within = static_cast<std::uint32_t>(x - starts[low]), index = within / static_cast<std::uint32_t>(length);
  const std::uint32_t unit = static_cast<std::uint32_t>(low) * units + index;
  const int at = static_cast<int>(within - index * static_cast<std::uint32_t>(length)),
            piece = shape.split_keys > 0 ? 1 : kMinPieceGranules;
  if (at < piece) return {{unit, 0}};
  if (granules - at < piece) return {{unit + 1, 0}};
  return {{unit, static_cast<std::uint32_t>(at * shape.granule())}, x - at + piece - 1, x - at + granules - piece};
}

// The first chunk of the unit that a cut falls into, and the last; `chunk` where it falls between units.
HEDDLE_HD int first_chunk(const Cut& cut, const CutPlace& at, int chunk) {
  return at.place.key > 0 ? cut.holding(at.first_from) : chunk;
}
HEDDLE_HD int last_chunk(const Cut& cut, const CutPlace& at, int chunk) {
  return at.place.key > 0 ? cut.holding(at.last_to) : chunk;
}

// One item: keys [begin, end) of a unit, split `split` of `num_splits`. Partial results of its unit lie in slots
// slot_of(0), slot_of(1), ...
struct Item {
  std::uint32_t unit = 0;
  int begin = 0, end = 0, split = 0, num_splits = 1;
  std::int64_t slot = 0;  // of split 0, see slot_of
};

HEDDLE_HD std::int64_t slot_of(bool fixed_splits, std::int64_t first, int split) {
  // A chunk has two slots: the even one for a unit that it continues, the odd one for a unit that starts in it.
  return fixed_splits ? first + split : split == 0 ? 2 * first + 1 : 2 * (first + split);
}

// Walks the items of a chunk: while (walk.more(chunk)) { item = walk.next(...); }
struct Walk {
  Place at;

  HEDDLE_HD bool more(const Chunk& chunk) const { return at.order() < chunk.end.order(); }
  // keys: of the unit at `at`; max_splits: of any unit, with fixed splits.
  HEDDLE_HD Item next(const PlanShape& shape, const Chunk& chunk, int keys, std::int64_t max_splits) {
    Item item;
    item.unit = at.unit;
    item.begin = static_cast<int>(at.key);
    item.end = keys;
    if (shape.split_keys > 0) {
      item.split = item.begin / shape.split_keys;
      item.num_splits = keys > 0 ? shape.granules(keys) : 1;
      item.slot = static_cast<std::int64_t>(at.unit) * max_splits;
      if (item.begin + shape.split_keys < keys) item.end = item.begin + shape.split_keys;
    } else {
      const bool ends = at.unit != chunk.end.unit;  // the unit ends in this chunk
      if (!ends) item.end = static_cast<int>(chunk.end.key);
      const int first = item.begin > 0 ? chunk.first_chunk : chunk.index, last = ends ? chunk.index : chunk.last_chunk;
      item.split = chunk.index - first;
      item.num_splits = last - first + 1;
      item.slot = first;
    }
    if (item.end < keys) {
      at.key = static_cast<std::uint32_t>(item.end);
    } else {
      at = {at.unit + 1, 0};
    }
    return item;
  }
};

}  // namespace heddle::cuda::decode
