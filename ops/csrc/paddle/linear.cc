// pm_linear: checks and allocation around kernels/include/linear.h.
#include "../kernels/include/linear.h"

#include "operators.h"

namespace {

using paddle::DataType;
using paddle::Tensor;
using Shape = std::vector<int64_t>;

}  // namespace

Tensor pm::linear(const char* op, const Target& at, const Tensor& x, const Tensor& weight,
                  const paddle::optional<Tensor>& scale, int64_t out_features, const std::string& out_dtype,
                  int activation_bits) {
  pm::check_tensor(op, "x", x, at.activations(), {-1, -1});
  const int64_t T = x.shape()[0], K = x.shape()[1];
  const int64_t N = out_features;  // a packed weight may have more rows, of zeros
  if (T < 1 || N < 1 || K < 1) pm::fail(op, "needs T, N and K >= 1, found T = ", T, ", N = ", N, ", K = ", K);
  if (scale) {
    pm::check_tensor(op, "scale", *scale, {DataType::FLOAT32}, {N});
    pm::check_tensor(op, "weight", weight, {DataType::UINT8}, pm::packed_shape(DataType::UINT8, N, K));
    pm::check_packed_columns(op, K);
  } else if (pm::is_16_bits(weight.dtype())) {
    pm::check_activations(op, x.dtype(), weight.dtype());
    pm::check_tensor(op, "weight", weight, {x.dtype()}, pm::packed_shape(x.dtype(), N, K));
  } else {
    pm::check_tensor(op, "weight", weight, at.unpacked_weights(x.dtype()), {N, K});
  }
  pm::check_activation_bits(op, activation_bits, static_cast<bool>(scale));
  Tensor y = paddle::empty({T, N}, pm::out_dtype(op, out_dtype, at.results()), x.place());
  const pm_dtype x_dtype = pm::abi_dtype(x.dtype()), w_dtype = pm::abi_dtype(weight.dtype());
  const pm_dtype y_dtype = pm::abi_dtype(y.dtype());
  const float* scales = scale ? scale->data<float>() : nullptr;
  if (at.device) {
    Tensor workspace = pm::workspace(at.device->linear_workspace(w_dtype, T, N, K), x.place());
    pm::check_status(op,
                     at.device->linear(x.data(), x_dtype, weight.data(), w_dtype, scales, activation_bits, y.data(), y_dtype,
                                       T, N, K, workspace.data(), at.stream),
                     at);
  } else {
    pm::check_status(op, pm_cpu_linear(x.data(), x_dtype, weight.data(), w_dtype, scales, activation_bits, y.data(), y_dtype,
                                       T, N, K, nullptr));
  }
  return y;
}

namespace {

std::vector<Tensor> linear(const Tensor& x, const Tensor& weight, const paddle::optional<Tensor>& scale, int out_features,
                           const std::string& out_dtype, int activation_bits) {
  const char* op = scale ? "weight_only_linear" : "linear";
  const pm::Target at = pm::target(op, {{"x", x}, {"weight", weight}, {"scale", scale}});
  return {pm::linear(op, at, x, weight, scale, out_features, out_dtype, activation_bits)};
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
