// Chooses the instantiation for a call, fills its parameters and launches it.
#include <algorithm>
#include <cmath>
#include <limits>
#include <numbers>
#include <numeric>
#include <string>

#include "core/integers.h"
#include "cuda/common/check.h"
#include "cuda/common/tensor_map.h"
#include "cuda/common/workspace.h"
#include "cuda/sm90/prefill/launch.cuh"
#include "cuda/sm90/prefill/plan.cuh"
#include "cuda/sm90/prefill/variants.h"
#include "cuda/sm90/prefill/worklist.cuh"

namespace heddle::cuda {
namespace {

constexpr int kChunk = 64;  // elements of a row that one copy brings

[[noreturn]] void refuse(ErrorCode code, const char* argument, const std::string& message) {
  throw Error(code, argument, message);
}

struct DeviceFacts {
  int multiprocessors = 0, l2_bytes = 0;
};
DeviceFacts facts_of(int device) {
  DeviceFacts facts;
  check(cudaDeviceGetAttribute(&facts.multiprocessors, cudaDevAttrMultiProcessorCount, device), "device");
  check(cudaDeviceGetAttribute(&facts.l2_bytes, cudaDevAttrL2CacheSize, device), "device");
  return facts;
}

const PrefillVariant& choose(const AttentionArgs& args) {
  for (const PrefillVariant* variant : prefill_variants(args.dtype)) {
    if (variant->dim >= args.head_dim && variant->dim_v >= args.head_dim_v) return *variant;
  }
  refuse(ErrorCode::kUnsupported, "q",
         "head dimensions " + std::to_string(args.head_dim) + " of q and k and " + std::to_string(args.head_dim_v) +
             " of v; allowed on sm90 are multiples of 8 up to 256");
}

// How many query heads of a group share a row tile: all of them, if they see the same keys, and rows are not wasted.
int heads_to_pack(const AttentionArgs& args, int rows) {
  const std::int64_t group = args.num_q_heads / args.num_kv_heads;
  const bool own_masks = args.pattern.kind == PatternKind::kBlockMask && args.pattern.mask_head_stride != 0 &&
                         args.pattern.heads_per_mask < group;
  if (own_masks || group == 1 || group > rows) return 1;
  return rows % group * 16 <= rows ? static_cast<int>(group) : 1;
}

void set_scores(const AttentionArgs& args, PrefillParams& params) {
  if (args.softcap > 0.0) {
    params.score_map = ScoreMap::kSoftcap;
    params.map_factor = static_cast<float>(args.scale / args.softcap);
    params.scale_log2 = static_cast<float>(args.softcap * std::numbers::log2e);
  } else if (args.scale > 0.0) {
    params.scale_log2 = static_cast<float>(args.scale * std::numbers::log2e);
  } else {
    // Maxima are taken before the scale, which has to be positive.
    params.score_map = ScoreMap::kFactor;
    params.map_factor = static_cast<float>(args.scale);
    params.scale_log2 = static_cast<float>(std::numbers::log2e);
  }
}

void set_maps(const AttentionArgs& args, const PrefillVariant& variant, PrefillParams& params) {
  const bool packed = args.cu_seqlens_q != nullptr, paged = args.page_size > 0;
  const std::int64_t pages = packed ? 1 : args.batch;
  const AttentionArgs::Rows& q = args.q;
  params.q_map = make_tensor_map("q", q.data, args.dtype,
                                 {{args.head_dim, 1, kChunk},
                                  {params.packed_heads, q.head, params.packed_heads},
                                  {args.q_len, q.slot, params.schedule.queries_per_tile},
                                  {args.num_q_heads / params.packed_heads, q.head * params.packed_heads, 1},
                                  {pages, q.page, 1}});
  const auto keys = [&](const char* name, const AttentionArgs::Rows& x, std::int64_t dim) {
    // Without keys there may be no memory either, and no copy is made.
    const void* data = x.data != nullptr ? x.data : args.q.data;
    return make_tensor_map(name, data, args.dtype,
                           {{dim, 1, kChunk},
                            {paged ? args.page_size : args.kv_len, x.slot, paged ? params.box_keys : variant.keys},
                            {args.num_kv_heads, x.head, 1},
                            {paged ? args.num_pages : pages, x.page, 1}});
  };
  params.k_map = keys("k", args.k, args.head_dim);
  params.v_map = keys("v", args.v, args.head_dim_v);
  // A warp writes its 16 rows as a box, if they are whole queries of rows that bulk copies reach.
  const AttentionArgs::Rows& out = args.out;
  if (16 % params.packed_heads == 0 && out.slot > 0 && out.head > 0 && out.page >= 0) {
    params.queries_per_store = 16 / params.packed_heads;
    params.out_map = make_tensor_map("out", out.data, args.dtype,
                                     {{args.head_dim_v, 1, kChunk},
                                      {params.packed_heads, out.head, params.packed_heads},
                                      {args.q_len, out.slot, params.queries_per_store},
                                      {args.num_q_heads / params.packed_heads, out.head * params.packed_heads, 1},
                                      {pages, out.page, 1}});
  }
}

void check_args(const AttentionArgs& args) {
  for (const auto& [name, dim] : {std::pair("q", args.head_dim), std::pair("v", args.head_dim_v)}) {
    if (dim % 8 != 0) {
      refuse(ErrorCode::kUnsupported, name,
             "head dimension " + std::to_string(dim) + "; allowed on sm90 are multiples of 8 up to 256");
    }
  }
  const AttentionArgs::Rows& out = args.out;
  if (reinterpret_cast<std::uintptr_t>(out.data) % 16 != 0 || (out.page | out.head | out.slot) % 8 != 0) {
    refuse(ErrorCode::kLayout, "out", "rows that do not begin at multiples of 16 bytes, as sm90 writes them");
  }
  constexpr std::int64_t kMost = kUnbounded - 1;
  if (args.q_len > kMost) {
    refuse(ErrorCode::kUnsupported, "q",
           std::to_string(args.q_len) + " tokens; allowed on sm90 are up to " + std::to_string(kMost));
  }
  if (args.batch > 65535) {
    refuse(ErrorCode::kUnsupported, "q", std::to_string(args.batch) + " requests; allowed on sm90 are up to 65535");
  }
  if (args.page_size > 0 && args.page_size % 8 != 0) {
    refuse(ErrorCode::kUnsupported, "page_size",
           std::to_string(args.page_size) + "; allowed for many queries on sm90 are multiples of 8");
  }
}

}  // namespace

void launch_attention(const AttentionArgs& args) {
  if (args.batch == 0 || args.q_len == 0 || args.num_q_heads == 0) return;
  check_args(args);
  const DeviceScope scope(args.device);
  const auto stream = static_cast<cudaStream_t>(args.stream);
  const PrefillVariant& variant = choose(args);
  if (const std::int64_t most = variant.keys * TileNote::kMaxTiles; args.kv_len > most) {
    refuse(ErrorCode::kUnsupported, "k",
           std::to_string(args.kv_len) + " tokens; allowed on sm90 with head_dim " + std::to_string(args.head_dim) +
               " are up to " + std::to_string(most));
  }
  const DeviceFacts facts = facts_of(args.device);
  const bool packed = args.cu_seqlens_q != nullptr;

  PrefillParams params;
  params.q = args.q;
  params.k = args.k;
  params.v = args.v;
  params.out = args.out;
  params.lse = args.lse;
  params.lse_page = args.lse_page;
  params.lse_head = args.lse_head;
  params.lse_slot = args.lse_slot;
  params.sinks = args.sinks;
  params.batch = static_cast<int>(args.batch);
  params.q_len = static_cast<int>(args.q_len);
  params.kv_len = static_cast<int>(args.kv_len);
  params.head_dim = static_cast<int>(args.head_dim);
  params.head_dim_v = static_cast<int>(args.head_dim_v);
  params.num_q_heads = static_cast<int>(args.num_q_heads);
  params.group = static_cast<int>(args.num_q_heads / args.num_kv_heads);
  params.packed_heads = heads_to_pack(args, variant.rows);
  params.packed_heads_reciprocal = ((1 << 16) + params.packed_heads - 1) / params.packed_heads;
  params.cu_seqlens_q = args.cu_seqlens_q;
  params.cu_seqlens_k = args.cu_seqlens_k;
  params.seq_lens = args.seq_lens;
  params.block_table = args.block_table;
  params.table_stride = args.table_stride;
  params.page_size = static_cast<int>(args.page_size);
  params.box_keys = static_cast<int>(std::gcd(args.page_size, std::int64_t{variant.keys}));
  params.pattern = args.pattern;
  set_scores(args, params);

  PrefillSchedule& schedule = params.schedule;
  schedule.kind = args.schedule == ScheduleKind::kAuto ? ScheduleKind::kStealing : args.schedule;
  schedule.queries_per_tile = variant.rows / params.packed_heads;
  // Row tiles that see differently many keys have to be mixed with those of other heads; where all see the same, one
  // head after the other has the keys of least heads in flight. The cache holds more than this, but keeps it badly.
  const Pattern& pattern = args.pattern;
  const bool uneven = pattern.causal || pattern.right != kUnbounded || pattern.kind != PatternKind::kNone || packed;
  schedule.section_keys =
      uneven ? static_cast<float>(facts.l2_bytes) * 0.33f / static_cast<float>((args.head_dim + args.head_dim_v) * 2)
             : 0.0f;
  const std::int64_t heads = args.num_q_heads / params.packed_heads;
  const std::int64_t row_tiles = ceil_div(args.q_len, schedule.queries_per_tile);
  const std::int64_t most_items = (packed ? row_tiles + args.batch : row_tiles * args.batch) * heads;
  if (most_items > std::numeric_limits<std::int32_t>::max()) {
    refuse(ErrorCode::kUnsupported, "q", std::to_string(most_items) + " row tiles; allowed on sm90 are 2^31 - 1");
  }
  schedule.num_items = static_cast<int>(most_items);
  int grid = static_cast<int>(std::min<std::int64_t>(most_items, facts.multiprocessors));
  if (schedule.kind == ScheduleKind::kTile) grid = static_cast<int>(most_items);

  set_maps(args, variant, params);

  // Workspace: counters of the queues, the plan of a packed batch, the bits of the worklist.
  PrefillWorklist& list = params.worklist;
  const bool needs_bits = args.pattern.kind == PatternKind::kBlockMask || args.pattern.kind == PatternKind::kStrided;
  std::int64_t list_words = 0;
  if (needs_bits) {
    const bool same_lengths = !packed && args.seq_lens == nullptr;
    list.words = static_cast<int>(ceil_div(ceil_div(args.kv_len, variant.keys), 32));
    list.row_tiles = static_cast<int>(row_tiles);
    list.requests = same_lengths && args.pattern.mask_batch_stride == 0 ? 1 : params.batch;
    list.heads = args.pattern.mask_head_stride == 0 ? 1 : static_cast<int>(heads);
    list_words = std::int64_t{list.words} * list.row_tiles * list.requests * list.heads;
  }
  const std::int64_t plan_words = packed ? 2 * args.batch + 2 : 0;
  with_workspace(
      "attention", args.device, args.stream, kZeroedBytes + 4 * plan_words + 8 * list_words + 8, [&](void* at) {
        auto* memory = static_cast<std::byte*>(at);
        schedule.done = reinterpret_cast<std::int32_t*>(memory);
        schedule.taken = schedule.done + 1;
        if (packed) {
          auto* plan = reinterpret_cast<std::int32_t*>(memory + kZeroedBytes);
          prefill_plan_kernel<<<1, kPlanThreads, 0, stream>>>(args.cu_seqlens_q, args.cu_seqlens_k, params.batch,
                                                              schedule.queries_per_tile, static_cast<int>(heads), plan,
                                                              plan + args.batch);
          check(cudaGetLastError(), "attention");
          schedule.order = plan;
          schedule.first_item = plan + args.batch;
        }
        if (needs_bits) {
          list.bits = reinterpret_cast<uint2*>(memory + kZeroedBytes + ceil_div(4 * plan_words, 8) * 8);
          variant.make_worklist(params, stream);
        }
        variant.launch(params, grid, stream);
      });
}

}  // namespace heddle::cuda
