// The only way that host code starts threads: OpenMP's pool, which Torch in the same process shares.
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "heddle/backend.h"

namespace heddle {

namespace detail {
void parallel(int n, void (*body)(void* context, int id), void* context);
void parallel_for(std::int64_t n, int num_threads, void (*body)(void* context, std::int64_t i), void* context);
}  // namespace detail

// Calls fn(id) once for each id in [0, n), at the same time if the pool has that many threads to give (a call from
// inside a parallel region gets one). So fn must not wait for another id. The first exception is thrown again here.
template <class Fn>
void parallel(int n, Fn&& fn) {
  using F = std::remove_reference_t<Fn>;
  detail::parallel(
      n, [](void* context, int id) { (*static_cast<F*>(context))(id); }, const_cast<std::remove_const_t<F>*>(&fn));
}

// Calls fn(i) once for each i in [0, n) on num_threads threads, each taking the next i when it is free.
template <class Fn>
void parallel_for(std::int64_t n, int num_threads, Fn&& fn) {
  using F = std::remove_reference_t<Fn>;
  detail::parallel_for(
      n, num_threads, [](void* context, std::int64_t i) { (*static_cast<F*>(context))(i); },
      const_cast<std::remove_const_t<F>*>(&fn));
}

// Splits [0, n) into one range a thread and calls fn(first, last) for each. `elements` is the work in all of them:
// little of it is not worth a second thread.
template <class Fn>
void for_ranges(std::int64_t n, std::int64_t elements, Fn&& fn) {
  constexpr std::int64_t kElementsPerThread = 16 * 1024;
  const std::int64_t threads =
      std::clamp<std::int64_t>(std::min(n, elements / kElementsPerThread), 1, std::max(1, num_threads()));
  parallel(static_cast<int>(threads), [&](int id) { fn(n * id / threads, n * (id + 1) / threads); });
}

}  // namespace heddle
