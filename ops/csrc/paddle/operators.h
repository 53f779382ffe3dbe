// Operators as functions, for bindings that run several as one: checks, results, and the kernel's call. `op` is whom errors
// name, and `at` is where all tensors are; shapes and meaning are those of the operators' Python faces.
#ifndef PADDLE_MIXTRAL_OPERATORS_H_
#define PADDLE_MIXTRAL_OPERATORS_H_

#include <string>

#include "target.h"

namespace pm {

// `delta` and `rows` may be NULL. `sum` becomes residual + delta, of as many rows as the result: a new tensor, or, without
// rows, `residual` itself; or it is NULL.
paddle::Tensor rms_norm(const char* op, const Target& at, const paddle::Tensor& residual, const paddle::Tensor* delta,
                        const paddle::Tensor& weight, const paddle::Tensor* rows, float eps, const std::string& out_dtype,
                        paddle::Tensor* sum);

paddle::Tensor linear(const char* op, const Target& at, const paddle::Tensor& x, const paddle::Tensor& weight,
                      const paddle::optional<paddle::Tensor>& scale, int64_t out_features, const std::string& out_dtype,
                      int activation_bits);

struct Heads {
  int64_t queries, key_values;
  std::string rope_theta;  // a double's text
  int64_t sliding_window;
};
paddle::Tensor append_attention(const char* op, const Target& at, const paddle::Tensor& qkv, paddle::Tensor& key_cache,
                                paddle::Tensor& value_cache, const paddle::Tensor& cu_seqlens,
                                const paddle::Tensor& context_lens, const paddle::Tensor& block_tables, const Heads& heads);

paddle::Tensor fused_moe(const char* op, const Target& at, const paddle::Tensor& x, const paddle::Tensor& gate,
                         const paddle::Tensor& w13, const paddle::Tensor& w2,
                         const paddle::optional<paddle::Tensor>& w13_scale, const paddle::optional<paddle::Tensor>& w2_scale,
                         int top_k, int activation_bits);

}  // namespace pm
#endif  // PADDLE_MIXTRAL_OPERATORS_H_
