// prefill/<dtype>/<mask>/d<D>/s<S>: one request, 4 heads, self-attention over contiguous tensors.
#include <string>

#include "bench.h"

namespace heddle::bench {
namespace {

constexpr std::int64_t kHeads = 4;

enum class Mask { kFull, kCausal, kWindow };
enum class Type { kFp32, kBf16, kInt8B };  // int8-b: Q by token, K and V by tensor

std::string to_string(Mask mask) {
  return mask == Mask::kFull ? "full" : mask == Mask::kCausal ? "causal" : "window1024+64";
}
std::string to_string(Type type) { return type == Type::kFp32 ? "fp32" : type == Type::kBf16 ? "bf16" : "int8-b"; }

struct Quantized {
  Quantized(const Tensor& x, std::int64_t seq, std::int64_t dim, std::int64_t partition)
      : data(DType::kInt8, {1, seq, kHeads, dim}),
        scale(partition == 0 ? Tensor(DType::kFloat32, {1})
                             : Tensor(DType::kFloat32, {1, (seq + partition - 1) / partition, kHeads})) {
    scales = {.scale = scale, .partition = partition};
    quantize(x, data, scales);
  }
  Tensor data, scale;
  QuantScales scales;
};

void prefill(benchmark::State& state, Type type, Mask mask, std::int64_t dim, std::int64_t seq) {
  const DType dtype = type == Type::kBf16 ? DType::kBFloat16 : DType::kFloat32;
  const Tensor q = Tensor::random(dtype, {1, seq, kHeads, dim}), k = Tensor::random(dtype, {1, seq, kHeads, dim}),
               v = Tensor::random(dtype, {1, seq, kHeads, dim}), out(dtype, {1, seq, kHeads, dim});
  AttentionParams params{.q = q, .k = k, .v = v, .out = out, .causal = mask != Mask::kFull};
  if (mask == Mask::kWindow) params.selection = Selection::window(1024, 0, 64);
  std::optional<Quantized> q8, k8, v8;
  if (type == Type::kInt8B) {
    q8.emplace(q, seq, dim, 1);
    k8.emplace(k, seq, dim, 0);
    v8.emplace(v, seq, dim, 0);
    params.q = q8->data;
    params.k = k8->data;
    params.v = v8->data;
    params.q_scales = q8->scales;
    params.k_scales = k8->scales;
    params.v_scales = v8->scales;
  }

  const double flops =
      2.0 * visible_pairs(seq, seq, params.causal, params.selection) * kHeads * static_cast<double>(dim);
  const double bytes = static_cast<double>(seq * kHeads * dim) *
                       static_cast<double>(3 * size_of(params.q.dtype) + size_of(params.out.dtype));
  const Math products = type == Type::kFp32 ? Math::kFloat32 : Math::kBFloat16;
  measure(state, Start::kWarm,
          {.qk_flops = flops,
           .pv_flops = flops,
           .qk_math = type == Type::kInt8B ? Math::kInt8 : products,
           .pv_math = products,  // probabilities stay in 16 bits
           .bytes = bytes},
          [&] { attention(params); });
}

}  // namespace

void register_attention() {
  for (const Type type : {Type::kFp32, Type::kBf16, Type::kInt8B}) {
    for (const Mask mask : {Mask::kFull, Mask::kCausal, Mask::kWindow}) {
      for (const std::int64_t dim : {64, 128}) {
        for (const std::int64_t seq : {1024, 2048, 4096, 8192, 16384}) {
          // The window is for long prompts; a full 16384 would take longer than all the rest.
          if (mask == Mask::kWindow ? seq < 4096 : seq == 16384 && (mask == Mask::kFull || dim == 128)) continue;
          const std::string name = "prefill/" + to_string(type) + "/" + to_string(mask) + "/d" + std::to_string(dim) +
                                   "/s" + std::to_string(seq);
          add_case(name, [=](benchmark::State& state) { prefill(state, type, mask, dim, seq); });
        }
      }
    }
  }
}

}  // namespace heddle::bench
