// A user of the installed library: attention over a handful of tokens whose answer is known in closed form.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <vector>

#include "heddle/heddle.h"
#include "heddle/version.h"

int main(int argc, char** argv) {
  if (argc == 2 && std::strcmp(argv[1], HEDDLE_VERSION_STRING) != 0) {
    std::fprintf(stderr, "installed headers say %s, the build said %s\n", HEDDLE_VERSION_STRING, argv[1]);
    return 1;
  }

  // Zero queries weigh every visible key alike: causal row i is the mean of v_0..v_i, and its lse is log(i + 1).
  constexpr int kTokens = 5, kHeads = 2, kDim = 3;
  std::vector<float> q(kTokens * kHeads * kDim, 0.0f), k(q.size(), 1.0f), v(q.size()), out(q.size(), -1.0f);
  std::vector<float> lse(kTokens * kHeads, -1.0f);
  for (int i = 0; i < kTokens; ++i) {
    for (int x = 0; x < kHeads * kDim; ++x) v[i * kHeads * kDim + x] = static_cast<float>(i);
  }
  const auto view = [&](std::vector<float>& x) {
    return heddle::TensorView(x.data(), heddle::DType::kFloat32, {1, kTokens, kHeads, kDim});
  };
  heddle::attention({.q = view(q),
                     .k = view(k),
                     .v = view(v),
                     .out = view(out),
                     .lse = heddle::TensorView(lse.data(), heddle::DType::kFloat32, {1, kHeads, kTokens}),
                     .causal = true});
  for (int i = 0; i < kTokens; ++i) {
    const float mean = 0.5f * static_cast<float>(i), log_count = std::log(static_cast<float>(i + 1));
    for (int h = 0; h < kHeads; ++h) {
      const float got = out[(i * kHeads + h) * kDim], got_lse = lse[h * kTokens + i];
      if (std::fabs(got - mean) > 1e-5f || std::fabs(got_lse - log_count) > 1e-5f) {
        std::fprintf(stderr, "token %d head %d: out %g lse %g, expected %g and %g\n", i, h, got, got_lse, mean,
                     log_count);
        return 1;
      }
    }
  }

  // The longest value of those that all score alike, and the newest: what the last query reads is their mean.
  heddle::AttentionParams call{.q = view(q), .k = view(k), .v = view(v), .out = view(out), .causal = true};
  std::fill_n(v.begin() + kHeads * kDim, kHeads * kDim, 9.0f);
  call.selection =
      heddle::select::topk(call, {.budget = {.count = 2}, .metric = heddle::select::Metric::kOam, .n_recent = 1});
  heddle::attention(call);
  if (std::fabs(out.back() - 0.5f * (9.0f + v.back())) > 1e-5f || call.selection.density() != 9.0 / 15.0) {
    std::fprintf(stderr, "two tokens of five: %g, density %g\n", out.back(), call.selection.density());
    return 1;
  }

  try {
    heddle::attention({.q = view(q), .k = view(k), .v = view(v), .out = view(out), .softcap = -1.0f});
    std::fprintf(stderr, "a negative softcap was accepted\n");
    return 1;
  } catch (const heddle::Error& error) {
    if (error.argument() != "softcap") {
      std::fprintf(stderr, "a negative softcap was blamed on '%s'\n", error.argument().c_str());
      return 1;
    }
  }
  std::printf("heddle %s, host kernels for %.*s\n", HEDDLE_VERSION_STRING, static_cast<int>(heddle::host_isa().size()),
              heddle::host_isa().data());
  return 0;
}
