// pm_linear and pm_quantize_int8: checks and allocation around kernels/include/linear.h.
#include "../kernels/include/linear.h"

#include <cmath>

#include "binding.h"

namespace {

using paddle::DataType;
using paddle::Tensor;
using Shape = std::vector<int64_t>;

std::vector<Tensor> linear(const Tensor& x, const Tensor& weight, const paddle::optional<Tensor>& scale,
                           const std::string& out_dtype) {
  const char* op = scale ? "weight_only_linear" : "linear";
  pm::check_tensor(op, "x", x, {DataType::FLOAT32, DataType::BFLOAT16}, {-1, -1});
  const int64_t T = x.shape()[0], K = x.shape()[1];
  if (scale)
    pm::check_tensor(op, "weight", weight, {DataType::INT8}, {-1, K});
  else
    pm::check_tensor(op, "weight", weight, {DataType::FLOAT32, DataType::BFLOAT16}, {-1, K});
  const int64_t N = weight.shape()[0];
  if (scale) pm::check_tensor(op, "scale", *scale, {DataType::FLOAT32}, {N});
  if (T < 1 || N < 1 || K < 1) pm::fail(op, "needs T, N and K >= 1, found T = ", T, ", N = ", N, ", K = ", K);
  Tensor y = paddle::empty({T, N}, pm::float_dtype(op, out_dtype), x.place());
  pm::check_status(
      op, pm_cpu_linear(x.data(), pm::abi_dtype(x.dtype()), weight.data(), pm::abi_dtype(weight.dtype()),
                        scale ? scale->data<float>() : nullptr, y.data(), pm::abi_dtype(y.dtype()), T, N, K, nullptr));
  return {y};
}
std::vector<Shape> linear_shape(const Shape& x, const Shape& weight, const paddle::optional<Shape>&) {
  return {{x[0], weight[0]}};
}
std::vector<DataType> linear_dtype(const DataType&, const DataType&, const paddle::optional<DataType>&,
                                   const std::string& out_dtype) {
  return {pm::float_dtype("linear", out_dtype)};
}

std::vector<Tensor> quantize_int8(const Tensor& weight) {
  const char* op = "quantize_int8";
  pm::check_tensor(op, "weight", weight, {DataType::FLOAT32, DataType::BFLOAT16, DataType::FLOAT16}, {-1, -1});
  const int64_t N = weight.shape()[0], K = weight.shape()[1];
  if (N < 1 || K < 1) pm::fail(op, "needs N and K >= 1, found N = ", N, ", K = ", K);
  Tensor q = paddle::empty({N, K}, DataType::INT8, weight.place());
  Tensor scale = paddle::empty({N}, DataType::FLOAT32, weight.place());
  pm::check_status(op, pm_cpu_quantize_int8(weight.data(), pm::abi_dtype(weight.dtype()), K, q.data<int8_t>(),
                                            scale.data<float>(), N, K, nullptr));
  for (int64_t n = 0; n < N; ++n)
    if (std::isnan(scale.data<float>()[n])) pm::fail(op, "row ", n, " of weight has a value that is not finite");
  return {q, scale};
}
std::vector<Shape> quantize_int8_shape(const Shape& weight) { return {weight, {weight[0]}}; }
std::vector<DataType> quantize_int8_dtype(const DataType&) { return {DataType::INT8, DataType::FLOAT32}; }

}  // namespace

PD_BUILD_OP(pm_linear)
    .Inputs({"X", "Weight", paddle::Optional("Scale")})
    .Outputs({"Y"})
    .Attrs({"out_dtype: std::string"})
    .SetKernelFn(PD_KERNEL(linear))
    .SetInferShapeFn(PD_INFER_SHAPE(linear_shape))
    .SetInferDtypeFn(PD_INFER_DTYPE(linear_dtype));

PD_BUILD_OP(pm_quantize_int8)
    .Inputs({"Weight"})
    .Outputs({"Q", "Scale"})
    .SetKernelFn(PD_KERNEL(quantize_int8))
    .SetInferShapeFn(PD_INFER_SHAPE(quantize_int8_shape))
    .SetInferDtypeFn(PD_INFER_DTYPE(quantize_int8_dtype));
