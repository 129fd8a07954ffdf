// Bad input: every refusal has its code, names its argument, says what is allowed, and comes before anything is
// written.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <functional>
#include <limits>
#include <ostream>
#include <string>
#include <vector>

#include <gtest/gtest.h>

#include "heddle/heddle.h"

namespace heddle {
namespace {

constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();
constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr float kBefore = 7.0f;  // what out and lse hold before a call

// Numbers that live as long as a call.
struct Pool {
  std::vector<std::vector<std::int32_t>> ints;
  std::vector<std::vector<float>> floats;
  std::vector<std::vector<std::uint8_t>> bytes;

  TensorView int32(std::initializer_list<std::int64_t> shape, std::vector<std::int32_t> values) {
    return {ints.emplace_back(std::move(values)).data(), DType::kInt32, shape};
  }
  TensorView float32(std::initializer_list<std::int64_t> shape, float value = 1.0f) {
    const TensorView like(nullptr, DType::kFloat32, shape);
    return {floats.emplace_back(static_cast<std::size_t>(like.numel()) + 1, value).data(), DType::kFloat32, shape};
  }
  TensorView typed(DType dtype, std::initializer_list<std::int64_t> shape) {
    const TensorView like(nullptr, dtype, shape);
    return {bytes.emplace_back(static_cast<std::size_t>(like.numel()) * size_of(dtype) + 1).data(), dtype, shape};
  }
};

TensorView on_gpu(TensorView view) {
  view.device = {DeviceType::kCuda, 0};
  return view;
}

TensorView with_shape(TensorView view, int axis, std::int64_t size) {
  view.shape[static_cast<std::size_t>(axis)] = size;
  return view;
}

TensorView with_stride(TensorView view, int axis, std::int64_t stride) {
  view.strides[static_cast<std::size_t>(axis)] = stride;
  return view;
}

template <class Call>
struct BadInput {
  std::string name;
  ErrorCode code;
  std::string argument;
  std::string says;  // part of the message
  std::function<void(Call&)> spoil;
};

template <class Call>
void PrintTo(const BadInput<Call>& bad, std::ostream* out) {
  *out << bad.name;
}

template <class Call>
class BadInputTest : public ::testing::TestWithParam<BadInput<Call>> {
 protected:
  void check() {
    const BadInput<Call>& bad = this->GetParam();
    Call call;
    try {
      bad.spoil(call);  // selections refuse when they are made
      call.run();
      FAIL() << "no error";
    } catch (const Error& error) {
      EXPECT_EQ(to_string(error.code()), to_string(bad.code)) << error.what();
      EXPECT_EQ(error.argument(), bad.argument) << error.what();
      EXPECT_NE(std::string(error.what()).find(bad.says), std::string::npos) << error.what();
      EXPECT_EQ(std::string(error.what()).rfind(bad.argument + ": ", 0), 0u) << error.what();
    }
    for (const std::vector<float>* written : {&call.out, &call.lse}) {
      EXPECT_TRUE(std::all_of(written->begin(), written->end(), [](float x) { return x == kBefore; }));
    }
  }
};

template <class Call>
std::string test_name(const ::testing::TestParamInfo<BadInput<Call>>& info) {
  return info.param.name;
}

// q [2, 3, 4, 8], k [2, 5, 2, 8], v [2, 5, 2, 6].
struct AttentionCall : Pool {
  std::vector<float> out = std::vector<float>(2 * 3 * 4 * 6, kBefore), lse = std::vector<float>(2 * 4 * 3, kBefore);
  AttentionParams p{.q = float32({2, 3, 4, 8}),
                    .k = float32({2, 5, 2, 8}),
                    .v = float32({2, 5, 2, 6}),
                    .out = {out.data(), DType::kFloat32, {2, 3, 4, 6}},
                    .lse = {lse.data(), DType::kFloat32, {2, 4, 3}}};

  void run() { attention(p); }
  // The same as a packed batch.
  void pack() {
    p.q = float32({6, 4, 8});
    p.k = float32({10, 2, 8});
    p.v = float32({10, 2, 6});
    p.out = {out.data(), DType::kFloat32, {6, 4, 6}};
    p.lse = {lse.data(), DType::kFloat32, {4, 6}};
    p.cu_seqlens_q = int32({3}, {0, 3, 6});
    p.cu_seqlens_k = int32({3}, {0, 5, 10});
  }
  void quantize() {
    p.q = typed(DType::kInt8, {2, 3, 4, 8});
    p.k = typed(DType::kInt8, {2, 5, 2, 8});
    p.v = typed(DType::kInt8, {2, 5, 2, 6});
    p.q_scales = {float32({2, 3, 4}), 1};
    p.k_scales = {float32({2, 3, 2}), 2, float32({2, 2, 8})};
    p.v_scales = {float32({1})};
  }
};

using BadAttention = BadInputTest<AttentionCall>;
TEST_P(BadAttention, IsRefused) { check(); }

using A = AttentionCall;
INSTANTIATE_TEST_SUITE_P(
    Attention, BadAttention,
    ::testing::ValuesIn(std::vector<BadInput<A>>{
        // Tensors
        {"QNotGiven", ErrorCode::kShape, "q", "not given", [](A& c) { c.p.q = {}; }},
        {"VNotGiven", ErrorCode::kShape, "v", "not given", [](A& c) { c.p.v = {}; }},
        {"OutNotGiven", ErrorCode::kShape, "out", "not given", [](A& c) { c.p.out = {}; }},
        {"NullPointer", ErrorCode::kValue, "k", "null", [](A& c) { c.p.k.data = nullptr; }},
        {"NegativeSize", ErrorCode::kShape, "k", "axis 1 is -5", [](A& c) { c.p.k = with_shape(c.p.k, 1, -5); }},
        {"QRank3", ErrorCode::kShape, "q", "rank 3 (shape [6, 4, 8]); allowed is 4",
         [](A& c) { c.p.q = c.float32({6, 4, 8}); }},
        {"KRank3", ErrorCode::kShape, "k", "rank 3", [](A& c) { c.p.k = c.float32({10, 2, 8}); }},
        {"VRank5", ErrorCode::kShape, "v", "rank 5", [](A& c) { c.p.v = c.float32({1, 2, 5, 2, 6}); }},
        {"KBatch", ErrorCode::kShape, "k", "axis 0 (batch) is 3; allowed is 2, as in q",
         [](A& c) { c.p.k = c.float32({3, 5, 2, 8}); }},
        {"VBatch", ErrorCode::kShape, "v", "axis 0 (batch) is 1", [](A& c) { c.p.v = c.float32({1, 5, 2, 6}); }},
        {"VKeys", ErrorCode::kShape, "v", "axis 1 (keys) is 4; allowed is 5",
         [](A& c) { c.p.v = c.float32({2, 4, 2, 6}); }},
        {"VHeads", ErrorCode::kShape, "v", "axis 2 (heads) is 1", [](A& c) { c.p.v = c.float32({2, 5, 1, 6}); }},
        {"KHeadDim", ErrorCode::kShape, "k", "axis 3 (head_dim) is 7; allowed is 8",
         [](A& c) { c.p.k = c.float32({2, 5, 2, 7}); }},
        {"HeadsNotDivisible", ErrorCode::kShape, "q", "4 heads; allowed are multiples of the 3 heads",
         [](A& c) {
           c.p.k = c.float32({2, 5, 3, 8});
           c.p.v = c.float32({2, 5, 3, 6});
         }},
        {"NoQueryHeads", ErrorCode::kShape, "q", "axis 2 (heads) is 0", [](A& c) { c.p.q = c.float32({2, 3, 0, 8}); }},
        {"NoKvHeads", ErrorCode::kShape, "k", "axis 2 (heads) is 0", [](A& c) { c.p.k = c.float32({2, 5, 0, 8}); }},
        {"NoHeadDim", ErrorCode::kShape, "q", "axis 3 (head_dim) is 0", [](A& c) { c.p.q = c.float32({2, 3, 4, 0}); }},
        {"NoHeadDimV", ErrorCode::kShape, "v", "axis 3 (head_dim_v) is 0",
         [](A& c) { c.p.v = c.float32({2, 5, 2, 0}); }},
        {"QStride", ErrorCode::kLayout, "q", "stride 2; allowed is 1", [](A& c) { c.p.q = with_stride(c.p.q, 3, 2); }},
        {"KStride", ErrorCode::kLayout, "k", "stride 0", [](A& c) { c.p.k = with_stride(c.p.k, 3, 0); }},
        {"OutStride", ErrorCode::kLayout, "out", "stride 24", [](A& c) { c.p.out = with_stride(c.p.out, 3, 24); }},
        {"OutOverlaps", ErrorCode::kLayout, "out", "axis 0 has stride 0",
         [](A& c) { c.p.out = with_stride(c.p.out, 0, 0); }},
        {"LseOverlaps", ErrorCode::kLayout, "lse", "axis 1 has stride 0",
         [](A& c) { c.p.lse = with_stride(c.p.lse, 1, 0); }},
        {"OutShape", ErrorCode::kShape, "out", "shape [2, 3, 4, 8]; allowed is [2, 3, 4, 6]",
         [](A& c) { c.p.out = with_shape(c.p.out, 3, 8); }},
        {"LseShape", ErrorCode::kShape, "lse", "allowed is [2, 4, 3]", [](A& c) { c.p.lse = with_shape(c.p.lse, 1, 3); }},
        // Element types
        {"IntegerQ", ErrorCode::kDType, "q", "dtype int32; allowed are float32",
         [](A& c) { c.p.q = c.typed(DType::kInt32, {2, 3, 4, 8}); }},
        {"BoolK", ErrorCode::kDType, "k", "dtype bool", [](A& c) { c.p.k = c.typed(DType::kBool, {2, 5, 2, 8}); }},
        {"Fp8Q", ErrorCode::kDType, "q", "float8_e4m3", [](A& c) { c.p.q = c.typed(DType::kFloat8E4M3, {2, 3, 4, 8}); }},
        {"KOtherFloat", ErrorCode::kDType, "k", "dtype bfloat16; allowed is float32",
         [](A& c) { c.p.k = c.typed(DType::kBFloat16, {2, 5, 2, 8}); }},
        {"VOtherFloat", ErrorCode::kDType, "v", "dtype float16; allowed is float32",
         [](A& c) { c.p.v = c.typed(DType::kFloat16, {2, 5, 2, 6}); }},
        {"Int8QFloatK", ErrorCode::kDType, "k", "dtype float32; allowed is int8",
         [](A& c) {
           c.p.q = c.typed(DType::kInt8, {2, 3, 4, 8});
           c.p.q_scales.scale = c.float32({1});
         }},
        {"OutOtherFloat", ErrorCode::kDType, "out", "allowed is float32",
         [](A& c) { c.p.out = c.typed(DType::kBFloat16, {2, 3, 4, 6}); }},
        {"OutWider", ErrorCode::kDType, "out", "allowed is float32",
         [](A& c) { c.p.out = c.typed(DType::kFloat64, {2, 3, 4, 6}); }},
        {"OutOfInt8", ErrorCode::kDType, "out", "allowed is float32",
         [](A& c) {
           c.quantize();
           c.p.out = c.typed(DType::kInt8, {2, 3, 4, 6});
         }},
        {"LseOtherFloat", ErrorCode::kDType, "lse", "allowed is float32",
         [](A& c) { c.p.lse = c.typed(DType::kFloat64, {2, 4, 3}); }},
        {"SinksDouble", ErrorCode::kDType, "sinks", "allowed is float32",
         [](A& c) { c.p.sinks = c.typed(DType::kFloat64, {4}); }},
        // Devices
        {"KOnGpu", ErrorCode::kDevice, "k", "on cuda:0; allowed is cpu, where q lies", [](A& c) { c.p.k = on_gpu(c.p.k); }},
        {"OutOnGpu", ErrorCode::kDevice, "out", "cuda:0", [](A& c) { c.p.out = on_gpu(c.p.out); }},
        {"SinksOnGpu", ErrorCode::kDevice, "sinks", "cuda:0", [](A& c) { c.p.sinks = on_gpu(c.float32({4})); }},
        {"AllOnGpu", ErrorCode::kUnsupported, "backend", "CUDA tensors",
         [](A& c) {
           for (TensorView* x : {&c.p.q, &c.p.k, &c.p.v, &c.p.out, &c.p.lse}) *x = on_gpu(*x);
         }},
        // Numbers
        {"ScaleNaN", ErrorCode::kValue, "scale", "nan", [](A& c) { c.p.scale = kNaN; }},
        {"ScaleInf", ErrorCode::kValue, "scale", "inf", [](A& c) { c.p.scale = kInf; }},
        {"SoftcapNegative", ErrorCode::kValue, "softcap", "-1; allowed are 0", [](A& c) { c.p.softcap = -1; }},
        {"SoftcapNaN", ErrorCode::kValue, "softcap", "nan", [](A& c) { c.p.softcap = kNaN; }},
        {"WindowLeft", ErrorCode::kValue, "window", "left is -1; allowed are 0 and above",
         [](A& c) { c.p.window = Window{-1, 0}; }},
        {"WindowRight", ErrorCode::kValue, "window", "right is -3", [](A& c) { c.p.window = Window{{}, -3}; }},
        {"SinkNaN", ErrorCode::kValue, "sinks", "nan for head 0", [](A& c) { c.p.sinks = c.float32({4}, kNaN); }},
        {"SinkInf", ErrorCode::kValue, "sinks", "inf", [](A& c) { c.p.sinks = c.float32({4}, kInf); }},
        {"SinkCount", ErrorCode::kShape, "sinks", "allowed is [4]", [](A& c) { c.p.sinks = c.float32({2}); }},
        {"SplitSize", ErrorCode::kValue, "schedule", "split_size is -64", [](A& c) { c.p.schedule.split_size = -64; }},
        // Quantized tensors
        {"NoScale", ErrorCode::kShape, "k_scales.scale", "not given",
         [](A& c) {
           c.quantize();
           c.p.k_scales = {};
         }},
        {"ScaleOfAFloat", ErrorCode::kValue, "v_scales", "float32", [](A& c) { c.p.v_scales.scale = c.float32({1}); }},
        {"ScaleShape", ErrorCode::kShape, "k_scales.scale", "allowed is [2, 3, 2]",
         [](A& c) {
           c.quantize();
           c.p.k_scales.scale = c.float32({2, 5, 2});
         }},
        {"ScaleTensorShape", ErrorCode::kShape, "v_scales.scale", "allowed is [1]",
         [](A& c) {
           c.quantize();
           c.p.v_scales.scale = c.float32({2});
         }},
        {"ScaleValueNaN", ErrorCode::kValue, "v_scales.scale", "nan",
         [](A& c) {
           c.quantize();
           c.p.v_scales.scale = c.float32({1}, kNaN);
         }},
        {"ScaleNegative", ErrorCode::kValue, "v_scales.scale", "-0.5; allowed are 0",
         [](A& c) {
           c.quantize();
           c.p.v_scales.scale = c.float32({1}, -0.5f);
         }},
        {"ScaleNegativeQuery", ErrorCode::kValue, "q_scales.scale", "-0.5; allowed are 0",
         [](A& c) {
           c.quantize();
           c.p.q_scales.scale = c.float32({2, 3, 4}, -0.5f);
         }},
        {"ScaleDType", ErrorCode::kDType, "q_scales.scale", "allowed is float32",
         [](A& c) {
           c.quantize();
           c.p.q_scales.scale = c.typed(DType::kFloat64, {2, 3, 4});
         }},
        {"Partition", ErrorCode::kValue, "q_scales.partition", "-1; allowed are 0",
         [](A& c) {
           c.quantize();
           c.p.q_scales.partition = -1;
         }},
        {"MeanShape", ErrorCode::kShape, "k_scales.mean", "allowed is [2, 2, 8]",
         [](A& c) {
           c.quantize();
           c.p.k_scales.mean = c.float32({2, 2, 6});
         }},
        // Packed batches
        {"OnlyCuSeqlensQ", ErrorCode::kShape, "cu_seqlens_k", "not given",
         [](A& c) {
           c.pack();
           c.p.cu_seqlens_k = {};
         }},
        {"PackedRank", ErrorCode::kShape, "q", "rank 4",
         [](A& c) {
           c.pack();
           c.p.q = c.float32({2, 3, 4, 8});
         }},
        {"CuSeqlensInt64", ErrorCode::kDType, "cu_seqlens_q", "dtype int64; allowed is int32",
         [](A& c) {
           c.pack();
           c.p.cu_seqlens_q = c.typed(DType::kInt64, {3});
         }},
        {"CuSeqlensEmpty", ErrorCode::kShape, "cu_seqlens_q", "is 0",
         [](A& c) {
           c.pack();
           c.p.cu_seqlens_q = c.int32({0}, {0});
         }},
        {"CuSeqlensCounts", ErrorCode::kShape, "cu_seqlens_k", "is 2; allowed is 3",
         [](A& c) {
           c.pack();
           c.p.cu_seqlens_k = c.int32({2}, {0, 10});
         }},
        {"CuSeqlensStart", ErrorCode::kValue, "cu_seqlens_q", "entry 0 is 1; allowed is 0",
         [](A& c) {
           c.pack();
           c.p.cu_seqlens_q = c.int32({3}, {1, 3, 6});
         }},
        {"CuSeqlensNegative", ErrorCode::kValue, "cu_seqlens_q", "entry 1 is -3",
         [](A& c) {
           c.pack();
           c.p.cu_seqlens_q = c.int32({3}, {0, -3, 6});
         }},
        {"CuSeqlensDecrease", ErrorCode::kValue, "cu_seqlens_k", "entry 2 is 4; allowed are 5",
         [](A& c) {
           c.pack();
           c.p.cu_seqlens_k = c.int32({3}, {0, 5, 4});
         }},
        {"CuSeqlensEnd", ErrorCode::kValue, "cu_seqlens_k", "ends at 11; allowed are at most 10, the tokens of k",
         [](A& c) {
           c.pack();
           c.p.cu_seqlens_k = c.int32({3}, {0, 5, 11});
         }},
        // Block masks: 3 queries and 5 keys in blocks of 2
        {"MaskQueries", ErrorCode::kShape, "mask", "axis 0 (query blocks) is 3; allowed is 2, for 3 queries in blocks of 2",
         [](A& c) { c.p.selection = Selection::block_mask(c.typed(DType::kBool, {3, 3}), 2, 2); }},
        {"MaskKeys", ErrorCode::kShape, "mask", "axis 1 (key blocks) is 2; allowed is 3",
         [](A& c) { c.p.selection = Selection::block_mask(c.typed(DType::kBool, {2, 2}), 2, 2); }},
        {"MaskHeads", ErrorCode::kShape, "mask", "axis 0 (heads) is 3; allowed are 1, 2 (KV heads) and 4 (query heads)",
         [](A& c) { c.p.selection = Selection::block_mask(c.typed(DType::kBool, {3, 2, 3}), 2, 2); }},
        {"MaskBatch", ErrorCode::kShape, "mask", "axis 0 (batch) is 3; allowed is 2",
         [](A& c) { c.p.selection = Selection::block_mask(c.typed(DType::kBool, {3, 1, 2, 3}), 2, 2); }},
        {"MaskRank", ErrorCode::kShape, "mask", "rank 1",
         [](A& c) { c.p.selection = Selection::block_mask(c.typed(DType::kBool, {2}), 2, 2); }},
        {"MaskDType", ErrorCode::kDType, "mask", "bool",
         [](A& c) { c.p.selection = Selection::block_mask(c.float32({2, 3}), 2, 2); }},
        {"MaskBlock", ErrorCode::kValue, "block", "0",
         [](A& c) { c.p.selection = Selection::block_mask(c.typed(DType::kBool, {2, 3}), 0, 2); }},
        {"MaskOnGpu", ErrorCode::kDevice, "mask", "cuda:0",
         [](A& c) { c.p.selection = Selection::block_mask(on_gpu(c.typed(DType::kBool, {2, 3})), 2, 2); }},
        // Windows and strides
        {"SelectWindowLeft", ErrorCode::kValue, "left", "-2", [](A& c) { c.p.selection = Selection::window(-2); }},
        {"SelectWindowGlobal", ErrorCode::kValue, "n_global", "-1",
         [](A& c) { c.p.selection = Selection::window(2, 0, -1); }},
        {"SelectStride", ErrorCode::kValue, "stride", "0", [](A& c) { c.p.selection = Selection::strided(4, 0); }},
        {"SelectWidth", ErrorCode::kValue, "width", "-4", [](A& c) { c.p.selection = Selection::strided(-4, 1); }},
        // Token lists: [B, Hkv, n] = [2, 2, 2], [B, Sq, Hkv, n] = [2, 3, 2, 1]
        {"TokensBatch", ErrorCode::kShape, "indices", "axis 0 (batch) is 1; allowed is 2",
         [](A& c) { c.p.selection = Selection::tokens(c.int32({1, 2, 1}, {0, 0})); }},
        {"TokensHeads", ErrorCode::kShape, "indices", "axis 1 (heads) is 4; allowed is 2",
         [](A& c) { c.p.selection = Selection::tokens(c.int32({2, 4, 1}, std::vector<std::int32_t>(8))); }},
        {"TokensQueries", ErrorCode::kShape, "indices", "axis 1 (queries) is 2; allowed is 3",
         [](A& c) { c.p.selection = Selection::tokens(c.int32({2, 2, 2, 1}, std::vector<std::int32_t>(8))); }},
        {"TokensPackedQueries", ErrorCode::kShape, "indices", "axis 0 (queries) is 5; allowed is 6",
         [](A& c) {
           c.pack();
           c.p.selection = Selection::tokens(c.int32({5, 2, 1}, std::vector<std::int32_t>(10)));
         }},
        {"TokensRange", ErrorCode::kValue, "indices", "token 5 at 1 of request 1, KV head 0; allowed are 0 to 4",
         [](A& c) { c.p.selection = Selection::tokens(c.int32({2, 2, 2}, {0, 1, 0, 1, 0, 5, 0, 1})); }},
        {"TokensNegative", ErrorCode::kValue, "indices", "token -2",
         [](A& c) { c.p.selection = Selection::tokens(c.int32({2, 2, 2}, {0, 1, 0, 1, -2, 0, 0, 1})); }},
        {"TokensPadFirst", ErrorCode::kValue, "indices", "-1 pads only at the end",
         [](A& c) { c.p.selection = Selection::tokens(c.int32({2, 2, 2}, {-1, 1, 0, 1, 0, 1, 0, 1})); }},
        {"TokensUnsorted", ErrorCode::kValue, "indices", "token 0 at 1 of request 0, KV head 1 follows 3",
         [](A& c) { c.p.selection = Selection::tokens(c.int32({2, 2, 2}, {0, 1, 3, 0, 0, 1, 0, 1})); }},
        {"TokensTwice", ErrorCode::kValue, "indices", "without repeats",
         [](A& c) { c.p.selection = Selection::tokens(c.int32({2, 2, 2}, {0, 1, 3, 3, 0, 1, 0, 1})); }},
        {"TokensOfAQuery", ErrorCode::kValue, "indices", "request 1, query 2, KV head 1",
         [](A& c) {
           c.p.selection = Selection::tokens(c.int32({2, 3, 2, 1}, {0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 9}));
         }},
        {"TokenLengthTooLong", ErrorCode::kValue, "lengths", "3 for request 0, KV head 1; allowed are 0 to 2",
         [](A& c) {
           c.p.selection =
               Selection::tokens(c.int32({2, 2, 2}, {0, 1, 0, 1, 0, 1, 0, 1}), c.int32({2, 2}, {2, 3, 2, 2}));
         }},
        {"TokenLengthNegative", ErrorCode::kValue, "lengths", "-1",
         [](A& c) {
           c.p.selection =
               Selection::tokens(c.int32({2, 2, 2}, {0, 1, 0, 1, 0, 1, 0, 1}), c.int32({2, 2}, {-1, 2, 2, 2}));
         }},
        {"TokenLengthOverPads", ErrorCode::kValue, "indices", "token -1",
         [](A& c) {
           c.p.selection =
               Selection::tokens(c.int32({2, 2, 2}, {0, -1, 0, 1, 0, 1, 0, 1}), c.int32({2, 2}, {2, 2, 2, 2}));
         }},
        {"TokensInt64", ErrorCode::kDType, "indices", "int32",
         [](A& c) { c.p.selection = Selection::tokens(c.typed(DType::kInt64, {2, 2, 2})); }},
        // Backends
        {"Sm90", ErrorCode::kUnsupported, "backend", "allowed are host and reference",
         [](A& c) { c.p.backend = Backend::kSm90; }},
        {"HostFloat64", ErrorCode::kUnsupported, "backend", "host does not support float64 in attention; allowed is reference",
         [](A& c) {
           c.p.backend = Backend::kHost;
           c.p.q = c.typed(DType::kFloat64, {2, 3, 4, 8});
           c.p.k = c.typed(DType::kFloat64, {2, 5, 2, 8});
           c.p.v = c.typed(DType::kFloat64, {2, 5, 2, 6});
           c.p.out = c.typed(DType::kFloat64, {2, 3, 4, 6});
         }},
        {"HostWideHeads", ErrorCode::kUnsupported, "backend", "head dimensions above 576",
         [](A& c) {
           c.p.backend = Backend::kHost;
           c.p.q = c.float32({2, 3, 4, 577});
           c.p.k = c.float32({2, 5, 2, 577});
         }},
    }),
    test_name<A>);

TEST(GoodAttention, TheCallsThatTestsSpoilAreGood) {
  for (const auto& prepare :
       {std::function<void(A&)>([](A&) {}), std::function<void(A&)>(&A::pack), std::function<void(A&)>(&A::quantize)}) {
    A call;
    prepare(call);
    call.run();
    EXPECT_TRUE(std::none_of(call.out.begin(), call.out.end(), [](float x) { return x == kBefore; }));
    EXPECT_TRUE(std::none_of(call.lse.begin(), call.lse.end(), [](float x) { return x == kBefore; }));
  }
}

TEST(GoodAttention, EmptyAxes) {
  for (const Backend backend : {Backend::kHost, Backend::kReference}) {
    A no_batch;
    no_batch.p.backend = backend;
    for (TensorView* x : {&no_batch.p.q, &no_batch.p.k, &no_batch.p.v, &no_batch.p.out, &no_batch.p.lse}) {
      *x = with_shape(*x, 0, 0);
    }
    no_batch.run();
    EXPECT_EQ(no_batch.out[0], kBefore);

    A no_queries;
    no_queries.p.backend = backend;
    no_queries.p.q = with_shape(no_queries.p.q, 1, 0);
    no_queries.p.out = with_shape(no_queries.p.out, 1, 0);
    no_queries.p.lse = with_shape(no_queries.p.lse, 2, 0);
    no_queries.run();
    EXPECT_EQ(no_queries.out[0], kBefore);

    A no_keys;
    no_keys.p.backend = backend;
    no_keys.p.k = TensorView(nullptr, DType::kFloat32, {2, 0, 2, 8});
    no_keys.p.v = TensorView(nullptr, DType::kFloat32, {2, 0, 2, 6});
    no_keys.run();
    EXPECT_TRUE(std::all_of(no_keys.out.begin(), no_keys.out.end(), [](float x) { return x == 0.0f; }));
    EXPECT_TRUE(std::all_of(no_keys.lse.begin(), no_keys.lse.end(), [](float x) { return x == -kInf; }));
    no_keys.p.sinks = no_keys.float32({4}, 1.5f);
    no_keys.run();
    EXPECT_TRUE(std::all_of(no_keys.out.begin(), no_keys.out.end(), [](float x) { return x == 0.0f; }));
    for (const float x : no_keys.lse) EXPECT_FLOAT_EQ(x, 1.5f);
  }
}

TEST(GoodAttention, PackedRowsPastTheEndAreNobodys) {
  A call;
  call.pack();
  call.p.cu_seqlens_q = call.int32({3}, {0, 2, 4});
  call.run();
  EXPECT_NE(call.out[3 * 24 + 23], kBefore);
  EXPECT_EQ(call.out[4 * 24], kBefore);
  EXPECT_EQ(call.out.back(), kBefore);
  EXPECT_EQ(call.lse.back(), kBefore);
}

// q [2, 1, 4, 8] over a cache of 8 pages of 4 tokens; block_table [2, 3].
struct DecodeCall : Pool {
  std::vector<float> out = std::vector<float>(2 * 4 * 8, kBefore), lse = std::vector<float>(2 * 4, kBefore);
  KVCache cache{
      {.num_pages = 8, .page_size = 4, .num_kv_heads = 2, .head_dim = 8, .format = CacheFormat::kFp32, .device = {}}};
  DecodeParams p{.q = float32({2, 1, 4, 8}),
                 .cache = &cache,
                 .block_table = int32({2, 3}, {0, 1, 2, 3, 4, 5}),
                 .seq_lens = int32({2}, {9, 4}),
                 .out = {out.data(), DType::kFloat32, {2, 1, 4, 8}},
                 .lse = {lse.data(), DType::kFloat32, {2, 4, 1}}};

  DecodeCall() {
    const TensorView k = float32({2, 12, 2, 8}), start = int32({2}, {0, 0}), lens = int32({2}, {0, 0});
    cache.append(k, k, p.block_table, start, lens);
  }
  void run() { decode(p); }
};

using BadDecode = BadInputTest<DecodeCall>;
TEST_P(BadDecode, IsRefused) { check(); }

using D = DecodeCall;
INSTANTIATE_TEST_SUITE_P(
    Decode, BadDecode,
    ::testing::ValuesIn(std::vector<BadInput<D>>{
        {"NoCache", ErrorCode::kValue, "cache", "not given", [](D& c) { c.p.cache = nullptr; }},
        {"QRank", ErrorCode::kShape, "q", "rank 3", [](D& c) { c.p.q = c.float32({2, 4, 8}); }},
        {"QHeadDim", ErrorCode::kShape, "q", "axis 3 (head_dim) is 7; allowed is 8, as in cache",
         [](D& c) { c.p.q = c.float32({2, 1, 4, 7}); }},
        {"QHeads", ErrorCode::kShape, "q", "3 heads; allowed are multiples of the 2",
         [](D& c) { c.p.q = c.float32({2, 1, 3, 8}); }},
        {"QInt8", ErrorCode::kDType, "q", "dtype int8", [](D& c) { c.p.q = c.typed(DType::kInt8, {2, 1, 4, 8}); }},
        {"QOnGpu", ErrorCode::kDevice, "q", "on cuda:0; allowed is cpu, where cache lies",
         [](D& c) { c.p.q = on_gpu(c.p.q); }},
        {"OutShape", ErrorCode::kShape, "out", "allowed is [2, 1, 4, 8]",
         [](D& c) { c.p.out = with_shape(c.p.out, 1, 2); }},
        {"TableNotGiven", ErrorCode::kShape, "block_table", "not given", [](D& c) { c.p.block_table = {}; }},
        {"TableRank", ErrorCode::kShape, "block_table", "rank 1",
         [](D& c) { c.p.block_table = c.int32({6}, {0, 1, 2, 3, 4, 5}); }},
        {"TableBatch", ErrorCode::kShape, "block_table", "axis 0 (batch) is 3; allowed is 2",
         [](D& c) { c.p.block_table = c.int32({3, 2}, {0, 1, 2, 3, 4, 5}); }},
        {"TableInt64", ErrorCode::kDType, "block_table", "int64",
         [](D& c) { c.p.block_table = c.typed(DType::kInt64, {2, 3}); }},
        {"TableFloat", ErrorCode::kDType, "block_table", "float32", [](D& c) { c.p.block_table = c.float32({2, 3}); }},
        {"TableOnGpu", ErrorCode::kDevice, "block_table", "cuda:0",
         [](D& c) { c.p.block_table = on_gpu(c.p.block_table); }},
        {"TableStride", ErrorCode::kLayout, "block_table", "stride 2",
         [](D& c) { c.p.block_table = with_stride(c.p.block_table, 1, 2); }},
        {"PageTooLarge", ErrorCode::kValue, "block_table",
         "page id 8 of request 0 is outside the cache; allowed are 0 to 7",
         [](D& c) { c.p.block_table = c.int32({2, 3}, {0, 1, 8, 3, 4, 5}); }},
        {"PageNegative", ErrorCode::kValue, "block_table", "page id -1 of request 1",
         [](D& c) { c.p.block_table = c.int32({2, 3}, {0, 1, 2, -1, 4, 5}); }},
        {"LensShape", ErrorCode::kShape, "seq_lens", "allowed is [2]", [](D& c) { c.p.seq_lens = c.int32({1}, {4}); }},
        {"LensNegative", ErrorCode::kValue, "seq_lens", "-1 for request 1",
         [](D& c) { c.p.seq_lens = c.int32({2}, {9, -1}); }},
        {"LensBeyondTable", ErrorCode::kCapacity, "seq_lens",
         "13 for request 1; allowed are 0 to 12, the tokens of 3 pages of block_table",
         [](D& c) { c.p.seq_lens = c.int32({2}, {9, 13}); }},
        {"LensInt64", ErrorCode::kDType, "seq_lens", "int64", [](D& c) { c.p.seq_lens = c.typed(DType::kInt64, {2}); }},
        {"Softcap", ErrorCode::kValue, "softcap", "-0.5", [](D& c) { c.p.softcap = -0.5; }},
        {"ScaleNaN", ErrorCode::kValue, "scale", "nan", [](D& c) { c.p.scale = kNaN; }},
        {"Window", ErrorCode::kValue, "window", "left is -1", [](D& c) { c.p.window = Window{-1, {}}; }},
        {"Sinks", ErrorCode::kShape, "sinks", "allowed is [4]", [](D& c) { c.p.sinks = c.float32({3}); }},
        {"MaskOfLongest", ErrorCode::kShape, "mask",
         "axis 1 (key blocks) is 2; allowed is 3, for 9 keys in blocks of 4",
         [](D& c) { c.p.selection = Selection::block_mask(c.typed(DType::kBool, {1, 2}), 4, 4); }},
        {"TokensBeyondRequest", ErrorCode::kValue, "indices",
         "token 4 at 0 of request 1, KV head 1; allowed are 0 to 3",
         [](D& c) { c.p.selection = Selection::tokens(c.int32({2, 2, 1}, {8, 8, 3, 4})); }},
        {"PlanNotMade", ErrorCode::kValue, "plan", "not made yet",
         [](D& c) {
           static const DecodePlan plan;
           c.p.plan = &plan;
         }},
        {"Backend", ErrorCode::kUnsupported, "backend", "sm90", [](D& c) { c.p.backend = Backend::kSm90; }},
    }),
    test_name<D>);

TEST(GoodDecode, TheCallThatTestsSpoilIsGood) {
  D call;
  call.run();
  EXPECT_TRUE(std::none_of(call.out.begin(), call.out.end(), [](float x) { return x == kBefore; }));
}

TEST(GoodDecode, TableEntriesPastTheLengthAreNotRead) {
  D call;
  call.p.block_table = call.int32({2, 3}, {0, 1, 2, 3, -7, 1000});
  call.run();
}

TEST(GoodDecode, EmptyRequestsAndBatches) {
  for (const Backend backend : {Backend::kHost, Backend::kReference}) {
    D call;
    call.p.backend = backend;
    call.p.seq_lens = call.int32({2}, {9, 0});
    call.run();
    EXPECT_TRUE(std::all_of(call.out.begin() + 32, call.out.end(), [](float x) { return x == 0.0f; }));
    EXPECT_TRUE(std::all_of(call.lse.begin() + 4, call.lse.end(), [](float x) { return x == -kInf; }));

    D empty;
    empty.p.backend = backend;
    for (TensorView* x : {&empty.p.q, &empty.p.out, &empty.p.lse, &empty.p.block_table, &empty.p.seq_lens}) {
      *x = with_shape(*x, 0, 0);
    }
    empty.run();
    EXPECT_EQ(empty.out[0], kBefore);
  }
}

// outs [3, 2, 5, 4, 6], lses [3, 2, 4, 5].
struct MergeCall : Pool {
  std::vector<float> out = std::vector<float>(2 * 5 * 4 * 6, kBefore), lse = std::vector<float>(2 * 4 * 5, kBefore);
  MergeParams p{.outs = float32({3, 2, 5, 4, 6}),
                .lses = float32({3, 2, 4, 5}),
                .out = {out.data(), DType::kFloat32, {2, 5, 4, 6}},
                .lse = {lse.data(), DType::kFloat32, {2, 4, 5}}};

  void run() { merge(p); }
};

using BadMerge = BadInputTest<MergeCall>;
TEST_P(BadMerge, IsRefused) { check(); }

using M = MergeCall;
INSTANTIATE_TEST_SUITE_P(
    Merge, BadMerge,
    ::testing::ValuesIn(std::vector<BadInput<M>>{
        {"OutsNotGiven", ErrorCode::kShape, "outs", "not given", [](M& c) { c.p.outs = {}; }},
        {"OutsRank", ErrorCode::kShape, "outs", "rank 3", [](M& c) { c.p.outs = c.float32({3, 5, 6}); }},
        {"OutsDType", ErrorCode::kDType, "outs", "int8",
         [](M& c) { c.p.outs = c.typed(DType::kInt8, {3, 2, 5, 4, 6}); }},
        {"OutsStride", ErrorCode::kLayout, "outs", "stride 3", [](M& c) { c.p.outs = with_stride(c.p.outs, 4, 3); }},
        {"NoParts", ErrorCode::kShape, "outs", "axis 0 (parts) is 0",
         [](M& c) { c.p.outs = with_shape(c.p.outs, 0, 0); }},
        {"NoHeads", ErrorCode::kShape, "outs", "axis 3 (heads) is 0",
         [](M& c) { c.p.outs = with_shape(c.p.outs, 3, 0); }},
        {"LsesShape", ErrorCode::kShape, "lses", "shape [3, 2, 5, 4]; allowed is [3, 2, 4, 5]",
         [](M& c) { c.p.lses = c.float32({3, 2, 5, 4}); }},
        {"LsesDType", ErrorCode::kDType, "lses", "allowed is float32",
         [](M& c) { c.p.lses = c.typed(DType::kBFloat16, {3, 2, 4, 5}); }},
        {"LsesOnGpu", ErrorCode::kDevice, "lses", "cuda:0", [](M& c) { c.p.lses = on_gpu(c.p.lses); }},
        {"OutShape", ErrorCode::kShape, "out", "allowed is [2, 5, 4, 6]",
         [](M& c) { c.p.out = with_shape(c.p.out, 1, 4); }},
        {"OutDType", ErrorCode::kDType, "out", "allowed is float32",
         [](M& c) { c.p.out = c.typed(DType::kFloat16, {2, 5, 4, 6}); }},
        {"LseShape", ErrorCode::kShape, "lse", "allowed is [2, 4, 5]",
         [](M& c) { c.p.lse = with_shape(c.p.lse, 2, 4); }},
        {"OutOverlaps", ErrorCode::kLayout, "out", "axis 2 has stride 0",
         [](M& c) { c.p.out = with_stride(c.p.out, 2, 0); }},
        {"HostFloat64", ErrorCode::kUnsupported, "backend",
         "host does not support float64 in merge; allowed is reference",
         [](M& c) {
           c.p.backend = Backend::kHost;
           c.p.outs = c.typed(DType::kFloat64, {3, 2, 5, 4, 6});
           c.p.out = c.typed(DType::kFloat64, {2, 5, 4, 6});
         }},
    }),
    test_name<M>);

TEST(GoodMerge, TheCallThatTestsSpoilIsGood) {
  M call;
  call.run();
  for (const float x : call.out) EXPECT_FLOAT_EQ(x, 1.0f);
  for (const float x : call.lse) EXPECT_FLOAT_EQ(x, 1.0f + std::log(3.0f));
}

}  // namespace
}  // namespace heddle
