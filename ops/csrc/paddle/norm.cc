// pm_rms_norm and pm_add_rms_norm: checks and allocation around kernels/include/norm.h.
#include "../kernels/include/norm.h"

#include "binding.h"

namespace {

using paddle::DataType;
using paddle::Tensor;
using Shape = std::vector<int64_t>;

void launch(const char* op, const Tensor& residual, const Tensor* delta, const Tensor* rows, const Tensor& weight,
            Tensor* sum, Tensor* y, float eps) {
  pm::check_tensor(op, "residual", residual, {DataType::FLOAT32}, {-1, -1});
  const int64_t T = residual.shape()[0], H = residual.shape()[1];
  if (delta) pm::check_tensor(op, "delta", *delta, {DataType::FLOAT32}, {T, H});
  if (rows) {
    pm::check_tensor(op, "rows", *rows, {DataType::INT32}, {-1});
    pm::check_indices(op, "rows", *rows, T, "the rows of residual");
  }
  pm::check_tensor(op, "weight", weight, {DataType::FLOAT32}, {H});
  if (H < 1 || !(eps > 0)) pm::fail(op, "needs H >= 1 and eps > 0, found H = ", H, ", eps = ", eps);
  pm::check_status(
      op, pm_cpu_rms_norm(residual.data<float>(), delta ? delta->data<float>() : nullptr,
                          rows ? rows->data<int32_t>() : nullptr, weight.data<float>(), sum ? sum->data<float>() : nullptr,
                          y->data(), pm::abi_dtype(y->dtype()), y->shape()[0], H, eps, nullptr));
}

std::vector<Tensor> rms_norm(const Tensor& residual, const Tensor& weight, float eps, const std::string& out_dtype) {
  Tensor y = paddle::empty(residual.shape(), pm::float_dtype("rms_norm", out_dtype), residual.place());
  launch("rms_norm", residual, nullptr, nullptr, weight, nullptr, &y, eps);
  return {y};
}
std::vector<Shape> rms_norm_shape(const Shape& residual, const Shape&) { return {residual}; }
std::vector<DataType> rms_norm_dtype(const DataType&, const DataType&, float, const std::string& out_dtype) {
  return {pm::float_dtype("rms_norm", out_dtype)};
}

std::vector<Shape> add_rms_norm_shape(const Shape& residual, const Shape&, const Shape&,
                                      const paddle::optional<Shape>& rows) {
  const Shape out = rows ? Shape{(*rows)[0], residual[1]} : residual;
  return {out, out};
}
std::vector<Tensor> add_rms_norm(const Tensor& residual, const Tensor& delta, const Tensor& weight,
                                 const paddle::optional<Tensor>& rows, float eps, const std::string& out_dtype) {
  const char* op = "add_rms_norm";
  pm::check_tensor(op, "residual", residual, {DataType::FLOAT32}, {-1, -1});
  if (rows) pm::check_tensor(op, "rows", *rows, {DataType::INT32}, {-1});
  const Shape shape = {rows ? rows->numel() : residual.shape()[0], residual.shape()[1]};
  Tensor y = paddle::empty(shape, pm::float_dtype(op, out_dtype), residual.place());
  Tensor sum = paddle::empty(shape, DataType::FLOAT32, residual.place());
  launch(op, residual, &delta, rows.get_ptr(), weight, &sum, &y, eps);
  return {y, sum};
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
