// Log-sum-exp merge of partial attention results over disjoint key sets.
//
//   m = max_p lse_p      lse = m + log sum_p exp(lse_p - m)      out = sum_p exp(lse_p - lse) out_p
//
// Two kernels. merge_few_kernel, for at most 4 parts: a thread takes kMergeFewLoads / parts vectors of the output, and
// all its loads, lse and data, leave at once. merge_kernel, for more parts:
//
// Roles: a row (request, token, head) belongs to `groups` groups of `lanes` threads of one block (config.h). Each group
// reads all lse of the row and reduces them by shuffles, then sums its share of the parts; the groups' sums meet in
// shared memory in a fixed order. Data: each partial is read once, in 16-byte accesses, kMergeUnroll of them in flight
// a thread. Limit: bytes over memory bandwidth; rows x (parts x (dim + 1 lse) + dim + 1 lse).
#pragma once

#include "cuda/common/index.cuh"
#include "cuda/common/online_softmax.cuh"
#include "cuda/common/vec.cuh"
#include "cuda/launch.h"
#include "cuda/sm90/merge/config.h"

namespace heddle::cuda {

struct RowIndex {
  std::int64_t batch, seq, head;

  __device__ __forceinline__ std::int64_t offset(const MergeArgs::Strides& stride) const {
    return batch * stride.batch + seq * stride.seq + head * stride.head;
  }
};

// Heads vary fastest: neighbouring threads then write neighbouring rows of `out`.
__device__ __forceinline__ RowIndex row_index(std::int64_t row, const MergeArgs& args) {
  const std::int64_t token = quotient(row, args.heads), batch = quotient(token, args.seq);
  return {batch, token - batch * args.seq, row - token * args.heads};
}

template <class T, int N>
__global__ void __launch_bounds__(kMergeThreads, kMergeBlocksPerSm)
    merge_kernel(const __grid_constant__ MergeArgs args, const __grid_constant__ MergeShape shape) {
  __shared__ float partial[N][kMergeThreads];

  const int lane = static_cast<int>(threadIdx.x) % shape.lanes;
  const int group = static_cast<int>(threadIdx.x) / shape.lanes % shape.groups;
  const int threads_per_row = shape.lanes * shape.groups;
  const std::int64_t row =
      std::int64_t{blockIdx.x} * shape.rows_per_block + static_cast<int>(threadIdx.x) / threads_per_row;
  // Threads beyond the last row stay for the shuffles and barriers; without parts they neither read nor write.
  const bool active = row < args.batch * args.seq * args.heads;
  const int num_parts = active ? static_cast<int>(args.num_parts) : 0;
  const RowIndex index = row_index(active ? row : 0, args);

  const float* lses = args.lses + index.offset(args.lses_stride);
  SoftmaxState state;
  for (int p = lane; p < num_parts; p += shape.lanes) state.merge({lses[p * args.lses_stride.part], 1.0f});
  state.merge_lanes(shape.lanes);
  const float reference = state.reference();
  const float inverse = state.l == 0.0f ? 0.0f : 1.0f / state.l;
  if (args.lse != nullptr && active && lane == 0 && group == 0) {
    args.lse[index.offset(args.lse_stride)] = state.lse();
  }

  const T* outs = static_cast<const T*>(args.outs) + index.offset(args.outs_stride);
  T* out = static_cast<T*>(args.out) + index.offset(args.out_stride);
  const int row_vectors = static_cast<int>(args.dim / N);
  for (int first = 0; first < row_vectors; first += shape.lanes) {
    const std::int64_t column = std::int64_t{first + lane} * N;
    const bool inside = first + lane < row_vectors;
    float sum[N] = {};
    for (int p = group; p < num_parts; p += kMergeUnroll * shape.groups) {
      // Steps beyond the last part repeat it with no weight: without branches, all loads of a step are in flight
      // together.
      int part[kMergeUnroll];
      float weight[kMergeUnroll];
#pragma unroll
      for (int u = 0; u < kMergeUnroll; ++u) {
        part[u] = min(p + u * shape.groups, num_parts - 1);
        const float lse = lses[part[u] * args.lses_stride.part];
        weight[u] = expf((p + u * shape.groups < num_parts ? lse : -INFINITY) - reference);
      }
      Vec<T, N> x[kMergeUnroll];
#pragma unroll
      for (int u = 0; u < kMergeUnroll; ++u) {
        // A part without weight is not read: what it holds may be anything, and 0 times NaN is NaN.
        x[u] = inside && weight[u] != 0.0f ? Vec<T, N>::load_streaming(outs + part[u] * args.outs_stride.part + column)
                                           : Vec<T, N>::zero();
      }
#pragma unroll
      for (int u = 0; u < kMergeUnroll; ++u) {
#pragma unroll
        for (int i = 0; i < N; ++i) sum[i] += weight[u] * to_float(x[u].elements[i]);
      }
    }

    if (shape.groups > 1) {
#pragma unroll
      for (int i = 0; i < N; ++i) partial[i][threadIdx.x] = sum[i];
      __syncthreads();
      if (group == 0) {
        for (int g = 1; g < shape.groups; ++g) {
#pragma unroll
          for (int i = 0; i < N; ++i) sum[i] += partial[i][threadIdx.x + g * shape.lanes];
        }
      }
      __syncthreads();
    }
    if (active && inside && group == 0) {
#pragma unroll
      for (int i = 0; i < N; ++i) sum[i] *= inverse;
      Vec<T, N>::from_floats(sum).store(out + column);
    }
  }
}

// What divides the number of a vector of the output into its place: columns of a row, heads, tokens.
struct MergeDivisors {
  Divisor vectors, heads, seq;
};

// P: 2 or 4, at least num_parts. There are `total` vectors, fewer than 2^31.
template <class T, int N, int P>
__global__ void __launch_bounds__(kMergeThreads, kMergeFewBlocksPerSm)
    merge_few_kernel(const __grid_constant__ MergeArgs args, const __grid_constant__ MergeDivisors by,
                     std::uint32_t total) {
  constexpr int kVectors = kMergeFewLoads / P;
  const std::uint32_t first = blockIdx.x * (kVectors * kMergeThreads) + threadIdx.x;
  const int num_parts = static_cast<int>(args.num_parts);
  // Its column, in elements; `index` becomes its row.
  const auto place = [&](std::uint32_t i, RowIndex& index) {
    std::uint32_t column = i, row = by.vectors.divide(column), head = row, token = by.heads.divide(head), seq = token;
    index.batch = by.seq.divide(seq);
    index.seq = seq;
    index.head = head;
    return static_cast<std::int64_t>(column) * N;
  };

  Vec<T, N> x[kVectors][P];
  float lse[kVectors][P];
#pragma unroll
  for (int u = 0; u < kVectors; ++u) {
    const std::uint32_t i = first + u * kMergeThreads;
    RowIndex index;
    const std::int64_t column = place(i, index);
    const T* outs = static_cast<const T*>(args.outs) + index.offset(args.outs_stride) + column;
    const float* lses = args.lses + index.offset(args.lses_stride);
#pragma unroll
    for (int p = 0; p < P; ++p) {
      const bool there = i < total && p < num_parts;
      lse[u][p] = there ? lses[p * args.lses_stride.part] : -INFINITY;
      x[u][p] = there ? Vec<T, N>::load_streaming(outs + p * args.outs_stride.part) : Vec<T, N>::zero();
    }
  }
#pragma unroll
  for (int u = 0; u < kVectors; ++u) {
    const std::uint32_t i = first + u * kMergeThreads;
    if (i >= total) return;
    SoftmaxState state;
#pragma unroll
    for (int p = 0; p < P; ++p) state.m = fmaxf(state.m, lse[u][p]);
    const float reference = state.reference();
    float sum[N] = {};
#pragma unroll
    for (int p = 0; p < P; ++p) {
      const float weight = expf(lse[u][p] - reference);
      state.l += weight;
      // What a part without weight holds may be anything, and 0 times NaN is NaN.
      if (weight != 0.0f) {
#pragma unroll
        for (int n = 0; n < N; ++n) sum[n] += weight * to_float(x[u][p].elements[n]);
      }
    }
    const float inverse = state.l == 0.0f ? 0.0f : 1.0f / state.l;
#pragma unroll
    for (int n = 0; n < N; ++n) sum[n] *= inverse;
    RowIndex index;
    const std::int64_t column = place(i, index);
    Vec<T, N>::from_floats(sum).store(static_cast<T*>(args.out) + index.offset(args.out_stride) + column);
    if (args.lse != nullptr && column == 0) args.lse[index.offset(args.lse_stride)] = state.lse();
  }
}

}  // namespace heddle::cuda
