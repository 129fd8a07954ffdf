#include <cstdint>
#include <cstdio>
#include <numeric>
#include <vector>

#include "heddle/heddle.h"

using heddle::DType;
using heddle::TensorView;

int main() {
  constexpr int kQueryHeads = 8, kKvHeads = 2, kDim = 64, kPageSize = 16, kPages = 64, kPrompt = 500;
  heddle::KVCache cache({.num_pages = kPages,
                         .page_size = kPageSize,
                         .num_kv_heads = kKvHeads,
                         .head_dim = kDim,
                         .format = heddle::CacheFormat::kInt8A});

  // The engine's own memory; heddle looks at it where it lies. One request owns all pages here, in order.
  std::vector<std::int32_t> pages(kPages), start{0}, seq_lens{0};
  std::iota(pages.begin(), pages.end(), 0);
  const TensorView block_table(pages.data(), DType::kInt32, {1, kPages});
  const TensorView start_view(start.data(), DType::kInt32, {1}), seq_lens_view(seq_lens.data(), DType::kInt32, {1});
  std::vector<float> k(kPrompt * kKvHeads * kDim, 0.5f), v = k, q(kQueryHeads * kDim, 0.1f), out(q.size());
  const auto tokens = [](std::vector<float>& x, int count, int heads) {
    return TensorView(x.data(), DType::kFloat32, {1, count, heads, kDim});
  };

  try {
    cache.append(tokens(k, kPrompt, kKvHeads), tokens(v, kPrompt, kKvHeads), block_table, start_view, seq_lens_view);
    for (int step = 0; step < 3; ++step) {
      start = seq_lens;
      cache.append(tokens(k, 1, kKvHeads), tokens(v, 1, kKvHeads), block_table, start_view, seq_lens_view);
      heddle::decode({.q = tokens(q, 1, kQueryHeads),
                      .cache = &cache,
                      .block_table = block_table,
                      .seq_lens = seq_lens_view,
                      .out = tokens(out, 1, kQueryHeads),
                      .selection = heddle::Selection::window(255, 0, 16)});
    }
  } catch (const heddle::Error& error) {  // thrown before anything is written
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
  }
  std::printf("%d tokens, %.0f bytes each, %s: %.3f\n", seq_lens[0], cache.bytes_per_token(),
              heddle::last_kernel().c_str(), out[0]);
}
