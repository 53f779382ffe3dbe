// pm_quantize_int8: checks and allocation around kernels/include/quantize.h.
#include "../kernels/include/quantize.h"

#include <cmath>

#include "target.h"

namespace {

using paddle::DataType;
using paddle::Tensor;
using Shape = std::vector<int64_t>;

std::vector<Tensor> quantize_int8(const Tensor& weight) {
  const char* op = "quantize_int8";
  if (pm::target(op, {{"weight", weight}}).device)
    pm::fail(op, "weight is on ", weight.place().DebugString(),
             ", but weights are quantised on the CPU, before they are copied to a device; give weight.cpu()");
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

PD_BUILD_OP(pm_quantize_int8)
    .Inputs({"Weight"})
    .Outputs({"Q", "Scale"})
    .SetKernelFn(PD_KERNEL(quantize_int8))
    .SetInferShapeFn(PD_INFER_SHAPE(quantize_int8_shape))
    .SetInferDtypeFn(PD_INFER_DTYPE(quantize_int8_dtype));
