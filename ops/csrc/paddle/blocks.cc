// pm_attention_block, pm_moe_block and pm_head: the operators between two meetings of ranks as one. To run an operator takes
// Paddle 50 to 180 us in a decode, whose weights drive all else from the caches: a few percent of it, were each an operator
// alone.
#include "operators.h"

namespace {

using paddle::DataType;
using paddle::Tensor;
using Shape = std::vector<int64_t>;
using MaybeTensor = paddle::optional<Tensor>;
using MaybeShape = paddle::optional<Shape>;
using MaybeType = paddle::optional<DataType>;

// Of residual + delta, which the residual then is.
Tensor norm_of_stream(const char* op, const pm::Target& at, Tensor& residual, const Tensor* delta, const Tensor& weight,
                      float eps, const std::string& dtype) {
  return pm::rms_norm(op, at, residual, delta, weight, nullptr, eps, dtype, delta ? &residual : nullptr);
}

std::vector<Tensor> attention_block(Tensor& residual, const MaybeTensor& delta, const Tensor& norm, const Tensor& qkv,
                                    const MaybeTensor& qkv_scale, const Tensor& o, const MaybeTensor& o_scale,
                                    Tensor& key_cache, Tensor& value_cache, const Tensor& cu_seqlens,
                                    const Tensor& context_lens, const Tensor& block_tables, float eps,
                                    const std::string& dtype, int num_heads, int num_kv_heads, const std::string& rope_theta,
                                    int64_t sliding_window, int activation_bits) {
  const char* op = "attention_block";
  const pm::Target at = pm::target(op, {{"residual", residual},
                                        {"delta", delta},
                                        {"norm", norm},
                                        {"qkv", qkv},
                                        {"qkv's scale", qkv_scale},
                                        {"o", o},
                                        {"o's scale", o_scale},
                                        {"key_cache", key_cache},
                                        {"value_cache", value_cache},
                                        {"cu_seqlens", cu_seqlens},
                                        {"context_lens", context_lens},
                                        {"block_tables", block_tables}});
  pm::check_tensor(op, "key_cache", key_cache, at.activations(), {-1, num_kv_heads, -1, -1});
  const int64_t features = (int64_t{num_heads} + 2 * int64_t{num_kv_heads}) * key_cache.shape()[3];
  Tensor x = norm_of_stream("attention_block, norm", at, residual, delta.get_ptr(), norm, eps, dtype);
  x = pm::linear("attention_block, qkv", at, x, qkv, qkv_scale, features, dtype, activation_bits);
  x = pm::append_attention(op, at, x, key_cache, value_cache, cu_seqlens, context_lens, block_tables,
                           {num_heads, num_kv_heads, rope_theta, sliding_window});
  return {pm::linear("attention_block, o", at, x, o, o_scale, residual.shape()[1], "float32", activation_bits)};
}
std::vector<Shape> attention_block_shape(const Shape& residual, const MaybeShape&, const Shape&, const Shape&,
                                         const MaybeShape&, const Shape&, const MaybeShape&, const Shape&, const Shape&,
                                         const Shape&, const Shape&, const Shape&) {
  return {residual};
}
std::vector<DataType> attention_block_dtype(const DataType&, const MaybeType&, const DataType&, const DataType&,
                                            const MaybeType&, const DataType&, const MaybeType&, const DataType&,
                                            const DataType&, const DataType&, const DataType&, const DataType&) {
  return {DataType::FLOAT32};
}

std::vector<Tensor> moe_block(Tensor& residual, const Tensor& delta, const Tensor& norm, const Tensor& gate,
                              const Tensor& w13, const Tensor& w2, const MaybeTensor& w13_scale, const MaybeTensor& w2_scale,
                              float eps, const std::string& dtype, int top_k, int activation_bits) {
  const char* op = "moe_block";
  const pm::Target at = pm::target(op, {{"residual", residual},
                                        {"delta", delta},
                                        {"norm", norm},
                                        {"gate", gate},
                                        {"w13", w13},
                                        {"w2", w2},
                                        {"w13_scale", w13_scale},
                                        {"w2_scale", w2_scale}});
  const Tensor x = norm_of_stream("moe_block, norm", at, residual, &delta, norm, eps, dtype);
  return {pm::fused_moe(op, at, x, gate, w13, w2, w13_scale, w2_scale, top_k, activation_bits)};
}
std::vector<Shape> moe_block_shape(const Shape& residual, const Shape&, const Shape&, const Shape&, const Shape&,
                                   const Shape&, const MaybeShape&, const MaybeShape&) {
  return {residual};
}
std::vector<DataType> moe_block_dtype(const DataType&, const DataType&, const DataType&, const DataType&, const DataType&,
                                      const DataType&, const MaybeType&, const MaybeType&) {
  return {DataType::FLOAT32};
}

std::vector<Tensor> head(const Tensor& residual, const Tensor& delta, const Tensor& norm, const Tensor& rows,
                         const Tensor& weight, const MaybeTensor& scale, float eps, const std::string& dtype,
                         int out_features, int activation_bits) {
  const char* op = "head";
  const pm::Target at = pm::target(
      op, {{"residual", residual}, {"delta", delta}, {"norm", norm}, {"rows", rows}, {"weight", weight}, {"scale", scale}});
  const Tensor x = pm::rms_norm("head, norm", at, residual, &delta, norm, &rows, eps, dtype, nullptr);
  return {pm::linear(op, at, x, weight, scale, out_features, "float32", activation_bits)};
}
std::vector<Shape> head_shape(const Shape&, const Shape&, const Shape&, const Shape& rows, const Shape&, const MaybeShape&,
                              float, const std::string&, int out_features, int) {
  return {{rows[0], out_features}};
}
std::vector<DataType> head_dtype(const DataType&, const DataType&, const DataType&, const DataType&, const DataType&,
                                 const MaybeType&) {
  return {DataType::FLOAT32};
}

}  // namespace

PD_BUILD_OP(pm_attention_block)
    .Inputs({"Residual", paddle::Optional("Delta"), "Norm", "Qkv", paddle::Optional("QkvScale"), "O",
             paddle::Optional("OScale"), "KeyCache", "ValueCache", "CuSeqlens", "ContextLens", "BlockTables"})
    .Outputs({"Y", "ResidualOut", "KeyCacheOut", "ValueCacheOut"})
    .Attrs({"eps: float", "dtype: std::string", "num_heads: int", "num_kv_heads: int", "rope_theta: std::string",
            "sliding_window: int64_t", "activation_bits: int"})
    .SetInplaceMap({{"Residual", "ResidualOut"}, {"KeyCache", "KeyCacheOut"}, {"ValueCache", "ValueCacheOut"}})
    .SetKernelFn(PD_KERNEL(attention_block))
    .SetInferShapeFn(PD_INFER_SHAPE(attention_block_shape))
    .SetInferDtypeFn(PD_INFER_DTYPE(attention_block_dtype));

PD_BUILD_OP(pm_moe_block)
    .Inputs({"Residual", "Delta", "Norm", "Gate", "W13", "W2", paddle::Optional("W13Scale"), paddle::Optional("W2Scale")})
    .Outputs({"Y", "ResidualOut"})
    .Attrs({"eps: float", "dtype: std::string", "top_k: int", "activation_bits: int"})
    .SetInplaceMap({{"Residual", "ResidualOut"}})
    .SetKernelFn(PD_KERNEL(moe_block))
    .SetInferShapeFn(PD_INFER_SHAPE(moe_block_shape))
    .SetInferDtypeFn(PD_INFER_DTYPE(moe_block_dtype));

PD_BUILD_OP(pm_head)
    .Inputs({"Residual", "Delta", "Norm", "Rows", "Weight", paddle::Optional("Scale")})
    .Outputs({"Logits"})
    .Attrs({"eps: float", "dtype: std::string", "out_features: int", "activation_bits: int"})
    .SetKernelFn(PD_KERNEL(head))
    .SetInferShapeFn(PD_INFER_SHAPE(head_shape))
    .SetInferDtypeFn(PD_INFER_DTYPE(head_dtype));
