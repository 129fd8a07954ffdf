// The computing warps of the decode kernel: scores, softmax and values of the tiles in the ring, and at the end of an
// item the sum over warps; where a unit has several splits, the CTA that finishes the last of them merges them.
//
// Fragments are named as in common/mma.cuh: g = lane / 4, t = lane % 4. A lane holds scores of keys g and g + 8 of a
// slice for the rows 2t and 2t + 1 of each step of 8 rows, and outputs of the same rows for two features of each block
// of 16.
#pragma once

#include "cuda/common/online_softmax.cuh"
#include "cuda/common/vec.cuh"
#include "cuda/sm90/decode/shared.cuh"

namespace heddle::cuda::decode {

// Of two 16-bit words, those that are wanted; the others become 0.
__device__ __forceinline__ std::uint32_t keep(std::uint32_t x, bool low, bool high) {
  return x & ((low ? 0x0000ffffu : 0u) | (high ? 0xffff0000u : 0u));
}

template <class Config>
class Math {
 public:
  using Format = typename Config::Format;
  using Shared = typename Config::Shared;
  using Stage = typename Config::Stage;
  using Query = typename Format::Query;
  using Product = typename Format::Product;
  static constexpr int kDim = Config::kDim, kColumns = Config::kColumns, kBlocks = Config::kBlocks;
  // Weights are kept as 2^kShift times what they are relative to the maximum: fp16 reaches from 2^-24 to 2^16.
  static constexpr float kShift = std::is_same_v<Product, __half> ? 15.0f : 0.0f;
  static constexpr float kLowest = std::is_same_v<Product, __half> ? -24.0f : -126.0f;  // 2^kLowest is representable
  static constexpr float kTiny = 0x1p-126f;
  static constexpr int kSteps = Format::kInt8 ? kDim / 32 : kDim / 16;  // of the product K Q^T

  __device__ Math(const Params& p, Shared& shared, int warp)
      : p_(p),
        shared_(shared),
        warp_(warp),
        lane_(static_cast<int>(threadIdx.x) % 32),
        tile_slices_(Config::kSlices / p.unit_heads),
        slice_sets_(kMathWarps / (p.row_groups * p.unit_heads)),
        row_base_(warp / slice_sets_ % p.row_groups * 8 * kColumns) {
    if constexpr (Format::kScaled) {
      k_factor_ = (Format::kFp8 ? 256.0f : 1.0f) * p.score_factor * (p.partition == 0 ? __ldg(p.k_scale) : 1.0f);
      v_factor_ = __ldg(p.v_scale) * Format::kValueFactor;
    }
  }

  __device__ void run() {
    int stage = 0, phase = 0, slot = 0, slot_phase = 0;
    while (true) {
      shared_.work_full[slot].wait(slot_phase);
      work_ = shared_.works[slot];
      __syncwarp();
      if (lane_ == 0) shared_.work_empty[slot].arrive();
      if (++slot == kWorks) {
        slot = 0;
        slot_phase ^= 1;
      }
      const Item& item = work_.item;
      if (item.unit == kNoUnit) return;
      start();
      const int all_see_to = min(work_.all_see_to, item.end);
      // Of its head. Found anew for each item: a register that is kept over all of them is one too many.
      const int first_slice = warp_ / slice_sets_ / p_.row_groups * tile_slices_;
      int first =
          warp_ % slice_sets_;  // of the slices of its head, numbered through, this warp takes every slice_sets_-th
      int begin = item.begin;
      do {
        shared_.full[stage].wait(phase);
        const Stage& tile = shared_.stages[stage];
#pragma unroll 1
        for (; first < tile_slices_; first += slice_sets_) {
          const int at = begin + first * kSliceKeys, slice = first_slice + first;
          if (at < item.end) compute(tile, slice, at < work_.all_see_from || at + kSliceKeys > all_see_to);
        }
        first -= tile_slices_;
        __syncwarp();
        if (lane_ == 0) shared_.empty[stage].arrive();
        if (++stage == Config::kStages) {
          stage = 0;
          phase ^= 1;
        }
        begin += tile_slices_ * kSliceKeys;
      } while (begin < item.end);
      finish();
    }
  }

 private:
  __device__ int g() const { return lane_ / 4; }
  __device__ int t() const { return lane_ % 4; }
  // Row 2t + i of step n, in the row tile.
  __device__ int row_of(int n, int i) const { return row_base_ + 8 * n + 2 * t() + i; }

  __device__ int query_of(int row) const { return static_cast<int>(p_.by.group.quotient(static_cast<unsigned>(row))); }

  // -- the start of an item: its queries ------------------------------------------------------------------------------

  __device__ void start() {
    stage_queries();
    const int first_position = work_.kv_len - p_.num_queries;
#pragma unroll
    for (int n = 0; n < kColumns; ++n) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        max_[n][i] = -INFINITY;
        reference_[n][i] = sum_[n][i] = 0.0f;
        position_[n][i] = first_position + query_of(work_.row_tile * p_.rows_per_tile + row_of(n, i));
      }
#pragma unroll
      for (int b = 0; b < kBlocks; ++b) {
#pragma unroll
        for (int i = 0; i < 4; ++i) out_[b][n][i] = 0.0f;
      }
    }
    named_sync(kMathBarrier, kMathThreads);
    // The fragments of Q^T, the right operand of K Q^T: row g of each step.
#pragma unroll
    for (int n = 0; n < kColumns; ++n) {
      const int row = warp_ / slice_sets_ * 8 * kColumns + 8 * n;
      const auto* words = reinterpret_cast<const std::uint32_t*>(shared_.query[row + g()]);
#pragma unroll
      for (int s = 0; s < kSteps; ++s) {
#pragma unroll
        for (int i = 0; i < 2; ++i) query_[n][s][i] = words[8 * s + 4 * i + t()];
      }
      if constexpr (Format::kScaled) {
#pragma unroll
        for (int i = 0; i < 2; ++i) factor_[n][i] = shared_.factor[row + 2 * t() + i];
      }
    }
  }

  // Two neighbouring elements, wherever they lie: of two aligned words if they straddle them.
  __device__ static std::uint32_t load_pair(const char* from) {
    const auto address = reinterpret_cast<std::uintptr_t>(from);
    const auto* words = reinterpret_cast<const std::uint32_t*>(address & ~std::uintptr_t{3});
    const bool straddles = (address & 2) != 0;
    const std::uint32_t low = __ldg(words), high = straddles ? __ldg(words + 1) : 0u;
    return __funnelshift_r(low, high, straddles ? 16 : 0);
  }

  __device__ static float2 to_floats(std::uint32_t pair) {
    if constexpr (std::is_same_v<Query, __half>) {
      return __half22float2(reinterpret_cast<const __half2&>(pair));
    } else {
      return __bfloat1622float2(reinterpret_cast<const __nv_bfloat162&>(pair));
    }
  }

  // Q as operands in shared memory. A warp takes a row at a time; a lane has elements 4 lane to 4 lane + 3 of each 128.
  __device__ void stage_queries() {
    constexpr int kLoads = (kDim + 127) / 128;
#pragma unroll 1
    for (int tile_row = warp_; tile_row < p_.unit_heads * p_.rows_per_tile; tile_row += kMathWarps) {
      const int head_in_unit = tile_row >= p_.rows_per_tile;
      const int row = work_.row_tile * p_.rows_per_tile + tile_row - head_in_unit * p_.rows_per_tile;
      const bool inside = row < p_.rows();
      const int query = inside ? query_of(row) : 0;
      const int head = (work_.head + head_in_unit) * p_.group + (inside ? row - query * p_.group : 0);
      const char* q = p_.q + work_.request * p_.q_stride.batch + query * p_.q_stride.seq + head * p_.q_stride.head;
      std::uint32_t pairs[kLoads][2];
#pragma unroll
      for (int l = 0; l < kLoads; ++l) {
        const int element = 4 * (lane_ + 32 * l);
#pragma unroll
        for (int i = 0; i < 2; ++i) pairs[l][i] = inside && element < kDim ? load_pair(q + 2 * element + 4 * i) : 0u;
      }
      auto* words = reinterpret_cast<std::uint32_t*>(shared_.query[tile_row]);
      if constexpr (!Format::kScaled) {
#pragma unroll
        for (int l = 0; l < kLoads; ++l) {
          const int word = 2 * (lane_ + 32 * l);
          if (2 * word < kDim) *reinterpret_cast<uint2*>(words + word) = make_uint2(pairs[l][0], pairs[l][1]);
        }
      } else {
        float x[kLoads][4], largest = 0.0f;
#pragma unroll
        for (int l = 0; l < kLoads; ++l) {
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            const float2 two = to_floats(pairs[l][i]);
            x[l][2 * i] = two.x;
            x[l][2 * i + 1] = two.y;
            largest = fmaxf(largest, fmaxf(fabsf(two.x), fabsf(two.y)));
          }
        }
#pragma unroll
        for (int lanes = 1; lanes < 32; lanes *= 2) {
          largest = fmaxf(largest, __shfl_xor_sync(kFullWarp, largest, lanes));
        }
        float scale = 1.0f;  // of the row
        if constexpr (Format::kInt8) {
          scale = p_.q_scale != nullptr ? __ldg(p_.q_scale) : p_.q_static_scale;
          if (!(scale > 0.0f)) scale = largest / 127.0f;
        } else {
          // A power of two, so that the row fits fp16 whatever its range: the largest element becomes 1 to 2.
          const int exponent = static_cast<int>(__float_as_uint(largest) >> 23) - 127;
          if (exponent > -127 && exponent < 127) scale = __uint_as_float(static_cast<unsigned>(exponent + 127) << 23);
        }
#pragma unroll
        for (int l = 0; l < kLoads; ++l) {
          const int piece = lane_ + 32 * l;
          if (4 * piece >= kDim) continue;
          if constexpr (Format::kInt8) {
            words[piece] = quantize(x[l][0], scale) | quantize(x[l][1], scale) << 8 | quantize(x[l][2], scale) << 16 |
                           quantize(x[l][3], scale) << 24;
          } else {
            // The odd elements of four, then, for the next product's columns, the even ones: see scores().
            const float inverse = 1.0f / scale;
            const int word = piece / 4 * 8 + piece % 4;
            words[word] = pack<__half>(x[l][1] * inverse, x[l][3] * inverse);
            words[word + 4] = pack<__half>(x[l][0] * inverse, x[l][2] * inverse);
          }
        }
        if (lane_ == 0) {
          shared_.factor[tile_row] = scale * k_factor_;
        }
      }
    }
  }

  __device__ static std::uint32_t quantize(float x, float scale) {
    const float steps = scale > 0.0f ? rintf(x / scale) : 0.0f;
    return static_cast<std::uint32_t>(static_cast<int>(fminf(fmaxf(steps, -127.0f), 127.0f))) & 0xffu;
  }

  __device__ float factor(int n, int i) const {
    if constexpr (Format::kScaled) return factor_[n][i];
    return p_.score_factor;
  }

  // -- one slice of 16 keys -------------------------------------------------------------------------------------------

  __device__ void compute(const Stage& tile, int slice, bool masked) {
    float x[kColumns][4];
    scores(tile, slice, x);
    if (p_.cap > 0.0f) {
#pragma unroll
      for (int n = 0; n < kColumns; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i)
          x[n][i] = p_.cap * (1.0f - __fdividef(2.0f, exp2_approx(2.0f * kLog2E * x[n][i]) + 1.0f));
      }
    }
    if (masked) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int key = tile.keys[slice * kSliceKeys + g() + i / 2 * 8];
#pragma unroll
        for (int n = 0; n < kColumns; ++n) {
          if (key == kNoKey || !p_.mask.sees(position_[n][i % 2], key)) x[n][i] = -INFINITY;
        }
      }
    }

    bool grew = false;
#pragma unroll
    for (int n = 0; n < kColumns; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) grew |= x[n][i] > max_[n][i % 2];
    }
    if (__any_sync(kFullWarp, grew)) raise(x);

    std::uint32_t p[kColumns][2];
#pragma unroll
    for (int n = 0; n < kColumns; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        // What is seen has a weight above 0: 0 times an infinite value would be NaN.
        const float weight = exp2_approx(max_or_nan(x[n][i] - reference_[n][i % 2], kLowest));
        x[n][i] = masked && x[n][i] == -INFINITY ? 0.0f : weight;
        sum_[n][i % 2] += x[n][i];
      }
      // From rows of keys to columns of keys: the right operand of V^T P^T.
      p[n][0] = transpose_matrix(pack<Product>(x[n][0], x[n][1]));
      p[n][1] = transpose_matrix(pack<Product>(x[n][2], x[n][3]));
    }
    if (!values(tile, slice, p, masked)) values_by_query(tile, slice, p);
  }

  // Products in log2 units (or the argument of softcap's tanh).
  __device__ void scores(const Stage& tile, int slice, float (&x)[kColumns][4]) const {
    // Rows 0 to 15 of 16 bytes, then the 16 bytes beside them.
    const std::uint32_t at = shared_address(tile.k[slice]) + Config::row_offset(lane_ % 16, lane_ / 16);
    if constexpr (Format::kInt8) {
      int c[kColumns][4] = {};
#pragma unroll
      for (int s = 0; s < kSteps; ++s) {
        std::uint32_t a[4];
        load_matrices(a, Config::step_from(at, s));
#pragma unroll
        for (int n = 0; n < kColumns; ++n) mma_int8(c[n], a, query_[n][s][0], query_[n][s][1]);
      }
#pragma unroll
      for (int n = 0; n < kColumns; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) x[n][i] = static_cast<float>(c[n][i]) * factor(n, i % 2);
      }
    } else {
      // Two sums, so that fewer products wait for each other.
      float c[2][kColumns][4] = {};
#pragma unroll
      for (int s = 0; s < kSteps; s += Format::kFp8 ? 2 : 1) {
        std::uint32_t a[4];
        load_matrices(a, Config::step_from(at, Format::kFp8 ? s / 2 : s));
        if constexpr (Format::kFp8) {
          const std::uint32_t a0[4] = {Format::template halves<true>(a[0]), Format::template halves<true>(a[1]),
                                       Format::template halves<false>(a[0]), Format::template halves<false>(a[1])};
          const std::uint32_t a1[4] = {Format::template halves<true>(a[2]), Format::template halves<true>(a[3]),
                                       Format::template halves<false>(a[2]), Format::template halves<false>(a[3])};
#pragma unroll
          for (int n = 0; n < kColumns; ++n) {
            mma<Product>(c[0][n], a0, query_[n][s][0], query_[n][s][1]);
            mma<Product>(c[1][n], a1, query_[n][s + 1][0], query_[n][s + 1][1]);
          }
        } else {
#pragma unroll
          for (int n = 0; n < kColumns; ++n) mma<Product>(c[s % 2][n], a, query_[n][s][0], query_[n][s][1]);
        }
      }
#pragma unroll
      for (int n = 0; n < kColumns; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) x[n][i] = (c[0][n][i] + c[1][n][i]) * factor(n, i % 2);
      }
    }
    if (Format::kScaled && p_.partition > 0) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float scale = tile.k_scale[slice * kSliceKeys + g() + i / 2 * 8];
#pragma unroll
        for (int n = 0; n < kColumns; ++n) x[n][i] *= scale;
      }
    }
  }

  // A score is larger than the maximum so far: raises it and scales down what was summed.
  __device__ void raise(const float (&x)[kColumns][4]) {
#pragma unroll
    for (int n = 0; n < kColumns; ++n) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        float largest = fmaxf(x[n][i], x[n][i + 2]);
#pragma unroll
        for (int lanes = 4; lanes < 32; lanes *= 2) {
          largest = fmaxf(largest, __shfl_xor_sync(kFullWarp, largest, lanes));
        }
        largest = fmaxf(largest, max_[n][i]);
        const float finite = largest == -INFINITY ? 0.0f : largest;
        reference_[n][i] = finite - kShift;
        const float correction = weight_of(max_[n][i], finite);
        max_[n][i] = largest;
        sum_[n][i] *= correction;
#pragma unroll
        for (int b = 0; b < kBlocks; ++b) {
          out_[b][n][i] *= correction;
          out_[b][n][i + 2] *= correction;
        }
      }
    }
  }

  // The fragments of V^T for two blocks of 16 features (one if elements have 16 bits). Of 8-bit elements, rows g and
  // g + 8 of a block are the features 2g and 2g + 1.
  static constexpr int kLoadBlocks = Format::kBytes == 1 ? 2 : 1;
  __device__ void load_values(const Stage& tile, int slice, int load, std::uint32_t (&a)[kLoadBlocks][4]) const {
    // Keys 0 to 7: 16 bytes and the 16 beside them; then keys 8 to 15.
    const int key = lane_ % 8 + lane_ / 16 * 8;
    const std::uint32_t at =
        Config::step_from(shared_address(tile.v[slice]) + Config::row_offset(key, lane_ / 8 % 2), load);
    if constexpr (Format::kBytes == 2) {
      load_matrices_transposed(a[0], at);
    } else {
      std::uint32_t x[4];
      load_matrices_transposed(x, at);
#pragma unroll
      for (int b = 0; b < 2; ++b) {
        a[b][0] = Format::template halves<false>(x[b]);
        a[b][1] = Format::template halves<true>(x[b]);
        a[b][2] = Format::template halves<false>(x[b + 2]);
        a[b][3] = Format::template halves<true>(x[b + 2]);
      }
    }
  }

  // Adds P V. False, and nothing added, if some keys are masked and a value is not finite: 0 times it would be NaN.
  __device__ bool values(const Stage& tile, int slice, const std::uint32_t (&p)[kColumns][2], bool masked) {
    if constexpr (Format::kBytes == 2) {
      if (masked) {
        bool special = false;
#pragma unroll
        for (int b = 0; b < kBlocks; ++b) {
          std::uint32_t a[1][4];
          load_values(tile, slice, b, a);
#pragma unroll
          for (int i = 0; i < 4; ++i) special |= any_not_finite<Product>(a[0][i]);
        }
        if (__any_sync(kFullWarp, special)) return false;
      }
    }
#pragma unroll
    for (int load = 0; load < kBlocks / kLoadBlocks; ++load) {
      std::uint32_t a[kLoadBlocks][4];
      load_values(tile, slice, load, a);
#pragma unroll
      for (int b = 0; b < kLoadBlocks; ++b) {
#pragma unroll
        for (int n = 0; n < kColumns; ++n) mma<Product>(out_[load * kLoadBlocks + b][n], a[b], p[n][0], p[n][1]);
      }
    }
    return true;
  }

  // The same query by query, each with the values of the keys that it sees and zeros for the others.
  __device__ void values_by_query(const Stage& tile, int slice, const std::uint32_t (&p)[kColumns][2]) {
    if constexpr (Format::kBytes == 2) {
      const int first = work_.kv_len - p_.num_queries;
      const int* keys = tile.keys + slice * kSliceKeys + 2 * t();
      int queries[kColumns];  // of row g of a step
#pragma unroll
      for (int n = 0; n < kColumns; ++n) {
        queries[n] = query_of(work_.row_tile * p_.rows_per_tile + row_base_ + 8 * n + g());
      }
#pragma unroll 1
      for (int query = 0; query < p_.num_queries; ++query) {
        bool seen[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int key = keys[i % 2 + i / 2 * 8];
          seen[i] = key != kNoKey && p_.mask.sees(first + query, key);
        }
        std::uint32_t own[kColumns][2];
#pragma unroll
        for (int n = 0; n < kColumns; ++n) {
#pragma unroll
          for (int i = 0; i < 2; ++i) own[n][i] = queries[n] == query ? p[n][i] : 0u;
        }
#pragma unroll
        for (int b = 0; b < kBlocks; ++b) {
          std::uint32_t a[1][4];
          load_values(tile, slice, b, a);
#pragma unroll
          for (int i = 0; i < 4; ++i) a[0][i] = keep(a[0][i], seen[i / 2 * 2], seen[i / 2 * 2 + 1]);
          // Rows of other queries have weight 0, which a NaN that this query sees would still spoil: add only own rows.
#pragma unroll
          for (int n = 0; n < kColumns; ++n) {
            float c[4] = {};
            mma<Product>(c, a[0], own[n][0], own[n][1]);
#pragma unroll
            for (int i = 0; i < 4; ++i) {
              if (position_[n][i % 2] == first + query) out_[b][n][i] += c[i];
            }
          }
        }
      }
    }
  }

  // -- the end of an item ---------------------------------------------------------------------------------------------

  // Weighted values of four features of a row, relative to 2^max, and the sum of the weights.
  struct Sum {
    float max, sum;
    float4 x;

    __device__ void scale(float factor) {
      sum *= factor;
      x = {x.x * factor, x.y * factor, x.z * factor, x.w * factor};
    }
    __device__ void add(float weight, float other_sum, const float4& y) {
      sum += weight * other_sum;
      x = {x.x + weight * y.x, x.y + weight * y.y, x.z + weight * y.z, x.w + weight * y.w};
    }
  };

  // The item's rows: those of its first head, then those of the second.
  struct Rows {
    int first, of_head;  // the first among those of a head, and how many of it
    __device__ int head_of(int row) const { return row >= of_head; }
    __device__ int within(int row) const { return row >= of_head ? row - of_head : row; }
  };

  // Four features of a row, and at the first of them the logarithm of the weights' sum.
  __device__ void write(const Rows& rows, int item_row, int feature, const Sum& all) const {
    const int row = rows.first + rows.within(item_row), request = work_.request, query = query_of(row);
    const int head = (work_.head + rows.head_of(item_row)) * p_.group + row - query * p_.group;
    const float sink = p_.sinks != nullptr ? __ldg(p_.sinks + head) * kLog2E : -INFINITY;
    const float largest = fmaxf(all.max, sink), reference = largest == -INFINITY ? 0.0f : largest;
    const float correction = weight_of(all.max, reference);
    const float sum = all.sum * correction + exp2_approx(sink - reference);
    float factor = sum == 0.0f ? 0.0f : __fdividef(correction, sum);
    if constexpr (Format::kScaled) factor *= v_factor_;
    char* out = p_.out + request * p_.out_stride.batch + query * p_.out_stride.seq + head * p_.out_stride.head;
    auto* to = reinterpret_cast<Query*>(out) + feature;
    Vec<Query, 4> y;
    y.elements[0] = from_float<Query>(all.x.x * factor);
    y.elements[1] = from_float<Query>(all.x.y * factor);
    y.elements[2] = from_float<Query>(all.x.z * factor);
    y.elements[3] = from_float<Query>(all.x.w * factor);
    if (p_.wide_out) {
      y.store(to);
    } else {
#pragma unroll
      for (int i = 0; i < 4; ++i) to[i] = y.elements[i];
    }
    if (feature == 0 && p_.lse != nullptr) {
      p_.lse[request * p_.lse_stride.batch + query * p_.lse_stride.seq + head * p_.lse_stride.head] =
          sum == 0.0f ? -INFINITY : (reference + __log2f(sum)) * kLn2;
    }
  }

  // Sums over warps, in pieces of four features.
  __device__ void finish() {
    const Item& item = work_.item;
    constexpr int kPieces = 4 * Config::kRoundBlocks;  // of a row in a round
    constexpr int kRounds = kBlocks / Config::kRoundBlocks;
    const int thread = warp_ * 32 + lane_, slots = warp_ * 8 * kColumns;
    const int first_row = work_.row_tile * p_.rows_per_tile;
    const Rows rows{first_row, min(p_.rows_per_tile, p_.rows() - first_row)};
#pragma unroll
    for (int n = 0; n < kColumns; ++n) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        float sum = sum_[n][i];
#pragma unroll
        for (int lanes = 4; lanes < 32; lanes *= 2) sum += __shfl_xor_sync(kFullWarp, sum, lanes);
        if (g() == 0) {
          shared_.max[slots + 8 * n + 2 * t() + i] = max_[n][i] - kShift;
          shared_.sum[slots + 8 * n + 2 * t() + i] = sum;
        }
      }
    }
#pragma unroll
    for (int round = 0; round < kRounds; ++round) {
      if (round > 0) named_sync(kMathBarrier, kMathThreads);  // the round before has been read
#pragma unroll
      for (int b = 0; b < Config::kRoundBlocks; ++b) {
#pragma unroll
        for (int n = 0; n < kColumns; ++n) {
          const float (&c)[4] = out_[round * Config::kRoundBlocks + b][n];
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            float* to = shared_.exchange[slots + 8 * n + 2 * t() + i] + 16 * b;
            if constexpr (Format::kBytes == 2) {
              to[g()] = c[i];
              to[g() + 8] = c[i + 2];
            } else {
              *reinterpret_cast<float2*>(to + 2 * g()) = make_float2(c[i], c[i + 2]);
            }
          }
        }
      }
      named_sync(kMathBarrier, kMathThreads);
#pragma unroll 1
      for (int piece = thread; piece < p_.unit_heads * rows.of_head * kPieces; piece += kMathThreads) {
        const int row = piece / kPieces, column = piece % kPieces * 4;
        const int feature = 16 * Config::kRoundBlocks * round + column;
        const Sum sum = sum_warps(rows.head_of(row) * p_.rows_per_tile + rows.within(row), column);
        if (item.num_splits == 1) {
          write(rows, row, feature, sum);
        } else {
          const std::int64_t at = slot_of(p_.shape.split_keys > 0, item.slot, item.split) * p_.partial_rows + row;
          __stcg(reinterpret_cast<float4*>(p_.partial_out + at * kDim + feature), sum.x);
          if (feature == 0) __stcg(p_.partial_state + at, make_float2(sum.max, sum.sum));
        }
      }
    }
    if (item.num_splits == 1) return;
    named_sync(kMathBarrier, kMathThreads);
    if (thread == 0) {
      // Releases what all these warps wrote (the barrier ordered it before), and acquires what the others released.
      unsigned* arrived = p_.arrived + item.unit;
      const bool last = add_acquire_release(arrived) + 1 == static_cast<unsigned>(item.num_splits);
      if (last) *arrived = 0;  // for the next launch
      shared_.is_last = last;
    }
    named_sync(kMathBarrier, kMathThreads);
    if (shared_.is_last != 0) merge(rows);
  }

  // Over the warps that share a row of the tile, whose rows of the exchange lie `slice_sets_` after each other.
  __device__ Sum sum_warps(int row, int column) const {
    const int first = row / (8 * kColumns) * slice_sets_ * 8 * kColumns + row % (8 * kColumns);
    Sum all{-INFINITY, 0.0f, {}};
#pragma unroll
    for (int s = 0; s < kMathWarps; ++s) {
      if (s < slice_sets_) all.max = fmaxf(all.max, shared_.max[first + s * 8 * kColumns]);
    }
#pragma unroll
    for (int s = 0; s < kMathWarps; ++s) {
      if (s >= slice_sets_) break;
      const int at = first + s * 8 * kColumns;
      all.add(weight_of(shared_.max[at], all.max), shared_.sum[at],
              *reinterpret_cast<const float4*>(shared_.exchange[at] + column));
    }
    return all;
  }

  // Merges the splits of a unit in their order: up to 8 neighbouring lanes share a piece, of which each takes a stretch
  // of the splits.
  __device__ void merge(const Rows& rows) const {
    constexpr int kPieces = kDim / 4;  // of a row
    const int thread = warp_ * 32 + lane_, pieces = p_.unit_heads * rows.of_head * kPieces;
    int shift = 0;  // log2 of how many share
    while (shift < 3 && (2 * pieces << shift) <= kMathThreads) ++shift;
    const int sharers = 1 << shift, sharer = thread & (sharers - 1), first_piece = thread >> shift;
    const int stretch = (work_.item.num_splits + sharers - 1) >> shift, first = sharer * stretch;
#pragma unroll 1
    for (int piece = first_piece; piece - first_piece < pieces; piece += kMathThreads >> shift) {
      const int row = min(piece, pieces - 1) / kPieces, feature = piece % kPieces * 4;
      Sum all = sum_splits(first, min(first + stretch, work_.item.num_splits), row, feature);
#pragma unroll 1
      for (int lanes = 1; lanes < sharers; lanes *= 2) {
        const auto other = [&](float x) { return __shfl_xor_sync(kFullWarp, x, lanes); };
        const Sum theirs{
            other(all.max), other(all.sum), {other(all.x.x), other(all.x.y), other(all.x.z), other(all.x.w)}};
        const float largest = fmaxf(all.max, theirs.max);
        all.scale(weight_of(all.max, largest));
        all.max = largest;
        all.add(weight_of(theirs.max, largest), theirs.sum, theirs.x);
      }
      if (sharer == 0 && piece < pieces) write(rows, row, feature, all);
    }
  }

  // All loads of a step are in flight together; splits beyond the last have no weight.
  __device__ Sum sum_splits(int begin, int end, int row, int feature) const {
    constexpr int kStep = kColumns == 1 ? 12 : 4;
    Sum all{-INFINITY, 0.0f, {}};
    // Rows of the next splits from the first one's on: slot_of with fewer instructions.
    const bool fixed = p_.shape.split_keys > 0;
    const std::int64_t at = slot_of(fixed, work_.item.slot, begin) * p_.partial_rows + row;
    const float2* states = p_.partial_state + at;
    const float* outs = p_.partial_out + at * kDim + feature;
    const int stride = (fixed ? 1 : 2) * p_.partial_rows, skew = !fixed && begin == 0 ? p_.partial_rows : 0;
#pragma unroll 1
    for (int first = begin; first < end; first += kStep) {
      float4 x[kStep];
      float2 state[kStep];
#pragma unroll
      for (int u = 0; u < kStep; ++u) {
        const int n = first + u - begin, rows = n * stride - (n > 0 ? skew : 0);
        state[u] = make_float2(-INFINITY, 0.0f);
        x[u] = {};
        if (first + u < end) {
          state[u] = __ldcg(states + rows);
          x[u] = __ldcg(reinterpret_cast<const float4*>(outs + std::int64_t{rows} * kDim));
        }
      }
      float largest = all.max;
#pragma unroll
      for (int u = 0; u < kStep; ++u) largest = fmaxf(largest, state[u].x);
      all.scale(weight_of(all.max, largest));
      all.max = largest;
#pragma unroll
      for (int u = 0; u < kStep; ++u) {
        all.add(weight_of(state[u].x, largest), state[u].y, x[u]);
      }
    }
    return all;
  }

  __device__ static unsigned add_acquire_release(unsigned* counter) {
    unsigned before;
    asm volatile("atom.add.acq_rel.gpu.global.u32 %0, [%1], 1;" : "=r"(before) : "l"(counter) : "memory");
    return before;
  }

  // Of sums that are relative to 2^max, when they become relative to 2^largest. Above 0 if something was summed: what
  // is infinite stays so.
  __device__ static float weight_of(float max, float largest) {
    return max == -INFINITY ? 0.0f : fmaxf(exp2_approx(max - largest), kTiny);
  }

  const Params& p_;
  Shared& shared_;
  int warp_, lane_, tile_slices_, slice_sets_, row_base_;
  float k_factor_ = 1.0f,
        v_factor_ = 1.0f;  // what turns products into scores but for a row's scale, and sums into outputs
  Work work_;

  std::uint32_t query_[kColumns][kSteps][2];
  float factor_[kColumns][2];
  int position_[kColumns][2];
  float max_[kColumns][2], reference_[kColumns][2], sum_[kColumns][2];  // the sum is of this lane's keys alone
  float out_[kBlocks][kColumns][4];
};

}  // namespace heddle::cuda::decode
