// Host side of decode: checks what the kernels cannot do, lays out the workspace, picks an instantiation.
#include <algorithm>
#include <string>

#include "core/integers.h"
#include "cuda/common/launch_early.h"
#include "cuda/common/tensor_map.h"
#include "cuda/launch.h"
#include "cuda/sm90/decode/config.h"
#include "cuda/sm90/decode/instances.h"
#include "cuda/sm90/decode/plan.cuh"

namespace heddle::cuda {
namespace {

using decode::Params;

constexpr std::int64_t kMaxCount = std::int64_t{1} << 30;  // counted in 32 bits

[[noreturn]] void unsupported(const char* argument, const std::string& text) {
  throw Error(ErrorCode::kUnsupported, argument, text);
}

int multiprocessors(int device) {
  int count = 0;
  check(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device), "device");
  return count;
}

// Strides of a cache in units of 16 bytes, 32 bits of them.
std::uint32_t in_units(const char* name, std::int64_t bytes, std::int64_t count) {
  if (bytes % 16 != 0 || bytes < 0 || bytes / 16 * std::max<std::int64_t>(count, 1) > std::int64_t{UINT32_MAX} - 1) {
    unsupported("cache", std::string(name) + " lie " + std::to_string(bytes) + " bytes apart, " +
                             std::to_string(count) +
                             " of them; the sm90 decode kernel takes multiples of 16 bytes and at most 64 GiB of keys");
  }
  return static_cast<std::uint32_t>(bytes / 16);
}

int clamp(std::int64_t x) {
  return static_cast<int>(std::min<std::int64_t>(std::max<std::int64_t>(x, 0), decode::kUnbounded));
}

bool aligned(const void* data, const DecodeArgs::Strides& s, std::int64_t element_bytes, std::int64_t bytes) {
  const std::int64_t steps = (s.batch | s.seq | s.head) * element_bytes;
  return reinterpret_cast<std::uintptr_t>(data) % static_cast<std::uintptr_t>(bytes) == 0 && steps % bytes == 0;
}

// Everything but pointers into the workspace.
Params params_of(const DecodeArgs& a) {
  Params p;
  const bool listed = a.list != nullptr;
  p.num_queries = static_cast<int>(a.num_queries);
  p.group = static_cast<int>(a.num_q_heads / a.num_kv_heads);
  p.num_kv_heads = static_cast<int>(a.num_kv_heads);
  const auto tile = decode::row_tile(a.num_queries * p.group, static_cast<int>(a.head_dim));
  p.row_groups = tile.row_groups;
  p.rows_per_tile = tile.rows();
  p.row_tiles = static_cast<int>(ceil_div(p.rows(), p.rows_per_tile));
  p.partial_rows = std::min(p.rows(), p.rows_per_tile);

  p.max_kv_len = clamp(a.max_kv_len);
  p.list_size = clamp(a.list_size);
  p.list_keys = a.lists_pages ? static_cast<std::uint32_t>(a.page_size) : 1;
  p.shape.entries = listed ? a.batch * a.num_kv_heads : a.batch;
  // Two neighbouring heads of a page lie together in memory, which is then read in longer stretches. Not where a
  // request's bits must not depend on the batch.
  const bool paired = !listed && a.schedule.split_size == 0 && p.num_kv_heads % 2 == 0 && p.row_tiles == 1 &&
                      p.rows() <= 8 && a.batch * p.num_kv_heads / 2 >= decode::kMinPairs;
  p.unit_heads = paired ? 2 : 1;
  p.partial_rows *= p.unit_heads;
  p.shape.units_per_entry = listed ? p.row_tiles : p.num_kv_heads / p.unit_heads * p.row_tiles;
  p.by = {.page_size = Divisor(a.page_size),
          .list_keys = Divisor(p.list_keys),
          .units_per_entry = Divisor(p.shape.units_per_entry),
          .row_tiles = Divisor(p.row_tiles),
          .num_kv_heads = Divisor(p.num_kv_heads),
          .group = Divisor(p.group),
          .partition = Divisor(std::max<std::int64_t>(a.partition, 1))};
  p.shape.ctas = multiprocessors(a.device);
  const bool wide = a.cache_dtype == a.dtype;
  p.shape.overhead = (wide ? decode::kOverheadGranules : decode::kNarrowOverheadGranules) / p.unit_heads;
  p.shape.min_share = decode::kMinShareGranules / p.unit_heads;
  p.shape.split_keys = clamp(ceil_div(a.schedule.split_size, decode::kSplitKeys) * decode::kSplitKeys);
  if (p.shape.split_keys == 0) p.shape.min_chunk = (wide ? 1 : 4) * decode::kMinChunkGranules / p.unit_heads;
  p.shape.prepare();
  p.stealing = a.schedule.kind == ScheduleKind::kAuto || a.schedule.kind == ScheduleKind::kStealing;
  const std::int64_t listed_keys = a.list_size * p.list_keys;
  if (p.shape.split_keys > 0) {
    p.max_splits = std::max<std::int64_t>(1, ceil_div(listed ? listed_keys : a.max_kv_len, p.shape.split_keys));
  }
  if (p.shape.entries * p.shape.units_per_entry > kMaxCount || std::max(a.max_kv_len, listed_keys) > kMaxCount) {
    unsupported("q", std::to_string(a.batch) + " requests of " + std::to_string(a.num_kv_heads) +
                         " KV heads and up to " + std::to_string(std::max(a.max_kv_len, listed_keys)) +
                         " keys; the sm90 decode kernel counts at most 2^30 of either");
  }
  return p;
}

// The parts of the workspace, in order; returns its size.
std::int64_t lay_out(Params& p, std::int64_t head_dim, void* workspace) {
  auto* base = static_cast<char*>(workspace);
  std::int64_t at = 0;
  const auto take = [&](auto*& pointer, std::int64_t count) {
    pointer = reinterpret_cast<std::remove_reference_t<decltype(pointer)>>(base + at);
    at += ceil_div(count * static_cast<std::int64_t>(sizeof(*pointer)), 256) * 256;
  };
  const std::int64_t slots = p.shape.split_keys > 0 ? p.units() * p.max_splits : 2 * std::int64_t{p.shape.chunks()};
  take(p.chunks, p.shape.chunks());
  take(p.starts, p.shape.entries + 1);
  take(p.counts, p.shape.entries);
  take(p.arrived, p.units());
  take(p.own, p.shape.ctas);
  take(p.queue, p.shape.ctas + 1);
  take(p.partial_state, slots * p.partial_rows);
  take(p.partial_out, slots * p.partial_rows * head_dim);
  return at;
}

// Boxes of 16 keys of a head.
CUtensorMap map_of(const char* name, const DecodeArgs& a, const void* data, const DecodeArgs::PageStrides& stride) {
  const auto element = static_cast<std::int64_t>(size_of(a.cache_dtype));
  const std::int64_t row = a.head_dim * element, band = decode::band_bytes(static_cast<int>(row)) / element;
  const std::int64_t bands = a.head_dim / band;
  return make_tensor_map(name, data, a.cache_dtype,
                         {{band, 1, band},
                          {a.page_size, stride.slot / element, decode::kSliceKeys},
                          {bands, band, bands},
                          {a.num_kv_heads, stride.head / element, 1},
                          {a.num_pages, stride.page / element, 1}});
}

void set_data(const DecodeArgs& a, Params& p) {
  const std::int64_t q_bytes = 2;
  const auto bytes = [&](const DecodeArgs::Strides& s) {
    return decode::RowStrides{s.batch * q_bytes, s.seq * q_bytes, s.head * q_bytes};
  };
  p.q = static_cast<const char*>(a.q);
  p.out = static_cast<char*>(a.out);
  p.lse = a.lse;
  p.q_stride = bytes(a.q_stride);
  p.out_stride = bytes(a.out_stride);
  p.lse_stride = {a.lse_stride.batch, a.lse_stride.seq, a.lse_stride.head};
  p.wide_out = aligned(a.out, a.out_stride, q_bytes, 8);

  if (reinterpret_cast<std::uintptr_t>(a.k) % 16 != 0 || reinterpret_cast<std::uintptr_t>(a.v) % 16 != 0) {
    unsupported("cache", "keys or values begin at an address that is not a multiple of 16 bytes");
  }
  p.k = static_cast<const char*>(a.k);
  p.v = static_cast<const char*>(a.v);
  p.k_page_stride = in_units("pages of keys", a.k_stride.page, a.num_pages);
  p.k_head_stride = in_units("heads of keys", a.k_stride.head, 1);
  p.k_slot_stride = in_units("keys", a.k_stride.slot, 1);
  p.v_page_stride = in_units("pages of values", a.v_stride.page, a.num_pages);
  p.v_head_stride = in_units("heads of values", a.v_stride.head, 1);
  p.v_slot_stride = in_units("values", a.v_stride.slot, 1);
  p.num_pages = static_cast<std::uint32_t>(a.num_pages);
  // Consecutive rows of a page that make up whole stretches of 256 bytes.
  const std::int64_t row = a.head_dim * static_cast<std::int64_t>(size_of(a.cache_dtype));
  const auto stretches = [&](const void* data, const DecodeArgs::PageStrides& s) {
    return s.slot == row && (a.list == nullptr || a.lists_pages) &&
           (reinterpret_cast<std::uintptr_t>(data) | static_cast<std::uintptr_t>(s.page | s.head)) % 256 == 0 &&
           (a.page_size * row) % 256 == 0;
  };
  p.fetch_ahead = stretches(a.k, a.k_stride) && stretches(a.v, a.v_stride);
  p.whole_slices = (a.list == nullptr || a.lists_pages) && a.page_size % decode::kSliceKeys == 0;
  p.seq_lens = a.seq_lens;
  p.block_table = a.block_table;
  p.table_stride = a.table_stride;

  p.k_scale = a.k_scale;
  p.v_scale = a.v_scale;
  p.q_scale = a.q_scale;
  p.q_static_scale = a.q_static_scale;
  p.partition = static_cast<int>(a.partition);
  p.k_scale_page_stride = a.k_scale_page_stride;
  p.k_scale_head_stride = a.k_scale_head_stride;
  p.k_scale_group_stride = a.k_scale_group_stride;

  p.cap = static_cast<float>(a.softcap) * kLog2E;
  p.score_factor = static_cast<float>(a.softcap > 0.0 ? a.scale / a.softcap : a.scale * double{kLog2E});
  p.sinks = a.sinks;
  p.mask = {.num_queries = p.num_queries,
            .left = clamp(a.left),
            .right = a.causal ? 0 : clamp(a.right),
            .select_left = clamp(a.select_left),
            .select_right = clamp(a.select_right),
            .num_globals = clamp(a.num_globals)};

  p.list = a.list;
  p.list_lengths = a.list_lengths;
  p.list_batch_stride = a.list_batch_stride;
  p.list_head_stride = a.list_head_stride;
  p.lengths_batch_stride = a.lengths_batch_stride;
  p.lengths_head_stride = a.lengths_head_stride;
}

template <class Format>
void launch_format(const DecodeArgs& a, Params& p) {
  const int columns = decode::row_tile(a.num_queries * p.group, static_cast<int>(a.head_dim)).columns;
#define X(dim, cols)                                       \
  if (a.head_dim == dim && columns == cols) {              \
    if (p.whole_slices) {                                  \
      p.k_map = map_of("keys", a, a.k, a.k_stride);        \
      p.v_map = map_of("values", a, a.v, a.v_stride);      \
    }                                                      \
    return decode::launch<Format, dim, cols>(p, a.stream); \
  }
  HEDDLE_DECODE_SHAPES(X)
#undef X
  unsupported("q", "head_dim " + std::to_string(a.head_dim) + "; the sm90 decode kernel has 64, 96, 128, 192 and 256");
}

template <class T>
void launch_type(const DecodeArgs& a, Params& p) {
  if (a.cache_dtype == a.dtype) return launch_format<decode::Native<T>>(a, p);
  if (a.cache_dtype == DType::kInt8) return launch_format<decode::Int8<T>>(a, p);
  if (a.cache_dtype == DType::kFloat8E4M3) return launch_format<decode::Fp8<T>>(a, p);
  unsupported("cache", std::string(to_string(a.cache_dtype)) + " with q of " + std::string(to_string(a.dtype)) +
                           "; the sm90 decode kernel takes caches of q's dtype, int8 and float8_e4m3");
}

bool empty(const DecodeArgs& a) { return a.batch == 0 || a.num_queries == 0 || a.num_q_heads == 0; }

}  // namespace

std::int64_t decode_workspace_bytes(const DecodeArgs& args) {
  if (empty(args)) return 0;
  Params params = params_of(args);
  return lay_out(params, args.head_dim, nullptr);
}

void launch_decode_plan(const DecodeArgs& args) {
  if (empty(args)) return;
  const DeviceScope scope(args.device);
  Params params = params_of(args);
  if (params.shape.ctas > decode::kMaxCtas) unsupported("device", "more multiprocessors than the plan is made for");
  set_data(args, params);
  lay_out(params, args.head_dim, args.workspace);
  // One block alone where the sums lie in the workspace.
  const unsigned blocks = params.shape.entries > decode::kPlanEntries ? 1 : decode::kPlanBlocks;
  launch_early(decode::plan_kernel, blocks, decode::kPlanThreads, 0, args.stream, "decode plan", params);
}

void launch_decode(const DecodeArgs& args) {
  if (empty(args)) return;
  const DeviceScope scope(args.device);
  Params params = params_of(args);
  set_data(args, params);
  lay_out(params, args.head_dim, args.workspace);
  switch (args.dtype) {
    case DType::kBFloat16: return launch_type<__nv_bfloat16>(args, params);
    case DType::kFloat16: return launch_type<__half>(args, params);
    default:
      unsupported("q", std::string(to_string(args.dtype)) + "; the sm90 decode kernel takes bfloat16 and float16");
  }
}

}  // namespace heddle::cuda
