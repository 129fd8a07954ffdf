// Appending new tokens to a paged cache: quantization, scales, paging, value norms and lengths in one launch.
//
//   int8: x_q = clamp(round-half-even(x / scale), -127, 127)    E4M3: x / scale rounded to nearest even, at most 448
//   scale: static, or max|x| / 127 of a partition of consecutive tokens of one head; norm: |v|_2 before quantization
//
// Roles: block (x, 0) writes keys, block (x, 1) values; a warp takes one (token, head), and for a partition of several
// tokens the warp of its first new token takes them all: if they raise the maximum of a partition that holds tokens
// already, those are rounded again at the larger scale. Data: rows are read once (from L1 a second time where a maximum
// comes first), 4 elements a lane. The bits are those of the host's append. Limit: with few tokens the latency of
// start -> block_table -> page, with many the bytes read and written.
#pragma once

#include <cuda_fp8.h>

#include "cuda/common/index.cuh"
#include "cuda/common/vec.cuh"
#include "cuda/launch.h"
#include "cuda/sm90/append/config.h"

namespace heddle::cuda {

inline constexpr unsigned kAllLanes = 0xffffffffu;
inline constexpr float kLargestInt8 = 127.0f, kLargestE4M3 = 448.0f;

// N contiguous elements of 8 bits.
template <int N>
struct alignas(N) Bytes {
  std::uint8_t elements[N];
};

// Divisors that the host knows, for rows and positions below 2^31, and the partitions of a page.
struct AppendDivisors {
  Divisor heads, tokens, page_size, partition;
  std::int64_t page_partitions = 0;
};

// Where a token lies: request b, its i-th new one, at position `position` of the request; `count` are new in all.
struct TokenPlace {
  std::int64_t batch = -1, index = 0, count = 0, position = 0;
};

// The number of entries of the ascending list cu[0 .. n) that are <= t, less one: who holds token t. The whole warp
// searches, 32 entries a step.
__device__ __forceinline__ std::int64_t request_of(const std::int32_t* cu, std::int64_t n, std::int64_t t, int lane) {
  std::int64_t low = 0, high = n;
  while (high - low > 1) {
    const std::int64_t step = (high - low + kWarp - 1) / kWarp, probe = low + (lane + 1) * step;
    const bool before = probe < high && cu[probe] <= t;
    const int passed = __popc(__ballot_sync(kAllLanes, before));
    low += passed * step;
    high = min(high, low + step);
  }
  return low;
}

__device__ __forceinline__ TokenPlace place_of(const AppendArgs& args, const AppendDivisors& by, std::uint32_t token,
                                               int lane) {
  TokenPlace place;
  if (args.cu_seqlens == nullptr) {
    place.batch = by.tokens.divide(token);
    place.index = token;
    place.count = args.k.tokens;
  } else {
    if (std::int64_t{token} >= args.cu_seqlens[args.batch]) return place;  // nobody's
    place.batch = request_of(args.cu_seqlens, args.batch, token, lane);
    place.index = std::int64_t{token} - args.cu_seqlens[place.batch];
    place.count = args.cu_seqlens[place.batch + 1] - args.cu_seqlens[place.batch];
  }
  place.position = args.start[place.batch] + place.index;
  return place;
}

// Where a position lies: a page as the table has it, -1 if it has none, and a slot of it.
struct CachePlace {
  std::int32_t page = -1;
  std::uint32_t slot = 0;

  __device__ __forceinline__ bool inside(const AppendArgs& args) const { return page >= 0 && page < args.num_pages; }
};

__device__ __forceinline__ CachePlace cache_place(const AppendArgs& args, const AppendDivisors& by, std::int64_t batch,
                                                  std::int64_t position) {
  CachePlace place;
  if (position < 0 || position > INT32_MAX) return place;
  place.slot = static_cast<std::uint32_t>(position);
  const std::int64_t index = by.page_size.divide(place.slot);
  if (index < args.table_pages) place.page = args.block_table[batch * args.table_stride + index];
  return place;
}

template <class T, int N>
__device__ __forceinline__ Vec<T, N> load(const T* from) {
  Vec<T, N> v;
#pragma unroll
  for (int i = 0; i < Vec<T, N>::kAccesses; ++i) {
    v.raw[i] = __ldg(reinterpret_cast<const typename Vec<T, N>::Access*>(from) + i);
  }
  return v;
}

// A row whose first access of every lane is under way before its place in the cache is known; all of it, if it is
// short.
template <class T, int N>
struct Row {
  const T* data;
  std::int64_t dim;
  Vec<T, N> first = Vec<T, N>::zero();

  __device__ __forceinline__ Row(const T* data_, std::int64_t dim_, int lane) : data(data_), dim(dim_) {
    if (lane * N < dim) first = load<T, N>(data + lane * N);
  }
  // Calls fn(d, elements d to d + N) for a lane's share.
  template <class Fn>
  __device__ __forceinline__ void each(int lane, Fn&& fn) const {
    if (lane * N < dim) fn(std::int64_t{lane} * N, first);
#pragma unroll 1
    for (std::int64_t d = (lane + kWarp) * N; d < dim; d += kWarp * N) fn(d, load<T, N>(data + d));
  }
};

__device__ __forceinline__ std::uint32_t magnitude_bits(float x) { return __float_as_uint(x) & 0x7fffffffu; }

// Bits of the largest magnitude of a row, given to all lanes.
template <class T, int N>
__device__ __forceinline__ std::uint32_t row_max_abs(const Row<T, N>& row, int lane) {
  std::uint32_t best = 0;
  row.each(lane, [&](std::int64_t, const Vec<T, N>& x) {
#pragma unroll
    for (int i = 0; i < N; ++i) best = max(best, magnitude_bits(to_float(x.elements[i])));
  });
  return __reduce_max_sync(kAllLanes, best);
}

// One rounding to int8 of a quotient; NaN becomes 127.
__device__ __forceinline__ std::uint8_t round_to_int8(float t) {
  return static_cast<std::uint8_t>(
      static_cast<std::int8_t>(__float2int_rn(fmaxf(fminf(t, kLargestInt8), -kLargestInt8))));
}

// Returns this lane's number of clamped values. 127.5 is a tie that would go to 128; 464 one that goes to 448.
template <class T, int N>
__device__ __forceinline__ int store_quantized(const Row<T, N>& row, float scale, DType dtype, void* out, int lane) {
  const float most = dtype == DType::kInt8 ? 127.5f : 464.0f;
  int clamped = 0;
  row.each(lane, [&](std::int64_t d, const Vec<T, N>& x) {
    Bytes<N> q;
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const float t = scale == 0.0f ? 0.0f : to_float(x.elements[i]) / scale;
      if (dtype == DType::kInt8) {
        clamped += fabsf(t) < most ? 0 : 1;
        q.elements[i] = round_to_int8(t);
      } else {
        clamped += fabsf(t) <= most ? 0 : 1;
        q.elements[i] = __nv_cvt_float_to_fp8(t, __NV_SATFINITE, __NV_E4M3);
      }
    }
    *reinterpret_cast<Bytes<N>*>(static_cast<std::uint8_t*>(out) + d) = q;
  });
  return clamped;
}

template <class To, class T, int N>
__device__ __forceinline__ void store_converted(const Row<T, N>& row, void* out, int lane) {
  row.each(lane, [&](std::int64_t d, const Vec<T, N>& x) {
    float values[N];
#pragma unroll
    for (int i = 0; i < N; ++i) values[i] = to_float(x.elements[i]);
    Vec<To, N>::from_floats(values).store(static_cast<To*>(out) + d);
  });
}

// A row in the cache's format, by `scale` where it has one. Returns this lane's number of clamped values.
template <class T, int N>
__device__ __forceinline__ int store_row(const Row<T, N>& row, DType dtype, float scale, void* pages, std::int64_t to,
                                         int lane) {
  std::uint8_t* const out = static_cast<std::uint8_t*>(pages);
  const std::int64_t at = to * row.dim;
  switch (dtype) {
    case DType::kInt8:
    case DType::kFloat8E4M3: return store_quantized(row, scale, dtype, out + at, lane);
    case DType::kBFloat16: store_converted<__nv_bfloat16>(row, out + at * 2, lane); return 0;
    case DType::kFloat16: store_converted<__half>(row, out + at * 2, lane); return 0;
    default: store_converted<float>(row, out + at * 4, lane); return 0;
  }
}

// |row|_2. The square of a float is exact in float64.
template <class T, int N>
__device__ __forceinline__ float row_norm(const Row<T, N>& row, int lane) {
  double sum = 0.0;
  row.each(lane, [&](std::int64_t, const Vec<T, N>& x) {
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const double value = to_float(x.elements[i]);
      sum += value * value;
    }
  });
  for (int offset = kWarp / 2; offset > 0; offset /= 2) sum += __shfl_xor_sync(kAllLanes, sum, offset);
  return static_cast<float>(sqrt(sum));
}

// The keys of the partition in which this token is the first new one. Returns this lane's number of clamped values.
template <class T, int N>
__device__ __forceinline__ int append_partition(const AppendArgs& args, const AppendDivisors& by,
                                                const TokenPlace& place, std::uint32_t head, const Row<T, N>& first,
                                                int lane) {
  const std::int64_t dim = args.k.dim;
  // A partition lies in one page.
  const CachePlace cached = cache_place(args, by, place.batch, place.position);
  if (!cached.inside(args)) return 0;
  std::uint32_t held = cached.slot;  // tokens that it holds already
  const std::uint32_t index = by.partition.divide(held);
  if (place.index > 0 && held > 0) return 0;
  const std::int64_t n = min(args.partition - held, place.count - place.index);
  const std::int64_t part = cached.page * args.k.heads + head, to = part * args.page_size + cached.slot;

  const auto row = [&](std::int64_t i) { return Row<T, N>(first.data + i * args.k.token_stride, dim, lane); };
  std::uint32_t bits = row_max_abs(first, lane);
  for (std::int64_t i = 1; i < n; ++i) bits = max(bits, row_max_abs(row(i), lane));
  std::int8_t* const pages = static_cast<std::int8_t*>(args.k_pages);
  float* const at = args.k_scale + part * by.page_partitions + index;
  float scale = __uint_as_float(bits) / kLargestInt8;
  if (held > 0) {
    const float before = *at;
    if (scale > before) {
      std::int8_t* const older = pages + (to - held) * dim;
      for (std::int64_t d = lane; d < held * dim; d += kWarp) {
        older[d] = static_cast<std::int8_t>(__float2int_rn(static_cast<float>(older[d]) * before / scale));
      }
    } else {
      scale = before;
    }
  }
  __syncwarp();  // every lane has read the scale
  if (lane == 0) *at = scale;
  int clamped = store_quantized(first, scale, DType::kInt8, pages + to * dim, lane);
  for (std::int64_t i = 1; i < n; ++i) {
    clamped += store_quantized(row(i), scale, DType::kInt8, pages + (to + i) * dim, lane);
  }
  return clamped;
}

// A row of keys (blocks with y = 0) or values, by a warp.
template <class T, int N>
__device__ __forceinline__ void append_row(const AppendArgs& args, const AppendDivisors& by, std::int64_t task,
                                           int lane) {
  const FloatRows& rows = blockIdx.y == 0 ? args.k : args.v;
  if (task >= rows.batch * rows.tokens * rows.heads) return;
  auto head = static_cast<std::uint32_t>(task);
  const std::uint32_t token = by.heads.divide(head);
  // What does not depend on the place comes first, so that all of it travels together.
  const bool packed = args.cu_seqlens != nullptr;
  std::uint32_t in_batch = token;
  const std::uint32_t batch = packed ? 0 : by.tokens.divide(in_batch);
  const Row<T, N> row(static_cast<const T*>(rows.data) + batch * rows.batch_stride + in_batch * rows.token_stride +
                          head * rows.head_stride,
                      rows.dim, lane);
  const float* const scale_at = blockIdx.y == 1 ? args.v_scale : args.partition == 0 ? args.k_scale : nullptr;
  const float scale = scale_at != nullptr ? *scale_at : 0.0f;
  const TokenPlace place = place_of(args, by, token, lane);
  if (place.batch < 0) return;

  int clamped = 0;
  if (blockIdx.y == 0 && args.partition > 0) {
    clamped = append_partition(args, by, place, head, row, lane);
  } else {
    const CachePlace cached = cache_place(args, by, place.batch, place.position);
    const float norm = blockIdx.y == 1 ? row_norm(row, lane) : 0.0f;  // while the page's number is on its way
    if (!cached.inside(args)) return;
    const std::int64_t to = (cached.page * rows.heads + head) * args.page_size + cached.slot;
    if (blockIdx.y == 1 && lane == 0) args.value_norms[to] = norm;
    clamped = store_row(row, args.dtype, scale, blockIdx.y == 0 ? args.k_pages : args.v_pages, to, lane);
  }
  clamped = __reduce_add_sync(kAllLanes, clamped);
  if (clamped > 0 && lane == 0) {
    atomicAdd(reinterpret_cast<unsigned long long*>(args.saturated), static_cast<unsigned long long>(clamped));
  }
}

template <class T, int N>
__global__ void __launch_bounds__(kAppendThreads, 4)
    append_kernel(const __grid_constant__ AppendArgs args, const __grid_constant__ AppendDivisors by) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const std::int64_t thread = std::int64_t{blockIdx.x} * kAppendThreads + threadIdx.x;
  append_row<T, N>(args, by, thread / kWarp, lane);
  // Last, so that no row waits for this start, a trip to memory.
  if (blockIdx.y == 0 && thread < args.batch) {
    const std::int32_t count = args.cu_seqlens == nullptr ? static_cast<std::int32_t>(args.k.tokens)
                                                          : args.cu_seqlens[thread + 1] - args.cu_seqlens[thread];
    args.seq_lens[thread] = args.start[thread] + count;
  }
}

// Calibration: bits of the largest magnitude of all rows.
template <class T, int N>
__global__ void __launch_bounds__(kAppendThreads)
    max_abs_kernel(const __grid_constant__ FloatRows rows, const std::int32_t* token_limit, std::uint32_t* result) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const std::int64_t tokens = token_limit == nullptr ? rows.tokens : min(rows.tokens, std::int64_t{*token_limit});
  const std::int64_t warps = std::int64_t{gridDim.x} * kAppendWarps;
  std::uint32_t best = 0;
  for (std::int64_t task = std::int64_t{blockIdx.x} * kAppendWarps + threadIdx.x / kWarp;
       task < rows.batch * tokens * rows.heads; task += warps) {
    const std::int64_t token = quotient(task, rows.heads), head = task - token * rows.heads;
    const std::int64_t batch = quotient(token, tokens), in_batch = token - batch * tokens;
    const T* const row = static_cast<const T*>(rows.data) + batch * rows.batch_stride + in_batch * rows.token_stride +
                         head * rows.head_stride;
    best = max(best, row_max_abs(Row<T, N>(row, rows.dim, lane), lane));
  }
  if (best > 0 && lane == 0) atomicMax(result, best);
}

}  // namespace heddle::cuda
