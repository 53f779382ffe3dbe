// pm_rms_norm and pm_add_rms_norm: checks and allocation around kernels/include/norm.h.
#include "../kernels/include/norm.h"

#include "operators.h"

namespace {

using paddle::DataType;
using paddle::Tensor;
using Shape = std::vector<int64_t>;

}  // namespace

Tensor pm::rms_norm(const char* op, const Target& at, const Tensor& residual, const Tensor* delta, const Tensor& weight,
                    const Tensor* rows, float eps, const std::string& out_dtype, Tensor* sum) {
  pm::check_tensor(op, "residual", residual, {DataType::FLOAT32}, {-1, -1});
  const int64_t T = residual.shape()[0], H = residual.shape()[1];
  if (delta) pm::check_tensor(op, "delta", *delta, {DataType::FLOAT32}, {T, H});
  if (rows) pm::check_tensor(op, "rows", *rows, {DataType::INT32}, {-1});
  if (rows && !at.device) pm::check_indices(op, "rows", *rows, T, "the rows of residual");
  pm::check_tensor(op, "weight", weight, {DataType::FLOAT32}, {H});
  if (H < 1 || !(eps > 0)) pm::fail(op, "needs H >= 1 and eps > 0, found H = ", H, ", eps = ", eps);
  const int64_t S = rows ? rows->numel() : T;
  Tensor y = paddle::empty({S, H}, pm::out_dtype(op, out_dtype, at.activations()), residual.place());
  if (sum && sum != &residual) *sum = paddle::empty({S, H}, DataType::FLOAT32, residual.place());
  const auto norm = at.device ? at.device->rms_norm : pm_cpu_rms_norm;
  pm::check_status(op,
                   norm(residual.data<float>(), delta ? delta->data<float>() : nullptr,
                        rows ? rows->data<int32_t>() : nullptr, weight.data<float>(), sum ? sum->data<float>() : nullptr,
                        y.data(), pm::abi_dtype(y.dtype()), S, H, eps, at.stream),
                   at);
  return y;
}

namespace {

std::vector<Tensor> rms_norm(const Tensor& residual, const Tensor& weight, float eps, const std::string& out_dtype) {
  const char* op = "rms_norm";
  const pm::Target at = pm::target(op, {{"residual", residual}, {"weight", weight}});
  return {pm::rms_norm(op, at, residual, nullptr, weight, nullptr, eps, out_dtype, nullptr)};
}
std::vector<Shape> rms_norm_shape(const Shape& residual, const Shape&) { return {residual}; }
std::vector<DataType> rms_norm_dtype(const DataType&, const DataType&, float, const std::string& out_dtype) {
  return {pm::float_dtype("rms_norm", out_dtype)};
}

std::vector<Tensor> add_rms_norm(const Tensor& residual, const Tensor& delta, const Tensor& weight,
                                 const paddle::optional<Tensor>& rows, float eps, const std::string& out_dtype) {
  const char* op = "add_rms_norm";
  const pm::Target at = pm::target(op, {{"residual", residual}, {"delta", delta}, {"weight", weight}, {"rows", rows}});
  Tensor sum;
  Tensor y = pm::rms_norm(op, at, residual, &delta, weight, rows.get_ptr(), eps, out_dtype, &sum);
  return {y, sum};
}
std::vector<Shape> add_rms_norm_shape(const Shape& residual, const Shape&, const Shape&,
                                      const paddle::optional<Shape>& rows) {
  const Shape out = rows ? Shape{(*rows)[0], residual[1]} : residual;
  return {out, out};
}
std::vector<DataType> add_rms_norm_dtype(const DataType&, const DataType&, const DataType&,
                                         const paddle::optional<DataType>&, float, const std::string& out_dtype) {
  return {pm::float_dtype("add_rms_norm", out_dtype), DataType::FLOAT32};
}

}  // namespace

PD_BUILD_OP(pm_rms_norm)
    .Inputs({"Residual", "Weight"})
    .Outputs({"Y"})
    .Attrs({"eps: float", "out_dtype: std::string"})
    .SetKernelFn(PD_KERNEL(rms_norm))
    .SetInferShapeFn(PD_INFER_SHAPE(rms_norm_shape))
    .SetInferDtypeFn(PD_INFER_DTYPE(rms_norm_dtype));

PD_BUILD_OP(pm_add_rms_norm)
    .Inputs({"Residual", "Delta", "Weight", paddle::Optional("Rows")})
    .Outputs({"Y", "Sum"})
    .Attrs({"eps: float", "out_dtype: std::string"})
    .SetKernelFn(PD_KERNEL(add_rms_norm))
    .SetInferShapeFn(PD_INFER_SHAPE(add_rms_norm_shape))
    .SetInferDtypeFn(PD_INFER_DTYPE(add_rms_norm_dtype));
