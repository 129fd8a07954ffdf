// decode/<format>/<requests>x<keys>: one query token a request, 32 query heads over 8 KV heads, D 128, pages of 64
// tokens in shuffled order.
#include <algorithm>
#include <numeric>
#include <random>
#include <string>

#include "bench.h"

namespace heddle::bench {
namespace {

constexpr std::int64_t kQueryHeads = 32, kKvHeads = 8, kDim = 128, kPageSize = 64;

void decode_token(benchmark::State& state, CacheFormat format, std::int64_t batch, std::int64_t keys) {
  const std::int64_t pages = (keys + kPageSize - 1) / kPageSize;
  KVCache cache({.num_pages = batch * pages,
                 .page_size = kPageSize,
                 .num_kv_heads = kKvHeads,
                 .head_dim = kDim,
                 .format = format});
  const Tensor block_table(DType::kInt32, {batch, pages}), start(DType::kInt32, {batch}),
      seq_lens(DType::kInt32, {batch});
  std::iota(block_table.as<std::int32_t>(), block_table.as<std::int32_t>() + batch * pages, 0);
  std::shuffle(block_table.as<std::int32_t>(), block_table.as<std::int32_t>() + batch * pages, std::mt19937(0));
  std::fill_n(start.as<std::int32_t>(), batch, 0);
  {
    const Tensor k = Tensor::random(DType::kFloat32, {batch, keys, kKvHeads, kDim}),
                 v = Tensor::random(DType::kFloat32, {batch, keys, kKvHeads, kDim});
    cache.append(k, v, block_table, start, seq_lens);
  }
  const DType dtype = format == CacheFormat::kFp32 ? DType::kFloat32 : DType::kBFloat16;
  const Tensor q = Tensor::random(dtype, {batch, 1, kQueryHeads, kDim}), out(dtype, {batch, 1, kQueryHeads, kDim});
  DecodeParams params{.q = q, .cache = &cache, .block_table = block_table, .seq_lens = seq_lens, .out = out};

  // K and V as stored and K's scales; value norms are not read.
  double kv_bytes = 2.0 * static_cast<double>(kDim * size_of(cache.k().dtype));
  if (cache.k_scale().given() && cache.k_scale().numel() > 1) kv_bytes += sizeof(float);
  const double tokens = static_cast<double>(batch * keys * kKvHeads);
  const double flops = 2.0 * static_cast<double>(batch * keys * kQueryHeads * kDim);
  measure(state, Start::kCold,
          {.qk_flops = flops,
           .pv_flops = flops,
           .bytes = tokens * kv_bytes + 2.0 * static_cast<double>(batch * kQueryHeads * kDim * size_of(dtype))},
          [&] { decode(params); });
}

}  // namespace

void register_decode() {
  for (const CacheFormat format :
       {CacheFormat::kFp32, CacheFormat::kBf16, CacheFormat::kFp16, CacheFormat::kInt8Baseline, CacheFormat::kInt8A,
        CacheFormat::kInt8B, CacheFormat::kFp8}) {
    for (const auto& [batch, keys] : {std::pair{1, 32768}, std::pair{8, 4096}}) {
      const std::string name =
          "decode/" + std::string(to_string(format)) + "/" + std::to_string(batch) + "x" + std::to_string(keys);
      add_case(name, [=](benchmark::State& state) { decode_token(state, format, batch, keys); });
    }
  }
}

}  // namespace heddle::bench
