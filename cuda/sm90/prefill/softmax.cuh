// The online softmax of a warpgroup's scores S[64, kKeys], in the registers that WGMMA leaves them in: a thread holds
// every fourth pair of columns of two rows.
#pragma once

#include "cuda/common/exponents.h"
#include "cuda/common/mma.cuh"
#include "cuda/common/online_softmax.cuh"
#include "cuda/common/visibility.cuh"
#include "cuda/common/wgmma.cuh"
#include "cuda/sm90/prefill/params.h"
#include "cuda/sm90/prefill/worklist.cuh"

namespace heddle::cuda {

// 1 - 2 / (1 + e^2x): right at both ends, and exact enough for scores (tanh.approx has 11 bits).
__device__ __forceinline__ float tanh_from_exp2(float x) {
  return 1.0f - __fdividef(2.0f, 1.0f + exp2_approx(2.0f * kLog2E * x));
}

// The four lanes that share a row.
template <class Combine>
__device__ __forceinline__ float quad_reduce(float x, Combine combine) {
  x = combine(x, __shfl_xor_sync(kFullWarp, x, 1));
  return combine(x, __shfl_xor_sync(kFullWarp, x, 2));
}

template <int N>
__device__ __forceinline__ void map_scores(float (&s)[N], ScoreMap map, float factor) {
  if (map == ScoreMap::kNone) return;
#pragma unroll
  for (int i = 0; i < N; ++i) s[i] = map == ScoreMap::kSoftcap ? tanh_from_exp2(factor * s[i]) : factor * s[i];
}

// Which of its kColumns columns of a row a thread keeps, one bit each. Its columns are 0, 1, 8, 9, 16, 17, ... of what
// is counted from its first.
template <int kColumns>
struct ColumnBits {
  static_assert(kColumns <= 32);
  std::uint32_t bits = 0;

  // Of `begin` up to `end`.
  __device__ __forceinline__ void add(int begin, int end) { bits |= before(end) & ~before(begin); }
  __device__ __forceinline__ void keep_before(int column) { bits &= before(column); }
  __device__ __forceinline__ void keep_from(int column) { bits &= ~before(column); }

 private:
  __device__ __forceinline__ static std::uint32_t before(int column) {
    const int inside = max(column, 0), count = inside / 8 * 2 + min(inside % 8, 2);
    return __funnelshift_lc(0xffffffffu, 0u, static_cast<unsigned>(count));  // all of them from 32 on
  }
};

// What the thread's two rows see of a tile; a row has kColumns of its scores.
template <int kColumns>
struct SeenBits {
  ColumnBits<kColumns> rows[2];

  // `queries` are those of the two rows; `key` is the thread's first column's.
  __device__ __forceinline__ void set(const Visibility& visibility, const int (&queries)[2], int key) {
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      const Span allowed = visibility.allowed(queries[row]);
      rows[row].add(allowed.begin - key, allowed.end - key);
      if (visibility.pattern.kind != PatternKind::kNone) {
        ColumnBits<kColumns> chosen;
        choose(visibility, queries[row], key, chosen);
        rows[row].bits &= chosen.bits;
      }
    }
  }
  // The same where it is intervals, of which the tile's note says what there is to cut.
  __device__ __forceinline__ void set(const PrefillItem& item, TileNote note, int num_global, const int (&queries)[2],
                                      int key) {
    rows[0].bits = rows[1].bits = 0xffffffffu;
    if (note.cut_end()) {
      const int end = item.kv_len - key;
#pragma unroll
      for (int row = 0; row < 2; ++row) rows[row].keep_before(min(queries[row] + item.sees_until - key, end));
    }
    if (note.cut_begin()) {
#pragma unroll
      for (int row = 0; row < 2; ++row) rows[row].keep_from(queries[row] + item.sees_from - key);
    }
    if (note.cut_global()) {
      const int end = min(num_global, item.kv_len) - key;
#pragma unroll
      for (int row = 0; row < 2; ++row) {
        rows[row].add(queries[row] + item.allowed_from - key, min(queries[row] + item.allowed_until - key, end));
      }
    }
  }
  // Scores of columns [kFrom, kTo) that are not seen become -inf.
  template <int kFrom, int kTo>
  __device__ __forceinline__ void apply(float (&s)[2 * kColumns]) const {
#pragma unroll
    for (int row = 0; row < 2; ++row) {
#pragma unroll
      for (int i = kFrom; i < kTo; ++i) {
        if ((rows[row].bits >> i & 1) == 0) s[i / 2 * 4 + 2 * row + i % 2] = -INFINITY;
      }
    }
  }
  // Has them computed here.
  __device__ __forceinline__ void pin() { asm volatile("" : "+r"(rows[0].bits), "+r"(rows[1].bits)::"memory"); }

 private:
  // What the selection alone leaves.
  __device__ __forceinline__ static void choose(const Visibility& visibility, int query, int key,
                                                ColumnBits<kColumns>& chosen) {
    constexpr int kKeys = 4 * kColumns;
    const Pattern& pattern = visibility.pattern;
    switch (pattern.kind) {
      case PatternKind::kNone: break;
      case PatternKind::kWindowGlobal: {
        const Span selected = visibility.selected(query);
        chosen.add(selected.begin - key, selected.end - key);
        chosen.add(0, pattern.num_global - key);
        break;
      }
      case PatternKind::kStrided: {
        const int position = query + visibility.offset;
        chosen.add(position - pattern.width + 1 - key, kKeys);
        // Multiples of the stride behind the query, from the last one in the tile down.
        const int last = min(key + kKeys - 1, position), beyond = (position - last) % pattern.stride;
        const int first = beyond == 0 ? last : last - (pattern.stride - beyond);
#pragma unroll 1
        for (int at = first; at >= key; at -= pattern.stride) chosen.add(at - key, at - key + 1);
        break;
      }
      case PatternKind::kBlockMask: {
        const int block_row = query / pattern.block_q, end = min(key + kKeys, visibility.kv_len);
#pragma unroll 1
        for (int block = key / pattern.block_k; block * pattern.block_k < end; ++block) {
          const int begin = block * pattern.block_k - key;
          if (visibility.block(block_row, block)) chosen.add(begin, begin + pattern.block_k);
        }
        break;
      }
    }
  }
};

// Whether one of the two 16-bit numbers is 2 or more, infinity or NaN: then, and of numbers that are not negative, the
// upper bit of its exponent is set. In both formats that is bit 14.
__device__ __forceinline__ bool any_reaches_two(std::uint32_t both) { return (both & 0x40004000u) != 0; }

// The running softmax of the thread's two rows, in binary exponents: a probability is 2^(scale_log2 s - at).
//
// Any reference `at` is as good as the row's maximum as long as the largest probabilities are neither tiny nor huge, so
// it stays until a probability reaches 2. It is set kMargin above the maximum of then, hence moves when a score is
// 2^(kMargin + 1) times as probable as that one. More would cost exactness: a probability is rounded to 16 bits. Where
// it has nearly all of its row's weight, it has to be a power of two, as that of the old maximum is; one that is not
// has at most 2^(kMargin + 1) to 1 of the weight, where normalized probabilities are rounded as much.
struct RowState {
  float at[2] = {-INFINITY, -INFINITY};
  float sum[2] = {0.0f, 0.0f};  // the thread's own share

  static constexpr float kMargin = 4.0f, kMostBeyond = 3.0f;

  // Probabilities of one tile as the A operand of the product with V, four words for every 16 keys. True: `at` had to
  // be moved, and what was summed before has to be multiplied by `decay`.
  //
  // kSpeculative: probabilities are taken at once, and that one reaches 2 shows in their bits. That saves the maximum,
  // a fifth of the instructions, and the wait for it, but the scores have to be kept until it is clear that they need
  // not be taken again.
  template <class T, bool kSpeculative, int N>
  __device__ __forceinline__ bool update(const float (&s)[N], float scale_log2, std::uint32_t (&p)[N / 2],
                                         float (&decay)[2]) {
    float here[2] = {0.0f, 0.0f};
    bool moves;
    if constexpr (kSpeculative) {
      moves = __any_sync(kFullWarp, any_reaches_two(exponentials<T, 0, N>(s, scale_log2, at, p, here)));
      if (moves) {
        move({most<0, 0, N>(s), most<1, 0, N>(s)}, scale_log2, decay);
        here[0] = here[1] = 0.0f;
        exponentials<T, 0, N>(s, scale_log2, at_or_zero(), p, here);
      }
    } else {
      // Not below 1: also where nothing was seen so far.
      const float largest[2] = {most<0, 0, N>(s), most<1, 0, N>(s)};
      const bool exceeds = !(largest[0] * scale_log2 - at[0] < 1.0f && largest[1] * scale_log2 - at[1] < 1.0f);
      moves = __any_sync(kFullWarp, exceeds);
      if (moves) move(largest, scale_log2, decay);
      exponentials<T, 0, N>(s, scale_log2, at_or_zero(), p, here);
    }
    sum[0] += here[0];
    sum[1] += here[1];
    return moves;
  }
  // Before the first tile's scores are masked: rows that see few of them would choose a low reference, which the next
  // tile would move. So the largest of a quarter of them all, seen or not, is kept in `at`, for start() to set the
  // reference higher by up to kMostBeyond. Whole powers of two, since what dominates a row has to be one; and at 2^8 to
  // 1, the most that then may come, normalized probabilities are still rounded as much. (Where no later tile moves the
  // reference, fp16 then ends at 2^-17 of the row's largest instead of 2^-20.)
  template <int N>
  __device__ __forceinline__ void look_ahead(const float (&s)[N]) {
    at[0] = most<0, 0, N / 2, 8>(s);
    at[1] = most<1, 0, N / 2, 8>(s);
  }
  // update() for the first tile. !behind: nothing is seen of its second half, whose scores may be anything.
  // kLookedAhead: after look_ahead().
  template <class T, bool kLookedAhead, int N>
  __device__ __forceinline__ void start(const float (&s)[N], float scale_log2, std::uint32_t (&p)[N / 2], bool behind) {
    float largest[2] = {most<0, 0, N / 2>(s), most<1, 0, N / 2>(s)};
    if (behind) {
      largest[0] = fmaxf(largest[0], most<0, N / 2, N>(s));
      largest[1] = fmaxf(largest[1], most<1, N / 2, N>(s));
    }
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      const auto larger = [](float a, float b) { return fmaxf(a, b); };
      const float seen = quad_reduce(largest[row], larger) * scale_log2;
      float margin = kMargin;
      if constexpr (kLookedAhead) {
        const float beyond = quad_reduce(at[row], larger) * scale_log2 - seen;
        margin += fminf(fmaxf(ceilf(beyond), 0.0f), kMostBeyond);
      }
      at[row] = seen + margin;
    }
    sum[0] = sum[1] = 0.0f;
    exponentials<T, 0, N / 2>(s, scale_log2, at_or_zero(), p, sum);
    if (behind) {
      exponentials<T, N / 2, N>(s, scale_log2, at_or_zero(), p, sum);
    } else {
#pragma unroll
      for (int i = N / 4; i < N / 2; ++i) p[i] = 0;
    }
  }

 private:
  struct Pair {
    float x[2];
    __device__ __forceinline__ float operator[](int row) const { return x[row]; }
  };
  // With nothing seen, 2^(-inf - 0) is 0, not NaN.
  __device__ __forceinline__ Pair at_or_zero() const {
    return {{at[0] == -INFINITY ? 0.0f : at[0], at[1] == -INFINITY ? 0.0f : at[1]}};
  }
  // Of the row's scores among s[kFrom] up to s[kTo]: of every pair, or with kStep 8 of every other.
  template <int kRow, int kFrom, int kTo, int kStep = 4, int N>
  __device__ __forceinline__ static float most(const float (&s)[N]) {
    constexpr int kFirst = kFrom + 2 * kRow;
    float most[2] = {fmaxf(s[kFirst], s[kFirst + 1]), fmaxf(s[kFirst + kStep], s[kFirst + kStep + 1])};
#pragma unroll
    for (int i = kFirst + 2 * kStep; i < kTo; i += kStep) {
      most[i / kStep % 2] = fmaxf(most[i / kStep % 2], fmaxf(s[i], s[i + 1]));
    }
    return fmaxf(most[0], most[1]);
  }
  // Moves `at` to kMargin above the largest exponent of the row so far, or leaves it if that is lower. largest: of the
  // thread's scores.
  __device__ __forceinline__ void move(const float (&largest)[2], float scale_log2, float (&decay)[2]) {
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      const float most = quad_reduce(largest[row], [](float a, float b) { return fmaxf(a, b); }) * scale_log2;
      const float now = most - at[row] < 1.0f ? at[row] : fmaxf(most + kMargin, at[row]);
      decay[row] = now == -INFINITY ? 1.0f : exp2_approx(at[row] - now);
      sum[row] *= decay[row];
      at[row] = now;
    }
  }
  // Of scores [kFrom, kTo). Adds to `total`, and returns all words of p in one, bit by bit.
  template <class T, int kFrom, int kTo, int N, class Reference>
  __device__ __forceinline__ static std::uint32_t exponentials(const float (&s)[N], float scale_log2,
                                                               const Reference& reference, std::uint32_t (&p)[N / 2],
                                                               float (&total)[2]) {
    std::uint32_t all = 0;
#pragma unroll
    for (int row = 0; row < 2; ++row) {
#pragma unroll
      for (int i = kFrom + 2 * row; i < kTo; i += 4) {
        const float low = exp2_approx(s[i] * scale_log2 - reference[row]);
        const float high = exp2_approx(s[i + 1] * scale_log2 - reference[row]);
        p[i / 2] = pack<T>(low, high);
        all |= p[i / 2];
        total[row] += low + high;
      }
    }
    return all;
  }
};

}  // namespace heddle::cuda
