// heddle.KVCache as Python holds it.
#pragma once

#include <memory>
#include <shared_mutex>
#include <utility>
#include <vector>

#include "heddle/cache.h"

namespace heddle::python {

// Calls run without Python's lock, so the cache brings its own: an append alone, decodes side by side. It is taken
// after Python's is released, never the other way round.
struct SharedCache {
  explicit SharedCache(const CacheConfig& config) : cache(config) {}
  SharedCache(const CacheConfig& config, const CacheStorage& storage, std::vector<std::shared_ptr<const void>> owners_)
      : owners(std::move(owners_)), cache(config, storage) {}

  std::vector<std::shared_ptr<const void>> owners;  // of the memory, if it is not the cache's own
  KVCache cache;
  std::shared_mutex mutex;
};

}  // namespace heddle::python
