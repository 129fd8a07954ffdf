#include "support/naive.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "core/numeric.h"

namespace heddle::testing {
namespace {

double rounded(double x, DType dtype) {
  alignas(8) std::byte bytes[8];
  store_from_double(bytes, dtype, 0, x);
  return load_as_double(bytes, dtype, 0);
}

}  // namespace

template <class T>
Result naive_attention(const Sample& sample, std::int64_t request, DType probability, DType out_dtype) {
  const Case& c = sample.spec();
  const auto [q_len, kv_len, q_first, k_first] = sample.requests()[static_cast<std::size_t>(request)];
  const Sample::Meaning meaning = sample.meaning(request);
  const std::vector<T> q(meaning.q.begin(), meaning.q.end()), k(meaning.k.begin(), meaning.k.end()),
      v(meaning.v.begin(), meaning.v.end());
  constexpr T kInf = std::numeric_limits<T>::infinity();
  const T scale = static_cast<T>(sample.scale()), softcap = static_cast<T>(c.softcap);
  const std::int64_t group = c.q_heads / c.kv_heads;

  Result result;
  result.out.resize(static_cast<std::size_t>(q_len * c.q_heads * c.dim_v));
  result.size = result.out;
  result.lse.resize(static_cast<std::size_t>(c.q_heads * q_len));
  std::vector<T> scores(static_cast<std::size_t>(kv_len)), out(static_cast<std::size_t>(c.dim_v)), size(out.size());
  for (std::int64_t h = 0; h < c.q_heads; ++h) {
    for (std::int64_t i = 0; i < q_len; ++i) {
      const T* qi = q.data() + (i * c.q_heads + h) * c.dim;
      const T sink = static_cast<T>(sample.sink(h));
      std::vector<bool> seen(scores.size());
      T max = sink;
      for (std::int64_t j = 0; j < kv_len; ++j) {
        if (!(seen[j] = sample.sees(request, h, i, j))) continue;
        const T* kj = k.data() + (j * c.kv_heads + h / group) * c.dim;
        T s = 0;
        for (std::int64_t d = 0; d < c.dim; ++d) s += qi[d] * kj[d];
        s *= scale;
        if (softcap > 0) s = softcap * std::tanh(s / softcap);
        scores[j] = s;
        if (!(s <= max)) max = s;
      }
      std::fill(out.begin(), out.end(), T{0});
      std::fill(size.begin(), size.end(), T{0});
      T sum = max == -kInf ? T{0} : std::exp(sink - max);
      for (std::int64_t j = 0; j < kv_len; ++j) {
        if (!seen[j]) continue;
        const T weight = std::exp(scores[j] - max);
        sum += weight;
        const T p = static_cast<T>(rounded(weight, probability));
        const T* vj = v.data() + (j * c.kv_heads + h / group) * c.dim_v;
        for (std::int64_t d = 0; d < c.dim_v; ++d) {
          out[d] += p * vj[d];
          size[d] += p * std::fabs(vj[d]);
        }
      }
      const std::int64_t row = (i * c.q_heads + h) * c.dim_v;
      for (std::int64_t d = 0; d < c.dim_v; ++d) {
        result.out[row + d] = sum == 0 ? 0.0 : rounded(out[d] / sum, out_dtype);
        result.size[row + d] = sum == 0 ? 0.0 : size[d] / sum;
      }
      result.lse[h * q_len + i] = sum == 0 ? -std::numeric_limits<double>::infinity() : max + std::log(sum);
    }
  }
  return result;
}

template Result naive_attention<float>(const Sample&, std::int64_t, DType, DType);
template Result naive_attention<double>(const Sample&, std::int64_t, DType, DType);

}  // namespace heddle::testing
