// How the prefill kernel is cut for a head dimension, and what of shared memory and registers that takes.
#pragma once

#include <cstddef>

#include "cuda/common/wgmma.cuh"

namespace heddle::cuda {

// kDim and kDimV: elements of rows of q and k, and of v; narrower rows are filled up with zeros as they are copied.
// kWarpgroups: those that multiply, 64 rows each; one more feeds them. kKeys: keys of a KV tile. kStages: KV tiles that
// shared memory holds.
template <class T, int kDim_, int kDimV_, int kWarpgroups_, int kKeys_, int kStages_ = 2>
struct PrefillConfig {
  using Element = T;
  static constexpr int kDim = kDim_, kDimV = kDimV_, kWarpgroups = kWarpgroups_, kKeys = kKeys_, kStages = kStages_;
  static constexpr int kRows = 64 * kWarpgroups;
  static constexpr int kConsumerThreads = 128 * kWarpgroups;
  static constexpr int kThreads = 128 + kConsumerThreads;

  static constexpr int kChunks = (kDim + kChunkElements - 1) / kChunkElements;
  static constexpr int kChunksV = (kDimV + kChunkElements - 1) / kChunkElements;
  static constexpr int kQChunkBytes = kRows * kChunkRowBytes;
  static constexpr int kKvChunkBytes = kKeys * kChunkRowBytes;
  static constexpr int kOutChunkBytes = kQChunkBytes;

  // Two row tiles of queries where shared memory goes that far: the next ones come while the last are still needed. And
  // room for the output, which is then written by bulk copies.
  static constexpr int kQBytes = kChunks * kQChunkBytes, kKvBytes = kStages * (kChunks + kChunksV) * kKvChunkBytes;
  static constexpr int kOutBytes = kChunksV * kOutChunkBytes, kRoom = 224 << 10;
  static constexpr int kQStages = 2 * kQBytes + kKvBytes + kOutBytes <= kRoom ? 2 : 1;
  static constexpr bool kStoresBoxes = kQStages * kQBytes + kKvBytes + kOutBytes <= kRoom;
  // The first product of a row tile runs while the one before it is written. Not where its queries come too late.
  static constexpr bool kOverlapEnds = kQStages == 2;
  static_assert(kDim % 16 == 0 && kKeys % 16 == 0, "whole steps of the matrix instruction");

  // Registers of a thread. The warpgroups share what they are launched with, 3 x 168 or 4 x 128, as 40 + 2 x 232 or
  // 32 + 3 x 160. The scores, the output and the probabilities of a row tile are (kKeys + kDimV + kKeys / 2) / 2 a
  // thread, which leaves room for 28 others or more.
  static constexpr int kProducerRegisters = kWarpgroups == 1 ? 56 : kWarpgroups == 2 ? 40 : 32;
  static constexpr int kConsumerRegisters = kWarpgroups == 1 ? 256 : kWarpgroups == 2 ? 232 : 160;
  static_assert(kProducerRegisters + kWarpgroups * kConsumerRegisters <= (kWarpgroups + 1) * (65536 / kThreads / 8 * 8),
                "more than that is waited for forever");
  static_assert((kKeys + kDimV + kKeys / 2) / 2 + 20 <= kConsumerRegisters, "no spills");

  // Block masks, strides and maps of scores. Few calls have them, and code that is not there need not be fetched:
  // without it a row tile of few KV tiles takes 3 to 5 % less time.
  static constexpr bool kGeneral = false;

  // Warpgroups take turns at the tensor cores, so that one's softmax runs beside another's products. Long rows have
  // products enough to hide it.
  static constexpr bool kTakeTurns = kWarpgroups > 1 && kDim <= 128;
  // Two warpgroups do not fill the tensor cores unless each one's softmax runs beside its own second product too, which
  // reads probabilities while the next are made. Three do, and one set leaves them registers for more keys.
  static constexpr bool kTwoSets = kWarpgroups < 3;
  // Scores are kept until their probabilities are accepted.
  static constexpr bool kSpeculative = !kTwoSets || (2 * kKeys + kDimV) / 2 + 35 <= kConsumerRegisters;
};

template <class Config>
struct General : Config {
  static constexpr bool kGeneral = true;
};

}  // namespace heddle::cuda
