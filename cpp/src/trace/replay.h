// Replays batches of accesses through a cache of a given size and counts what they miss.
//
// What a batch asks for is known before any of it is fetched, as a selection is: its hits are what the cache holds when
// it begins, and then the cache changes.
#pragma once

#include <cstdint>
#include <span>

namespace heddle::trace {

enum class Policy : std::uint8_t {
  kLru,       // keeps what was used last; within a batch a later access counts as later
  kFifo,      // takes in each miss, in order, in place of what came in first
  kPrevious,  // holds the last `capacity` accesses of the batch before, and nothing else
  // Belady's optimum: of what it held and what the batch fetched it keeps what is used again first. No policy hits
  // more.
  kOptimum,
};

// ids: in [0, num_ids), those of batch b at [batches[b], batches[b + 1]). misses: one number a batch, written; an id
// that a batch has twice misses twice. O(1) an access, kOptimum O(log n). capacity 0 holds nothing.
void replay(Policy policy, std::span<const std::int32_t> ids, std::int64_t num_ids,
            std::span<const std::int64_t> batches, std::int64_t capacity, std::span<std::int64_t> misses);

}  // namespace heddle::trace
