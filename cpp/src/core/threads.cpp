#include "core/threads.h"

#include <algorithm>
#include <atomic>
#include <exception>
#include <mutex>
#include <omp.h>

#include "core/check.h"
#include "heddle/backend.h"

namespace heddle {
namespace {
std::atomic<int> chosen_threads{0};  // 0: OpenMP's own number
}  // namespace

void set_num_threads(int n) {
  check::at_least("n", n, 0);
  chosen_threads.store(n, std::memory_order_relaxed);
}

int num_threads() {
  const int n = chosen_threads.load(std::memory_order_relaxed);
  return n > 0 ? n : omp_get_max_threads();
}

namespace detail {

void parallel(int n, void (*body)(void* context, int id), void* context) {
  if (n <= 0) return;
  if (n == 1) return body(context, 0);
  std::exception_ptr error;
  std::mutex mutex;
  // Always the whole team, idle members included: libgomp ends the threads that a smaller team leaves over and starts
  // new ones for the next large one.
  const int team = std::max(n, num_threads());
#pragma omp parallel num_threads(team)
  {
    // The team may be smaller than asked for.
    for (int id = omp_get_thread_num(); id < n; id += omp_get_num_threads()) {
      try {
        body(context, id);
      } catch (...) {
        const std::lock_guard lock(mutex);
        if (error == nullptr) error = std::current_exception();
      }
    }
  }
  if (error != nullptr) std::rethrow_exception(error);
}

void parallel_for(std::int64_t n, int num_threads, void (*body)(void* context, std::int64_t i), void* context) {
  std::atomic<std::int64_t> next{0};
  const auto worker = [&](int) {
    for (std::int64_t i = next.fetch_add(1, std::memory_order_relaxed); i < n;
         i = next.fetch_add(1, std::memory_order_relaxed)) {
      body(context, i);
    }
  };
  heddle::parallel(static_cast<int>(std::min<std::int64_t>(n, num_threads)), worker);
}

}  // namespace detail
}  // namespace heddle
