// pm_rms_norm and pm_add_rms_norm: checks and allocation around kernels/include/norm.h.
#include "../kernels/include/norm.h"

#include "binding.h"

namespace {

using paddle::DataType;
using paddle::Tensor;
using Shape = std::vector<int64_t>;

void launch(const char* op, const Tensor& residual, const Tensor* delta, const Tensor& weight, Tensor* sum, Tensor* y,
            float eps) {
  pm::check_tensor(op, "residual", residual, {DataType::FLOAT32}, {-1, -1});
  const int64_t T = residual.shape()[0], H = residual.shape()[1];
  if (delta) pm::check_tensor(op, "delta", *delta, {DataType::FLOAT32}, {T, H});
  pm::check_tensor(op, "weight", weight, {DataType::FLOAT32}, {H});
  if (H < 1 || !(eps > 0)) pm::fail(op, "needs H >= 1 and eps > 0, found H = ", H, ", eps = ", eps);
  pm::check_status(
      op, pm_cpu_rms_norm(residual.data<float>(), delta ? delta->data<float>() : nullptr, weight.data<float>(),
                          sum ? sum->data<float>() : nullptr, y->data(), pm::abi_dtype(y->dtype()), T, H, eps, nullptr));
}

std::vector<Tensor> rms_norm(const Tensor& residual, const Tensor& weight, float eps, const std::string& out_dtype) {
  Tensor y = paddle::empty(residual.shape(), pm::float_dtype("rms_norm", out_dtype), residual.place());
  launch("rms_norm", residual, nullptr, weight, nullptr, &y, eps);
  return {y};
}
std::vector<Shape> rms_norm_shape(const Shape& residual, const Shape&) { return {residual}; }
std::vector<DataType> rms_norm_dtype(const DataType&, const DataType&, float, const std::string& out_dtype) {
  return {pm::float_dtype("rms_norm", out_dtype)};
}

std::vector<Tensor> add_rms_norm(const Tensor& residual, const Tensor& delta, const Tensor& weight, float eps,
                                 const std::string& out_dtype) {
  Tensor y = paddle::empty(residual.shape(), pm::float_dtype("add_rms_norm", out_dtype), residual.place());
  Tensor sum = paddle::empty(residual.shape(), DataType::FLOAT32, residual.place());
  launch("add_rms_norm", residual, &delta, weight, &sum, &y, eps);
  return {y, sum};
}
std::vector<Shape> add_rms_norm_shape(const Shape& residual, const Shape&, const Shape&) { return {residual, residual}; }
std::vector<DataType> add_rms_norm_dtype(const DataType&, const DataType&, const DataType&, float,
                                         const std::string& out_dtype) {
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
    .Inputs({"Residual", "Delta", "Weight"})
    .Outputs({"Y", "Sum"})
    .Attrs({"eps: float", "out_dtype: std::string"})
    .SetKernelFn(PD_KERNEL(add_rms_norm))
    .SetInferShapeFn(PD_INFER_SHAPE(add_rms_norm_shape))
    .SetInferDtypeFn(PD_INFER_DTYPE(add_rms_norm_dtype));
