#include "support/sample.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <functional>
#include <numeric>
#include <unordered_map>
#include <unordered_set>
#include <utility>

#include "core/integers.h"
#include "core/numeric.h"

namespace heddle::testing {
namespace {

constexpr std::int64_t kGuard = 64;  // elements

bool is_quantized(DType dtype) { return dtype == DType::kInt8 || dtype == DType::kFloat8E4M3; }

// Integers and fp8 are drawn so that `scale`, about 1/32, makes them like the floats.
void fill_row(Random& r, std::byte* row, DType dtype, std::int64_t n, double spread) {
  for (std::int64_t d = 0; d < n; ++d) {
    const double x = r.normal() * spread;
    if (dtype == DType::kInt8) {
      reinterpret_cast<std::int8_t*>(row)[d] =
          static_cast<std::int8_t>(std::clamp(std::nearbyint(x * 32.0), -127.0, 127.0));
    } else {
      store_from_double(row, dtype, d, dtype == DType::kFloat8E4M3 ? x * 32.0 : x);
    }
  }
}

void fill_scales(Random& r, Tensor& scale) {
  auto* values = scale.view.as<float>();
  for (std::int64_t i = 0; i < scale.view.numel(); ++i) values[i] = static_cast<float>((0.5 + r.uniform()) / 32.0);
}

// [batch, tokens / partition, heads], packed [tokens / partition, heads], or [1].
Tensor make_scale(Random& r, const TensorView& x, std::int64_t partition) {
  if (!is_quantized(x.dtype)) return {};
  std::vector<std::int64_t> shape = {1};
  if (partition > 0) {
    const int slot = x.rank - 3;
    shape = {ceil_div(x.shape[slot], partition), x.shape[slot + 1]};
    if (x.rank == 4) shape.insert(shape.begin(), x.shape[0]);
  }
  Tensor scale(DType::kFloat32, shape, kPoison);
  fill_scales(r, scale);
  return scale;
}

}  // namespace

Tensor::Tensor(DType dtype, const std::vector<std::int64_t>& shape, std::byte fill, Random* gaps, std::int64_t align) {
  view.dtype = dtype;
  view.rank = static_cast<int>(shape.size());
  std::copy(shape.begin(), shape.end(), view.shape.begin());
  std::vector<int> order(shape.size());  // from the slowest to the fastest axis
  std::iota(order.begin(), order.end(), 0);
  const bool any_order = gaps != nullptr && order.size() > 1;
  if (any_order) std::swap(order[0], order[static_cast<std::size_t>(gaps->integer(0, view.rank - 2))]);
  std::int64_t extent = 1, first = 0;
  for (auto axis = order.rbegin(); axis != order.rend(); ++axis) {
    view.strides[*axis] = extent;
    extent *= std::max<std::int64_t>(1, shape[*axis]);
    if (!any_order) continue;
    if (*axis != view.rank - 1 && gaps->chance(0.2)) {
      first += view.strides[*axis] * (std::max<std::int64_t>(1, shape[*axis]) - 1);
      view.strides[*axis] = -view.strides[*axis];
    }
    extent = ceil_div(extent, align) * align + align * gaps->integer(0, 3);
  }
  if (gaps != nullptr) first += align * gaps->integer(0, 3);
  memory.assign(static_cast<std::size_t>(extent + 3 * align + 2 * kGuard) * size_of(dtype), fill);
  view.data = memory.data() + static_cast<std::size_t>(kGuard + first) * size_of(dtype);
}

std::int64_t Tensor::offset(std::initializer_list<std::int64_t> index) const {
  std::int64_t at = 0;
  int axis = 0;
  for (const std::int64_t i : index) at += i * view.strides[axis++];
  return at;
}

std::byte* Tensor::row(std::initializer_list<std::int64_t> index) const {
  return view.as<std::byte>() + offset(index) * static_cast<std::int64_t>(size_of(view.dtype));
}

double Tensor::get(std::initializer_list<std::int64_t> index) const {
  return load_as_double(view.data, view.dtype, offset(index));
}

void Tensor::set(std::initializer_list<std::int64_t> index, double x) {
  if (view.dtype == DType::kInt32) {
    view.as<std::int32_t>()[offset(index)] = static_cast<std::int32_t>(x);
  } else {
    store_from_double(view.data, view.dtype, offset(index), x);
  }
}

Sample::Sample(const Case& c) : c_(c), layout_(c.seed + 1), gaps_(c.gaps ? &layout_ : nullptr) {
  Random r(c.seed);
  make_requests(r);
  if (c_.op == Op::kAttention) {
    make_contiguous(r);
  } else {
    make_cache(r);
  }
  if (c_.sinks) {
    sinks_ = Tensor(DType::kFloat32, {c_.q_heads}, kPoison);
    for (std::int64_t h = 0; h < c_.q_heads; ++h) {
      sinks_.set({h}, r.chance(0.2) ? -std::numeric_limits<double>::infinity() : 2.0 * r.normal());
    }
  }
  if (c_.pattern == Pattern::kBlocks) make_block_mask(r);
  if (c_.pattern == Pattern::kTokens || c_.pattern == Pattern::kQueryTokens) make_token_lists(r);
  if (c_.gaps || c_.poison_seen) poison(r);
}

void Sample::make_requests(Random& r) {
  std::int64_t q_first = 0, k_first = 0;
  for (std::int64_t b = 0; b < c_.batch; ++b) {
    Lengths lengths{c_.q_len, c_.kv_len};
    if (c_.ragged) {
      if (c_.packed) lengths.q_len = r.integer(0, c_.q_len);
      lengths.kv_len = r.integer(0, c_.kv_len);
    }
    if (c_.packed) {
      lengths.q_first = q_first;
      lengths.k_first = k_first;
      q_first += lengths.q_len;
      k_first += lengths.kv_len;
    }
    requests_.push_back(lengths);
  }
  if (!c_.packed) return;
  cu_q_ = Tensor(DType::kInt32, {c_.batch + 1}, kPoison);
  cu_k_ = Tensor(DType::kInt32, {c_.batch + 1}, kPoison);
  for (std::int64_t b = 0; b < c_.batch; ++b) {
    cu_q_.set({b}, static_cast<double>(requests_[b].q_first));
    cu_k_.set({b}, static_cast<double>(requests_[b].k_first));
  }
  cu_q_.set({c_.batch}, static_cast<double>(q_first));
  cu_k_.set({c_.batch}, static_cast<double>(k_first));
}

void Sample::make_contiguous(Random& r) {
  const auto make = [&](DType dtype, const Tensor& cu, std::int64_t length, std::int64_t heads, std::int64_t dim) {
    if (!c_.packed) return Tensor(dtype, {c_.batch, length, heads, dim}, kPoison, gaps_, c_.align);
    // A few rows more than the requests have: nobody's.
    const std::int64_t spare = c_.gaps ? static_cast<std::int64_t>(c_.seed % 4) : 0;
    return Tensor(dtype, {static_cast<std::int64_t>(cu.get({c_.batch})) + spare, heads, dim}, kPoison, gaps_, c_.align);
  };
  q_ = make(c_.q, cu_q_, c_.q_len, c_.q_heads, c_.dim);
  k_ = make(c_.k, cu_k_, c_.kv_len, c_.kv_heads, c_.dim);
  v_ = make(c_.v, cu_k_, c_.kv_len, c_.kv_heads, c_.dim_v);
  q_scale_ = make_scale(r, q_.view, c_.q_partition);
  k_scale_ = make_scale(r, k_.view, c_.k_partition);
  v_scale_ = make_scale(r, v_.view, c_.v_partition);
  const auto make_mean = [&](std::int64_t dim) {
    std::vector<std::int64_t> shape = {c_.kv_heads, dim};
    if (!c_.packed) shape.insert(shape.begin(), c_.batch);
    Tensor mean(DType::kFloat32, shape, kPoison);
    for (std::int64_t i = 0; i < mean.view.numel(); ++i) mean.view.as<float>()[i] = 2.0f * r.normal();
    return mean;
  };
  if (c_.smooth_k) k_mean_ = make_mean(c_.dim);
  if (c_.smooth_v) v_mean_ = make_mean(c_.dim_v);
  for (std::int64_t b = 0; b < c_.batch; ++b) {
    for (std::int64_t i = 0; i < requests_[b].q_len; ++i) {
      for (std::int64_t h = 0; h < c_.q_heads; ++h) fill_row(r, query_row(b, i, h), c_.q, c_.dim, c_.spread);
    }
    for (std::int64_t j = 0; j < requests_[b].kv_len; ++j) {
      for (std::int64_t h = 0; h < c_.kv_heads; ++h) {
        fill_row(r, key_row(b, j, h).data, c_.k, c_.dim, 1.0);
        fill_row(r, value_row(b, j, h).data, c_.v, c_.dim_v, 1.0);
      }
    }
  }
}

void Sample::make_cache(Random& r) {
  q_ = Tensor(c_.q, {c_.batch, c_.q_len, c_.q_heads, c_.dim}, kPoison, gaps_, c_.align);
  for (std::int64_t b = 0; b < c_.batch; ++b) {
    for (std::int64_t i = 0; i < c_.q_len; ++i) {
      for (std::int64_t h = 0; h < c_.q_heads; ++h) fill_row(r, query_row(b, i, h), c_.q, c_.dim, c_.spread);
    }
  }

  // Requests may begin with the same full pages; the others are their own, in any order, with some that nobody has.
  std::int64_t shared = 0;
  if (c_.shared_pages && c_.batch > 0) {
    shared = c_.kv_len / c_.page_size;
    for (const Lengths& request : requests_) shared = std::min(shared, request.kv_len / c_.page_size);
  }
  const std::int64_t max_pages = ceil_div(c_.kv_len, c_.page_size) + (c_.gaps ? 2 : 0);
  const std::int64_t num_pages = c_.batch * max_pages + 1;
  std::vector<std::int32_t> pages(static_cast<std::size_t>(num_pages));
  std::iota(pages.begin(), pages.end(), 0);
  for (std::size_t i = pages.size() - 1; i > 0; --i) {
    std::swap(pages[i], pages[static_cast<std::size_t>(r.integer(0, static_cast<std::int64_t>(i)))]);
  }
  block_table_ = Tensor(DType::kInt32, {c_.batch, max_pages}, kPoison, gaps_, c_.align);
  seq_lens_ = Tensor(DType::kInt32, {c_.batch}, kPoison);
  for (std::int64_t b = 0; b < c_.batch; ++b) {
    seq_lens_.set({b}, static_cast<double>(requests_[b].kv_len));
    for (std::int64_t i = 0; i < max_pages; ++i) {
      if (i * c_.page_size >= requests_[b].kv_len) {
        block_table_.set({b, i}, r.pick<double>({-1, -2147483648.0, 2147483647.0}));  // never read
      } else if (i < shared && b > 0) {
        block_table_.set({b, i}, block_table_.get({0, i}));
      } else {
        block_table_.set({b, i}, pages.back());
        pages.pop_back();
      }
    }
  }

  cache_ = std::make_unique<KVCache>(CacheConfig{.num_pages = num_pages,
                                                 .page_size = c_.page_size,
                                                 .num_kv_heads = c_.kv_heads,
                                                 .head_dim = c_.dim,
                                                 .head_dim_v = c_.dim_v,
                                                 .format = c_.format,
                                                 .partition = c_.cache_partition,
                                                 .page_bounds = true});
  for (std::int64_t b = 0; b < c_.batch; ++b) {
    // In two steps, so that pages and partitions are continued.
    const std::int64_t begin = b == 0 ? 0 : shared * c_.page_size, end = requests_[b].kv_len;
    const std::int64_t middle = r.integer(begin, end);
    for (const auto& [from, to] : {std::pair(begin, middle), std::pair(middle, end)}) {
      if (from == to) continue;
      Tensor k(DType::kFloat32, {1, to - from, c_.kv_heads, c_.dim}, kPoison);
      Tensor v(DType::kFloat32, {1, to - from, c_.kv_heads, c_.dim_v}, kPoison);
      for (const Tensor* x : {&k, &v}) {
        for (std::int64_t i = 0; i < x->view.numel(); ++i) x->view.as<float>()[i] = r.normal();
      }
      Tensor start(DType::kInt32, {1}, kPoison), lengths(DType::kInt32, {1}, kPoison);
      start.set({0}, static_cast<double>(from));
      TensorView row = block_table_.view;
      row.data = block_table_.row({b});
      row.shape[0] = 1;
      cache_->append(k.view, v.view, row, start.view, lengths.view);
    }
  }
}

void Sample::make_block_mask(Random& r) {
  std::int64_t q_len = 0, kv_len = 0;
  for (const Lengths& request : requests_) {
    q_len = std::max(q_len, request.q_len);
    kv_len = std::max(kv_len, request.kv_len);
  }
  std::vector<std::int64_t> shape = {ceil_div(q_len, c_.block_q), ceil_div(kv_len, c_.block_k)};
  if (c_.mask_rank >= 3) shape.insert(shape.begin(), c_.mask_heads);
  if (c_.mask_rank == 4) shape.insert(shape.begin(), c_.mask_batch);
  mask_ = Tensor(DType::kBool, shape, std::byte{0}, gaps_, c_.align);
  const TensorView& m = mask_.view;
  // As rank 4 with leading axes of size 1.
  const int lead = 4 - m.rank;
  std::array<std::int64_t, 4> sizes = {1, 1, 1, 1}, strides = {0, 0, 0, 0};
  for (int i = 0; i < m.rank; ++i) {
    sizes[lead + i] = m.shape[i];
    strides[lead + i] = m.strides[i];
  }
  for (std::int64_t b = 0; b < sizes[0]; ++b) {
    for (std::int64_t h = 0; h < sizes[1]; ++h) {
      for (std::int64_t i = 0; i < sizes[2]; ++i) {
        for (std::int64_t j = 0; j < sizes[3]; ++j) {
          m.as<bool>()[b * strides[0] + h * strides[1] + i * strides[2] + j * strides[3]] = r.chance(c_.density);
        }
      }
    }
  }
}

// The number of a token list, in the order in which make_token_lists() makes them.
std::int64_t Sample::list_of(std::int64_t b, std::int64_t i, std::int64_t kv_head) const {
  if (c_.pattern == Pattern::kTokens) return b * c_.kv_heads + kv_head;
  const std::int64_t query = c_.packed ? requests_[b].q_first + i : b * c_.q_len + i;
  return query * c_.kv_heads + kv_head;
}

void Sample::make_token_lists(Random& r) {
  // [B, Hkv, n] is a list a request, also where B happens to be the number of all queries of a packed batch.
  if (c_.packed && q_.view.shape[0] == c_.batch) c_.pattern = Pattern::kTokens;
  const bool per_query = c_.pattern == Pattern::kQueryTokens;
  std::vector<std::int64_t> shape = {c_.batch, c_.kv_heads};
  if (per_query) {
    shape = c_.packed ? std::vector<std::int64_t>{q_.view.shape[0], c_.kv_heads}
                      : std::vector<std::int64_t>{c_.batch, c_.q_len, c_.kv_heads};
  }
  const std::int64_t lists = std::accumulate(shape.begin(), shape.end(), std::int64_t{1}, std::multiplies<>());
  listed_.assign(static_cast<std::size_t>(lists), {});
  std::int64_t longest = 0;
  for (std::int64_t b = 0; b < c_.batch; ++b) {
    for (std::int64_t i = 0; i < (per_query ? requests_[b].q_len : 1); ++i) {
      for (std::int64_t h = 0; h < c_.kv_heads; ++h) {
        std::vector<bool>& list = listed_[static_cast<std::size_t>(list_of(b, i, h))];
        const double density = r.chance(0.1) ? 0.0 : c_.density;
        for (std::int64_t j = 0; j < requests_[b].kv_len; ++j) list.push_back(r.chance(density));
        longest = std::max<std::int64_t>(longest, std::count(list.begin(), list.end(), true));
      }
    }
  }
  if (c_.lengths) lengths_ = Tensor(DType::kInt32, shape, kPoison, gaps_, c_.align);
  shape.push_back(longest + r.integer(0, 2));
  indices_ = Tensor(DType::kInt32, shape, kPoison, gaps_, c_.align);  // -1
  for (std::int64_t b = 0; b < c_.batch; ++b) {
    for (std::int64_t i = 0; i < (per_query ? requests_[b].q_len : 1); ++i) {
      for (std::int64_t h = 0; h < c_.kv_heads; ++h) {
        const std::vector<bool>& list = listed_[static_cast<std::size_t>(list_of(b, i, h))];
        const std::int64_t first = per_query ? (c_.packed ? requests_[b].q_first + i : b) : b;
        const bool rank4 = per_query && !c_.packed;
        std::int32_t* row =
            reinterpret_cast<std::int32_t*>(rank4 ? indices_.row({first, i, h}) : indices_.row({first, h}));
        std::int32_t n = 0;
        for (std::size_t j = 0; j < list.size(); ++j) {
          if (list[j]) row[n++] = static_cast<std::int32_t>(j);
        }
        if (!c_.lengths) continue;
        for (std::int64_t k = n; k < indices_.view.shape[indices_.view.rank - 1]; ++k)
          row[k] = 2147483647;  // never read
        *reinterpret_cast<std::int32_t*>(rank4 ? lengths_.row({first, i, h}) : lengths_.row({first, h})) = n;
      }
    }
  }
}

// Every row of k and v that no query reads becomes NaN, pages and slots without a token included, and scales that
// belong to such rows alone. int8 has no NaN: it becomes -128, which nothing else is.
void Sample::poison(Random& r) {
  std::unordered_set<const std::byte*> seen_rows;
  std::unordered_map<float*, bool> scales;  // whether a row that uses it is seen
  std::vector<RowRef> rows;
  for (std::int64_t b = 0; b < c_.batch; ++b) {
    for (std::int64_t h = 0; h < c_.kv_heads; ++h) {
      std::vector<std::int64_t> seen_keys;
      const std::int64_t group = c_.q_heads / c_.kv_heads;
      for (std::int64_t j = 0; j < requests_[b].kv_len; ++j) {
        bool seen = false;
        for (std::int64_t q = 0; !seen && q < group * requests_[b].q_len; ++q) {
          seen = sees(b, h * group + q % group, q / group, j);
        }
        if (seen) seen_keys.push_back(j);
        for (const RowRef& row : {key_row(b, j, h), value_row(b, j, h)}) {
          if (seen) seen_rows.insert(row.data);
          if (row.own_scale) scales[row.scale] |= seen;
          rows.push_back(row);
        }
      }
      if (!c_.poison_seen || seen_keys.empty()) continue;
      const std::int64_t victim =
          seen_keys[static_cast<std::size_t>(r.integer(0, static_cast<std::int64_t>(seen_keys.size()) - 1))];
      const RowRef key = key_row(b, victim, h), value = value_row(b, victim, h);
      const double bad = r.pick({NAN, INFINITY, -INFINITY});
      if (value.dtype == DType::kFloat8E4M3) value.data[r.integer(0, c_.dim_v - 1)] = kPoison;
      if (!is_quantized(value.dtype)) store_from_double(value.data, value.dtype, r.integer(0, c_.dim_v - 1), bad);
      if (r.chance(0.5) && !is_quantized(key.dtype))
        store_from_double(key.data, key.dtype, r.integer(0, c_.dim - 1), NAN);
    }
  }
  if (!c_.gaps) return;
  const auto ruin = [&](const RowRef& row, std::int64_t dim) {
    if (seen_rows.contains(row.data)) return;
    std::memset(row.data, row.dtype == DType::kInt8 ? 0x80 : 0xff, static_cast<std::size_t>(dim) * size_of(row.dtype));
  };
  for (std::size_t i = 0; i < rows.size(); i += 2) {
    ruin(rows[i], c_.dim);
    ruin(rows[i + 1], c_.dim_v);
  }
  if (cache_ != nullptr) {
    const TensorView k = cache_->k(), v = cache_->v(), scale = cache_->k_scale();
    const auto size_k = static_cast<std::int64_t>(size_of(k.dtype)),
               size_v = static_cast<std::int64_t>(size_of(v.dtype));
    for (std::int64_t page = 0; page < k.shape[0]; ++page) {
      for (std::int64_t h = 0; h < c_.kv_heads; ++h) {
        for (std::int64_t slot = 0; slot < c_.page_size; ++slot) {
          const auto at = [&](const TensorView& x) {
            return page * x.strides[0] + h * x.strides[1] + slot * x.strides[2];
          };
          ruin({.data = k.as<std::byte>() + at(k) * size_k, .dtype = k.dtype}, c_.dim);
          ruin({.data = v.as<std::byte>() + at(v) * size_v, .dtype = v.dtype}, c_.dim_v);
        }
      }
    }
    if (c_.format == CacheFormat::kInt8A) {
      for (std::int64_t i = 0; i < scale.numel(); ++i) scales.try_emplace(scale.as<float>() + i, false);
    }
  }
  for (const auto& [scale, seen] : scales) {
    if (!seen) *scale = NAN;
  }
}

bool Sample::sees(std::int64_t b, std::int64_t h, std::int64_t i, std::int64_t j) const {
  const auto& [q_len, kv_len, q_first, k_first] = requests_[b];
  const std::int64_t p = i + kv_len - q_len;
  if (c_.causal && j > p) return false;
  if (c_.left && j < p - *c_.left) return false;
  if (c_.right && j > p + *c_.right) return false;
  switch (c_.pattern) {
    case Pattern::kNone: return true;
    case Pattern::kWindow:
      return j < c_.n_global ||
             ((!c_.select_left || j >= p - *c_.select_left) && (!c_.select_right || j <= p + *c_.select_right));
    case Pattern::kStrided: return p - j < c_.width || (p - j) % c_.stride == 0;
    case Pattern::kBlocks: {
      const std::int64_t row = i / c_.block_q, column = j / c_.block_k;
      const std::int64_t head = c_.mask_heads == 1            ? 0
                                : c_.mask_heads == c_.q_heads ? h
                                                              : h / (c_.q_heads / c_.kv_heads);
      if (c_.mask_rank == 2) return mask_.get({row, column}) != 0.0;
      if (c_.mask_rank == 3) return mask_.get({head, row, column}) != 0.0;
      return mask_.get({c_.mask_batch == 1 ? 0 : b, head, row, column}) != 0.0;
    }
    case Pattern::kTokens:
    case Pattern::kQueryTokens:
      return listed_[static_cast<std::size_t>(list_of(b, i, h / (c_.q_heads / c_.kv_heads)))]
                    [static_cast<std::size_t>(j)];
  }
  return false;
}

std::byte* Sample::query_row(std::int64_t b, std::int64_t i, std::int64_t h) const {
  return c_.packed ? q_.row({requests_[b].q_first + i, h}) : q_.row({b, i, h});
}

Sample::RowRef Sample::row_of(const Tensor& x, const Tensor& scale, const Tensor& mean, std::int64_t partition,
                              std::int64_t b, std::int64_t first, std::int64_t token, std::int64_t h) const {
  const std::int64_t slot = first + token;
  RowRef row{.data = c_.packed ? x.row({slot, h}) : x.row({b, slot, h}), .dtype = x.view.dtype};
  if (scale.view.given()) {
    row.own_scale = partition > 0;
    row.scale = reinterpret_cast<float*>(partition == 0 ? scale.row({0})
                                         : c_.packed    ? scale.row({slot / partition, h})
                                                        : scale.row({b, slot / partition, h}));
  }
  if (mean.view.given()) row.mean = reinterpret_cast<const float*>(c_.packed ? mean.row({h}) : mean.row({b, h}));
  return row;
}

Sample::RowRef Sample::key_row(std::int64_t b, std::int64_t j, std::int64_t h) const {
  if (cache_ == nullptr) return row_of(k_, k_scale_, k_mean_, c_.k_partition, b, requests_[b].k_first, j, h);
  const TensorView k = cache_->k(), scale = cache_->k_scale();
  const auto page = static_cast<std::int64_t>(block_table_.get({b, j / c_.page_size})), slot = j % c_.page_size;
  RowRef row{.data = k.as<std::byte>() + (page * k.strides[0] + h * k.strides[1] + slot * k.strides[2]) *
                                             static_cast<std::int64_t>(size_of(k.dtype)),
             .dtype = k.dtype};
  if (scale.given()) {
    row.own_scale = c_.format == CacheFormat::kInt8A;
    row.scale = scale.as<float>();
    if (row.own_scale)
      row.scale += page * scale.strides[0] + h * scale.strides[1] + slot / c_.cache_partition * scale.strides[2];
  }
  return row;
}

Sample::RowRef Sample::value_row(std::int64_t b, std::int64_t j, std::int64_t h) const {
  if (cache_ == nullptr) return row_of(v_, v_scale_, v_mean_, c_.v_partition, b, requests_[b].k_first, j, h);
  const TensorView v = cache_->v();
  const auto page = static_cast<std::int64_t>(block_table_.get({b, j / c_.page_size})), slot = j % c_.page_size;
  return {.data = v.as<std::byte>() + (page * v.strides[0] + h * v.strides[1] + slot * v.strides[2]) *
                                          static_cast<std::int64_t>(size_of(v.dtype)),
          .dtype = v.dtype,
          .scale = cache_->v_scale().as<float>()};
}

Sample::Meaning Sample::meaning(std::int64_t b) const {
  const auto append = [](std::vector<double>& to, const RowRef& row, std::int64_t dim) {
    for (std::int64_t d = 0; d < dim; ++d) {
      double x = load_as_double(row.data, row.dtype, d);
      if (row.scale != nullptr) x *= *row.scale;
      if (row.mean != nullptr) x += row.mean[d];
      to.push_back(x);
    }
  };
  Meaning m;
  for (std::int64_t i = 0; i < requests_[b].q_len; ++i) {
    for (std::int64_t h = 0; h < c_.q_heads; ++h) {
      if (cache_ == nullptr) {
        append(m.q, row_of(q_, q_scale_, {}, c_.q_partition, b, requests_[b].q_first, i, h), c_.dim);
        continue;
      }
      append(m.q, {.data = query_row(b, i, h), .dtype = c_.q}, c_.dim);
      if (cache_->k().dtype != DType::kInt8) continue;
      // INT8 caches: the query in steps of max|q| / 127, or of the cache's static scale, in float32.
      const auto row = m.q.end() - c_.dim;
      float step = 0.0f;
      for (auto x = row; x != m.q.end(); ++x) step = std::max(step, std::fabs(static_cast<float>(*x)) / 127.0f);
      if (c_.format == CacheFormat::kInt8Baseline && *cache_->q_scale().as<float>() > 0.0f)
        step = *cache_->q_scale().as<float>();
      for (auto x = row; x != m.q.end(); ++x) {
        const float n = step == 0.0f ? 0.0f : std::nearbyint(static_cast<float>(*x) / step);
        *x = static_cast<double>(std::clamp(n, -127.0f, 127.0f)) * step;
      }
    }
  }
  for (std::int64_t j = 0; j < requests_[b].kv_len; ++j) {
    for (std::int64_t h = 0; h < c_.kv_heads; ++h) {
      append(m.k, key_row(b, j, h), c_.dim);
      append(m.v, value_row(b, j, h), c_.dim_v);
    }
  }
  return m;
}

double Sample::scale() const { return c_.scale.value_or(1.0 / std::sqrt(static_cast<double>(c_.dim))); }

bool Sample::rounds_probabilities() const {
  const DType k = cache_ != nullptr ? cache_->k().dtype : c_.k, v = cache_ != nullptr ? cache_->v().dtype : c_.v;
  const bool integer_scores = k == DType::kInt8 && (cache_ != nullptr || c_.q == DType::kInt8);
  const auto fits = [](DType d) { return d == DType::kBFloat16 || is_quantized(d); };
  return (integer_scores || (c_.q == DType::kBFloat16 && fits(k))) && fits(v) &&
         (cache_ != nullptr || c_.v_partition == 0);
}

namespace {

template <class Params>
void set_options(const Case& c, TensorView mask, TensorView indices, TensorView lengths, Params& p) {
  p.causal = c.causal;
  if (c.left || c.right) p.window = Window{c.left, c.right};
  p.softcap = c.softcap;
  p.scale = c.scale;
  switch (c.pattern) {
    case Pattern::kNone: break;
    case Pattern::kWindow: p.selection = Selection::window(c.select_left, c.select_right, c.n_global); break;
    case Pattern::kStrided: p.selection = Selection::strided(c.width, c.stride); break;
    case Pattern::kBlocks: p.selection = Selection::block_mask(mask, c.block_q, c.block_k); break;
    case Pattern::kTokens:
    case Pattern::kQueryTokens: p.selection = Selection::tokens(indices, lengths); break;
  }
  p.schedule = {c.schedule, c.split_size};
}

}  // namespace

AttentionParams Sample::attention(const Placement& place) const {
  const auto placed = [&](const Tensor& x) { return x.view.given() ? place(x) : TensorView(); };
  AttentionParams p{.q = placed(q_), .k = placed(k_), .v = placed(v_)};
  p.q_scales = {placed(q_scale_), c_.q_partition, {}};
  p.k_scales = {placed(k_scale_), c_.k_partition, placed(k_mean_)};
  p.v_scales = {placed(v_scale_), c_.v_partition, placed(v_mean_)};
  p.cu_seqlens_q = placed(cu_q_);
  p.cu_seqlens_k = placed(cu_k_);
  p.sinks = placed(sinks_);
  set_options(c_, placed(mask_), placed(indices_), placed(lengths_), p);
  return p;
}

DecodeParams Sample::decode(const Placement& place, KVCache* cache) const {
  const auto placed = [&](const Tensor& x) { return x.view.given() ? place(x) : TensorView(); };
  DecodeParams p{.q = placed(q_),
                 .cache = cache != nullptr ? cache : cache_.get(),
                 .block_table = placed(block_table_),
                 .seq_lens = placed(seq_lens_)};
  p.sinks = placed(sinks_);
  set_options(c_, placed(mask_), placed(indices_), placed(lengths_), p);
  return p;
}

Output::Output(const Sample& sample, DType out_dtype, DType lse_dtype) {
  const Case& c = sample.spec();
  Random layout(c.seed + 2);
  Random* gaps = c.gaps ? &layout : nullptr;
  if (c.packed) {
    const std::int64_t total = sample.attention().q.shape[0];
    out = Tensor(out_dtype, {total, c.q_heads, c.dim_v}, kUntouched, gaps, c.align);
    if (c.lse) lse = Tensor(lse_dtype, {c.q_heads, total}, kUntouched, gaps, c.align);
  } else {
    out = Tensor(out_dtype, {c.batch, c.q_len, c.q_heads, c.dim_v}, kUntouched, gaps, c.align);
    if (c.lse) lse = Tensor(lse_dtype, {c.batch, c.q_heads, c.q_len}, kUntouched, gaps, c.align);
  }
}

void Output::run(const Sample& sample, Backend backend, ScheduleKind schedule) {
  const auto call = [&](auto params, auto&& function) {
    params.out = out.view;
    params.lse = lse.view;
    params.backend = backend;
    params.schedule.kind = schedule;
    function(params);
  };
  if (sample.spec().op == Op::kAttention) {
    call(sample.attention(), heddle::attention);
  } else {
    call(sample.decode(), heddle::decode);
  }
}

double Output::out_at(const Sample& sample, std::int64_t b, std::int64_t i, std::int64_t h, std::int64_t d) const {
  return sample.spec().packed ? out.get({sample.requests()[b].q_first + i, h, d}) : out.get({b, i, h, d});
}

double Output::lse_at(const Sample& sample, std::int64_t b, std::int64_t h, std::int64_t i) const {
  return sample.spec().packed ? lse.get({h, sample.requests()[b].q_first + i}) : lse.get({b, h, i});
}

bool Output::rest_untouched(const Sample& sample) const {
  const Case& c = sample.spec();
  const auto check = [](const Tensor& x, const std::vector<std::byte*>& rows, std::size_t row_bytes) {
    std::vector<bool> owned(x.memory.size());
    for (const std::byte* row : rows) {
      std::fill_n(owned.begin() + (row - x.memory.data()), row_bytes, true);
    }
    for (std::size_t i = 0; i < owned.size(); ++i) {
      if (!owned[i] && x.memory[i] != kUntouched) return false;
    }
    return true;
  };
  std::vector<std::byte*> out_rows, lse_rows;
  for (std::int64_t b = 0; b < c.batch; ++b) {
    const auto& [q_len, kv_len, q_first, k_first] = sample.requests()[b];
    for (std::int64_t i = 0; i < q_len; ++i) {
      for (std::int64_t h = 0; h < c.q_heads; ++h) {
        out_rows.push_back(c.packed ? out.row({q_first + i, h}) : out.row({b, i, h}));
        if (c.lse) lse_rows.push_back(c.packed ? lse.row({h, q_first + i}) : lse.row({b, h, i}));
      }
    }
  }
  return check(out, out_rows, static_cast<std::size_t>(c.dim_v) * size_of(out.view.dtype)) &&
         (!c.lse || check(lse, lse_rows, size_of(lse.view.dtype)));
}

}  // namespace heddle::testing
