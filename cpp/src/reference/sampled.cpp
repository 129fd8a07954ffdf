// The oracle of sampled decode: probabilities and their prefix sums over all keys that a query sees, in float64, and
// the draws inverted one by one.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <numeric>
#include <set>
#include <vector>

#include "aggregate/draws.h"
#include "core/kernels.h"
#include "core/threads.h"
#include "heddle/backend.h"
#include "reference/rows.h"

namespace heddle::reference {
namespace {

// One query of one head: the keys that it sees with their scores, and what becomes of them.
class SampledRow {
 public:
  SampledRow(const Problem& p, std::int64_t request, std::int64_t q_head, std::int64_t query)
      : p_(p),
        s_(*p.sampled.options),
        r_(p.requests[request]),
        kv_head_(q_head / p.group()),
        slot_(r_.q_first + query),
        q_head_(q_head),
        draws_(s_, p.sampled.offset, request, q_head, query),
        seen_(visible_keys(p, request, q_head, query)) {
    if (has_token_lists(p)) list_ = token_list(p, request, query, kv_head_);
  }

  void run();
  const std::vector<std::int64_t>& seen() const { return seen_; }
  const std::set<std::int64_t>& drawn() const { return drawn_; }
  const std::set<std::int64_t>& features() const { return features_; }

 private:
  std::vector<double> scores();
  std::vector<char> kept(const std::vector<double>& scores) const;
  void add(std::size_t n, double weight);
  void draw(std::size_t first, std::size_t last, const std::vector<double>& targets, double weight);
  std::int64_t tile(std::size_t n) const;

  const Problem& p_;
  const Sampling& s_;
  const Request& r_;
  const std::int64_t kv_head_, slot_, q_head_;
  const aggregate::Draws draws_;
  const std::vector<std::int64_t> seen_;
  std::span<const std::int32_t> list_;
  // Keys that can be drawn, and their weights exp(s - max); those that are kept have been taken out.
  std::vector<std::int64_t> keys_;
  std::vector<double> weights_;
  std::vector<double> out_;
  std::set<std::int64_t> drawn_, features_;
};

std::vector<double> SampledRow::scores() {
  std::vector<double> q = read_row(p_.q, r_.q_page, q_head_, slot_);
  if (p_.quantize_q) quantize_row(q, p_.q_static_scale);
  double unit = 1.0;
  if (s_.bernoulli > 0) {
    std::vector<std::int8_t> counts(q.size());
    unit = aggregate::ternary_queries(q.data(), p_.q.dim, s_, draws_, counts.data());
    for (std::size_t d = 0; d < q.size(); ++d) {
      q[d] = counts[d];
      if (counts[d] != 0) features_.insert(static_cast<std::int64_t>(d));
    }
  }
  std::vector<double> scores;
  for (const std::int64_t key : seen_) {
    double s = 0.0;
    if (s_.bernoulli > 0) {
      const std::int64_t page = r_.pages[key / p_.page_size], slot = key % p_.page_size;
      const std::byte* block =
          p_.sampled.features + page * p_.sampled.feature_page_stride + kv_head_ * p_.sampled.feature_head_stride;
      for (const std::int64_t d : features_) {
        s += q[static_cast<std::size_t>(d)] * load_as_double(block, p_.k.dtype, d * p_.page_size + slot);
      }
      s *= unit * p_.k.scale_of(page, kv_head_, slot);
    } else {
      s = dot(q, read_key_row(p_, p_.k, r_, kv_head_, key));
    }
    s *= p_.scale;
    if (p_.softcap > 0.0) s = p_.softcap * std::tanh(s / p_.softcap);
    scores.push_back(s);
  }
  return scores;
}

// Which keys are read exactly: the first, the last, and the largest between them.
std::vector<char> SampledRow::kept(const std::vector<double>& scores) const {
  const auto n = static_cast<std::int64_t>(scores.size());
  std::vector<char> kept(scores.size(), s_.method == SamplingMethod::kExact ? 1 : 0);
  for (std::int64_t i = 0; i < n; ++i) {
    if (i < s_.n_sink || i >= n - s_.n_recent) kept[static_cast<std::size_t>(i)] = 1;
  }
  std::vector<std::size_t> between;
  for (std::size_t i = 0; i < kept.size(); ++i) {
    if (kept[i] == 0) between.push_back(i);
  }
  std::stable_sort(between.begin(), between.end(), [&](std::size_t a, std::size_t b) { return scores[a] > scores[b]; });
  for (std::size_t i = 0; i < between.size() && static_cast<std::int64_t>(i) < s_.n_top; ++i) kept[between[i]] = 1;
  return kept;
}

void SampledRow::add(std::size_t n, double weight) {
  const std::vector<double> v = read_key_row(p_, p_.v, r_, kv_head_, keys_[n]);
  for (std::size_t d = 0; d < out_.size(); ++d) out_[d] += weight * v[d];
  drawn_.insert(keys_[n]);
}

// Tiles are counted along the request, or along its token list.
std::int64_t SampledRow::tile(std::size_t n) const {
  if (!has_token_lists(p_)) return keys_[n] / aggregate::kSampleTile;
  return (std::lower_bound(list_.begin(), list_.end(), keys_[n]) - list_.begin()) / aggregate::kSampleTile;
}

// A row of V for each target in (0, 1): that of the first key at which the prefix sum over [first, last) reaches it.
void SampledRow::draw(std::size_t first, std::size_t last, const std::vector<double>& targets, double weight) {
  std::vector<double> prefix(last - first);
  std::partial_sum(weights_.begin() + static_cast<std::ptrdiff_t>(first),
                   weights_.begin() + static_cast<std::ptrdiff_t>(last), prefix.begin());
  for (const double target : targets) {
    const auto at = std::lower_bound(prefix.begin(), prefix.end(), target * prefix.back());
    add(first + static_cast<std::size_t>(at - prefix.begin()), weight * prefix.back() / targets.size());
  }
}

void SampledRow::run() {
  std::vector<double> all = scores(), scores;
  std::vector<std::int64_t> keys;
  const double sink = p_.sinks != nullptr ? p_.sinks[q_head_] : -kInf;
  double max = sink;
  for (std::size_t n = 0; n < all.size(); ++n) {
    if (all[n] == -kInf) continue;  // no weight: as if it were not seen
    scores.push_back(all[n]);
    keys.push_back(seen_[n]);
    if (!(all[n] <= max)) max = all[n];  // a NaN that is seen must show
  }

  out_.assign(static_cast<std::size_t>(p_.v.dim), 0.0);
  double lse = -kInf;
  if (max != -kInf) {
    double denominator = std::exp(sink - max);
    for (const double s : scores) denominator += std::exp(s - max);
    lse = max + std::log(denominator);
    if (std::isnan(denominator)) {
      std::fill(out_.begin(), out_.end(), denominator);
    } else {
      const std::vector<char> keep = kept(scores);
      for (std::size_t n = 0; n < keys.size(); ++n) {
        keys_.assign(1, keys[n]);
        if (keep[n] != 0) add(0, std::exp(scores[n] - max) / denominator);
      }
      keys_.clear();
      for (std::size_t n = 0; n < keys.size(); ++n) {
        if (keep[n] != 0 || std::exp(scores[n] - max) == 0.0) continue;
        keys_.push_back(keys[n]);
        weights_.push_back(std::exp(scores[n] - max));
      }
      std::vector<double> targets;
      if (s_.method == SamplingMethod::kSystematicTile) {
        std::set<std::int64_t> tiles;
        for (std::size_t n = 0; n < keys_.size(); ++n) tiles.insert(tile(n));
        for (std::size_t first = 0, last; first < keys_.size(); first = last) {
          for (last = first + 1; last < keys_.size() && tile(last) == tile(first);) ++last;
          targets.resize(std::max<std::size_t>(1, static_cast<std::size_t>(s_.samples) / tiles.size()));
          for (std::size_t m = 0; m < targets.size(); ++m) {
            targets[m] = (static_cast<double>(m) + draws_.value(tile(first))) / static_cast<double>(targets.size());
          }
          draw(first, last, targets, 1.0 / denominator);
        }
      } else if (!keys_.empty()) {
        targets.resize(static_cast<std::size_t>(s_.samples));
        for (std::int64_t m = 0; m < s_.samples; ++m) {
          const double u = draws_.value(s_.method == SamplingMethod::kSystematic ? 0 : m);
          targets[static_cast<std::size_t>(m)] =
              s_.method == SamplingMethod::kIid ? u : (static_cast<double>(m) + u) / static_cast<double>(s_.samples);
        }
        draw(0, keys_.size(), targets, 1.0 / denominator);
      }
    }
  }

  std::byte* row = p_.out.row(r_.q_page, q_head_, slot_);
  for (std::size_t d = 0; d < out_.size(); ++d) {
    store_from_double(row, p_.out.dtype, static_cast<std::int64_t>(d), out_[d]);
  }
  if (p_.lse != nullptr) {
    store_from_double(p_.lse, p_.lse_dtype,
                      r_.q_page * p_.lse_page_stride + q_head_ * p_.lse_head_stride + slot_ * p_.lse_slot_stride, lse);
  }
}

}  // namespace

// KV head by KV head, since its queries share what they read.
void sampled(const Problem& p) {
  const auto requests = static_cast<std::int64_t>(p.requests.size());
  parallel_for(requests * p.num_kv_heads, num_threads(), [&](std::int64_t i) {
    const std::int64_t request = i / p.num_kv_heads, kv_head = i % p.num_kv_heads;
    std::set<std::int64_t> seen, drawn, features;
    for (std::int64_t query = 0; query < p.requests[request].q_len; ++query) {
      for (std::int64_t h = kv_head * p.group(); h < (kv_head + 1) * p.group(); ++h) {
        SampledRow row(p, request, h, query);
        row.run();
        seen.insert(row.seen().begin(), row.seen().end());
        drawn.insert(row.drawn().begin(), row.drawn().end());
        features.insert(row.features().begin(), row.features().end());
      }
    }
    const auto report = [&](const TensorView& counts, std::int64_t count) {
      if (counts.given()) counts.as<std::int64_t>()[request * counts.strides[0] + kv_head * counts.strides[1]] = count;
    };
    const auto elements = p.sampled.options->bernoulli > 0 ? static_cast<std::int64_t>(features.size()) : p.k.dim;
    report(p.sampled.reads.v_rows, static_cast<std::int64_t>(drawn.size()));
    report(p.sampled.reads.k_features, static_cast<std::int64_t>(seen.size()) * elements);
  });
}

}  // namespace heddle::reference
