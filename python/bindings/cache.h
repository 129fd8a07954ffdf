// heddle.KVCache as Python holds it.
#pragma once

#include <shared_mutex>

#include "heddle/cache.h"

namespace heddle::python {

// Calls run without Python's lock, so the cache brings its own: an append alone, decodes side by side. It is taken
// after Python's is released, never the other way round.
struct SharedCache {
  explicit SharedCache(const CacheConfig& config) : cache(config) {}

  KVCache cache;
  std::shared_mutex mutex;
};

}  // namespace heddle::python
