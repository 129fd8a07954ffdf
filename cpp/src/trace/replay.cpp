#include "trace/replay.h"

#include <algorithm>
#include <queue>
#include <utility>
#include <vector>

namespace heddle::trace {
namespace {

using Ids = std::span<const std::int32_t>;

// A list of the resident ids in the order of their use, linked through arrays; the end is its head and tail.
class Lru {
 public:
  Lru(std::int64_t num_ids, std::int64_t capacity)
      : end_(static_cast<std::int32_t>(num_ids)), capacity_(capacity), links_(static_cast<std::size_t>(num_ids) + 1) {
    links_.back() = {end_, end_};
  }
  bool holds(std::int32_t id) const { return links_[static_cast<std::size_t>(id)].next >= 0; }
  // What is held in the end is what was used last, whatever was evicted on the way.
  void update(Ids batch) {
    for (const std::int32_t id : batch) use(id);
  }

 private:
  struct Link {
    std::int32_t before = -1, next = -1;  // next -1: not resident
  };
  Link& at(std::int32_t id) { return links_[static_cast<std::size_t>(id)]; }
  void unlink(std::int32_t id) {
    at(at(id).before).next = at(id).next;
    at(at(id).next).before = at(id).before;
  }
  void use(std::int32_t id) {
    if (holds(id)) {
      unlink(id);
    } else if (capacity_ == 0) {
      return;
    } else if (size_ == capacity_) {
      const std::int32_t oldest = at(end_).next;
      unlink(oldest);
      at(oldest).next = -1;
    } else {
      ++size_;
    }
    const std::int32_t newest = at(end_).before;
    at(id) = {newest, end_};
    at(newest).next = at(end_).before = id;
  }

  std::int32_t end_;
  std::int64_t capacity_, size_ = 0;
  std::vector<Link> links_;
};

class Fifo {
 public:
  Fifo(std::int64_t num_ids, std::int64_t capacity)
      : resident_(static_cast<std::size_t>(num_ids)), ring_(static_cast<std::size_t>(capacity), -1) {}
  bool holds(std::int32_t id) const { return resident_[static_cast<std::size_t>(id)] != 0; }
  void update(Ids batch) {
    if (ring_.empty()) return;
    missed_.clear();
    for (const std::int32_t id : batch) {
      if (!holds(id)) missed_.push_back(id);
    }
    for (const std::int32_t id : missed_) {
      if (holds(id)) continue;  // twice in the batch
      if (ring_[next_] >= 0) resident_[static_cast<std::size_t>(ring_[next_])] = 0;
      ring_[next_] = id;
      resident_[static_cast<std::size_t>(id)] = 1;
      next_ = next_ + 1 == ring_.size() ? 0 : next_ + 1;
    }
  }

 private:
  std::vector<char> resident_;
  std::vector<std::int32_t> ring_, missed_;
  std::size_t next_ = 0;
};

class Previous {
 public:
  Previous(std::int64_t num_ids, std::int64_t capacity)
      : held_(static_cast<std::size_t>(num_ids), -1), capacity_(capacity) {}
  bool holds(std::int32_t id) const { return held_[static_cast<std::size_t>(id)] == batch_; }
  void update(Ids batch) {
    ++batch_;
    for (const std::int32_t id : batch.last(std::min(batch.size(), static_cast<std::size_t>(capacity_)))) {
      held_[static_cast<std::size_t>(id)] = batch_;
    }
  }

 private:
  std::vector<std::int64_t> held_;  // the last batch whose end it was in
  std::int64_t capacity_, batch_ = 0;
};

class Optimum {
 public:
  Optimum(Ids ids, std::int64_t num_ids, std::span<const std::int64_t> batches, std::int64_t capacity)
      : due_(static_cast<std::size_t>(num_ids), kNotHeld), next_(ids.size()), capacity_(capacity) {
    std::vector<std::int64_t> later(static_cast<std::size_t>(num_ids), kNever);
    for (std::size_t b = batches.size() - 1; b-- > 0;) {
      const auto first = static_cast<std::size_t>(batches[b]), last = static_cast<std::size_t>(batches[b + 1]);
      for (std::size_t i = first; i < last; ++i) next_[i] = later[static_cast<std::size_t>(ids[i])];
      for (std::size_t i = first; i < last; ++i) later[static_cast<std::size_t>(ids[i])] = static_cast<std::int64_t>(b);
    }
  }
  bool holds(std::int32_t id) const { return due_[static_cast<std::size_t>(id)] != kNotHeld; }
  void update(Ids batch) {
    for (const std::int32_t id : batch) {
      std::int64_t& due = due_[static_cast<std::size_t>(id)];
      const std::int64_t again = next_[at_++];
      if (due == again) continue;  // twice in the batch
      size_ += (again != kNever ? 1 : 0) - (due != kNotHeld ? 1 : 0);
      due = again == kNever ? kNotHeld : again;
      if (again != kNever) farthest_.emplace(again, id);
    }
    while (size_ > capacity_) {
      const auto [when, id] = farthest_.top();
      farthest_.pop();
      if (due_[static_cast<std::size_t>(id)] != when) continue;  // used or evicted since
      due_[static_cast<std::size_t>(id)] = kNotHeld;
      --size_;
    }
  }

 private:
  static constexpr std::int64_t kNotHeld = -1, kNever = -2;
  std::vector<std::int64_t> due_;   // the batch that uses a held id again
  std::vector<std::int64_t> next_;  // of each access: the batch that uses its id again
  std::priority_queue<std::pair<std::int64_t, std::int32_t>> farthest_;
  std::int64_t capacity_, size_ = 0;
  std::size_t at_ = 0;
};

template <class Cache>
void replay_through(Cache cache, Ids ids, std::span<const std::int64_t> batches, std::span<std::int64_t> misses) {
  for (std::size_t b = 0; b < misses.size(); ++b) {
    const Ids batch =
        ids.subspan(static_cast<std::size_t>(batches[b]), static_cast<std::size_t>(batches[b + 1] - batches[b]));
    misses[b] = 0;
    for (const std::int32_t id : batch) misses[b] += cache.holds(id) ? 0 : 1;
    cache.update(batch);
  }
}

}  // namespace

void replay(Policy policy, Ids ids, std::int64_t num_ids, std::span<const std::int64_t> batches, std::int64_t capacity,
            std::span<std::int64_t> misses) {
  capacity = std::min(capacity, num_ids);  // no more fits in than there is
  switch (policy) {
    case Policy::kLru: return replay_through(Lru(num_ids, capacity), ids, batches, misses);
    case Policy::kFifo: return replay_through(Fifo(num_ids, capacity), ids, batches, misses);
    case Policy::kPrevious: return replay_through(Previous(num_ids, capacity), ids, batches, misses);
    case Policy::kOptimum: return replay_through(Optimum(ids, num_ids, batches, capacity), ids, batches, misses);
  }
}

}  // namespace heddle::trace
