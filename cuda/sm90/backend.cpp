// What the dispatch table calls for Backend::kSm90.
#include <algorithm>
#include <optional>
#include <string>

#include "core/kernels.h"
#include "cuda/common/workspace.h"
#include "cuda/launch.h"
#include "heddle/error.h"

namespace heddle::sm90 {
namespace {

// Windows reach from 0 to any number of keys.
std::int64_t reach(std::optional<std::int64_t> keys) {
  return keys ? std::min(*keys, cuda::DecodeArgs::kUnbounded) : cuda::DecodeArgs::kUnbounded;
}

}  // namespace

bool available() {
  for (int device = 0; device < cuda::device_count(); ++device) {
    if (cuda::compute_capability(device) == 90) return true;
  }
  return false;
}

void merge(const MergeProblem& problem) {
  const auto& [outs, lses, out, lse, stream] = problem;
  cuda::launch_merge({
      .outs = outs.data,
      .lses = lses.as<const float>(),
      .out = out.data,
      .lse = lse.given() ? lse.as<float>() : nullptr,
      .dtype = outs.dtype,
      .num_parts = outs.shape[0],
      .batch = outs.shape[1],
      .seq = outs.shape[2],
      .heads = outs.shape[3],
      .dim = outs.shape[4],
      .outs_stride =
          {.part = outs.strides[0], .batch = outs.strides[1], .seq = outs.strides[2], .head = outs.strides[3]},
      .lses_stride =
          {.part = lses.strides[0], .batch = lses.strides[1], .seq = lses.strides[3], .head = lses.strides[2]},
      .out_stride = {.batch = out.strides[0], .seq = out.strides[1], .head = out.strides[2]},
      .lse_stride = {.batch = lse.strides[0], .seq = lse.strides[2], .head = lse.strides[1]},
      .device = outs.device.index,
      .stream = stream.handle,
  });
}

namespace {

cuda::AttentionArgs attention_args(const Problem& p) {
  const auto rows = [](const Rows& x) {
    const auto bytes = static_cast<std::int64_t>(size_of(x.dtype));
    return cuda::AttentionArgs::Rows{x.data, x.page_stride / bytes, x.head_stride / bytes, x.slot_stride / bytes};
  };
  const auto near = [](std::optional<std::int64_t> keys) {
    return static_cast<std::int32_t>(std::min<std::int64_t>(keys.value_or(cuda::kUnbounded), cuda::kUnbounded));
  };
  const DeviceBatch& lengths = p.on_device;
  cuda::AttentionArgs args{
      .q = rows(p.q),
      .k = rows(p.k),
      .v = rows(p.v),
      .out = rows(p.out),
      .dtype = p.q.dtype,
      .num_q_heads = p.num_q_heads,
      .num_kv_heads = p.num_kv_heads,
      .head_dim = p.q.dim,
      .head_dim_v = p.v.dim,
      .batch = p.batch(),
      .q_len = lengths.size > 0     ? lengths.max_q_len
               : p.requests.empty() ? 0
                                    : p.requests.front().q_len,
      .kv_len = lengths.size > 0     ? lengths.max_kv_len
                : p.requests.empty() ? 0
                                     : p.requests.front().kv_len,
      .cu_seqlens_q = lengths.cu_seqlens_q,
      .cu_seqlens_k = lengths.cu_seqlens_k,
      .seq_lens = lengths.seq_lens,
      .block_table = lengths.block_table,
      .table_stride = lengths.table_stride,
      .page_size = p.page_size,
      .num_pages = lengths.num_pages,
      .lse = static_cast<float*>(p.lse),
      .lse_page = p.lse_page_stride,
      .lse_head = p.lse_head_stride,
      .lse_slot = p.lse_slot_stride,
      .sinks = p.sinks,
      .scale = p.scale,
      .softcap = p.softcap,
      .schedule = p.schedule.kind,
      .device = p.device.index,
      .stream = p.stream.handle,
  };
  if (p.schedule.split_size > 0) {
    throw Error(ErrorCode::kUnsupported, "schedule",
                "split_size " + std::to_string(p.schedule.split_size) +
                    "; allowed for many queries on sm90 is 0: a row tile reads all of its keys");
  }
  cuda::Pattern& pattern = args.pattern;
  pattern.causal = p.causal;
  pattern.left = near(p.window.left);
  pattern.right = near(p.window.right);
  const Selection::Kind& kind = p.selection->kind();
  if (const auto* window = std::get_if<select::WindowGlobal>(&kind)) {
    pattern.kind = cuda::PatternKind::kWindowGlobal;
    pattern.select_left = near(window->window.left);
    pattern.select_right = near(window->window.right);
    pattern.num_global = near(window->n_global);
  } else if (const auto* strided = std::get_if<select::Strided>(&kind)) {
    pattern.kind = cuda::PatternKind::kStrided;
    pattern.width = near(strided->width);
    pattern.stride = near(strided->stride);
  } else if (const auto* blocks = std::get_if<select::BlockMask>(&kind)) {
    const TensorView& mask = blocks->mask;
    const int rank = mask.rank;
    pattern.kind = cuda::PatternKind::kBlockMask;
    pattern.mask = mask.as<const bool>();
    pattern.block_q = near(blocks->block_q);
    pattern.block_k = near(blocks->block_k);
    pattern.mask_rows = near(mask.shape[rank - 2]);
    pattern.mask_cols = near(mask.shape[rank - 1]);
    pattern.mask_row_stride = mask.strides[rank - 2];
    pattern.mask_col_stride = mask.strides[rank - 1];
    if (rank >= 3 && mask.shape[rank - 3] > 1) {
      pattern.heads_per_mask = static_cast<std::int32_t>(p.num_q_heads / mask.shape[rank - 3]);
      pattern.mask_head_stride = mask.strides[rank - 3];
    }
    if (rank == 4 && mask.shape[0] > 1) pattern.mask_batch_stride = mask.strides[0];
  }
  return args;
}

bool is_strided(const Problem& p) { return std::holds_alternative<select::Strided>(p.selection->kind()); }

cuda::DecodeArgs decode_args(const Problem& p) {
  if (p.q.dim != p.v.dim) {
    throw Error(ErrorCode::kUnsupported, "cache",
                "head_dim " + std::to_string(p.q.dim) + " and head_dim_v " + std::to_string(p.v.dim) +
                    "; the sm90 decode kernel takes equal ones");
  }
  if (is_strided(p)) {
    throw Error(
        ErrorCode::kUnsupported, "selection",
        "strided; sm90 decodes it over 16-bit caches of q's dtype with pages of a multiple of 8 tokens, with rows of "
        "q and out at multiples of 16 bytes, without a plan and without a split size");
  }
  const std::int64_t q_bytes = static_cast<std::int64_t>(size_of(p.q.dtype));
  const auto strides = [&](const Rows& rows) {
    return cuda::DecodeArgs::Strides{rows.page_stride / q_bytes, rows.slot_stride / q_bytes,
                                     rows.head_stride / q_bytes};
  };
  cuda::DecodeArgs args{
      .q = p.q.data,
      .out = p.out.data,
      .lse = static_cast<float*>(p.lse),
      .dtype = p.q.dtype,
      .q_stride = strides(p.q),
      .out_stride = strides(p.out),
      .lse_stride = {p.lse_page_stride, p.lse_slot_stride, p.lse_head_stride},
      .batch = p.on_device.size,
      .num_queries = p.on_device.max_q_len,
      .num_q_heads = p.num_q_heads,
      .num_kv_heads = p.num_kv_heads,
      .head_dim = p.q.dim,
      .k = p.k.data,
      .v = p.v.data,
      .cache_dtype = p.k.dtype,
      .k_stride = {p.k.page_stride, p.k.head_stride, p.k.slot_stride},
      .v_stride = {p.v.page_stride, p.v.head_stride, p.v.slot_stride},
      .num_pages = p.on_device.num_pages,
      .page_size = p.page_size,
      .max_kv_len = p.on_device.max_kv_len,
      .table_stride = p.on_device.table_stride,
      .seq_lens = p.on_device.seq_lens,
      .block_table = p.on_device.block_table,
      .k_scale = p.k.scale,
      .v_scale = p.v.scale,
      .partition = p.k.partition,
      .k_scale_page_stride = p.k.scale_page_stride,
      .k_scale_head_stride = p.k.scale_head_stride,
      .k_scale_group_stride = p.k.scale_group_stride,
      .q_scale = p.q_static_scale_on_device,
      .q_static_scale = p.q_static_scale,
      .causal = p.causal,
      .left = reach(p.window.left),
      .right = reach(p.window.right),
      .softcap = p.softcap,
      .scale = p.scale,
      .sinks = p.sinks,
      .schedule = p.schedule,
      .device = p.device.index,
      .stream = p.stream.handle,
  };
  if (const auto* window = std::get_if<select::WindowGlobal>(&p.selection->kind())) {
    args.select_left = reach(window->window.left);
    args.select_right = reach(window->window.right);
    args.num_globals = window->n_global;
  }
  const auto set_list = [&](const TensorView& indices, const TensorView& lengths) {
    args.list = indices.as<const std::int32_t>();
    args.list_size = indices.shape[2];
    args.list_batch_stride = indices.strides[0];
    args.list_head_stride = indices.shape[1] == 1 ? 0 : indices.strides[1];  // 1: all heads alike
    if (lengths.given()) {
      args.list_lengths = lengths.as<const std::int32_t>();
      args.lengths_batch_stride = lengths.strides[0];
      args.lengths_head_stride = lengths.shape[1] == 1 ? 0 : lengths.strides[1];
    }
  };
  if (const auto* tokens = std::get_if<select::Tokens>(&p.selection->kind())) {
    set_list(tokens->indices, tokens->lengths);
  } else if (const auto* pages = std::get_if<select::PageList>(&p.selection->kind())) {
    set_list(pages->indices, pages->lengths);
    args.lists_pages = true;
  }
  return args;
}

// Whether a decode is better off with the kernel for many queries, which reads keys once for 128 rows and more, but
// takes 16-bit caches alone and does not split them. It also has values of another width and strides.
bool is_for_many_rows(const Problem& p) {
  const auto aligned = [](const Rows& x) {
    const auto start = reinterpret_cast<std::uintptr_t>(x.data);
    return ((start | x.page_stride | x.head_stride | x.slot_stride) & 15) == 0 && x.page_stride >= 0 &&
           x.head_stride >= 0 && x.slot_stride >= 0;
  };
  constexpr std::int64_t kManyRows = 128;
  const bool able = p.k.dtype == p.q.dtype && p.page_size % 8 == 0 && p.schedule.split_size == 0 &&
                    !std::holds_alternative<select::Tokens>(p.selection->kind()) &&
                    !std::holds_alternative<select::PageList>(p.selection->kind()) && aligned(p.q) && aligned(p.out);
  const std::int64_t rows = p.on_device.max_q_len * (p.num_q_heads / p.num_kv_heads);
  return able && (rows >= kManyRows || p.q.dim != p.v.dim || is_strided(p));
}

}  // namespace

std::int64_t decode_plan_bytes(const Problem& problem) { return cuda::decode_workspace_bytes(decode_args(problem)); }

void decode_plan(const Problem& problem) {
  cuda::DecodeArgs args = decode_args(problem);
  args.workspace = problem.plan;
  cuda::launch_decode_plan(args);
}

void attention(const Problem& problem) { cuda::launch_attention(attention_args(problem)); }

void decode(const Problem& problem) {
  if (problem.plan == nullptr && is_for_many_rows(problem)) return attention(problem);
  cuda::DecodeArgs args = decode_args(problem);
  if (problem.plan != nullptr) {
    args.workspace = problem.plan;
    cuda::launch_decode(args);
    return;
  }
  cuda::with_workspace("decode", args.device, args.stream, cuda::decode_workspace_bytes(args), [&](void* workspace) {
    args.workspace = workspace;
    cuda::launch_decode_plan(args);
    cuda::launch_decode(args);
  });
}

}  // namespace heddle::sm90
