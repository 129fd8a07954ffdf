#include <cstdint>
#include <cstdio>
#include <numeric>
#include <vector>

#include "heddle/heddle.h"

using heddle::DType;
using heddle::TensorView;

int main() {
  constexpr int kQueryHeads = 8, kKvHeads = 2, kDim = 64, kPrompt = 500, kPages = 64;
  heddle::KVCache cache({.num_pages = kPages,
                         .page_size = 16,
                         .num_kv_heads = kKvHeads,
                         .head_dim = kDim,
                         .format = heddle::CacheFormat::kInt8A});

  // The engine's own memory, which heddle reads and writes where it lies. One request owns all pages.
  std::vector<std::int32_t> pages(kPages), start{0}, seq_lens{0};
  std::iota(pages.begin(), pages.end(), 0);
  const TensorView block_table(pages.data(), DType::kInt32, {1, kPages});
  const TensorView start_view(start.data(), DType::kInt32, {1});
  const TensorView lengths(seq_lens.data(), DType::kInt32, {1});

  std::vector<float> k(kPrompt * kKvHeads * kDim, 0.5f), v = k, q(kQueryHeads * kDim, 0.1f), out(q.size());
  const auto tokens = [](std::vector<float>& x, int count, int heads) {
    return TensorView(x.data(), DType::kFloat32, {1, count, heads, kDim});
  };
  const auto append = [&](int count) {
    start = seq_lens;
    cache.append(tokens(k, count, kKvHeads), tokens(v, count, kKvHeads), block_table, start_view, lengths);
  };

  try {
    append(kPrompt);
    for (int step = 0; step < 3; ++step) {
      append(1);
      heddle::decode({.q = tokens(q, 1, kQueryHeads),
                      .cache = &cache,
                      .block_table = block_table,
                      .seq_lens = lengths,
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
