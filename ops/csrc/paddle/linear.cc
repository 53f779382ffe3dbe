// pm_linear: checks and allocation around kernels/include/linear.h.
#include "../kernels/include/linear.h"

#include "binding.h"

namespace {

using paddle::DataType;
using paddle::Tensor;
using Shape = std::vector<int64_t>;

std::vector<Tensor> linear(const Tensor& x, const Tensor& weight, const paddle::optional<Tensor>& scale, int out_features,
                           const std::string& out_dtype, int activation_bits) {
  const char* op = scale ? "weight_only_linear" : "linear";
  pm::check_tensor(op, "x", x, {DataType::FLOAT32, DataType::BFLOAT16}, {-1, -1});
  const int64_t T = x.shape()[0], K = x.shape()[1];
  const int64_t N = out_features;  // a packed weight may have more rows, of zeros
  if (T < 1 || N < 1 || K < 1) pm::fail(op, "needs T, N and K >= 1, found T = ", T, ", N = ", N, ", K = ", K);
  if (scale) {
    pm::check_tensor(op, "scale", *scale, {DataType::FLOAT32}, {N});
    pm::check_tensor(op, "weight", weight, {DataType::UINT8}, pm::packed_shape(DataType::UINT8, N, K));
    pm::check_packed_columns(op, K);
  } else if (weight.dtype() == DataType::BFLOAT16) {
    pm::check_activations(op, x.dtype(), weight.dtype());
    pm::check_tensor(op, "weight", weight, {DataType::BFLOAT16}, pm::packed_shape(DataType::BFLOAT16, N, K));
  } else {
    pm::check_tensor(op, "weight", weight, {DataType::FLOAT32, DataType::BFLOAT16}, {N, K});
  }
  pm::check_activation_bits(op, activation_bits, static_cast<bool>(scale));
  Tensor y = paddle::empty({T, N}, pm::float_dtype(op, out_dtype), x.place());
  pm::check_status(op, pm_cpu_linear(x.data(), pm::abi_dtype(x.dtype()), weight.data(), pm::abi_dtype(weight.dtype()),
                                     scale ? scale->data<float>() : nullptr, activation_bits, y.data(),
                                     pm::abi_dtype(y.dtype()), T, N, K, nullptr));
  return {y};
}
std::vector<Shape> linear_shape(const Shape& x, const Shape&, const paddle::optional<Shape>&, int out_features,
                                const std::string&, int) {
  return {{x[0], out_features}};
}
std::vector<DataType> linear_dtype(const DataType&, const DataType&, const paddle::optional<DataType>&, int,
                                   const std::string& out_dtype, int) {
  return {pm::float_dtype("linear", out_dtype)};
}

}  // namespace

PD_BUILD_OP(pm_linear)
    .Inputs({"X", "Weight", paddle::Optional("Scale")})
    .Outputs({"Y"})
    .Attrs({"out_features: int", "out_dtype: std::string", "activation_bits: int"})
    .SetKernelFn(PD_KERNEL(linear))
    .SetInferShapeFn(PD_INFER_SHAPE(linear_shape))
    .SetInferDtypeFn(PD_INFER_DTYPE(linear_dtype));
